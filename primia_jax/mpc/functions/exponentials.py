"""Exponentials of shared numbers, and the bounded functions of their family.

For u, C, T and P see `polynomials`.
"""

from __future__ import annotations

import math

import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.functions.polynomials import (
  cut,
  interpolate,
  opened,
  polynomial,
  product,
  working_bits,
)


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
  steps = piecewise.steps(build, x, np.rint(edges / x.scale))
  inside = piecewise.table(build, steps, np.array([0.0, *[1.0] * pieces, 0.0]), 1.0)
  v = product(build, *opened(build, [x, inside]))._replace(max_abs=max(-lowest, highest))
  bits = working_bits(build.config)
  finer = max(0, math.floor(bits + math.log2(x.scale) - math.log2(width / 2)))
  offset = piecewise.table(build, steps, np.array([0.0, *-centres, width / 2]), v.scale / 2**finer)
  v = build.local(
    lambda a, b: a * a.dtype.type(2**finer) + b, v._replace(scale=offset.scale), offset
  )
  ratio = v.scale * 2.0**bits  # v will count in units of 2^-bits; the coefficients compensate
  v = v._replace(scale=2.0**-bits, max_abs=width / 2 / ratio + 2.0**-bits)
  most, unit = 2.0 ** (width / 2), build.config.unit / 8
  powers = np.array([0.0, *2.0**centres, 2.0 ** centres[-1]])
  fraction = polynomial(build, v, [c * ratio**i for i, c in enumerate(coefficients)], bits)
  room = math.floor(config.num_bits - 3 - math.log2(powers[-1] * most / unit))
  (fraction,) = cut(build, [fraction._replace(max_abs=most * 1.01)], min(bits, room))
  out = product(build, *opened(build, [fraction, piecewise.table(build, steps, powers, unit)]))
  return build.narrow(
    out._replace(max_abs=math.inf if math.isinf(x.max_abs) else 2.0**highest * 1.01)
  )


def exp(build: Builder, x: Value) -> Value:
  """e^x; error and rounds as `exp2`."""
  return exp2(build, build.scaled(x, math.log2(math.e)))


def expm1(build: Builder, x: Value) -> Value:
  """e^x - 1, with the absolute error of `exp2`."""
  return build.add_public(exp(build, x), -1.0)


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
