"""Sine, cosine, tangent and arctangent of shared numbers.

A multiplication by a public integer turns x into turns of 2 pi, in fine units. What is left after
the nearest whole number of turns goes into a polynomial; it needs no comparison. For u, R, C, T and
P see `polynomials`.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.functions.polynomials import (
  cut,
  in_units,
  interpolate,
  opened,
  polynomial,
  product,
  working_bits,
)
from primia_jax.mpc.functions.powers import divide, reciprocal


def cos(build: Builder, x: Value) -> Value:
  """|error| <= 2 u. 4 P + 5 T rounds, or a T less where |x| <= pi; not truncated.

  Raises:
    ValueError: x has no calibrated range, or one of so many turns that the ring cannot tell where
      in a turn x is: |x| < 2^((k - 2 f) / 2 - 4) always fits.
  """
  return _wave(build, _turns(build, x))


def sin(build: Builder, x: Value) -> Value:
  """cos(x - pi / 2), with its error and rounds; a T less where |x| <= pi / 2."""
  turns = _turns(build, x)
  return _wave(build, build.add_public(turns, -0.25))


def tan(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """sin(x) / cos(x); |error| <= 2 u(R) + 4 u (1 + tan(x)^2).

  The rounds of `cos` and `powers.divide`.

  Raises:
    ValueError: as `cos`.
  """
  turns = _turns(build, x)
  both = build.local(lambda v: jnp.stack([v, v]), turns)
  quarter = np.array([-0.25, 0.0]).reshape(2, *[1] * len(x.shape))
  waves = _wave(build, build.add_public(both, quarter))
  first, second = (build.local(lambda v, i=i: v[i], waves) for i in (0, 1))
  return divide(build, first, second, bound=bound)


def atan(build: Builder, x: Value) -> Value:
  """|error| <= 4 u. 3 C + 10 P + 6 T rounds, or C + 3 P + T where |x| <= 8; not truncated."""
  x = in_units(build, x)
  if x.max_abs <= 8:
    return piecewise.spline(build, x, np.arctan, 9.0, 0.0, 0.0)
  inside = piecewise.steps(build, x, np.rint(np.array([-1.0, 1.0]) / x.scale))
  pick = lambda *values, scale: piecewise.table(build, inside, np.array(values), scale)
  # Beyond 1 it is that of 1 / x; within, 1 / 1 is computed and left out.
  v, far = opened(build, [x, pick(1.0, 0.0, 1.0, scale=1.0)])
  outer = build.add(product(build, v, far), pick(0.0, 1.0, 0.0, scale=x.scale))
  inverse = reciprocal(build, outer._replace(max_abs=x.max_abs), bound=1.0)
  inner = build.subtract(v, product(build, v, far))
  v, far = opened(build, [build.narrow(inverse), far])
  argument = build.add(product(build, v, far), inner)._replace(max_abs=1.0)
  curve = piecewise.spline(build, argument, np.arctan, 2.0, 0.0, 0.0)
  sign, value = opened(build, [pick(-1.0, 1.0, -1.0, scale=1.0), build.narrow(curve)])
  half = pick(-math.pi / 2, 0.0, math.pi / 2, scale=value.scale)
  return build.add(product(build, value, sign), half)._replace(max_abs=math.pi / 2)


def _turns(build: Builder, x: Value) -> Value:
  """x / (2 pi), off by at most u / 16, or u / 2 where the ring has no room for more."""
  config = build.config
  x = build.narrow(x)
  if math.isinf(x.max_abs):
    raise ValueError(
      f"{build.layer}: {build.place}: a sine or cosine of values whose range is not known; "
      f"calibrate"
    )
  units = math.log2(max(x.max_abs, x.scale) / x.scale)
  most = config.num_bits - 3 - math.ceil(units + math.log2(x.scale / (2 * math.pi)) + 0.01)
  least = config.fraction_bits + math.ceil(units)
  if most < least:
    raise ValueError(
      f"{build.layer}: {build.place}: a sine or cosine of values up to {x.max_abs:.4g} needs a "
      f"ring of {config.num_bits + least - most} bits, but num_bits={config.num_bits}; use a wider "
      f"ring, fewer fraction_bits, or subtract whole periods first"
    )
  bits = min(most, least + 3)
  factor = round(x.scale / (2 * math.pi) * 2.0**bits)
  out = build.local(lambda v: v * v.dtype.type(factor), x)
  return out._replace(scale=2.0**-bits, max_abs=x.max_abs / (2 * math.pi))


def _wave(build: Builder, turns: Value) -> Value:
  """cos(2 pi turns)."""
  bits = working_bits(build.config)
  if turns.max_abs > 0.5:
    shift = round(-math.log2(turns.scale))
    whole = build.floored(build.add_public(turns, 0.5), shift)
    turns = build.subtract(turns, whole)._replace(max_abs=0.5)
  (v,) = cut(build, [build.scaled(turns, 2.0)], bits)
  (v,) = opened(build, [v])
  square = build.add_public(build.scaled(product(build, v, v), 2.0), -1.0)._replace(max_abs=1.0)
  curve = lambda t: np.cos(math.pi * np.sqrt((1 + np.maximum(t, -1)) / 2))
  coefficients = interpolate(curve, 1.0, build.config.fraction_bits + 3)
  return polynomial(build, square, coefficients, bits)._replace(max_abs=1.0)
