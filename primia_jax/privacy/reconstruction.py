"""What a ledger says against reconstruction: naming the unit that was used, among candidates.

The game (Balle et al. 2022; Hayes et al. 2023): somebody holds N candidates for one unit, one of
them, drawn uniformly, was used, and all other units are known. The guess is right with probability
1 / N before anything is released. A release for which any set of outcomes is at most e^epsilon
times as likely with a unit as without it, plus delta, raises that to at most e^epsilon / N + delta.
This holds for every epsilon with its delta(epsilon), so the least of these bounds holds. It is
1 - f(1 / N) for the trade-off function f (Kaissis et al. 2023), and so the bound is far below 1
where epsilon at a small delta seems large.
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
  releases = [r for r in ledger.releases if r.times]
  prior = 1 / num_candidates
  if not releases:
    return prior
  if (known := _as_one(releases)) is not None:
    bound = _of_gaussian(*known, prior)
  else:
    bound = _of_profile(ledger, prior)
  return min(1.0, max(prior, bound) + accounting.extra_delta(ledger))


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
  """(1 - q) / N + q (1 - Phi(Phi^-1(1 - 1/N) - mu)): the power of the best test at level 1 / N."""
  return (1 - rate) * prior + rate * float(scipy.special.ndtr(scipy.special.ndtri(prior) + mu))


def _of_profile(ledger: Ledger, prior: float) -> float:
  """min over delta of e^epsilon(delta) / N + delta; every delta gives a bound that holds."""
  of_delta = accounting.profile(ledger)

  def bound(log_delta: float) -> float:
    delta = math.exp(log_delta)
    return math.exp(min(of_delta(delta), 700.0)) * prior + delta

  options = {"xatol": 1e-2}
  found = scipy.optimize.minimize_scalar(
    bound, bounds=_LOG_DELTAS, method="bounded", options=options
  )
  return float(found.fun)
