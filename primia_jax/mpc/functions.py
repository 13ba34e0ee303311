"""Functions of shared numbers that are more than one gate, each with its error: built from gates and products.

Three tools do everything. `_steps` compares with many public thresholds in one gate, and any piecewise constant
function of x is then a local sum of the bits (`_table`). Polynomials are evaluated by Estrin's scheme, whose products
stand in few levels, each one message and one truncation. Where x spans many octaves (roots, logarithm, division), a
table of powers of two first brings it into [1/2, 1), exactly.

In the docstrings u = 2^-f, the unit of activations; C, T and P are the rounds of a comparison, a truncation and a
product: 4, 3 (4 where more than 16 bits are cut off) and 1 with "tables" and a ring of 64 bits, 2, 2 and 1 with "fss".
Errors are those of the function at the shared input as it is truncated to u, with exact gates (without, each truncation
adds one unit at most). An output that is not truncated has u^2 as its unit, as that of a product has.
"""

from __future__ import annotations

import itertools
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
  comparison of a few bits. C + 2 or 3 rounds for n <= 16; beyond, the same and P once more for each factor of 8.
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
      first, *others = _opened(build, rows)
      picked = [_sum(build, _product(build, first, v)) for v in others]
      x = picked[0]._replace(max_abs=x.max_abs)
      position = chosen if position is None else picked[1]._replace(max_abs=position.max_abs)
    elif position is not None:
      chosen = _sum(build, _product(build, *_opened(build, [wins, build.local(grouped, position)])))
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
  that. Other n: |error| <= u + u x^n for x > 0, up to x^n = 2^(k - 2 f - 4), where it stays; 0 for x <= 0.
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
  be below 2^(f + 1). Division by 0 gives 0. C + 5 (P + T) rounds, and twice as many thresholds as b has bits.

  Args:
    build: the circuit.
    a: numerator.
    b: denominator.
    positive: promises b >= 0, which halves the thresholds; a negative b then gives 0.
  """
  if not isinstance(a, Value) and np.asarray(a).size == 1:
    out = _power_law(build, b, -1.0, float(np.asarray(a).reshape(())), signed=not positive)
    return build.broadcast(out, np.broadcast_shapes(np.shape(a), b.shape))
  config, bits = build.config, _working_bits(build)
  shape = np.broadcast_shapes(np.shape(a) if not isinstance(a, Value) else a.shape, b.shape)
  if not isinstance(a, Value):
    zero = build.scaled(build.broadcast(b, shape), 0.0)._replace(scale=_unit(build))
    a = build.add_public(zero, np.broadcast_to(a, shape))
  a = build.broadcast(build.narrow(a), shape)
  top = 2 * a.max_abs / _unit(build)  # the quotient by more than that is less than half a unit
  normal = _Normal.make(build, b, not positive, config.num_bits - config.fraction_bits - 4, top)
  x, factor, a = _opened(build, [normal.x, normal.factor, a])
  s = normal.centred(build, _product(build, x, factor))
  (inverse,) = _cut(build, [_polynomial(build, s, _fit(lambda n: 1 / n, config.fraction_bits + 4), bits)], bits)
  limit = lambda v, bound: v._replace(max_abs=min(bound, 2.0 ** (config.num_bits - 3) * v.scale))
  largest = a.max_abs / normal.x.scale
  near = _product(build, a, build.broadcast(factor, shape))
  near = build.narrow(limit(near._replace(scale=a.scale / normal.whole), largest))
  near, inverse = _opened(build, [near, inverse._replace(max_abs=2.01)])
  out = build.narrow(limit(_product(build, near, build.broadcast(inverse, shape)), largest))
  return out if math.isfinite(largest) else out._replace(max_abs=math.inf)


def reciprocal(build: Builder, x: Value) -> Value:
  """1 / x; |error| <= u + u / |x|; 0 comes out for 0. C + 5 (P + T) rounds."""
  return _power_law(build, x, -1.0, signed=True)


def sqrt(build: Builder, x: Value) -> Value:
  """|error| <= u (1 + sqrt(x) / 2); 0 where x <= 0. C + 5 (P + T) rounds, as many thresholds as bits."""
  return _power_law(build, x, 0.5)


def rsqrt(build: Builder, x: Value) -> Value:
  """1 / sqrt(x); |error| <= u (1 + rsqrt(x) / 2); 0 where x <= 0. Rounds as `sqrt`."""
  return _power_law(build, x, -0.5)


def cbrt(build: Builder, x: Value) -> Value:
  """|error| <= u (1 + |cbrt(x)| / 2). Rounds as `sqrt`, twice the thresholds."""
  return _power_law(build, x, 1 / 3, signed=True)


def log(build: Builder, x: Value) -> Value:
  """|error| <= 2 u; x <= 0 gives the logarithm of 3/4 of x's unit. C + 4 P + 3 T rounds; not truncated."""
  config, f = build.config, build.config.fraction_bits
  normal = _Normal.make(build, x, False, config.num_bits - 3, math.inf)
  s = normal.centred(build, _product(build, *_opened(build, [normal.x, normal.factor])))
  out = _polynomial(build, s, _fit(np.log, f + 3), f)
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
  s = normal.centred(build, _product(build, *_opened(build, [normal.x, normal.factor])))
  bits, largest = _working_bits(build), max(1.0, 2.0**-exponent) * 1.01
  magnitudes = normal.magnitudes(0.0)
  values = np.zeros_like(magnitudes)
  np.power(magnitudes, exponent, out=values, where=magnitudes > 0)
  limit = 2.0 ** (config.num_bits - 4) / largest
  values = np.clip(values * normal.signs * factor, -limit * _unit(build) ** 2, limit * _unit(build) ** 2)
  polynomial = _polynomial(build, s, _fit(lambda n: n**exponent, f + 4), bits)
  # Where the product would not fit the ring, fewer bits of the table are kept, and then of the polynomial.
  excess = math.log2(np.abs(values).max() / limit) + f + 3 + bits
  coarser = min(3, max(0, math.ceil(excess)))
  bits = max(f, bits - max(0, math.ceil(excess) - 3)) if excess > 3 else bits
  (fraction,) = _cut(build, [polynomial._replace(max_abs=largest)], bits)
  table = _table(build, normal.bits, values, _unit(build) * 2.0 ** (coarser - 3))
  out = build.narrow(_product(build, *_opened(build, [fraction, table])))
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
  """

  x: Value
  bits: Value
  factor: Value
  whole: float
  exponents: np.ndarray
  signs: np.ndarray

  @classmethod
  def make(cls, build: Builder, x: Value, signed: bool, limit: int, top: float) -> _Normal:
    """Normalises |x| up to `top`, in at most `limit` bits, to which x is truncated where it needs more."""
    most = build.config.num_bits - 3
    num_bits = lambda v, bound: math.ceil(bound / v.scale).bit_length() if math.isfinite(bound) else most
    if num_bits(x, min(x.max_abs, top)) > limit:
      x = build.narrow(x)
    width = max(2, min(limit, num_bits(x, min(x.max_abs, top))))
    beyond = num_bits(x, x.max_abs) > width and width < most
    octaves = [2**i for i in range(width + beyond)]
    thresholds = [1 - t for t in reversed(octaves)] * signed + octaves
    lengths = [*range(1, width + 1), *[0] * beyond]
    exponents = np.array([*reversed(lengths)] * signed + [0] + lengths)
    signs = np.array([-1] * len(octaves) * signed + [0] + [1] * len(octaves)) * (exponents > 0)
    bits = _steps(build, x, thresholds)
    factors = [int(s) * 2 ** (width - int(e)) for s, e in zip(signs, exponents, strict=True)]
    factor = _table(build, bits, np.array(factors, np.float64), 1.0)
    return cls(x, bits, factor, 2.0**width * x.scale, exponents, signs)

  def magnitudes(self, lowest: float) -> np.ndarray:
    """For each piece, |x| / n; where there is none, `lowest` units."""
    return np.where(self.exponents > 0, 2.0**self.exponents, lowest) * self.x.scale

  def centred(self, build: Builder, product: Value) -> Value:
    """4 n - 3, in [-1, 1), from x factor; 0 where the factor is 0."""
    scale = 4.0 * self.x.scale / self.whole  # a power of two
    offset = _table(build, self.bits, np.where(self.exponents > 0, -3.0, 0.0), scale)
    return build.add(product._replace(scale=scale), offset)._replace(max_abs=1.0)


# ---- exponentials


def exp2(build: Builder, x: Value) -> Value:
  """2^x up to M = 2^(k - 2 f - 6), and M beyond; |error| <= u + 2 u 2^x. C + 5 P + 4 T rounds."""
  config, f = build.config, build.config.fraction_bits
  x = build.narrow(x)
  lowest = max(-f - 2.0, -x.max_abs - 4 * x.scale)
  highest = min(config.num_bits - 2.0 * f - 6, x.max_abs + 4 * x.scale)
  width, coefficients = _octaves(f + 2)
  pieces = max(1, math.ceil((highest - lowest) / width))
  width = (highest - lowest) / pieces
  edges = lowest + width * np.arange(pieces + 1)
  centres = edges[:-1] + width / 2
  steps = _steps(build, x, np.rint(edges / x.scale))
  inside = _table(build, steps, np.array([0.0, *[1.0] * pieces, 0.0]), 1.0)
  v = _product(build, *_opened(build, [x, inside]))._replace(max_abs=max(-lowest, highest))
  bits = _working_bits(build)
  finer = max(0, math.floor(bits + math.log2(x.scale) - math.log2(width / 2)))
  offset = _table(build, steps, np.array([0.0, *-centres, width / 2]), v.scale / 2**finer)
  v = build.local(lambda a, b: a * a.dtype.type(2**finer) + b, v._replace(scale=offset.scale), offset)
  ratio = v.scale * 2.0**bits  # v will count in units of 2^-bits, and the coefficients make good for it
  v = v._replace(scale=2.0**-bits, max_abs=width / 2 / ratio + 2.0**-bits)
  most, unit = 2.0 ** (width / 2), _unit(build) / 8
  powers = np.array([0.0, *2.0**centres, 2.0 ** centres[-1]])
  fraction = _polynomial(build, v, [c * ratio**i for i, c in enumerate(coefficients)], bits)
  room = math.floor(config.num_bits - 3 - math.log2(powers[-1] * most / unit))
  (fraction,) = _cut(build, [fraction._replace(max_abs=most * 1.01)], min(bits, room))
  out = _product(build, *_opened(build, [fraction, _table(build, steps, powers, unit)]))
  return build.narrow(out._replace(max_abs=math.inf if math.isinf(x.max_abs) else 2.0**highest * 1.01))


def exp(build: Builder, x: Value) -> Value:
  """e^x, as `exp2`."""
  return exp2(build, build.scaled(x, math.log2(math.e)))


def expm1(build: Builder, x: Value) -> Value:
  """e^x - 1, with the absolute error of `exp2`."""
  return build.add_public(exp(build, x), -1.0)


# ---- bounded functions


def logistic(build: Builder, x: Value) -> Value:
  """1 / (1 + e^-x); |error| <= u, whatever x. C + 3 P + T rounds; not truncated."""
  end = (build.config.fraction_bits + 2) * math.log(2)
  return _spline(build, x, lambda x: 1 / (1 + np.exp(-x)), end, 0.0, 1.0)


def tanh(build: Builder, x: Value) -> Value:
  """|error| <= u, whatever x. C + 3 P + T rounds; not truncated."""
  end = (build.config.fraction_bits + 3) * math.log(2) / 2
  return _spline(build, x, np.tanh, end, -1.0, 1.0)


def erf(build: Builder, x: Value) -> Value:
  """|error| <= u, whatever x. C + 3 P + T rounds; not truncated."""
  end = math.sqrt(build.config.fraction_bits * math.log(2))
  return _spline(build, x, np.vectorize(math.erf), end, -1.0, 1.0)


def erfc(build: Builder, x: Value) -> Value:
  """1 - erf(x), and as that."""
  return build.add_public(build.negate(erf(build, x)), 1.0)._replace(max_abs=2.0)


def sign(build: Builder, x: Value) -> Value:
  """1, 0 or -1, exact, at scale 1. C rounds."""
  return _table(build, _steps(build, x, [0, 1]), np.array([-1.0, 0.0, 1.0]), 1.0)


UNARY: dict[str, Callable[[Builder, Value], Value]] = {
  "exp": exp,
  "exp2": exp2,
  "expm1": expm1,
  "log": log,
  "log1p": log1p,
  "logistic": logistic,
  "tanh": tanh,
  "erf": erf,
  "erfc": erfc,
  "sqrt": sqrt,
  "rsqrt": rsqrt,
  "cbrt": cbrt,
  "sign": sign,
}


def _spline(
  build: Builder, x: Value, fn: Callable[[np.ndarray], np.ndarray], end: float, left: float, right: float
) -> Value:
  """A function as cubics on pieces of [-end, end], and as constants beyond."""
  f = build.config.fraction_bits
  x = build.narrow(x)
  bounded = x.max_abs + x.scale <= end
  end = min(end, x.max_abs + x.scale)
  ratio = x.scale * 2.0**f  # x counts in units of 2^-f, and the coefficients make good for it
  knots, centres, coefficients = _pieces(fn, end, 0.4 * _unit(build), x.scale, _unit(build) / ratio)
  c = np.zeros((len(centres) + 2, 4))
  c[1:-1] = coefficients * ratio ** np.arange(4)
  c[0, 0], c[-1, 0] = (left, right) if not bounded else fn(np.array([-end, end]))
  steps = _steps(build, x, np.rint(knots / x.scale))
  table = lambda values, scale: _table(build, steps, values, scale)
  inside = table(np.array([0.0, *[1.0] * len(centres), 0.0]), 1.0)
  v = _product(build, *_opened(build, [x, inside]))._replace(max_abs=end)
  v = build.add(v, table(np.array([0.0, *-centres, 0.0]), v.scale))
  v = v._replace(scale=2.0**-f, max_abs=float(np.diff(knots).max()) / ratio)
  unit, fine = _unit(build), _unit(build) ** 2
  v, linear, cubic = _opened(build, [v, table(c[:, 1], unit), table(c[:, 3], unit)])
  even = build.add(_product(build, linear, v), table(c[:, 0], fine))
  odd = build.add(_product(build, cubic, v), table(c[:, 2], fine))
  out = _estrin(build, _product(build, v, v), [even, odd], f)
  return out._replace(max_abs=float(np.abs(c[:, 0]).max()) + 0.5)


def _pieces(fn: Callable[[np.ndarray], np.ndarray], end: float, error: float, scale: float, unit: float):
  """Knots [n + 1], centres [n] and coefficients [n, 4] of cubics in x - centre that are within `error` of fn.

  They are each as long as possible, but not longer than 2; centres are whole multiples of `scale`, and the odd
  coefficients, which will be multiplied by something of unit `scale`, of `unit`.
  """
  nodes, grid = np.cos(np.pi * (np.arange(8) + 0.5) / 8), np.linspace(-1, 1, 33)

  def fit(a: float, b: float) -> tuple[float, np.ndarray, float]:
    half, middle = (b - a) / 2, (a + b) / 2
    centre = np.rint(middle / scale) * scale
    x, c = middle - centre + half * nodes, np.zeros(4)
    left, free = fn(middle + half * nodes), [0, 1, 2, 3]
    for i in (3, 1):  # what is lost by rounding one coefficient, the others make good
      c[i] = np.rint(np.linalg.lstsq(x[:, None] ** free, left, rcond=None)[0][free.index(i)] / unit) * unit
      free.remove(i)
      left = left - c[i] * x**i
    c[free] = np.linalg.lstsq(x[:, None] ** free, left, rcond=None)[0]
    points = middle + half * grid
    return centre, c, float(np.abs(np.polynomial.polynomial.polyval(points - centre, c) - fn(points)).max())

  knots, centres, coefficients = [-end], [], []
  while knots[-1] < end:
    low, high = 0.0, min(2.0, end - knots[-1])
    if fit(knots[-1], knots[-1] + high)[2] <= error:
      low = high
    else:
      for _ in range(16):
        middle = (low + high) / 2
        low, high = (middle, high) if fit(knots[-1], knots[-1] + middle)[2] <= error else (low, middle)
    knots.append(knots[-1] + low)
    centre, c, _ = fit(knots[-2], knots[-1])
    centres.append(centre)
    coefficients.append(c)
  return np.array(knots), np.array(centres), np.array(coefficients)


# ---- steps and tables


def _steps(build: Builder, x: Value, thresholds: Sequence[int] | np.ndarray) -> Value:
  """[n, ...] at scale 1: 1 where x reaches each of n thresholds, which are ascending, in units of x."""
  t = np.asarray(thresholds, np.float64).reshape(-1, *[1] * len(x.shape)) * x.scale
  x = build.local(lambda v: jnp.broadcast_to(v, (t.size, *v.shape)), x)
  return build.sign(build.add_public(x, -t))


def _table(build: Builder, steps: Value, values: np.ndarray, scale: float) -> Value:
  """The value of the piece that x lies in, in whole units of `scale`; there is one piece more than steps."""
  integers = [round(v / scale) for v in values.tolist()]
  jumps = [b - a for a, b in itertools.pairwise(integers)]
  dtype = build.config.dtype
  factors = np.array([j % 2 ** (8 * dtype.itemsize) for j in jumps], dtype).reshape(-1, *[1] * (len(steps.shape) - 1))

  def fn(bits: Array) -> Array:
    return (bits * factors).sum(0, dtype=bits.dtype)

  out = build.local(fn, steps)._replace(scale=scale)
  if integers[0]:
    out = build.add_public(out, integers[0] * scale)
  return out._replace(max_abs=max(map(abs, integers)) * scale)


# ---- several values in one message


def _joined(build: Builder, values: Sequence[Value]) -> Value:
  """All elements of values, whose scales are forgotten."""
  values = [v._replace(scale=1.0, max_abs=v.max_abs / v.scale) for v in values]
  return build.local(lambda *vs: jnp.concatenate([v.reshape(-1) for v in vs]), *values)


def _split(build: Builder, joined: Value, values: Sequence[Value]) -> list[Value]:
  """The parts of what was joined, with the scales and bounds of `values`."""
  out, start = [], 0
  for value in values:
    stop = start + math.prod(value.shape)
    part = build.local(lambda v, a=start, b=stop, s=value.shape: v[a:b].reshape(s), joined)
    out.append(part._replace(scale=value.scale, max_abs=value.max_abs))
    start = stop
  return out


def _opened(build: Builder, values: Sequence[Value]) -> list[Value]:
  """The same values, masked in one message, for products."""
  joined = _joined(build, values)
  build.open(joined)
  return _split(build, joined, values)


def _product(build: Builder, a: Value, b: Value) -> Value:
  """a x b in whole units: neither is truncated first."""
  bound = a.max_abs * b.max_abs if a.max_abs and b.max_abs else 0.0
  out = build.product(a._replace(scale=1.0), b._replace(scale=1.0), MULTIPLY)
  return out._replace(scale=a.scale * b.scale, max_abs=bound)


def _cut(build: Builder, values: Sequence[Value], bits: int) -> list[Value]:
  """Values of one scale, truncated to 2^-bits by one gate; where that is finer, multiplied."""
  finer = round(-math.log2(values[0].scale)) - bits
  if finer == 0:
    return list(values)
  if finer < 0:
    grown = [build.local(lambda v: v * v.dtype.type(2**-finer), v) for v in values]
    return [v._replace(scale=v.scale * 2.0**finer) for v in grown]
  unit = 2.0 ** -(build.config.fraction_bits + finer)
  joined = _joined(build, values)
  joined = build.narrow(joined._replace(scale=unit, max_abs=joined.max_abs * unit))
  return _split(build, joined, [v._replace(scale=v.scale * 2.0**finer) for v in values])


# ---- polynomials


def _polynomial(build: Builder, x: Value, coefficients: Sequence[float], bits: int) -> Value:
  """A polynomial of x, |x| about 1, with public coefficients, at scale 2^(-2 bits); truncations are to 2^-bits."""
  (x,) = _cut(build, [x], bits)
  if len(coefficients) % 2:
    coefficients = [*coefficients, 0.0]
  unit = 2.0**-bits
  pairs = []
  for constant, slope in zip(coefficients[::2], coefficients[1::2], strict=True):
    factor = round(slope / unit)
    line = build.local(lambda v, factor=factor: v * v.dtype.type(factor % 2 ** (8 * v.dtype.itemsize)), x)
    pairs.append(build.add_public(line._replace(scale=unit * x.scale, max_abs=x.max_abs * abs(slope)), constant))
  if len(pairs) == 1:
    return pairs[0]
  (x,) = _opened(build, [x])
  return _estrin(build, _product(build, x, x), pairs, bits)


def _estrin(build: Builder, power: Value, terms: Sequence[Value], bits: int) -> Value:
  """sum_i terms_i power^i, all at scale 2^(-2 bits), in ceil(log2) levels of a truncation and a product each."""
  while len(terms) > 1:
    power, *odd = _opened(build, _cut(build, [power, *terms[1::2]], bits))
    sums = [build.add(a, _product(build, b, power)) for a, b in zip(terms[::2], odd, strict=False)]
    terms = [*sums, *terms[2 * len(sums) :]]
    power = _product(build, power, power)
  return terms[0]


def _fit(fn: Callable[[np.ndarray], np.ndarray], bits: int) -> list[float]:
  """Coefficients in s = 4 n - 3 of the polynomial of least degree within 2^-bits of fn(n) on [1/2, 1]."""
  return _interpolate(lambda s: fn((s + 3) / 4), 1.0, bits)


def _octaves(bits: int) -> tuple[float, list[float]]:
  """The largest width, and coefficients up to r^7, with which 2^r errs by 2^-bits of itself where |r| <= width / 2."""
  for width in np.arange(3, 0.25, -0.25):
    c = _interpolate(lambda r: np.exp2(r), width / 2, bits + width / 2)
    if len(c) <= 8:
      break
  return float(width), c


def _interpolate(fn: Callable[[Any], Any], half: float, bits: float) -> list[float]:
  grid = np.linspace(-1, 1, 257)
  for degree in range(2, 16):
    c = chebyshev.chebinterpolate(lambda s: fn(half * s), degree)
    if np.abs(chebyshev.chebval(grid, c) - fn(half * grid)).max() <= 2.0**-bits:
      break
  return list(chebyshev.cheb2poly(c) / half ** np.arange(len(c)))


# ---- scales


def _unit(build: Builder) -> float:
  return 2.0**-build.config.fraction_bits


def _working_bits(build: Builder) -> int:
  """Fraction bits inside a polynomial: four more than outside, where the ring has room."""
  config = build.config
  return min(config.fraction_bits + 4, (config.num_bits - 6) // 2)
