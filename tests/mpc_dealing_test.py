import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from primia_jax import prng
from primia_jax.mpc import dealing
from primia_jax.mpc.dealing import ADDITIVE, BOOLEAN, Derived, Uniform

KEYS = [prng.key_of(bytes(range(i, i + 32))) for i in range(2)]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_uniform_words_of_every_width(dtype):
  with jax.enable_x64(True):
    out = np.asarray(dealing.uniform(KEYS[0], 3, 5, (7, 1001), dtype))
    assert out.dtype == dtype
    assert out.shape == (7, 1001)
    assert stats.chisquare(np.bincount(out.reshape(-1).view(np.uint8), minlength=256)).pvalue > 1e-4
    for other in ((KEYS[0], 3, 6), (KEYS[0], 4, 5), (KEYS[1], 3, 5)):
      again = np.asarray(dealing.uniform(*other, (7, 1001), dtype))
      assert (again == out).mean() < 0.01


def test_chacha20_is_the_stream_of_prng():
  want = prng.bits(KEYS[0], jnp.array([3, 5, 0], jnp.uint32), (9,))
  np.testing.assert_array_equal(dealing.uniform(KEYS[0], 3, 5, (9,), np.uint32), want)
  words = dealing.uniform(KEYS[0], 3, 5, (36,), np.uint8)
  np.testing.assert_array_equal(np.asarray(words).view("<u4"), want)


def test_what_is_split_adds_up():
  values = Derived(
    {"a": jnp.arange(100, dtype=jnp.uint32)}, {"b": jnp.arange(50, dtype=jnp.uint8)}, {}
  )
  second = dealing.split(KEYS[0], 2, values)
  first = dealing.expand_shares(KEYS[0], 2, second)
  np.testing.assert_array_equal(first["a"] + second["a"], values.additive["a"])
  np.testing.assert_array_equal(first["b"] ^ second["b"], values.boolean["b"])
  shapes = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), second)
  np.testing.assert_array_equal(dealing.expand_shares(KEYS[0], 2, shapes)["b"], first["b"])


def test_what_is_sent_is_uniform_whatever_it_hides():
  for value in (0, 1):
    sent = dealing.split(
      KEYS[value], 0, Derived({"a": jnp.full(2**14, value, jnp.uint32)}, {}, {})
    )["a"]
    assert (
      stats.chisquare(np.bincount(np.asarray(sent).view(np.uint8), minlength=256)).pvalue > 1e-4
    )


def test_masks_are_the_parties_own_and_no_two_alike():
  masks = {"r": Uniform((64,), np.uint32, ADDITIVE), "s": Uniform((64,), np.uint32, BOOLEAN)}
  both = [dealing.expand_masks(key, 1, masks) for key in KEYS]
  arrays = [np.asarray(v).tobytes() for each in both for v in each.values()]
  assert len(set(arrays)) == 4
  total = dealing.open_mask(jnp.stack([b["r"] for b in both]), ADDITIVE)
  np.testing.assert_array_equal(total, both[0]["r"] + both[1]["r"])
