"""Audits of plans that `local.train` runs: right ones pass, and broken code is caught."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from primia_jax.attacks import audit, canaries
from primia_jax.attacks.canaries import Observed
from primia_jax.privacy import accounting, clipping, grid, plan

M, RUNS, STEPS = 64, 48, 2
SIGMA = 0.763 * math.sqrt(STEPS)  # epsilon 6 at delta 1e-5, for both steps
KEY = jax.random.key(0)


@functools.cache
def made(**changes):
  settings = {"num_units": M, "sampling_rate": 1.0, "steps": STEPS, "noise_multiplier": SIGMA}
  settings["l2_clip_norm"] = 0.5
  return plan.dp_sgd(canaries.loss_fn, rounds=1, delta=1e-5, **(settings | changes))


@functools.cache
def watched():
  return audit.watch(made(), 1)


def test_the_right_mechanism_passes_and_is_seen():
  found = audit.judge(watched()(KEY, RUNS), made(), 1)
  assert found.num_canaries == M * RUNS
  assert found.num_guesses == math.ceil(5 * math.sqrt(M * RUNS))
  assert found.claim == pytest.approx(6.0, rel=0.01)
  assert 0.5 * found.claim < found.epsilon < found.claim
  assert found.any_epsilon < found.epsilon
  assert found.claim < found.limit
  # every unit is in every step, so the final model tells as much
  assert found.final_epsilon == found.epsilon


def test_canaries_without_any_effect_prove_nothing():
  found = audit.judge(watched()(KEY, RUNS, 0.0), made(), 1)
  assert found.epsilon == found.final_epsilon == found.any_epsilon == 0


def test_half_the_noise_is_caught(monkeypatch):
  right = grid.noised

  def half(total, on, secret, step):
    added = jax.tree.map(jnp.subtract, right(total, on, secret, step), total)
    return jax.tree.map(lambda a, b: a + b // 2, total, added)

  monkeypatch.setattr(grid, "noised", half)
  found = audit.audit(made(), 1, KEY, num_runs=RUNS)
  assert found.epsilon > found.claim


def test_gradients_that_are_not_clipped_are_caught(monkeypatch):
  free = lambda squares, on, unclipped, kind: jnp.broadcast_to(unclipped, squares.shape)
  monkeypatch.setattr(clipping, "_factors", free)
  found = audit.audit(made(), 1, KEY, num_runs=RUNS)
  assert found.epsilon > found.claim
  assert found.num_right == found.num_guesses


def test_what_is_observed_is_clipped_canaries_and_noise_in_units_of_the_clip():
  """Ten times the clip norm becomes it, but for a quarter of a percent that rounding takes."""
  seen = watched()(KEY, RUNS)
  assert seen.transcript.shape == (STEPS, M * RUNS)
  assert 0.45 < np.mean(seen.included) < 0.55
  noise = np.asarray(seen.transcript) - 0.9975 * np.asarray(seen.included)
  chance = lambda scale: stats.chi2.cdf(np.sum((noise / (scale * SIGMA)) ** 2), noise.size)
  assert 0.001 < chance(1.0) < 0.999
  assert chance(0.95) > 0.999
  assert chance(1.05) < 0.001
  assert abs(np.corrcoef(noise)[0, 1]) < 4 / math.sqrt(M * RUNS)
  np.testing.assert_allclose(seen.final, np.sum(seen.transcript, axis=0), atol=1e-4)


def test_scores_are_log_likelihood_ratios():
  rate, sigma, steps = 0.3, 0.8, 3
  sampled = made(sampling_rate=rate, noise_multiplier=sigma, steps=steps)
  rng = np.random.default_rng(0)
  released = 2 * rng.normal(size=(steps, M))
  by_step, final = canaries.scores(
    sampled, 1, Observed(released, released.sum(axis=0), np.zeros(M, bool))
  )
  of = lambda x, mean, spread: stats.norm.pdf(x, mean, spread)
  one = ((1 - rate) * of(released, 0, sigma) + rate * of(released, 1, sigma)) / of(
    released, 0, sigma
  )
  np.testing.assert_allclose(by_step, np.log(np.prod(one, axis=0)), rtol=1e-6)
  spread, total = sigma * math.sqrt(steps), released.sum(axis=0)
  law = stats.binom(steps, rate)
  mixed = sum(law.pmf(k) * of(total, k, spread) for k in range(steps + 1))
  np.testing.assert_allclose(final, np.log(mixed / of(total, 0, spread)), atol=1e-4)


def banded(sigma):
  return plan.dp_ftrl(
    canaries.loss_fn, num_units=M, batch_size=M // 2, steps=3, rounds=2, delta=1e-5, bands=2,
    noise_multiplier=sigma,
  )  # fmt: skip


def test_correlated_noise_is_scored_by_what_it_is_when_it_is_white_again():
  claimed = banded(0.763)
  seen = audit.watch(claimed, 2)(KEY, RUNS)
  found = audit.judge(seen, claimed, 2)
  assert found.claim == pytest.approx(6.0, rel=0.01)
  assert 0.5 * found.claim < found.epsilon < found.claim
  assert found.final_epsilon < 0.8 * found.epsilon  # the sum of the steps tells less
  assert found.epsilon > accounting.epsilon(audit.claim(banded(2 * 0.763), 2))  # half the noise


def test_noise_of_trees_is_scored_by_the_sums_of_the_steps_with_the_canary():
  trees = plan.dp_ftrl(
    canaries.loss_fn, num_units=6, batch_size=2, steps=4, rounds=1, delta=1e-3, kind="tree",
    noise_multiplier=1.0,
  )  # fmt: skip
  released = np.random.default_rng(0).normal(size=(4, 12))  # two runs
  seen = Observed(released, released.sum(axis=0), np.zeros(12, bool))
  by_step, final = canaries.scores(trees, 1, seen)
  # three steps use all six canaries once, the fourth those of the first again
  times = np.array([np.isclose(final, seen.final - n / 2) for n in (1, 2)])
  assert np.sum(times, axis=1).tolist() == [8, 4]
  assert np.array_equal(times[:, :6], times[:, 6:])
  again = np.flatnonzero(times[1])
  np.testing.assert_allclose(by_step[again], released[0, again] + released[3, again] - 1)


def test_a_plan_over_canaries_is_the_mechanism_of_the_run():
  run = plan.dp_sgd(
    lambda *_: None, num_units=5000, sampling_rate=0.04, steps=25, rounds=8, delta=2e-5,
    noise_multiplier=1.3, l2_clip_norm=0.3, clipping="automatic", unit="patient", rows_per_unit=9,
  )  # fmt: skip
  alike = canaries.plan_like(run, 500, 8)
  assert alike.num_units == 500
  same = "noise_multiplier", "sampling_rate", "num_steps", "delta", "unit"
  assert all(getattr(alike, name) == getattr(run, name) for name in same)
  assert alike.clipping.l2_clip_norm == 0.3
  assert alike.clipping.kind == "automatic"
  correlated = canaries.plan_like(banded(1.1), 200, 2)
  assert correlated.strategy.coefficients == banded(1.1).strategy.coefficients
  assert correlated.strategy.min_separation == banded(1.1).strategy.min_separation


@pytest.mark.slow
def test_poisson_batches_of_many_steps_pass_and_half_the_noise_is_caught():
  settings = {"num_units": 128, "sampling_rate": 0.2, "steps": 5, "unit": "patient"}
  of = lambda sigma: made(noise_multiplier=sigma, **settings)
  right = audit.audit(of(1.0), 2, KEY, num_runs=64)
  assert 0.3 * right.claim < right.epsilon < right.claim < right.limit
  assert right.final_epsilon < right.epsilon
  half = audit.judge(audit.watch(of(0.5), 2)(KEY, 64), of(1.0), 2)
  assert half.epsilon > half.claim


def test_a_release_that_is_no_number_is_refused():
  seen = Observed(np.full((2, M), np.nan), np.zeros(M), np.zeros(M, bool))
  with pytest.raises(ValueError, match="scores are NaN"):
    audit.judge(seen, made(), 1)
