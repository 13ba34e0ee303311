"""One private step: what `clipping.clipped_gradients` sums and `privatizers` noise and divide."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from primia_jax import prng
from primia_jax.privacy import clipping, correlated, grid, privatizers, strategies
from primia_jax.privacy.clipping import Clipping
from primia_jax.privacy.grid import Rounded
from primia_jax.types import Batch, Metrics

SECRET = jnp.arange(8, dtype=jnp.uint32) + 99
KEY = jax.random.key(0)
PARAMS = {"w": jnp.zeros((40, 25)), "b": jnp.zeros(24)}
CLIPPING, RATE, NOISE = Clipping(2.0), 0.25, 1.5
LITTLE = 1e-5  # noise that tests of sums do not see


def loss_fn(params, model_state, batch, key):
  """Its gradient with respect to every weight is the mean image value."""
  del key
  values = batch.weights * batch.images.reshape(*batch.weights.shape)
  count = jnp.sum((batch.weights > 0).astype(jnp.float32))
  scale = jnp.sum(params["w"]) + jnp.sum(params["b"])
  loss = scale * jnp.sum(values)
  return loss / jnp.maximum(count, 1.0), (model_state, Metrics(loss, count, count))


def batch_of(values, weights=None):
  values = np.asarray(values, np.float32)
  weights = np.ones(values.shape) if weights is None else np.asarray(weights)
  return Batch(
    jnp.asarray(values[..., None, None, None]),
    jnp.zeros(values.shape, jnp.int32),
    jnp.asarray(weights, jnp.float32),
    jnp.arange(len(values), dtype=jnp.int32),
  )


def flat(tree):
  return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])


def step_of(multiplier=NOISE, unit="example", max_units=4):
  """(batch, step, num_units) -> a step's gradient; `step` numbers it."""
  grid_of = lambda dim, units: grid.choose(dim, multiplier, units)
  grad_fn = clipping.clipped_gradients(loss_fn, CLIPPING, unit, max_units, grid_of)
  noisy = privatizers.gaussian(multiplier, RATE)

  def run(batch, step=0, num_units=16, state=None, secret=SECRET):
    total, (after, metrics) = grad_fn(PARAMS, {} if state is None else state, batch, KEY)
    assert after == {}
    step, num_units = jnp.asarray(step, jnp.uint32), jnp.asarray(num_units, jnp.int32)
    numbers = {"secret": secret, "step": step, "num_units": num_units}
    return noisy.update(total, noisy.init(PARAMS), PARAMS, **numbers)[0], metrics

  return run


@functools.cache
def compiled(*args):
  return jax.jit(step_of(*args))


def gradient(batch, *args, step=0):
  return flat(compiled(*args)(batch, step)[0])


@pytest.mark.parametrize("scale", [2 / 3, 1, 3 / 2])
@pytest.mark.parametrize("empty", [True, False])
def test_noise_of_the_right_scale_is_accepted_and_2_thirds_and_3_halves_are_rejected(scale, empty):
  """For gradients that clip and for a batch of nobody; the noise is of the sum, so q n divides
  it.
  """
  values, weights = [5.0, -0.01, 3.0, 1.0], [0.0] * 4 if empty else [1.0, 1.0, 0.5, 0.0]
  batch, noise = batch_of(values, weights), []
  expected = gradient(batch, LITTLE) * 4
  for step in range(30):
    noise.append(gradient(batch, step=step) * 4 - expected)
  z = np.concatenate(noise) / (1.5 * 2.0 * scale)
  variance = 2 * min(stats.chi2.cdf(np.sum(z**2), len(z)), stats.chi2.sf(np.sum(z**2), len(z)))
  assert (variance > 1e-4 and stats.kstest(z, "norm").pvalue > 1e-4) == (scale == 1)
  assert np.any(np.abs(expected) > 1e-2) != empty
  steps = np.stack(noise)
  correlation = steps @ steps.T / (steps.std() ** 2 * steps.shape[1]) - np.eye(30)
  assert np.abs(correlation).max() * math.sqrt(steps.shape[1]) < 5


def test_sum_of_clipped_gradients_over_the_expected_number_of_units():
  batch = batch_of([5.0, -0.01, 3.0, 1.0], [1.0, 1.0, 1e-3, 0.0])
  grads, metrics = compiled(LITTLE)(batch)
  size = math.sqrt(1024)
  np.testing.assert_allclose(flat(grads), (2 / size - 0.01 + 3e-3) / (0.25 * 16), atol=1e-4)
  assert all(m == 0 for m in metrics)  # the true ones are not private


def test_neighbouring_batches_differ_by_the_clip_norm_at_most_and_not_with_clipping_off(
  monkeypatch,
):
  batches = [batch_of([50.0, 1.0, 2.0, 3.0], [on, 1.0, 1.0, 1.0]) for on in (0.0, 1.0)]
  change = lambda run: np.linalg.norm(np.subtract(*(run(b) for b in batches))) * 4
  assert 1.99 < change(gradient) < 2 * (1 + 1e-5)  # the noise is the same, and cancels
  monkeypatch.setattr(
    clipping, "_factors", lambda squares, on, unclipped, _: jnp.full_like(squares, unclipped)
  )
  off = jax.jit(step_of())
  assert change(lambda b: flat(off(b)[0])) > 1000


def test_a_gradient_that_is_not_finite_is_an_ordinary_step():
  spoilt = gradient(batch_of([1.0, np.nan, np.inf, 2.0]))
  assert np.array_equal(spoilt, gradient(batch_of([1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, 1.0])))


def test_units_without_numbers_are_refused():
  with pytest.raises(ValueError, match="no numbers of its units"):
    step_of()(batch_of([1.0] * 4)._replace(numbers=None))


def test_patients_are_clipped_as_one_and_the_batch_must_have_the_form():
  patients = (LITTLE, "patient", 2)
  rows = batch_of([[9.0, 9.0, 9.0], [0.01, 0.03, 7.0]], [[1, 1, 1], [1, 1, 0]])
  np.testing.assert_allclose(gradient(rows, *patients), (2 / 32 + 0.02) / 4, atol=1e-4)
  for wrong, batch in ((patients, batch_of([1.0, 2.0])), ((), rows), ((), batch_of([1.0] * 5))):
    with pytest.raises(ValueError, match="do not fit unit"):
      gradient(batch, *wrong)


def test_a_model_with_state_is_refused():
  with pytest.raises(ValueError, match="use norm=group"):
    step_of()(batch_of([1.0] * 4), state={"batch_stats": jnp.zeros(3)})


@pytest.mark.parametrize("config", [None, strategies.tree(4, 2, 1.0, 1.0)])
def test_without_a_secret_nothing_is_released(config):
  noisy = privatizers.gaussian(1.0, 0.5) if config is None else privatizers.correlate(config, 1)
  on = grid.choose(3, 1.0) if config is None else correlated.grid_of(config)(3)
  total = Rounded({"w": jnp.zeros(3, jnp.int32)}, jnp.float32(1), on)
  numbers = {"secret": None, "step": jnp.uint32(0), "num_units": jnp.int32(4)}
  with pytest.raises(ValueError, match="needs a secret at each site"):
    noisy.update(total, noisy.init(total.integers), **numbers)


def test_a_sum_that_was_rounded_for_other_noise_is_refused():
  numbers = {"secret": SECRET, "step": jnp.uint32(0), "num_units": jnp.int32(4)}
  total = Rounded({"w": jnp.zeros(3, jnp.int32)}, jnp.float32(1), grid.choose(3, 3.0))
  for noisy in (
    privatizers.gaussian(1.0, 0.5),
    privatizers.correlate(strategies.tree(4, 2, 1.0, 1.0), 1),
  ):
    with pytest.raises(ValueError, match="was rounded for noise_multiplier=3"):
      noisy.update(total, noisy.init(total.integers), **numbers)
    with pytest.raises(ValueError, match="which are rounded"):
      noisy.update(PARAMS, noisy.init(PARAMS), **numbers)


def test_steps_run_at_several_sites_at_once():
  """Under vmap, each site with its own secret, batch and number of units."""
  batches = [batch_of([1.0, 0.2, 3.0, 0.1]), batch_of([0.3, 0.2, 0.0, 0.1], [1, 1, 0, 0])]
  secrets = jnp.stack([prng.derive(SECRET, 1), prng.derive(SECRET, 2)])
  stacked, numbers = jax.tree.map(lambda *a: jnp.stack(a), *batches), jnp.array([16, 8], jnp.int32)
  one = lambda batch, num_units, secret: step_of()(batch, 3, num_units, None, secret)[0]
  together, by_itself = jax.jit(jax.vmap(one))(stacked, numbers, secrets), jax.jit(one)
  for site in range(2):
    alone = by_itself(batches[site], numbers[site], secrets[site])
    np.testing.assert_allclose(
      flat(jax.tree.map(lambda a, s=site: a[s], together)), flat(alone), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["banded", "tree"])
def test_a_secret_of_its_own_for_each_round_leaves_correlated_noise_as_it_is_meant(kind):
  """The state holds what later noise needs of earlier draws: it cancels over rounds all the same,
  to the standard deviation of its matrices; a state that each round starts anew does not.
  """
  rounds, each, width = 4, 3, 20_000
  config = strategies.make(kind, rounds * each, 6, 2, 1.0, 0.5)
  noisy, like = privatizers.correlate(config, 1), jnp.zeros(width, jnp.int32)
  on = correlated.grid_of(config)(width)
  nothing = Rounded(like, jnp.float32(0.5 / on.steps), on)
  update = jax.jit(noisy.update)

  def errors(kept):
    state, total, found = noisy.init(like), 0.0, []
    for r in range(rounds):
      state = state if kept else correlated.init(config, like)
      for t in range(each):
        numbers = {"secret": prng.derive(SECRET, r), "step": jnp.uint32(t)}
        drawn, state = update(nothing, state, like, **numbers, num_units=jnp.int32(6))
        total = total + np.asarray(drawn, np.float64)
      found.append(total.std())
    return np.array(found)

  want = np.sqrt(strategies.squared_errors(config)[each - 1 :: each])
  np.testing.assert_allclose(errors(True), want, rtol=0.03)
  assert abs(errors(False)[-1] / want[-1] - 1) > 0.1
