import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from primia_jax import prng
from primia_jax.privacy import clipping, mechanism, sampling
from primia_jax.types import Batch, Metrics

SECRET = jnp.arange(8, dtype=jnp.uint32) + 99
KEY = jax.random.key(0)
PARAMS = {"w": jnp.zeros((40, 25)), "b": jnp.zeros(24)}
MECHANISM = mechanism.Mechanism(1.5, 0.25, 4, l2_clip_norm=2.0)


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
  )


def flat(tree):
  return np.concatenate([np.asarray(a, np.float64).ravel() for a in jax.tree.leaves(tree)])


def gradient(mech=MECHANISM, batch=None, secret=SECRET, num_units=16.0, state=None):
  batch = batch_of([0.0] * mech.max_units) if batch is None else batch
  return private(mech)(
    PARAMS, {} if state is None else state, batch, KEY, secret, jnp.float32(num_units)
  )


@functools.cache
def private(mech):
  return jax.jit(mechanism.private_gradients(loss_fn, mech))


def step_secret(step):
  return prng.derive(SECRET, step)


@pytest.mark.parametrize("scale", [2 / 3, 1, 3 / 2])
@pytest.mark.parametrize("empty", [True, False])
def test_noise_of_the_right_scale_is_accepted_and_2_thirds_and_3_halves_are_rejected(scale, empty):
  """For gradients that clip and for a batch of nobody; the noise is of the sum, so q n divides
  it.
  """
  values, weights = [5.0, -0.01, 3.0, 1.0], [0.0] * 4 if empty else [1.0, 1.0, 0.5, 0.0]
  batch, noise = batch_of(values, weights), []
  without = dataclasses.replace(MECHANISM, noise_multiplier=0, private=False)
  expected = flat(gradient(without, batch)[0]) * 4
  for step in range(30):
    noise.append(flat(gradient(batch=batch, secret=step_secret(step))[0]) * 4 - expected)
  z = np.concatenate(noise) / (1.5 * 2.0 * scale)
  variance = 2 * min(stats.chi2.cdf(np.sum(z**2), len(z)), stats.chi2.sf(np.sum(z**2), len(z)))
  assert (variance > 1e-4 and stats.kstest(z, "norm").pvalue > 1e-4) == (scale == 1)
  assert np.any(expected) != empty
  steps = np.stack(noise)
  correlation = steps @ steps.T / (steps.std() ** 2 * steps.shape[1]) - np.eye(30)
  assert np.abs(correlation).max() * math.sqrt(steps.shape[1]) < 5


def test_sum_of_clipped_gradients_over_the_expected_number_of_units():
  without = dataclasses.replace(MECHANISM, noise_multiplier=0, private=False)
  grads, (state, metrics) = gradient(
    without, batch_of([5.0, -0.01, 3.0, 1.0], [1.0, 1.0, 1e-3, 0.0])
  )
  size = math.sqrt(1024)
  np.testing.assert_allclose(flat(grads), (2 / size - 0.01 + 3e-3) / (0.25 * 16), rtol=1e-5)
  assert state == {}
  assert float(metrics.num_examples) == 3


def test_neighbouring_batches_differ_by_the_clip_norm_at_most_and_not_with_clipping_off(
  monkeypatch,
):
  batches = [batch_of([50.0, 1.0, 2.0, 3.0], [on, 1.0, 1.0, 1.0]) for on in (0.0, 1.0)]
  change = lambda run: np.linalg.norm(np.subtract(*(flat(run(b)) for b in batches))) * 4
  assert (
    1.999 < change(lambda b: gradient(batch=b)[0]) < 2.001
  )  # the noise is the same, and cancels
  monkeypatch.setattr(clipping, "_factors", lambda squares, *_: jnp.ones_like(squares))
  off = jax.jit(mechanism.private_gradients(loss_fn, MECHANISM))
  assert change(lambda b: off(PARAMS, {}, b, KEY, SECRET, jnp.float32(16))[0]) > 1000


def test_a_gradient_that_is_not_finite_is_an_ordinary_step():
  spoilt, _ = gradient(batch=batch_of([1.0, np.nan, np.inf, 2.0]))
  without, _ = gradient(batch=batch_of([1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 0.0, 1.0]))
  assert np.array_equal(flat(spoilt), flat(without))


def test_patients_are_clipped_as_one_and_the_batch_must_have_the_form():
  mech = dataclasses.replace(
    MECHANISM, unit="patient", max_units=2, noise_multiplier=0, private=False
  )
  rows = batch_of([[9.0, 9.0, 9.0], [0.01, 0.03, 7.0]], [[1, 1, 1], [1, 1, 0]])
  np.testing.assert_allclose(flat(gradient(mech, rows)[0]), (2 / 32 + 0.02) / 4, rtol=1e-5)
  for wrong, batch in (
    (mech, batch_of([1.0, 2.0])),
    (MECHANISM, rows),
    (MECHANISM, batch_of([1.0] * 5)),
  ):
    with pytest.raises(ValueError, match="do not fit unit"):
      gradient(wrong, batch)


def test_a_model_with_state_is_refused():
  with pytest.raises(ValueError, match="use norm=group"):
    gradient(state={"batch_stats": jnp.zeros(3)})


def test_private_gradients_run_at_several_sites_at_once():
  """Under vmap, each site with its own secret, batch and number of units."""
  batches = [batch_of([1.0, 0.2, 3.0, 0.1]), batch_of([0.3, 0.2, 0.0, 0.1], [1, 1, 0, 0])]
  secrets = jnp.stack([step_secret(1), step_secret(2)])
  run = jax.vmap(mechanism.private_gradients(loss_fn, MECHANISM), (None, None, 0, None, 0, 0))
  stacked = jax.tree.map(lambda *a: jnp.stack(a), *batches)
  together, _ = jax.jit(run)(PARAMS, {}, stacked, KEY, secrets, jnp.array([16.0, 8.0]))
  for site in range(2):
    alone, _ = gradient(batch=batches[site], secret=secrets[site], num_units=(16.0, 8.0)[site])
    np.testing.assert_allclose(
      flat(jax.tree.map(lambda a, s=site: a[s], together)), flat(alone), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
  ("num_examples", "rate", "steps"),
  [(5000, 0.01, 3000), (200, 0.5, 10), (3, 0.9, 1), (60000, 1.0, 5)],
)
def test_capacity_is_the_smallest_that_fits_and_overflow_agrees(num_examples, rate, steps):
  rows = mechanism.capacity(num_examples, rate, steps)
  mech = mechanism.Mechanism(1.0, rate, rows)
  assert mechanism.overflow_probability(mech, num_examples, steps) <= 1e-12
  if rows > 1:
    tight = dataclasses.replace(mech, max_units=rows - 1)
    assert mechanism.overflow_probability(tight, num_examples, steps) > 1e-12
  exact = steps * math.fsum(
    stats.binom.pmf(np.arange(rows + 1, num_examples + 1), num_examples, mech.sampling_rate)
  )
  np.testing.assert_allclose(
    mechanism.overflow_probability(mech, num_examples, steps), min(exact, 1), rtol=1e-6
  )
  assert mechanism.overflow_probability(dataclasses.replace(mech, max_units=1), 10**6, 10**6) <= 1


def test_the_rate_that_runs_is_the_rate_that_is_accounted():
  mech = mechanism.Mechanism(1.0, 0.01, 8)
  assert mech.sampling_rate == sampling.effective_rate(0.01) >= 0.01
  assert dataclasses.replace(mech, max_units=9).sampling_rate == mech.sampling_rate
  assert mech.stddev == 1.0
  with pytest.raises(dataclasses.FrozenInstanceError):
    mech.noise_multiplier = 2.0


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("noise_multiplier", -1.0),
    ("noise_multiplier", 0.0),
    ("noise_multiplier", math.inf),
    ("noise_multiplier", math.nan),
    ("private", False),
    ("sampling_rate", 0.0),
    ("sampling_rate", 1.5),
    ("max_units", 0),
    ("l2_clip_norm", 0.0),
    ("l2_clip_norm", math.nan),
    ("clipping", "ghost"),
    ("unit", "site"),
    ("augmentations", 0),
    ("microbatch", 0),
  ],
)
def test_what_makes_no_mechanism_is_refused_by_name(field, value):
  with pytest.raises(ValueError, match=field):
    dataclasses.replace(MECHANISM, **{field: value})


def test_impossible_runs_are_refused():
  for arguments in ((0, 0.1, 1), (1, 0.1, 0), (1, 0.1, 1, 0.0), (1, 2.0, 1)):
    with pytest.raises(ValueError, match="must"):
      mechanism.capacity(*arguments)
