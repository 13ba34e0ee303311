"""The "halves" form of `products`: 64-bit integers as two halves of 32 bits, in C with AVX2.

Names of dimensions are those of `layouts`; wide_products.c says how the halves are multiplied.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import native, prng
from primia_jax.mpc import layouts
from primia_jax.mpc.maps import Map
from primia_jax.types import Array

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # of the columns of a block


def prepare(map: Map, w: Array) -> Array:
  """Signed int32 or int64 [*w_shape] as int32 [G, O/8, terms, planes, 8] for `multiply`.

  int32 makes one plane, int64 two, the low half first; zeros fill O.
  """
  *window, groups, columns = layouts.kernel_shape(map, w.shape)
  blocks = -(-columns // len(_ORDER))
  kernel = layouts.kernel(map, w).reshape(math.prod(window), groups, columns)
  kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, blocks * len(_ORDER) - columns)))
  kernel = kernel.reshape(*kernel.shape[:2], blocks, len(_ORDER))[..., np.array(_ORDER)]
  planes = lax.bitcast_convert_type(kernel, jnp.int32)
  planes = planes[..., None] if kernel.dtype == jnp.int32 else planes
  return planes.transpose(1, 2, 0, 4, 3)


def multiply(map: Map, x: Array, w: Array, w_shape: tuple[int, ...]) -> Array:
  """map(x, w) modulo 2^64.

  Args:
    map: the bilinear map, not "mul".
    x: uint64.
    w: from `prepare`.
    w_shape: the shape of what was prepared.
  """
  axes, (*_, groups, columns) = layouts.axes(map, w_shape), layouts.kernel_shape(map, w_shape)
  rows = layouts.padded_rows(map, x, axes).swapaxes(-1, -2)  # [N, *space, G, C]
  space = [axis.num_windows(size) for axis, size in zip(axes, rows.shape[1:], strict=False)]
  shape = (rows.shape[0], *space, groups, columns)
  if not math.prod(shape) or not math.prod(w.shape):
    out = jnp.zeros(shape, x.dtype)
  else:
    if w.shape[-2] == 1:  # x = low + 2^32 high with a signed low
      rows = rows + ((rows & jnp.uint64(2**31)) << jnp.uint64(1))
    geometry = _geometry(rows.shape, axes, shape)
    out = native.wide_products(rows, w, jnp.asarray(geometry), shape)
    # a foreign call loses the mesh axes that its operands vary over
    out = out | prng.varying_zero(rows, w).astype(x.dtype)
  return layouts.result(map, out, x.shape, w_shape)


def _geometry(
  x_shape: tuple[int, ...], axes: list[layouts.Axis], shape: tuple[int, ...]
) -> np.ndarray:
  """How the loop in C walks over x [N, *space, G, C], in units of its elements."""
  steps = [math.prod(x_shape[i + 1 :]) for i in range(len(axes) + 1)]
  taps = [1, *(axis.taps for axis in axes)]
  if axes and axes[-1].dilation == 1 and x_shape[-2] == 1:
    taps[-1] = 1  # the last axis of a window lies side by side with the channels
  strides, dilations = ([1, *(getattr(a, name) for a in axes)] for name in ("stride", "dilation"))
  scaled = lambda factors: [s * f for s, f in zip(steps, factors, strict=True)]
  return np.array([shape[: len(steps)], scaled(strides), taps, scaled(dilations)], np.int64)
