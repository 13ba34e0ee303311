import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax.privacy import rotation

KEY = jax.random.key(5)
# One program for each size in the place of one for each operation and size.
ROTATE = jax.jit(rotation.rotate, static_argnames="chunk_size")
UNROTATE = jax.jit(rotation.unrotate, static_argnames=("chunk_size", "dim"))


@settings(deadline=None, max_examples=8)
@given(st.integers(1, 300), st.sampled_from([1, 8, 256]))
def test_it_keeps_norms_and_is_undone(dim, chunk_size):
  x = np.random.default_rng(dim).normal(size=dim).astype(np.float32)
  y = ROTATE(x, KEY, chunk_size)
  assert y.shape == (rotation.padded_size(dim, chunk_size),)
  np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)
  np.testing.assert_allclose(
    UNROTATE(y, KEY, chunk_size, dim), x, atol=2e-6 * float(np.linalg.norm(x)) + 1e-7
  )


@pytest.mark.parametrize("chunk_size", [1, 2, 16, 128])
def test_it_is_the_hadamard_matrix_with_random_signs(chunk_size):
  matrix = np.asarray(
    jax.vmap(lambda x: ROTATE(x, KEY, chunk_size))(np.eye(chunk_size, dtype=np.float32))
  ).T
  signs = np.sign(matrix[0])  # the first row of H is all ones
  np.testing.assert_allclose(
    matrix * signs[None, :] * np.sqrt(chunk_size), scipy.linalg.hadamard(chunk_size), atol=1e-5
  )
  if chunk_size == 128:
    assert 40 < np.sum(signs > 0) < 88
    other = np.asarray(ROTATE(np.ones(128, np.float32), jax.random.key(6), 128))
    assert not np.allclose(other, ROTATE(np.ones(128, np.float32), KEY, 128))


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 1, 2), (2, 8, 16)])
def test_both_forms_agree(shape):
  """One runs on CPU, the other on accelerators."""
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  np.testing.assert_allclose(
    jax.jit(rotation._butterflies)(x), jax.jit(rotation._products)(x), atol=1e-5
  )


def test_chunks_are_rotated_apart_and_by_signs_of_their_own():
  x = np.repeat(np.float32([0, 1, 1]), 64)
  y = np.asarray(ROTATE(x, KEY, 64)).reshape(3, 64)
  assert not y[0].any()
  assert not np.allclose(y[1], y[2])


@pytest.mark.parametrize("spike", [np.eye(1, 4096)[0], np.ones(4096), np.sin(np.arange(4096.0))])
def test_it_flattens(spike):
  x = (spike / np.linalg.norm(spike)).astype(np.float32)
  largest = float(np.max(np.abs(ROTATE(x, KEY, 4096))))
  assert largest < 6 / 64  # six standard deviations; a spike is 1 before
  assert float(np.max(np.abs(ROTATE(x, KEY, 1)))) == pytest.approx(
    float(np.max(np.abs(x)))
  )  # no rotation


def test_flatten_and_back():
  tree = {
    "a": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
    "b": [jnp.ones(()), jnp.zeros((0, 2)), jnp.arange(3.0)],
  }
  flat = rotation.flatten(tree)
  assert flat.dtype == jnp.float32
  assert flat.shape == (10,)
  back = rotation.unflatten(flat, tree)
  jax.tree.map(np.testing.assert_array_equal, tree, back)
  assert jax.tree.map(lambda a: a.dtype, back) == jax.tree.map(lambda a: a.dtype, tree)
  with pytest.raises(ValueError, match="cannot fill"):
    rotation.unflatten(flat[1:], tree)


def test_bad_sizes_are_refused():
  with pytest.raises(ValueError, match="power of two"):
    rotation.rotate(jnp.ones(4), KEY, 3)
  with pytest.raises(ValueError, match="padded"):
    rotation.unrotate(jnp.ones(4), KEY, 8, 4)


def test_jit_and_vmap_change_nothing():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 50)), jnp.float32)
  plain = np.stack([rotation.rotate(row, KEY, 16) for row in x])
  np.testing.assert_allclose(
    jax.jit(jax.vmap(lambda r: rotation.rotate(r, KEY, 16)))(x), plain, atol=1e-6
  )
