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
from primia_jax.mpc.functions.polynomials import (
  Parts,
  cut,
  fit,
  opened,
  polynomial,
  product,
  working_bits,
)


def power(build: Builder, x: Value, exponent: float, bound: float = math.inf) -> Value:
  """x^n for a public n.

  Whole n >= 0: repeated squaring of P + T rounds each; every step errs by at most u |x|^(n/2).
  Negative whole n: that power of the reciprocal. Other n: |error| <= u(R) + u x^n for x > 0; 0 for
  x <= 0. Without a bound, x^n = 2^(k - 2 f - 4) is the largest result.
  """
  if exponent != int(exponent):
    return _power_law(build, x, exponent, bound)
  if exponent < 0:
    root = bound ** (-1 / exponent) if bound < math.inf else math.inf
    return power(build, reciprocal(build, x, root), -exponent)
  if exponent == 0:
    return build.add_public(build.scaled(x, 0.0), 1.0)
  if exponent == 1:
    return x
  half = power(build, x, exponent // 2)
  square = build.multiply(half, half)
  return build.multiply(square, x) if exponent % 2 else square


def divide(
  build: Builder, a: Any, b: Value, positive: bool = False, bound: float = math.inf
) -> Value:
  """a / b, elementwise and broadcast, for a Value or public array a; 0 for b = 0.

  |error| <= 2 u(R) + u |a / b| / 2. C + 5 (P + T) rounds, and twice as many thresholds as b has
  bits. Without a bound of the result, |a / b| must be below 2^(f + 1); without one of b, b must be
  below 2^(k - 2 f - 4), beyond which the result is 0.

  Args:
    build: the circuit.
    a: numerator.
    b: denominator.
    positive: promises b >= 0, which halves the thresholds. A negative b then gives 0.
    bound: R.

  Raises:
    ValueError: the calibrated ranges of b and of the result do not fit the ring together.
  """
  if not isinstance(a, Value) and np.asarray(a).size == 1:
    numerator = float(np.asarray(a).reshape(()))
    out = _power_law(build, b, -1.0, bound, numerator, signed=not positive)
    return build.broadcast(out, np.broadcast_shapes(np.shape(a), b.shape))
  config, bits = build.config, working_bits(build.config)
  shape = np.broadcast_shapes(np.shape(a) if not isinstance(a, Value) else a.shape, b.shape)
  if not isinstance(a, Value):
    unit = build.unit(float(np.abs(a).max()))
    a = build.add_public(
      build.scaled(build.broadcast(b, shape), 0.0)._replace(scale=unit), np.broadcast_to(a, shape)
    )
  a = build.broadcast(build.narrow(a), shape)
  # A quotient by more than `top` is less than half a unit.
  top = 2 * a.max_abs / build.unit(bound)
  most = bound if 0 < bound < math.inf else 2.0 ** (config.fraction_bits + 1)
  room = lambda b: math.floor(config.num_bits - 3 - math.log2(most * b.scale / a.scale))
  if _num_bits(build, b, min(b.max_abs, top)) > room(b):
    b = build.narrow(b)
  needed = _num_bits(build, b, min(b.max_abs, top))
  if needed > room(b) and math.isfinite(b.max_abs):
    raise ValueError(
      f"{build.layer}: {build.place}: a quotient up to {bound:.4g} by values up to "
      f"{b.max_abs:.4g} needs a ring of {config.num_bits + needed - room(b)} bits, but "
      f"num_bits={config.num_bits}; use a wider ring, fewer fraction_bits, or divide by smaller "
      f"numbers"
    )
  normal = _Normal.make(build, b, not positive, room(b), 0.0, top)
  x, factor, a = opened(build, [normal.x, normal.factor, a])
  s = normal.centred(build, product(build, x, factor))
  curve = polynomial(build, s, fit(lambda n: 1 / n, config.fraction_bits + 4), bits)
  parts = Parts.of(build, 2.01 * most, build.unit(bound))
  (inverse,) = cut(build, [curve._replace(max_abs=2.01)], parts.bits)
  near = product(build, a, build.broadcast(factor, shape))
  limit = min(bound, a.max_abs / normal.x.scale)
  near = near._replace(scale=a.scale / normal.whole)
  near = near._replace(max_abs=min(limit, 2.0 ** (config.num_bits - 3) * near.scale))
  near = build.truncate(near, max(0, round(math.log2(parts.step / near.scale))))
  out = parts.compose(build, build.broadcast(inverse, shape), near, limit)
  return out if math.isfinite(limit) else out._replace(max_abs=math.inf)


def reciprocal(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """1 / x; |error| <= u(R) + u / |x|; 0 for x = 0. C + 5 (P + T) rounds."""
  return _power_law(build, x, -1.0, bound, signed=True)


def sqrt(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """|error| <= u(R) + u sqrt(x) / 2; 0 for x <= 0. C + 5 (P + T) rounds, a threshold a bit."""
  return _power_law(build, x, 0.5, bound)


def rsqrt(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """1 / sqrt(x); |error| <= u(R) + u rsqrt(x) / 2; 0 for x <= 0. Rounds as `sqrt`."""
  return _power_law(build, x, -0.5, bound)


def cbrt(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """|error| <= u(R) + u |cbrt(x)| / 2. Rounds as `sqrt`, twice the thresholds."""
  return _power_law(build, x, 1 / 3, bound, signed=True)


def log(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """|error| <= 2 u(R). C + 4 P + 3 T rounds; not truncated.

  Where x <= 0 it is the logarithm of 3/4 of x's unit, or -2 R.
  """
  config = build.config
  f = min(round(-math.log2(build.unit(bound))), (config.num_bits - 6) // 2)
  f = max(f, config.fraction_bits)
  normal = _Normal.make(build, x, False, config.num_bits - 3, math.exp(-min(bound, 700.0)))
  s = normal.centred(build, product(build, *opened(build, [normal.x, normal.factor])))
  out = polynomial(build, s, fit(np.log, f + 3), f)
  exponents = np.log(normal.magnitudes(lowest=1))
  if normal.exponents[0] == 0 and math.isfinite(bound):
    exponents[normal.exponents == 0] = -2 * bound
  table = piecewise.table(build, normal.bits, exponents, out.scale)
  return build.add(out, table)._replace(max_abs=float(np.abs(exponents).max()) + 1)


def log1p(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """log(1 + x), with the error of `log`."""
  return log(build, build.add_public(x, 1.0), bound)


def _power_law(
  build: Builder, x: Value, exponent: float, bound: float, factor: float = 1.0, signed: bool = False
) -> Value:
  """factor sign(x) |x|^exponent; without `signed`, 0 where x <= 0."""
  config, f = build.config, build.config.fraction_bits
  if factor == 0:
    return build.scaled(x, 0.0)
  root = lambda result: (result / abs(factor)) ** (1 / exponent)
  # The magnitudes of x whose results are less than half a unit, and more than the bound.
  none, many = root(build.unit(bound) / 2), root(bound) if 0 < bound < math.inf else math.inf
  low, top = (none, math.inf) if exponent > 0 else (0.0 if many == math.inf else many, none)
  normal = _Normal.make(build, x, signed, config.num_bits - 3, low, top)
  s = normal.centred(build, product(build, *opened(build, [normal.x, normal.factor])))
  ends = sorted((1.0, 2.0**-exponent))  # of n^exponent
  limit = 2.0 ** (config.num_bits - 4 - 2 * f)  # of a result whose bound nobody knows
  most = 2 * bound / ends[0] if bound < math.inf else limit / (ends[1] * 1.01)
  magnitudes = normal.magnitudes(0.0)
  values = np.where((magnitudes == 0) & (exponent < 0), most * np.abs(normal.signs), 0.0)
  np.power(magnitudes, exponent, out=values, where=magnitudes > 0)
  values = np.clip(values * normal.signs * factor, -most, most)
  parts = Parts.of(build, np.abs(values).max() * ends[1] * 1.01, build.unit(bound))
  curve = polynomial(build, s, fit(lambda n: n**exponent, f + 4), working_bits(config))
  curve = curve._replace(max_abs=ends[1] * 1.01)
  out = parts.compose(
    build,
    curve,
    piecewise.table(build, normal.bits, values, parts.step),
    min(bound, float(np.abs(values).max()) * ends[1] * 1.01),
  )
  return out if math.isfinite(min(bound, x.max_abs)) else out._replace(max_abs=math.inf)


def _num_bits(build: Builder, x: Value, bound: float) -> int:
  """The bits of x's units up to a bound; those of the ring if it is infinite."""
  most = build.config.num_bits - 3
  return min(most, math.ceil(bound / x.scale).bit_length()) if math.isfinite(bound) else most


class _Normal(NamedTuple):
  """x as (whole / factor) n, with n in [1/2, 1); the factor is a power of two with the sign of x.

  Attributes:
    x: the number, in its own units.
    bits: [thresholds, ...] steps of x.
    factor: 2^B n / x in units of x; 0 if x is 0, too small or too large.
    whole: 2^B units.
    exponents: for each piece, the binary exponent of x in units; 0 if factor is 0.
    signs: for each piece, -1, 0 or 1; 0 if x is too large.
  """

  x: Value
  bits: Value
  factor: Value
  whole: float
  exponents: np.ndarray
  signs: np.ndarray

  @classmethod
  def make(
    cls, build: Builder, x: Value, signed: bool, limit: int, low: float = 0.0, top: float = math.inf
  ) -> _Normal:
    """Normalises |x| from `low` to `top` in at most `limit` bits; truncates x if it needs more."""
    if _num_bits(build, x, min(x.max_abs, top)) > limit:
      x = build.narrow(x)
    most = build.config.num_bits - 3
    needed = _num_bits(build, x, min(x.max_abs, top))
    width = max(2, min(limit, needed))
    beyond = _num_bits(build, x, x.max_abs) > width and width < most
    first = max(0, min(width - 1, math.floor(math.log2(low / x.scale)))) if low > 0 else 0
    octaves = [2**i for i in range(first, width + beyond)]
    octaves = [1, *octaves] if first else octaves
    lengths = [*[0] * bool(first), *range(first + 1, width + 1), *[0] * beyond]
    signs = np.array([1] * (len(lengths) - beyond) + [0] * beyond)
    if signed:
      thresholds = [1 - t for t in reversed(octaves)] + octaves
      exponents = np.array([*reversed(lengths), 0, *lengths])
      signs = np.concatenate([-signs[::-1], [0], signs])
    else:
      thresholds = octaves
      exponents, signs = np.array([0, *lengths]), np.concatenate([[0], signs])
    bits = piecewise.steps(build, x, thresholds)
    factors = np.where(exponents > 0, signs * 2.0 ** (width - exponents), 0.0)
    factor = piecewise.table(build, bits, factors, 1.0)
    return cls(x, bits, factor, 2.0**width * x.scale, exponents, signs)

  def magnitudes(self, lowest: float) -> np.ndarray:
    """For each piece, |x| / n, or `lowest` units if there is none."""
    return np.where(self.exponents > 0, 2.0**self.exponents, lowest) * self.x.scale

  def centred(self, build: Builder, product: Value) -> Value:
    """4 n - 3, in [-1, 1), from x factor; 0 if the factor is 0."""
    scale = 4.0 * self.x.scale / self.whole  # a power of two
    offset = piecewise.table(build, self.bits, np.where(self.exponents > 0, -3.0, 0.0), scale)
    return build.add(product._replace(scale=scale), offset)._replace(max_abs=1.0)
