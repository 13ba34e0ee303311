"""The accountant against the library it calls, formulas of its own, and figures in print; and what
it refuses.
"""

import functools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import rdp
from scipy import integrate, optimize, stats

from primia_jax.privacy import accounting
from primia_jax.privacy import ledger as ledgers
from primia_jax.privacy.accounting import Ledger, gaussian, renyi, spend

GRADIENTS = gaussian("gradients", 1.1, 256 / 60000)


def spent(release, count=1, delta=1e-5):
  return spend(Ledger("example", delta), release, count)


def gaussian_epsilon(sigma, delta):
  """Balle and Wang 2018, theorem 8."""
  norm = stats.norm.cdf
  exceeded = lambda e: (
    norm(0.5 / sigma - e * sigma) - math.exp(e) * norm(-0.5 / sigma - e * sigma) - delta
  )
  return optimize.brentq(exceeded, 0, 50)


@pytest.mark.parametrize(("sigma", "count"), [(4.0, 1), (1.0, 1), (10.0, 100), (20.0, 3)])
def test_without_sampling_it_is_the_analytic_gaussian(sigma, count):
  want = gaussian_epsilon(sigma / math.sqrt(count), 1e-5)
  assert accounting.epsilon(spent(gaussian("sums", sigma), count)) == pytest.approx(want, rel=0.002)
  assert accounting.epsilon(spent(gaussian("sums", sigma), count), "rdp") == pytest.approx(
    want, rel=0.2
  )


def test_one_sampled_step_equals_the_divergence_of_its_two_mixtures():
  sigma, q, epsilon = 1.0, 0.1, 1.0
  base, other = stats.norm(0, sigma).pdf, stats.norm(1, sigma).pdf
  mixed = lambda x: (1 - q) * base(x) + q * other(x)
  over = lambda p, r: integrate.quad(
    lambda x: max(0.0, p(x) - math.exp(epsilon) * r(x)), -12, 12, limit=500
  )[0]
  delta = max(over(mixed, base), over(base, mixed))
  assert accounting.epsilon(spent(gaussian("gradients", sigma, q), 1, delta)) == pytest.approx(
    epsilon, rel=0.01
  )


def moments_epsilon(sigma, q, count, delta):
  """Mironov et al. 2019, section 3.3, at whole orders, and the conversion of Mironov 2017,
  proposition 3.
  """

  def moment(order):
    terms = (
      math.comb(order, k) * (1 - q) ** (order - k) * q**k * math.exp(k * (k - 1) / (2 * sigma**2))
      for k in range(order + 1)
    )
    return math.log(math.fsum(terms))

  return min((count * moment(order) - math.log(delta)) / (order - 1) for order in range(2, 33))


@pytest.mark.parametrize(
  ("sigma", "q", "count", "printed"),
  [(4.0, 0.01, 10_000, 1.26), (1.3, 250 / 60000, 3600, 1.18)],
  ids=["Abadi et al. 2016, section 5.1", "tutorial of TensorFlow Privacy"],
)
def test_figures_in_print(sigma, q, count, printed):
  """The moments accountant of those years gives what they print; ours, which convert better, stay
  below.
  """
  assert moments_epsilon(sigma, q, count, 1e-5) == pytest.approx(printed, abs=0.005)
  ledger = spent(gaussian("gradients", sigma, q), count)
  assert 0.6 * printed < accounting.epsilon(ledger) < accounting.epsilon(ledger, "rdp") < printed


def test_figures_of_jax_privacy():
  """Its accountants' tests (2.27535 by RDP, 2.09245 by PLD), and its CIFAR-10 recipe, which is to
  end below 1.
  """
  ledger = spent(gaussian("gradients", 4.0, 1024 / 50000), 10_000)
  assert accounting.epsilon(ledger, "rdp") == pytest.approx(2.27535, rel=1e-3)
  assert accounting.epsilon(ledger, "pld") == pytest.approx(2.09245, rel=1e-3)
  recipe = spent(gaussian("gradients", 10.0, 4096 / 50000), 725)
  assert 0.75 < accounting.epsilon(recipe) < accounting.epsilon(recipe, "rdp") < 1


def test_many_faint_steps_are_a_gaussian():
  """The central limit of Bu et al. 2020: a grid as coarse as the library's own makes 0.025 of
  0.008.
  """
  sigma, q, count = 92.0, 1e-3, 100_000
  mu = q * math.sqrt(count * math.expm1(sigma**-2))
  ledger = spent(gaussian("gradients", sigma, q), count)
  assert accounting.epsilon(ledger, "pld") == pytest.approx(
    gaussian_epsilon(1 / mu, 1e-5), rel=0.01
  )
  assert accounting.epsilon(ledger) <= accounting.epsilon(ledger, "rdp")


def test_renyi_divergences_equal_the_library_s():
  """Our sum at whole orders, used where a release is known by its curve alone, against
  dp-accounting.
  """
  zero = renyi("nothing", (0.0,) * len(accounting.ORDERS))
  for sigma, q, count in ((1.1, 256 / 60000, 1000), (0.8, 0.2, 10), (3.0, 1.0, 5)):
    ledger = spent(gaussian("gradients", sigma, q), count)
    want = rdp.RdpAccountant(accounting.ORDERS)
    event = dp_accounting.GaussianDpEvent(sigma)
    want.compose(dp_accounting.PoissonSampledDpEvent(q, event) if q < 1 else event, count)
    assert accounting.epsilon(spend(ledger, zero)) == pytest.approx(
      want.get_epsilon(1e-5), rel=0.01
    )
    assert accounting.epsilon(ledger, "rdp") == pytest.approx(want.get_epsilon(1e-5), rel=1e-9)


def test_a_gaussian_by_its_curve_and_by_its_name_cost_the_same():
  curve = renyi("noise", tuple(order / (2 * 5.0**2) for order in accounting.ORDERS))
  for count in (1, 10):
    by_curve, by_name = spent(curve, count), spent(gaussian("noise", 5.0), count)
    assert accounting.epsilon(by_curve) == pytest.approx(
      accounting.epsilon(by_name, "rdp"), rel=0.01
    )
    with pytest.raises(ValueError, match="Renyi divergences alone"):
      accounting.epsilon(by_curve, "pld")


def test_rounds_and_statistics_compose_at_a_site_and_not_across_sites():
  counts = gaussian("class counts", 20.0)
  both = functools.reduce(spend, (GRADIENTS,) * 100 + (counts,), Ledger("example", 1e-5))
  assert [r.times for r in both.releases] == [100, 1]
  assert both == spend(spend(Ledger("example", 1e-5), GRADIENTS, 100), counts)
  one, two = spent(GRADIENTS, 100), spent(GRADIENTS, 200)
  assert (
    accounting.epsilon(one) < accounting.epsilon(both) < accounting.epsilon(two)
  )  # tuning twice costs twice as much
  assert accounting.of_sites([one, two, one]) == accounting.epsilon(two)
  assert accounting.epsilon(Ledger("example", 1e-5)) == 0.0
  with pytest.raises(ValueError, match="different units"):
    accounting.of_sites([one, one._replace(unit="site")])
  for judge in (accounting.of_sites, ledgers.statement):
    with pytest.raises(ValueError, match="different deltas"):
      judge([one, one._replace(delta=1e-2)])


def test_an_overflow_of_batches_costs_delta():
  p, count, delta = 1e-9, 100, 1e-5
  plain, careful = (
    spent(gaussian("gradients", 1.1, 0.01, extra), count, delta) for extra in (0.0, p)
  )
  value = accounting.epsilon(careful)
  left = delta - (1 + math.exp(value)) * p * count
  assert accounting.epsilon(plain) < value
  assert value == pytest.approx(accounting.epsilon(plain._replace(delta=left)), rel=1e-3)
  assert accounting.epsilon(spent(gaussian("gradients", 1.1, 0.01, 1e-4), count, delta)) == math.inf


def test_no_claim_where_overflows_feed_on_themselves():
  """Between the probabilities with a claim and those without, iteration crawls; a claim made there
  must still hold.
  """
  claim = lambda p: accounting.epsilon(spent(gaussian("sums", 1.0, 1.0, p), 1, 1e-3), "rdp")
  low, high = 1e-6, 1e-3
  for _ in range(40):
    middle = math.sqrt(low * high)
    low, high = (middle, high) if math.isfinite(claim(middle)) else (low, middle)
  left = 1e-3 - (1 + math.exp(claim(low))) * low
  assert left > 0
  plain = accounting.epsilon(spent(gaussian("sums", 1.0), 1, left), "rdp")
  assert claim(low) == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_noise_is_calibrated_to_the_budget_and_no_more():
  before = (gaussian("class counts", 20.0),)
  start = spend(Ledger("example", 1e-3), before[0])
  sigma = accounting.calibrate(3.0, 1e-3, 0.1, 50, before, extra_delta=1e-14)
  reached = lambda s: accounting.epsilon(spend(start, gaussian("gradients", s, 0.1, 1e-14), 50))
  assert 2.98 < reached(sigma) <= 3.0 < reached(sigma / 1.002)
  release = gaussian("gradients", sigma, 0.1, 1e-14)
  within = lambda target, most: accounting.steps_within(
    target, lambda count: spend(start, release, count), most
  )
  assert within(3.0, 64) in (50, 51)
  assert within(3.0, 20) == 20
  assert within(0.01, 20) == 0


def test_a_ledger_survives_being_written():
  curve = renyi("noise", np.arange(len(accounting.ORDERS)) / 7)
  ledger = functools.reduce(
    spend, (GRADIENTS, curve, GRADIENTS), accounting.ledger("patient", 1e-4, 1000)
  )
  assert ledgers.from_json(ledgers.to_json(ledger)) == ledger
  assert hash(ledger) == hash(ledgers.from_json(ledgers.to_json(ledger)))
  text = ledgers.to_json(spent(GRADIENTS, 10))
  for bad in (
    "[1, 2]",
    text.replace('"example"', '"nobody"'),
    text.replace('"delta": 1e-05', '"delta": 7'),
    text.replace('"times": 10', '"times": -10'),
    text.replace('"noise_multiplier": 1.1', '"noise_multiplier": 0'),
    text.replace('"curve": []', '"curve": [0.0]'),
  ):
    assert bad != text
    with pytest.raises(ValueError, match="not a ledger"):
      ledgers.from_json(bad)


def test_a_statement_names_unit_delta_and_mechanism():
  told = ledgers.statement([spent(GRADIENTS, 10), spent(GRADIENTS, 20)])
  epsilon = accounting.epsilon(spent(GRADIENTS, 20))
  assert "one example" in told["unit of privacy"]
  assert told["delta"] == 1e-5
  assert "20 times" in told["released: gradients"]
  assert "Poisson" in told["released: gradients"]
  assert (
    epsilon <= next(v for k, v in told.items() if k.startswith("epsilon (")) < epsilon + 1e-4
  )  # never rounded down
  assert "infinite" in ledgers.statement([spent(gaussian("sums", 0.01))]).values()


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: accounting.ledger("example", 1e-2, 1000), "publish one unit completely"),
    (lambda: accounting.ledger("example", 0.0, 1000), "delta=0"),
    (lambda: accounting.ledger("example", 1e-6, 0), "num_units=0"),
    (lambda: accounting.ledger("image", 1e-6, 1000), "unit='image'"),
    (lambda: gaussian("gradients", 0.0), "without noise nothing is private"),
    (lambda: gaussian("gradients", 1.0, 1.5), "sampling_rate=1.5"),
    (lambda: renyi("noise", (1.0,)), "1 divergences"),
    (lambda: spend(Ledger("example", 1e-5), GRADIENTS, -1), "count=-1"),
    (lambda: accounting.epsilon(spent(GRADIENTS), "moments"), "accountant='moments'"),
    (lambda: accounting.calibrate(-1.0, 1e-5, 0.1, 10), "target_epsilon=-1.0"),
    (lambda: accounting.calibrate(1.0, 1.0, 0.1, 10), "delta=1.0"),
    (lambda: accounting.calibrate(1.0, 0.0, 0.1, 10), "delta=0.0"),
    (lambda: accounting.calibrate(0.3, 1e-3, 1e-4, 2), "privacy in name only"),
    (lambda: accounting.of_sites([]), "a common claim needs one"),
    (lambda: renyi("noise", (1.0,) * len(accounting.ORDERS), 1.0), "extra_delta=1.0"),
    (
      lambda: accounting.calibrate(0.1, 1e-5, 0.1, 10, (gaussian("counts", 1.0),)),
      "is spent by counts alone",
    ),
  ],
)
def test_unsound_requests_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()
