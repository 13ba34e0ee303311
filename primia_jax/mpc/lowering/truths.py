"""Room for what comparisons decide.

Calibration sees the largest magnitude on examples. Where none of them made a comparison true, what
follows from it was 0, which says nothing about other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax.mpc.lowering.program import Equation, Program, Ref

_MOVED = frozenset({
  "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice", "expand_dims",
  "neg", "optimization_barrier", "pad", "reduce_max", "reshape", "rev", "slice", "squeeze",
  "stop_gradient", "transpose",
})  # fmt: skip


def with_room(program: Program, largest: np.ndarray) -> np.ndarray:
  """[number of values] float64: for values that were 0 on all examples, what their inputs allow.

  The others are as they were. 0 is left where an input was 0 that follows from no comparison, and
  after primitives that are no sums, products, choices or moves of elements.

  Args:
    program: the program.
    largest: [number of values] float64 of `measure`, 1 for truth values.
  """
  out, avals = largest.copy(), dict[int, Any]()
  of = lambda v: out[v.number] if isinstance(v, Ref) else _largest(v)
  shape = lambda v: avals[v.number].shape if isinstance(v, Ref) else np.shape(v)
  for ref, aval in zip(program.inputs, program.avals, strict=True):
    if isinstance(ref, Ref):
      avals[ref.number] = aval
  for equation in program.equations:
    for ref, aval in zip(equation.outputs, equation.avals, strict=True):
      avals[ref.number] = aval
      if out[ref.number] == 0 and len(equation.outputs) == 1:
        out[ref.number] = _bound(equation, of, [shape(v) for v in equation.inputs], aval.shape)
  return out


def _bound(
  equation: Equation,
  of: Callable[[Any], float],
  shapes: Sequence[tuple[int, ...]],
  shape: tuple[int, ...],
) -> float:
  """The magnitude of an equation's one output, or 0 where this does not know it."""
  known = [of(v) for v in equation.inputs]
  if not all(map(math.isfinite, known)):
    return 0.0
  match equation.name:
    case "mul":
      return known[0] * known[1]
    case "add" | "sub" | "add_any":
      return known[0] + known[1]
    case "div" if not isinstance(equation.inputs[1], Ref):
      least = float(np.min(np.abs(np.asarray(equation.inputs[1], float)), initial=math.inf))
      return known[0] / least if least else 0.0
    case "reduce_sum":
      return known[0] * math.prod(shapes[0]) / max(1, math.prod(shape))
    case "select_n":
      return max(known[1:])
    case name if name in _MOVED:
      return max(known)
  return 0.0


def _largest(v: Any) -> float:
  if jax.dtypes.issubdtype(v.dtype, jax.dtypes.extended) or np.iscomplexobj(v):
    return math.inf
  return float(np.max(np.abs(np.asarray(v).astype(float)), initial=0))
