"""The grid on which private sums are made: what is rounded, when, and what one unit can change.

A unit's clipped vector is rounded to multiples of a grid step g before anything is added to it.
Sums of such integers are exact in any order, so one unit changes a sum by its own vector and
nothing else. That vector has norm at most C, rounding included: it is scaled to norm C - g sqrt(d)
/ 2 first. The noise is an integer too (`noise`), and what follows is a function of the noised
integers. So the mechanism that runs is the one that is charged, with no floating-point numbers in
between.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import native
from primia_jax.privacy import noise
from primia_jax.types import Array, PyTree

EPS = 2.0**-24  # the largest relative error of one float32 operation
_ROUNDING = 0.005  # g sqrt(d) over C: half of it is what the clip gives to rounding
_COARSEST = 0.1
_FEW = 2**12  # numbers whose sum is made in one stage
_MARGIN = 2.0**-20  # of the factor's own rounding, six operations


class Grid(NamedTuple):
  """A grid for vectors of one clipping norm C; static.

  Attributes:
    steps: C / g.
    limit: the norm in grid steps to which a vector is scaled before it is rounded.
    noise_multiplier: standard deviation over C of the noise that the grid is made for; 0 for none.
    level: of `noise.integers`, whose unit is a grid step over `fraction`.
    fraction: 1, or more where noise is mixed before it is added (`correlated`).
  """

  steps: float
  limit: float
  noise_multiplier: float
  level: int
  fraction: int


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["integers", "step"], meta_fields=["grid"]
)
@dataclasses.dataclass(frozen=True)
class Rounded:
  """A sum of rounded vectors. It is private only after noise of its grid.

  Attributes:
    integers: a tree of int32, in grid steps.
    step: g, a float32 scalar; NaN makes the sum worthless.
    grid: what it was rounded for.
  """

  integers: PyTree
  step: Array
  grid: Grid


def choose(
  dim: int,
  noise_multiplier: float = 0.0,
  max_units: int = 1,
  *,
  fraction: int = 1,
  num_draws: int = 1,
) -> Grid:
  """The grid of a sum of at most `max_units` vectors of `dim` numbers.

  g sqrt(d) is at most C / 200, and so fine that noise of `noise_multiplier` C has a standard
  deviation in `noise.LEVELS`; coarser, up to C / 10, where the sum and its noise would otherwise
  not fit int32.

  Args:
    dim: d.
    noise_multiplier: 0 for none.
    max_units: see above.
    fraction: see `Grid`.
    num_draws: how many draws of noise a number of the sum may hold.

  Raises:
    ValueError: if no such grid exists.
  """
  least, lost = math.sqrt(dim) / _ROUNDING, math.sqrt(dim) / 2
  if not noise_multiplier:
    return Grid(least, (least - lost) * (1 - _MARGIN), 0.0, noise.LEVELS[0], fraction)
  steps = lambda level: noise.stddev(level) / (noise_multiplier * fraction)
  fits = [
    level
    for level in noise.LEVELS
    if max_units * steps(level) + num_draws * noise.largest(level) / fraction < 2**31
    and steps(level) * _COARSEST >= math.sqrt(dim)
  ]
  if not fits:
    raise ValueError(
      f"no grid of 32 bits holds sums of {max_units} vectors of {dim} numbers with "
      f"noise_multiplier={noise_multiplier:g}; use a smaller batch, or other noise"
    )
  level = next((level for level in fits if steps(level) >= least), fits[-1])
  limit = (steps(level) - lost) * (1 - _MARGIN)
  return Grid(steps(level), limit, noise_multiplier, level, fraction)


def size(tree: PyTree) -> int:
  """The number of numbers in a tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def square(x: Array) -> Array:
  """An upper bound of the squared norm of x, float32: the sum in float32, and all that rounding can
  have taken from it.

  A sum of n positive numbers loses at most (n - 1) `EPS` of itself, in any order (Higham 2002,
  section 4.2), so it is made in stages of few numbers. Squares below float32's range are taken for
  0.
  """
  total, terms = jnp.square(x), 2
  for stage in range(3):
    if total.size <= _FEW:
      break
    by_axis = stage == 0 and x.ndim > 1
    columns = min(x.shape[-1], _FEW) if by_axis else math.isqrt(total.size)
    total = jnp.pad(total.reshape(-1), (0, -total.size % columns)).reshape(-1, columns)
    # the maximum keeps the compiler from making one long sum of all stages
    total, terms = jnp.maximum(jnp.sum(total, axis=1), 0.0), terms + columns
  lost = np.float32(x.size * float(np.finfo(np.float32).tiny))
  return jnp.sum(total) * np.float32(1 + 2 * (terms + total.size) * EPS) + lost


def norm(squares: Array, axis: int = -1) -> Array:
  """The norm from `square` of several leaves, not too small either."""
  count = squares.shape[axis]
  return jnp.sqrt(jnp.sum(squares, axis=axis)) * np.float32(1 + (count + 4) * EPS)


def rounded(x: Array, factor: Array) -> Array:
  """x times a factor into grid steps, rounded to the nearest int32."""
  return jnp.rint(x * factor).astype(jnp.int32)


def summed(units: Array, factors: Array, counts: Array, on: Grid) -> Array:
  """The sum over units that count of `rounded(units[m], factors[m])`, exactly: int32.

  Args:
    units: [m, ...] float32, of norm at most `on.limit` after multiplication.
    factors, counts: [m] float32 and bool; a unit that does not count adds 0, whatever is in it.
    on: the grid.
  """
  each = lambda a: a.reshape(-1, *(1,) * (units.ndim - 1))
  whole = jnp.where(each(counts), jnp.rint(units * each(factors)), 0.0)
  if units.shape[0] * on.steps <= 2**24:  # float32 adds such whole numbers exactly, and faster
    return jnp.sum(whole, axis=0).astype(jnp.int32)
  return jnp.sum(whole.astype(jnp.int32), axis=0, dtype=jnp.int32)


def noised(total: PyTree, on: Grid, secret: Array, step: int | Array) -> PyTree:
  """Integers plus fresh noise; see `noise.integers_like`.

  Raises:
    ValueError: for a grid without noise.
  """
  if not on.noise_multiplier:
    raise ValueError("this grid was made without noise")
  return jax.tree.map(jnp.add, total, noise.integers_like(secret, step, total, on.level))


def release(
  tree: PyTree, l2_clip_norm: float | Array, on: Grid, secret: Array, step: int | Array
) -> PyTree:
  """One vector, clipped, rounded and noised: float32 of the same shapes.

  Args:
    tree: of floats; a vector that is not finite counts as 0.
    l2_clip_norm: C, may be traced.
    on: from `choose`, for this many numbers and one unit.
    secret, step: as in `noise.integers_like`.
  """
  tree = jax.tree.map(native.settled, tree)  # its norm and its sum are of the same bits
  leaves = jax.tree.leaves(tree)
  length = norm(jnp.stack([square(leaf.astype(jnp.float32)) for leaf in leaves]))
  clip = jnp.asarray(l2_clip_norm, jnp.float32)
  factor = jnp.minimum(np.float32(on.steps) / clip, np.float32(on.limit) / length)
  counts = jnp.isfinite(length) & jnp.isfinite(factor)
  whole = lambda a: jnp.where(counts, rounded(a.astype(jnp.float32), factor), 0)
  total = noised(jax.tree.map(whole, tree), on, secret, step)
  return real(total, clip / np.float32(on.steps))


def real(integers: PyTree, step: Array) -> PyTree:
  """Integers times the grid step, float32."""
  return jax.tree.map(lambda a: a.astype(jnp.float32) * step, integers)
