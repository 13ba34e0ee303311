"""The bound on reconstruction: closed forms, the accountant, and an attack that is played."""

import functools
import math

import jax
import numpy as np
import pytest
from scipy import integrate, optimize, stats

from primia_jax.privacy import accounting, reconstruction
from primia_jax.privacy.accounting import Ledger, gaussian, renyi, spend
from primia_jax.privacy.reconstruction import (
  estimate,
  max_true_positive_rate,
  reconstruction_bound,
  renyi_bound,
)

norm = stats.norm


def spent(release, count=1):
  return spend(Ledger("example", 1e-5), release, count)


@pytest.mark.parametrize("num_candidates", [2, 100, 10_000])
@pytest.mark.parametrize(("sigma", "count"), [(0.5, 1), (2.0, 1), (10.0, 30)])
def test_gaussian_releases_have_their_closed_form(sigma, count, num_candidates):
  """Kaissis et al. 2023: 1 - Phi(Phi^-1(1 - kappa) - mu), of many releases with mu sqrt(count)."""
  got = reconstruction_bound(spent(gaussian("sums", sigma), count), num_candidates)
  mu = math.sqrt(count) / sigma
  assert got == pytest.approx(1 - norm.cdf(norm.ppf(1 - 1 / num_candidates) - mu), rel=1e-9)


def test_one_sampled_release_has_its_closed_form():
  """The best test of (1 - q) N(0, 1) + q N(mu, 1) against N(0, 1) is a threshold."""
  mu, q, prior = 1 / 0.8, 0.3, 1e-4
  at = optimize.brentq(lambda x: norm.sf(x) - prior, 0, 10)
  density = lambda x: (1 - q) * norm.pdf(x) + q * norm.pdf(x - mu)
  want = integrate.quad(density, at, at + 20, epsabs=1e-13)[0]
  assert reconstruction_bound(spent(gaussian("gradients", 0.8, q))) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("release", [gaussian("sums", 1.5), gaussian("gradients", 0.9, 0.05)])
def test_the_accountants_bound_is_the_closed_form_from_above(release):
  """So that what is claimed of many sampled steps, which have no closed form, is near the truth."""
  exact = reconstruction_bound(spent(release))
  by_epsilon = reconstruction._of_profile(spent(release), 1e-4)
  assert exact <= by_epsilon <= 1.001 * exact
  curve = accounting._gaussian_curve(release.noise_multiplier, release.sampling_rate)
  assert exact <= reconstruction_bound(spent(renyi("updates", curve))) <= 3 * exact


def test_it_is_at_most_what_any_epsilon_and_its_delta_allow():
  ledger = spent(gaussian("gradients", 1.0, 0.1), 100)
  bound = reconstruction_bound(ledger)
  claims = [ledger._replace(delta=delta) for delta in (1e-6, 1e-4, 1e-2, 0.1)]
  allowed = [math.exp(accounting.epsilon(one)) / 10_000 + one.delta for one in claims]
  assert bound <= 1.001 * min(allowed)
  assert bound < allowed[0] / 20  # epsilon at the delta of the claim says far less


def test_it_falls_with_noise_from_one_to_a_guess():
  of = lambda sigma: reconstruction_bound(spent(gaussian("gradients", sigma, 0.1), 50))
  bounds = [of(sigma) for sigma in (0.02, 0.6, 1.0, 2.0, 5.0, 1e3)]
  assert bounds == sorted(bounds, reverse=True)
  assert bounds[0] == 1
  assert bounds[-1] == pytest.approx(1e-4, rel=0.01)
  assert all(bound >= 1e-4 for bound in bounds)
  assert reconstruction_bound(Ledger("example", 1e-5)) == 1e-4


def test_what_ran_otherwise_than_accounted_for_is_added():
  release = gaussian("sums", 2.0)
  failing = release._replace(extra_delta=0.001)
  more = reconstruction_bound(spent(failing, 5)) - reconstruction_bound(spent(release, 5))
  assert more == pytest.approx(0.005)


KEY = jax.random.key(0)


@pytest.mark.parametrize(
  ("releases", "num_candidates"),
  [
    ([(gaussian("sums", 1.0), 1)], 10),
    ([(gaussian("sums", 0.3), 1)], 2),
    ([(gaussian("sums", 1.0), 1), (gaussian("counts", 3.0), 18)], 10_000),
    ([(gaussian("gradients", 0.8, 0.3), 1)], 10_000),
  ],
)
def test_the_estimate_is_the_closed_form_within_its_interval(releases, num_candidates):
  """Full batch: Phi(Phi^-1(1 / N) + mu); one sampled release: as above."""
  ledger = functools.reduce(lambda a, b: spend(a, *b), releases, Ledger("example", 1e-5))
  exact, found = reconstruction_bound(ledger, num_candidates), estimate(ledger, KEY, num_candidates)
  assert found.low <= exact <= found.high
  assert found.value == pytest.approx(exact, rel=0.06)
  assert found.high < 1.25 * exact + 2e-4
  assert found.low > 0.4 * exact


def test_the_interval_of_the_estimate_misses_as_seldom_as_it_says():
  ledger = spent(gaussian("sums", 1.2))
  exact = reconstruction_bound(ledger, 100)
  found = [estimate(ledger, jax.random.key(i), 100, 1000, 0.5) for i in range(60)]
  missed = sum(not one.low <= exact <= one.high for one in found)
  assert missed <= stats.binom.ppf(0.999, 60, 0.5)
  # unbiased: the mean is nearer than any interval
  assert np.mean([one.value for one in found]) == pytest.approx(exact, rel=0.05)


def test_many_sampled_steps_are_what_the_accountant_says():
  """For which there is no closed form: both ways to the chance meet."""
  ledger = spent(gaussian("gradients", 1.0, 0.1), 50)
  found, bound = estimate(ledger, KEY, 100, 50_000), reconstruction_bound(ledger, 100)
  assert found.low <= bound
  assert found.value == pytest.approx(bound, rel=0.03)
  assert found.high < 1.1 * bound < 1.1 * renyi_bound(ledger, 100)


def test_equal_epsilon_and_delta_are_not_equal_risks():
  """Hayes et al. 2023, section 4: the same claim with another rate and noise."""
  whole, sampled = (
    spent(gaussian("gradients", 1.0815)), spent(gaussian("gradients", 0.6458, 0.02), 50)
  )  # fmt: skip
  assert accounting.epsilon(whole) == pytest.approx(4.0, rel=2e-3)
  assert accounting.epsilon(sampled) == pytest.approx(4.0, rel=2e-3)
  one, other = (estimate(ledger, KEY, 10, 50_000) for ledger in (whole, sampled))
  assert one.low > 1.2 * other.high


@pytest.mark.parametrize("num_candidates", [10, 10_000])
def test_the_bound_by_renyi_divergences_has_its_closed_form(num_candidates):
  """Balle et al. 2022: of a Gaussian, D_a = a mu^2 / 2."""
  mu, orders = 0.9, np.asarray(accounting.ORDERS)
  powers = (orders - 1) / orders
  want = math.exp(np.min(powers * (orders * mu**2 / 2 - math.log(num_candidates))))
  assert renyi_bound(spent(gaussian("sums", 1 / mu)), num_candidates) == pytest.approx(want)
  curve = spent(renyi("updates", orders * mu**2 / 2))
  assert renyi_bound(curve, num_candidates) == pytest.approx(want)
  assert reconstruction_bound(curve, num_candidates) <= want * (1 + 1e-9)
  nothing = renyi_bound(Ledger("example", 1e-5), num_candidates)
  assert nothing == pytest.approx(1 / num_candidates, rel=3e-3)  # orders end


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda ledger: reconstruction_bound(ledger, 1), "num_candidates=1"),
    (lambda ledger: renyi_bound(ledger, 0), "num_candidates=0"),
    (lambda ledger: estimate(ledger, KEY, 10, 99), "num_samples=99"),
    (lambda ledger: estimate(ledger, KEY, 10, 1000, 1.0), "confidence=1.0"),
    (
      lambda ledger: estimate(spend(ledger, renyi("updates", [1.0] * len(accounting.ORDERS))), KEY),
      "renyi_bound",
    ),
  ],
)
def test_impossible_numbers_are_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call(Ledger("example", 1e-5))


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_an_attack_stays_within_the_bound_and_exceeds_it_with_less_noise(sigma):
  """Candidates are orthogonal and known; the most likely one is named."""
  num_candidates, trials = 20, 20_000
  rng = np.random.default_rng(0)
  bound = reconstruction_bound(spent(gaussian("sums", sigma)), num_candidates)

  def successes(noise):
    seen = noise * rng.normal(size=(trials, num_candidates))
    seen[:, 0] += 1  # the first was used
    return np.mean(seen.argmax(axis=1) == 0)

  assert 1.5 / num_candidates < successes(sigma) <= bound
  assert successes(sigma / 2) > bound


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.01, 0.3, 1.0])
def test_a_gaussian_mechanisms_tests_have_their_closed_form(rate):
  """Dong et al. 2022, equation 6: the power at a level is Phi(Phi^-1(level) + mu)."""
  got = max_true_positive_rate(spent(gaussian("sums", 3.0), 9), rate)
  assert got == pytest.approx(norm.cdf(norm.ppf(rate) + 1), rel=1e-12)


@pytest.mark.parametrize("release", [gaussian("sums", 1.5), gaussian("gradients", 0.9, 0.05)])
@pytest.mark.parametrize("rate", [1e-3, 0.01, 0.3, 0.9])
def test_the_accountants_power_is_the_closed_form_from_above(release, rate):
  """Both sides of the trade-off: at few false positives, and where nearly all are guessed in. The
  accountant takes the worse of adding and removing a unit, which costs a little at the far end.
  """
  exact = max_true_positive_rate(spent(release), rate)
  assert exact <= reconstruction._of_profile(spent(release), rate) <= 1.02 * exact


def test_no_test_beats_the_bound_and_one_with_less_noise_does():
  """Ten sampled steps, the likelihood ratio of all of them; thresholds hold each rate exactly."""
  steps, q, sigma, trials = 10, 0.3, 1.0, 100_000
  rng = np.random.default_rng(0)

  def ratios(noise, is_in):
    seen = noise * rng.normal(size=(trials, steps)) + is_in * (rng.random((trials, steps)) < q)
    return np.log1p(q * np.expm1((2 * seen - 1) / (2 * noise**2))).sum(axis=1)

  rates = np.array([0.01, 0.1])
  bound = [max_true_positive_rate(spent(gaussian("g", sigma, q), steps), rate) for rate in rates]
  for noise, holds in ((sigma, True), (sigma / 2, False)):
    thresholds = np.quantile(ratios(noise, 0), 1 - rates)
    power = np.mean(ratios(noise, 1)[:, None] > thresholds, axis=0)
    error = 3 * np.sqrt(power * (1 - power) / trials) + 3 * np.sqrt(rates / trials)
    assert np.all(power - error <= bound) == holds
    assert not holds or np.all(power > 0.7 * np.array(bound))


def test_both_rates_carry_what_ran_otherwise_than_accounted_for():
  release = gaussian("sums", 2.0)
  failing = release._replace(extra_delta=0.01)
  got = max_true_positive_rate(spent(failing), 0.05)
  assert got == pytest.approx(0.01 + max_true_positive_rate(spent(release), 0.06))
  assert max_true_positive_rate(Ledger("example", 1e-5), 0.2) == 0.2
  with pytest.raises(ValueError, match=r"false_positive_rate=1\.5"):
    max_true_positive_rate(spent(release), 1.5)
