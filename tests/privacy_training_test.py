"""DP-SGD as a site's recipe: batches, clipping and noise as the mechanism says, from the site's secret alone."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from primia_jax import local, prng
from primia_jax.privacy import sampling, training
from primia_jax.privacy.mechanism import Mechanism
from primia_jax.types import Metrics

N, D, STEPS, RATE = 40, 3, 5, 0.25
WORK = local.Work(batch_size=10, max_examples=N)
ROWS = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)
SECRET = jnp.arange(8, dtype=jnp.uint32)


def loss_fn(params, model_state, batch, key):
  """Each example's gradient is its row."""
  rows = batch.images.reshape(batch.images.shape[0], -1)
  total, count = jnp.sum(batch.weights * (rows @ params["w"])), jnp.sum(batch.weights)
  return total / jnp.maximum(count, 1.0), (model_state, Metrics(total, 0.0 * total, count))


def train(mechanism, secret=SECRET, units=None, rows_per_unit=1, round_index=0, num=N, rows=ROWS):
  private = training.private(loss_fn, mechanism, STEPS, rows_per_unit)
  recipe = local.Recipe(local.gradients(loss_fn), optax.sgd, lambda t: 1.0, WORK, private)
  params = {"w": jnp.zeros(D)}
  data = (jnp.asarray(rows)[:, None, None, :], jnp.zeros(N, jnp.int32), jnp.int32(num), jnp.int32(round_index))
  keys = jax.random.key(0), jax.random.key(1)
  one = lambda secret: local.train(recipe)(
    params, {}, optax.sgd(1.0).init(params), *data, *keys, secret=secret, units=units
  )
  trained = jax.jit(jax.vmap(one) if secret.ndim == 2 else one)(secret)
  assert all((m == 0).all() for m in trained.metrics)
  return -np.asarray(trained.params["w"])


def drawn(secret, step, num, max_units=N):
  key = prng.derive(secret, 1)
  return [int(i) for i in sampling.poisson(key, step, num, N, RATE, max_units)[0] if i >= 0]


def clipped(v, norm):
  return v * min(1.0, norm / np.linalg.norm(v))


@pytest.mark.parametrize("round_index", [0, 3])
def test_without_noise_it_is_the_sum_of_clipped_gradients_of_poisson_batches(round_index):
  mechanism = Mechanism(0.0, RATE, N, 0.5, private=False)
  want = sum(clipped(ROWS[i], 0.5) for t in range(STEPS) for i in drawn(SECRET, round_index * STEPS + t, 30)) / (
    RATE * 30
  )
  np.testing.assert_allclose(train(mechanism, round_index=round_index, num=30), want, rtol=1e-4)


def test_a_patients_images_are_clipped_as_one():
  units = np.arange(N, dtype=np.int32) // 4  # ten patients of four images
  mechanism = Mechanism(0.0, RATE, N, 0.5, unit="patient", private=False)
  means = ROWS.reshape(10, 4, D).mean(1)
  want = sum(clipped(means[i], 0.5) for t in range(STEPS) for i in drawn(SECRET, t, 10)) / (RATE * 10)
  np.testing.assert_allclose(train(mechanism, units=jnp.asarray(units), rows_per_unit=4), want, rtol=1e-4)
  with pytest.raises(ValueError, match=r"Site\.units"):
    train(mechanism, rows_per_unit=4)


def test_noise_is_of_the_promised_scale_and_no_other():
  mechanism = Mechanism(2.0, RATE, N, 0.5)
  zeros = np.zeros((N, D), np.float32)
  secrets = jnp.stack([prng.derive(SECRET, i) for i in range(60)])
  noise = train(mechanism, secrets, rows=zeros)
  unit = 2.0 * 0.5 * np.sqrt(STEPS) / (RATE * N)  # of the sum of all steps
  chance = lambda scale: stats.chi2.cdf(np.sum((noise / (scale * unit)) ** 2), noise.size)
  assert 0.001 < chance(1.0) < 0.999
  assert chance(2 / 3) > 0.9999
  assert chance(3 / 2) < 0.0001


def test_secrets_and_rounds_never_repeat_noise_or_batches():
  mechanism = Mechanism(1.0, RATE, N)
  again = train(mechanism)
  np.testing.assert_array_equal(again, train(mechanism))
  others = [train(mechanism, prng.derive(SECRET, 1)), train(mechanism, round_index=1)]
  assert all(np.abs(again - other).min() > 1e-6 for other in others)
  assert len({tuple(drawn(SECRET, t, N)) for t in range(20)}) == 20


def test_bad_numbers_of_steps_are_refused():
  with pytest.raises(ValueError, match="num_steps=0"):
    training.private(loss_fn, Mechanism(1.0, RATE, N), 0)
