"""Primitives that others make up, so that calibration sees each step's range.

Products and cumulative operations take ceil(log2(n)) steps one after the other along an axis of n.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.types import Array

_Operation = Callable[[Array, Array], Array]


def reduced(operation: _Operation, x: Array, axes: Sequence[int], empty: Any) -> Array:
  """An associative operation over axes, which are removed, in a tree."""
  kept = [i for i in range(x.ndim) if i not in axes]
  n = math.prod(x.shape[i] for i in axes)
  x = x.transpose(*axes, *kept).reshape(n, *(x.shape[i] for i in kept))
  if n == 0:
    return jnp.full(x.shape[1:], empty, x.dtype)
  while n > 1:
    half = n // 2
    both = operation(x[:half], x[half : 2 * half])
    x = jnp.concatenate([both, x[2 * half :]]) if n % 2 else both
    n = x.shape[0]
  return x[0]


def clamped(eqn: Any, inputs: Sequence[Any]) -> Any:
  """The jaxpr of a clamp between public numbers as a function of its secret one, or None if it is
  another.

  It is least + max(x - least, 0) - max(x - most, 0): both comparisons take the rounds of one.

  Args:
    eqn: of clamp.
    inputs: least, x and most; None for what is secret.
  """
  least, x, most = inputs
  if x is not None or least is None or most is None:
    return None
  low, high = np.asarray(least), np.asarray(most)
  is_real = np.issubdtype(low.dtype, np.floating)
  if not (
    is_real and np.all(np.isfinite(low)) and np.all(np.isfinite(high)) and np.all(low <= high)
  ):
    return None

  def fn(x: Array) -> Array:
    above = lambda bound: lax.max(x - bound, jnp.zeros_like(x))
    out = above(low) - above(high)
    return out + low if np.any(low) else out

  return jax.make_jaxpr(fn)(eqn.invars[1].aval)


def cumulative(operation: _Operation, x: Array, axis: int, reverse: bool) -> Array:
  """An associative operation over all elements up to each."""
  x = jnp.flip(x, axis) if reverse else x
  part = functools.partial(lax.slice_in_dim, axis=axis)
  n, distance = x.shape[axis], 1
  while distance < n:
    later = operation(part(x, distance, n), part(x, 0, n - distance))
    x = lax.concatenate([part(x, 0, distance), later], axis)
    distance *= 2
  return jnp.flip(x, axis) if reverse else x


def _product(x: Array, *, axes: Sequence[int], **_: Any) -> Array:
  return reduced(lax.mul, x, axes, 1)


def _or(x: Array, *, axes: Sequence[int], **_: Any) -> Array:
  if x.dtype != bool:
    return reduced(lax.bitwise_or, x, axes, 0)
  return x.astype(jnp.int32).sum(tuple(axes)) >= 1


def _and(x: Array, *, axes: Sequence[int], **_: Any) -> Array:
  if x.dtype != bool:
    return reduced(lax.bitwise_and, x, axes, -1)
  return x.astype(jnp.int32).sum(tuple(axes)) >= math.prod(x.shape[i] for i in axes)


def _xor(x: Array, *, axes: Sequence[int], **_: Any) -> Array:
  if x.dtype != bool:
    return reduced(lax.bitwise_xor, x, axes, 0)
  return (x.astype(jnp.int32).sum(tuple(axes)) & 1).astype(bool)


def _cumulative(operation: _Operation) -> Callable[..., Array]:
  return lambda x, *, axis, reverse, **_: cumulative(operation, x, axis, reverse)


def _window_minimum(x: Array, **params: Any) -> Array:
  names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
  return -lax.reduce_window(-x, -jnp.inf, lax.max, **{name: params[name] for name in names})


# For each primitive: (inputs, its parameters) -> its output.
DECOMPOSITIONS: dict[str, Callable[..., Array]] = {
  "cummax": _cumulative(lax.max),
  "cummin": _cumulative(lax.min),
  "cumprod": _cumulative(lax.mul),
  "reduce_and": _and,
  "reduce_or": _or,
  "reduce_prod": _product,
  "reduce_window_min": _window_minimum,
  "reduce_xor": _xor,
}
