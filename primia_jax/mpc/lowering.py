"""From a program's equations to a circuit: who knows what decides the protocol of each equation.

A value is public (an array), `Owned` by a party in the clear, or shared. What depends on one party's values alone that
party computes in plain floating point; a linear layer with an owned operand waits (`Lazy`) for scales and offsets that
its owner can fold into it (BatchNorm); a ReLU waits (`Pending`) while only maxima and reshapings follow, so that
pooling comes first. Anything without a rule is refused by name, with its source line.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.mpc import functions, maps, products
from primia_jax.mpc.circuit import Builder, Circuit, Config, Value
from primia_jax.mpc.products import Map
from primia_jax.mpc.program import Equation, Program, Ref
from primia_jax.types import Array

_FEWEST_BITS, _ENOUGH_BITS = 6, 10  # of the largest weight of a layer
Env = Mapping[int, Array]  # an owner's values by number


class Owned(NamedTuple):
  """A value in the clear at one party.

  Attributes:
    owner: the party.
    read: (the owner's values) -> the array.
    shape: of the array.
    varies: axes along which it may vary; along the others it repeats one slice.
  """

  owner: int
  read: Callable[[Env], Array]
  shape: tuple[int, ...]
  varies: frozenset[int]


class Lazy(NamedTuple):
  """map(x, weight) + offset, not yet computed: its owner may still scale it."""

  x: Value
  map: Map
  weight: Owned
  offset: Owned | None
  shape: tuple[int, ...]
  axes: tuple[int | None, ...]  # for each axis of the output, that of the weight it comes from
  after: tuple[Callable[[Array], Array], ...]  # rearrangements of the product, before the offset is added
  bound: float = math.inf
  layer: str = ""
  largest_sum: float = 0.0  # of the sums that it enters, for which the ring must have room too


class Pending(NamedTuple):
  """max(x, 0), not yet computed."""

  x: Value
  bound: float = math.inf
  layer: str = ""


def lower(
  program: Program,
  owners: Sequence[Any],
  config: Config,
  ranges: np.ndarray | None = None,
  known: Mapping[int, Env] | None = None,
) -> Circuit:
  """Builds the circuit of a program.

  Args:
    program: the function.
    owners: for each flat input that is not public, its party; None for an argument given as shares.
    config: the ring and what else the parties agree on.
    ranges: [number of values] the largest magnitude of each, as calibrated; None assumes nothing.
    known: for an owner who plans with its values at hand, those values, from which the scales of its operands follow.

  Raises:
    NotImplementedError: for a primitive without a rule.
    ValueError: where a calibrated range does not fit the ring.
  """
  low = _Lowering(program, config, ranges, known or {})
  for ref, owner, aval in zip(program.inputs, owners, program.avals, strict=True):
    if isinstance(ref, Ref):
      low.enter(ref, owner, aval)
  for equation in program.equations:
    low.lower(equation)
  found = [low.env[v.number] if isinstance(v, Ref) else v for v in program.outputs]
  outputs = [low.value(v) if is_secret(v) else v for v in found]
  return low.build.circuit(outputs)


class _Lowering:
  def __init__(self, program: Program, config: Config, ranges: np.ndarray | None, known: Mapping[int, Env]):
    self.build = Builder(config)
    self.ranges, self.known = ranges, known
    self.env: dict[int, Any] = {}
    self.forced: dict[Any, Value] = {}
    self.labels: dict[int, str] = {}
    self.pools = _pooled(program)
    self.sums = np.full(program.num_values, math.inf) if ranges is None else np.array(ranges, np.float64)
    for equation in reversed(program.equations):
      if equation.name in ("add", "sub"):
        inputs = [v.number for v in equation.inputs if isinstance(v, Ref)]
        self.sums[inputs] = np.maximum(self.sums[inputs], self.sums[equation.outputs[0].number])

  def enter(self, ref: Ref, owner: int | None, aval: jax.ShapeDtypeStruct) -> None:
    owned = Owned(owner or 0, _reader(ref), aval.shape, frozenset(range(len(aval.shape))))
    if owner is None:
      self.env[ref.number] = self.build.input(None, owned.read, aval.shape, self.bound(ref))
    else:
      self.env[ref.number] = owned

  def bound(self, ref: Ref) -> float:
    if self.ranges is None:
      return math.inf
    return float(self.ranges[ref.number]) * self.build.config.margin

  def lower(self, equation: Equation) -> None:
    inputs = [self.env[v.number] if isinstance(v, Ref) else v for v in equation.inputs]
    self.build.layer = layer = self.label(equation)
    owners = {v.owner for v in inputs if isinstance(v, Owned)}
    if len(owners) == 1 and all(isinstance(v, Owned) or not is_secret(v) for v in inputs):
      (owner,) = owners
      for ref, aval in zip(equation.outputs, equation.avals, strict=True):
        self.env[ref.number] = Owned(owner, _reader(ref), aval.shape, _varies(equation, inputs, aval))
      return
    rule = RULES.get(equation.name)
    if rule is None:
      raise NotImplementedError(
        f"{equation.name} of a secret value has no protocol (at {equation.source}, in {equation.layer}); supported are "
        + ", ".join(sorted(RULES))
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
    """Where an equation stands: its own scope, or the deeper one that its input comes from."""
    label = equation.layer
    for v in equation.inputs:
      if isinstance(v, Ref) and self.labels.get(v.number, "").startswith(label):
        label = self.labels[v.number]
    for ref in equation.outputs:
      self.labels[ref.number] = label
    return label

  # ---- conversions

  def value(self, v: Any) -> Value:
    """v as shares; what waits is computed now, once."""
    if isinstance(v, Value):
      return v
    if v not in self.forced:
      match v:
        case Owned():
          self.forced[v] = self.build.input(v.owner, v.read, v.shape, self.largest(v, self.build.config.margin))
        case Pending() | Lazy():
          here, self.build.layer = self.build.layer, v.layer or self.build.layer
          out = self.compute(v) if isinstance(v, Lazy) else self.build.relu(v.x)
          self.forced[v] = out._replace(max_abs=min(out.max_abs, v.bound))
          self.build.layer = here
        case _:
          raise TypeError(f"a public {type(v).__name__} does not become shares")
    return self.forced[v]

  def compute(self, lazy: Lazy) -> Value:
    """The one-sided product, at a scale that fills the operand's bits and leaves room in the ring."""
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
    if fraction_bits > fits:  # weights lose bits; where that is too many, x is truncated first
      if fits + magnitude < _ENOUGH_BITS:
        x = self.build.narrow(x)
        fits = math.floor(room + math.log2(x.scale))
      fraction_bits = min(fraction_bits, fits)
      if fraction_bits + magnitude < _FEWEST_BITS:
        raise ValueError(
          f"{self.build.layer}: values up to {bound:.4g} leave weights fewer than {_FEWEST_BITS} bits in a ring of "
          f"{config.num_bits} bits; use a wider ring or fewer fraction_bits"
        )
    out = self.build.linear(
      x, lazy.weight.owner, lazy.weight.read, lazy.weight.shape, 2.0**-fraction_bits, bits, lazy.map, bound
    )
    for fn in lazy.after:
      out = self.build.local(fn, out)
    if lazy.offset is not None:
      offset = lazy.offset
      largest = self.largest(offset, slack=config.margin)
      out = self.build.add_owned(out, offset.owner, _compact(offset), _compact_shape(offset), largest)
      out = out._replace(max_abs=bound)
    return out

  def least(self, x: Value) -> float:
    """A magnitude that no value exceeds, and that a difference still holds."""
    return x.max_abs if not math.isinf(x.max_abs) else 2.0 ** (self.build.config.num_bits - 4) * x.scale

  def largest(self, owned: Owned, slack: float = 1.0) -> float:
    """The largest magnitude of an owned value, where its owner plans with it at hand; with slack where data."""
    if owned.owner not in self.known:
      return math.inf
    return float(jnp.max(jnp.abs(owned.read(self.known[owned.owner])))) * slack


_MAXIMA = {"max", "reduce_window_max"}
_THROUGH = {"pad", "slice", "reshape", "squeeze", "expand_dims", "transpose", "copy"}


def _pooled(program: Program) -> set[int]:
  """The values that reach nothing but maxima, through reshapings alone."""
  readers: dict[int, list[Equation]] = {}
  for equation in program.equations:
    for v in equation.inputs:
      if isinstance(v, Ref):
        readers.setdefault(v.number, []).append(equation)
  kept = {v.number for v in program.outputs if isinstance(v, Ref)}
  pooled: set[int] = set()
  for equation in program.equations[::-1]:
    ref = equation.outputs[0].number
    found = readers.get(ref, [])
    reaches = lambda e: e.name in _MAXIMA or (e.name in _THROUGH and e.outputs[0].number in pooled)
    if found and ref not in kept and all(map(reaches, found)):
      pooled.add(ref)
  return pooled


def _reader(ref: Ref) -> Callable[[Env], Array]:
  return lambda env: env[ref.number]


def is_secret(v: Any) -> bool:
  return isinstance(v, Owned | Lazy | Pending | Value)


def _varies(equation: Equation, inputs: Sequence[Any], aval: jax.ShapeDtypeStruct) -> frozenset[int]:
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


def _compact_shape(owned: Owned) -> tuple[int, ...]:
  return tuple(n if i in owned.varies else 1 for i, n in enumerate(owned.shape))


def _compact(owned: Owned) -> Callable[[Env], Array]:
  """Reads one slice along the axes where nothing varies."""
  index = tuple(slice(None) if i in owned.varies else slice(0, 1) for i in range(len(owned.shape)))
  return lambda env: owned.read(env)[index]


ELEMENTWISE = {"add", "sub", "mul", "div", "neg", "rsqrt", "sqrt", "square", "integer_pow", "max", "min", "exp", "log"}
ELEMENTWISE |= {"convert_element_type", "copy", "stop_gradient", "pow", "abs", "sign", "logistic", "tanh"}


# ---- sums and products


def _add(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(a) or (isinstance(a, Owned) and not isinstance(b, Owned)):
    a, b = b, a
  if isinstance(a, Lazy) and isinstance(b, Owned) and b.owner == a.weight.owner:
    offset = b if a.offset is None else _combine(jnp.add, a.offset, b)
    return a._replace(offset=offset)
  x = low.value(a)
  if not is_secret(b):
    return low.build.add_public(x, b)
  if isinstance(b, Owned):
    x = low.build.broadcast(x, equation.avals[0].shape)
    return low.build.add_owned(x, b.owner, _compact(b), _compact_shape(b), low.largest(b, low.build.config.margin))
  return low.build.add(x, low.value(b))


def _sub(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(b):
    return low.build.add_public(low.value(a), -np.asarray(b, np.float64))
  return _add(low, equation, [a, _negative(low, b)])


def _negative(low: _Lowering, v: Any) -> Any:
  if isinstance(v, Owned):
    return v._replace(read=lambda env: -v.read(env))
  return low.build.negate(low.value(v))


def _neg(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  return _negative(low, inputs[0])


def _mul(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(a) or (isinstance(a, Owned) and not isinstance(b, Owned)):
    a, b = b, a
  if not is_secret(b):
    return low.build.multiply_public(low.build.broadcast(low.value(a), equation.avals[0].shape), b)
  if isinstance(b, Owned):
    return _scale(low, equation, a, b)
  return low.build.multiply(low.value(a), low.value(b))


def _scale(low: _Lowering, equation: Equation, a: Any, b: Owned) -> Any:
  """A shared value times an owned one: folded into the linear layer that made it, or a one-sided product."""
  folds = lambda a: b.varies <= {i for i, axis in enumerate(a.axes) if axis is not None}
  if isinstance(a, Lazy) and b.owner == a.weight.owner and folds(a):
    weight = a.weight
    factor = lambda env: _along(b, env, a.axes, len(weight.shape))
    scaled = weight._replace(read=lambda env: weight.read(env) * factor(env))
    return a._replace(weight=scaled, offset=None if a.offset is None else _combine(jnp.multiply, a.offset, b))
  shape = equation.avals[0].shape
  x = low.build.narrow(low.build.broadcast(low.value(a), shape))
  everywhere = b._replace(read=lambda env: jnp.broadcast_to(b.read(env), shape), shape=shape)
  return Lazy(x, maps.MULTIPLY, everywhere, None, shape, tuple(range(len(shape))), ())


def _along(factor: Owned, env: Env, axes: Sequence[int | None], ndim: int) -> Array:
  """A factor on a linear layer's output, as one on its weight: its axes moved to the weight's."""
  f = _compact(factor)(env)
  order = sorted((axis, i) for i, axis in enumerate(axes) if axis is not None)
  f = f.transpose([i for i in range(f.ndim) if axes[i] is None] + [i for _, i in order])
  sizes = dict(zip([axis for axis, _ in order], f.shape[len(axes) - len(order) :], strict=True))
  return f.reshape([sizes.get(axis, 1) for axis in range(ndim)])


def _combine(fn: Callable, a: Owned, b: Owned) -> Owned:
  shape = np.broadcast_shapes(a.shape, b.shape)
  return Owned(a.owner, lambda env: fn(a.read(env), b.read(env)), shape, a.varies | b.varies)


def _div(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(b):
    return _mul(low, equation, [a, 1 / np.asarray(b, np.float64)])
  if isinstance(b, Owned):
    return _mul(low, equation, [a, b._replace(read=lambda env: 1 / b.read(env))])
  return functions.divide(low.build, low.value(a) if is_secret(a) else a, low.value(b))


def _bilinear(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Convolutions and matrix products."""
  a, b = inputs
  mapping = maps.from_equation(equation.name, equation.params)
  if isinstance(b, Owned) and not (isinstance(a, Owned) and a.owner < b.owner):
    x, weight, order = low.value(a) if is_secret(a) else a, b, None
  elif isinstance(a, Owned) or not is_secret(a):
    mapping, order = maps.swapped(mapping, len(_shape(a)), len(_shape(b)))
    x, weight = low.value(b), a
  else:
    x, weight, order = low.value(a), b, None
  if not is_secret(weight):
    return _public_product(low, x, weight, mapping, order)
  if isinstance(weight, Owned) and isinstance(x, Value):
    shape = maps.shape_of(mapping, x.shape, weight.shape)
    axes = maps.weight_axes(mapping, x.shape, weight.shape)
    if order is None:
      return Lazy(x, mapping, weight, None, shape, axes, ())
    shape, axes = tuple(shape[i] for i in order), tuple(axes[i] for i in order)
    return Lazy(x, mapping, weight, None, shape, axes, (functools.partial(lax.transpose, permutation=order),))
  if not isinstance(x, Value):
    raise NotImplementedError(f"{equation.name} of a public left operand at {equation.source}")
  return low.build.product(x, low.value(weight), mapping, low.bound(equation.outputs[0]))


def _public_product(low: _Lowering, x: Value, weight: Any, mapping: Map, order: Any) -> Value:
  """A linear map with public coefficients: each party applies it to its share."""
  config = low.build.config
  x = low.build.narrow(x)
  weight = np.asarray(weight, np.float64)
  unit = 2.0 ** (math.frexp(float(np.abs(weight).max()) or 1.0)[1] - (config.weight_bits - 1))
  integers = np.rint(weight / unit).astype(np.int64).astype(config.dtype)

  def fn(v: Array) -> Array:
    operand = products.split(mapping, jnp.asarray(integers), config.weight_bits, config.num_bits)
    return products.multiply(mapping, v, operand, config.num_bits)

  out = low.build.local(fn, x, max_abs=math.inf)
  out = out._replace(scale=out.scale * unit)
  return out if order is None else low.build.local(lambda v: lax.transpose(v, order), out)


def _shape(v: Any) -> tuple[int, ...]:
  return v.x.shape if isinstance(v, Pending) else v.shape if is_secret(v) else np.shape(v)


# ---- structure


def _structural(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """What only moves or adds up elements: each party does it to its share. Other operands (indices) are public."""
  if any(is_secret(v) for v in inputs[1:]):
    raise NotImplementedError(f"{equation.name} at a secret position, at {equation.source}")
  apply = lambda v: equation.bind(v, *inputs[1:])
  if isinstance(inputs[0], Lazy) and equation.name in RESHAPES and (moved := _reshaped(inputs[0], equation)):
    return moved
  if isinstance(inputs[0], Pending) and equation.outputs[0].number in low.pools:
    return Pending(low.build.local(lambda v: apply(v)[0], inputs[0].x))
  x = low.value(inputs[0])
  terms = math.prod(x.shape) / max(1, math.prod(equation.avals[0].shape)) if equation.name in SUMS else 1.0
  if len(equation.outputs) > 1:
    return [low.build.local(lambda v, i=i: apply(v)[i], x) for i in range(len(equation.outputs))]
  return low.build.local(lambda v: apply(v)[0], x, max_abs=x.max_abs * terms)


def _reshaped(lazy: Lazy, equation: Equation) -> Lazy | None:
  """A lazy product in another shape, where the weight's axes stay whole and no offset is in the way."""
  shape = equation.avals[0].shape
  before = lambda sizes, i: math.prod(sizes[:i])
  axes: list[int | None] = [None] * len(shape)
  for i, axis in enumerate(lazy.axes):
    if axis is not None:
      place = [j for j in range(len(shape)) if shape[j] == lazy.shape[i] and before(shape, j) == before(lazy.shape, i)]
      if not place:
        return None
      axes[place[-1]] = axis
  if lazy.offset is not None:
    return None
  reshape = lambda v: v.reshape(shape)
  return lazy._replace(shape=shape, axes=tuple(axes), after=(*lazy.after, reshape))


RESHAPES = {"reshape", "squeeze", "expand_dims"}
SUMS = {"reduce_sum", "reduce_window_sum", "cumsum"}
MOVES = {"transpose", "broadcast_in_dim", "slice", "rev", "gather", "dynamic_slice", "split", "tile"}


def _same(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  if equation.name == "convert_element_type" and jnp.issubdtype(equation.params["new_dtype"], jnp.integer):
    before = equation.params["new_dtype"]
    if not (isinstance(inputs[0], Value) and float(inputs[0].scale) == 1.0):
      raise NotImplementedError(f"rounding a secret value to {before} at {equation.source}")
  return inputs[0] if isinstance(inputs[0], Lazy | Pending | Value) else low.value(inputs[0])


def _concatenate(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  values = [low.value(v) if is_secret(v) else v for v in inputs]
  secrets = [v for v in values if isinstance(v, Value)]
  scale = min(v.scale for v in secrets)
  finest = next(v for v in secrets if v.scale == scale)
  aligned = []
  for v in values:
    if not isinstance(v, Value):
      zeros = functools.partial(lambda x, shape: jnp.zeros(shape, x.dtype), shape=np.shape(v))
      v = low.build.add_public(low.build.local(zeros, finest, max_abs=0.0), v)
    aligned.append(low.build.align(v, finest)[0])
  axis = equation.params["dimension"]
  return low.build.local(lambda *xs: lax.concatenate(xs, axis), *aligned)


def _stack(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  axis = equation.params["axis"]
  raised = [
    low.build.local(lambda x: jnp.expand_dims(x, axis), low.value(v)) if is_secret(v) else np.expand_dims(v, axis)
    for v in inputs
  ]
  return _concatenate(low, equation._replace(params={"dimension": axis}), raised)


def _pad(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Pads with a public number. Minus infinity, which only a maximum can lose again, becomes the least number."""
  config = equation.params["padding_config"]
  if is_secret(inputs[1]):
    raise NotImplementedError(f"padding with a secret value at {equation.source}")
  fill = float(np.asarray(inputs[1]))
  pad = lambda v: lax.pad(v, np.zeros((), v.dtype), config)
  waits = not equation.outputs or equation.outputs[0].number in low.pools
  if isinstance(inputs[0], Pending) and fill in (0.0, -math.inf) and waits:  # max(x, 0) of either padding is 0
    return Pending(low.build.local(pad, inputs[0].x))
  x = low.value(inputs[0])
  out = low.build.local(pad, x)
  if fill == 0:
    return out
  if math.isinf(fill):
    fill = math.copysign(low.least(x), fill)
  inside = np.zeros(x.shape)
  edge = np.asarray(lax.pad(jnp.asarray(inside, jnp.float32), np.float32(1), config), np.float64)
  return low.build.add_public(out, edge * fill)


# ---- comparison and choice


def _max(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(a):
    a, b = b, a
  if not is_secret(b):
    public = np.asarray(b, np.float64)
    if np.all(np.isneginf(public)):
      return a
    if not np.any(public):
      x = a.x if isinstance(a, Pending) else low.value(a)
      return Pending(x) if equation.outputs[0].number in low.pools else low.build.relu(x)
    x = low.build.broadcast(low.value(a), equation.avals[0].shape)
    return low.build.add_public(low.build.positive_part(low.build.add_public(x, -public)), public)
  if isinstance(a, Pending) and isinstance(b, Pending):
    return Pending(low.build.maximum(a.x, b.x))
  shape = equation.avals[0].shape
  return low.build.maximum(*(low.build.broadcast(low.value(v), shape) for v in (a, b)))


def _min(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  negated = [_negative(low, v) if is_secret(v) else -np.asarray(v, np.float64) for v in inputs]
  return low.build.negate(low.value(_max(low, equation._replace(outputs=(Ref(-1),)), negated)))


def _difference(low: _Lowering, inputs: list[Any], shape: tuple[int, ...]) -> Value:
  a, b = inputs
  if not is_secret(b):
    return low.build.add_public(low.build.broadcast(low.value(a), shape), -np.asarray(b, np.float64))
  if not is_secret(a):
    return low.build.negate(_difference(low, [b, a], shape))
  return low.build.subtract(*(low.build.broadcast(low.value(v), shape) for v in (a, b)))


def _compare(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  name, shape = equation.name, equation.avals[0].shape
  if name in ("eq", "ne") and inputs[0] is inputs[1]:  # how JAX asks for NaN, which fixed point has not
    return np.full(shape, name == "eq")
  complement = lambda bit: low.build.add_public(low.build.negate(bit), 1.0)._replace(max_abs=1.0)
  at_least = lambda a, b: low.build.sign(_difference(low, [a, b], shape))
  a, b = inputs
  match name:
    case "ge":
      return at_least(a, b)
    case "le":
      return at_least(b, a)
    case "lt":
      return complement(at_least(a, b))
    case "gt":
      return complement(at_least(b, a))
    case _:
      both = low.build.multiply(at_least(a, b), at_least(b, a))
      return both if name == "eq" else complement(both)


def _select(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """case 0 + bit (case 1 - case 0)."""
  if len(inputs) != 3:
    raise NotImplementedError(f"select among {len(inputs) - 1} cases at {equation.source}")
  bit, off, on = inputs
  shape = equation.avals[0].shape
  if not is_secret(bit):
    return _public_select(low, np.broadcast_to(np.asarray(bit, bool), shape), off, on, shape)
  bit = low.build.broadcast(low.value(bit), shape)
  if not is_secret(off) and not is_secret(on):
    step = np.asarray(on, np.float64) - np.asarray(off, np.float64)
    return low.build.add_public(low.build.multiply_public(bit, np.broadcast_to(step, shape)), off)
  if not is_secret(on):
    difference = low.build.negate(_difference(low, [off, on], shape))
  else:
    difference = _difference(low, [on, off], shape)
  chosen = low.build.multiply(bit, difference)
  if not is_secret(off):
    return low.build.add_public(chosen, off)
  return low.build.add(low.build.broadcast(low.value(off), shape), chosen)


def _public_select(low: _Lowering, bit: np.ndarray, off: Any, on: Any, shape: tuple[int, ...]) -> Value:
  parts: list[Any] = []
  for keep, v in ((~bit, off), (bit, on)):
    if is_secret(v):
      mask = jnp.asarray(keep.astype(low.build.config.dtype))
      parts.append(low.build.local(lambda x, mask=mask: x * mask, low.build.broadcast(low.value(v), shape)))
    else:
      parts.append(np.where(keep, np.asarray(v, np.float64), 0.0))
  a, b = parts
  if isinstance(a, Value) and isinstance(b, Value):
    return low.build.add(a, b)
  return low.build.add_public(a, b) if isinstance(a, Value) else low.build.add_public(b, a)


def _clamp(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  least, x, most = inputs
  first = equation._replace(outputs=(Ref(-1),))
  return _min(low, equation, [_max(low, first, [x, least]), most])


def _logical(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """and, or, xor, not of secret bits."""
  build, one = low.build, lambda v: np.asarray(v, np.float64)
  complement = lambda bit: build.add_public(build.negate(bit), 1.0)._replace(max_abs=1.0)
  if equation.name == "not":
    return complement(low.value(inputs[0]))
  a, b = inputs if is_secret(inputs[0]) else inputs[::-1]
  x = low.value(a)
  both = build.multiply(x, low.value(b)) if is_secret(b) else build.multiply_public(x, one(b))
  if equation.name == "and":
    return both
  total = build.add(x, low.value(b)) if is_secret(b) else build.add_public(x, one(b))
  return build.subtract(total, both if equation.name == "or" else build.scaled(both, 2.0))._replace(max_abs=1.0)


def _reduce_extremum(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  x = low.value(inputs[0])
  if equation.name == "reduce_min":
    x = low.build.negate(x)
  for axis in sorted(equation.params["axes"], reverse=True):
    x = functions.tournament(low.build, x, axis)
  return low.build.negate(x) if equation.name == "reduce_min" else x


def _reduce_window_max(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Maxima over windows, one axis after the other."""
  params, pending = equation.params, isinstance(inputs[0], Pending)
  if any(d != 1 for d in params["base_dilation"]):
    raise NotImplementedError(f"reduce_window_max with base dilation at {equation.source}")
  x = inputs[0].x if pending else low.value(inputs[0])
  padding = [(a, b, 0) for a, b in params["padding"]]
  if any(a or b for a, b, _ in padding):
    fill = equation._replace(params={"padding_config": padding}, outputs=())
    x = _pad(low, fill, [Pending(x) if pending else x, np.float32(-np.inf)])
    x = x.x if isinstance(x, Pending) else x
  for axis, (size, stride, dilation) in enumerate(
    zip(params["window_dimensions"], params["window_strides"], params["window_dilation"], strict=True)
  ):
    last = x.shape[axis] - (size - 1) * dilation
    pieces = [
      low.build.local(
        functools.partial(
          lax.slice_in_dim, start_index=i * dilation, limit_index=i * dilation + last, stride=stride, axis=axis
        ),
        x,
      )
      for i in range(size)
    ]
    if size > 1 or stride > 1:
      x = functools.reduce(low.build.maximum, pieces)
  return Pending(x) if pending else x


def _unary(fn: Callable[[Builder, Value], Value]) -> Callable:
  return lambda low, equation, inputs: fn(low.build, low.value(inputs[0]))


def _argmax(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  x = low.value(inputs[0])
  if equation.name == "argmin":
    x = low.build.negate(x)
  (axis,) = equation.params["axes"]
  return functions.argmax(low.build, x, axis)


def _power(low: _Lowering, equation: Equation, inputs: list[Any]) -> Any:
  exponent: Any = equation.params.get("y") if equation.name == "integer_pow" else inputs[1]
  if is_secret(exponent) or np.size(exponent) != 1:
    raise NotImplementedError(f"a power that is not one public number, at {equation.source}")
  y = float(np.asarray(exponent).reshape(()))
  return functions.power(low.build, low.value(inputs[0]), int(y) if y == int(y) else y)


def _abs(build: Builder, x: Value) -> Value:
  twice = build.scaled(build.positive_part(x), 2.0)
  return build.subtract(twice, x)._replace(max_abs=x.max_abs)


RULES: dict[str, Callable] = (
  {
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "neg": _neg,
    "mul": _mul,
    "div": _div,
    "dot_general": _bilinear,
    "conv_general_dilated": _bilinear,
    "concatenate": _concatenate,
    "stack": _stack,
    "pad": _pad,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "select_n": _select,
    "reduce_max": _reduce_extremum,
    "reduce_min": _reduce_extremum,
    "reduce_window_max": _reduce_window_max,
    "argmax": _argmax,
    "argmin": _argmax,
    "integer_pow": _power,
    "pow": _power,
    "abs": _unary(_abs),
    "square": _unary(lambda build, x: functions.power(build, x, 2)),
    "is_finite": lambda low, equation, inputs: np.ones(equation.avals[0].shape, bool),
  }
  | {name: _structural for name in (*RESHAPES, *SUMS, *MOVES)}
  | {name: _same for name in ("copy", "stop_gradient", "convert_element_type", "optimization_barrier", "copy_p")}
  | {name: _compare for name in ("ge", "le", "gt", "lt", "eq", "ne")}
  | {name: _logical for name in ("and", "or", "xor", "not")}
  | {name: _unary(fn) for name, fn in functions.UNARY.items()}
)
