"""Powers, quotients and logarithms of shared numbers. For u, C, T and P see `polynomials`.

Since x spans many octaves, a table of powers of two first brings it into [1/2, 1), exactly. A
polynomial does the rest.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.functions.polynomials import cut, fit, opened, polynomial, product, working_bits


def power(build: Builder, x: Value, exponent: float) -> Value:
  """x^n for a public n.

  Whole n >= 0: repeated squaring of P + T rounds each; every step errs by at most u |x|^(n/2).
  Negative whole n: the reciprocal of that. Other n: |error| <= u + u x^n for x > 0 up to x^n =
  2^(k - 2 f - 4), which is the largest result; 0 for x <= 0.
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
  """a / b, elementwise and broadcast, for a Value or public array a.

  |error| <= 2 u + u |a / b| / 2. |a / b| must be below 2^(f + 1). If no calibration bounds b, it
  must be below 2^(k - 2 f - 4); beyond that the result is 0. Division by 0 gives 0. C + 5 (P + T)
  rounds, and twice as many thresholds as b has bits.

  Args:
    build: the circuit.
    a: numerator.
    b: denominator.
    positive: promises b >= 0, which halves the thresholds. A negative b then gives 0.
  """
  if not isinstance(a, Value) and np.asarray(a).size == 1:
    out = _power_law(build, b, -1.0, float(np.asarray(a).reshape(())), signed=not positive)
    return build.broadcast(out, np.broadcast_shapes(np.shape(a), b.shape))
  config, bits = build.config, working_bits(build.config)
  shape = np.broadcast_shapes(np.shape(a) if not isinstance(a, Value) else a.shape, b.shape)
  if not isinstance(a, Value):
    zero = build.scaled(build.broadcast(b, shape), 0.0)._replace(scale=build.config.unit)
    a = build.add_public(zero, np.broadcast_to(a, shape))
  a = build.broadcast(build.narrow(a), shape)
  top = 2 * a.max_abs / build.config.unit  # the quotient by more than that is less than half a unit
  normal = _Normal.make(build, b, not positive, config.num_bits - config.fraction_bits - 4, top)
  x, factor, a = opened(build, [normal.x, normal.factor, a])
  s = normal.centred(build, product(build, x, factor))
  (inverse,) = cut(
    build, [polynomial(build, s, fit(lambda n: 1 / n, config.fraction_bits + 4), bits)], bits
  )
  limit = lambda v, bound: v._replace(max_abs=min(bound, 2.0 ** (config.num_bits - 3) * v.scale))
  largest = a.max_abs / normal.x.scale
  near = product(build, a, build.broadcast(factor, shape))
  near = build.narrow(limit(near._replace(scale=a.scale / normal.whole), largest))
  near, inverse = opened(build, [near, inverse._replace(max_abs=2.01)])
  out = build.narrow(limit(product(build, near, build.broadcast(inverse, shape)), largest))
  return out if math.isfinite(largest) else out._replace(max_abs=math.inf)


def reciprocal(build: Builder, x: Value) -> Value:
  """1 / x; |error| <= u + u / |x|; 0 for x = 0. C + 5 (P + T) rounds."""
  return _power_law(build, x, -1.0, signed=True)


def sqrt(build: Builder, x: Value) -> Value:
  """|error| <= u (1 + sqrt(x) / 2); 0 for x <= 0. C + 5 (P + T) rounds, a threshold a bit."""
  return _power_law(build, x, 0.5)


def rsqrt(build: Builder, x: Value) -> Value:
  """1 / sqrt(x); |error| <= u (1 + rsqrt(x) / 2); 0 for x <= 0. Rounds as `sqrt`."""
  return _power_law(build, x, -0.5)


def cbrt(build: Builder, x: Value) -> Value:
  """|error| <= u (1 + |cbrt(x)| / 2). Rounds as `sqrt`, twice the thresholds."""
  return _power_law(build, x, 1 / 3, signed=True)


def log(build: Builder, x: Value) -> Value:
  """|error| <= 2 u; x <= 0 gives the logarithm of 3/4 of x's unit.

  C + 4 P + 3 T rounds; not truncated.
  """
  config, f = build.config, build.config.fraction_bits
  normal = _Normal.make(build, x, False, config.num_bits - 3, math.inf)
  s = normal.centred(build, product(build, *opened(build, [normal.x, normal.factor])))
  out = polynomial(build, s, fit(np.log, f + 3), f)
  exponent = np.log(normal.magnitudes(lowest=1))
  table = piecewise.table(build, normal.bits, exponent, out.scale)
  return build.add(out, table)._replace(max_abs=float(np.abs(exponent).max()) + 1)


def log1p(build: Builder, x: Value) -> Value:
  """log(1 + x), with the error of `log`."""
  return log(build, build.add_public(x, 1.0))


def _power_law(
  build: Builder, x: Value, exponent: float, factor: float = 1.0, signed: bool = False
) -> Value:
  """factor sign(x) |x|^exponent; without `signed`, 0 where x <= 0."""
  config, f = build.config, build.config.fraction_bits
  if factor == 0:
    return build.scaled(x, 0.0)
  # Beyond `top` the result is less than half a unit.
  top = (2 * abs(factor) / build.config.unit) ** (-1 / exponent) if exponent < 0 else math.inf
  normal = _Normal.make(build, x, signed, config.num_bits - 3, top)
  s = normal.centred(build, product(build, *opened(build, [normal.x, normal.factor])))
  bits, largest = working_bits(build.config), max(1.0, 2.0**-exponent) * 1.01
  magnitudes = normal.magnitudes(0.0)
  values = np.zeros_like(magnitudes)
  np.power(magnitudes, exponent, out=values, where=magnitudes > 0)
  limit = 2.0 ** (config.num_bits - 4) / largest
  values = np.clip(
    values * normal.signs * factor, -limit * build.config.unit**2, limit * build.config.unit**2
  )
  curve = polynomial(build, s, fit(lambda n: n**exponent, f + 4), bits)
  # If the product would not fit the ring, the table keeps fewer bits, and then the polynomial.
  excess = math.log2(np.abs(values).max() / limit) + f + 3 + bits
  coarser = min(3, max(0, math.ceil(excess)))
  bits = max(f, bits - max(0, math.ceil(excess) - 3)) if excess > 3 else bits
  (fraction,) = cut(build, [curve._replace(max_abs=largest)], bits)
  table = piecewise.table(build, normal.bits, values, build.config.unit * 2.0 ** (coarser - 3))
  out = build.narrow(product(build, *opened(build, [fraction, table])))
  return out if math.isfinite(x.max_abs) else out._replace(max_abs=math.inf)


class _Normal(NamedTuple):
  """x as (whole / factor) n, with n in [1/2, 1); the factor is a power of two with the sign of x.

  Attributes:
    x: the number, in its own units.
    bits: [thresholds, ...] steps of x.
    factor: 2^B n / x in units of x; 0 if x is 0 or too large.
    whole: 2^B units.
    exponents: for each piece, the binary exponent of x in units; 0 if factor is 0.
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
    """Normalises |x| up to `top` in at most `limit` bits; truncates x if it needs more."""
    most = build.config.num_bits - 3
    num_bits = lambda v, bound: (
      math.ceil(bound / v.scale).bit_length() if math.isfinite(bound) else most
    )
    if num_bits(x, min(x.max_abs, top)) > limit:
      x = build.narrow(x)
    width = max(2, min(limit, num_bits(x, min(x.max_abs, top))))
    beyond = num_bits(x, x.max_abs) > width and width < most
    octaves = [2**i for i in range(width + beyond)]
    thresholds = [1 - t for t in reversed(octaves)] * signed + octaves
    lengths = [*range(1, width + 1), *[0] * beyond]
    exponents = np.array([*reversed(lengths)] * signed + [0] + lengths)
    signs = np.array([-1] * len(octaves) * signed + [0] + [1] * len(octaves)) * (exponents > 0)
    bits = piecewise.steps(build, x, thresholds)
    factors = [int(s) * 2 ** (width - int(e)) for s, e in zip(signs, exponents, strict=True)]
    factor = piecewise.table(build, bits, np.array(factors, np.float64), 1.0)
    return cls(x, bits, factor, 2.0**width * x.scale, exponents, signs)

  def magnitudes(self, lowest: float) -> np.ndarray:
    """For each piece, |x| / n, or `lowest` units if there is none."""
    return np.where(self.exponents > 0, 2.0**self.exponents, lowest) * self.x.scale

  def centred(self, build: Builder, product: Value) -> Value:
    """4 n - 3, in [-1, 1), from x factor; 0 if the factor is 0."""
    scale = 4.0 * self.x.scale / self.whole  # a power of two
    offset = piecewise.table(build, self.bits, np.where(self.exponents > 0, -3.0, 0.0), scale)
    return build.add(product._replace(scale=scale), offset)._replace(max_abs=1.0)
