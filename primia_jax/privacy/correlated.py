"""Correlated noise (DP-FTRL): for sites that cannot sample, whose units take part at steps that are
known to lie apart.

What a model learns from are prefix sums of its gradients, so noise that cancels from step to step
costs less accuracy than fresh noise. With gradients X [T, D], standard normal Z and a strategy
matrix C, the noise of step t is row t of C^-1 Z, and all that is released follows from C X + Z: one
Gaussian mechanism for the whole run, also where gradients depend on earlier outputs (Denisov et al.
2022, theorem 2.1). Two strategies:

- `banded`: C is lower triangular with b bands (Choquette-Choo et al. 2023, "(Amplified) banded
  matrix factorization", section 4), Toeplitz up to columns scaled to norm 1. State: b - 1 earlier
  vectors.
- `tree`: binary trees (Kairouz et al. 2021, "Practical and private (deep) learning without sampling
  or shuffling"), restarted before any unit comes again. State: a vector for each level, log2 of the
  steps of a tree.

Who learns what: whoever sees every noisy sum of the run learns about one unit what he would from a
single Gaussian mechanism of `noise_multiplier`, which is all that the ledger is charged (once for
the run, nothing for a step). Units are added or removed (their gradients replaced by 0; for
replaced units double the sensitivity). This assumes that a unit's gradient is clipped to
`l2_clip_norm`, that its steps are at least `min_separation` apart and at most `max_participations`:
batches in one fixed order do that, shuffling each epoch anew does NOT, and no amplification by
sampling is claimed. No step may be released twice, as by two runs from one checkpoint: the ledger
knows of one. The state holds noise and must never leave the site. Noise is float32, rounded: the
claim is that of real numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy import optimize, signal

from primia_jax import prng
from primia_jax.privacy import noise
from primia_jax.types import Array, PyTree

_PURPOSE = 0x434F5252  # "CORR": no other use of a site's secret derives this subkey
# (key [8] uint32, step uint32, like, stddev) -> independent Gaussians of like's shapes, never the
# same for another step
NoiseFn = Callable[[Array, Array, PyTree, float], PyTree]


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
    coefficients: [b] of the columns of C, the diagonal's first, of norm 1.
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
    if not 1 <= len(c) <= self.min_separation:
      raise ValueError(
        f"{len(c)} bands with min_separation={self.min_separation}: a unit's columns would "
        f"overlap, and sensitivity is "
        f"unknown; give 1 to {self.min_separation} coefficients"
      )
    if not (
      np.all(np.isfinite(c)) and np.all(c > 0) and np.all(np.diff(c) <= 0) and abs(c @ c - 1) < 1e-9
    ):
      raise ValueError(
        f"coefficients={self.coefficients} must be positive, of norm 1, and not rise (noise might "
        f"grow)"
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
        f"would be twice in one "
        f"tree; restart every 1 to {self.min_separation} steps"
      )


Config = BandedNoise | TreeNoise


class NoiseState(NamedTuple):
  """What one step hands to the next; secret.

  Attributes:
    step: uint32, the step that comes next.
    rows: the gradient's pytree with a leading axis, float32: the last b - 1 vectors in a ring, or
      one for each level.
  """

  step: Array
  rows: PyTree


def banded(
  num_steps: int,
  min_separation: int,
  noise_multiplier: float,
  l2_clip_norm: float,
  coefficients: Sequence[float],
  max_participations: int | None = None,
) -> BandedNoise:
  """Banded noise from the coefficients of any scale, e.g. of `optimal_coefficients`; one band is
  DP-SGD's noise.

  Raises:
    ValueError: for numbers out of range, more bands than `min_separation` or rising coefficients.
  """
  norm = math.sqrt(sum(c**2 for c in coefficients))
  scaled = tuple(float(c / norm) for c in coefficients)
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
  over the ratios c_j / c_(j-1) in (0, 1] by L-BFGS from `square_root_coefficients`. That the last
  columns are shorter is left out.

  Raises:
    ValueError: for fewer than one band or step.
  """
  if num_bands < 1 or num_steps < 1:
    raise ValueError(f"num_bands={num_bands} and num_steps={num_steps} must be at least 1")
  left = (num_steps - np.arange(num_steps)) / num_steps  # the share of prefix sums that e_j enters

  def objective(ratios: np.ndarray) -> tuple[float, np.ndarray]:
    c = np.cumprod(np.append(1.0, ratios))
    e = signal.lfilter([1.0], c, np.ones(num_steps))
    slope = signal.lfilter([1.0], c, e)  # de_j / dc_i = -slope_(j - i)
    error, norm = (left * e) @ e, c @ c
    by_error = np.array([(left * e)[i:] @ slope[: num_steps - i] for i in range(len(c))])
    by_c = 2 * c * error - 2 * norm * by_error
    return norm * error, np.cumsum((by_c * c)[:0:-1])[::-1] / ratios

  start = square_root_coefficients(min(num_bands, num_steps))
  if len(start) == 1:
    return start
  bounds = [(1e-6, 1.0)] * (len(start) - 1)
  found = optimize.minimize(
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
  """The standard deviation of each number of Z, so that the whole run is one Gaussian mechanism of
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
    levels = _level_variances(config)
    one = np.array(
      [sum(v for i, v in enumerate(levels) if n >> i & 1) for n in range(config.restart_every + 1)]
    )
    trees, within = np.divmod(np.arange(1, config.num_steps + 1), config.restart_every)
    return (trees * one[-1] + one[within]) * stddev(config) ** 2
  impulse = np.zeros(config.num_steps)
  impulse[0] = 1
  inverse = signal.lfilter([1.0], config.coefficients, impulse)
  left = np.minimum(config.num_steps - np.arange(config.num_steps), len(config.coefficients))
  norms = _shortened(config.coefficients)[left - 1]
  same = max(
    1, config.num_steps - len(config.coefficients) + 1
  )  # whole columns; up to there A C^-1 is Toeplitz
  errors = np.cumsum(np.cumsum(norms[0] * inverse[:same]) ** 2)
  row = np.cumsum(norms[0] * inverse[:same])[::-1]
  rest = []
  for t in range(same, config.num_steps):
    row = np.append(row, 0.0) + norms[t] * inverse[t::-1]
    rest.append(row @ row)
  return np.concatenate([errors, rest]) * stddev(config) ** 2


def init(config: Config, like: PyTree) -> NoiseState:
  """The state before the first step.

  Args:
    config: the noise.
    like: arrays of the gradient's shapes.
  """
  num_rows = (
    len(config.coefficients) - 1
    if isinstance(config, BandedNoise)
    else config.restart_every.bit_length()
  )
  num_rows = max(1, num_rows)  # one band needs none, but checkpoints hold no empty arrays
  zeros = lambda leaf: jnp.zeros((num_rows, *leaf.shape), jnp.float32)
  return NoiseState(jnp.zeros((), jnp.uint32), jax.tree.map(zeros, like))


def next_noise(
  config: Config,
  state: NoiseState,
  secret: Array,
  step: int | Array,
  noise_fn: NoiseFn = noise.gaussian_like,
) -> tuple[PyTree, NoiseState]:
  """The noise to add to this step's sum of clipped gradients (to the sum, not to the mean).

  Steps come once each, in order, from 0 to num_steps - 1: what the ledger was charged for. Out of
  turn the noise is NaN, so that a mistake releases nothing.

  Args:
    config: the noise; static under jit.
    state: from `init` or the step before.
    secret: [8] uint32, the site's for this run; may also serve `sampling` and `noise`, whose
      subkeys are others.
    step: uint32 scalar.
    noise_fn: independent Gaussian noise from a cryptographic generator, see `NoiseFn`.

  Returns:
    float32 noise of the gradient's shapes, and the next state.

  Raises:
    ValueError: for a step out of turn, where neither it nor the state is traced.
  """
  step = jnp.asarray(step, jnp.uint32)
  known = not any(isinstance(a, jax.core.Tracer) for a in (step, state.step))
  if known and not int(step) == int(state.step) < config.num_steps:
    raise ValueError(f"step={step} out of turn: step {state.step} of {config.num_steps} comes next")
  like = jax.tree.map(lambda rows: jnp.zeros(rows.shape[1:], jnp.float32), state.rows)
  draw = lambda level: noise_fn(prng.derive(secret, _PURPOSE, level), step, like, stddev(config))
  if isinstance(config, BandedNoise):
    drawn, rows = _next_banded(config, draw, state.rows, step)
  else:
    drawn, rows = _next_tree(config, draw, state.rows, step)
  in_turn = (step == state.step) & (step < np.uint32(config.num_steps))
  drawn = jax.tree.map(lambda n: jnp.where(in_turn, n, jnp.nan), drawn)
  return drawn, NoiseState(state.step + np.uint32(1), rows)


def _next_banded(
  config: BandedNoise, draw: Callable, rows: PyTree, step: Array
) -> tuple[PyTree, PyTree]:
  """Forward substitution: u_t = (z_t - sum_j c_j u_(t-j)) / c_0, and the noise is u_t times the
  norm of column t.
  """
  c, width = np.array(config.coefficients), len(config.coefficients) - 1
  below = jnp.minimum(
    np.uint32(config.num_steps - 1) - step, np.uint32(width)
  )  # entries of the column
  norm = jnp.asarray(_shortened(config.coefficients), jnp.float32)[below.astype(jnp.int32)]
  z = jax.tree.map(lambda a: a / np.float32(c[0]), draw(0))
  if not width:
    return jax.tree.map(lambda a: a * norm, z), rows
  slot = step % np.uint32(width)  # where u_(t - width) makes place for u_t
  age = (slot + np.uint32(width - 1) - jnp.arange(width, dtype=jnp.uint32)) % np.uint32(width)
  weights = jnp.asarray(c[1:] / c[0], jnp.float32)[age.astype(jnp.int32)]
  earlier = lambda u: jnp.tensordot(weights, u, 1, precision=lax.Precision.HIGHEST)
  new = jax.tree.map(lambda a, u: a - earlier(u), z, rows)
  rows = jax.tree.map(lambda u, a: u.at[slot.astype(jnp.int32)].set(a), rows, new)
  return jax.tree.map(lambda a: a * norm, new), rows


def _shortened(coefficients: Sequence[float]) -> np.ndarray:
  """The norms of the Toeplitz columns cut after 1, ..., b entries, as the last columns are; C's own
  are all 1.
  """
  return np.sqrt(np.cumsum(np.square(coefficients)))


def _next_tree(
  config: TreeNoise, draw: Callable, rows: PyTree, step: Array
) -> tuple[PyTree, PyTree]:
  """The nodes that a prefix is made of after this step, less those before it.

  The subtrees of a prefix of n steps are the ones in the binary digits of n. Step n completes one
  node at each level up to the number of trailing ones of n, and the top one takes the place of
  those below.
  """
  within = step % np.uint32(config.restart_every)
  top = lax.population_count(within & ~(within + np.uint32(1))).astype(jnp.int32)
  variances = jnp.asarray(_level_variances(config), jnp.float32)

  def merge(level: Array, carry):
    node, replaced = carry
    left = jax.tree.map(lambda u: u[level], rows)
    if (
      config.honaker
    ):  # by inverse variance; a node's own share is then the variance of the estimate
      own = variances[level + 1]
      mix = lambda z, a, b: own * z + (1 - own) * (a + b)
      node = jax.tree.map(mix, draw((level + 1).astype(jnp.uint32)), left, node)
    return node, jax.tree.map(jnp.add, replaced, left)

  leaf = draw(jnp.uint32(0)) if config.honaker else draw(top.astype(jnp.uint32))
  node, replaced = lax.fori_loop(0, top, merge, (leaf, jax.tree.map(jnp.zeros_like, leaf)))
  rows = jax.tree.map(lambda u, a: u.at[top].set(a), rows, node)
  return jax.tree.map(jnp.subtract, node, replaced), rows


def _level_variances(config: TreeNoise) -> tuple[float, ...]:
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
    return np.ones(config.num_steps)
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
