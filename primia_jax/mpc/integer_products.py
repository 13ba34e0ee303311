"""The "integer" form of `products`: ring elements in their own dtype, which wraps around.

Names of dimensions are those of `layouts`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from primia_jax.mpc import layouts
from primia_jax.mpc.maps import Map
from primia_jax.types import Array

# Terms in one loop. XLA copies a slice with 16 users or more first; one with fewer users it indexes
# anew for every product, eight times slower (jaxlib 0.10). The copies of more than 24 terms do not
# fit the vector registers.
_MIN_TERMS, _MAX_TERMS = 16, 24
_MAX_COLUMNS = 128  # of w in one loop: a larger block does not fit the innermost cache
_MIN_WORK = 2**17  # elements of the result in one step if possible: each step has its own cost


def prepare(map: Map, w: Array) -> Array:
  """Signed integers w [*w_shape], laid out for `multiply`."""
  return w if map.name == "mul" else _blocks(layouts.kernel(map, w))


def multiply(map: Map, x: Array, w: Array, w_shape: tuple[int, ...]) -> Array:
  """map(x, w) in x's dtype, which wraps around.

  Args:
    x: uint32 or uint64.
    w: from `prepare`.
    w_shape: the shape of what was prepared.
  """
  if map.name == "mul":
    return x * _as_ring(w, x.dtype)
  axes = layouts.axes(map, w_shape)
  rows, kernel = layouts.padded_rows(map, x, axes), layouts.kernel_shape(map, w_shape)
  for i in reversed(range(len(axes) - _num_folded(kernel), len(axes))):
    rows, axes[i] = _patches(rows, i + 1, axes[i]), layouts.Axis(1, 1, 1, (0, 0, 0))
  out = jnp.moveaxis(_sum_blocks(rows, w, tuple(axes)), 0, -2)  # [N, *space', G, O/o, o]
  out = out.reshape(*out.shape[:-2], out.shape[-2] * out.shape[-1])[..., : kernel[-1]]
  return layouts.result(map, out, x.shape, w_shape)


@functools.partial(jax.jit, static_argnames="axes", inline=True)  # equal layers are traced once
def _sum_blocks(rows: Array, blocks: Array, axes: tuple[layouts.Axis, ...]) -> Array:
  """Rows [N, *space, C, G] times blocks [steps, O/o, U, G, o] of U terms and o columns: [O/o, N,
  *space', G, o].
  """
  steps, chunks, terms, groups, width = blocks.shape
  per_tap = steps // math.prod(axis.taps for axis in axes)
  rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 2) + [(0, per_tap * terms - rows.shape[-2]), (0, 0)])
  space = [axis.num_windows(size) for axis, size in zip(axes, rows.shape[1:], strict=False)]
  spans = [(size - 1) * axis.stride + 1 for axis, size in zip(axes, space, strict=True)]
  shape = (chunks, rows.shape[0], *space, groups, width)
  if not steps or not math.prod(shape):
    return jnp.zeros(shape, rows.dtype)
  # Small results are summed in several parts side by side: fewer, longer steps.
  most = min(_MIN_WORK // math.prod(shape), steps // 4)
  parts = max((p for p in range(1, most + 1) if per_tap % p == 0), default=1)

  def step(t: Array, total: Array) -> Array:
    t = jnp.asarray(t, jnp.int32)  # without jit it is a plain int
    taps, block = t // (per_tap // parts), t % (per_tap // parts)
    offsets = []
    for axis in reversed(axes):
      offsets.append(taps % axis.taps * axis.dilation)
      taps = taps // axis.taps
    zero = jnp.zeros((), t.dtype)
    starts = (zero, *reversed(offsets), block * (parts * terms), zero)
    x = lax.dynamic_slice(rows, starts, (rows.shape[0], *spans, parts * terms, groups))
    x = lax.slice(x, [0] * x.ndim, x.shape, (1, *(axis.stride for axis in axes), 1, 1))
    x = jnp.moveaxis(
      x.reshape(*x.shape[:-2], parts, terms, groups), -3, 0
    )  # [parts, N, *space', U, G]
    w = _as_ring(lax.dynamic_slice_in_dim(blocks, t * jnp.int32(parts), parts), rows.dtype)
    w = jnp.expand_dims(w, tuple(range(2, rows.ndim)))  # [parts, O/o, 1, ..., U, G, o]
    for u in range(terms):
      total = total + x[:, None, ..., u, :, None] * w[..., u, :, :]
    return total

  start = jnp.zeros((parts, *shape), rows.dtype)
  return lax.fori_loop(jnp.int32(0), jnp.int32(steps // parts), step, start).sum(
    0, dtype=rows.dtype
  )


def _blocks(kernel: Array) -> Array:
  """[*window, C, G, O] as [steps, O/o, U, G, o]: U channels of one tap a step; zeros fill C, O."""
  folded = _num_folded(kernel.shape)
  *window, channels, groups, columns = kernel.shape
  channels *= math.prod(window[len(window) - folded :])
  kernel = kernel.reshape(math.prod(window[: len(window) - folded]), channels, groups, columns)
  terms = min(range(_MIN_TERMS, _MAX_TERMS + 1), key=lambda u: -(-channels // u) * u)
  chunks = max(1, -(-columns // _MAX_COLUMNS))
  width = columns if chunks == 1 else -(-columns // chunks // 8) * 8  # of whole vectors
  kernel = jnp.pad(kernel, ((0, 0), (0, -channels % terms), (0, 0), (0, chunks * width - columns)))
  steps = kernel.shape[0] * kernel.shape[1] // terms
  return jnp.moveaxis(kernel.reshape(steps, terms, groups, chunks, width), 3, 1)


def _num_folded(kernel: Sequence[int]) -> int:
  """How many last axes of the window become channels, which alone are too few."""
  window = len(kernel) - 3
  return next(
    (n for n in range(window) if math.prod(kernel[window - n : window + 1]) >= _MIN_TERMS), window
  )


def _patches(rows: Array, position: int, axis: layouts.Axis) -> Array:
  """Makes the windows along an axis channels: [N, *space, C, G] -> [N, *space', taps C, G]."""
  span = max(0, (axis.num_windows(rows.shape[position]) - 1) * axis.stride + 1)
  starts = [tap * axis.dilation for tap in range(axis.taps)]
  return jnp.concatenate(
    [lax.slice_in_dim(rows, i, i + span, axis.stride, position) for i in starts], axis=-2
  )


def _as_ring(w: Array, dtype: Any) -> Array:
  """Signed integers as ring elements."""
  return w.astype(jnp.int32 if dtype == jnp.uint32 else jnp.int64).astype(dtype)
