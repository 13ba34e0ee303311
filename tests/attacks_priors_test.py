"""Penalties against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.attacks import priors


def test_total_variation():
  x = np.random.default_rng(0).uniform(size=(2, 4, 5, 3)).astype(np.float32)
  expected = np.abs(np.diff(x, axis=1)).mean() + np.abs(np.diff(x, axis=2)).mean()
  np.testing.assert_allclose(priors.total_variation(x), expected, rtol=1e-6)
  assert priors.total_variation(jnp.ones((1, 3, 3, 1))) == 0


def test_group_pulls_towards_the_mean_of_the_restarts():
  x = jnp.array([0.0, 1.0, 5.0]).reshape(3, 1, 1, 1, 1)
  value, pull = jax.vmap(
    jax.value_and_grad(lambda x: priors.group(x, "restarts")), axis_name="restarts"
  )(x)
  np.testing.assert_allclose(value, [4, 1, 9])
  np.testing.assert_allclose(pull.ravel(), [-4, -2, 6])


def test_batch_norm_is_least_at_the_running_statistics():
  def apply(params, state, images, *, train, key):
    assert train
    batch = {"mean": images.mean((0, 1, 2)), "var": images.var((0, 1, 2))}
    return None, jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state, batch)

  x = jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 3, 2)), jnp.float32)
  state = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2))}
  value, pull = jax.value_and_grad(lambda x: priors.batch_norm(apply, None, state, x))(x)
  np.testing.assert_allclose(value, 2e-6, rtol=0.1)
  assert jnp.isfinite(pull).all()
  moved = {"mean": state["mean"] + jnp.array([3.0, 4.0]), "var": state["var"]}
  np.testing.assert_allclose(priors.batch_norm(apply, None, moved, x), 0.5, rtol=1e-4)
  with pytest.raises(ValueError, match="BatchNorm"):
    priors.batch_norm(apply, None, {}, x)


def test_registration_undoes_a_shift_and_restarts_that_are_shifted_agree():
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(2, 6, 5, 1)).astype(np.float32)
  moved = np.stack([np.roll(x[0], (2, -1), (0, 1)), np.roll(x[1], (-1, 2), (0, 1))])
  np.testing.assert_allclose(jax.jit(priors.register)(moved, x), x, atol=1e-7)
  restarts = np.stack([x, moved])
  of = lambda registered: jax.vmap(
    lambda x: priors.group(x, "restarts", registered=registered), axis_name="restarts"
  )(restarts)
  np.testing.assert_allclose(of(True), 0, atol=1e-9)
  assert of(False).min() > 0.01
