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
from primia_jax.mpc.lowering import rules_integer
from primia_jax.mpc.lowering.holders import Pending, is_secret
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation, Ref
from primia_jax.mpc.lowering.rules_linear import negative, padded, same


def _max(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  a, b = inputs
  if not is_secret(a):
    a, b = b, a
  if not is_secret(b):
    public = np.asarray(b, np.float64)
    if np.all(np.isneginf(public)):
      return (
        a if isinstance(a, Pending) else low.build.broadcast(low.value(a), equation.avals[0].shape)
      )
    if not np.any(public):
      x = a.x if isinstance(a, Pending) else low.value(a)
      return Pending(x) if equation.outputs[0].number in low.pools else low.build.relu(x)
    x = low.build.broadcast(low.value(a), equation.avals[0].shape)
    public = np.where(np.isneginf(public), -low.least(x), public)
    if not np.all(np.isfinite(public)):
      raise NotImplementedError(f"{equation.name} with infinity or NaN at {equation.source}")
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
  name, shape = equation.name.removesuffix("_to"), equation.avals[0].shape
  # JAX asks for NaN by comparing a value with itself; fixed point has no NaN.
  if name in ("eq", "ne") and inputs[0] is inputs[1]:
    return np.full(shape, name == "eq")
  if name in ("lt", "ge") and _is_count(low, inputs[0]) and _at_most_zero(inputs[1]):
    return np.full(shape, name == "ge")
  if not is_secret(inputs[0]):
    inputs, name = inputs[::-1], _MIRRORED.get(name, name)
  if not is_secret(inputs[1]) and not np.all(np.isfinite(np.asarray(inputs[1], np.float64))):
    return _compare_infinite(low, equation._replace(name=name), inputs)
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
    case _:  # one gate; at least one of the two holds
      difference = _difference(low, [a, b], shape)
      both = low.build.local(lambda d: jnp.stack([d, d.dtype.type(0) - d]), difference)
      holds = low.build.local(lambda s: s.sum(0, dtype=s.dtype), low.build.sign(both))
      equal = low.build.add_public(holds, -1.0)._replace(max_abs=1.0)
      return equal if name == "eq" else complement(equal)


_MIRRORED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def _compare_infinite(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Every shared number is finite, so that what is beyond is known."""
  x, other = inputs[0], np.asarray(inputs[1], np.float64)
  finite, truth = np.isfinite(other), getattr(np, _UFUNCS[equation.name])(0.0, other)
  if not finite.any():
    return np.broadcast_to(truth, equation.avals[0].shape)
  compared = _compare(low, equation, [x, np.where(finite, other, 0.0)])
  finite, truth = (np.broadcast_to(v, equation.avals[0].shape) for v in (finite, truth))
  return _public_select(low, finite.astype(np.int64), [truth, compared], equation.avals[0].shape)


_UFUNCS = {
  "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal",
  "ne": "not_equal",
}  # fmt: skip


def _is_count(low: Lowering, v: Any) -> bool:
  return isinstance(v, Value) and v.number in low.counts


def _at_most_zero(v: Any) -> bool:
  return not is_secret(v) and bool(np.all(np.asarray(v) <= 0))


def _convert(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """A truth value is other than zero; integers are whole."""
  dtype = equation.params["new_dtype"]
  if jnp.issubdtype(dtype, jnp.bool_):
    return _compare(low, equation._replace(name="ne"), [inputs[0], np.zeros(())])
  if jnp.issubdtype(dtype, jnp.integer):
    return rules_integer.to_integer(low, equation, inputs)
  return same(low, equation, inputs)


def _complement(build: Builder, bit: Value) -> Value:
  return build.add_public(build.negate(bit), 1.0)._replace(max_abs=1.0)


def _select(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Each case where the selector has its number; C rounds for more than two, and P for each."""
  which, *cases = inputs
  shape = equation.avals[0].shape
  if not is_secret(which):
    number = np.broadcast_to(np.asarray(which).astype(np.int64), shape)
    return _public_select(low, number, cases, shape)
  which = low.build.broadcast(low.value(which), shape)
  if len(cases) == 2:
    return _two_cases(low, which, cases[0], cases[1], equation)
  reached = piecewise.steps(low.build, which, np.arange(1, len(cases)) / which.scale)
  out = cases[0]
  for i, case in enumerate(cases[1:]):
    bit = low.build.local(lambda v, i=i: v[i], reached)
    out = _two_cases(low, bit, out, case, equation)
  return out


def _two_cases(low: Lowering, bit: Value, off: Any, on: Any, equation: Equation) -> Value:
  """off + bit (on - off); exact for whole numbers."""
  shape = equation.avals[0].shape
  if not is_secret(off) and not is_secret(on):
    if rules_integer.is_integer(equation.avals[0].dtype):
      return rules_integer.chosen(low.build, bit, off, on)
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
  low: Lowering, which: np.ndarray, cases: list[Any], shape: tuple[int, ...]
) -> Value:
  """The sum of all cases, each with zeros where it is not chosen; no round."""
  if which.size and np.all(which == which.flat[0]) and is_secret(only := cases[which.flat[0]]):
    return low.build.broadcast(low.value(only), shape)
  secret, public = [], np.zeros(shape)
  for i, case in enumerate(cases):
    chosen = which == i
    if is_secret(case):
      mask = jnp.asarray(chosen.astype(low.build.config.dtype))
      x = low.build.broadcast(low.value(case), shape)
      secret.append(low.build.local(lambda v, mask=mask: v * mask.astype(v.dtype), x))
    else:
      public = np.where(chosen, np.asarray(case, np.float64), public)
  total = functools.reduce(low.build.add, secret)
  total = total._replace(max_abs=max(v.max_abs for v in secret))
  return low.build.add_public(total, public) if np.any(public) else total


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
  position = extrema.argmax(low.build, x, axis)
  low.counts.add(position.number)
  return position


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
RULES |= {name: _compare for name in ("ge", "le", "gt", "lt", "eq", "ne", "le_to", "lt_to")}
RULES |= {name: _logical for name in ("and", "or", "xor", "not")}
RULES |= {name: _unary(fn) for name, fn in UNARY.items()}
RULES |= {name: _ranged(fn) for name, fn in RANGED.items()}
