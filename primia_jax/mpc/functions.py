"""Functions of shared numbers that are more than one gate, each with its error: built from gates and products."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import lax

from primia_jax.mpc.circuit import Builder, Value


def power(build: Builder, x: Value, exponent: int) -> Value:
  """x^n for a public n >= 0, by repeated squaring."""
  if exponent < 0:
    return divide(build, np.float64(1), power(build, x, -exponent))
  if exponent == 0:
    return build.add_public(build.scaled(x, 0.0), 1.0)
  if exponent == 1:
    return x
  half = power(build, x, exponent // 2)
  square = build.multiply(half, half)
  return build.multiply(square, x) if exponent % 2 else square


def tournament(build: Builder, x: Value, axis: int) -> Value:
  """The largest along an axis, which is removed: ceil(log2(n)) maxima one after the other."""
  while x.shape[axis] > 1:
    n = x.shape[axis]
    cut = functools.partial(lax.slice_in_dim, axis=axis)
    first = build.local(lambda v: cut(v, 0, n // 2), x)  # noqa: B023
    second = build.local(lambda v: cut(v, n // 2, 2 * (n // 2)), x)  # noqa: B023
    most = build.maximum(first, second)
    if n % 2:
      rest = build.local(lambda v: cut(v, n - 1, n), x)  # noqa: B023
      most, rest = build.align(most, rest)
      most = build.local(lambda a, b: lax.concatenate([a, b], axis), most, rest)
    x = most
  return build.local(lambda v: lax.squeeze(v, (axis,)), x)


def argmax(build: Builder, x: Value, axis: int) -> Value:
  """The position of the largest along an axis, the first of equals, at scale 1."""
  raise NotImplementedError


def divide(build: Builder, a: Any, b: Value) -> Value:
  raise NotImplementedError


UNARY: dict[str, Callable[[Builder, Value], Value]] = {}
