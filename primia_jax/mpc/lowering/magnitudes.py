"""The largest magnitude of an equation's output, from those of its inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax.mpc.lowering.program import Equation, Ref
from primia_jax.types import Array

_MOVES = frozenset({
  "abs", "broadcast_in_dim", "clamp", "concatenate", "convert_element_type", "copy", "copy_p",
  "expand_dims", "imag", "max", "min", "neg", "optimization_barrier", "pad", "real", "reduce_max",
  "reduce_min", "reduce_window_max", "reshape", "rev", "squeeze", "stack", "stop_gradient", "tile",
  "transpose",
})  # fmt: skip
_KEEPS_MAXIMUM = frozenset({  # or what is above it
  "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "max", "reshape",
  "squeeze", "stop_gradient",
})  # fmt: skip
_READS = frozenset({"dynamic_slice", "gather", "shift_right_arithmetic", "slice", "split"})
_SUMS = frozenset({"add", "add_any", "and", "or", "sub", "xor"})
_ENDS = {
  "atan": math.pi / 2, "cos": 1.0, "erf": 1.0, "erfc": 2.0, "logistic": 1.0, "sign": 1.0,
  "sin": 1.0, "tanh": 1.0,
}  # fmt: skip
# What gives 0 where nothing but chance makes it 0 on all examples.
PLAIN = _MOVES | _READS | _SUMS | {"div", "mul", "reduce_sum", "select_n"}
POSITIONS = frozenset({"argmax", "argmin"})
ROUNDINGS = frozenset({"ceil", "floor", "rem", "round"})
_NOTHING = -1e8  # public numbers from here down mask, and stand for no number


class Input(NamedTuple):
  """An input of an equation.

  Attributes:
    largest: its largest magnitude.
    shape: of it.
    array: its value, where it is public or the model owner's; else None.
  """

  largest: float
  shape: tuple[int, ...]
  array: Any


def operand(
  v: Any, largest: np.ndarray, avals: Mapping[int, Any], fixed: Mapping[int, Array]
) -> Input:
  """An input by its number, or as the array that it is."""
  if isinstance(v, Ref):
    return Input(float(largest[v.number]), avals[v.number].shape, fixed.get(v.number))
  return Input(_of_public(v), np.shape(v), v)


def _of_public(v: Any) -> float:
  """The largest magnitude of a public array, without what masks (minus infinity, -1e9) and NaN."""
  if jax.dtypes.issubdtype(getattr(v, "dtype", bool), jax.dtypes.extended):
    return 0.0
  v = np.asarray(v)
  v = v if np.iscomplexobj(v) else v.astype(np.float64)
  with np.errstate(invalid="ignore"):
    counts = np.isfinite(v) & ~(v.real <= _NOTHING)
  return float(np.abs(np.where(counts, v, 0)).max(initial=0))


def bound(
  equation: Equation, number: int, operands: Sequence[Input], made: Mapping[int, Equation]
) -> float:
  """The largest magnitude of output `number`, or infinity where this does not know it.

  Args:
    equation: one primitive.
    number: of the output.
    operands: the inputs.
    made: by the number of a value, the equation that makes it.
  """
  name, params = equation.name, equation.params
  sizes, shape = [v.largest for v in operands], equation.avals[number].shape
  size, before = sizes[0] if sizes else math.inf, operands[0].shape if operands else ()
  if name in _ENDS:
    return _ENDS[name]
  if name in _MOVES:
    return max(sizes)
  if name in _READS:
    return size
  if name in _SUMS:
    return sizes[0] + sizes[1]
  match name:
    case "mul":
      return sizes[0] * sizes[1]
    case "div" if operands[1].array is not None:
      least = float(np.min(np.abs(np.asarray(operands[1].array, np.float64)), initial=math.inf))
      return size / least if least else math.inf
    case "select_n":
      return max(sizes[1:])
    case "reduce_sum":
      return size * max(1, math.prod(before) // max(1, math.prod(shape)))
    case "reduce_window_sum":
      return size * math.prod(params["window_dimensions"])
    case "cumsum":
      return size * max(1, before[params["axis"]])
    case "dynamic_update_slice":
      return max(sizes[:2])
    case "sort":
      return sizes[number]
    case "top_k":
      return float(before[-1] - 1) if number else size
    case "argmax" | "argmin":
      return float(max(0, math.prod(before[axis] for axis in params["axes"]) - 1))
    case "floor" | "ceil" | "round" | "not":
      return size + 1
    case "rem":
      return min(sizes)
    case "square":
      return size**2
    case "sqrt":
      return math.sqrt(size)
    case "integer_pow" if params["y"] >= 0:
      return _finite(lambda: size ** params["y"])
    case "exp" | "expm1":
      return 1.0 if _is_below_its_maximum(equation, made) else _finite(lambda: math.exp(size))
    case "log" | "log1p":  # no number that is shared is nearer to 0 than 2^-64
      return 64 * math.log(2) + math.log1p(size)
    case "exp2":
      return _finite(lambda: 2.0**size)
    case "dot_general" | "conv_general_dilated":
      return _of_layer(equation, *operands)
  return math.inf


def _finite(fn: Callable[[], float]) -> float:
  try:
    return fn()
  except OverflowError:
    return math.inf


def _of_layer(equation: Equation, a: Input, b: Input) -> float:
  """Of a matrix product or convolution: by the sums of its weights' magnitudes, if known."""
  if equation.name == "conv_general_dilated":
    left, right = (), tuple(equation.params["dimension_numbers"].rhs_spec[1:])
  else:
    (left, right), _ = equation.params["dimension_numbers"]
  if b.array is not None:
    return a.largest * _summed(b.array, right)
  if left and a.array is not None:
    return b.largest * _summed(a.array, left)
  return a.largest * b.largest * math.prod(b.shape[i] for i in right)


def _summed(weight: Array, axes: Sequence[int]) -> float:
  return float(np.abs(np.asarray(weight, np.float64)).sum(tuple(axes)).max(initial=0))


def _is_below_its_maximum(equation: Equation, made: Mapping[int, Equation]) -> bool:
  """Whether an exponential is of x - max(x), as in a softmax."""
  (x,) = equation.inputs
  difference = made.get(x.number) if isinstance(x, Ref) else None
  if difference is None or difference.name != "sub":
    return False
  first, second = difference.inputs
  while isinstance(second, Ref) and (step := made.get(second.number)):
    if step.name == "reduce_max":
      return isinstance(first, Ref) and step.inputs[0] == first
    refs = [v for v in step.inputs if isinstance(v, Ref)]
    if step.name not in _KEEPS_MAXIMUM or len(refs) != 1:
      return False
    (second,) = refs
  return False
