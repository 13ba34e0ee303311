"""Depthwise convolution, one kernel for each channel, that stays fast under every transformation.

XLA:CPU runs a grouped convolution group by group, and its gradients slower still. Here C does all
taps in one pass (`native`; depthwise.c). Without it, and for other dtypes than float32, sums of
shifted images do. On accelerators XLA's own forms are fast, so they are used; so does encrypted
inference, which knows grouped convolutions.

Convolution, input gradient and kernel gradient are linear in both operands, and the gradients of
each are the other two: reverse-mode differentiation of any order works everywhere, and forward mode
nowhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import native
from primia_jax.conv import same_varying_axes
from primia_jax.patches import Geometry, Pair
from primia_jax.types import Array


def depthwise(
  x: Array,
  w: Array,
  *,
  strides: Sequence[int] = (1, 1),
  padding: str | Sequence[Sequence[int]] = "SAME",
) -> Array:
  """Two-dimensional convolution (cross-correlation) of each channel with its own kernel.

  Args:
    x: [B, H, W, C] images.
    w: [kh, kw, C] kernels, not tapped.
    strides: per spatial axis.
    padding: "SAME", "VALID", or (low, high) per spatial axis, not negative.

  Returns:
    [B, H', W', C], equal to `lax.conv_general_dilated` with C groups of features, up to rounding.

  Raises:
    ValueError: the ranks are not 4 and 3, x and w differ in C or dtype, w is tapped, padding is
      negative, or the kernel is larger than the padded images.
  """
  if not isinstance(w, jax.Array | np.ndarray):
    raise ValueError(f"depthwise takes an array as kernel, not a {type(w).__name__}")
  if x.ndim != 4 or w.ndim != 3 or x.shape[3] != w.shape[2] or x.dtype != w.dtype:
    raise ValueError(
      "depthwise takes x [B, H, W, C] and w [kh, kw, C] of one dtype, not "
      f"{x.dtype}{list(x.shape)} and {w.dtype}{list(w.shape)}"
    )
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(x.shape[1:3], w.shape[:2], strides, padding)
  (top, bottom), (left, right) = padding
  geometry = Geometry(
    (int(strides[0]), int(strides[1])), ((int(top), int(bottom)), (int(left), int(right)))
  )
  sizes = _sizes(x.shape, w.shape, geometry)
  if min(top, bottom, left, right) < 0 or min(sizes) < 1:
    raise ValueError(
      f"padding={geometry.padding} of x {list(x.shape)} for w {list(w.shape)} must not be "
      "negative, and must make x at least as large as w"
    )
  return _forward(*same_varying_axes(x, w), geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _forward(x: Array, w: Array, geometry: Geometry) -> Array:
  shape = (x.shape[0], *_sizes(x.shape, w.shape, geometry), x.shape[3])
  return _fastest(
    functools.partial(_in_c, shape=shape, geometry=geometry),
    functools.partial(_shifts, geometry=geometry),
    functools.partial(_grouped, geometry=geometry),
    x,
    w,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _input_gradient(g: Array, w: Array, size: Pair, geometry: Geometry) -> Array:
  """The gradient of x [B, *size, C] from that of the result, g."""
  shape = (g.shape[0], *size, g.shape[3])
  return _fastest(
    functools.partial(_in_c, shape=shape, geometry=geometry, transposed=True),
    functools.partial(_transposed_shifts, size=size, geometry=geometry),
    lambda g, w: jax.vjp(lambda x: _grouped(x, w, geometry), _zeros(shape, g))[1](g)[0],
    g,
    w,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kernel_gradient(x: Array, g: Array, window: Pair, geometry: Geometry) -> Array:
  """The gradient of w [*window, C] from that of the result, g."""
  shape = (*window, x.shape[3])
  in_c = functools.partial(_in_c, shape=(x.shape[0], *shape), geometry=geometry, of_kernel=True)
  return _fastest(
    lambda x, g: in_c(x, g).sum(0),
    functools.partial(_products_of_shifts, window=window, geometry=geometry),
    lambda x, g: jax.vjp(lambda w: _grouped(x, w, geometry), _zeros(shape, g))[1](g)[0],
    x,
    g,
  )


def _forward_fwd(x: Array, w: Array, geometry: Geometry) -> tuple[Array, tuple[Array, Array]]:
  return _forward(x, w, geometry), (x, w)


def _forward_bwd(
  geometry: Geometry, residuals: tuple[Array, Array], g: Array
) -> tuple[Array, Array]:
  x, w = residuals
  towards_x = _input_gradient(g, w, x.shape[1:3], geometry)
  return towards_x, _kernel_gradient(x, g, w.shape[:2], geometry)


def _input_gradient_fwd(
  g: Array, w: Array, size: Pair, geometry: Geometry
) -> tuple[Array, tuple[Array, Array]]:
  return _input_gradient(g, w, size, geometry), (g, w)


def _input_gradient_bwd(
  size: Pair, geometry: Geometry, residuals: tuple[Array, Array], x: Array
) -> tuple[Array, Array]:
  g, w = residuals
  return _forward(x, w, geometry), _kernel_gradient(x, g, w.shape[:2], geometry)


def _kernel_gradient_fwd(
  x: Array, g: Array, window: Pair, geometry: Geometry
) -> tuple[Array, tuple[Array, Array]]:
  return _kernel_gradient(x, g, window, geometry), (x, g)


def _kernel_gradient_bwd(
  window: Pair, geometry: Geometry, residuals: tuple[Array, Array], w: Array
) -> tuple[Array, Array]:
  x, g = residuals
  return _input_gradient(g, w, x.shape[1:3], geometry), _forward(x, w, geometry)


_forward.defvjp(_forward_fwd, _forward_bwd)
_input_gradient.defvjp(_input_gradient_fwd, _input_gradient_bwd)
_kernel_gradient.defvjp(_kernel_gradient_fwd, _kernel_gradient_bwd)


def _fastest(in_c: Callable, shifts: Callable, grouped: Callable, a: Array, b: Array) -> Array:
  """The form for the platform that it is compiled for."""
  is_native = a.dtype == jnp.float32 and native.available()
  return lax.platform_dependent(a, b, cpu=in_c if is_native else shifts, default=grouped)


def _in_c(
  a: Array,
  b: Array,
  shape: tuple[int, ...],
  geometry: Geometry,
  transposed: bool = False,
  of_kernel: bool = False,
) -> Array:
  (top, _), (left, _) = geometry.padding
  numbers = np.array([*geometry.strides, top, left, transposed], np.int64)
  return _varying_like(a, native.depthwise(a, b, shape, numbers, of_kernel))


def _zeros(shape: tuple[int, ...], like: Array) -> Array:
  return _varying_like(like, jnp.zeros(shape, like.dtype))


def _varying_like(a: Array, out: Array) -> Array:
  """Inside `shard_map`, a result that varies over the mesh axes of an operand: constants and
  foreign calls have lost them.
  """
  axes = jax.typeof(a).manual_axis_type.varying - jax.typeof(out).manual_axis_type.varying
  return lax.pcast(out, tuple(axes), to="varying") if axes else out


def _shifts(x: Array, w: Array, geometry: Geometry) -> Array:
  padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *_interior(geometry), (0, 0, 0)])
  kh, kw, _ = w.shape
  seen = _windows(padded, (kh, kw), geometry.strides)
  return functools.reduce(jnp.add, (v * w[i, j][None, None, None] for (i, j), v in seen))


def _transposed_shifts(g: Array, w: Array, size: Pair, geometry: Geometry) -> Array:
  """The convolution of g, with zeros between its elements, with the reversed kernel."""
  padding = []
  for axis in range(2):
    low = w.shape[axis] - 1 - geometry.padding[axis][0]
    dilated = (g.shape[1 + axis] - 1) * geometry.strides[axis] + 1
    padding.append((low, size[axis] + w.shape[axis] - 1 - dilated - low))
  return _shifts(g, w[::-1, ::-1], Geometry((1, 1), (padding[0], padding[1]), geometry.strides))


def _products_of_shifts(x: Array, g: Array, window: Pair, geometry: Geometry) -> Array:
  padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *_interior(geometry), (0, 0, 0)])
  end = [(n - 1) * s + k for n, s, k in zip(g.shape[1:3], geometry.strides, window, strict=True)]
  seen = _windows(padded[:, : end[0], : end[1]], window, geometry.strides)
  return jnp.stack([(v * g).sum((0, 1, 2)) for _, v in seen]).reshape(*window, -1)


def _windows(x: Array, window: Pair, strides: Pair) -> list[tuple[Pair, Array]]:
  """For each tap, the images that it sees."""
  stop = [n - k + 1 for n, k in zip(x.shape[1:3], window, strict=True)]
  return [
    ((i, j), x[:, i : i + stop[0] : strides[0], j : j + stop[1] : strides[1]])
    for i, j in np.ndindex(*window)
  ]


def _interior(geometry: Geometry) -> list[tuple[int, int, int]]:
  dilated = zip(geometry.padding, geometry.lhs_dilation, strict=True)
  return [(low, high, dilation - 1) for (low, high), dilation in dilated]


def _grouped(x: Array, w: Array, geometry: Geometry) -> Array:
  return lax.conv_general_dilated(
    x,
    w[:, :, None],
    geometry.strides,
    geometry.padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[3],
  )


def _sizes(x_shape: Sequence[int], w_shape: Sequence[int], geometry: Geometry) -> Pair:
  """(H', W') of the result."""
  height, width = (
    (x_shape[1 + a] + sum(geometry.padding[a]) - w_shape[a]) // geometry.strides[a] + 1
    for a in range(2)
  )
  return height, width
