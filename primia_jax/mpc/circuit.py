"""The protocol's own language: a straight list of operations on shared fixed-point numbers, and its
builder.

A `Value` stands for shares of an integer array v; the real number is v x scale, and |real| <=
max_abs. So a product with a public number, or a mean's division, costs nothing: it only changes the
scale. A masked value (`Open`) is v + r in public with a dealer's mask r; linear layers and products
take masked values, and everything that is linear over the integers maps shares, masked values and
masks alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import ring
from primia_jax.mpc import gates
from primia_jax.mpc.dealing import CHACHA20, THREEFRY
from primia_jax.mpc.gates import RELU, SIGN, TRUNCATE, Gate
from primia_jax.mpc.maps import MULTIPLY, shape_of
from primia_jax.mpc.products import Map
from primia_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Config:
  """What both parties and the dealer agree on.

  Attributes:
    num_bits: k; values live in Z_2^k, stored in uint32 for k <= 32 and else in uint64 (which needs
      x64).
    fraction_bits: f; a value is truncated to about 2^-f before it is multiplied again.
    weight_bits: bits of an owned operand of a linear layer, its sign included; its scale follows
      from its largest magnitude where that was calibrated and is else 2^-f.
    exact: exact truncation and comparison. False is cheaper and off by at most one unit of 2^-f in
      each gate.
    comparison: "tables" (few bytes dealt, two rounds) or "fss" (more bytes dealt, no round).
    margin: factor on every calibrated range.
    prng: "chacha20", or "threefry" for research: a statistical generator whose masks promise
      nothing.
  """

  num_bits: int = 64
  fraction_bits: int = 16
  weight_bits: int = 18
  exact: bool = True
  comparison: str = "tables"
  margin: float = 2.0
  prng: str = CHACHA20

  def __post_init__(self) -> None:
    if not 8 <= self.num_bits <= 64:
      raise ValueError(f"num_bits={self.num_bits}; a ring of 8 to 64 bits is supported")
    if not 0 < self.fraction_bits < self.num_bits // 2:
      raise ValueError(
        f"fraction_bits={self.fraction_bits} must lie between 0 and half of "
        f"num_bits={self.num_bits}"
      )
    if not 2 <= self.weight_bits <= min(24, self.num_bits):
      raise ValueError(
        f"weight_bits={self.weight_bits} must lie between 2 and 24, and within the ring"
      )
    if self.comparison not in gates.COMPARISONS:
      raise ValueError(
        f"comparison={self.comparison!r} is not one of {', '.join(gates.COMPARISONS)}"
      )
    if self.prng not in (CHACHA20, THREEFRY):
      raise ValueError(f"prng={self.prng!r} is neither {CHACHA20} nor {THREEFRY}")
    if not self.margin >= 1:
      raise ValueError(f"margin={self.margin} must be at least 1")

  @property
  def dtype(self) -> np.dtype:
    return ring.storage(self.num_bits)

  @property
  def unit(self) -> float:
    """u, the scale of activations."""
    return 2.0**-self.fraction_bits


class Value(NamedTuple):
  """Shares of integers that stand for real numbers."""

  number: int
  shape: tuple[int, ...]
  scale: float  # the real number that one unit stands for
  max_abs: float  # bound of the real magnitude; inf where nothing is known


class Input(NamedTuple):
  """Shares of an argument: from its owner's encoded operand, or (owner None) given as shares."""

  out: int
  owner: int | None
  operand: int
  layer: str


class Local(NamedTuple):
  """fn applied to shares, or to masked values and masks (`opened`): linear over the integers,
  without a constant.
  """

  out: int
  inputs: tuple[int, ...]
  fn: Callable[..., Array]
  opened: bool
  layer: str


class Offset(NamedTuple):
  """Adds a number that one party holds: an owner's operand, or (owner None) a public array of
  integers.
  """

  out: int
  input: int
  owner: int | None
  operand: Any  # number of the operand, or an int64 array
  layer: str


class Open(NamedTuple):
  """The masked value of shares, under a fresh mask: one round."""

  out: int
  input: int
  shape: tuple[int, ...]
  layer: str


class Linear(NamedTuple):
  """A bilinear map of a masked value and an owner's operand; the owner alone computes."""

  out: int
  input: int
  owner: int
  operand: int
  map: Map
  shape: tuple[int, ...]
  layer: str


class Product(NamedTuple):
  """A bilinear map of two masked values."""

  out: int
  inputs: tuple[int, int]
  map: Map
  shape: tuple[int, ...]
  layer: str


class Apply(NamedTuple):
  """A gate, element by element."""

  out: int
  input: int
  gate: Gate
  shape: tuple[int, ...]
  layer: str


Operation = Input | Local | Offset | Open | Linear | Product | Apply


class Operand(NamedTuple):
  """How an owner encodes what it puts into the protocol.

  Attributes:
    owner: who.
    value: (the owner's values by number) -> float array.
    scale: the real number that one unit stands for.
    shape: of the array.
    bits: of a linear layer's operand, with the sign; None for an argument or an offset, which may
      fill the ring.
    map: the bilinear map that an operand serves; None for an argument or an offset.
    layer: where it is used.
  """

  owner: int | None
  value: Callable[[Any], Array]
  scale: float
  shape: tuple[int, ...]
  bits: int | None
  map: Map | None
  layer: str


class Circuit(NamedTuple):
  """Operations in order; `outputs` are Values, or arrays where public."""

  operations: tuple[Operation, ...]
  operands: tuple[Operand, ...]
  outputs: tuple[Any, ...]


class Builder:
  """Collects operations; every method returns the Value of its result."""

  def __init__(self, config: Config):
    self.config = config
    self.operations: list[Operation] = []
    self.operands: list[Operand] = []
    self.layer = "(top)"
    self._count = 0
    self._opened: dict[int, int] = {}  # share -> its masked value
    self._made_by: dict[int, Local] = {}
    self._values: dict[int, Value] = {}
    self._narrowed: dict[tuple[int, float, int], Value] = {}

  # ---- entering and leaving

  def input(
    self, owner: int | None, value: Callable, shape: tuple[int, ...], max_abs: float = math.inf
  ) -> Value:
    """An owner's argument, or shares (owner None), at the scale of activations."""
    operand = self._operand(owner, value, self.config.unit, shape, None, None)
    return self._add(Input, shape, self.config.unit, max_abs, owner=owner, operand=operand)

  def circuit(self, outputs: Sequence[Any]) -> Circuit:
    return Circuit(tuple(self.operations), tuple(self.operands), tuple(outputs))

  # ---- without communication

  def local(self, fn: Callable[..., Array], *values: Value, max_abs: float | None = None) -> Value:
    """A function that is linear over the integers; all values must have one scale."""
    scale = values[0].scale
    if any(v.scale != scale for v in values):
      raise ValueError("values of different scales; align them first")
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
    """a x factor, by another scale; exact up to the factor's own rounding in float64."""
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
    self, a: Value, owner: int, value: Callable, shape: tuple[int, ...], max_abs: float
  ) -> Value:
    """a + an array of one party that broadcasts against it."""
    operand = self._operand(owner, value, a.scale, shape, None, None)
    return self._add(
      Offset, a.shape, a.scale, a.max_abs + max_abs, input=a.number, owner=owner, operand=operand
    )

  def multiply_public(self, a: Value, array: Any, max_abs: float | None = None) -> Value:
    """a x array, elementwise and broadcast; a number is free, an array is rounded to 2^-f of its
    largest element.
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
    """Both at one scale: the coarser is multiplied by a whole number, exact where the ratio is
    one.
    """
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
    value: Callable,
    shape: tuple[int, ...],
    scale: float,
    bits: int,
    map: Map,
    max_abs: float,
  ) -> Value:
    """The bilinear map of a and an owner's operand, which is encoded at `scale` in `bits` bits with
    the sign.
    """
    opened = self.open(a)
    operand = self._operand(owner, value, scale, shape, bits, map)
    out = shape_of(map, a.shape, shape)
    return self._add(
      Linear, out, a.scale * scale, max_abs, input=opened, owner=owner, operand=operand, map=map
    )

  def product(self, a: Value, b: Value, map: Map, max_abs: float | None = None) -> Value:
    """The bilinear map of two shared values, by Beaver's method over masked values."""
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
    """max(a, 0), truncated to the scale of activations where a is finer."""
    return self._gate(RELU, a, self._shift(a))

  def positive_part(self, a: Value, skip: int = 0) -> Value:
    """max(a, 0) at a's own scale; `skip` low bits need not be looked at where the configuration is
    not exact.
    """
    return self._gate(RELU, a, 0, skip)

  def sign(self, a: Value) -> Value:
    """1 where a >= 0, else 0, at scale 1."""
    return self._gate(SIGN, a, 0)._replace(scale=1.0, max_abs=1.0)

  def narrow(self, a: Value, most: int | None = None) -> Value:
    """a truncated to the scale of activations, where it is finer than that; by `most` bits at
    most.
    """
    shift = self._shift(a) if most is None else min(most, self._shift(a))
    if not shift:
      return a
    if (a.number, a.scale, shift) not in self._narrowed:
      self._narrowed[a.number, a.scale, shift] = self._gate(TRUNCATE, a, shift)
    return self._narrowed[a.number, a.scale, shift]

  def maximum(self, a: Value, b: Value) -> Value:
    """max(a, b) = b + max(a - b, 0)."""
    a, b = self.align(a, b)
    difference = self.subtract(a, b)
    return self.add(b, self.positive_part(difference, self._shift(difference)))._replace(
      max_abs=max(a.max_abs, b.max_abs)
    )

  def open(self, a: Value) -> int:
    """The number of a's masked value. What is masked already, or follows from it, is not opened
    again, and what repeats elements (padding, patches) is opened before it does.
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
    """The values from which a follows by local operations: those nearest to it that are masked or
    no local result.
    """
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
    """Bits by which a is finer than activations are."""
    return max(0, math.floor(-self.config.fraction_bits - math.log2(a.scale) + 0.5))

  def _gate(self, action: str, a: Value, shift: int, skip: int = 0) -> Value:
    config = self.config
    skip = 0 if config.exact or action == TRUNCATE else max(shift, skip)
    gate = Gate(
      action,
      math.prod(a.shape),
      config.num_bits,
      self.range_bits(a, shift, skip),
      shift,
      skip,
      config.exact,
      config.comparison,
    )
    gates.check(gate)
    out = self._add(Apply, a.shape, a.scale * 2**shift, a.max_abs, input=a.number, gate=gate)
    return out

  def range_bits(self, a: Value, shift: int = 0, skip: int = 0) -> int:
    """K: the bits that a's magnitude takes, with room for rounding and skipped bits.

    Raises:
      ValueError: where a calibrated range does not fit the ring.
    """
    limit = self.config.num_bits - 2
    if math.isinf(a.max_abs):
      return limit
    largest = math.ceil(a.max_abs / a.scale) + 2 ** max(shift, skip)
    bits = max(largest.bit_length(), shift + 1, skip + 1)
    if bits > limit:
      raise ValueError(
        f"{self.layer}: values up to {a.max_abs:.4g} in units of {a.scale:.3g} need a ring of "
        f"{bits + 2} bits, but "
        f"num_bits={self.config.num_bits}; use a wider ring, fewer fraction_bits or weight_bits, "
        f"or calibrate"
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
