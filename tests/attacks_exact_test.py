"""What canaries hardly see: how units are drawn, and by what a sum is divided."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.attacks import canaries, exact
from primia_jax.privacy import plan

N, RATE = 4, 0.5
SECRET = jnp.arange(8, dtype=jnp.uint32)


def tiny(num_units=N, rate=RATE, steps=8, **changes):
  return plan.dp_sgd(
    canaries.loss_fn, num_units=num_units, sampling_rate=rate, steps=steps, rounds=16, delta=1e-3,
    noise_multiplier=1.0, l2_clip_norm=0.5, **changes,
  )  # fmt: skip


def test_the_real_sampler_draws_every_unit_independently():
  made = tiny(num_units=60, rate=0.3, steps=50, unit="patient")
  taken = exact.drawn(made, 400, SECRET)
  assert taken.shape == (400, 60)
  assert exact.sampling_p_value(taken, 0.3) > 1e-3
  assert exact.sampling_p_value(taken, 0.27) < 1e-3  # another rate than is charged
  assert exact.sampling_p_value(np.roll(taken, 1, axis=0), 0.3) > 1e-3


def fixed_size(rng, steps, num, size):
  return np.array([rng.permutation(np.arange(num) < size) for _ in range(steps)])


def shuffled(rng, steps, num, size):
  each = num // size  # batches of an epoch
  orders = [rng.permutation(num) // size for _ in range(-(-steps // each))]
  return np.concatenate([np.arange(each)[:, None] == order for order in orders])[:steps]


def shuffled_of_binomial_sizes(rng, steps, num, size):
  """Right sizes, but an order that is used up before a unit comes again."""
  order = np.concatenate([rng.permutation(num) for _ in range(2 * steps * size // num)])
  ends = np.cumsum(rng.binomial(num, size / num, steps))
  taken = np.zeros((steps, num), bool)
  for t, end in enumerate(ends):
    taken[t, order[(ends[t - 1] if t else 0) : end]] = True
  return taken


@pytest.mark.parametrize("draw", [fixed_size, shuffled, shuffled_of_binomial_sizes])
def test_other_batches_are_told_from_poisson_samples(draw):
  taken = draw(np.random.default_rng(0), 400, 60, 12)
  assert exact.sampling_p_value(taken, 0.2) < 1e-6


def test_poisson_samples_are_called_odd_as_seldom_as_the_test_says():
  rng = np.random.default_rng(1)
  found = [exact.sampling_p_value(rng.random((40, 30)) < 0.2, 0.2) < 0.05 for _ in range(300)]
  assert np.mean(found) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
  assert exact.sampling_p_value(np.ones((3, 5), bool), 1.0) == 1
  assert exact.sampling_p_value(np.eye(3, dtype=bool), 1.0) == 0


def by_realised_size(made):
  """The plan, whose sums are divided by the size that was drawn instead of q n."""

  def grad_fn(params, model_state, batch, key):
    total, rest = made.grad_fn(params, model_state, batch, key)
    drawn = jnp.sum((batch.weights != 0).astype(jnp.float32))
    expected = np.float32(made.sampling_rate * made.num_units)
    return dataclasses.replace(total, step=total.step * expected / jnp.maximum(drawn, 1.0)), rest

  adds = made.privatizer.bound_to(made.steps, grad_fn)
  return dataclasses.replace(made, grad_fn=grad_fn, privatizer=adds)


def test_a_unit_moves_a_step_by_the_clip_over_the_expected_size_whatever_is_drawn():
  made, key = tiny(), jax.random.key(1)
  batches = {tuple(row) for row in exact.drawn(made, 128, canaries.secret_of(key)).tolist()}
  assert len(batches) == 2**N  # every batch there is
  assert 0.99 < exact.largest_change(made, 128, key) <= 1 + 1e-5
  broken = exact.largest_change(by_realised_size(made), 128, key)
  assert broken == pytest.approx(RATE * N, rel=0.01)  # alone in a batch


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: exact.sampling_p_value(np.ones((9, 9), bool), 0.0), "sampling_rate=0.0"),
    (lambda: exact.sampling_p_value(np.ones((9, 9), bool), 0.1), "too few"),
  ],
)
def test_impossible_numbers_are_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call()
