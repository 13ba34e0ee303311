"""Polynomials of shared numbers; several products share one message and one truncating gate.

In the docstrings of functions, u = 2^-f is the unit of activations, and C, T and P are the rounds
of a comparison, a truncation and a product: 4, 3 (4 if more than 16 bits are cut off) and 1 with
"tables" and a ring of 64 bits; 2, 2 and 1 with "fss". Errors are those of the function at the
shared input after its truncation to its unit, with exact gates; other gates add at most one unit
for each truncation. An output that is not truncated has the unit u^2, like that of a product.

R is the calibrated bound of a result, `bound` in the code. u(R) is its unit: `Builder.unit` (u if R
is 1 or more, else about u R), or R 2^(f + 7 - k) where that is more, since the ring holds no finer
one; 2^|n| times as much for a power n. A result beyond R becomes 2 R or more, which `clear.check`
reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.polynomial import chebyshev

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Config, Value
from primia_jax.mpc.maps import MULTIPLY

# ---- several values in one message


def opened(build: Builder, values: Sequence[Value]) -> list[Value]:
  """The same values, opened under masks in one message, for products."""
  joined = _joined(build, values)
  build.open(joined)
  return _split(build, joined, values)


def product(build: Builder, a: Value, b: Value) -> Value:
  """a x b in whole units; neither is truncated first."""
  bound = a.max_abs * b.max_abs if a.max_abs and b.max_abs else 0.0
  out = build.product(a._replace(scale=1.0), b._replace(scale=1.0), MULTIPLY)
  return out._replace(scale=a.scale * b.scale, max_abs=bound)


def in_units(build: Builder, x: Value) -> Value:
  """x in about the unit of activations, also where it is coarser, such as a choice of numbers."""
  x = build.narrow(x)
  return build.finer(x) if x.scale >= 2 * build.config.unit else x


def cut(build: Builder, values: Sequence[Value], bits: int) -> list[Value]:
  """Values of one scale, truncated to 2^-bits by one gate, or multiplied if 2^-bits is finer."""
  finer = round(-math.log2(values[0].scale)) - bits
  if finer == 0:
    return list(values)
  if finer < 0:
    grown = [build.local(lambda v: v * v.dtype.type(2**-finer), v) for v in values]
    return [v._replace(scale=v.scale * 2.0**finer) for v in grown]
  joined = build.truncate(_joined(build, values), finer)
  return _split(build, joined, [v._replace(scale=v.scale * 2.0**finer) for v in values])


def _joined(build: Builder, values: Sequence[Value]) -> Value:
  """All elements of the values in one row, without their scales."""
  values = [v._replace(scale=1.0, max_abs=v.max_abs / v.scale) for v in values]
  joined = lambda *vs: jnp.concatenate([v.reshape(-1) for v in vs])
  return build.local(joined, *values, shape=(sum(math.prod(v.shape) for v in values),))


def _split(build: Builder, joined: Value, values: Sequence[Value]) -> list[Value]:
  """The parts of a joined value, with the scales and bounds of `values`."""
  out, start = [], 0
  for value in values:
    stop = start + math.prod(value.shape)
    fn = lambda v, a=start, b=stop, s=value.shape: v[a:b].reshape(s)
    part = build.local(fn, joined, shape=value.shape)
    out.append(part._replace(scale=value.scale, max_abs=value.max_abs))
    start = stop
  return out


# ---- polynomials


def polynomial(build: Builder, x: Value, coefficients: Sequence[float], bits: int) -> Value:
  """A polynomial of x, |x| about 1, with public coefficients, at scale 2^(-2 bits).

  Truncations are to 2^-bits.
  """
  (x,) = cut(build, [x], bits)
  if len(coefficients) % 2:
    coefficients = [*coefficients, 0.0]
  unit = 2.0**-bits
  pairs = []
  for constant, slope in zip(coefficients[::2], coefficients[1::2], strict=True):
    factor = round(slope / unit)
    line = build.local(
      lambda v, factor=factor: v * v.dtype.type(factor % 2 ** (8 * v.dtype.itemsize)), x
    )
    pairs.append(
      build.add_public(
        line._replace(scale=unit * x.scale, max_abs=x.max_abs * abs(slope)), constant
      )
    )
  if len(pairs) == 1:
    return pairs[0]
  (x,) = opened(build, [x])
  return estrin(build, product(build, x, x), pairs, bits)


def estrin(build: Builder, power: Value, terms: Sequence[Value], bits: int) -> Value:
  """sum_i terms_i power^i, all at scale 2^(-2 bits).

  It takes ceil(log2(terms)) levels of a truncation and a product each.
  """
  while len(terms) > 1:
    power, *odd = opened(build, cut(build, [power, *terms[1::2]], bits))
    sums = [build.add(a, product(build, b, power)) for a, b in zip(terms[::2], odd, strict=False)]
    terms = [*sums, *terms[2 * len(sums) :]]
    power = product(build, power, power)
  return terms[0]


def fit(fn: Callable[[np.ndarray], np.ndarray], bits: int) -> list[float]:
  """Coefficients in s = 4 n - 3 of the polynomial of least degree within 2^-bits of fn(n) for n in
  [1/2, 1].
  """
  return interpolate(lambda s: fn((s + 3) / 4), 1.0, bits)


def interpolate(fn: Callable[[Any], Any], half: float, bits: float) -> list[float]:
  """The coefficients of least degree (2 to 15) that are within 2^-bits of fn on [-half, half]."""
  grid = np.linspace(-1, 1, 257)
  for degree in range(2, 16):
    c = chebyshev.chebinterpolate(lambda s: fn(half * s), degree)
    if np.abs(chebyshev.chebval(grid, c) - fn(half * grid)).max() <= 2.0**-bits:
      break
  return list(chebyshev.cheb2poly(c) / half ** np.arange(len(c)))


class Parts(NamedTuple):
  """The parts of a result: a polynomial's value, in units of 2^-bits, times a table's constant.

  Attributes:
    unit: of the result.
    step: the unit of the constants, `unit` or up to 8 times as fine.
    bits: more than f; `working_bits` if the ring has room.
  """

  unit: float
  step: float
  bits: int

  @classmethod
  def of(cls, build: Builder, most: float, unit: float) -> Parts:
    """For results up to `most` in units of `unit`, or coarser ones if those do not fit the ring."""
    f = build.config.fraction_bits
    room = math.floor(build.config.num_bits - 3 - math.log2(max(most / unit, 1)))
    coarser = max(0, f + 1 - room)
    unit, room = unit * 2.0**coarser, room + coarser
    bits = min(working_bits(build.config), max(f + 1, room - 3))
    return cls(unit, unit / 2.0 ** min(3, room - bits), bits)

  def compose(self, build: Builder, curve: Value, table: Value, max_abs: float) -> Value:
    """curve x table, truncated to the result's unit; the curve is at any scale."""
    (fraction,) = cut(build, [curve], self.bits)
    out = product(build, *opened(build, [fraction, table]))
    out = out._replace(max_abs=min(max_abs, 2.0 ** (build.config.num_bits - 3) * out.scale))
    return build.truncate(out, round(math.log2(self.unit / out.scale)))


def working_bits(config: Config) -> int:
  """Fraction bits inside a polynomial: four more than outside if the ring has room."""
  return min(config.fraction_bits + 4, (config.num_bits - 6) // 2)
