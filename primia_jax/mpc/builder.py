"""Writes circuits; keeps track of scales, ranges and openings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc import clamping, scales
from primia_jax.mpc.circuit import (
  Apply,
  Circuit,
  Config,
  Input,
  Linear,
  Local,
  Offset,
  Open,
  Operand,
  Operation,
  Product,
  Value,
  Values,
)
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.gates.elementwise import COMPARISONS, RELU, SIGN, TRUNCATE, Gate
from primia_jax.mpc.maps import MULTIPLY, Map, shape_of
from primia_jax.types import Array


class Builder:
  """Collects operations; methods return the Value of their result."""

  def __init__(self, config: Config):
    self.config = config
    self.operations: list[Operation] = []
    self.operands: list[Operand] = []
    self.layer = "(top)"
    self.place = "an operation"  # its name, file and line, for errors
    self._count = 0
    self._opened: dict[int, int] = {}  # number of shares -> number of their masked value
    self._made_by: dict[int, Local] = {}
    self._values: dict[int, Value] = {}
    self._narrowed: dict[tuple[int, float, int], Value] = {}
    self._operands: dict[Operand, int] = {}

  def unit(self, max_abs: float) -> float:
    """`scales.unit` of numbers up to max_abs."""
    return scales.unit(max_abs, self.config.num_bits, self.config.fraction_bits)

  # ---- entering and leaving

  def input(
    self,
    owner: int | None,
    value: Callable[[Values], Array],
    shape: tuple[int, ...],
    max_abs: float = math.inf,
    scale: float | None = None,
  ) -> Value:
    """An owner's argument, or shares (owner None); in units of u by default."""
    scale = self.config.unit if scale is None else scale
    bits = clamping.bits(self.config, owner, max_abs, scale)
    operand = self._operand(owner, value, scale, shape, bits, None)
    return self._add(Input, shape, scale, max_abs, owner=owner, operand=operand)

  def output(self, a: Value) -> Value:
    """a as it may be revealed: without low bits, which would tell a product's factors.

    Raises:
      ValueError: a's bound does not fit the ring.
    """
    a = self.truncate(a, scales.finer(a.scale, self.config.fraction_bits))
    self.range_bits(a)
    return a

  def circuit(self, outputs: Sequence[Any]) -> Circuit:
    return Circuit(tuple(self.operations), tuple(self.operands), tuple(outputs), self.config)

  # ---- without communication

  def local(
    self,
    fn: Callable[..., Array],
    *values: Value,
    max_abs: float | None = None,
    shape: tuple[int, ...] | None = None,
  ) -> Value:
    """A function that is linear over the integers, of values of one scale.

    Where the caller knows the result's shape, planning need not trace fn.
    """
    scale = values[0].scale
    if any(v.scale != scale for v in values):
      raise ValueError(f"values of scales {[v.scale for v in values]}; align them first")
    if shape is None:
      given = [jax.ShapeDtypeStruct(v.shape, self.config.dtype) for v in values]
      shape = jax.eval_shape(fn, *given).shape
    bound = max(v.max_abs for v in values) if max_abs is None else max_abs
    out = self._add(
      Local, shape, scale, bound, inputs=tuple(v.number for v in values), fn=fn, opened=False
    )
    self._made_by[out.number] = self.operations[-1]  # type: ignore[assignment]
    return out

  def add(self, a: Value, b: Value) -> Value:
    a, b = self.align(a, b, bound=sum)
    shape = np.broadcast_shapes(a.shape, b.shape)
    return self.local(lambda x, y: x + y, a, b, max_abs=a.max_abs + b.max_abs, shape=shape)

  def subtract(self, a: Value, b: Value) -> Value:
    a, b = self.align(a, b, bound=sum)
    shape = np.broadcast_shapes(a.shape, b.shape)
    return self.local(lambda x, y: x - y, a, b, max_abs=a.max_abs + b.max_abs, shape=shape)

  def negate(self, a: Value) -> Value:
    return self.local(lambda x: x.dtype.type(0) - x, a, shape=a.shape)

  def scaled(self, a: Value, factor: float) -> Value:
    """a x factor, as another scale; exact up to the factor's own rounding in float64."""
    self.check_finite("factor", factor)
    if factor == 0:
      return self.local(jnp.zeros_like, a, max_abs=0.0)
    out = self.negate(a) if factor < 0 else a
    return out._replace(scale=a.scale * abs(factor), max_abs=a.max_abs * abs(factor))

  def add_public(self, a: Value, array: Any) -> Value:
    """a + array, broadcast; off by at most half a unit of activations, less if a is finer."""
    array = np.asarray(array, np.float64)
    self.check_finite("offset", array)
    shape = np.broadcast_shapes(a.shape, array.shape)
    a = self.broadcast(a, shape)
    units = array / a.scale
    if float(np.abs(units - np.rint(units)).max(initial=0)) * a.scale > self.config.unit / 2:
      a = self.finer(a)
    largest = float(np.abs(array).max(initial=0))
    a = a if largest < self.room(a.scale) else self.narrow(a)
    if largest >= self.room(a.scale):
      self._too_large(largest, a.scale, math.ceil(math.log2(largest / a.scale)) + 2)
    integers = np.asarray(np.rint(array / a.scale), np.int64).reshape(
      (1,) * (len(shape) - array.ndim) + array.shape
    )
    bound = a.max_abs + largest
    return self._add(Offset, a.shape, a.scale, bound, input=a.number, owner=None, operand=integers)

  def add_owned(
    self,
    a: Value,
    owner: int,
    value: Callable[[Values], Array],
    shape: tuple[int, ...],
    max_abs: float,
  ) -> Value:
    """a + an array of one party that broadcasts against it, rounded as in `add_public`."""
    a = self.finer(a)
    operand = self._operand(owner, value, a.scale, shape, None, None)
    return self._add(
      Offset, a.shape, a.scale, a.max_abs + max_abs, input=a.number, owner=owner, operand=operand
    )

  def multiply_public(self, a: Value, array: Any) -> Value:
    """a x array, elementwise and broadcast.

    One number, however often, is free. Others are rounded to 2^-f of the largest.
    """
    array = np.asarray(array, np.float64)
    a = self.broadcast(a, np.broadcast_shapes(a.shape, array.shape))
    if array.size and np.all(array == array.flat[0]):
      return self.scaled(a, float(array.flat[0]))
    self.check_finite("factor", array)
    a = self.narrow(a)
    largest = float(np.abs(array).max(initial=0))
    unit = 2.0 ** (math.ceil(math.log2(largest)) - self.config.fraction_bits) if largest else 1.0
    integers = jnp.asarray(np.rint(array / unit).astype(np.int64).astype(self.config.dtype))
    out = self.local(lambda x: x * integers.astype(x.dtype), a, max_abs=a.max_abs * largest)
    return out._replace(scale=a.scale * unit)

  def align(self, *values: Value, bound: Callable[[Iterable[float]], float] = max) -> list[Value]:
    """The values at one scale, multiplied by whole numbers; v is off by |v| u / 16 at most.

    They are exact if their scales have whole ratios. The ratios of others are rounded to fractions
    of small numbers, so that the common scale is finer by f / 2 + 2 bits at most. If it leaves no
    room for what follows (the largest of the values, or their sum), those that are finer than
    activations are truncated first.
    """
    if len({v.scale for v in values}) == 1:
      return list(values)
    bits = min(self.config.fraction_bits + 4, 22)  # float32 has no finer ratios
    scale = scales.common([v.scale for v in values], bits)
    largest, finest = bound(v.max_abs for v in values), 2.0 ** (-3 * self.config.num_bits // 4)
    if scale < finest if math.isinf(largest) else largest >= self.room(scale):
      values = tuple(self.narrow(v) for v in values)
      scale = scales.common([v.scale for v in values], bits)
    return [self._multiplied(v, round(v.scale / scale))._replace(scale=scale) for v in values]

  def room(self, scale: float) -> float:
    """The magnitude that values of a scale must stay below."""
    return 2.0 ** (self.config.num_bits - 2) * scale

  def finer(self, a: Value) -> Value:
    """a at the scale of activations if it is coarser, such as a whole number."""
    bits = max(0, math.ceil(math.log2(a.scale / self.config.unit)))
    return self._multiplied(a, 2**bits)._replace(scale=a.scale / 2**bits)

  def _multiplied(self, a: Value, factor: int) -> Value:
    if factor == 1:
      return a
    fn = lambda x: x * x.dtype.type(factor % 2 ** (8 * x.dtype.itemsize))
    return self.local(fn, a, shape=a.shape)

  # ---- with communication

  def linear(
    self,
    a: Value,
    owner: int,
    value: Callable[[Values], Array],
    shape: tuple[int, ...],
    scale: float,
    bits: int,
    map: Map,
    max_abs: float,
  ) -> Value:
    """The bilinear map of a and an owner's operand of `bits` bits (with the sign) at `scale`."""
    opened = self.open(a)
    operand = self._operand(owner, value, scale, shape, bits, map)
    out = shape_of(map, a.shape, shape)
    return self._add(
      Linear, out, a.scale * scale, max_abs, input=opened, owner=owner, operand=operand, map=map
    )

  def product(self, a: Value, b: Value, map: Map, max_abs: float | None = None) -> Value:
    """The bilinear map of two shared values by Beaver's method over masked values."""
    a, b = self.narrow(a), self.narrow(b)
    inputs = (self.open(a), self.open(b))
    shape = shape_of(map, a.shape, b.shape)
    bound = a.max_abs * b.max_abs if max_abs is None else max_abs
    return self._add(Product, shape, a.scale * b.scale, bound, inputs=inputs, map=map)

  def multiply(self, a: Value, b: Value, max_abs: float | None = None) -> Value:
    """a x b, elementwise and broadcast."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    return self.product(self.broadcast(a, shape), self.broadcast(b, shape), MULTIPLY, max_abs)

  def broadcast(self, a: Value, shape: tuple[int, ...]) -> Value:
    if a.shape == (shape := tuple(shape)):
      return a
    return self.local(lambda x: jnp.broadcast_to(x, shape), a, shape=shape)

  def relu(self, a: Value) -> Value:
    """max(a, 0), truncated to the scale of activations if a is finer."""
    return self._gate(RELU, a, self._shift(a))

  def positive_part(self, a: Value, skip: int = 0) -> Value:
    """max(a, 0) at a's own scale; gates that are not exact ignore `skip` low bits of the sign."""
    return self._gate(RELU, a, 0, skip)

  def sign(self, a: Value) -> Value:
    """1 where a >= 0, else 0; at scale 1."""
    return self._gate(SIGN, a, 0)._replace(scale=1.0, max_abs=1.0)

  def narrow(self, a: Value, most: int | None = None) -> Value:
    """a, truncated to its unit if it is finer, by at most `most` bits."""
    return self.truncate(a, self._shift(a) if most is None else min(most, self._shift(a)))

  def truncate(self, a: Value, shift: int) -> Value:
    """a at 2^shift times its scale, rounded to nearest."""
    if not shift:
      return a
    if (a.number, a.scale, shift) not in self._narrowed:
      self._narrowed[a.number, a.scale, shift] = self._gate(TRUNCATE, a, shift)
    return self._narrowed[a.number, a.scale, shift]

  def floored(self, a: Value, shift: int, positive: bool = False) -> Value:
    """floor(a / 2^shift) of a's whole numbers, or of max(a, 0) if `positive`.

    It is exact whatever the configuration; the scale grows by 2^shift.
    """
    if shift:  # the gate rounds to nearest
      a = self.add_public(a, -(2.0 ** (shift - 1)) * a.scale)
    return self._gate(RELU if positive else TRUNCATE, a, shift, exact=True)

  def maximum(self, a: Value, b: Value) -> Value:
    """max(a, b) = b + max(a - b, 0)."""
    a, b = self.align(a, b, bound=sum)
    difference = self.subtract(a, b)
    out = self.add(b, self.positive_part(difference, self._shift(difference)))
    return out._replace(max_abs=max(a.max_abs, b.max_abs))

  def open(self, a: Value) -> int:
    """The number of a's masked value.

    A value that is masked already, or follows from masked values, is not opened again. A value that
    repeats elements (padding, patches) is opened before they are repeated.
    """
    if a.number not in self._opened:
      made = self._made_by.get(a.number)
      sources = self._sources(a)
      if made and sum(
        math.prod(v.shape) for v in sources if v.number not in self._opened
      ) < math.prod(a.shape):
        for source in sources:
          self.open(source)
        inputs = tuple(self.open(self._values[i]) for i in made.inputs)
        masked = self._add(
          Local, a.shape, a.scale, a.max_abs, inputs=inputs, fn=made.fn, opened=True
        )
      else:
        masked = self._add(Open, a.shape, a.scale, a.max_abs, input=a.number)
      self._opened[a.number] = masked.number
    return self._opened[a.number]

  def _sources(self, a: Value) -> list[Value]:
    """The nearest values, masked or not local, that a follows from by local operations."""
    found, todo = {}, [a.number]
    while todo:
      i = todo.pop()
      made = self._made_by.get(i)
      if i not in found and (made is None or i in self._opened):
        found[i] = self._values[i]
      elif i not in found:
        todo += made.inputs  # type: ignore[union-attr]
    return list(found.values())

  # ---- inside

  def _shift(self, a: Value) -> int:
    """The bits by which a is finer than its unit."""
    return max(0, math.floor(math.log2(self.unit(a.max_abs)) - math.log2(a.scale) + 0.5))

  def _gate(
    self, action: str, a: Value, shift: int, skip: int = 0, exact: bool | None = None
  ) -> Value:
    config = self.config
    exact = config.exact if exact is None else exact
    if shift > config.num_bits - 3:  # nothing is left
      zeros = self.local(jnp.zeros_like, a, max_abs=0.0)
      return zeros._replace(scale=a.scale * 2.0**shift)
    skip = 0 if exact or action == TRUNCATE else max(shift, skip)
    size, comparison = (math.prod(a.shape), config.num_bits), COMPARISONS[config.comparison]
    gate = Gate(action, *size, self.range_bits(a, shift, skip), shift, skip, exact, comparison)
    elementwise.check(gate)
    return self._add(Apply, a.shape, a.scale * 2**shift, a.max_abs, input=a.number, gate=gate)

  def range_bits(self, a: Value, shift: int = 0, skip: int = 0) -> int:
    """K: the bits of a's magnitude, with room for rounding and skipped bits.

    Raises:
      ValueError: a calibrated range does not fit the ring.
    """
    limit = self.config.num_bits - 2
    if math.isinf(a.max_abs):
      return limit
    largest = math.ceil(a.max_abs / a.scale) + 2 ** max(shift, skip)
    bits = max(largest.bit_length(), shift + 1, skip + 1)
    if bits > limit:
      self._too_large(a.max_abs, a.scale, bits + 2)
    return bits

  def _too_large(self, largest: float, scale: float, bits: int) -> NoReturn:
    raise ValueError(
      f"{self.layer}: {self.place}: values up to {largest:.4g} in units of {scale:.3g} need a ring "
      f"of {bits} bits, but num_bits={self.config.num_bits}; use a wider ring, fewer fraction_bits "
      f"or weight_bits, or calibrate"
    )

  def check_finite(self, what: str, array: Any) -> None:
    """Raises a ValueError if a public array holds what fixed point cannot."""
    if not np.all(np.isfinite(array)):
      raise ValueError(
        f"{self.layer}: {self.place}: a public {what} is infinite or NaN; use a finite one, or "
        f"jnp.where with a public mask"
      )

  def _operand(self, owner, value, scale, shape, bits, map) -> int:
    """The number of an operand; an owner encodes and publishes equal ones once.

    Arguments given as shares are never equal: each comes with shares of its own.
    """
    new = Operand(owner, value, scale, tuple(shape), bits, map, self.layer)
    number = self._operands.setdefault(new._replace(layer=""), len(self.operands))
    if owner is None or number == len(self.operands):
      self.operands.append(new)
      return len(self.operands) - 1
    return number

  def _add(
    self, kind: Any, shape: Sequence[int], scale: float, max_abs: float, **fields: Any
  ) -> Value:
    out = Value(self._count, tuple(shape), scale, max_abs)
    self._count += 1
    self._values[out.number] = out
    if "shape" in kind._fields:
      fields["shape"] = out.shape
    self.operations.append(kind(out=out.number, layer=self.layer, **fields))
    return out
