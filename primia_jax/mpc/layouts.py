"""Every map in one shape: x [N, *space, C, G] times w [*window, C, G, O] is [N, *space', G, O].

N and O are the free dimensions, groups G are independent of each other, and C and the window are
summed over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from primia_jax.mpc.maps import Map
from primia_jax.types import Array


class Axis(NamedTuple):
  """A spatial axis: the window along it, and (low, high, interior) padding of x."""

  taps: int
  stride: int
  dilation: int
  padding: tuple[int, int, int]

  def num_windows(self, size: int) -> int:
    """How many windows there are in the padded x."""
    return max(0, (size - (self.taps - 1) * self.dilation - 1) // self.stride + 1)


def axes(map: Map, w_shape: Sequence[int]) -> list[Axis]:
  """The map's spatial axes."""
  if map.name == "dot_general":
    return []
  p = dict(map.params)
  ones = (1,) * (len(w_shape) - 2)
  dilated = p.get("lhs_dilation") or ones
  taps = [w_shape[a] for a in p["dimension_numbers"].rhs_spec[2:]]
  padding = [(low, high, d - 1) for (low, high), d in zip(p["padding"], dilated, strict=True)]
  values = zip(taps, p["window_strides"], p.get("rhs_dilation") or ones, padding, strict=True)
  return [Axis(*each) for each in values]


def kernel(map: Map, w: Array) -> Array:
  """The right-hand operand as [*window, C, G, O]."""
  p = dict(map.params)
  if map.name == "dot_general":
    (_, contracted), (_, batch) = p["dimension_numbers"]
    return _flattened(w, contracted, batch, _free(w.ndim, contracted, batch))
  out, channels, *window = p["dimension_numbers"].rhs_spec
  w = w.transpose(*window, channels, out)
  # at least one of them is 1
  groups = p.get("feature_group_count", 1) * p.get("batch_group_count", 1)
  return w.reshape(*w.shape[:-1], groups, w.shape[-1] // groups)


def kernel_shape(map: Map, w_shape: Sequence[int]) -> tuple[int, ...]:
  """The shape of `kernel`."""
  w = jax.ShapeDtypeStruct(tuple(w_shape), jnp.int32)
  return tuple(jax.eval_shape(lambda w: kernel(map, w), w).shape)


def padded_rows(map: Map, x: Array, axes: Sequence[Axis]) -> Array:
  """The left-hand operand as [N, *space, C, G], padded as its axes say."""
  padding = [(0, 0, 0), *(axis.padding for axis in axes), (0, 0, 0), (0, 0, 0)]
  return lax.pad(_rows(map, x), jnp.zeros((), x.dtype), padding)


def _rows(map: Map, x: Array) -> Array:
  """The left-hand operand as [N, *space, C, G]."""
  p = dict(map.params)
  if map.name == "dot_general":
    (contracted, _), (batch, _) = p["dimension_numbers"]
    return _flattened(x, _free(x.ndim, contracted, batch), contracted, batch)
  rows, channels, *space = p["dimension_numbers"].lhs_spec
  x = x.transpose(rows, *space, channels)
  if (groups := p.get("batch_group_count", 1)) > 1:
    return jnp.moveaxis(x.reshape(groups, x.shape[0] // groups, *x.shape[1:]), 0, -1)
  groups = p.get("feature_group_count", 1)
  return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups).swapaxes(-1, -2)


def result(map: Map, y: Array, x_shape: Sequence[int], w_shape: Sequence[int]) -> Array:
  """[N, *space', G, O] as the map has it."""
  p = dict(map.params)
  if map.name == "dot_general":
    (x_contracted, w_contracted), (x_batch, w_batch) = p["dimension_numbers"]
    batch = [x_shape[a] for a in x_batch]
    x_free = [x_shape[a] for a in _free(len(x_shape), x_contracted, x_batch)]
    w_free = [w_shape[a] for a in _free(len(w_shape), w_contracted, w_batch)]
    return y.swapaxes(0, 1).reshape(*batch, *x_free, *w_free)
  rows, channels, *space = p["dimension_numbers"].out_spec
  y = y.reshape(*y.shape[:-2], y.shape[-2] * y.shape[-1])
  return jnp.moveaxis(y, range(y.ndim), (rows, *space, channels))


def _free(ndim: int, contracted: Sequence[int], batch: Sequence[int]) -> list[int]:
  """The axes of a dot_general's operand that are neither summed over nor batched."""
  return [a for a in range(ndim) if a not in (*contracted, *batch)]


def _flattened(v: Array, *groups: Sequence[int]) -> Array:
  """v with one axis for each group of axes."""
  sizes = [math.prod(v.shape[a] for a in axes) for axes in groups]
  return v.transpose(*(a for axes in groups for a in axes)).reshape(sizes)
