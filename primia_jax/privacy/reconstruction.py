"""What a ledger says against reconstruction and membership inference.

Against reconstruction: naming the unit that was used, among candidates.

The game (Balle et al. 2022; Hayes et al. 2023): somebody holds N candidates for one unit, one of
them, drawn uniformly, was used, and all other units are known. The guess is right with probability
1 / N before anything is released. A release for which any set of outcomes is at most e^epsilon
times as likely with a unit as without it, plus delta, raises that to at most e^epsilon / N + delta.
This holds for every epsilon with its delta(epsilon), so the least of these bounds holds. It is
1 - f(1 / N) for the trade-off function f (Kaissis et al. 2023), and so the bound is far below 1
where epsilon at a small delta seems large. Membership is the same test, at any false positive rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import scipy

from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger, Release

NUM_CANDIDATES = 10_000
_LOG_DELTAS = math.log(1e-12), 0.0  # between which the best delta is looked for


def reconstruction_bound(ledger: Ledger, num_candidates: int = NUM_CANDIDATES) -> float:
  """The largest chance to name the unit that was used among N candidates, from all releases.

  For Gaussian releases without sampling, and for one release with Poisson sampling, it is the
  closed form of Kaissis et al. 2023. For all others it comes from the ledger's own accountant, and
  is an upper bound. What ran otherwise than accounted for (`Release.extra_delta`) is added.

  Args:
    ledger: of one site; of several sites, that of the largest epsilon (`accounting.worst`).
    num_candidates: N.

  Returns:
    A probability from 1 / N, for an empty ledger, to 1.

  Raises:
    ValueError: for fewer than two candidates.
  """
  if num_candidates < 2:
    raise ValueError(f"num_candidates={num_candidates}; one candidate is right without any release")
  return min(1.0, _power(ledger, 1 / num_candidates) + accounting.extra_delta(ledger))


def max_true_positive_rate(ledger: Ledger, false_positive_rate: float) -> float:
  """The largest true positive rate of any membership test at a false positive rate.

  Whoever sees all releases guesses whether one unit was in, and may know all other units. It is 1 -
  f(FPR) for the trade-off function f (Dong et al. 2022, definition 2.1), closed and from above as
  in `reconstruction_bound`. For every epsilon with its delta, TPR <= e^epsilon FPR + delta and 1 -
  FPR <= e^epsilon (1 - TPR) + delta (Kairouz et al. 2015, theorem 2.1). What ran otherwise than
  accounted for is added to both rates. It bounds expected rates, and averages over units of both:
  1 - f is concave.

  Args:
    ledger: as in `reconstruction_bound`.
    false_positive_rate: the share of units that were not in and are guessed in.

  Returns:
    A probability from the false positive rate, for an empty ledger, to 1.

  Raises:
    ValueError: for a rate outside [0, 1].
  """
  if not 0 <= false_positive_rate <= 1:
    raise ValueError(f"false_positive_rate={false_positive_rate} must lie in [0, 1]")
  wrong = accounting.extra_delta(ledger)
  return min(1.0, _power(ledger, min(1.0, false_positive_rate + wrong)) + wrong)


def _power(ledger: Ledger, level: float) -> float:
  """The power of the best test at a level, `extra_delta` left out."""
  releases = [r for r in ledger.releases if r.times]
  if not releases:
    return level
  if (known := _as_one(releases)) is not None:
    return max(level, _of_gaussian(*known, level))
  return max(level, _of_profile(ledger, level))


def _as_one(releases: Sequence[Release]) -> tuple[float, float] | None:
  """(mu, q) of the one Gaussian release, sampled with rate q, that these are; None where they are
  not: Gaussian releases without sampling add up in mu^2 (Dong et al. 2022, corollary 2).
  """
  if any(r.curve for r in releases):
    return None
  rates = {r.sampling_rate for r in releases}
  if rates != {1.0} and sum(r.times for r in releases) > 1:
    return None
  return math.sqrt(math.fsum(r.times / r.noise_multiplier**2 for r in releases)), rates.pop()


def _of_gaussian(mu: float, rate: float, prior: float) -> float:
  """(1 - q) / N + q (1 - Phi(Phi^-1(1 - 1/N) - mu)): the power of the best test at level 1 / N.

  A sampled release is the mixture (1 - q) N(0, 1) + q N(mu, 1) with the unit, and N(0, 1) without.
  """
  return (1 - rate) * prior + rate * float(scipy.special.ndtr(scipy.special.ndtri(prior) + mu))


def _of_profile(ledger: Ledger, prior: float) -> float:
  """The least of both bounds over delta; every delta gives bounds that hold."""
  of_delta = accounting.profile(ledger)

  def bound(log_delta: float, of_few: bool) -> float:
    delta = math.exp(log_delta)
    epsilon = min(of_delta(delta), 700.0)
    if of_few:
      return math.exp(epsilon) * prior + delta
    return 1 - math.exp(-epsilon) * max(0.0, 1 - delta - prior)

  def least(of_few: bool) -> float:
    found = scipy.optimize.minimize_scalar(
      bound, args=(of_few,), bounds=_LOG_DELTAS, method="bounded", options={"xatol": 1e-2}
    )
    return float(found.fun)

  return min(least(True), least(False))
