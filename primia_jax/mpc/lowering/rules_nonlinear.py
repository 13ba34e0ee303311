"""Rules for comparisons, choices and extrema, and for functions of one number."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import (
  exponentials,
  extrema,
  hyperbolic,
  piecewise,
  powers,
  trigonometry,
)
from primia_jax.mpc.lowering.ownership import Lowering, Pending, Rule, is_secret
from primia_jax.mpc.lowering.program import Equation, Ref
from primia_jax.mpc.lowering.rules_linear import negative, padded, same


def _max(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
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


def _min(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  negated = [negative(low, v) if is_secret(v) else -np.asarray(v, np.float64) for v in inputs]
  return low.build.negate(low.value(_max(low, equation._replace(outputs=(Ref(-1),)), negated)))


def _difference(low: Lowering, inputs: list[Any], shape: tuple[int, ...]) -> Value:
  a, b = inputs
  if not is_secret(b):
    return low.build.add_public(
      low.build.broadcast(low.value(a), shape), -np.asarray(b, np.float64)
    )
  if not is_secret(a):
    return low.build.negate(_difference(low, [b, a], shape))
  return low.build.subtract(*(low.build.broadcast(low.value(v), shape) for v in (a, b)))


def _compare(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  name, shape = equation.name, equation.avals[0].shape
  # JAX asks for NaN by comparing a value with itself; fixed point has no NaN.
  if name in ("eq", "ne") and inputs[0] is inputs[1]:
    return np.full(shape, name == "eq")
  complement = lambda bit: _complement(low.build, bit)
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


def _convert(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """A truth value is other than zero; only whole numbers become integers."""
  dtype = equation.params["new_dtype"]
  if jnp.issubdtype(dtype, jnp.bool_):
    return _compare(low, equation._replace(name="ne"), [inputs[0], np.zeros(())])
  whole = isinstance(inputs[0], Value) and float(inputs[0].scale) == 1.0
  if jnp.issubdtype(dtype, jnp.integer) and not whole:
    raise NotImplementedError(
      f"rounding a secret value to {dtype} at {equation.source}; keep it real"
    )
  return same(low, equation, inputs)


def _complement(build: Builder, bit: Value) -> Value:
  return build.add_public(build.negate(bit), 1.0)._replace(max_abs=1.0)


def _select(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """case 0 + bit (case 1 - case 0)."""
  if len(inputs) != 3:
    raise NotImplementedError(
      f"select among {len(inputs) - 1} cases at {equation.source}; nest jnp.where"
    )
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


def _public_select(
  low: Lowering, bit: np.ndarray, off: Any, on: Any, shape: tuple[int, ...]
) -> Value:
  parts: list[Any] = []
  for keep, v in ((~bit, off), (bit, on)):
    if is_secret(v):
      mask = jnp.asarray(keep.astype(low.build.config.dtype))
      parts.append(
        low.build.local(lambda x, mask=mask: x * mask, low.build.broadcast(low.value(v), shape))
      )
    else:
      parts.append(np.where(keep, np.asarray(v, np.float64), 0.0))
  a, b = parts
  if isinstance(a, Value) and isinstance(b, Value):
    return low.build.add(a, b)
  return low.build.add_public(a, b) if isinstance(a, Value) else low.build.add_public(b, a)


def _clamp(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  least, x, most = inputs
  first = equation._replace(outputs=(Ref(-1),))
  return _min(low, equation, [_max(low, first, [x, least]), most])


def _logical(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """and, or, xor, not of secret bits."""
  build, one = low.build, lambda v: np.asarray(v, np.float64)
  if equation.name == "not":
    return _complement(build, low.value(inputs[0]))
  a, b = inputs if is_secret(inputs[0]) else inputs[::-1]
  x = low.value(a)
  both = build.multiply(x, low.value(b)) if is_secret(b) else build.multiply_public(x, one(b))
  if equation.name == "and":
    return both
  total = build.add(x, low.value(b)) if is_secret(b) else build.add_public(x, one(b))
  return build.subtract(total, both if equation.name == "or" else build.scaled(both, 2.0))._replace(
    max_abs=1.0
  )


def _reduce_extremum(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  x = low.value(inputs[0])
  if equation.name == "reduce_min":
    x = low.build.negate(x)
  for axis in sorted(equation.params["axes"], reverse=True):
    x = extrema.tournament(low.build, x, axis)
  return low.build.negate(x) if equation.name == "reduce_min" else x


def _reduce_window_max(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Maxima over windows, one axis after the other."""
  params, pending = equation.params, isinstance(inputs[0], Pending)
  if any(d != 1 for d in params["base_dilation"]):
    raise NotImplementedError(
      f"reduce_window_max with base dilation at {equation.source}; dilate with lax.pad first"
    )
  x = inputs[0].x if pending else low.value(inputs[0])
  padding = [(a, b, 0) for a, b in params["padding"]]
  if any(a or b for a, b, _ in padding):
    fill = equation._replace(params={"padding_config": padding}, outputs=())
    x = padded(low, fill, [Pending(x) if pending else x, np.float32(-np.inf)])
    x = x.x if isinstance(x, Pending) else x
  for axis, (size, stride, dilation) in enumerate(
    zip(
      params["window_dimensions"], params["window_strides"], params["window_dilation"], strict=True
    )
  ):
    last = x.shape[axis] - (size - 1) * dilation
    pieces = [
      low.build.local(
        functools.partial(
          lax.slice_in_dim,
          start_index=i * dilation,
          limit_index=i * dilation + last,
          stride=stride,
          axis=axis,
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


def _argmax(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  x = low.value(inputs[0])
  if equation.name == "argmin":
    x = low.build.negate(x)
  (axis,) = equation.params["axes"]
  return extrema.argmax(low.build, x, axis)


def _ranged(fn: Callable[..., Value]) -> Callable:
  """As `_unary`, for functions that plan for the calibrated bound of their result."""
  return lambda low, equation, inputs: fn(
    low.build, low.value(inputs[0]), bound=low.bound(equation.outputs[0])
  )


def _power(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  base, exponent = inputs[0], equation.params.get("y", inputs[-1])
  bound = low.bound(equation.outputs[0])
  if is_secret(exponent) and is_secret(base):
    raise NotImplementedError(
      f"a secret power of a secret number at {equation.source}; use jnp.exp(y * jnp.log(x)) for "
      f"x > 0"
    )
  if is_secret(exponent):
    if not np.all(np.asarray(base) > 0):
      raise NotImplementedError(f"a secret power of a base <= 0 at {equation.source}; use one > 0")
    x = low.build.broadcast(low.value(exponent), equation.avals[0].shape)
    return exponentials.power_of(low.build, base, x, bound)
  if np.unique(exponent).size != 1:
    raise NotImplementedError(
      f"a power by several exponents at {equation.source}; use one number for each call"
    )
  y = float(np.ravel(exponent)[0])
  x = low.build.broadcast(low.value(base), equation.avals[0].shape)
  return powers.power(low.build, x, int(y) if y == int(y) else y, bound)


def _abs(build: Builder, x: Value) -> Value:
  twice = build.scaled(build.positive_part(x), 2.0)
  return build.subtract(twice, x)._replace(max_abs=x.max_abs)


UNARY: dict[str, Callable[[Builder, Value], Value]] = {
  "abs": _abs,
  "square": functools.partial(powers.power, exponent=2),
  "sign": piecewise.sign,
  "logistic": exponentials.logistic,
  "tanh": exponentials.tanh,
  "erf": exponentials.erf,
  "erfc": exponentials.erfc,
  "sin": trigonometry.sin,
  "cos": trigonometry.cos,
  "atan": trigonometry.atan,
}
RANGED: dict[str, Callable[..., Value]] = {
  "sqrt": powers.sqrt,
  "rsqrt": powers.rsqrt,
  "cbrt": powers.cbrt,
  "log": powers.log,
  "log1p": powers.log1p,
  "exp": exponentials.exp,
  "exp2": exponentials.exp2,
  "expm1": exponentials.expm1,
  "sinh": hyperbolic.sinh,
  "cosh": hyperbolic.cosh,
  "asinh": hyperbolic.asinh,
  "acosh": hyperbolic.acosh,
  "atanh": hyperbolic.atanh,
  "tan": trigonometry.tan,
}
RULES: dict[str, Rule] = {
  "max": _max,
  "min": _min,
  "clamp": _clamp,
  "select_n": _select,
  "convert_element_type": _convert,
  "reduce_max": _reduce_extremum,
  "reduce_min": _reduce_extremum,
  "reduce_window_max": _reduce_window_max,
  "argmax": _argmax,
  "argmin": _argmax,
  "integer_pow": _power,
  "pow": _power,
  "is_finite": lambda low, equation, inputs: np.ones(equation.avals[0].shape, bool),
}
RULES |= {name: _compare for name in ("ge", "le", "gt", "lt", "eq", "ne")}
RULES |= {name: _logical for name in ("and", "or", "xor", "not")}
RULES |= {name: _unary(fn) for name, fn in UNARY.items()}
RULES |= {name: _ranged(fn) for name, fn in RANGED.items()}
