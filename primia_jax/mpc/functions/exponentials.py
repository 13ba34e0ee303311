"""Exponentials of shared numbers, and the bounded functions of their family.

For u, C, T and P see `polynomials`.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.functions.polynomials import (
  Parts,
  in_units,
  interpolate,
  opened,
  polynomial,
  product,
  working_bits,
)


def exp2(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """2^x; |error| <= u(R) + 2 u 2^x. C + 5 P + 4 T rounds.

  Without a bound of x or of the result, 2^(k - 2 f - 6) is the largest result.
  """
  most = build.config.num_bits - 2.0 * build.config.fraction_bits - 6
  x = in_units(build, x)
  highest = math.log2(bound) + 2 * x.scale if 0 < bound < math.inf else most
  return _exp2(build, x, min(highest, x.max_abs + 4 * x.scale), bound)


def exp(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """e^x; error and rounds as `exp2`."""
  return exp2(build, build.scaled(x, math.log2(math.e)), bound)


def expm1(build: Builder, x: Value, bound: float = math.inf) -> Value:
  """e^x - 1; error and rounds as `exp2` of the bound 1 + R."""
  return build.add_public(exp(build, x, 1 + bound), -1.0)


def power_of(build: Builder, base: Any, x: Value, bound: float = math.inf) -> Value:
  """base^x for a public array base > 0 that broadcasts to x; |error| <= u(R) + 3 u 2^x.

  Rounds as `exp2`, and a T more if the bases differ.
  """
  logs, bits = np.log2(np.asarray(base, np.float64)), build.config.fraction_bits + 6
  if np.all(logs == logs.flat[0]):
    return exp2(build, build.scaled(x, float(logs.flat[0])), bound)
  integers = jnp.asarray(np.rint(logs * 2.0**bits).astype(np.int64).astype(build.config.dtype))
  x = in_units(build, x)
  out = build.local(lambda v: v * integers, x, max_abs=x.max_abs * float(np.abs(logs).max()))
  return exp2(build, out._replace(scale=x.scale * 2.0**-bits), bound)


def _exp2(build: Builder, x: Value, highest: float, bound: float) -> Value:
  """2^x up to 2^highest; beyond, that or (if there is a bound) twice as much."""
  config, checked = build.config, math.isfinite(bound)
  width, coefficients = _octaves(config.fraction_bits + 2)
  parts = Parts.of(build, 2.0 ** (highest + checked) * 1.01, build.unit(2.0**highest))
  lowest = max(math.log2(parts.unit) - 2, -x.max_abs - 4 * x.scale)
  highest = max(highest, lowest + 4 * x.scale)
  pieces = max(1, math.ceil((highest - lowest) / width))
  width = (highest - lowest) / pieces
  edges = lowest + width * np.arange(pieces + 1)
  centres = edges[:-1] + width / 2
  steps = piecewise.steps(build, x, np.rint(edges / x.scale))
  inside = piecewise.table(build, steps, np.array([0.0, *[1.0] * pieces, 0.0]), 1.0)
  v = product(build, *opened(build, [x, inside]))._replace(max_abs=max(-lowest, highest))
  bits = working_bits(config)
  finer = max(0, math.floor(bits + math.log2(x.scale) - math.log2(width / 2)))
  offset = piecewise.table(build, steps, np.array([0.0, *-centres, width / 2]), v.scale / 2**finer)
  v = build.local(
    lambda a, b: a * a.dtype.type(2**finer) + b, v._replace(scale=offset.scale), offset
  )
  ratio = v.scale * 2.0**bits  # v will count in units of 2^-bits; the coefficients compensate
  v = v._replace(scale=2.0**-bits, max_abs=width / 2 / ratio + 2.0**-bits)
  powers = np.array([0.0, *2.0**centres, 2.0 ** (centres[-1] + checked)])
  curve = polynomial(build, v, [c * ratio**i for i, c in enumerate(coefficients)], bits)
  curve = curve._replace(max_abs=2.0 ** (width / 2) * 1.01)
  table = piecewise.table(build, steps, powers, parts.step)
  out = parts.compose(build, curve, table, min(bound, 2.0**highest * 1.01))
  return out if checked or math.isfinite(x.max_abs) else out._replace(max_abs=math.inf)


def _octaves(bits: int) -> tuple[float, list[float]]:
  """The largest width, and coefficients up to r^7, for a relative error of 2^-bits in 2^r where |r|
  <= width / 2.
  """
  for width in np.arange(3, 0.25, -0.25):
    c = interpolate(lambda r: np.exp2(r), width / 2, bits + width / 2)
    if len(c) <= 8:
      break
  return float(width), c


# ---- bounded functions

_erf = np.vectorize(math.erf)


def _logistic(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def logistic(build: Builder, x: Value) -> Value:
  """1 / (1 + e^-x); |error| <= u, whatever x. Rounds as `piecewise.spline`; not truncated."""
  end = (build.config.fraction_bits + 2) * math.log(2)
  return piecewise.spline(build, x, _logistic, end, 0.0, 1.0)


def tanh(build: Builder, x: Value) -> Value:
  """|error| <= u, whatever x. Rounds as `piecewise.spline`; not truncated."""
  end = (build.config.fraction_bits + 3) * math.log(2) / 2
  return piecewise.spline(build, x, np.tanh, end, -1.0, 1.0)


def erf(build: Builder, x: Value) -> Value:
  """|error| <= u, whatever x. Rounds as `piecewise.spline`; not truncated."""
  end = math.sqrt(build.config.fraction_bits * math.log(2))
  return piecewise.spline(build, x, _erf, end, -1.0, 1.0)


def erfc(build: Builder, x: Value) -> Value:
  """1 - erf(x), with its error and rounds."""
  return build.add_public(build.negate(erf(build, x)), 1.0)._replace(max_abs=2.0)
