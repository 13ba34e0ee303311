"""Strategies of correlated noise: the matrices C, what they cost, and how exact they make sums.

What a model learns from are prefix sums of its gradients. With gradients X [T, D], standard normal
Z and a strategy matrix C, the noise of step t is row t of C^-1 Z (`correlated` draws it). All that
is released follows from C X + Z: one Gaussian mechanism for the whole run, also where gradients
depend on earlier outputs (Denisov et al. 2022, theorem 2.1). Two strategies:

- `banded`: C is lower triangular and Toeplitz with b bands (Choquette-Choo et al. 2023,
  "(Amplified) banded matrix factorization", section 4). Its coefficients are multiples of 1/64, so
  that C X lies on the same grid as Z (`correlated`).
- `tree`: binary trees (Kairouz et al. 2021, "Practical and private (deep) learning without sampling
  or shuffling"), restarted before any unit comes again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy

FRACTION = 64  # coefficients of `banded` are multiples of 1 / FRACTION
_MOST_COEFFICIENTS = 2**10  # whose digits fit 32 bits (`correlated`)
_MAX_BANDS = 16  # more take memory, and hardly reduce the error


@dataclasses.dataclass(frozen=True)
class BandedNoise:
  """Noise of a banded strategy; made by `banded`.

  Attributes:
    num_steps: T, of the whole run.
    min_separation: a unit that takes part at step t does so again at t + min_separation at the
      earliest.
    max_participations: k, the most steps of one unit.
    noise_multiplier: of the one Gaussian mechanism that the run amounts to.
    l2_clip_norm: the largest norm of a unit's gradient in one step.
    coefficients: [b] of the columns of C, the diagonal's first, which is 1; in 1/64.
  """

  num_steps: int
  min_separation: int
  max_participations: int
  noise_multiplier: float
  l2_clip_norm: float
  coefficients: tuple[float, ...]

  def __post_init__(self):
    _check(self)
    c = np.array(self.coefficients)
    if len(c) > _MOST_COEFFICIENTS:
      raise ValueError(f"{len(c)} bands; give at most {_MOST_COEFFICIENTS}")
    if not 1 <= len(c) <= self.min_separation:
      raise ValueError(
        f"{len(c)} bands with min_separation={self.min_separation}: a unit's columns would "
        f"overlap, and sensitivity is unknown; give 1 to {self.min_separation} coefficients"
      )
    if not (
      c[0] == 1 and np.all(c > 0) and np.all(np.diff(c) <= 0) and np.all(c * FRACTION % 1 == 0)
    ):
      raise ValueError(
        f"coefficients={self.coefficients} must be positive multiples of 1 / {FRACTION}, begin "
        f"with 1, and not rise (noise might grow)"
      )


@dataclasses.dataclass(frozen=True)
class TreeNoise:
  """Noise of binary trees; made by `tree`.

  Attributes:
    num_steps, min_separation, max_participations, noise_multiplier, l2_clip_norm: see
      `BandedNoise`.
    restart_every: steps of one tree.
    honaker: estimate a node from the nodes below it too (Honaker 2015; Kairouz et al. 2021,
      appendix B), which costs nothing and halves the variance; without it a step draws once, with
      it twice on average.
  """

  num_steps: int
  min_separation: int
  max_participations: int
  noise_multiplier: float
  l2_clip_norm: float
  restart_every: int
  honaker: bool = True

  def __post_init__(self):
    _check(self)
    if not 1 <= self.restart_every <= self.min_separation:
      raise ValueError(
        f"restart_every={self.restart_every} with min_separation={self.min_separation}: a unit "
        f"would be twice in one tree; restart every 1 to {self.min_separation} steps"
      )


Config = BandedNoise | TreeNoise


def banded(
  num_steps: int,
  min_separation: int,
  noise_multiplier: float,
  l2_clip_norm: float,
  coefficients: Sequence[float],
  max_participations: int | None = None,
) -> BandedNoise:
  """Banded noise from coefficients of any scale, e.g. `optimal_coefficients`, rounded to multiples
  of 1 / 64 of the first. One band is the fresh noise of DP-SGD.

  Raises:
    ValueError: for numbers out of range, more bands than `min_separation` or rising coefficients.
  """
  in_64ths = np.rint(np.asarray(coefficients) / coefficients[0] * FRACTION)
  scaled = tuple(
    float(c)
    for c in np.where(np.asarray(coefficients) > 0, np.maximum(in_64ths, 1), in_64ths) / FRACTION
  )
  times = _participations(num_steps, min_separation, max_participations)
  return BandedNoise(num_steps, min_separation, times, noise_multiplier, l2_clip_norm, scaled)


def tree(
  num_steps: int,
  min_separation: int,
  noise_multiplier: float,
  l2_clip_norm: float,
  restart_every: int | None = None,
  max_participations: int | None = None,
  honaker: bool = True,
) -> TreeNoise:
  """Tree noise, restarted every `min_separation` steps unless told otherwise.

  Raises:
    ValueError: for numbers out of range, or trees of more than `min_separation` steps.
  """
  every = min_separation if restart_every is None else restart_every
  times = _participations(num_steps, min_separation, max_participations)
  return TreeNoise(num_steps, min_separation, times, noise_multiplier, l2_clip_norm, every, honaker)


def make(
  kind: str,
  num_steps: int,
  min_separation: int,
  max_participations: int,
  noise_multiplier: float,
  l2_clip_norm: float,
  bands: int | None = None,
) -> Config:
  """A strategy by its name: "banded", of optimal coefficients, or "tree".

  Args:
    bands: of "banded"; None for as many as `min_separation` allows, up to 16.

  Raises:
    ValueError: for another name, or bands that reach beyond a unit's next use.
  """
  shape = num_steps, min_separation, noise_multiplier, l2_clip_norm
  if kind == "tree":
    return tree(*shape, max_participations=max_participations)
  if kind != "banded":
    raise ValueError(f"kind={kind!r}; use 'banded' or 'tree'")
  if bands is not None and bands > min_separation:
    raise ValueError(
      f"bands={bands} reach beyond the {min_separation} steps after which a unit may "
      f"come again; use bands={min_separation} or less, or a smaller batch_size"
    )
  num_bands = min(bands or min(min_separation, _MAX_BANDS), num_steps)
  coefficients = optimal_coefficients(num_bands, num_steps).tolist()
  return banded(*shape, coefficients, max_participations=max_participations)


def square_root_coefficients(num_bands: int) -> np.ndarray:
  """The first b coefficients of (1 - x)^(-1/2), the square root of prefix summation: |binom(-1/2,
  j)|, float64.

  Near-optimal in maximal error where units take part once (Fichtenberger et al. 2023, theorem 1).
  """
  j = np.arange(1, num_bands)
  return np.concatenate([[1.0], np.cumprod((2 * j - 1) / (2 * j))])


def optimal_coefficients(num_bands: int, num_steps: int) -> np.ndarray:
  """The coefficients [b] of least mean squared error over T prefix sums, float64, first 1.

  Minimises |c|^2 / T sum_t sum_(j <= t) e_j^2, where e are the coefficients of 1 / ((1 - x) c(x)),
  over the ratios c_j / c_(j-1) in (0, 1] by L-BFGS from `square_root_coefficients`. It neglects
  that the last columns are shorter.

  Raises:
    ValueError: for fewer than one band or step.
  """
  if num_bands < 1 or num_steps < 1:
    raise ValueError(f"num_bands={num_bands} and num_steps={num_steps} must be at least 1")
  left = (num_steps - np.arange(num_steps)) / num_steps  # the share of prefix sums that e_j enters

  def objective(ratios: np.ndarray) -> tuple[float, np.ndarray]:
    c = np.cumprod(np.append(1.0, ratios))
    e = scipy.signal.lfilter([1.0], c, np.ones(num_steps))
    slope = scipy.signal.lfilter([1.0], c, e)  # de_j / dc_i = -slope_(j - i)
    error, norm = (left * e) @ e, c @ c
    by_error = np.array([(left * e)[i:] @ slope[: num_steps - i] for i in range(len(c))])
    by_c = 2 * c * error - 2 * norm * by_error
    return norm * error, np.cumsum((by_c * c)[:0:-1])[::-1] / ratios

  start = square_root_coefficients(min(num_bands, num_steps))
  if len(start) == 1:
    return start
  bounds = [(1e-6, 1.0)] * (len(start) - 1)
  found = scipy.optimize.minimize(
    objective, start[1:] / start[:-1], jac=True, method="L-BFGS-B", bounds=bounds
  )
  return np.cumprod(np.append(1.0, found.x))


def sensitivity(config: Config) -> float:
  """The largest norm of C applied to one unit's gradients of norm 1, over all patterns of
  participation.

  Exact: two steps of one unit never meet in a row of C, so squared column norms add up, and the
  worst of the patterns (at least `min_separation` apart, at most `max_participations`) is found by
  dynamic programming from the last step.
  """
  squares = _column_squares(config)
  reach = config.min_separation
  best = np.zeros(len(squares) + reach)  # from step t on, with the participations counted so far
  for _ in range(config.max_participations):
    with_one_more = squares + best[reach:]
    best[: len(squares)] = np.maximum.accumulate(with_one_more[::-1])[::-1]
  return math.sqrt(best[0])


def stddev(config: Config) -> float:
  """The standard deviation of each number of Z that makes the whole run one Gaussian mechanism of
  noise_multiplier.
  """
  return config.noise_multiplier * config.l2_clip_norm * sensitivity(config)


def squared_errors(config: Config) -> np.ndarray:
  """[T] float64, the expected squared error of each number of each prefix sum; take the mean or the
  maximum.

  The squared norms of the rows of A C^-1, A being the lower triangle of ones, times the variance of
  Z.
  """
  if isinstance(config, TreeNoise):
    levels = level_variances(config)
    one = np.array(
      [sum(v for i, v in enumerate(levels) if n >> i & 1) for n in range(config.restart_every + 1)]
    )
    trees, within = np.divmod(np.arange(1, config.num_steps + 1), config.restart_every)
    return (trees * one[-1] + one[within]) * stddev(config) ** 2
  impulse = np.zeros(config.num_steps)
  impulse[0] = 1
  inverse = scipy.signal.lfilter([1.0], config.coefficients, impulse)
  return np.cumsum(np.cumsum(inverse) ** 2) * stddev(config) ** 2


def largest_noise(config: Config) -> int:
  """How many draws' largest magnitude one number of noise can reach, in any run of the strategy."""
  if isinstance(config, TreeNoise):
    return 2 * (config.restart_every.bit_length() + 1)
  impulse = np.zeros(config.num_steps)
  impulse[0] = 1
  return math.ceil(np.sum(np.abs(scipy.signal.lfilter([1.0], config.coefficients, impulse)))) + 1


def level_variances(config: TreeNoise) -> tuple[float, ...]:
  """Of the estimate of a node at each level: 1, or with children 1 / v' = 1 + 1 / (2 v)."""
  variances = [1.0]
  for _ in range(config.restart_every.bit_length()):
    v = variances[-1]
    variances.append(2 * v / (1 + 2 * v) if config.honaker else 1.0)
  return tuple(variances)


def _column_squares(config: Config) -> np.ndarray:
  """[T] the squared norms of the columns of C: which noisy numbers a step enters, and how much."""
  step = np.arange(config.num_steps)
  if isinstance(config, BandedNoise):
    whole = np.cumsum(np.square(config.coefficients))  # the last columns are cut
    left = np.minimum(config.num_steps - step, len(whole))
    return whole[left - 1]
  within, first = step % config.restart_every, step - step % config.restart_every
  end = np.minimum(
    config.num_steps - first, config.restart_every
  )  # steps of this tree, fewer in the last
  squares = np.zeros(config.num_steps)
  for level in range(config.restart_every.bit_length()):
    node = within >> level
    used = (node + 1) << level <= end  # what is never completed is never looked at
    squares += (
      used if config.honaker else used & (node % 2 == 0)
    )  # nor are right children, without estimation
  return squares


def _participations(num_steps: int, min_separation: int, max_participations: int | None) -> int:
  """As many as fit, unless told."""
  fitting = -(-num_steps // max(min_separation, 1))
  return fitting if max_participations is None else max_participations


def _check(config: Config) -> None:
  for name in ("num_steps", "min_separation", "max_participations"):
    if (value := getattr(config, name)) < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  if config.num_steps >= 2**32:
    raise ValueError(f"num_steps={config.num_steps} must be below 2^32")
  for name in ("noise_multiplier", "l2_clip_norm"):
    if not 0 < (value := getattr(config, name)) < math.inf:
      raise ValueError(f"{name}={value} must be positive and finite")
