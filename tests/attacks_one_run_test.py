"""Bounds from guesses: against linear programs, simulation, closed forms and each other."""

import math

import dp_accounting
import numpy as np
import pytest
from scipy import optimize, special, stats

from primia_jax.attacks import one_run
from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger, gaussian, renyi, spend

DELTA = 1e-5


def ledger(sigma, rate=1.0, times=1):
  return spend(Ledger("example", DELTA), gaussian("gradients", sigma, rate), times)


def gdp(mu):
  return lambda x: stats.norm.cdf(stats.norm.ppf(x) - mu)


def most_likely(mu, m, c, v):
  """The largest chance of v or more right guesses that the inequalities of f-DP leave, as a linear
  program over the chances of 0, ..., c right ones; the curve is the maximum of its tangents.
  """
  t, at = np.arange(c + 1), special.expit(np.linspace(-12, 9, 240))
  slopes = np.exp(mu * stats.norm.ppf(at) - mu**2 / 2)
  starts = gdp(mu)(at) - slopes * at
  rows, limits = [], []
  for j in range(1, c + 1):
    r, h = np.where(t >= j, t, 0) / m, np.where(t >= j - 1, c - t, 0) / m
    rows += list(slopes[:, None] * r - h)
    limits += list(-starts)
  goal = -(t >= v).astype(float)
  found = optimize.linprog(goal, rows, limits, np.ones((1, c + 1)), [1.0])
  assert found.success
  return -found.fun


@pytest.mark.parametrize(
  ("mu", "m", "c", "v"), [(1.0, 12, 12, 12), (0.5, 20, 8, 8), (2.0, 9, 9, 8)]
)
def test_the_recursion_is_the_optimum_of_what_f_dp_leaves(mu, m, c, v):
  chance = most_likely(mu, m, c, v)
  assert 0.01 < chance < 0.99
  refuted = lambda doubt: one_run.refutes(gdp(mu), m, c, v, 1 - doubt)
  assert refuted(1.01 * chance)
  assert not refuted(0.99 * chance)


def test_a_mechanism_that_tells_all_on_rare_occasions_is_allowed_for():
  """It is (0, p)-DP, and all guesses are right with probability p and a little."""
  for c in (10, 50):
    assert not one_run.refutes(lambda x: max(0.0, x - 0.05), 50, c, c)
  assert one_run.refutes(lambda x: max(0.0, x - 0.04), 50, 50, 50)


def synthetic(rng, mu, m):
  included = rng.random(m) < 0.5
  return rng.normal(size=m) + mu * (included - 0.5), included


@pytest.mark.parametrize(("sigma", "m", "c"), [(0.8, 1000, 100), (4.0, 4000, 300)])
def test_the_bound_exceeds_the_truth_no_more_often_than_it_says(sigma, m, c):
  rng, trials = np.random.default_rng(1), 300
  low = one_run.floor(ledger(sigma))
  right = [one_run.right_guesses(*synthetic(rng, 1 / sigma, m), c) for _ in range(trials)]
  wrong = sum(one_run.refutes(low, m, c, v, 0.9) for v in right)
  assert stats.binom.sf(wrong - 1, trials, 0.1) > 1e-3
  fooled = one_run.floor(ledger(2.5 * sigma))  # and it is not blind
  assert sum(one_run.refutes(fooled, m, c, v, 0.9) for v in right) > 0.7 * trials


def test_without_any_effect_the_bound_is_zero_as_often_as_it_says():
  rng, trials = np.random.default_rng(2), 200
  right = (one_run.right_guesses(*synthetic(rng, 0.0, 1000), 200) for _ in range(trials))
  found = sum(one_run.f_dp_bound(ledger(0.8), 1000, 200, v) > 0 for v in right)
  assert stats.binom.sf(found - 1, trials, 0.05) > 1e-3


@pytest.mark.parametrize("sigma", [3.73, 0.763])  # epsilon 1 and 6
def test_it_is_near_the_truth_and_sharper_than_the_bound_by_epsilon_and_delta(sigma):
  rng, m, c = np.random.default_rng(3), 200_000, 2200
  v, truth = (
    one_run.right_guesses(*synthetic(rng, 1 / sigma, m), c),
    accounting.epsilon(ledger(sigma)),
  )
  bound = one_run.f_dp_bound(ledger(sigma), m, c, v)
  assert 0.7 * truth < bound <= truth
  assert one_run.epsilon_delta_bound(m, c, v, DELTA) < 0.95 * bound


def test_the_bound_is_the_epsilon_of_a_gaussian_mechanism_between_refuted_and_not():
  bound = one_run.f_dp_bound(ledger(1.0), 2000, 200, 190)
  sigma = lambda epsilon: dp_accounting.get_sigma_gaussian(epsilon, DELTA)
  refuted = lambda epsilon: one_run.refutes(gdp(1 / sigma(epsilon)), 2000, 200, 190)
  assert refuted(0.999 * bound)
  assert not refuted(1.03 * bound)
  # the family is the same whatever member it is named by
  assert one_run.f_dp_bound(ledger(1.0 * 1.01**20), 2000, 200, 190) == pytest.approx(bound)


def test_more_guesses_are_made_where_few_could_not_refute_the_claim():
  proved = lambda sigma, m, c: one_run.f_dp_bound(ledger(sigma), m, c, c)
  assert one_run.enough_guesses(ledger(3.73), 4096) == 320
  more = one_run.enough_guesses(ledger(0.6), 4096)
  assert more in (640, 1280, 2560)
  claim = accounting.epsilon(ledger(0.6))
  assert proved(0.6, 4096, 320) < claim < proved(0.6, 4096, more)
  # with 500 canaries nothing refutes that epsilon is 284
  assert one_run.enough_guesses(ledger(0.05), 500) == 112


def test_the_trade_off_function_of_gaussian_releases():
  low = one_run.floor(spend(ledger(2.0, times=3), gaussian("counts", 1.0)))
  for x in (0.0, 1e-4, 0.3, 0.9, 1.0):
    assert low(x) == pytest.approx(gdp(math.sqrt(3 / 4 + 1))(x), rel=1e-9)
  failing = gaussian("gradients", 2.0)._replace(extra_delta=0.01)
  low = one_run.floor(spend(Ledger("example", DELTA), failing))
  assert low(0.5) == pytest.approx(gdp(0.5)(0.49) - 0.01)
  assert low(0.005) == 0


def test_the_trade_off_function_of_one_sampled_release():
  """Against the best tests of both directions; the curve lies below either, and near the lower."""
  sigma, rate = 0.7, 0.2
  low, z = one_run.floor(ledger(sigma, rate)), np.linspace(-6, 6, 20_001)
  out, within = stats.norm.cdf(z), stats.norm.cdf(z - 1 / sigma)
  within = rate * within + (1 - rate) * out
  for x in (0.002, 0.05, 0.4, 0.9):
    exact = min(
      np.interp(x, 1 - within[::-1], 1 - out[::-1]),  # chance x with the unit
      np.interp(x, out, within),  # and without it
    )
    assert 0.97 * exact - 1e-5 <= low(x) <= exact + 1e-9


def slow_p_value(num_canaries, num_guesses, num_right, epsilon, delta):
  q = 1 / (1 + math.exp(-epsilon))
  pmf = [
    math.comb(num_guesses, k) * q**k * (1 - q) ** (num_guesses - k) for k in range(num_guesses + 1)
  ]
  shares = [sum(pmf[num_right - i : num_right]) / i for i in range(1, num_right + 1)]
  return min(1.0, sum(pmf[num_right:]) + 2 * num_canaries * delta * max(shares, default=0))


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-3])
def test_the_p_value_is_that_of_theorem_5_2(epsilon, delta):
  for num_guesses in (0, 1, 7, 20):
    for num_right in range(num_guesses + 1):
      numbers = (25, num_guesses, num_right, epsilon, delta)
      assert math.isclose(one_run.p_value(*numbers), slow_p_value(*numbers), rel_tol=1e-9)


def test_the_p_value_allows_for_a_mechanism_that_tells_all_with_probability_delta():
  for delta in (1e-3, 0.05):
    least = delta + (1 - delta) * special.expit(0.5) ** 30
    assert one_run.p_value(30, 30, 30, 0.5, delta) >= least
    assert one_run.epsilon_delta_bound(30, 30, 30, 0.06, 0.95) == 0


def test_the_bound_by_epsilon_and_delta_in_closed_form():
  for n in (10, 1000):  # all right, delta 0: q^n = 0.05
    q = 0.05 ** (1 / n)
    bound = one_run.epsilon_delta_bound(n, n, n, 0.0)
    assert math.isclose(bound, math.log(q / (1 - q)), rel_tol=1e-9)
  assert one_run.epsilon_delta_bound(1000, 0, 0, 0.0) == 0
  answers = np.random.default_rng(2).random(20_000) < special.expit(1.0)
  bound = one_run.epsilon_delta_bound(20_000, 20_000, int(answers.sum()), 0.0)
  assert 0.95 < bound <= 1  # randomised response: theorem 5.2 is tight


def test_guesses_are_counted_at_both_ends():
  scores = np.array([3.0, -1.0, 0.5, 2.0, -2.0])
  included = np.array([True, False, True, False, True])
  right = [one_run.right_guesses(scores, included, *n) for n in ((1, 0), (2, 0), (2, 2), (5,))]
  assert right == [1, 1, 1, 3]


CURVE = spend(Ledger("site", DELTA), renyi("updates", [1.0] * len(accounting.ORDERS)))


@pytest.mark.parametrize(
  ("call", "match"),
  [
    (lambda: one_run.p_value(10, 11, 5, 1.0, 0.0), "11 guesses"),
    (lambda: one_run.p_value(10, 5, 5, -1.0, 0.0), "epsilon=-1.0"),
    (lambda: one_run.refutes(gdp(1.0), 10, 5, 6), "6 right"),
    (lambda: one_run.f_dp_bound(ledger(1.0), 10, 5, 5, 1.0), "confidence=1.0"),
    (lambda: one_run.f_dp_bound(CURVE, 10, 5, 5), "Renyi divergences"),
    (lambda: one_run.epsilon_delta_bound(10, 5, 5, 0.0, 0.0), "confidence=0.0"),
    (lambda: one_run.right_guesses(np.zeros(3), np.zeros(3, bool), 4), "num_guesses=4"),
    (
      lambda: one_run.right_guesses(np.full(3, np.nan), np.zeros(3, bool), 1, 0),
      "3 scores are NaN",
    ),
  ],
)
def test_impossible_numbers_are_refused(call, match):
  with pytest.raises(ValueError, match=match):
    call()
