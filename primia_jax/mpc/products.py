"""Exact bilinear maps (convolution, dot_general, product) of ring elements, in whatever arithmetic
is fast.

XLA has no good integer matrix product for wide integers. Three forms replace it, all exact modulo
2^k:

- "integer": multiply-add of the ring elements themselves, wrapping around in their own dtype, as
  elementwise operations on sixteen terms of the contraction at a time. XLA:CPU compiles these to a
  tight vector loop: 64-bit products at half the speed of a float32 convolution, 32-bit ones at its
  full speed, and neither operand is split.
- "float64": digits small enough that sums of their products are integers below 2^53; one float64
  convolution a pair.
- "int8": balanced digits of 8 bits, int8 x int8 -> int32 convolutions.

Pairs of digits whose place is at or beyond 2^k are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax

from primia_jax import ring
from primia_jax.types import Array

Form = Literal["integer", "float64", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)


class Map(NamedTuple):
  """A bilinear map of JAX, static and hashable.

  Attributes:
    name: "conv_general_dilated", "dot_general" or "mul" (elementwise, of equal shapes).
    params: the primitive's parameters as (name, value) pairs, for instance
      `tuple(eqn.params.items())` of a jaxpr's equation with hashable values; precision and element
      types are ignored.
  """

  name: str
  params: tuple[tuple[str, Any], ...] = ()


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["digits"], meta_fields=["form", "shape", "w_bits"]
)
@dataclasses.dataclass(frozen=True)
class Operand:
  """A right-hand operand made ready for repeated products; a pytree whose leaves are arrays.

  Attributes:
    digits: what the form multiplies by: one array ("integer"), or one a digit, lowest first.
    form: the form it is made for.
    shape: of the operand.
    w_bits: as given to `split`.
  """

  digits: tuple[Array, ...]
  form: Form
  shape: tuple[int, ...]
  w_bits: int


def apply(map: Map, x: Array, w: Array, dtype: Any = None) -> Array:
  """The plain XLA operation on operands of one dtype, accumulated in `dtype` (default: theirs);
  good for shapes too.
  """
  p = dict(map.params)
  if map.name == "mul":
    return (x if dtype is None else x.astype(dtype)) * (w if dtype is None else w.astype(dtype))
  if map.name == "dot_general":
    return lax.dot_general(x, w, p["dimension_numbers"], preferred_element_type=dtype)
  if map.name != "conv_general_dilated":
    raise ValueError(
      f"{map.name!r} is not a bilinear map known here: conv_general_dilated, dot_general or mul"
    )
  known = (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
  )
  return lax.conv_general_dilated(
    x, w, **{name: p[name] for name in known if name in p}, preferred_element_type=dtype
  )


def choose(map: Map, w_shape: Sequence[int], w_bits: int, num_bits: int) -> Form:
  """The fastest form on the default backend, by `benchmarks/ring_products.py` on CPU.

  There "integer" is ahead for every layer of a ResNet and for large matrices, in every ring and for
  weights of any size. Accelerators have no such loop: GPUs compute in float64 (where x64 is on),
  TPUs in int8.
  """
  if map.name == "mul" or jax.default_backend() == "cpu":
    return "integer"
  x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
  if jax.default_backend() == "tpu" or not x64:
    return "int8" if num_bits <= 32 or _fan_in(map, w_shape) <= _INT8_FAN_IN else "float64"
  return "float64"


def split(map: Map, w: Array, w_bits: int, num_bits: int, form: Form | None = None) -> Operand:
  """Makes a right-hand operand ready for `multiply`; worth doing once where it is used repeatedly.

  Args:
    map: the bilinear map it will be used in.
    w: int32, uint32 (k <= 32), int64 or uint64 ring elements. Bits above k are ignored.
    w_bits: k for any ring elements; less promises |w| < 2^(w_bits - 1) as signed numbers, and fewer
      digits.
    num_bits: k of the ring Z_2^k.
    form: default as `choose` has it.

  Raises:
    ValueError: w_bits, num_bits or the form do not fit each other or the fan-in, or w is larger
      than w_bits promises. The last is checked only where w is concrete: under jit a broken promise
      gives wrong products.
  """
  if not 2 <= w_bits <= num_bits <= 64:
    raise ValueError(
      f"w_bits={w_bits} and num_bits={num_bits}: needed are 2 <= w_bits <= num_bits <= 64"
    )
  form = choose(map, w.shape, w_bits, num_bits) if form is None else form
  if form not in FORMS:
    raise ValueError(f"form={form!r} is none of {', '.join(FORMS)}")
  if form == "float64" and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ValueError(
      "form='float64' needs x64: set JAX_ENABLE_X64=1 (or jax_enable_x64), or take another form"
    )
  if not jnp.issubdtype(w.dtype, jnp.integer):
    raise ValueError(f"w has dtype {w.dtype}; integers are needed: encode it first")
  signed = _sign_extended(w, num_bits)
  if w_bits < num_bits and w.size and not isinstance(w, jax.core.Tracer):
    low, high = int(jnp.min(signed)), int(jnp.max(signed))
    if max(-low, high) >= 2 ** (w_bits - 1):
      raise ValueError(
        f"w reaches from {low} to {high}, which is not below 2^{w_bits - 1} as w_bits={w_bits} "
        f"promises"
      )
  digits: tuple[Array, ...]
  if form == "integer":
    # Small weights take half the memory, which is what bounds layers with more weights than pixels.
    narrow = signed.astype(jnp.int32) if w_bits <= 32 else signed
    digits = (narrow if map.name == "mul" else _blocks(_kernel(map, narrow)),)
  elif form == "float64":
    _, bits, _, count = _float_digits(_fan_in(map, w.shape), w_bits, num_bits)
    digits = tuple(d.astype(jnp.float64) for d in _digits(signed.astype(jnp.int64), bits, count))
  else:
    if num_bits > 32 and _fan_in(map, w.shape) > _INT8_FAN_IN:
      raise ValueError(
        f"int8 sums at most {_INT8_FAN_IN} products exactly, not {_fan_in(map, w.shape)}; use "
        f"float64"
      )
    digits = tuple(
      d.astype(jnp.int8) for d in _digits(signed, 8, min(-(-num_bits // 8), w_bits // 8 + 1))
    )
  return Operand(digits, form, tuple(w.shape), w_bits)


def multiply(map: Map, x: Array, w: Operand, num_bits: int) -> Array:
  """map(x, w) modulo 2^k, exactly.

  Args:
    map: as given to `split`.
    x: ring elements, uint32 for k <= 32, else uint64; bits above k are ignored.
    w: from `split`.
    num_bits: k, as given to `split`.

  Returns:
    Ring elements of the map's shape, in x's dtype. Bits above k are unspecified: see `ring.reduce`.

  Raises:
    ValueError: x is of another dtype.
  """
  dtype = ring.storage(num_bits)
  if x.dtype != dtype:
    raise ValueError(f"x has dtype {x.dtype}; elements of a ring of {num_bits} bits are {dtype}")
  if w.form == "integer":
    return _integer(map, x, w)
  signed = _sign_extended(x, num_bits)
  if w.form == "float64":
    x_bits, w_bits, count, _ = _float_digits(_fan_in(map, w.shape), w.w_bits, num_bits)
    digits = [d.astype(jnp.float64) for d in _digits(signed.astype(jnp.int64), x_bits, count)]
    wide, accumulator = jnp.dtype(jnp.int64), None
  else:
    x_bits, w_bits = 8, 8
    digits = [d.astype(jnp.int8) for d in _digits(signed, 8, -(-num_bits // 8))]
    wide, accumulator = signed.dtype, jnp.int32
  total = None
  for i, a in enumerate(digits):
    for j, b in enumerate(w.digits):
      place = x_bits * i + w_bits * j
      if place < num_bits:
        term = apply(map, a, b, accumulator).astype(wide) << jnp.asarray(place, wide)
        total = term if total is None else total + term
  assert total is not None
  return total.astype(dtype)


def product(map: Map, x: Array, y: Array, num_bits: int, form: Form | None = None) -> Array:
  """map(x, y) modulo 2^k of two arrays of ring elements; as `multiply` in everything."""
  return multiply(map, x, split(map, y, num_bits, num_bits, form), num_bits)


# --- Digits.

_INT8_FAN_IN = 2**17 - 1  # products of up to 2^14 in magnitude, summed in int32


def _sign_extended(v: Array, num_bits: int) -> Array:
  """The signed numbers, modulo 2^k, that integers of any dtype stand for: int32 for k <= 32, else
  int64.
  """
  signed = jnp.dtype(f"int{ring.storage(num_bits).itemsize * 8}")
  unused = jnp.asarray(signed.itemsize * 8 - num_bits, signed)
  return v.astype(signed) << unused >> unused


def _digits(v: Array, bits: int, count: int) -> list[Array]:
  """Balanced digits of signed numbers: v = sum d_i 2^(bits i), -2^(bits-1) <= d_i < 2^(bits-1) but
  for the last.
  """
  half, place = jnp.asarray(2 ** (bits - 1), v.dtype), jnp.asarray(bits, v.dtype)
  digits = []
  for _ in range(count - 1):
    low = (v + half & half + half - jnp.ones((), v.dtype)) - half
    digits.append(low)
    v = (v >> place) + (low < 0).astype(v.dtype)  # not (v - low) >> place, which could overflow
  return [*digits, v]


@functools.cache
def _float_digits(fan_in: int, w_bits: int, num_bits: int) -> tuple[int, int, int, int]:
  """(bits of x's digits, of w's, how many of x's, of w's): the fewest pairs that are exact in
  float64.

  Balanced digits of a and b bits are at most 2^(a-1) and 2^(b-1) in magnitude, and fan_in 2^(a+b-2)
  <= 2^53 must hold.
  """
  plans = []
  for w_count in range(1, w_bits + 1):
    b = -(-w_bits // w_count)
    a = min((2**53 // max(fan_in, 1)).bit_length() + 1 - b, num_bits)
    if a >= 2:
      x_count = -(-num_bits // a)
      pairs = sum(a * i + b * j < num_bits for i in range(x_count) for j in range(w_count))
      plans.append((pairs, a, b, x_count, w_count))
  if not plans:
    raise ValueError(f"no digits are small enough for exact sums of {fan_in} products in float64")
  return min(plans)[1:]


def _fan_in(map: Map, w_shape: Sequence[int]) -> int:
  """How many products each element of the result sums."""
  if map.name == "mul":
    return 1
  p = dict(map.params)
  if map.name == "dot_general":
    return math.prod(w_shape[a] for a in p["dimension_numbers"][0][1])
  return math.prod(w_shape) // w_shape[p["dimension_numbers"].rhs_spec[0]]


# --- The integer form. One shape for all maps: x [N, *space, C, G] times w [*window, C, G, O] is
# [N, *space', G, O]. Groups G are independent of each other, N and O are the free dimensions; C is
# summed over, and so is the window.

# Terms in one loop. A slice with 16 users or more XLA copies first, where one with fewer it indexes
# anew for every product, eight times slower (jaxlib 0.10); the copies of more than 24 terms do not
# fit the vector registers.
_MIN_TERMS, _MAX_TERMS = 16, 24
_MAX_COLUMNS = 128  # of w in one loop: a block of more does not fit the innermost cache
_MIN_WORK = (
  2**17
  # elements of the result in one step, where there can be that many: each step has a cost of its
  # own
)


class _Axis(NamedTuple):
  """A spatial axis: the window along it, and (low, high, interior) padding of x."""

  taps: int
  stride: int
  dilation: int
  padding: tuple[int, int, int]

  def num_windows(self, size: int) -> int:
    """How many windows there are in the padded x."""
    return max(0, (size - (self.taps - 1) * self.dilation - 1) // self.stride + 1)


def _integer(map: Map, x: Array, w: Operand) -> Array:
  if map.name == "mul":
    return x * _as_ring(w.digits[0], x.dtype)
  axes = _axes(map, w.shape)
  rows = _rows(map, x)
  rows = lax.pad(
    rows,
    jnp.zeros((), x.dtype),
    [(0, 0, 0), *(axis.padding for axis in axes), (0, 0, 0), (0, 0, 0)],
  )
  kernel = jax.eval_shape(lambda w: _kernel(map, w), jax.ShapeDtypeStruct(w.shape, x.dtype)).shape
  for i in reversed(range(len(axes) - _num_folded(kernel), len(axes))):
    rows, axes[i] = _patches(rows, i + 1, axes[i]), _Axis(1, 1, 1, (0, 0, 0))
  out = jnp.moveaxis(_sum_blocks(rows, w.digits[0], axes), 0, -2)  # [N, *space', G, O/o, o]
  out = out.reshape(*out.shape[:-2], out.shape[-2] * out.shape[-1])[..., : kernel[-1]]
  return _result(map, out, x.shape, w.shape)


def _sum_blocks(rows: Array, blocks: Array, axes: Sequence[_Axis]) -> Array:
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
  # Small results are summed in several parts side by side, for fewer and longer steps.
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
  """[*window, C, G, O] as [steps, O/o, U, G, o]: a step is U channels of one tap. Zeros fill C and
  O.
  """
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
  """How many of the last axes of the window are made channels, which are too few otherwise; from
  [*window, C, G, O].
  """
  window = len(kernel) - 3
  return next(
    (n for n in range(window) if math.prod(kernel[window - n : window + 1]) >= _MIN_TERMS), window
  )


def _patches(rows: Array, position: int, axis: _Axis) -> Array:
  """Makes the windows along an axis channels: [N, *space, C, G] to [N, *space', taps C, G]."""
  span = max(0, (axis.num_windows(rows.shape[position]) - 1) * axis.stride + 1)
  starts = [tap * axis.dilation for tap in range(axis.taps)]
  return jnp.concatenate(
    [lax.slice_in_dim(rows, i, i + span, axis.stride, position) for i in starts], axis=-2
  )


def _as_ring(w: Array, dtype: Any) -> Array:
  """Signed integers as ring elements."""
  return w.astype(jnp.int32 if dtype == jnp.uint32 else jnp.int64).astype(dtype)


def _axes(map: Map, w_shape: Sequence[int]) -> list[_Axis]:
  if map.name == "dot_general":
    return []
  p = dict(map.params)
  ones = (1,) * (len(w_shape) - 2)
  dilated = p.get("lhs_dilation") or ones
  taps = [w_shape[a] for a in p["dimension_numbers"].rhs_spec[2:]]
  padding = [(low, high, d - 1) for (low, high), d in zip(p["padding"], dilated, strict=True)]
  values = zip(taps, p["window_strides"], p.get("rhs_dilation") or ones, padding, strict=True)
  return [_Axis(*each) for each in values]


def _free(ndim: int, contracted: Sequence[int], batch: Sequence[int]) -> list[int]:
  """The axes of a dot_general's operand that are neither summed over nor shared with the other."""
  return [a for a in range(ndim) if a not in (*contracted, *batch)]


def _flattened(v: Array, *groups: Sequence[int]) -> Array:
  """v with one axis for each group of axes."""
  sizes = [math.prod(v.shape[a] for a in axes) for axes in groups]
  return v.transpose(*(a for axes in groups for a in axes)).reshape(sizes)


def _kernel(map: Map, w: Array) -> Array:
  """The right-hand operand as [*window, C, G, O]."""
  p = dict(map.params)
  if map.name == "dot_general":
    (_, contracted), (_, batch) = p["dimension_numbers"]
    return _flattened(w, contracted, batch, _free(w.ndim, contracted, batch))
  out, channels, *window = p["dimension_numbers"].rhs_spec
  w = w.transpose(*window, channels, out)
  groups = p.get("feature_group_count", 1) * p.get(
    "batch_group_count", 1
  )  # at least one of them is 1
  return w.reshape(*w.shape[:-1], groups, w.shape[-1] // groups)


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


def _result(map: Map, y: Array, x_shape: Sequence[int], w_shape: Sequence[int]) -> Array:
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
