"""Errors, coefficients and refusals; `privacy_correlated_test` checks what a strategy costs."""

import math

import numpy as np
import pytest

from primia_jax.privacy import strategies


def test_fewer_errors_than_dp_sgd_trees_and_the_square_root():
  mean = lambda config: strategies.squared_errors(config).mean()
  of = lambda c: mean(strategies.banded(256, 32, 1.0, 1.0, c))
  optimal, root = (
    of(strategies.optimal_coefficients(32, 256)),
    of(strategies.square_root_coefficients(32)),
  )
  sgd = of([1.0])
  assert math.isclose(sgd, 257 / 2 * 8)  # |A|^2 / T times k participations
  honaker, tree = (mean(strategies.tree(256, 32, 1.0, 1.0, honaker=h)) for h in (True, False))
  assert optimal < root < sgd
  assert optimal < honaker < 0.7 * tree
  grown = [of(strategies.optimal_coefficients(b, 256)) for b in (1, 2, 4, 8, 16, 32)]
  assert grown == sorted(grown, reverse=True)


def test_the_coefficients_are_those_of_the_square_root_and_a_minimum():
  c = strategies.square_root_coefficients(40)
  np.testing.assert_allclose(np.convolve(c, c)[:40], np.ones(40), rtol=1e-12)  # 1 / (1 - x)
  best = strategies.optimal_coefficients(6, 50)
  error = lambda c: strategies.squared_errors(strategies.banded(50, 6, 1.0, 1.0, c)).mean()
  rng = np.random.default_rng(0)
  worse = [error(np.sort(best * np.exp(0.1 * rng.normal(size=6)))[::-1]) for _ in range(20)]
  assert error(best) <= min(worse) * 1.002  # coefficients are rounded to 64ths


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_steps", [1, 7, 100, 1000])
@pytest.mark.parametrize("num_bands", [1, 2, 5, 50, 400])
def test_coefficients_make_sound_noise_and_no_more_error_than_the_square_root(num_bands, num_steps):
  error = lambda c: strategies.squared_errors(
    strategies.banded(num_steps, num_bands, 1.0, 1.0, c)
  ).mean()
  optimal = strategies.optimal_coefficients(num_bands, num_steps)
  assert (
    error(optimal) <= error(strategies.square_root_coefficients(num_bands)) * 1.05
  )  # short columns: see there


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: strategies.banded(10, 2, 1.0, 1.0, [1.0, 0.5, 0.2]), "min_separation=2"),
    (lambda: strategies.banded(10, 4, 1.0, 1.0, [1.0, 1.5]), "not rise"),
    (lambda: strategies.banded(10, 4, 1.0, 1.0, [1.0, -0.5]), "positive"),
    (lambda: strategies.banded(10, 4, 0.0, 1.0, [1.0]), "noise_multiplier=0"),
    (lambda: strategies.banded(10, 4, 1.0, math.inf, [1.0]), "l2_clip_norm=inf"),
    (lambda: strategies.banded(0, 4, 1.0, 1.0, [1.0]), "num_steps=0"),
    (lambda: strategies.banded(10, 0, 1.0, 1.0, [1.0]), "min_separation=0"),
    (
      lambda: strategies.banded(10, 2, 1.0, 1.0, [1.0], max_participations=0),
      "max_participations=0",
    ),
    (lambda: strategies.tree(10, 4, 1.0, 1.0, restart_every=5), "restart_every=5"),
    (lambda: strategies.optimal_coefficients(0, 5), "num_bands=0"),
    (lambda: strategies.tree(2**32, 4, 1.0, 1.0), "num_steps"),
    (lambda: strategies.BandedNoise(10, 4, 3, 1.0, 1.0, (1.0, 0.51)), "multiples of 1 / 64"),
  ],
)
def test_unsound_configurations_are_refused(make, match):
  with pytest.raises(ValueError, match=match):
    make()
