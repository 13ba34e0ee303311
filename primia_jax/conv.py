"""Convolution and pooling that stay fast under every transformation.

XLA:CPU has one fast convolution kernel. Only plain NHWC x HWIO -> NHWC convolutions reach it, on
maps at least as large as the kernel. Three things miss it and run 30 to 100 times slower: JAX's own
gradients (other dimension orders) inside `scan` or `while`, its batching rule (grouped
convolutions) under `vmap` with one kernel per site, and small maps. Here both gradients are again
plain convolutions, `vmap` runs one site after another, and small maps become a matrix product. On
accelerators XLA's own forms are fast, so they are used. All forms support reverse-mode
differentiation of any order; on CPU none supports forward mode.

Kernel gradients of 1x1 convolutions are matrix products too, up to twenty times faster. So are
gradients of a few images, as in attacks that differentiate a client's gradient again: as plain
convolutions they would have one input channel per image, or dilated images, and kernels larger than
the maps would be transposed. Convolution, input gradient and kernel gradient are linear in both
operands, and the gradients of each are the other two, whatever its form.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from primia_jax import patches, tapped
from primia_jax.patches import Geometry
from primia_jax.tapped import Tapped
from primia_jax.types import Array

_FEW = 4  # images, up to which gradients are faster as matrix products
_SMALL_KERNEL = 2**13  # elements, up to which restarts that share a kernel are, too


def conv(
  x: Array,
  w: Array | Tapped,
  *,
  strides: Sequence[int] = (1, 1),
  padding: str | Sequence[Sequence[int]] = "SAME",
  dilation: Sequence[int] = (1, 1),
) -> Array:
  """Two-dimensional convolution (cross-correlation), fast on CPU under jit, scan, vmap, grad and
  shard_map.

  Args:
    x: [B, H, W, C] images.
    w: [kh, kw, C, O] kernel, which may be tapped.
    strides: per spatial axis.
    padding: "SAME", "VALID", or (low, high) per spatial axis.
    dilation: pixels from one tap of the kernel to the next, per spatial axis.

  Returns:
    [B, H', W', O], equal to `lax.conv_general_dilated` up to rounding.

  Raises:
    ValueError: the ranks are not 4, or x and w differ in C.
  """
  if x.ndim != 4 or len(w.shape) != 4 or x.shape[3] != w.shape[2]:
    raise ValueError(
      f"conv takes x [B, H, W, C] and w [kh, kw, C, O], not {list(x.shape)} and {list(w.shape)}"
    )
  if isinstance(padding, str):
    seen = [(n - 1) * d + 1 for n, d in zip(w.shape[:2], dilation, strict=True)]
    padding = lax.padtype_to_pads(x.shape[1:3], seen, strides, padding)
  (top, bottom), (left, right) = padding
  geometry = Geometry(
    (int(strides[0]), int(strides[1])),
    ((int(top), int(bottom)), (int(left), int(right))),
    rhs_dilation=(int(dilation[0]), int(dilation[1])),
  )
  if isinstance(w, Tapped):
    rows = functools.partial(patches.patches, w_shape=w.shape, geometry=geometry)
    return tapped.linear(x, w, functools.partial(_apply, geometry=geometry), lambda x: rows(x)[0])
  return _apply(x, w, geometry)


def max_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
  """Maximum over square windows of [B, H, W, C]; drops incomplete windows at the far edges.

  Takes elementwise maxima of rows, then of columns. The gradient is then elementwise too; that of
  `lax.reduce_window` is a slow select-and-scatter on CPU. Equal maxima share the gradient.
  """
  return _reduce_windows(maximum, x, window, stride, padding, -jnp.inf)


def maximum(x: Array, y: Array | float) -> Array:
  """The larger of each pair; equal ones share the gradient. NaN stays.

  x and y are floats of one shape, or y is a single number. The derivative compares the operands
  with each other. That of `jnp.maximum` compares them with the maximum, and is lost where a
  compiler computes one of them again with another rounding.
  """
  return _maximum(x, jnp.asarray(y, x.dtype))


@jax.custom_jvp
def _maximum(x: Array, y: Array) -> Array:
  return jnp.maximum(x, y)


@_maximum.defjvp
def _maximum_jvp(
  primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
  (x, y), (dx, dy) = primals, tangents
  return _maximum(x, y), jnp.where(x > y, dx, jnp.where(y > x, dy, (dx + dy) / 2))


def mean_pool(x: Array, window: int, stride: int, padding: int = 0) -> Array:
  """Mean over square windows of [B, H, W, C], where padding counts as zeros; drops incomplete
  windows at the far edges.
  """
  return _reduce_windows(jnp.add, x, window, stride, padding, 0.0) / window**2


def _reduce_windows(
  operator: Callable[[Array, Array], Array],
  x: Array,
  window: int,
  stride: int,
  padding: int,
  fill: float,
) -> Array:
  if padding:
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=fill)
  for axis in (1, 2):
    last = x.shape[axis] - window + 1
    x = functools.reduce(
      operator, [lax.slice_in_dim(x, i, i + last, stride, axis) for i in range(window)]
    )
  return x


def _apply(x: Array, w: Array, geometry: Geometry) -> Array:
  if jax.default_backend() != "cpu":
    return _plain(x, w, geometry)
  return _conv(*same_varying_axes(x, w), geometry)


def same_varying_axes(x: Array, w: Array) -> tuple[Array, Array]:
  """Inside `shard_map`, casts a replicated operand to vary like the other, so that its gradient is
  summed over devices.
  """
  x_axes, w_axes = (jax.typeof(a).manual_axis_type.varying for a in (x, w))
  if w_axes - x_axes:
    x = lax.pcast(x, tuple(w_axes - x_axes), to="varying")
  if x_axes - w_axes:
    w = lax.pcast(w, tuple(x_axes - w_axes), to="varying")
  return x, w


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: Array, w: Array, geometry: Geometry) -> Array:
  of_few = functools.partial(_matrix_product, geometry=geometry)
  return _site_by_site(functools.partial(_fastest, geometry=geometry), of_few, x, w)


def _conv_fwd(x: Array, w: Array, geometry: Geometry) -> tuple[Array, tuple[Array, Array]]:
  return _conv(x, w, geometry), (x, w)


def _conv_bwd(geometry: Geometry, residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, w = residuals
  return _input_gradient(g, w, x.shape, geometry), _kernel_gradient(x, g, w.shape, geometry)


_conv.defvjp(_conv_fwd, _conv_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _input_gradient(g: Array, w: Array, x_shape: tuple[int, ...], geometry: Geometry) -> Array:
  if x_shape[0] <= _FEW and (max(geometry.strides) > 1 or _is_large(w.shape, g.shape)):
    return _rows_sum(g, w, x_shape, geometry)
  padding = []
  for axis in range(2):
    x_size, w_size, g_size = _dilated_sizes(x_shape, w.shape, g.shape, geometry, axis)
    low = w_size - 1 - geometry.padding[axis][0]
    padding.append((low, x_size + w_size - 1 - g_size - low))
  transposed = Geometry(
    geometry.lhs_dilation, (padding[0], padding[1]), geometry.strides, geometry.rhs_dilation
  )
  return _conv(g, w[::-1, ::-1].transpose(0, 1, 3, 2), transposed)


def _input_gradient_fwd(
  g: Array, w: Array, x_shape: tuple[int, ...], geometry: Geometry
) -> tuple[Array, tuple[Array, Array]]:
  return _input_gradient(g, w, x_shape, geometry), (g, w)


def _input_gradient_bwd(
  x_shape: tuple[int, ...], geometry: Geometry, residuals: tuple[Array, Array], x: Array
) -> tuple[Array, Array]:
  g, w = residuals
  return _conv(x, w, geometry), _kernel_gradient(x, g, w.shape, geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kernel_gradient(x: Array, g: Array, w_shape: tuple[int, ...], geometry: Geometry) -> Array:
  if x.shape[0] <= _FEW or _is_pointwise(w_shape, geometry):
    return _rows_product(x, g, w_shape, geometry)
  padding = []
  for axis in range(2):
    x_size, w_size, g_size = _dilated_sizes(x.shape, w_shape, g.shape, geometry, axis)
    low = geometry.padding[axis][0]
    padding.append((low, g_size + w_size - 1 - x_size - low))
  transposed = Geometry(
    geometry.rhs_dilation, (padding[0], padding[1]), geometry.lhs_dilation, geometry.strides
  )
  return _conv(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), transposed).transpose(1, 2, 0, 3)


def _kernel_gradient_fwd(
  x: Array, g: Array, w_shape: tuple[int, ...], geometry: Geometry
) -> tuple[Array, tuple[Array, Array]]:
  return _kernel_gradient(x, g, w_shape, geometry), (x, g)


def _kernel_gradient_bwd(
  w_shape: tuple[int, ...], geometry: Geometry, residuals: tuple[Array, Array], w: Array
) -> tuple[Array, Array]:
  x, g = residuals
  return _input_gradient(g, w, x.shape, geometry), _conv(x, w, geometry)


_input_gradient.defvjp(_input_gradient_fwd, _input_gradient_bwd)
_kernel_gradient.defvjp(_kernel_gradient_fwd, _kernel_gradient_bwd)


def _rows_product(x: Array, g: Array, w_shape: tuple[int, ...], geometry: Geometry) -> Array:
  """The kernel gradient of a few images, as patches [B H' W', kh kw C], transposed, times g. As a
  convolution it would have as few input channels as there are images, and XLA would be slow.
  """
  rows = patches.windows(x, w_shape, geometry)
  rows, g = rows.reshape(-1, rows.shape[3]), g.reshape(-1, w_shape[3])
  if w_shape[3] >= len(rows):
    return (rows.T @ g).reshape(w_shape)
  # copies g and the product instead of the rows, which are more
  return (g.T @ rows).reshape(w_shape[3], *w_shape[:3]).transpose(1, 2, 3, 0)


def _rows_sum(g: Array, w: Array, x_shape: tuple[int, ...], geometry: Geometry) -> Array:
  """The input gradient of a few images: the sum of the patches g w^T at their places, or without
  these patches where that is not much more work.
  """
  work = math.prod(-(-w.shape[a] // s) * s for a, s in enumerate(geometry.strides))
  is_plain = geometry.lhs_dilation == geometry.rhs_dilation == (1, 1)
  is_cheap = work <= 1.5 * w.shape[0] * w.shape[1] and not _is_large(w.shape, g.shape)
  if is_plain and is_cheap:
    return _by_phases(g, w, x_shape, geometry)
  rows = lambda x: patches.patches(x, w.shape, geometry)[0]
  place = jax.linear_transpose(rows, jax.ShapeDtypeStruct(x_shape, g.dtype))
  w, g = w.reshape(-1, w.shape[3]), g.reshape(-1, w.shape[3])
  # not g @ w.T: XLA would copy the transposed kernel, at the pace of memory
  return place(lax.dot_general(w, g, (((1,), (1,)), ((), ()))).T)[0]


def _by_phases(g: Array, w: Array, x_shape: tuple[int, ...], geometry: Geometry) -> Array:
  """The input gradient as one convolution without stride: pixel s a + p of the images is the sum
  over j of g[a - j] w[s j + p], so each phase p has a kernel of its own, side by side in channels.
  """
  padding, sizes, starts = [], [], []
  for axis, s in enumerate(geometry.strides):
    taps, low = -(-w.shape[2 * axis] // s), geometry.padding[axis][0]
    more = taps * s - w.shape[2 * axis]
    w = jnp.pad(w, [(0, more if a == 2 * axis else 0) for a in range(w.ndim)])
    w = w.reshape(*w.shape[: 2 * axis], taps, s, *w.shape[2 * axis + 1 :])
    first, last = low // s, (low + x_shape[1 + axis] - 1) // s
    padding.append((taps - 1 - first, last + 1 - g.shape[1 + axis]))
    sizes.append(last + 1 - first)
    starts.append(low - s * first)
  th, sh, tw, sw, channels, features = w.shape
  kernel = w[::-1, :, ::-1].transpose(0, 2, 5, 1, 3, 4).reshape(th, tw, features, -1)
  y = _conv(g, kernel, Geometry((1, 1), (padding[0], padding[1])))
  y = y.reshape(-1, *sizes, sh, sw, channels).transpose(0, 1, 3, 2, 4, 5)
  y = y.reshape(len(y), sizes[0] * sh, sizes[1] * sw, channels)
  (top, left), (_, height, width, _) = starts, x_shape
  return y[:, top : top + height, left : left + width]


def _is_large(w_shape: Sequence[int], g_shape: Sequence[int]) -> bool:
  """Whether a kernel is larger than the patches that it sees, so that these are copied and added
  instead of transposing it.
  """
  return w_shape[3] >= math.prod(g_shape[:3])


def _is_pointwise(w_shape: Sequence[int], geometry: Geometry) -> bool:
  """Whether patches are the images themselves."""
  return tuple(w_shape[:2]) == (1, 1) and geometry == Geometry((1, 1), ((0, 0), (0, 0)))


def _dilated_sizes(
  x_shape: Sequence[int],
  w_shape: Sequence[int],
  g_shape: Sequence[int],
  geometry: Geometry,
  axis: int,
) -> tuple[int, int, int]:
  """The sizes, along a spatial axis, of images, kernel and gradient after dilation."""
  return (
    (x_shape[1 + axis] - 1) * geometry.lhs_dilation[axis] + 1,
    (w_shape[axis] - 1) * geometry.rhs_dilation[axis] + 1,
    (g_shape[1 + axis] - 1) * geometry.strides[axis] + 1,
  )


def _site_by_site(
  fn: Callable[[Array, Array], Array], of_few: Callable[[Array, Array], Array], x: Array, w: Array
) -> Array:
  """fn(x, w). Under `vmap` it runs fn site by site; if sites share the kernel, on one large batch;
  and if they have few images each, of_few on all of them.
  """

  @jax.custom_batching.custom_vmap
  def run(x: Array, w: Array) -> Array:
    return fn(x, w)

  @run.def_vmap
  def rule(axis_size: int, in_batched: Sequence[bool], x: Array, w: Array) -> tuple[Array, bool]:
    x_batched, w_batched = in_batched
    if x_batched and not w_batched:
      is_small = x.shape[1] <= _FEW and w.size <= _SMALL_KERNEL
      y = (of_few if is_small else run)(x.reshape(-1, *x.shape[2:]), w)
      return y.reshape(axis_size, -1, *y.shape[1:]), True
    if w_batched and not x_batched:
      return lax.map(lambda w: run(x, w), w), True
    if x.shape[1] <= _FEW:
      return jax.vmap(of_few)(x, w), True
    return lax.map(lambda operands: run(*operands), (x, w)), True

  return run(x, w)


def _fastest(x: Array, w: Array, geometry: Geometry) -> Array:
  seen, cropped = patches.crop(x, geometry)
  fits = all(
    (w.shape[a] - 1) * cropped.rhs_dilation[a] < seen.shape[1 + a] * cropped.lhs_dilation[a]
    for a in range(2)
  )
  # XLA swaps a map (measured before dilation) with a larger kernel. It then misses its fast form,
  # or aborts if only one of the two axes is affected.
  smaller = any(seen.shape[1 + a] < w.shape[a] for a in range(2))
  return _plain(seen, w, cropped) if fits and not smaller else _matrix_product(x, w, geometry)


def _plain(x: Array, w: Array, geometry: Geometry) -> Array:
  return lax.conv_general_dilated(
    x,
    w,
    geometry.strides,
    geometry.padding,
    geometry.lhs_dilation,
    geometry.rhs_dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _matrix_product(x: Array, w: Array, geometry: Geometry) -> Array:
  """The same convolution, as patches [B H' W', kh kw C] times the kernel [kh kw C, O]."""
  windows = patches.windows(x, w.shape, geometry)
  y = windows.reshape(-1, windows.shape[3]) @ w.reshape(-1, w.shape[3])
  return y.reshape(*windows.shape[:3], w.shape[3])
