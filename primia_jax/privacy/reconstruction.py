"""What a ledger says against reconstruction and membership inference.

Against reconstruction: naming the unit that was used, among candidates.

The game (Balle et al. 2022; Hayes et al. 2023): somebody holds N candidates for one unit, one of
them, drawn uniformly, was used, and all other units are known. The guess is right with probability
1 / N before anything is released. Let m be the law of what is released with the unit, and n the law
without it. The chance is at most the largest m(E) of any event E with n(E) <= 1 / N (Hayes et al.
2023, theorem 2). Three ways to it:

- `reconstruction_bound` is proved: in closed form where there is one (Kaissis et al. 2023), else
  from the ledger's epsilon at every delta, e^epsilon / N + delta, or its Renyi divergences.
- `renyi_bound` (Balle et al. 2022) needs the divergences alone.
- `estimate` (Hayes et al. 2023, algorithm 1) draws from m and n, and has a confidence interval. It
  is the sharpest for many sampled steps.

All are far below 1 where epsilon at a small delta seems large, and two ledgers of equal epsilon and
delta may differ in them. Membership is the same test, at any false positive rate.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.types import Array, Key

NUM_CANDIDATES = 10_000
_LOG_DELTAS = math.log(1e-12), 0.0  # between which the best delta is looked for


class Estimate(NamedTuple):
  """A chance known from samples.

  Attributes:
    value: the estimate.
    low, high: an interval that holds the true chance with the confidence asked for.
  """

  value: float
  low: float
  high: float


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
  prior = _prior(num_candidates)
  return min(1.0, _power(ledger, prior) + accounting.extra_delta(ledger))


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
  bound = _of_profile(ledger, level)
  return max(level, min(bound, _of_divergences(ledger, level)) if level else bound)


def renyi_bound(ledger: Ledger, num_candidates: int = NUM_CANDIDATES) -> float:
  """The least over orders a of (e^D_a / N)^((a - 1) / a), with the Renyi divergence D_a (Balle et
  al. 2022), plus `Release.extra_delta`; for any release that a ledger can hold.

  Raises:
    ValueError: for fewer than two candidates.
  """
  prior = _prior(num_candidates)
  bound = _of_divergences(ledger, prior)
  return min(1.0, max(prior, bound) + accounting.extra_delta(ledger))


def estimate(
  ledger: Ledger,
  key: Key,
  num_candidates: int = NUM_CANDIDATES,
  num_samples: int = 200_000,
  confidence: float = 0.95,
) -> Estimate:
  """The chance of theorem 2 itself, from samples: Hayes et al. 2023, algorithm 1.

  With the likelihood ratio r = dm / dn the best event is r > t for some t, and the chance is the
  least over t of t / N + E_m[max(0, 1 - t / r)]. So any t gives a bound from above, and by
  concavity m(r > t) min(1, (1 / N) / n(r > t)) one from below. The paper draws from n, where one
  sample in N counts; here all are drawn from m and weighted by 1 / r where n is asked for. Half of
  them choose t. The others give the interval, which holds for every number of samples: Clopper and
  Pearson 1934, and Maurer and Pontil 2009, theorem 4, for means of numbers in [0, 1]. Float32
  rounds log r in its last places.

  Args:
    ledger: of one site, of Gaussian releases, sampled or not.
    key: of the samples.
    num_candidates: N.
    num_samples: time grows with their number times the sampled steps of the ledger.
    confidence: of the interval, both sides together.

  Raises:
    ValueError: for fewer than two candidates or 100 samples, a confidence outside (0, 1), or a
      release that is known by its Renyi divergences alone.
  """
  prior = _prior(num_candidates)
  if num_samples < 100 or not 0 < confidence < 1:
    raise ValueError(
      f"num_samples={num_samples} must be at least 100, and confidence={confidence} in (0, 1)"
    )
  releases = [r for r in ledger.releases if r.times]
  if any(r.curve for r in releases):
    raise ValueError(
      "a release known by its Renyi divergences cannot be drawn from; use renyi_bound"
    )
  if not releases:
    return Estimate(prior, prior, prior)
  logs = np.zeros(num_samples)
  for number, release in enumerate(releases):
    rate, times = release.sampling_rate, release.times
    sigma = release.noise_multiplier
    if rate == 1:
      sigma, times = sigma / math.sqrt(times), 1
    drawn = _log_ratios(jax.random.fold_in(key, number), sigma, rate, times, num_samples)
    logs += np.asarray(drawn, np.float64)
  choosing, judging = np.sort(logs[::2])[::-1], logs[1::2]
  outside = np.cumsum(np.exp(-choosing)) / len(choosing)  # n(r > t)
  reached = int(np.sum(outside < prior))
  threshold = choosing[min(reached, len(choosing) - 1)]  # log t
  weights, above = np.exp(np.minimum(threshold - judging, 0.0)), judging > threshold  # t / r
  doubt = (1 - confidence) / 2
  scale = math.exp(min(threshold, 700.0))
  dual, high = _mean(1 - weights, doubt)
  num, count = len(judging), int(np.sum(above))
  sure = scipy.special.betaincinv(count, num - count + 1, doubt / 2) if count else 0.0
  at_most = _mean(np.where(above, weights, 0.0), doubt / 2)[1] / scale  # n(r > t)
  low = sure * min(1.0, prior / at_most)
  wrong = accounting.extra_delta(ledger)
  limited = lambda bound: float(min(1.0, max(prior, bound)))
  return Estimate(
    limited(scale * prior + dual + wrong), limited(low), limited(scale * prior + high + wrong)
  )


@functools.partial(jax.jit, static_argnums=4)
def _log_ratios(key: Key, sigma: float, rate: float, times: int, num_samples: int) -> Array:
  """[num_samples] log dm / dn of that many releases, drawn from m: at each, the unit is in with
  probability q, and what is released is N(1, sigma^2) with it, N(0, sigma^2) without.
  """
  sigma, rate = jnp.float32(sigma), jnp.float32(rate)

  def add(t: Array, total: Array) -> Array:
    coin, noise = jax.random.split(jax.random.fold_in(key, t))
    is_in = jax.random.uniform(coin, (num_samples,)) < rate
    released = is_in.astype(jnp.float32) + sigma * jax.random.normal(noise, (num_samples,))
    gain = (released - 0.5) / jnp.square(sigma)
    return total + jnp.logaddexp(jnp.log1p(-rate), jnp.log(rate) + gain)

  return jax.lax.fori_loop(0, times, add, jnp.zeros(num_samples, jnp.float32))


def _mean(values: np.ndarray, doubt: float) -> tuple[float, float]:
  """The mean of numbers in [0, 1], and what their expectation exceeds with probability `doubt` at
  most (Maurer and Pontil 2009, theorem 4).
  """
  num, rest = len(values), math.log(2 / doubt)
  spread = math.sqrt(2 * float(np.var(values, ddof=1)) * rest / num)
  mean = float(np.mean(values))
  return mean, mean + spread + 7 * rest / (3 * (num - 1))


def _prior(num_candidates: int) -> float:
  if num_candidates < 2:
    raise ValueError(f"num_candidates={num_candidates}; one candidate is right without any release")
  return 1 / num_candidates


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


def _of_divergences(ledger: Ledger, prior: float) -> float:
  """min over orders a of (e^D_a / N)^((a - 1) / a), by Hoelder's inequality."""
  orders = np.asarray(accounting.ORDERS)
  logs = (accounting.divergences(ledger) + math.log(prior)) * (1 - 1 / orders)
  return math.exp(min(0.0, float(np.min(logs))))
