"""What guesses about canaries prove: lower bounds on epsilon from one run.

Each of m canaries takes part or not, by a fair coin of its own. An attacker sees what the run
released, guesses about c of them, and v guesses are right. A claim under which that many are right
with a probability below 1 - confidence is refuted. Two bounds:

- `f_dp_bound` (Mahloujifar, Melis and Chaudhuri 2025, "Auditing f-differential privacy in one
  run") refutes whole trade-off functions: those of the mechanism that a ledger names, with more or
  less noise than it says. It is the sharper one. What is proved is that the mechanism is not as
  private as any refuted member; calling that by the member's epsilon assumes a mechanism of this
  kind.
- `epsilon_delta_bound` (Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training
  run", theorem 5.2) refutes pairs (epsilon, delta), and assumes nothing about the mechanism.

Both hold whatever canaries do to each other, for any number of guesses that is fixed before the
outcome is seen. Neither reaches the truth: they allow for a mechanism that tells much on rare
occasions, about all canaries at once. Several runs with canaries of their own count as one
mechanism. An audit finds faults; finding none proves nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy import special

from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger

# chance x of an event with a unit -> the least chance of it without that unit, and the other way
# round: f(1 - x) for a symmetric trade-off function f (Dong et al. 2022)
Floor = Callable[[float], float]
_STEP = 1.01  # between the noise of one member of a family and that of the next
_MEMBERS = round(math.log(64) / math.log(_STEP))  # to each side of the ledger's own
_DELTAS = special.expit(np.linspace(-18, 6, 100))
_GRID = 1e-3  # see `accounting.profile`; many members are looked at
_MAX_EPSILON = 64.0  # beyond, nothing is resolved, and nothing is private


def right_guesses(
  scores: np.ndarray, included: np.ndarray, num_guesses: int, num_out: int | None = None
) -> int:
  """How many guesses are right: in for the highest scores, out for the lowest.

  Args:
    scores: [m], best a rising function of the likelihood ratio of in to out.
    included: [m] bool.
    num_guesses: c, fixed beforehand.
    num_out: how many of them say out; None for half of them.

  Raises:
    ValueError: for shapes that differ, scores that are not numbers, or more guesses than canaries.
  """
  out = num_guesses // 2 if num_out is None else num_out
  fitting = 0 <= out <= num_guesses <= len(scores)
  if scores.shape != included.shape or scores.ndim != 1 or not fitting:
    raise ValueError(
      f"num_guesses={num_guesses}, num_out={out}, scores {list(scores.shape)} and included "
      f"{list(included.shape)}; give one score and one coin for each canary, and no more guesses"
    )
  if np.any(np.isnan(scores)):
    raise ValueError(f"{np.sum(np.isnan(scores))} scores are NaN; such a run cannot be judged")
  order = np.argsort(scores, kind="stable")
  highest = order[len(order) - (num_guesses - out) :]
  return int(np.sum(included[highest]) + np.sum(~included[order[:out]]))


@functools.lru_cache(maxsize=1024)
def floor(ledger: Ledger) -> Floor:
  """The trade-off function of what a ledger lists, as a `Floor`.

  Exact for Gaussian releases without sampling: Phi(Phi^-1(x) - mu), their mu^2 added up (Dong et
  al. 2022, corollary 2). Otherwise from above the accountant's epsilon(delta), so that the floor is
  never too high. What ran otherwise than accounted for is allowed for.

  Raises:
    ValueError: for a release that is known by its Renyi divergences alone, which have no such
      function.
  """
  releases = [r for r in ledger.releases if r.times]
  if any(r.curve for r in releases):
    raise ValueError(
      "a release known by its Renyi divergences has no trade-off function; audit one of Gaussian "
      "noise"
    )
  wrong = accounting.extra_delta(ledger)
  if all(r.sampling_rate == 1 for r in releases):
    mu = math.sqrt(math.fsum(r.times / r.noise_multiplier**2 for r in releases))
    low = lambda x: float(special.ndtr(special.ndtri(x) - mu))
  else:
    of_delta = accounting.profile(ledger, grid=_GRID)
    epsilons = np.array([of_delta(delta) for delta in _DELTAS])
    known = np.isfinite(epsilons)
    if not np.any(known):
      return lambda x: 0.0
    grown, deltas = np.exp(np.minimum(epsilons[known], 700.0)), _DELTAS[known]
    slopes = np.concatenate([grown, 1 / grown])  # Dong et al. 2022, equation 5, and its inverse
    starts = np.concatenate([1 - deltas - grown, -deltas / grown])
    low = lambda x: float(np.max(starts + slopes * x))
  return lambda x: max(0.0, low(min(max(x - wrong, 0.0), 1.0)) - wrong)


def refutes(
  low: Floor, num_canaries: int, num_guesses: int, num_right: int, confidence: float = 0.95
) -> bool:
  """Whether v of c right guesses are rarer under a trade-off function than 1 - confidence.

  Mahloujifar et al. 2025, the algorithm for c guesses about m canaries. With p_t the chance of
  exactly t right ones, r_t = sum_(s >= t) s p_s / m and h_t = sum_(s >= t) (c - s) p_s / m, any
  mechanism has h_(t - 1) >= low(r_t) and r_0 + h_0 = c / m. If P[v or more right] were 1 -
  confidence, r and h would start at least at the values below, and r_0 + h_0 come out too large.

  Raises:
    ValueError: unless 0 <= num_right <= num_guesses <= num_canaries and 0 < confidence < 1.
  """
  _check(num_canaries, num_guesses, num_right)
  doubt = _doubt(confidence)
  r, h = (doubt * n / num_canaries for n in (num_right, num_guesses - num_right))
  for t in range(num_right - 1, -1, -1):
    least = low(r)
    if least <= h:
      return False  # from here on neither r nor h grows, and they sum to less than c / m
    r, h = r + t / (num_guesses - t) * (least - h), least
    if r + h > num_guesses / num_canaries:
      return True
  return False


def f_dp_bound(
  ledger: Ledger, num_canaries: int, num_guesses: int, num_right: int, confidence: float = 0.95
) -> float:
  """The largest epsilon, at the ledger's delta, of a refuted member of the ledger's family.

  A member has the ledger's releases with all noise multiplied by one factor, a power of 1.01 from
  1/64 to 64. If the mechanism is one of them, its epsilon is larger with probability `confidence`.

  Raises:
    ValueError: as `floor` and `refutes`.
  """
  refuted = lambda k: refutes(
    floor(_member(ledger, k)), num_canaries, num_guesses, num_right, confidence
  )
  low, high = -_MEMBERS - 1, _MEMBERS
  if not refuted(high):
    return 0.0
  while high > low + 1:
    middle = (low + high) // 2
    low, high = (low, middle) if refuted(middle) else (middle, high)
  return accounting.epsilon(_member(ledger, high))


def enough_guesses(ledger: Ledger, num_canaries: int, confidence: float = 0.95) -> int:
  """How many guesses to make, chosen before anything is seen.

  Five times the square root of the number of canaries, which is near the best for claims from 1 to
  6. Where that many right ones could not refute nine tenths of the ledger's noise: the least
  doubling that could, if there is one.
  """
  weaker = floor(_member(ledger, round(math.log(0.9) / math.log(_STEP))))
  fewest = guesses = min(num_canaries, math.ceil(5 * math.sqrt(num_canaries)))
  while guesses <= num_canaries:
    if refutes(weaker, num_canaries, guesses, guesses, confidence):
      return guesses
    guesses *= 2
  return fewest


def p_value(
  num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float
) -> float:
  """The chance, at most, that v or more of r guesses are right under (epsilon, delta)-DP.

  Steinke et al. 2023, theorem 5.2: P[W >= v] + 2 m delta max_(i <= v) P[v > W >= v - i] / i, where
  W counts the successes of r trials of probability e^epsilon / (1 + e^epsilon). Units are added or
  removed.

  Raises:
    ValueError: unless 0 <= num_right <= num_guesses <= num_canaries, epsilon >= 0 and 0 <= delta <=
      1.
  """
  _check(num_canaries, num_guesses, num_right)
  if not (epsilon >= 0 and 0 <= delta <= 1):
    raise ValueError(f"epsilon={epsilon} must not be negative and delta={delta} must lie in [0, 1]")
  q = special.expit(epsilon)
  cdf = np.append(
    0.0, special.bdtr(np.arange(num_right), num_guesses, q)
  )  # P[W <= -1], ..., P[W <= v - 1]
  share = np.max((cdf[-1] - cdf[-2::-1]) / np.arange(1, num_right + 1), initial=0.0)
  by_luck = special.bdtrc(num_right - 1, num_guesses, q) if num_right else 1.0
  return float(min(1.0, by_luck + 2 * num_canaries * delta * share))


def epsilon_delta_bound(
  num_canaries: int, num_guesses: int, num_right: int, delta: float, confidence: float = 0.95
) -> float:
  """The largest epsilon that the guesses refute at this delta; any mechanism's is larger with
  probability `confidence`.

  Raises:
    ValueError: as `p_value`, and for a confidence outside (0, 1).
  """
  doubt = _doubt(confidence)
  refuted = lambda epsilon: p_value(num_canaries, num_guesses, num_right, epsilon, delta) < doubt
  if not refuted(0.0):
    return 0.0
  low, high = 0.0, 1.0
  while high < _MAX_EPSILON and refuted(high):
    low, high = high, 2 * high
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (middle, high) if refuted(middle) else (low, middle)
  return low


def _member(ledger: Ledger, k: int) -> Ledger:
  """The ledger with all noise multiplied by 1.01^k."""
  scaled = lambda r: r._replace(noise_multiplier=r.noise_multiplier * _STEP**k)
  return ledger._replace(releases=tuple(map(scaled, ledger.releases)))


def _check(num_canaries: int, num_guesses: int, num_right: int) -> None:
  if not 0 <= num_right <= num_guesses <= num_canaries:
    raise ValueError(f"{num_right} right of {num_guesses} guesses about {num_canaries} canaries")


def _doubt(confidence: float) -> float:
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must lie in (0, 1), e.g. 0.95")
  return 1 - confidence
