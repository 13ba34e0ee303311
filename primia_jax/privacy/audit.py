"""Empirical lower bounds on epsilon: canaries go through the mechanism that really runs, and an
attacker guesses which took part.

Each canary is a gradient that takes part or not, by a fair coin of its own. What the mechanism
releases gives each canary a score. An attacker who tells canaries in from canaries out better than
(epsilon, delta) allows refutes the claim. One run with many canaries is enough (Steinke, Nasr and
Jagielski 2023, "Privacy auditing with one (1) training run"); several runs with canaries of their
own count as one mechanism, too. An audit finds faults; finding none proves nothing.

Three bounds, by how much they assume, the least first:

- `one_run_bound` holds for any mechanism (their theorem 5.2), and stays far below the true epsilon
  where that is large;
- `two_sided_bound` (Nasr et al. 2023, equation 4) assumes that the canaries' scores are independent
  of each other;
- `gaussian_bound` also assumes that the mechanism is Gaussian (Nasr et al. 2023, section 4): it is
  close to the truth, and for another mechanism it is no bound at all.

Independence holds exactly where each canary has a coordinate of its own and noise is independent
over coordinates, but not where canaries share directions, a norm or a clipping threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from primia_jax import prng
from primia_jax.types import Array

# (gradients [M, D] float32, included [M] bool, secret [8] uint32) -> [T, D], all that a run with
# these canaries releases: the noisy sum, of each step, of the clipped gradients that are included
ReleaseFn = Callable[[Array, Array, Array], Array]
_COINS, _DIRECTIONS = range(2)  # uses of an auditor's key
_MAX_EPSILON = 64.0  # beyond, nothing is resolved, and nothing is private


class Canaries(NamedTuple):
  """Canaries of one run.

  Attributes:
    directions: [M, D] float32, of norm 1.
    included: [M] bool, by independent fair coins.
  """

  directions: Array
  included: Array


class AuditResult(NamedTuple):
  """What an audit found; all but the scores are Python numbers.

  Attributes:
    epsilon: the lower bound of theorem 5.2, valid at the confidence asked for whatever the
      mechanism.
    p_value: the chance, at most, of guessing so well under the claimed (epsilon, delta); below 1 -
      confidence the claim is refuted.
    num_guesses, num_right: of the split that gave `epsilon`.
    independent_epsilon: `two_sided_bound`.
    gaussian_epsilon: `gaussian_bound`, turned into an epsilon at delta.
    mu: the Gaussian mechanism's mu (1 / noise multiplier for one release), at least.
    scores, included: [canaries] what the bounds were computed from.
  """

  epsilon: float
  p_value: float
  num_guesses: int
  num_right: int
  independent_epsilon: float
  gaussian_epsilon: float
  mu: float
  scores: np.ndarray
  included: np.ndarray


def canaries(key: Array, num_canaries: int, num_coordinates: int, dirac: bool = True) -> Canaries:
  """Draws which canaries take part, and their directions.

  Args:
    key: [8] uint32, the auditor's; it must be unknown to the mechanism.
    num_canaries: M.
    num_coordinates: D, at least M for Dirac canaries.
    dirac: canary i is coordinate i, so that canaries do not disturb each other; False for random
      directions, whose scores share noise of size M / D.

  Raises:
    ValueError: for fewer than 1 canary, or more Dirac canaries than coordinates.
  """
  if not 1 <= num_canaries <= (num_coordinates if dirac else math.inf):
    raise ValueError(
      f"num_canaries={num_canaries} in {num_coordinates} coordinates; give 1 to {num_coordinates}"
    )
  zero = jnp.zeros(3, jnp.uint32)
  included = prng.bits(prng.derive(key, _COINS), zero, (num_canaries,)) >> np.uint32(
    31
  ) == np.uint32(1)
  if dirac:
    return Canaries(jnp.eye(num_canaries, num_coordinates, dtype=jnp.float32), included)
  words = prng.bits(prng.derive(key, _DIRECTIONS), zero, (num_canaries, num_coordinates))
  normal = jax.scipy.special.ndtri((words.astype(jnp.float32) + 0.5) * np.float32(2**-32))
  normal = jnp.clip(
    normal, -6, 6
  )  # 2^-32 rounds to 1 in float32; a direction need not be exactly Gaussian
  return Canaries(normal / jnp.linalg.norm(normal, axis=1, keepdims=True), included)


def score(updates: Array, directions: Array) -> Array:
  """[M] the inner product of each canary with the sum of what was released; [T, D], [M, D].

  For a Gaussian mechanism with equal noise at each step that is the likelihood ratio, up to scale.
  """
  return jnp.matmul(directions, jnp.sum(updates, axis=0), precision=jax.lax.Precision.HIGHEST)


def guesses(scores: np.ndarray, included: np.ndarray, num_guesses: int) -> int:
  """How many guesses are right. Of the `num_guesses` most extreme scores the upper half is guessed
  to be in, the lower half out.
  """
  if not 0 <= num_guesses <= len(scores):
    raise ValueError(f"num_guesses={num_guesses} of {len(scores)} canaries")
  order = np.argsort(scores, kind="stable")
  upper = num_guesses // 2
  return int(
    np.sum(included[order[len(order) - upper :]]) + np.sum(~included[order[: num_guesses - upper]])
  )


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
  if not 0 <= num_right <= num_guesses <= num_canaries:
    raise ValueError(f"{num_right} right of {num_guesses} guesses about {num_canaries} canaries")
  if not (epsilon >= 0 and 0 <= delta <= 1):
    raise ValueError(f"epsilon={epsilon} must not be negative and delta={delta} must lie in [0, 1]")
  q = special.expit(epsilon)
  cdf = np.append(
    0.0, special.bdtr(np.arange(num_right), num_guesses, q)
  )  # P[W <= -1], ..., P[W <= v - 1]
  share = np.max((cdf[-1] - cdf[-2::-1]) / np.arange(1, num_right + 1), initial=0.0)
  by_luck = special.bdtrc(num_right - 1, num_guesses, q) if num_right else 1.0
  return float(min(1.0, by_luck + 2 * num_canaries * delta * share))


def one_run_bound(
  num_canaries: int, num_guesses: int, num_right: int, delta: float, confidence: float = 0.95
) -> float:
  """The largest epsilon that the guesses refute; the mechanism's is larger with probability
  `confidence`.

  The number of guesses must not depend on the scores.

  Raises:
    ValueError: as `p_value`, and for a confidence outside (0, 1).
  """
  refuted = lambda epsilon: (
    p_value(num_canaries, num_guesses, num_right, epsilon, delta) < _doubt(confidence)
  )
  return _largest(refuted)


def two_sided_bound(
  scores: np.ndarray, included: np.ndarray, delta: float, confidence: float = 0.95
) -> float:
  """Epsilon from the false positives and negatives of one threshold (Nasr et al. 2023, equation 4).

  (1 - delta - FNR) / FPR and (1 - delta - FPR) / FNR are at most e^epsilon. The threshold is the
  best for canaries of even number; the rates of the others are bounded from above (Clopper and
  Pearson 1934), both together at `confidence`. Assumes independent scores.

  Raises:
    ValueError: for shapes that differ, scores that are not finite, canaries all in or all out, or a
      confidence outside (0, 1).
  """

  _check_scores(scores, included)

  def of(rates: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    ratios = [(1 - delta - a) / b for a, b in (rates, rates[::-1])]
    return np.log(np.maximum(np.maximum(*ratios), 1.0))

  thresholds = np.unique(scores[::2])
  best = thresholds[np.argmax(of(_error_rates(scores[::2], included[::2], thresholds, confidence)))]
  return float(of(_error_rates(scores[1::2], included[1::2], np.array([best]), confidence))[0])


def gaussian_bound(scores: np.ndarray, included: np.ndarray, confidence: float = 0.95) -> float:
  """mu of a Gaussian mechanism: Phi^-1(1 - FPR) - Phi^-1(FNR) (Dong et al. 2022, equation 6), as
  `two_sided_bound`.

  The threshold lies half-way between the means of the ins and the outs of even number. Assumes
  independent scores, and that the trade-off curve is that of a Gaussian mechanism: true for noisy
  sums with every unit in every step, and asymptotically for others.

  Raises:
    ValueError: as `two_sided_bound`.
  """
  _check_scores(scores, included)
  even, is_in = scores[::2], included[::2]
  middle = np.array([(even[is_in].mean() + even[~is_in].mean()) / 2])
  positive, negative = _error_rates(scores[1::2], included[1::2], middle, confidence)
  return float(np.maximum(-special.ndtri(positive) - special.ndtri(negative), 0.0)[0])


def gaussian_epsilon(mu: float, delta: float) -> float:
  """Epsilon of a Gaussian mechanism of sensitivity mu standard deviations (Balle and Wang 2018,
  theorem 8).
  """
  if not (mu >= 0 and 0 < delta < 1):
    raise ValueError(f"mu={mu} must not be negative and delta={delta} must lie in (0, 1)")
  if mu == 0:
    return 0.0

  def exceeded(epsilon: float) -> bool:
    upper, lower = special.log_ndtr(np.array([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu]))
    return math.exp(upper) * -math.expm1(min(epsilon + lower - upper, 0.0)) > delta

  return _largest(exceeded, math.inf)


def audit(
  release_fn: ReleaseFn,
  key: Array,
  secret: Array,
  *,
  epsilon: float,
  delta: float,
  num_canaries: int,
  num_coordinates: int,
  l2_norm: float,
  num_runs: int = 1,
  dirac: bool = True,
  num_guesses: Sequence[int] | None = None,
  confidence: float = 0.95,
) -> AuditResult:
  """Audits the claim that all that a run releases is (epsilon, delta)-DP for each unit.

  Args:
    release_fn: the whole run, see `ReleaseFn`; compiled, and looped over runs.
    key: [8] uint32, of the coins.
    secret: [8] uint32, of the mechanism; each run gets a subkey.
    epsilon, delta: the claim, for one run.
    num_canaries, num_coordinates: M and D of one run.
    l2_norm: of a canary before clipping. Several times the clip norm shows whether anything is
      clipped.
    num_runs: runs with canaries and secrets of their own.
    dirac: see `canaries`.
    num_guesses: of all num_runs x M canaries, numbers of guesses to try, fixed beforehand; 1 -
      confidence is split evenly among them. None for 1/32 (good where the noise is too small) and
      1/4 (where there is none).
    confidence: of each of the bounds.

  Raises:
    ValueError: for numbers out of range, see the functions above.
  """
  total = num_runs * num_canaries
  tried = [max(1, total // 32), max(1, total // 4)] if num_guesses is None else list(num_guesses)
  each = 1 - _doubt(confidence) / len(tried)

  def run(number: Array) -> tuple[Array, Array]:
    drawn = canaries(prng.derive(key, number), num_canaries, num_coordinates, dirac)
    released = release_fn(
      drawn.directions * np.float32(l2_norm), drawn.included, prng.derive(secret, number)
    )
    return score(released, drawn.directions), drawn.included

  results = jax.jit(lambda: jax.lax.map(run, jnp.arange(num_runs, dtype=jnp.uint32)))()
  scores, included = (np.asarray(a).reshape(total) for a in results)
  rights = [guesses(scores, included, n) for n in tried]
  bounds = [one_run_bound(total, n, v, delta, each) for n, v in zip(tried, rights, strict=True)]
  chances = [p_value(total, n, v, epsilon, delta) for n, v in zip(tried, rights, strict=True)]
  best, mu = int(np.argmax(bounds)), gaussian_bound(scores, included, confidence)
  return AuditResult(
    epsilon=bounds[best],
    p_value=min(1.0, len(tried) * min(chances)),
    num_guesses=tried[best],
    num_right=rights[best],
    independent_epsilon=two_sided_bound(scores, included, delta, confidence),
    gaussian_epsilon=gaussian_epsilon(mu, delta),
    mu=mu,
    scores=scores,
    included=included,
  )


def _error_rates(
  scores: np.ndarray, included: np.ndarray, thresholds: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
  """Upper bounds on the rates of outs above and of ins not above each threshold, both true at once
  at `confidence`.

  Clopper and Pearson 1934: a rate is larger than its bound with probability (1 - confidence) / 2 at
  most.
  """

  def upper(mistakes: np.ndarray, of: int) -> np.ndarray:
    bound = special.betaincinv(
      mistakes + 1, np.maximum(of - mistakes, 1), 1 - _doubt(confidence) / 2
    )
    return np.where(mistakes < of, bound, 1.0)

  outs, ins = np.sort(scores[~included]), np.sort(scores[included])
  above = len(outs) - np.searchsorted(outs, thresholds, side="right")
  return upper(above, len(outs)), upper(np.searchsorted(ins, thresholds, side="right"), len(ins))


def _check_scores(scores: np.ndarray, included: np.ndarray) -> None:
  if (
    scores.shape != included.shape
    or scores.ndim != 1
    or included[::2].all()
    or not included[::2].any()
  ):
    raise ValueError(
      f"scores {scores.shape} and included {included.shape}; give one of each to every canary, and "
      f"enough canaries that some are in and some out"
    )
  if not np.all(np.isfinite(scores)):
    raise ValueError(
      f"{np.sum(~np.isfinite(scores))} scores are not finite; such a release cannot be judged"
    )


def _doubt(confidence: float) -> float:
  if not 0 < confidence < 1:
    raise ValueError(f"confidence={confidence} must lie in (0, 1), e.g. 0.95")
  return 1 - confidence


def _largest(holds: Callable[[float], bool], most: float = _MAX_EPSILON) -> float:
  """The largest number up to `most` for which a condition holds; 0 if it never holds. The condition
  must hold up to some number and nowhere beyond it.
  """
  low, high = 0.0, 1.0
  if not holds(low):
    return low
  while high < most and holds(high):
    low, high = high, 2 * high
  for _ in range(50):
    middle = (low + high) / 2
    low, high = (middle, high) if holds(middle) else (low, middle)
  return low
