"""Whole numbers near a shared number, and their bits; at scale 1 and exact whatever the
configuration.

They are those of the number that is shared. One that lies within its error of a jump may land on
the other side. For C, T and P see `polynomials`; a quotient by steps that are not powers of two
takes twice the bits of the number, and is exact too if the number is a whole multiple of a fraction
of each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value


def floor(build: Builder, x: Value, step: Any = 1.0) -> Value:
  """The largest whole number <= x / step, for public steps > 0. T rounds."""
  quotient, shift = _quotient(build, x, step)
  return _whole(build.floored(quotient, shift), x, step)


def ceil(build: Builder, x: Value, step: Any = 1.0) -> Value:
  """The least whole number >= x / step. T rounds."""
  return build.negate(floor(build, build.negate(x), step))


def trunc(build: Builder, x: Value, step: Any = 1.0) -> Value:
  """x / step without its fraction, towards 0. C rounds."""
  quotient, shift = _both_signs(build, x, step)
  return _whole(_difference(build, build.floored(quotient, shift, positive=True)), x, step)


def nearest(build: Builder, x: Value, step: Any = 1.0) -> Value:
  """The whole number nearest to x / step; halves up. T rounds, 0 where x is whole already."""
  quotient, shift = _quotient(build, x, step)
  half = 2.0 ** (shift - 1) if shift else 0.0
  return _whole(build.floored(build.add_public(quotient, half), shift), x, step)


def nearest_even(build: Builder, x: Value) -> Value:
  """The nearest whole number; halves to the even one. T rounds.

  It is floor((x + 1/2) / 2) + ceil((x - 1/2) / 2).
  """
  return _nearest(build, x, lambda moved, shift: build.floored(moved, shift + 1))


def nearest_away(build: Builder, x: Value) -> Value:
  """The nearest whole number; halves away from 0. C rounds."""
  return _nearest(build, x, lambda moved, shift: build.floored(moved, shift, positive=True))


def _nearest(build: Builder, x: Value, floored: Callable[[Value, int], Value]) -> Value:
  quotient, shift = _both_signs(build, x, 1.0)
  if not shift:
    return nearest(build, x)
  moved = build.add_public(quotient, 2.0 ** (shift - 1))
  return _whole(_difference(build, floored(moved, shift)), x, 1.0)


def shifted(build: Builder, x: Value, shifts: Any) -> Value:
  """[n, ...]: floor(x / 2^shift) of a whole number for each of n public shifts. T rounds."""
  most = max(shifts)
  factors = np.array([2 ** (most - s) for s in shifts], build.config.dtype)
  factors = factors.reshape(-1, *[1] * len(x.shape))
  grown = build.local(
    lambda v: v[None] * factors, x, max_abs=x.max_abs * 2.0 ** (most - min(shifts))
  )
  out = build.floored(grown, most)
  return out._replace(scale=1.0, max_abs=x.max_abs + 1)


def _quotient(build: Builder, x: Value, step: Any) -> tuple[Value, int]:
  """Whole numbers q and bits s: x / step and q / 2^s have the same floor.

  If x / step is v / d, with v and d whole, then q / 2^s comes near (v + 1/2) / d, which is no whole
  number and has the same floor as v / d.
  """
  ratios, shape = _ratios(x, step)
  if all(_is_power_of_two(r) for r in ratios):
    shift = max(0, *(r.denominator.bit_length() - 1 for r in ratios))
    return _times(build, x, [int(r * 2**shift) for r in ratios], shape), shift
  finite = math.isfinite(x.max_abs)
  bits = math.ceil(x.max_abs / x.scale).bit_length() if finite else build.config.num_bits
  least, most = (math.floor(math.log2(f(ratios))) for f in (min, max))
  if 2 * bits + most - least + 5 > build.config.num_bits - 2:
    narrow = build.narrow(x)
    if narrow is not x:
      return _quotient(build, narrow, step)
    if not finite:
      raise ValueError(
        f"{build.layer}: {build.place}: a number without bound is rounded to steps that are no "
        f"powers of two; calibrate"
      )
  shift = bits + 2 - least
  factors = [round(r * 2 ** (shift - 1)) for r in ratios]
  doubled = build.local(lambda v: v * v.dtype.type(2), x)
  doubled = doubled._replace(scale=1.0, max_abs=2 * x.max_abs / x.scale)
  return _times(build, build.add_public(doubled, 1.0), factors, shape), shift


def _both_signs(build: Builder, x: Value, step: Any) -> tuple[Value, int]:
  """[2, ...]: the quotients of x and of -x."""
  x = build.broadcast(x, np.broadcast_shapes(x.shape, np.shape(step)))
  return _quotient(build, build.local(lambda v: jnp.stack([v, v.dtype.type(0) - v]), x), step)


def _difference(build: Builder, pair: Value) -> Value:
  return build.local(lambda v: v[0] - v[1], pair)


def _whole(units: Value, x: Value, step: Any) -> Value:
  return units._replace(scale=1.0, max_abs=x.max_abs / float(np.min(step)) + 1)


def _times(build: Builder, x: Value, factors: list[int], shape: tuple[int, ...]) -> Value:
  """Whole numbers times public ones, in units of 1."""
  largest = x.max_abs / x.scale * max(factors)
  x = build.broadcast(x, np.broadcast_shapes(x.shape, shape))._replace(scale=1.0)
  if set(factors) == {1}:
    return x._replace(max_abs=largest)
  array = np.array(factors, np.uint64).astype(build.config.dtype)
  array = array.reshape(*[1] * (len(x.shape) - len(shape)), *shape)
  return build.local(lambda v: v * array, x, max_abs=largest)


def _ratios(x: Value, step: Any) -> tuple[list[Fraction], tuple[int, ...]]:
  steps = np.asarray(step, np.float64)
  if not (steps.size and np.all(steps > 0) and np.all(np.isfinite(steps))):
    raise ValueError("a step is not above 0 and finite")
  if np.all(steps == steps.flat[0]):
    steps = steps.reshape(-1)[0:1].reshape(())
  return [Fraction(x.scale) / Fraction(s) for s in np.ravel(steps).tolist()], np.shape(steps)


def _is_power_of_two(ratio: Fraction) -> bool:
  one = lambda n: n & (n - 1) == 0
  return one(ratio.numerator) and one(ratio.denominator)
