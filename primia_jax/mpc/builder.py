"""Writes circuits; keeps track of scales, ranges and openings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    self._count = 0
    self._opened: dict[int, int] = {}  # number of shares -> number of their masked value
    self._made_by: dict[int, Local] = {}
    self._values: dict[int, Value] = {}
    self._narrowed: dict[tuple[int, float, int], Value] = {}

  def unit(self, max_abs: float) -> float:
    """The unit worth keeping of numbers up to max_abs: u = 2^-f, or finer for a range below 1.

    It is u max_abs, rounded up to a power of two, so that small numbers keep f bits too. A ring
    bounds how fine: a product of two such numbers leaves room for a sum of 2^6.
    """
    finest = max(0, (self.config.num_bits - 8) // 2 - self.config.fraction_bits)
    octave = math.ceil(math.log2(max_abs)) if 0 < max_abs < 1 else 0
    return self.config.unit * 2.0 ** max(-finest, octave)

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
    operand = self._operand(owner, value, scale, shape, None, None)
    return self._add(Input, shape, scale, max_abs, owner=owner, operand=operand)

  def circuit(self, outputs: Sequence[Any]) -> Circuit:
    return Circuit(tuple(self.operations), tuple(self.operands), tuple(outputs), self.config)

  # ---- without communication

  def local(self, fn: Callable[..., Array], *values: Value, max_abs: float | None = None) -> Value:
    """A function that is linear over the integers, of values of one scale."""
    scale = values[0].scale
    if any(v.scale != scale for v in values):
      raise ValueError(f"values of scales {[v.scale for v in values]}; align them first")
    shape = jax.eval_shape(
      fn, *(jax.ShapeDtypeStruct(v.shape, self.config.dtype) for v in values)
    ).shape
    bound = max(v.max_abs for v in values) if max_abs is None else max_abs
    out = self._add(
      Local, shape, scale, bound, inputs=tuple(v.number for v in values), fn=fn, opened=False
    )
    self._made_by[out.number] = self.operations[-1]  # type: ignore[assignment]
    return out

  def add(self, a: Value, b: Value) -> Value:
    a, b = self.align(a, b)
    return self.local(lambda x, y: x + y, a, b, max_abs=a.max_abs + b.max_abs)

  def subtract(self, a: Value, b: Value) -> Value:
    a, b = self.align(a, b)
    return self.local(lambda x, y: x - y, a, b, max_abs=a.max_abs + b.max_abs)

  def negate(self, a: Value) -> Value:
    return self.local(lambda x: x.dtype.type(0) - x, a)

  def scaled(self, a: Value, factor: float) -> Value:
    """a x factor, as another scale; exact up to the factor's own rounding in float64."""
    if factor == 0:
      return self.local(jnp.zeros_like, a, max_abs=0.0)
    out = self.negate(a) if factor < 0 else a
    return out._replace(scale=a.scale * abs(factor), max_abs=a.max_abs * abs(factor))

  def add_public(self, a: Value, array: Any) -> Value:
    """a + array, broadcast; off by at most half a unit of a's scale."""
    array = np.asarray(array, np.float64)
    shape = np.broadcast_shapes(a.shape, array.shape)
    if shape != a.shape:
      a = self.local(lambda x: jnp.broadcast_to(x, shape), a)
    integers = np.asarray(np.rint(array / a.scale), np.int64).reshape(
      (1,) * (len(shape) - array.ndim) + array.shape
    )
    bound = a.max_abs + float(np.abs(array).max(initial=0))
    return self._add(Offset, a.shape, a.scale, bound, input=a.number, owner=None, operand=integers)

  def add_owned(
    self,
    a: Value,
    owner: int,
    value: Callable[[Values], Array],
    shape: tuple[int, ...],
    max_abs: float,
  ) -> Value:
    """a + an array of one party that broadcasts against it."""
    operand = self._operand(owner, value, a.scale, shape, None, None)
    return self._add(
      Offset, a.shape, a.scale, a.max_abs + max_abs, input=a.number, owner=owner, operand=operand
    )

  def multiply_public(self, a: Value, array: Any) -> Value:
    """a x array, elementwise and broadcast.

    A number is free; an array is rounded to 2^-f of its largest element.
    """
    array = np.asarray(array, np.float64)
    if array.size == 1 and array.ndim <= len(a.shape):
      return self.scaled(a, float(array.reshape(())))
    a = self.narrow(a)
    largest = float(np.abs(array).max())
    unit = 2.0 ** (math.ceil(math.log2(largest)) - self.config.fraction_bits) if largest else 1.0
    integers = jnp.asarray(np.rint(array / unit).astype(np.int64).astype(self.config.dtype))
    out = self.local(lambda x: x * integers, a, max_abs=a.max_abs * largest)
    return out._replace(scale=a.scale * unit)

  def align(self, a: Value, b: Value) -> tuple[Value, Value]:
    """Both at one scale, the coarser multiplied by a whole number; exact if the ratio is whole."""
    if a.scale < b.scale:
      b, a = self.align(b, a)
      return a, b
    if a.scale == b.scale:
      return a, b
    ratio, finer = a.scale / b.scale, 0
    while (
      abs(ratio - round(ratio)) > 2.0**-self.config.fraction_bits
      and ratio < 2**self.config.fraction_bits
    ):
      ratio, finer = ratio * 2, finer + 1
    scale, factor = b.scale / 2**finer, round(ratio)
    return self._multiplied(a, factor)._replace(scale=scale), self._multiplied(
      b, 2**finer
    )._replace(scale=scale)

  def _multiplied(self, a: Value, factor: int) -> Value:
    return a if factor == 1 else self.local(lambda x: x * x.dtype.type(factor), a)

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
    return a if a.shape == tuple(shape) else self.local(lambda x: jnp.broadcast_to(x, shape), a)

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
    a, b = self.align(a, b)
    difference = self.subtract(a, b)
    return self.add(b, self.positive_part(difference, self._shift(difference)))._replace(
      max_abs=max(a.max_abs, b.max_abs)
    )

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
    skip = 0 if exact or action == TRUNCATE else max(shift, skip)
    gate = Gate(
      action,
      math.prod(a.shape),
      config.num_bits,
      self.range_bits(a, shift, skip),
      shift,
      skip,
      exact,
      COMPARISONS[config.comparison],
    )
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
      raise ValueError(
        f"{self.layer}: values up to {a.max_abs:.4g} in units of {a.scale:.3g} need a ring of "
        f"{bits + 2} bits, but num_bits={self.config.num_bits}; use a wider ring, fewer "
        f"fraction_bits or weight_bits, or calibrate"
      )
    return bits

  def _operand(self, owner, value, scale, shape, bits, map) -> int:
    self.operands.append(Operand(owner, value, scale, tuple(shape), bits, map, self.layer))
    return len(self.operands) - 1

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
