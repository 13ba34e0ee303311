"""Who holds each value while a program is lowered, and which values wait to be computed.

A value is public (an array), `Owned` by a party in the clear, or shared (a `Value` of the circuit).
A linear layer with an owned operand waits (`Lazy`) for scales and offsets that its owner can fold
into it, such as those of BatchNorm. A ReLU waits (`Pending`) while only maxima and reshapings
follow, so that pooling comes first. Numbers far below all others wait (`Masked`), since a maximum
or an exponential that follows does not need them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Config, Value, Values
from primia_jax.mpc.lowering.program import Equation, Program, Ref
from primia_jax.mpc.maps import Map
from primia_jax.types import Array

LOW = -1e4  # a public number masks from here down
_FEWEST_BITS, _ENOUGH_BITS = 6, 10  # of the largest weight of a layer
Rule = Callable[["Lowering", Equation, list[Any]], Any]


class Owned(NamedTuple):
  """A value in the clear at one party.

  Attributes:
    owner: the party.
    read: (the owner's values) -> the array.
    shape: of the array.
    varies: the axes along which it may vary; along the others it repeats one slice.
  """

  owner: int
  read: Callable[[Values], Array]
  shape: tuple[int, ...]
  varies: frozenset[int]


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
  largest_sum: float = 0.0  # of the sums that it enters: the ring must have room for them too


class Pending(NamedTuple):
  """max(x, 0), not yet computed."""

  x: Value
  bound: float = math.inf
  layer: str = ""


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


class Lowering:
  """The state of a lowering: the circuit so far, and who holds each value."""

  def __init__(
    self, program: Program, config: Config, ranges: np.ndarray | None, known: Mapping[int, Values]
  ):
    self.build = Builder(config)
    self.ranges, self.known = ranges, known
    self.env: dict[int, Any] = {}
    self.forced: dict[Any, Value] = {}
    self.labels: dict[int, str] = {}
    self.pools = _pooled(program)
    self.sums = (
      np.full(program.num_values, math.inf) if ranges is None else np.array(ranges, np.float64)
    )
    for equation in reversed(program.equations):
      if equation.name in ("add", "sub") and not any(map(is_low, equation.inputs)):
        inputs = [v.number for v in equation.inputs if isinstance(v, Ref)]
        self.sums[inputs] = np.maximum(self.sums[inputs], self.sums[equation.outputs[0].number])

  def enter(self, ref: Ref, owner: int | None, aval: jax.ShapeDtypeStruct) -> None:
    owned = Owned(owner or 0, reader(ref), aval.shape, frozenset(range(len(aval.shape))))
    if owner is None:
      self.env[ref.number] = self.build.input(None, owned.read, aval.shape, self.bound(ref))
    else:
      self.env[ref.number] = owned

  def bound(self, ref: Ref) -> float:
    if self.ranges is None:
      return math.inf
    return float(self.ranges[ref.number]) * self.build.config.margin

  def lower(self, equation: Equation, rules: Mapping[str, Rule]) -> None:
    """Lowers one equation by its rule, or leaves it to the party that holds all its inputs."""
    inputs = [self.env[v.number] if isinstance(v, Ref) else v for v in equation.inputs]
    self.build.layer = layer = self.label(equation)
    if equation.outputs and not any(map(is_secret, inputs)):  # a rule found what is public
      with jax.ensure_compile_time_eval():
        found = equation.bind(*inputs)
      self.env |= {ref.number: v for ref, v in zip(equation.outputs, found, strict=True)}
      return
    owners = {v.owner for v in inputs if isinstance(v, Owned)}
    if len(owners) == 1 and all(isinstance(v, Owned) or not is_secret(v) for v in inputs):
      (owner,) = owners
      for ref, aval in zip(equation.outputs, equation.avals, strict=True):
        self.env[ref.number] = Owned(
          owner, reader(ref), aval.shape, _varies(equation, inputs, aval)
        )
      return
    rule = rules.get(equation.name)
    if rule is None:
      raise NotImplementedError(
        f"{equation.name} of a secret value has no protocol (at {equation.source}, in "
        f"{equation.layer}); supported are " + ", ".join(sorted(rules))
      )
    outputs = rule(self, equation, inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    for ref, out in zip(equation.outputs, outputs, strict=True):
      if isinstance(out, Value):
        out = out._replace(max_abs=min(out.max_abs, self.bound(ref)))
      elif isinstance(out, Lazy | Pending):
        out = out._replace(bound=self.bound(ref), layer=layer)
        if isinstance(out, Lazy):
          out = out._replace(largest_sum=float(self.sums[ref.number]) * self.build.config.margin)
      self.env[ref.number] = out

  def label(self, equation: Equation) -> str:
    """The layer of an equation: its own scope, or the deeper one that its input comes from."""
    label = equation.layer
    for v in equation.inputs:
      if isinstance(v, Ref) and self.labels.get(v.number, "").startswith(label):
        label = self.labels[v.number]
    for ref in equation.outputs:
      self.labels[ref.number] = label
    return label

  # ---- conversions

  def value(self, v: Any) -> Value:
    """v as shares; a waiting value is computed now, once."""
    if isinstance(v, Value):
      return v
    if v not in self.forced:
      match v:
        case Owned():
          self.forced[v] = self.build.input(
            v.owner, v.read, v.shape, self.largest(v, self.build.config.margin)
          )
        case Masked():
          self.forced[v] = v.plain()
        case Pending() | Lazy():
          here, self.build.layer = self.build.layer, v.layer or self.build.layer
          out = self.compute(v) if isinstance(v, Lazy) else self.build.relu(v.x)
          self.forced[v] = out._replace(max_abs=min(out.max_abs, v.bound))
          self.build.layer = here
        case _:
          raise TypeError(f"a public {type(v).__name__} needs no shares; use it as it is")
    return self.forced[v]

  def compute(self, lazy: Lazy) -> Value:
    """The one-sided product, at a scale that fills the operand's bits and fits the ring."""
    config = self.build.config
    bound, x, largest = lazy.bound, lazy.x, self.largest(lazy.weight)
    fraction_bits, bits = config.fraction_bits, config.num_bits
    if not math.isinf(largest) and largest > 0:
      bits = config.weight_bits
      fraction_bits = bits - 1 - max(math.frexp(largest)[1], -64)
    most = max(bound, lazy.largest_sum)
    room = config.num_bits - 3 - math.log2(most) if 0 < most < math.inf else math.inf
    magnitude = math.frexp(largest if math.isfinite(largest) else 1.0)[1]
    fits = math.floor(room + math.log2(x.scale)) if room < math.inf else fraction_bits
    if fraction_bits > fits:  # weights lose bits; if too many, x is truncated first
      if fits + magnitude < _ENOUGH_BITS:
        x = self.build.narrow(x, _ENOUGH_BITS - fits - magnitude)
        fits = math.floor(room + math.log2(x.scale))
      fraction_bits = min(fraction_bits, fits)
      if fraction_bits + magnitude < _FEWEST_BITS:
        raise ValueError(
          f"{self.build.layer}: values up to {bound:.4g} leave weights fewer than {_FEWEST_BITS} "
          f"bits in a ring of num_bits={config.num_bits}; use a wider ring or fewer fraction_bits"
        )
    out = self.build.linear(
      x,
      lazy.weight.owner,
      lazy.weight.read,
      lazy.weight.shape,
      2.0**-fraction_bits,
      bits,
      lazy.map,
      bound,
    )
    for fn in lazy.after:
      out = self.build.local(fn, out)
    if lazy.offset is not None:
      offset = lazy.offset
      largest = self.largest(offset, slack=config.margin)
      out = self.build.add_owned(out, offset.owner, compact(offset), compact_shape(offset), largest)
      out = out._replace(max_abs=bound)
    return out

  def least(self, x: Value) -> float:
    """A magnitude that no value exceeds and that leaves room for a difference."""
    return (
      x.max_abs if not math.isinf(x.max_abs) else 2.0 ** (self.build.config.num_bits - 4) * x.scale
    )

  def largest(self, owned: Owned, slack: float = 1.0) -> float:
    """The largest magnitude of an owned value if its owner plans with it at hand, times a slack."""
    if owned.owner not in self.known:
      return math.inf
    return float(jnp.max(jnp.abs(owned.read(self.known[owned.owner])))) * slack


_MAXIMA = {"max", "reduce_window_max"}
_THROUGH = {"pad", "slice", "reshape", "squeeze", "expand_dims", "transpose", "copy"}


def _pooled(program: Program) -> set[int]:
  """The values that only maxima read, directly or through reshapings."""
  readers: dict[int, list[Equation]] = {}
  for equation in program.equations:
    for v in equation.inputs:
      if isinstance(v, Ref):
        readers.setdefault(v.number, []).append(equation)
  kept = {v.number for v in program.outputs if isinstance(v, Ref)}
  pooled: set[int] = set()
  for equation in program.equations[::-1]:
    if not equation.outputs:  # a callback
      continue
    ref = equation.outputs[0].number
    found = readers.get(ref, [])
    reaches = lambda e: e.name in _MAXIMA or (e.name in _THROUGH and e.outputs[0].number in pooled)
    if found and ref not in kept and all(map(reaches, found)):
      pooled.add(ref)
  return pooled


def reader(ref: Ref) -> Callable[[Values], Array]:
  return lambda values: values[ref.number]


def is_real(v: Any) -> bool:
  """Whether v is a public array of real numbers."""
  known = not is_secret(v) and not isinstance(v, Ref | jax.core.Tracer)
  return known and jnp.issubdtype(np.asarray(v).dtype, jnp.floating)


def is_low(v: Any) -> bool:
  """Whether v is a public array that masks."""
  return is_real(v) and bool(np.any(np.asarray(v, np.float64) <= LOW))


def is_secret(v: Any) -> bool:
  return isinstance(v, Owned | Lazy | Pending | Masked | Value)


def _varies(
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
  index = tuple(slice(None) if i in owned.varies else slice(0, 1) for i in range(len(owned.shape)))
  return lambda values: owned.read(values)[index]


ELEMENTWISE = {
  "abs", "add", "convert_element_type", "copy", "div", "exp", "integer_pow", "log", "logistic",
  "max", "min", "mul", "neg", "pow", "rsqrt", "sign", "sqrt", "square", "stop_gradient", "sub",
  "tanh",
}  # fmt: skip
