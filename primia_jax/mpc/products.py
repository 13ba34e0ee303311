"""Exact bilinear maps (convolution, dot_general, product) of ring elements, in whatever arithmetic
is fast.

XLA has no good matrix product for wide integers. Four forms replace it, all exact modulo 2^k:

- "integer": multiply-add of the ring elements themselves, wrapping around in their own dtype, as
  elementwise operations on sixteen terms of the contraction at a time. XLA:CPU compiles these to a
  tight vector loop: 32-bit products at the full speed of a float32 convolution, and 64-bit ones at
  half of it where the CPU multiplies 64-bit vectors (AVX-512DQ). Neither operand is split.
- "halves": 64-bit products from those of 32-bit halves, in C. AVX2 has no other, and XLA's loop
  takes 2 to 2.7 times as long there.
- "float64": digits so small that sums of their products are integers below 2^53; one float64
  convolution for each pair.
- "int8": balanced digits of 8 bits, int8 x int8 -> int32 convolutions.

Pairs of digits whose place is at or beyond 2^k are left out.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from primia_jax import native, ring
from primia_jax.mpc import half_products, integer_products, layouts
from primia_jax.mpc.maps import Map, apply
from primia_jax.ring import signed
from primia_jax.types import Array

Form = Literal["integer", "halves", "float64", "int8"]
FORMS: tuple[Form, ...] = get_args(Form)
_MIN_COLUMNS = 4  # for which a vector of eight is worth it


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=["digits"], meta_fields=["form", "shape", "w_bits"]
)
@dataclasses.dataclass(frozen=True)
class Factor:
  """A right-hand factor made ready for repeated products; a pytree whose leaves are arrays.

  Attributes:
    digits: the arrays that the form multiplies by: one ("integer", "halves"), or one for each
      digit, lowest first.
    form: the form that it is made for.
    shape: of the factor.
    w_bits: as given to `split`.
  """

  digits: tuple[Array, ...]
  form: Form
  shape: tuple[int, ...]
  w_bits: int


def choose(map: Map, w_shape: Sequence[int], num_bits: int) -> Form:
  """The fastest form on the default backend, on CPU as measured by `benchmarks/ring_products.py`.

  On CPU "integer" is ahead for every layer of a ResNet and for large matrices, in every ring and
  for weights of any size; but where 64-bit vectors cannot be multiplied, "halves" is, unless few
  columns fill its vectors. Accelerators have no such loops: GPUs compute in float64 (with x64),
  TPUs in int8.
  """
  if map.name == "mul":
    return "integer"
  x64 = jax.config.jax_enable_x64  # type: ignore[attr-defined]
  if jax.default_backend() == "cpu":
    wide = num_bits > 32 and x64 and layouts.kernel_shape(map, w_shape)[-1] >= _MIN_COLUMNS
    return "halves" if wide and native.has_wide_products() else "integer"
  if jax.default_backend() == "tpu" or not x64:
    return "int8" if num_bits <= 32 or _fan_in(map, w_shape) <= _INT8_FAN_IN else "float64"
  return "float64"


def split(map: Map, w: Array, w_bits: int, num_bits: int, form: Form | None = None) -> Factor:
  """Makes a right-hand factor ready for `multiply`; do it once for one that is used often.

  Args:
    map: the bilinear map of the product.
    w: int32, uint32 (k <= 32), int64 or uint64 ring elements. Bits above k are ignored.
    w_bits: k for any ring elements; a smaller number promises |w| < 2^(w_bits - 1) as signed
      numbers
      and saves digits.
    num_bits: k of the ring Z_2^k.
    form: one of FORMS; None takes the one of `choose`.

  Raises:
    ValueError: w_bits, num_bits or the form do not fit each other or the fan-in, or w is larger
      than w_bits promises. The last is checked only if w is concrete: under jit a broken promise
      gives wrong products.
  """
  if not 2 <= w_bits <= num_bits <= 64:
    raise ValueError(f"w_bits={w_bits} and num_bits={num_bits}; use 2 <= w_bits <= num_bits <= 64")
  form = choose(map, w.shape, num_bits) if form is None else form
  if form not in FORMS:
    raise ValueError(f"form={form!r}; use one of {', '.join(FORMS)}")
  if form in ("halves", "float64") and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ValueError(
      f"form={form!r} needs x64: set JAX_ENABLE_X64=1 (or jax_enable_x64), or use another form"
    )
  if form == "halves" and not (map.name != "mul" and native.has_wide_products()):
    raise ValueError(
      "form='halves' is for contractions on CPUs with AVX2 and without AVX-512DQ, and needs the C "
      "form of `native`; use form='integer'"
    )
  if not jnp.issubdtype(w.dtype, jnp.integer):
    raise ValueError(f"w has dtype {w.dtype}, but products take integers; encode it first")
  v = signed(w, num_bits)
  if w_bits < num_bits and w.size and not isinstance(w, jax.core.Tracer):
    low, high = int(jnp.min(v)), int(jnp.max(v))
    if max(-low, high) >= 2 ** (w_bits - 1):
      raise ValueError(
        f"w reaches from {low} to {high}, but w_bits={w_bits} promises magnitudes below "
        f"2^{w_bits - 1}; use more w_bits"
      )
  digits: tuple[Array, ...]
  if form == "integer":
    # Small weights take half the memory, which bounds layers with more weights than pixels.
    digits = (integer_products.prepare(map, v.astype(jnp.int32) if w_bits <= 32 else v),)
  elif form == "halves":
    digits = (half_products.prepare(map, v.astype(jnp.int32 if w_bits <= 32 else jnp.int64)),)
  elif form == "float64":
    _, bits, _, count = _float_digits(_fan_in(map, w.shape), w_bits, num_bits)
    digits = tuple(d.astype(jnp.float64) for d in _digits(v.astype(jnp.int64), bits, count))
  else:
    if num_bits > 32 and _fan_in(map, w.shape) > _INT8_FAN_IN:
      raise ValueError(
        f"form='int8' sums at most {_INT8_FAN_IN} products exactly, not {_fan_in(map, w.shape)}; "
        f"use form='float64'"
      )
    digits = tuple(
      d.astype(jnp.int8) for d in _digits(v, 8, min(-(-num_bits // 8), w_bits // 8 + 1))
    )
  return Factor(digits, form, tuple(w.shape), w_bits)


def multiply(map: Map, x: Array, w: Factor, num_bits: int) -> Array:
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
    raise ValueError(
      f"x has dtype {x.dtype}, but a ring of {num_bits} bits takes {dtype}; encode it first"
    )
  if w.form == "integer":
    return integer_products.multiply(map, x, w.digits[0], w.shape)
  if w.form == "halves":
    return half_products.multiply(map, x.astype(jnp.uint64), w.digits[0], w.shape).astype(dtype)
  v = signed(x, num_bits)
  if w.form == "float64":
    x_bits, w_bits, count, _ = _float_digits(_fan_in(map, w.shape), w.w_bits, num_bits)
    digits = [d.astype(jnp.float64) for d in _digits(v.astype(jnp.int64), x_bits, count)]
    wide, accumulator = jnp.dtype(jnp.int64), None
  else:
    x_bits, w_bits = 8, 8
    digits = [d.astype(jnp.int8) for d in _digits(v, 8, -(-num_bits // 8))]
    wide, accumulator = v.dtype, jnp.int32
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
  """map(x, y) modulo 2^k of two arrays of ring elements; otherwise as `multiply`."""
  return multiply(map, x, split(map, y, num_bits, num_bits, form), num_bits)


# --- Digits.

_INT8_FAN_IN = 2**17 - 1  # products of up to 2^14 in magnitude, summed in int32


def _digits(v: Array, bits: int, count: int) -> list[Array]:
  """Balanced digits of signed numbers: v = sum d_i 2^(bits i).

  -2^(bits-1) <= d_i < 2^(bits-1), except for the last digit.
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
  """(bits of x's digits, bits of w's, number of x's, number of w's) with the fewest pairs that are
  exact in float64.

  Balanced digits of a and b bits have magnitudes up to 2^(a-1) and 2^(b-1), so fan_in 2^(a+b-2) <=
  2^53 must hold.
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
  """The number of products that each element of the result sums."""
  if map.name == "mul":
    return 1
  p = dict(map.params)
  if map.name == "dot_general":
    return math.prod(w_shape[a] for a in p["dimension_numbers"][0][1])
  return math.prod(w_shape) // w_shape[p["dimension_numbers"].rhs_spec[0]]
