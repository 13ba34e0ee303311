"""What a convolution's kernel sees of images: its geometry, and the patches under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from primia_jax.types import Array

Pair = tuple[int, int]


class Geometry(NamedTuple):
  """The static part of a convolution: one value per spatial axis, as for
  `lax.conv_general_dilated`.
  """

  strides: Pair
  padding: tuple[Pair, Pair]
  lhs_dilation: Pair = (1, 1)
  rhs_dilation: Pair = (1, 1)


def crop(x: Array, geometry: Geometry) -> tuple[Array, Geometry]:
  """Crops the images instead of padding them negatively; returns the same convolution without
  negative padding.

  The gradient of padding wider than the kernel has negative padding. There XLA:CPU may read memory
  beyond the images instead of zeros (jax 0.10; openxla/xla#48713).
  """
  padding = list(geometry.padding)
  for axis, dilation in enumerate(geometry.lhs_dilation):
    # Whole elements, before dilation.
    low, high = (max(0, -(p // dilation)) for p in padding[axis])
    # Not `lax.slice`: that adds an operation even if it keeps all of x, and two encrypted
    # convolutions of x would then open it twice.
    x = x[(slice(None),) * (1 + axis) + (slice(low, max(low, x.shape[1 + axis] - high)),)]
    padding[axis] = (padding[axis][0] + low * dilation, padding[axis][1] + high * dilation)
  return x, geometry._replace(padding=(padding[0], padding[1]))


def windows(x: Array, w_shape: Sequence[int], geometry: Geometry) -> Array:
  """`patches` as [B, H', W', kh kw C]. Under `vmap` it takes all sites as one batch, as a
  convolution with a shared kernel does, so XLA sees that both need the same ones.
  """

  @jax.custom_batching.custom_vmap
  def run(x: Array) -> Array:
    rows, size = patches(x, w_shape, geometry)
    return rows.reshape(x.shape[0], *size, -1)

  @run.def_vmap
  def rule(axis_size: int, in_batched: Sequence[bool], x: Array) -> tuple[Array, bool]:
    y = run(x.reshape(-1, *x.shape[2:]))
    return y.reshape(axis_size, -1, *y.shape[1:]), True

  return run(x)


def patches(x: Array, w_shape: Sequence[int], geometry: Geometry) -> tuple[Array, Pair]:
  """The patches that a kernel of shape w_shape sees, [B H' W', kh kw C], and (H', W')."""
  spatial = [
    (low, high, d - 1)
    for (low, high), d in zip(geometry.padding, geometry.lhs_dilation, strict=True)
  ]
  x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])
  kh, kw = w_shape[:2]
  (sh, sw), (dh, dw) = geometry.strides, geometry.rhs_dilation
  height = (x.shape[1] - (kh - 1) * dh - 1) // sh + 1
  width = (x.shape[2] - (kw - 1) * dw - 1) // sw + 1
  columns = [x[:, :, j * dw : j * dw + (width - 1) * sw + 1 : sw] for j in range(kw)]
  x = jnp.stack(columns, axis=3)  # columns first, so that the second stack copies longer pieces
  rows = [x[:, i * dh : i * dh + (height - 1) * sh + 1 : sh] for i in range(kh)]
  # Not `concatenate`: XLA:CPU would recompute the columns for each of its pieces.
  x_of_taps = jnp.stack(rows, axis=3)
  return x_of_taps.reshape(-1, kh * kw * x.shape[-1]), (height, width)
