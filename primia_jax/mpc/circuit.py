"""The protocol's own language: a straight list of operations on shared fixed-point numbers.

A `Value` stands for shares of an integer array v. The real number is v x scale, and |real| <=
max_abs. So a product with a public number, or the division of a mean, costs nothing: it changes the
scale only. A masked value (`Open`) is v + r in public, with a dealer's mask r. Linear layers and
products take masked values; whatever is linear over the integers maps shares, masked values and
masks alike. `builder.Builder` writes circuits.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import ring
from primia_jax.mpc.gates.elementwise import COMPARISONS, Gate
from primia_jax.mpc.maps import Map
from primia_jax.types import Array

TRUSTED, SHARING, CHECKED = "trusted", "sharing", "checked"
CLIENTS = (TRUSTED, SHARING, CHECKED)
Values = Mapping[int, Array]  # an owner's values in the clear, by their number in the program


@dataclasses.dataclass(frozen=True)
class Config:
  """What both parties and the dealer agree on.

  Attributes:
    num_bits: k; values live in Z_2^k, stored in uint32 for k <= 32, else in uint64.
    fraction_bits: f; a value is truncated to about 2^-f before it is multiplied again.
    weight_bits: bits of an owned operand of a linear layer, with the sign. Its scale follows from
      its largest magnitude if the owner plans with it at hand, and is 2^-f otherwise.
    exact: exact truncation and comparison. False is cheaper and off by at most one unit of 2^-f in
      each gate.
    comparison: "tables" (few bytes dealt, two rounds) or "fss" (more bytes dealt, no round).
    margin: factor on every calibrated range.
    client: what the one who has the image may be. "trusted" is a party that follows the protocol.
      "sharing" is no party: it shares its image between two servers, and the image is clamped to
      its planned range under encryption. "checked" is a party whose openings carry the dealer's
      tags, and whose image is clamped; it needs num_bits <= 32 and comparison="tables".
  """

  num_bits: int = 64
  fraction_bits: int = 16
  weight_bits: int = 18
  exact: bool = True
  comparison: str = "tables"
  margin: float = 2.0
  client: str = TRUSTED

  def __post_init__(self) -> None:
    if not 8 <= self.num_bits <= 64:
      raise ValueError(f"num_bits={self.num_bits}; use 8 to 64")
    if not 0 < self.fraction_bits < self.num_bits // 2:
      raise ValueError(
        f"fraction_bits={self.fraction_bits}; use 1 to {(self.num_bits - 1) // 2}, less than half "
        f"of num_bits={self.num_bits}"
      )
    if not 2 <= self.weight_bits <= min(24, self.num_bits):
      raise ValueError(
        f"weight_bits={self.weight_bits}; use 2 to {min(24, self.num_bits)}, at most "
        f"num_bits={self.num_bits}"
      )
    if self.comparison not in COMPARISONS:
      raise ValueError(f"comparison={self.comparison!r}; use {' or '.join(COMPARISONS)}")
    if self.client not in CLIENTS:
      raise ValueError(f"client={self.client!r}; use {', '.join(CLIENTS)}")
    if self.client == CHECKED and (self.num_bits > 32 or self.comparison != "tables"):
      raise ValueError(
        f"client={CHECKED!r} needs num_bits of at most 32 and comparison='tables', not "
        f"{self.num_bits} and {self.comparison!r}: tags of 32 bits must fit a word beside them"
      )
    if not self.margin >= 1:
      raise ValueError(
        f"margin={self.margin}; use at least 1: ranges that calibration saw must fit"
      )

  @property
  def dtype(self) -> np.dtype:
    return ring.storage(self.num_bits)

  def scope(self) -> contextlib.AbstractContextManager[Any]:
    """A context in which the ring can be computed in, whether x64 is on or off outside."""
    return jax.enable_x64(True) if self.num_bits > 32 else contextlib.nullcontext()

  @property
  def unit(self) -> float:
    """u, the scale of activations."""
    return 2.0**-self.fraction_bits


class Value(NamedTuple):
  """Shares of integers that stand for real numbers."""

  number: int
  shape: tuple[int, ...]
  scale: float  # the real number that one unit stands for
  max_abs: float  # bound of the real magnitude; inf if nothing is known


class Input(NamedTuple):
  """Shares of an argument: from its owner's encoded operand, or (owner None) given as shares."""

  out: int
  owner: int | None
  operand: int
  layer: str


class Local(NamedTuple):
  """fn applied to shares, or (`opened`) to masked values and masks; linear over the integers, with
  no constant term.
  """

  out: int
  inputs: tuple[int, ...]
  fn: Callable[..., Array]
  opened: bool
  layer: str


class Offset(NamedTuple):
  """Adds what one party holds: an owner's operand, or (owner None) a public array of integers."""

  out: int
  input: int
  owner: int | None
  operand: Any  # number of the operand, or an int64 array
  layer: str


class Open(NamedTuple):
  """The masked value of shares under a fresh mask: one round."""

  out: int
  input: int
  shape: tuple[int, ...]
  layer: str


class Linear(NamedTuple):
  """A bilinear map of a masked value and an owner's operand; only the owner computes."""

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
  """A gate, applied to each element."""

  out: int
  input: int
  gate: Gate
  shape: tuple[int, ...]
  layer: str


Operation = Input | Local | Offset | Open | Linear | Product | Apply


class Operand(NamedTuple):
  """How an owner encodes a value that enters the protocol.

  Attributes:
    owner: the party that holds it; None for an argument given as shares.
    value: (the owner's values) -> float array.
    scale: the real number that one unit stands for.
    shape: of the array.
    bits: of a linear layer's operand or a clamped argument, with the sign; None for another
      argument or an offset, which may fill the ring.
    map: the bilinear map of the linear layer; None for an argument or an offset.
    layer: the layer that uses it.
  """

  owner: int | None
  value: Callable[[Values], Array]
  scale: float
  shape: tuple[int, ...]
  bits: int | None
  map: Map | None
  layer: str


class Circuit(NamedTuple):
  """What the parties will do.

  Attributes:
    operations: in order.
    operands: what the owners put in.
    outputs: Values, or arrays where public.
    config: the ring and its like.
  """

  operations: tuple[Operation, ...]
  operands: tuple[Operand, ...]
  outputs: tuple[Any, ...]
  config: Config

  def linear_operands(self, owner: int) -> list[int]:
    """The numbers of the operands by which an owner multiplies masked values."""
    return [i for i, o in enumerate(self.operands) if o.map is not None and o.owner == owner]
