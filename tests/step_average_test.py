"""The average over steps against NumPy, on the quadratic sites of `algorithms_test`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from algorithms_test import (
  CURVATURE,
  IDS,
  KEY,
  NUM,
  ROUNDS,
  SCHEDULE,
  STEPS,
  X0,
  A,
  M,
  check,
  recipe,
  run,
  vector,
)  # fmt: skip

from primia_jax import algorithms, robust, secagg, site_privacy, step_average, summation
from primia_jax import federated as fed


def averages(decay, weights, momentum=0.0, keep=False):
  """Global parameters and average after all rounds."""
  x, average, velocities = X0, X0, [np.zeros(5)] * 4
  for r in range(ROUNDS):
    ends, own = [], []
    for i in IDS:
      scale = np.array([1.0 + CURVATURE[i]] * 3 + [1.0] * 2)
      y, a, velocity = x.copy(), average.copy(), velocities[i] if keep else np.zeros(5)
      for t in range(STEPS[i]):
        velocity = momentum * velocity + scale * (y - np.concatenate([A[i], M[i]]))
        y = y - SCHEDULE(r + t / STEPS[i]) * velocity
        n = r * max(STEPS) + t
        k = min(decay, (1 + n) / (10 + n))
        a = k * a + (1 - k) * y
      velocities[i] = velocity
      ends.append(y)
      own.append(a)
    x, average = (np.average(values, axis=0, weights=weights) for values in (ends, own))
  return x, average


def shown(algorithm, state):
  server = fed.Global(state.params, {}, state.server_state, state.round, KEY)
  return vector(algorithm.personal(server, ())[0])


@pytest.mark.parametrize("keep", [True, False])
def test_the_average_follows_every_step_and_changes_no_training(keep):
  algorithm = step_average.averaged(recipe(0.9), 0.8, keep_optimizer=keep)
  state = run(algorithm)
  x, average = averages(0.8, NUM, 0.9, keep)
  check(state, x)
  np.testing.assert_allclose(shown(algorithm, state), average, rtol=2e-5, atol=2e-6)
  plain = run(algorithms.fedavg(recipe(0.9), keep_optimizer=keep))
  np.testing.assert_array_equal(vector(state.params), vector(plain.params))
  assert jax.tree.structure(state.site_state) == jax.tree.structure(plain.site_state)
  assert np.abs(average - x).max() > 0.01


def test_masks_hide_the_averages_in_the_same_sum():
  algorithm = step_average.averaged(recipe(), 0.8, weighting="uniform", proximal=0.3)
  masked = summation.masked(secagg.secure_sum(4))
  found, wanted = (run(algorithm, summed=s) for s in (masked, summation.clear()))
  np.testing.assert_allclose(shown(algorithm, found), shown(algorithm, wanted), atol=1e-5)
  assert algorithm.name == "fedprox"


def test_the_optimiser_is_unchanged_but_for_its_state():
  params = {"w": jnp.asarray([1.0, 2.0])}
  plain, averaging = optax.adam(0.1), step_average.over_steps(optax.adam, 0.9)(0.1)
  own, state = plain.init(params), averaging.init(params)
  average = np.array([1.0, 2.0])
  for t in range(3):
    grads = {"w": jnp.asarray([0.5, -1.0]) * (t + 1)}
    with jax.numpy_dtype_promotion("standard"):
      want, own = plain.update(grads, own, params)
      got, state = averaging.update(grads, state, params)
    np.testing.assert_array_equal(got["w"], want["w"])
    params = optax.apply_updates(params, got)
    k = min(0.9, (1 + t) / (10 + t))
    average = k * average + (1 - k) * np.asarray(params["w"])
    np.testing.assert_allclose(state.average["w"], average, rtol=1e-6)
  assert int(state.step) == 3


def test_rules_and_bounds_that_do_not_cover_it_refuse_it():
  algorithm = step_average.averaged(recipe(), 0.9, weighting="uniform")
  with pytest.raises(ValueError, match="uniform weighting"):
    run(algorithm, [], summation.by_rule("median", robust.median()))
  with pytest.raises(ValueError, match="uniform weighting"):
    site_privacy.bounded(algorithm, 1.0, 1.0)
  with pytest.raises(ValueError, match="decay=1"):
    step_average.averaged(recipe(), 1.0)
