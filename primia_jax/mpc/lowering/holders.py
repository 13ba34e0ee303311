"""Who holds a value while a program is lowered, and which values wait to be computed.

A value is public (an array), `Owned` by a party in the clear, or shared (a `Value` of the circuit).
A linear layer with an owned operand waits (`Lazy`) for scales and offsets that its owner can fold
into it, such as those of BatchNorm. A ReLU waits (`Pending`) while only maxima and reshapings
follow, so that pooling comes first. `Masked` values and `Complex` ones have rules of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.circuit import Value, Values
from primia_jax.mpc.lowering.program import Equation, Ref
from primia_jax.mpc.maps import Map
from primia_jax.types import Array

LOW = -1e4  # a public number masks from here down
_BELOW = 1 - 2.0**-6


class Owned(NamedTuple):
  """A value in the clear at one party.

  Attributes:
    owner: the party.
    read: (the owner's values) -> the array.
    shape: of the array.
    varies: the axes along which it may vary; along the others it repeats one slice.
    bound: its calibrated magnitude.
    dtype: of the array; whole numbers enter the circuit at scale 1.
    unit: in which it becomes shares; None stands for that of its bound.
  """

  owner: int
  read: Callable[[Values], Array]
  shape: tuple[int, ...]
  varies: frozenset[int]
  bound: float = math.inf
  dtype: Any = np.dtype(np.float32)
  unit: float | None = None


@dataclasses.dataclass(frozen=True)
class Read:
  """Reads a value of the program. Equal for the same value, so that its owner encodes it once."""

  number: int

  def __call__(self, values: Values) -> Array:
    return values[self.number]


@dataclasses.dataclass(frozen=True)
class Derived:
  """fn(*arrays, *static) of owned values; equal for equal parts.

  Attributes:
    fn: a function of a module, or another that compares equal to itself when it is made again.
    inputs: the owned values.
    static: hashable.
  """

  fn: Callable[..., Array]
  inputs: tuple[Owned, ...]
  static: tuple[Any, ...] = ()

  def __call__(self, values: Values) -> Array:
    return self.fn(*(v.read(values) for v in self.inputs), *self.static)


class Lazy(NamedTuple):
  """map(x, weight) + offset, not yet computed, so that its owner can still scale it."""

  x: Value
  map: Map
  weight: Owned
  offset: Owned | None
  shape: tuple[int, ...]
  axes: tuple[int | None, ...]  # for each axis of the output, the weight's axis that it follows
  # Rearrangements of the product, before the offset is added.
  after: tuple[Callable[[Array], Array], ...]
  bound: float = math.inf
  layer: str = ""
  place: str = ""
  needed: float = 0.0  # the largest that the ring must hold at its scale


class Pending(NamedTuple):
  """max(x, 0), not yet computed."""

  x: Value
  bound: float = math.inf
  layer: str = ""
  place: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Masked:
  """A value some of whose entries are so low that exp gives 0; `rules_masks` says what may follow.

  Attributes:
    x: the value. Entries that `keep` excludes are 0; those that a secret mask excludes lie below
      `fill`.
    keep: [shape] bool, the entries that are not masked; None if the mask is secret.
    fill: [shape] public numbers, or one for a secret mask.
    spread: of fill's shape; masked entries stand for numbers within this of `fill`.
    bound: of the magnitude of the other entries.
    plain: the value with the masked numbers in it, for everything else that may follow.
    origin: which secret mask; in a tuple, a maximum over what it masks.
  """

  x: Value
  keep: Any
  fill: np.ndarray
  spread: np.ndarray
  bound: float
  plain: Callable[[], Value]
  origin: Any = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.x.shape

  @property
  def top(self) -> float:
    """No masked entry stands for more."""
    most = self.fill + self.spread
    return float((most if self.keep is None else most[~self.keep]).max(initial=-math.inf))


class Complex(NamedTuple):
  """Two real numbers, each held as it may be; a part may be public."""

  real: Any
  imag: Any

  @property
  def shape(self) -> tuple[int, ...]:
    return np.broadcast_shapes(*(v.shape for v in self))


def outwards(magnitude: float) -> float:
  """The least 2^m (1 - 2^-6) that is not smaller: a plan says nothing finer of anybody's data.

  The 64th leaves room for rounding below the power of two.
  """
  if magnitude == 0 or math.isinf(magnitude):
    return magnitude
  return 2.0 ** math.ceil(math.log2(magnitude / _BELOW)) * _BELOW


def most_of(dtype: Any) -> float:
  """The largest magnitude of a dtype of whole numbers or truth values; infinity for reals."""
  if jnp.issubdtype(dtype, jnp.bool_):
    return 1.0
  if not jnp.issubdtype(dtype, jnp.integer):
    return math.inf
  return float(max(jnp.iinfo(dtype).max, -int(jnp.iinfo(dtype).min)))


def is_real(v: Any) -> bool:
  """Whether v is a public array of real numbers."""
  known = not is_secret(v) and not isinstance(v, Ref | jax.core.Tracer)
  return known and jnp.issubdtype(np.asarray(v).dtype, jnp.floating)


def is_low(v: Any) -> bool:
  """Whether v is a public array that masks."""
  return is_real(v) and bool(np.any(np.asarray(v, np.float64) <= LOW))


def is_secret(v: Any) -> bool:
  return isinstance(v, Owned | Lazy | Pending | Masked | Value | Complex)


def varies_along(
  equation: Equation, inputs: Sequence[Any], aval: jax.ShapeDtypeStruct
) -> frozenset[int]:
  """The axes along which an owned result may vary."""
  everywhere = frozenset(i for i, n in enumerate(aval.shape) if n > 1)
  if equation.name == "broadcast_in_dim" and isinstance(inputs[0], Owned):
    dims = equation.params["broadcast_dimensions"]
    return frozenset(dims[i] for i in inputs[0].varies if inputs[0].shape[i] > 1)
  if equation.name in ("reshape", "squeeze", "expand_dims") and isinstance(inputs[0], Owned):
    kept = lambda shape: [n for n in shape if n > 1]
    if kept(inputs[0].shape) == kept(aval.shape):
      old = [i for i, n in enumerate(inputs[0].shape) if n > 1]
      new = [i for i, n in enumerate(aval.shape) if n > 1]
      return frozenset(b for a, b in zip(old, new, strict=True) if a in inputs[0].varies)
  if equation.name in ELEMENTWISE and all(isinstance(v, Owned) or np.ndim(v) == 0 for v in inputs):
    return frozenset().union(*(v.varies for v in inputs if isinstance(v, Owned))) & everywhere
  return everywhere


def compact_shape(owned: Owned) -> tuple[int, ...]:
  return tuple(n if i in owned.varies else 1 for i, n in enumerate(owned.shape))


def compact(owned: Owned) -> Callable[[Values], Array]:
  """Reads one slice along the axes that do not vary."""
  return Derived(_sliced, (owned,), compact_shape(owned))


def _sliced(v: Array, *sizes: int) -> Array:
  return v[tuple(slice(0, n) for n in sizes)]


ELEMENTWISE = {
  "abs", "add", "convert_element_type", "copy", "div", "exp", "integer_pow", "log", "logistic",
  "max", "min", "mul", "neg", "pow", "rsqrt", "sign", "sqrt", "square", "stop_gradient", "sub",
  "tanh",
}  # fmt: skip
