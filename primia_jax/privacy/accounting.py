"""What releases cost in epsilon and delta, over all mechanisms, computed by dp-accounting.

A `Release` is one output computed from a site's units under noise; a `Ledger` lists all outputs of
a site. Sites with disjoint units compose in parallel (the worst counts, `of_sites`). Everything at
one site composes sequentially: rounds, statistics and tuning runs. Only Poisson sampling is known
here. Batches drawn in any other way, such as by shuffling, are not amplified, and must be charged
with a sampling rate of 1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import scipy

if TYPE_CHECKING:
  import dp_accounting  # otherwise where it is used, because the import takes a second

UNITS = ("example", "patient", "site")
ACCOUNTANTS = ("pld", "rdp")
ORDERS = (
  *map(float, range(2, 65)),
  *(2.0**i for i in range(7, 13)),
)  # whole numbers, for which the formula is a sum
_MAX_EPSILON = 1e3  # beyond this nothing is claimed
_LEAST_NOISE = 0.1  # below this nothing is calibrated
# step of a privacy loss distribution over its width; larger steps mean more error and less time
_GRID = 5e-5


class Release(NamedTuple):
  """One kind of output of a site, and how often it was given.

  Attributes:
    what: its name in reports, such as "gradients".
    noise_multiplier: of the Poisson-subsampled Gaussian mechanism; 0 where `curve` is given.
    sampling_rate: q, the rate that really ran.
    times: how often it was given.
    extra_delta: the probability, each time, that what ran was not what is accounted for: a batch
      that overflowed, or the sampler's error.
    curve: Renyi divergences at `ORDERS`, for any other mechanism; empty for the Gaussian.
  """

  what: str
  noise_multiplier: float
  sampling_rate: float = 1.0
  times: int = 1
  extra_delta: float = 0.0
  curve: tuple[float, ...] = ()


class Ledger(NamedTuple):
  """All that a site has released.

  Attributes:
    unit: whose presence is hidden: "example", "patient" or "site".
    delta: of the claim.
    releases: each kind on one line.
  """

  unit: str
  delta: float
  releases: tuple[Release, ...] = ()


def gaussian(
  what: str, noise_multiplier: float, sampling_rate: float = 1.0, extra_delta: float = 0.0
) -> Release:
  """One release of the Poisson-subsampled Gaussian mechanism, adding or removing one unit (Mironov
  et al. 2019).

  Raises:
    ValueError: for no noise, or a rate outside (0, 1].
  """
  if not 0 < noise_multiplier < math.inf:
    raise ValueError(
      f"{what}: noise_multiplier={noise_multiplier} must be positive: without noise nothing is "
      f"private"
    )
  if not 0 < sampling_rate <= 1:
    raise ValueError(f"{what}: sampling_rate={sampling_rate} must lie in (0, 1]")
  _check_extra(what, extra_delta)
  return Release(what, noise_multiplier, sampling_rate, extra_delta=extra_delta)


def renyi(what: str, curve: Sequence[float], extra_delta: float = 0.0) -> Release:
  """One release of any mechanism, from its Renyi divergences at `ORDERS` (distributed noise:
  `distributed_cost.rdp`).

  Raises:
    ValueError: for another number of divergences, or one that is negative or no number.
  """
  if len(curve) != len(ORDERS) or not all(value >= 0 for value in curve):
    raise ValueError(
      f"{what}: a curve of {len(curve)} divergences; give one that is not negative for each of "
      f"ORDERS"
    )
  _check_extra(what, extra_delta)
  return Release(what, 0.0, extra_delta=extra_delta, curve=tuple(map(float, curve)))


def ledger(unit: str, delta: float, num_units: int) -> Ledger:
  """An empty ledger.

  Args:
    unit: "example", "patient" or "site".
    delta: above 1 / num_units a mechanism that publishes a random unit whole would count as
      private.
    num_units: public number of the site's units.

  Raises:
    ValueError: for another unit, or a delta outside (0, 1 / num_units].
  """
  if unit not in UNITS:
    raise ValueError(f"unit={unit!r}; use one of {', '.join(UNITS)}")
  if num_units < 1:
    raise ValueError(f"num_units={num_units} must be at least 1")
  if not 0 < delta <= 1 / num_units:
    raise ValueError(
      f"delta={delta:g} must lie between 0 and 1 / {num_units} = {1 / num_units:.3g}, one over the "
      f"number of units: a larger one would allow a mechanism to publish one unit completely"
    )
  return Ledger(unit, delta)


def spend(ledger: Ledger, release: Release, count: int = 1) -> Ledger:
  """The ledger with `count` more of a release; equal ones are kept as one line.

  Raises:
    ValueError: for a negative count.
  """
  if count < 0:
    raise ValueError(f"count={count} must not be negative")
  same = lambda r: r._replace(times=release.times) == release
  kept = tuple(
    r._replace(times=r.times + count * release.times) if same(r) else r for r in ledger.releases
  )
  if not any(map(same, ledger.releases)) and count:
    kept += (release._replace(times=count * release.times),)
  return ledger._replace(releases=kept)


def epsilon(ledger: Ledger, accountant: str | None = None) -> float:
  """The epsilon of a ledger at its delta; 0 for an empty one, infinite from 1000 on.

  Args:
    ledger: what was released.
    accountant: "pld" (privacy loss distributions: tight to 0.1 %, from above), "rdp" (looser, at
      once), or None for the lower of both, which are upper bounds; RDP alone where a release is
      known by its curve.

  Raises:
    ValueError: for "pld" with a release that is known by its Renyi curve alone.

  With overflow probabilities p_i the accountant is asked, by iteration, for delta - (1 + e^epsilon)
  sum p_i: what ran is within total variation p_i of what is accounted for, on either of two
  adjacent data sets.
  """
  if accountant not in (None, *ACCOUNTANTS):
    raise ValueError(f"accountant={accountant!r}; use one of {', '.join(ACCOUNTANTS)}")
  if not any(r.times for r in ledger.releases):
    return 0.0
  of_delta = profile(ledger, accountant)
  value = _least(of_delta, ledger.delta, extra_delta(ledger))
  return value if value < _MAX_EPSILON else math.inf


def profile(
  ledger: Ledger, accountant: str | None = None, grid: float = _GRID
) -> Callable[[float], float]:
  """delta -> epsilon of what a ledger accounts for, `extra_delta` left out; see `epsilon`.

  The ledger's own delta sets the grid of the computation only, to `grid` times the width of the
  privacy loss distribution. Whatever the grid, what is returned is an upper bound.

  Raises:
    ValueError: as `epsilon`.
  """
  releases = tuple(r for r in ledger.releases if r.times)
  tight = all(not r.curve for r in releases)
  if accountant == "pld" and not tight:
    raise ValueError("a release is known by its Renyi divergences alone; use the accountant rdp")
  by_rdp = _by_rdp(releases)
  if not tight or accountant == "rdp":
    return by_rdp
  width = by_rdp(min(ledger.delta, 1e-6))
  if width > 3 * _MAX_EPSILON:
    return lambda delta: math.inf
  by_pld = _by_pld(releases, grid * max(width, 1e-6))
  return by_pld if accountant else lambda delta: min(by_pld(delta), by_rdp(delta))


def divergences(ledger: Ledger) -> np.ndarray:
  """[len(ORDERS)] the Renyi divergences of all that a ledger lists, `extra_delta` left out."""
  curve = lambda r: np.asarray(r.curve or _gaussian_curve(r.noise_multiplier, r.sampling_rate))
  return np.sum([np.zeros(len(ORDERS)), *(r.times * curve(r) for r in ledger.releases)], axis=0)


def extra_delta(ledger: Ledger) -> float:
  """The probability that anything of a ledger ran otherwise than accounted for."""
  return math.fsum(r.times * r.extra_delta for r in ledger.releases)


def of_sites(ledgers: Sequence[Ledger]) -> float:
  """The epsilon of a unit in any one of several disjoint sites, the worst: parallel composition.

  Raises:
    ValueError: for no sites, or sites with different units or deltas, which have no common claim.
  """
  return epsilon(worst(ledgers))


def calibrate(
  target_epsilon: float,
  delta: float,
  sampling_rate: float,
  num_steps: int,
  before: Sequence[Release] = (),
  extra_delta: float = 0.0,
) -> float:
  """The least noise multiplier, to a thousandth, with which `num_steps` releases and those `before`
  meet a target.

  Raises:
    ValueError: for a target or delta out of range, a target that the releases before exceed alone,
      or a target so lax, with its delta, that a multiplier of 0.1 (hardly any noise) meets it.
  """
  if not 0 < target_epsilon < _MAX_EPSILON or num_steps < 1:
    raise ValueError(
      f"target_epsilon={target_epsilon} must lie in (0, {_MAX_EPSILON:g}), num_steps={num_steps} "
      f"be positive"
    )
  if not 0 < delta < 1:
    raise ValueError(
      f"delta={delta} must lie in (0, 1), and be at most one over the number of units"
    )
  start = functools.reduce(spend, before, Ledger("example", delta))
  if epsilon(start) >= target_epsilon:
    raise ValueError(
      f"target_epsilon={target_epsilon} is spent by {', '.join(r.what for r in before)} alone; "
      f"give these more noise"
    )
  spent = lambda sigma: spend(
    start, gaussian("gradients", sigma, sampling_rate, extra_delta), num_steps
  )
  fits = lambda sigma, accountant=None: epsilon(spent(sigma), accountant) <= target_epsilon
  high = 0.25  # the fast accountant, an upper bound, says where to look
  while not fits(high, "rdp"):
    high *= 1.1
    if high > 1e5:
      raise ValueError(
        f"no noise meets target_epsilon={target_epsilon} at delta={delta:g}; raise one of them"
      )
  low = high / 1.15
  while fits(low):
    if low < _LEAST_NOISE:
      raise ValueError(
        f"target_epsilon={target_epsilon} at delta={delta:g} is met with hardly any noise, which "
        f"is privacy in name only; lower one of them"
      )
    low, high = low / 1.15, low
  while high > low * 1.001:
    middle = math.sqrt(low * high)
    low, high = (low, middle) if fits(middle) else (middle, high)
  return high


def steps_within(target_epsilon: float, spent: Callable[[int], Ledger], most: int) -> int:
  """How many steps (or rounds) fit into a budget, at most `most`; 0 where the budget is spent.

  Args:
    target_epsilon: the budget.
    spent: number of steps -> the ledger after them.
    most: the most steps.
  """
  low, high = 0, most
  while low < high:
    middle = (low + high + 1) // 2
    fits = epsilon(spent(middle)) <= target_epsilon
    low, high = (middle, high) if fits else (low, middle - 1)
  return low


def _least(of_delta: Callable[[float], float], delta: float, wrong: float) -> float:
  """The least epsilon with epsilon >= of_delta(delta - (1 + e^epsilon) wrong), found from below."""
  value = of_delta(delta)
  for _ in range(100):
    left = delta - (1 + math.exp(min(value, 700.0))) * wrong
    if left <= 0:
      return math.inf
    before, value = value, of_delta(left)
    if value <= before * (1 + 1e-9):
      return value
  return math.inf  # still rising: a smaller claim would not hold


def worst(ledgers: Sequence[Ledger]) -> Ledger:
  """The ledger of the largest epsilon.

  Raises:
    ValueError: as `of_sites`.
  """
  claims = sorted({(one.unit, one.delta) for one in ledgers})
  if len(claims) != 1:
    raise ValueError(
      f"sites protect different units or have different deltas, {claims}; a common claim needs one"
    )
  return max(set(ledgers), key=epsilon)


def _check_extra(what: str, extra_delta: float) -> None:
  if not 0 <= extra_delta < 1:
    raise ValueError(f"{what}: extra_delta={extra_delta} must lie in [0, 1)")


def _event(release: Release) -> dp_accounting.DpEvent:
  import dp_accounting

  event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(release.noise_multiplier)
  return (
    event
    if release.sampling_rate == 1
    else dp_accounting.PoissonSampledDpEvent(release.sampling_rate, event)
  )


def _by_rdp(releases: Sequence[Release]) -> Callable[[float], float]:
  """delta -> epsilon, by composing Renyi divergences (conversion: Canonne et al. 2020, proposition
  12).
  """
  if not any(r.curve for r in releases):
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(ORDERS)
    for release in releases:
      accountant.compose(_event(release), release.times)
    return accountant.get_epsilon
  orders, total = np.asarray(ORDERS), divergences(Ledger("", 0.0, tuple(releases)))
  converted = lambda delta: (
    total + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
  )
  return lambda delta: max(0.0, float(np.min(converted(delta))))


def _gaussian_curve(noise_multiplier: float, sampling_rate: float) -> tuple[float, ...]:
  """Renyi divergences of the Poisson-subsampled Gaussian at whole orders (Mironov et al. 2019,
  section 3.3).
  """

  def divergence(order: int) -> float:
    k, special = np.arange(order + 1), scipy.special
    logs = special.gammaln(order + 1) - special.gammaln(k + 1) - special.gammaln(order - k + 1)
    logs = logs + special.xlog1py(order - k, -sampling_rate) + k * math.log(sampling_rate)
    return float(special.logsumexp(logs + k * (k - 1) / (2 * noise_multiplier**2))) / (order - 1)

  return tuple(divergence(int(order)) for order in ORDERS)


@functools.lru_cache(maxsize=64)
def _by_pld(releases: tuple[Release, ...], interval: float) -> Callable[[float], float]:
  """delta -> epsilon, by composing privacy loss distributions, on a grid that rounds up (Doroshenko
  et al. 2022).
  """
  from dp_accounting import pld

  accountant = pld.PLDAccountant(value_discretization_interval=interval)
  for release in releases:
    accountant.compose(_event(release), release.times)
  return accountant.get_epsilon
