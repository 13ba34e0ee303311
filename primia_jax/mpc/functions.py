"""Functions of shared numbers that are more than one gate, each with its error: built from gates and products.

Three tools do everything. `steps` compares with many public thresholds in one gate, and any piecewise constant function
of x is then a local sum of the bits (`_table`). Polynomials are evaluated by Estrin's scheme, whose products stand in
few levels, each one message and one truncation. Where x spans many octaves (roots, logarithm, division), a table of
powers of two first brings it into [1/2, 1), exactly.

In the docstrings u = 2^-f, the unit of activations; C, T and P are the rounds of a comparison, a truncation and a
product: 4, 3 (4 where more than 16 bits are cut off) and 1 with "tables" and a ring of 64 bits, 1, 1 and 1 with "fss".
Errors hold for the shared input as it is, for exact gates; without them each truncation adds one unit at most. An output
that is not truncated has u^2 as its unit, as that of a product has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.polynomial import chebyshev

from primia_jax.mpc.circuit import Builder, Value
from primia_jax.mpc.maps import MULTIPLY
from primia_jax.types import Array

# ---- the largest of many


def tournament(build: Builder, x: Value, axis: int) -> Value:
  """The largest along an axis, which is removed: exact; ceil(log2(n)) comparisons one after the other, n - 1 in all."""
  while x.shape[axis] > 1:
    n = x.shape[axis]
    first, second, rest = (
      build.local(lambda v, a=a, b=b: lax.slice_in_dim(v, a, b, axis=axis), x)
      for a, b in ((0, n // 2), (n // 2, n // 2 * 2), (n // 2 * 2, n))
    )
    most = build.maximum(first, second)
    if n % 2:
      most, rest = build.align(most, rest)
      most = build.local(lambda a, b: lax.concatenate([a, b], axis), most, rest)
    x = most
  return build.local(lambda v: lax.squeeze(v, (axis,)), x)


def argmax(build: Builder, x: Value, axis: int) -> Value:
  """The position of the largest along an axis, which is removed, the first of equals: exact, at scale 1.

  Within groups of up to 16 all pairs are compared at once, and the one that wins against all others is found by a
  comparison of a few bits. C + 2 or 3 rounds for each factor of 16, and P between.
  """
  n, shape = x.shape[axis], x.shape[:axis] + x.shape[axis + 1 :]
  x = build.local(lambda v: jnp.moveaxis(v, axis, 0), x)
  position = None  # of the candidates, where that is no longer their number
  while n > 1:
    size = min(16, n) if n <= 16 else 8
    groups = -(-n // size)
    # The last element, repeated, loses to itself: it comes first.
    grouped = lambda v, n=n, size=size, groups=groups: v[np.minimum(np.arange(groups * size), n - 1)].reshape(
      groups, size, *shape
    )
    x = build.local(grouped, x)
    wins = _winners(build, x)
    numbers = np.minimum(np.arange(groups * size), n - 1).reshape(groups, size, *[1] * len(shape))
    if position is None:
      table = jnp.asarray(numbers.astype(build.config.dtype))
      chosen = build.local(lambda w, table=table: (w * table).sum(1, dtype=w.dtype), wins, max_abs=float(n - 1))
    if n > size:
      rows = [wins, x] if position is None else [wins, x, build.local(grouped, position)]
      picked = [_sum(build, v) for v in _products(build, rows, [(0, i) for i in range(1, len(rows))])]
      x = picked[0]._replace(max_abs=x.max_abs)
      position = chosen if position is None else picked[1]._replace(max_abs=position.max_abs)
    elif position is not None:
      chosen = _sum(build, _products(build, [wins, build.local(grouped, position)], [(0, 1)])[0])
      position = chosen._replace(max_abs=position.max_abs)
    else:
      position = chosen
    n = groups
  if position is None:
    return build.local(lambda v: jnp.zeros(shape, v.dtype), x)._replace(scale=1.0, max_abs=0.0)
  return build.local(lambda v: v.reshape(shape), position)


def _winners(build: Builder, x: Value) -> Value:
  """[groups, size, ...]: one 1 in each group, at the first of the largest."""
  size = x.shape[1]
  i, j = np.triu_indices(size, 1)
  pairs = build.local(lambda v: v[:, i] - v[:, j], x, max_abs=2 * x.max_abs)
  bits = build.sign(pairs)
  win = (i == np.arange(size)[:, None]).astype(np.int64) - (j == np.arange(size)[:, None])
  coefficients = jnp.asarray(win.astype(build.config.dtype))  # [size, pairs]
  rows = lambda b: jnp.stack(
    [(b * coefficients[r].reshape(1, -1, *[1] * (b.ndim - 2))).sum(1, dtype=b.dtype) for r in range(size)], axis=1
  )
  lost = (j == np.arange(size)[:, None]).sum(1)  # comparisons that the later of a pair wins with a 0
  wins = build.local(rows, bits, max_abs=float(size))
  level = (lost - (size - 1)).reshape(1, -1, *[1] * (len(x.shape) - 2)).astype(np.float64)
  return build.sign(build.add_public(wins, level)._replace(max_abs=float(size)))


def _sum(build: Builder, v: Value) -> Value:
  return build.local(lambda a: a.sum(1, dtype=a.dtype), v)


# ---- powers and quotients


def power(build: Builder, x: Value, exponent: float) -> Value:
  """x^n for a public n.

  Whole n >= 0: repeated squaring, P + T each; every step errs by u |x|^(n/2) at most. Negative n: the reciprocal of
  that, for small x^n. Other n: |error| <= u + 2 u x^n, for x > 0; 0 where x <= 0.
  """
  if exponent != int(exponent):
    return _power_law(build, x, exponent)
  if exponent < 0:
    return reciprocal(build, power(build, x, -exponent))
  if exponent == 0:
    return build.add_public(build.scaled(x, 0.0), 1.0)
  if exponent == 1:
    return x
  half = power(build, x, exponent // 2)
  square = build.multiply(half, half)
  return build.multiply(square, x) if exponent % 2 else square


def divide(build: Builder, a: Any, b: Value, positive: bool = False) -> Value:
  """a / b, elementwise and broadcast, for a Value or public array a; |error| <= 2 u + u |a / b| / 2.

  Where the ring and no calibration bounds b, it must be below 2^(k - 2 f - 4), and beyond that 0 comes out; a / b must
  be below 2^(f + 1). Division by 0 gives 0. C + P + 3 (T + P) + T rounds, and twice as many thresholds as b has bits.

  Args:
    build: the circuit.
    a: numerator.
    b: denominator.
    positive: promises b >= 0, which halves the thresholds; a negative b then gives 0.
  """
  if not isinstance(a, Value) and np.asarray(a).size == 1:
    out = _power_law(build, b, -1.0, float(np.asarray(a).reshape(())), signed=not positive)
    return build.broadcast(out, np.broadcast_shapes(np.shape(a), b.shape))
  config = build.config
  shape = np.broadcast_shapes(a.shape if isinstance(a, Value) else np.shape(a), b.shape)
  largest = a.max_abs if isinstance(a, Value) else float(np.abs(np.asarray(a)).max())
  bits = _working_bits(build)
  if not isinstance(a, Value):
    zero = build.scaled(build.broadcast(b, shape), 0.0)._replace(scale=2.0**-config.fraction_bits)
    a = build.add_public(zero, a)
  a = build.broadcast(build.narrow(a), shape)
  normal = _Normal.make(build, b, not positive, config.num_bits - config.fraction_bits - 4, largest / _unit(build) * 2)
  factor = build.broadcast(normal.factor, shape)
  x = build.broadcast(normal.x, shape)
  n, quotient = _products(build, [x, factor, a], [(0, 1), (2, 1)], bounds=(normal.bound, None))
  s = normal.centred(build, n, shape)
  near = quotient._replace(scale=a.scale / normal.whole, max_abs=math.inf)
  true = largest / b.scale
  near = _bounded(build, near, true if math.isfinite(true) else math.inf)
  inverse = _polynomial(build, s, _fit(lambda n: 1 / n, config.fraction_bits + 4), bits)
  inverse = _cut(build, [inverse], bits)[0]._replace(max_abs=2.0)
  near = build.narrow(near)
  out = _products(build, [near, inverse], [(0, 1)])[0]
  return build.narrow(_bounded(build, out, true if math.isfinite(true) else math.inf))


def reciprocal(build: Builder, x: Value) -> Value:
  """1 / x; |error| <= u + u / |x|; 0 comes out for 0. C + P + 3 (P + T) + P + T rounds."""
  return _power_law(build, x, -1.0, signed=True)


def sqrt(build: Builder, x: Value) -> Value:
  """|error| <= u (1 + sqrt(x) / 4); 0 where x <= 0. C + P + 3 (P + T) + P + T rounds, as many thresholds as bits."""
  return _power_law(build, x, 0.5)


def rsqrt(build: Builder, x: Value) -> Value:
  """1 / sqrt(x); |error| <= u (1 + rsqrt(x) / 4); 0 where x <= 0. Rounds as `sqrt`."""
  return _power_law(build, x, -0.5)


def cbrt(build: Builder, x: Value) -> Value:
  """|error| <= u (1 + |cbrt(x)| / 4). Rounds as `sqrt`, twice the thresholds."""
  return _power_law(build, x, 1 / 3, signed=True)


def log(build: Builder, x: Value) -> Value:
  """|error| <= u; x <= 0 gives the logarithm of 3/4 of x's unit. C + P + 3 (T + P) rounds; not truncated."""
  config, f = build.config, build.config.fraction_bits
  normal = _Normal.make(build, x, False, config.num_bits - 3, math.inf)
  n = _products(build, [normal.x, normal.factor], [(0, 1)], bounds=(normal.bound,))[0]
  out = _polynomial(build, normal.centred(build, n, x.shape), _fit(np.log, f + 3), f)
  exponent = np.log(normal.magnitudes(lowest=1))
  table = _table(build, normal.bits, exponent, out.scale)
  return build.add(out, table)._replace(max_abs=float(np.abs(exponent).max()) + 1)


def log1p(build: Builder, x: Value) -> Value:
  """log(1 + x), with the error of `log`."""
  return log(build, build.add_public(x, 1.0))


def _power_law(build: Builder, x: Value, exponent: float, factor: float = 1.0, signed: bool = False) -> Value:
  """factor sign(x) |x|^exponent; without `signed`, 0 where x <= 0."""
  config, f = build.config, build.config.fraction_bits
  if factor == 0:
    return build.scaled(x, 0.0)
  # Beyond `top` the result is less than half a unit.
  top = (2 * abs(factor) / _unit(build)) ** (-1 / exponent) if exponent < 0 else math.inf
  normal = _Normal.make(build, x, signed, config.num_bits - 3, top)
  n = _products(build, [normal.x, normal.factor], [(0, 1)], bounds=(normal.bound,))[0]
  bits = _working_bits(build)
  root = _fit(lambda n: n**exponent, f + 4)
  largest = max(1.0, 2.0**-exponent)
  fraction = _cut(build, [_polynomial(build, normal.centred(build, n, x.shape), root, bits)], bits)[0]
  magnitudes = normal.magnitudes(lowest=0)
  values = np.zeros_like(magnitudes)
  np.power(magnitudes, exponent, out=values, where=magnitudes > 0)
  values *= normal.signs * factor
  limit = 2.0 ** (config.num_bits - 4 - bits) / largest
  unit = 2.0 ** -(f + 3)
  while np.abs(values).max() > limit * unit and unit < _unit(build):
    unit *= 2
  values = np.clip(values, -limit * unit, limit * unit)
  table = _table(build, normal.bits, values, unit)
  out = _products(build, [fraction._replace(max_abs=largest), table], [(0, 1)])[0]
  out = build.narrow(out._replace(max_abs=float(np.abs(values).max()) * largest))
  return out if math.isfinite(x.max_abs) else out._replace(max_abs=math.inf)


class _Normal(NamedTuple):
  """x as (whole / factor) n, with n in [1/2, 1) and a factor that is a power of two, and negative where x is.

  Attributes:
    x: the number, in its own units.
    bits: [thresholds, ...] steps of x.
    factor: 2^B n / x in units of x; 0 where x is 0, or too large.
    whole: 2^B units.
    exponents: for each piece, the binary exponent of x in units; 0 where factor is 0.
    signs: for each piece, -1, 0 or 1.
    bound: of x factor, in units of x.
  """

  x: Value
  bits: Value
  factor: Value
  whole: float
  exponents: np.ndarray
  signs: np.ndarray
  bound: float

  @classmethod
  def make(cls, build: Builder, x: Value, signed: bool, limit: int, top: float) -> _Normal:
    """Normalises |x| up to `top`, in at most `limit` bits, to which x is truncated where it needs more."""
    num_bits = lambda v, bound: math.ceil(bound / v.scale).bit_length() if math.isfinite(bound) else build.config.num_bits
    if num_bits(x, min(x.max_abs, top)) > limit:
      x = build.narrow(x)
    width = max(2, min(limit, num_bits(x, min(x.max_abs, top))))
    beyond = num_bits(x, x.max_abs) > width and width < build.config.num_bits - 3
    octaves = [2**i for i in range(width + beyond)]
    thresholds = [1 - t for t in reversed(octaves)] * signed + octaves
    lengths = [*range(1, width + 1), *[0] * beyond]
    exponents = np.array([*reversed(lengths)] * signed + [0] + lengths)
    signs = np.array([-1] * len(octaves) * signed + [0] + [1] * len(octaves)) * (exponents > 0)
    bits = _steps(build, x, thresholds)
    factors = [int(s) * 2 ** (width - int(e)) for s, e in zip(signs, exponents, strict=True)]
    factor = _table(build, bits, np.array(factors, np.float64), 1.0)
    return cls(x, bits, factor, 2.0**width * x.scale, exponents, signs, 2.0**width * x.scale)

  def magnitudes(self, lowest: float) -> np.ndarray:
    """For each piece, x / n; where there is none, `lowest` units."""
    return np.where(self.exponents > 0, 2.0**self.exponents, lowest) * self.unit

  @property
  def unit(self) -> float:
    return self.x.scale

  def centred(self, build: Builder, n: Value, shape: tuple[int, ...]) -> Value:
    """4 n - 3, in [-1, 1), from x factor; 0 where the factor is 0."""
    scale = 4.0 * self.unit / self.whole  # a power of two
    offset = _table(build, self.bits, np.where(self.exponents > 0, -3.0, 0.0), scale)
    return build.add(n._replace(scale=scale), build.broadcast(offset, shape))._replace(max_abs=1.0)


# ---- exponentials


def exp2(build: Builder, x: Value) -> Value:
  """2^x up to M = 2^(k - 2 f - 6), and M beyond; |error| <= u + 2^x u. C + P + 3 (P + T) + P + T rounds."""
  config, f = build.config, build.config.fraction_bits
  x = build.narrow(x)
  lowest, highest = max(-f - 2.0, -x.max_abs), min(config.num_bits - 2.0 * f - 6, x.max_abs)
  bits = _working_bits(build)
  width, coefficients = _octaves(f + 2)
  pieces = max(1, math.ceil((highest - lowest) / width))
  edges = lowest + width * np.arange(pieces + 1)
  centres = (edges[1:] + edges[:-1]) / 2
  # Whole exponents, whose powers are exact; where they go beyond the ring's range, fewer bits of the fraction are left.
  whole = np.floor(centres)
  steps = _steps(build, x, np.rint(np.append(edges[:-1], highest) / x.scale))
  inside = _table(build, steps, np.array([0.0, *[1.0] * pieces, 0.0]), 1.0)
  (x,) = _products(build, [x, inside], [(0, 1)], bounds=(max(abs(lowest), abs(highest)),))
  finer = max(0, math.floor(bits + math.log2(x.scale) - math.log2(width / 2)))
  offset = _table(build, steps, np.array([0.0, *-centres, highest - centres[-1]]), x.scale / 2**finer)
  v = build.local(lambda a, b: a * a.dtype.type(2**finer) + b, x._replace(scale=offset.scale), offset)
  ratio = v.scale * 2.0**bits  # from v as if in units of 2^-bits to an exponent
  v = v._replace(scale=2.0**-bits, max_abs=width / 2 / ratio + 2.0**-bits)
  fraction = _polynomial(build, v, [c * ratio**i for i, c in enumerate(coefficients)], bits)
  most = 2.0 ** (width / 2)
  powers = np.array([0.0, *2.0**centres, 2.0 ** centres[-1]])
  unit = 2.0 ** -(f + 3)
  room = config.num_bits - 3 - math.log2(powers[-1] * most / unit)
  fraction = _cut(build, [fraction], min(bits, math.floor(room)))[0]._replace(max_abs=most)
  out = _products(build, [fraction, _table(build, steps, powers, unit)], [(0, 1)])[0]
  unbounded = math.isinf(x.max_abs)
  del whole
  return build.narrow(out._replace(max_abs=math.inf if unbounded else 2.0**highest * 1.01))


