"""Piecewise functions of a shared number: one gate compares it with many public thresholds.

A piecewise constant function is a local sum of the comparisons' bits (`table`). A piecewise
polynomial takes tables of coefficients and products.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions.polynomials import estrin, in_units, opened, product
from primia_jax.types import Array


def steps(build: Builder, x: Value, thresholds: Sequence[int] | np.ndarray) -> Value:
  """[n, ...] at scale 1: whether x reaches each of n ascending thresholds, in units of x."""
  t = np.asarray(thresholds, np.float64).reshape(-1, *[1] * len(x.shape)) * x.scale
  x = build.local(lambda v: jnp.broadcast_to(v, (t.size, *v.shape)), x)
  return build.sign(build.add_public(x, -t))


def one_hot(build: Builder, x: Value, num: int, clip: bool) -> Value:
  """[num, ...] at scale 1: whether a whole number x is 0, 1, ... num - 1; C rounds.

  Numbers beyond give all zeros or, with `clip`, the nearest.
  """
  if not clip:
    reached = steps(build, x, np.arange(num + 1) / x.scale)
    return build.local(lambda v: v[:-1] - v[1:], reached)._replace(max_abs=1.0)
  reached = steps(build, x, np.arange(1, num) / x.scale)

  def differences(v: Array) -> Array:
    zeros = jnp.zeros((1, *x.shape), v.dtype)
    return jnp.concatenate([zeros, v]) - jnp.concatenate([v, zeros])

  first = (np.arange(num) == 0).astype(np.float64).reshape(-1, *[1] * len(x.shape))
  return build.add_public(build.local(differences, reached), first)._replace(max_abs=1.0)


def table(build: Builder, steps: Value, values: np.ndarray, scale: float) -> Value:
  """The value of the piece that x lies in, in whole units of `scale`; n steps make n + 1 pieces."""
  integers = [round(v / scale) for v in values.tolist()]
  jumps = [b - a for a, b in itertools.pairwise(integers)]
  dtype = build.config.dtype
  factors = np.array([j % 2 ** (8 * dtype.itemsize) for j in jumps], dtype).reshape(
    -1, *[1] * (len(steps.shape) - 1)
  )

  def fn(bits: Array) -> Array:
    return (bits * factors).sum(0, dtype=bits.dtype)

  out = build.local(fn, steps, shape=steps.shape[1:])._replace(scale=scale)
  if integers[0]:
    out = build.add_public(out, integers[0] * scale)
  return out._replace(max_abs=max(map(abs, integers)) * scale)


def sign(build: Builder, x: Value) -> Value:
  """1, 0 or -1, exact, at scale 1. C rounds."""
  return table(build, steps(build, x, [0, 1]), np.array([-1.0, 0.0, 1.0]), 1.0)


def spline(
  build: Builder,
  x: Value,
  fn: Callable[[np.ndarray], np.ndarray],
  end: float,
  left: float,
  right: float,
) -> Value:
  """A function as cubics on pieces of [-end, end] and as constants beyond.

  C + 2 P + T rounds, and P more if x^2 may not fit the ring, as without calibration. fn is a
  function of a module: its pieces are found once and kept.
  """
  f = build.config.fraction_bits
  x = in_units(build, x)
  bounded = x.max_abs + x.scale <= end
  end = min(end, x.max_abs + x.scale)
  ratio = x.scale * 2.0**f  # x counts in units of 2^-f; the coefficients compensate
  knots, centres, coefficients = _pieces(
    fn, end, 0.4 * build.config.unit, x.scale, build.config.unit / ratio
  )
  c = np.zeros((len(centres) + 2, 4))
  c[1:-1] = coefficients * ratio ** np.arange(4)
  c[0, 0], c[-1, 0] = (left, right) if not bounded else fn(np.array([-end, end]))
  thresholds = np.rint(knots / x.scale)
  if bounded:  # x is rounded, and may lie a few units beyond
    thresholds[[0, -1]] += [-4, 4]
  reached = steps(build, x, thresholds)
  pick = lambda values, scale: table(build, reached, values, scale)
  v, largest = x, float(np.diff(knots).max())
  if not bounded and 2 * math.log2(x.max_abs / x.scale) < build.config.num_bits - 3:
    largest = max(largest, x.max_abs)  # far out v is large and meets coefficients of zero
  elif not bounded:
    inside = pick(np.array([0.0, *[1.0] * len(centres), 0.0]), 1.0)
    v = product(build, *opened(build, [x, inside]))._replace(max_abs=end)
  v = build.add(v, pick(np.array([0.0, *-centres, 0.0]), v.scale))
  v = v._replace(scale=2.0**-f, max_abs=largest / ratio)
  unit, fine = build.config.unit, build.config.unit**2
  v, linear, cubic = opened(build, [v, pick(c[:, 1], unit), pick(c[:, 3], unit)])
  even = build.add(product(build, linear, v), pick(c[:, 0], fine))
  odd = build.add(product(build, cubic, v), pick(c[:, 2], fine))
  out = estrin(build, product(build, v, v), [even, odd], f)
  return out._replace(max_abs=float(np.abs(c[:, 0]).max()) + 0.5)


@functools.cache
def _pieces(
  fn: Callable[[np.ndarray], np.ndarray], end: float, error: float, scale: float, unit: float
):
  """Knots [n + 1], centres [n] and coefficients [n, 4] of cubics in x - centre within `error` of
  fn.

  Cached: a recurrent network asks for the same ones at every step. Each piece is as long as
  possible, up to 2. Centres are whole multiples of `scale`. The odd
  coefficients, which multiply something of unit `scale`, are whole multiples of `unit`.
  """
  nodes, grid = np.cos(np.pi * (np.arange(8) + 0.5) / 8), np.linspace(-1, 1, 33)

  def fit(a: float, b: float) -> tuple[float, np.ndarray, float]:
    half, middle = (b - a) / 2, (a + b) / 2
    centre = np.rint(middle / scale) * scale
    x, c = middle - centre + half * nodes, np.zeros(4)
    left, free = fn(middle + half * nodes), [0, 1, 2, 3]
    for i in (3, 1):  # the others compensate for the rounding of one coefficient
      c[i] = (
        np.rint(np.linalg.lstsq(x[:, None] ** free, left, rcond=None)[0][free.index(i)] / unit)
        * unit
      )
      free.remove(i)
      left = left - c[i] * x**i
    c[free] = np.linalg.lstsq(x[:, None] ** free, left, rcond=None)[0]
    points = middle + half * grid
    return (
      centre,
      c,
      float(np.abs(np.polynomial.polynomial.polyval(points - centre, c) - fn(points)).max()),
    )

  knots, centres, coefficients = [-end], [], []
  while knots[-1] < end:
    low, high = 0.0, min(2.0, end - knots[-1])
    if fit(knots[-1], knots[-1] + high)[2] <= error:
      low = high
    else:
      for _ in range(16):
        middle = (low + high) / 2
        low, high = (
          (middle, high) if fit(knots[-1], knots[-1] + middle)[2] <= error else (low, middle)
        )
    knots.append(knots[-1] + low)
    centre, c, _ = fit(knots[-2], knots[-1])
    centres.append(centre)
    coefficients.append(c)
  return np.array(knots), np.array(centres), np.array(coefficients)
