"""Audits of whole-site privacy: the right mechanism passes, and half the noise is caught."""

import functools
import math

import jax
import numpy as np
import pytest
from scipy import stats

from primia_jax import site_privacy
from primia_jax.attacks import one_run, site_canaries
from primia_jax.privacy import accounting, plan
from primia_jax.privacy.distributed import DistributedNoise

SITES, ROUNDS, CANARIES, GUESSES = 3, 2, 3072, 280
SIGMA = 0.763 * math.sqrt(ROUNDS)  # epsilon 6 at delta 1e-5, for both rounds
KEY = jax.random.key(0)


def made(**changes):
  settings = {"num_sites": SITES, "rounds": ROUNDS, "delta": 1e-5, "l2_clip_norm": 0.5}
  return plan.site_level(**(settings | {"noise_multiplier": SIGMA} | changes))


@functools.cache
def watched():
  return site_canaries.watch(made(), ROUNDS, SITES)


def test_the_right_mechanism_passes_and_sums_tell_less():
  found = site_canaries.judge(watched()(KEY, CANARIES), made(), ROUNDS, GUESSES)
  assert found.claim == pytest.approx(6.0, rel=0.01)
  assert 0.5 * found.claim < found.alone < found.claim < found.limit
  weaker = made(noise_multiplier=SIGMA * math.sqrt(SITES))  # each site's noise is in the sum
  assert found.summed < accounting.epsilon(site_canaries.ledgers(weaker, ROUNDS, CANARIES)[0])
  assert found.summed > 0.2 * found.alone


def test_canaries_without_any_effect_prove_nothing():
  found = site_canaries.judge(watched()(KEY, CANARIES, 0.0), made(), ROUNDS, GUESSES)
  assert found.alone == found.summed == 0


def test_what_is_observed_is_clipped_updates_and_the_plan_s_noise():
  seen = watched()(KEY, CANARIES)
  assert seen.alone.shape == (ROUNDS, CANARIES)
  of = lambda released: np.asarray(released) - 0.9995 * np.asarray(seen.included)
  for noise, scale in ((of(seen.alone), SIGMA), (of(seen.summed), SIGMA * math.sqrt(SITES))):
    chance = lambda times, noise=noise, scale=scale: stats.chi2.cdf(
      np.sum((noise / (times * scale)) ** 2), noise.size
    )
    assert 0.001 < chance(1.0) < 0.999
    assert chance(0.95) > 0.999
    assert chance(1.05) < 0.001


def test_half_the_noise_is_caught(monkeypatch):
  right = site_privacy._noised
  half = lambda tree, clip, noise, *rest: right(tree, clip, noise / 2, *rest)
  monkeypatch.setattr(site_privacy, "_noised", half)
  seen = site_canaries.watch(made(), ROUNDS, SITES)(KEY, CANARIES)
  found = site_canaries.judge(seen, made(), ROUNDS, GUESSES)
  assert found.alone > found.claim


@pytest.mark.optimised  # discrete noise takes ten times as long without
def test_noise_that_sites_make_together_is_seen_in_sums_only():
  together = DistributedNoise(1, SITES, SITES, 0.5, 1.0, num_bits=32)
  claimed = made(together=together)
  seen = site_canaries.watch(claimed, ROUNDS, SITES)(KEY, CANARIES)
  found = site_canaries.judge(seen, claimed, ROUNDS, GUESSES)
  assert found.alone is None
  assert 0.5 * found.claim < found.summed < found.claim


def test_a_clip_that_moves():
  claimed = made(target_quantile=0.5)
  seen = site_canaries.watch(claimed, ROUNDS, SITES)(KEY, CANARIES)
  found = site_canaries.judge(seen, claimed, ROUNDS, GUESSES)
  assert 0.3 * found.claim < found.alone < found.claim


def test_a_few_sites_prove_nothing():
  """Of one run the canaries are its sites: three right guesses are luck."""
  fewest = site_canaries.fewest_canaries(made(), ROUNDS)
  assert 10 < fewest < 1000
  for num, can in ((SITES, False), (fewest - 1, False), (fewest, True)):
    claimed, family = site_canaries.ledgers(made(), ROUNDS, num)
    assert (one_run.f_dp_bound(family, num, num, num) > accounting.epsilon(claimed)) == can
  assert site_canaries.fewest_canaries(made(), ROUNDS, most=4) == 5
