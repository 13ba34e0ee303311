"""Rules for sums, products and rearrangements; most of them cost no communication."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.mpc import maps, products
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import powers
from primia_jax.mpc.lowering.holders import (
  Derived,
  Lazy,
  Owned,
  Pending,
  compact,
  compact_shape,
  is_secret,
)
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation
from primia_jax.mpc.maps import Map
from primia_jax.types import Array


def _add(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(a) or (isinstance(a, Owned) and not isinstance(b, Owned)):
    a, b = b, a
  shape = equation.avals[0].shape
  if isinstance(b, Owned):
    b = _spread(b, shape)
  if (
    isinstance(a, Lazy) and isinstance(b, Owned) and b.owner == a.weight.owner and a.shape == shape
  ):
    offset = b if a.offset is None else _combine(jnp.add, a.offset, b)
    return a._replace(offset=offset)
  x = low.value(a)
  if not is_secret(b):
    return low.build.add_public(x, b)
  if isinstance(b, Owned):
    x = low.build.broadcast(x, shape)
    return low.build.add_owned(
      x, b.owner, compact(b), compact_shape(b), low.largest(b, low.build.config.margin)
    )
  return low.build.add(x, low.value(b))


def _spread(owned: Owned, shape: tuple[int, ...]) -> Owned:
  """An owned number as an array that does not vary; arrays stay as they are."""
  if owned.shape:
    return owned
  read = lambda values: jnp.broadcast_to(owned.read(values), shape)
  return Owned(owned.owner, read, shape, frozenset())


def _sub(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(b):
    return low.build.add_public(low.value(a), -np.asarray(b, np.float64))
  return _add(low, equation, [a, negative(low, b)])


def negative(low: Lowering, v: Any) -> Any:
  if isinstance(v, Owned):
    return v._replace(read=Derived(jnp.negative, (v,)))
  return low.build.negate(low.value(v))


def _neg(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  return negative(low, inputs[0])


def _mul(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(a) or (isinstance(a, Owned) and not isinstance(b, Owned)):
    a, b = b, a
  if not is_secret(b):
    return low.build.multiply_public(low.build.broadcast(low.value(a), equation.avals[0].shape), b)
  if isinstance(b, Owned):
    return _scale(low, equation, a, b)
  return low.build.multiply(low.value(a), low.value(b))


def _scale(low: Lowering, equation: Equation, a: Any, b: Owned) -> Any:
  """A shared value times an owned one: folded into the linear layer before it, or a one-sided
  product.
  """
  shape = equation.avals[0].shape
  b = _spread(b, shape)
  folds = lambda a: b.varies <= {i for i, axis in enumerate(a.axes) if axis is not None}
  if isinstance(a, Lazy) and b.owner == a.weight.owner and a.shape == shape and folds(a):
    weight = a.weight
    scaled = weight._replace(read=Derived(_scaled, (weight, b), (b.varies, a.axes)))
    return a._replace(
      weight=scaled, offset=None if a.offset is None else _combine(jnp.multiply, a.offset, b)
    )
  x = low.value(a) if isinstance(a, Owned) else low.build.narrow(low.value(a))
  x = low.build.broadcast(x, shape)
  everywhere = b._replace(read=Derived(jnp.broadcast_to, (b,), (shape,)), shape=shape)
  return Lazy(x, maps.MULTIPLY, everywhere, None, shape, tuple(range(len(shape))), ())


def _scaled(weight: Array, f: Array, varies: frozenset[int], axes: Sequence[int | None]) -> Array:
  """A linear layer's weight times a factor f on its output, which varies along some axes."""
  f = f[tuple(slice(None) if i in varies else slice(0, 1) for i in range(f.ndim))]
  order = sorted((axis, i) for i, axis in enumerate(axes) if axis is not None)
  f = f.transpose([i for i in range(f.ndim) if axes[i] is None] + [i for _, i in order])
  sizes = dict(zip([axis for axis, _ in order], f.shape[len(axes) - len(order) :], strict=True))
  return weight * f.reshape([sizes.get(axis, 1) for axis in range(weight.ndim)])


def _combine(fn: Callable, a: Owned, b: Owned) -> Owned:
  shape = np.broadcast_shapes(a.shape, b.shape)
  return Owned(a.owner, Derived(fn, (a, b)), shape, a.varies | b.varies)


def _div(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(b):
    with np.errstate(divide="ignore"):  # refused by name
      return _mul(low, equation, [a, 1 / np.asarray(b, np.float64)])
  if isinstance(b, Owned):
    inverse = Derived(_inverse, (b,))
    return _mul(low, equation, [a, b._replace(read=inverse, bound=math.inf, unit=None)])
  bound = low.bound(equation.outputs[0])
  return powers.divide(low.build, low.value(a) if is_secret(a) else a, low.value(b), bound=bound)


def _inverse(v: Array) -> Array:
  return 1 / v


def _bilinear(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Convolutions and matrix products; a matrix product may be exchanged to make the owned factor
  the weight.
  """
  a, b = inputs
  mapping = maps.from_equation(equation.name, equation.params)
  exchanged = isinstance(a, Owned) and not (isinstance(b, Owned) and b.owner < a.owner)
  if not is_secret(a) or (exchanged and equation.name == "dot_general"):
    if equation.name != "dot_general":
      raise NotImplementedError(
        f"{equation.name} of a public image with a secret kernel at {equation.source}"
      )
    mapping, order = maps.swapped(mapping, len(shape_of(a)), len(shape_of(b)))
    x, weight = low.value(b), a
  else:
    x, weight, order = low.value(a), b, None
  if not is_secret(weight):
    return public_product(low, x, weight, mapping, order)
  if isinstance(weight, Owned):
    shape = maps.shape_of(mapping, x.shape, weight.shape)
    axes = maps.weight_axes(mapping, x.shape, weight.shape)
    if order is None:
      return Lazy(x, mapping, weight, None, shape, axes, ())
    shape, axes = tuple(shape[i] for i in order), tuple(axes[i] for i in order)
    return Lazy(
      x, mapping, weight, None, shape, axes, (functools.partial(lax.transpose, permutation=order),)
    )
  return low.build.product(x, low.value(weight), mapping, low.bound(equation.outputs[0]))


def public_product(low: Lowering, x: Value, weight: Any, mapping: Map, order: Any) -> Value:
  """A linear map with public coefficients: each party applies it to its share."""
  config = low.build.config
  x = low.build.narrow(x)
  weight = np.asarray(weight, np.float64)
  low.build.check_finite("factor", weight)
  with jax.ensure_compile_time_eval():
    magnitudes = jnp.asarray(np.abs(weight), jnp.float32)
    sums = maps.apply(mapping, jnp.ones(x.shape, jnp.float32), magnitudes)
  largest = float(jnp.max(sums, initial=0)) * (1 + 2.0**-10)  # float32 rounds
  unit = 2.0 ** (math.frexp(float(np.abs(weight).max()) or 1.0)[1] - (config.weight_bits - 1))
  integers = np.rint(weight / unit).astype(np.int64)

  def fn(v: Array) -> Array:
    bits = 64 if v.dtype == np.uint64 else config.num_bits
    whole = jnp.asarray(integers.astype(v.dtype))
    return products.multiply(
      mapping, v, products.split(mapping, whole, config.weight_bits, bits), bits
    )

  out = low.build.local(fn, x, max_abs=x.max_abs * largest if largest else 0.0)
  out = out._replace(scale=out.scale * unit)
  return out if order is None else low.build.local(lambda v: lax.transpose(v, order), out)


def shape_of(v: Any) -> tuple[int, ...]:
  return v.x.shape if isinstance(v, Pending) else v.shape if is_secret(v) else np.shape(v)


def _structural(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Moves or adds up elements: each party does it to its share. Indices are public."""
  if any(is_secret(v) for v in inputs[1:]):
    raise NotImplementedError(
      f"{equation.name} at a secret position at {equation.source}; use a public one"
    )
  apply = lambda v: equation.bind(v, *inputs[1:])
  if equation.name == "gather":
    if _fills(apply, shape_of(inputs[0]), inputs[1]):
      raise NotImplementedError(
        f"gather out of bounds at {equation.source} fills with other numbers than zero; use "
        f"mode='clip' or fill_value=0"
      )
    zeros = {**equation.params, "fill_value": 0}  # the ring has no NaN, which is jnp.take's filling
    apply = lambda v: [lax.gather(v, inputs[1], **zeros)]
  if (
    isinstance(inputs[0], Lazy)
    and equation.name in RESHAPES
    and (moved := _reshaped(inputs[0], equation))
  ):
    return moved
  if isinstance(inputs[0], Pending) and equation.outputs[0].number in low.pools:
    return Pending(low.build.local(lambda v: apply(v)[0], inputs[0].x))
  x = low.value(inputs[0])
  if len(equation.outputs) > 1:
    return [low.build.local(lambda v, i=i: apply(v)[i], x) for i in range(len(equation.outputs))]
  most = x.max_abs * _terms(equation, x.shape)
  if low.build.room(x.scale) <= min(most, low.bound(equation.outputs[0])) < math.inf:
    x = low.build.narrow(x)  # the sum must fit the ring that a gate after it needs
  return low.build.local(lambda v: apply(v)[0], x, max_abs=most)


def _terms(equation: Equation, shape: tuple[int, ...]) -> int:
  """The most elements of the input that one element of the output adds up."""
  params = equation.params
  match equation.name:
    case "reduce_sum":
      return max(1, math.prod(shape[axis] for axis in params["axes"]))
    case "reduce_window_sum":
      return math.prod(params["window_dimensions"])
    case "cumsum":
      return max(1, shape[params["axis"]])
  return 1


def _fills(apply: Callable[[Array], list[Array]], shape: tuple[int, ...], indices: Any) -> bool:
  """Whether a gather fills in numbers that are not its operand's; False for indices that jit
  traces.
  """
  if isinstance(indices, jax.core.Tracer):
    return False
  with jax.ensure_compile_time_eval():
    return bool(jnp.any(apply(jnp.zeros(shape, jnp.float32))[0] != 0))


def _reshaped(lazy: Lazy, equation: Equation) -> Lazy | None:
  """A lazy product in another shape, if the weight's axes stay whole and it has no offset."""
  shape = equation.avals[0].shape
  before = lambda sizes, i: math.prod(sizes[:i])
  axes: list[int | None] = [None] * len(shape)
  for i, axis in enumerate(lazy.axes):
    if axis is not None:
      place = [
        j
        for j in range(len(shape))
        if shape[j] == lazy.shape[i] and before(shape, j) == before(lazy.shape, i)
      ]
      if not place:
        return None
      axes[place[-1]] = axis
  if lazy.offset is not None:
    return None
  reshape = lambda v: v.reshape(shape)
  return lazy._replace(shape=shape, axes=tuple(axes), after=(*lazy.after, reshape))


RESHAPES = {"reshape", "squeeze", "expand_dims"}
SUMS = {"reduce_sum", "reduce_window_sum", "cumsum"}
MOVES = {
  "transpose", "broadcast_in_dim", "slice", "rev", "gather", "dynamic_slice", "split", "tile",
}  # fmt: skip


def same(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """The value itself; its dtype does not matter."""
  return inputs[0] if isinstance(inputs[0], Lazy | Pending | Value) else low.value(inputs[0])


def _barrier(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Each value itself: parties compute step by step anyway."""
  return list(inputs)


def _concatenate(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  values = [low.value(v) if is_secret(v) else v for v in inputs]
  finest = min((v for v in values if isinstance(v, Value)), key=lambda v: v.scale)
  for i, v in enumerate(values):
    if not isinstance(v, Value):
      zeros = functools.partial(lambda x, shape: jnp.zeros(shape, x.dtype), shape=np.shape(v))
      values[i] = low.build.add_public(low.build.local(zeros, finest, max_abs=0.0), v)
  axis = equation.params["dimension"]
  return low.build.local(lambda *xs: lax.concatenate(xs, axis), *low.build.align(*values))


def _stack(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  axis = equation.params["axis"]
  raised = [
    low.build.local(lambda x: jnp.expand_dims(x, axis), low.value(v))
    if is_secret(v)
    else np.expand_dims(v, axis)
    for v in inputs
  ]
  return _concatenate(low, equation._replace(params={"dimension": axis}), raised)


def padded(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Pads with a public number; minus infinity, which only maxima may follow, becomes the least."""
  config = equation.params["padding_config"]
  if is_secret(inputs[1]):
    raise NotImplementedError(
      f"padding with a secret value at {equation.source}; concatenate it instead"
    )
  fill = float(np.asarray(inputs[1]))
  pad = lambda v: lax.pad(v, np.zeros((), v.dtype), config)
  waits = not equation.outputs or equation.outputs[0].number in low.pools
  if (
    isinstance(inputs[0], Pending) and fill in (0.0, -math.inf) and waits
  ):  # max(x, 0) of either padding is 0
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


RULES: dict[str, Rule] = {
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
  "pad": padded,
  "optimization_barrier": _barrier,
}
RULES |= {name: _structural for name in (*RESHAPES, *SUMS, *MOVES)}
RULES |= {name: same for name in ("copy", "copy_p", "stop_gradient")}
