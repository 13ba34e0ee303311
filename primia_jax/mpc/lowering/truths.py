"""Room for what comparisons decide.

The rule. Calibration is representative where the examples took all pieces of a function, so that
an input within the margin only makes values longer. It is not where data decides between pieces:

- A number that comparisons alone make (a truth value, a position, a choice between public numbers,
  and the sums and layers of such numbers) jumps. It gets the largest magnitude that sums, products
  and weights allow, whatever the examples gave. After a choice whose pieces the examples all took
  (such as a ReLU), or a product with other data, the next layer is calibrated again; so is what a
  function makes of it whose bound is not known, such as a quotient by it.
- A maximum, minimum or choice with a piece that no example took, and that could be larger than what
  the examples gave, gets the largest magnitude of its pieces, and so does what follows from it, as
  far as that says more than the examples. So do roundings that gave 0 only.
- Everything else gets its largest magnitude on the examples.

A piece is taken if any element of any example takes it: so a network whose layers are neither all
above nor all below 0 keeps its calibrated ranges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.lowering import magnitudes
from primia_jax.mpc.lowering.program import Equation, Program, Ref
from primia_jax.types import Array

_COMPARISONS = {"ge", "le", "gt", "lt", "eq", "ne", "le_to", "lt_to"}
_CHOICES = {"max", "min", "select_n"}
_LAYERS = {"dot_general", "conv_general_dilated"}
_POWERS = {"integer_pow", "square", "pow"}


class _Follows(NamedTuple):
  """What a value follows from.

  Attributes:
    data: more than the model owner's values and public ones.
    jumps: comparisons alone, apart from what `mixed` says.
    mixed: jumps, and products with other data or choices whose pieces were all taken.
    unseen: a piece that no example took.
  """

  data: bool = False
  jumps: bool = False
  mixed: bool = False
  unseen: bool = False


def watch(taken: dict[int, int], equation: Equation, inputs: list[Any], outputs: list[Any]) -> None:
  """Notes in `taken`, by the output's number, which pieces an example took: bit i for piece i.

  The pieces of a maximum, minimum or choice are its cases; those of a truth value or a rounding are
  0 and everything else.
  """
  if len(equation.outputs) != 1:
    return
  found, name = 0, equation.name
  either = lambda a, b: int(np.any(a)) + 2 * int(np.any(b))
  if name in ("max", "min"):
    a, b = map(np.asarray, inputs if name == "max" else inputs[::-1])
    found = either(a > b, a < b)
  elif name == "select_n":
    which = np.asarray(inputs[0]).astype(np.int64)
    found = sum(1 << i for i in range(len(inputs) - 1) if np.any(which == i))
  elif _is_truth(equation) or _rounds(equation, inputs):
    nothing = np.asarray(outputs[0]) == 0
    found = either(nothing, ~nothing)
  if found:
    number = equation.outputs[0].number
    taken[number] = taken.get(number, 0) | found


def with_room(
  program: Program, largest: np.ndarray, taken: Mapping[int, int], fixed: Mapping[int, Array]
) -> np.ndarray:
  """[number of values] float64: the largest magnitude of each value by the rule above.

  It is not smaller than that on the examples; infinity where the rule asks for a bound that is not
  known.

  Args:
    largest: [number of values] float64 of `measure`, 1 for truth values.
    taken: by number, of `watch` over all examples.
    fixed: by number, the values that follow from the model owner's alone.
  """
  out, known = largest.copy(), largest.copy()
  follows, made, avals = dict[int, _Follows](), dict[int, Equation](), dict[int, Any]()
  for ref, aval in zip(program.inputs, program.avals, strict=True):
    if isinstance(ref, Ref):
      avals[ref.number] = aval
      data = ref.number not in fixed
      follows[ref.number] = _Follows(data, jumps=data and aval.dtype == bool)
  for e in program.equations:
    made |= {ref.number: e for ref in e.outputs}
    avals |= {ref.number: aval for ref, aval in zip(e.outputs, e.avals, strict=True)}
    of = [follows[v.number] if isinstance(v, Ref) else _Follows() for v in e.inputs]
    operands = [magnitudes.operand(v, known, avals, fixed) for v in e.inputs]
    for i, n in enumerate(ref.number for ref in e.outputs):
      pieces = taken.get(n, 0)
      found = _follows(e, of, [v.largest for v in operands], pieces, largest[n])
      rounds = pieces > 0 and e.name not in _CHOICES
      nothing = largest[n] == 0 and e.name in magnitudes.PLAIN
      if found.data and not _is_truth(e) and (found.jumps or found.unseen or rounds or nothing):
        bound = magnitudes.bound(e, i, operands, made)
        if np.isfinite(bound):
          out[n] = known[n] = max(largest[n], bound)
          found = found._replace(unseen=found.unseen and bound > largest[n])
        else:
          out[n] = np.inf if found.unseen else largest[n]
          found = found._replace(jumps=False, mixed=False)
      follows[n] = found
  return out


def _follows(
  e: Equation, of: list[_Follows], sizes: list[float], pieces: int, largest: float
) -> _Follows:
  """What an output follows from, before its bound is known."""
  joined = _joined(of)
  if _is_known(e) or not joined.data:
    return _Follows()
  if _is_truth(e):
    return _Follows(True, jumps=True, unseen=pieces != 3)
  if e.name in magnitudes.POSITIONS:
    return _Follows(True, jumps=True)
  skipped = lambda i: not pieces >> i & 1 and sizes[i] > largest
  if e.name == "select_n":
    cases = range(len(of) - 1)
    if not of[0].data:
      return _joined([of[1 + i] for i in cases if pieces >> i & 1])
    sizes = sizes[1:]
    cased = _joined(of[1:])
    jumps = all(v.jumps or not v.data for v in of[1:])
    return _Follows(True, jumps, cased.mixed, cased.unseen or any(map(skipped, cases)))
  if e.name in ("max", "min"):
    # Nothing reaches a public number but what is as large.
    beyond = any(skipped(i) for i, v in enumerate(of) if v.data)
    return joined._replace(mixed=joined.mixed or pieces == 3, unseen=joined.unseen or beyond)
  joined = joined._replace(unseen=joined.unseen or pieces == 1)
  if joined.unseen or not joined.jumps:
    return joined
  factors = [v for v, f in zip(e.inputs, of, strict=True) if f.data]
  of_data = len(factors) > 1 and (e.name in _LAYERS or factors[0] == factors[1])
  if of_data or (e.name in _LAYERS and joined.mixed) or e.name in _POWERS:
    return _Follows(True)
  return joined


def _joined(of: list[_Follows]) -> _Follows:
  data = [v for v in of if v.data]
  jumps = any(v.jumps for v in data)
  mixed = jumps and any(v.mixed or not v.jumps for v in data)
  return _Follows(bool(data), jumps, mixed, any(v.unseen for v in data))


def _is_known(e: Equation) -> bool:
  """Whether an equation asks for NaN or infinity, which no shared number is."""
  if e.name == "is_finite" or (e.name in _COMPARISONS and e.inputs[0] is e.inputs[1]):
    return True
  public = [v for v in e.inputs if not isinstance(v, Ref)]
  return e.name in _COMPARISONS and len(public) == 1 and bool(np.all(np.isinf(public[0])))


def _is_truth(e: Equation) -> bool:
  return bool(e.avals) and e.avals[0].dtype == bool


def _rounds(e: Equation, inputs: list[Any]) -> bool:
  whole = jnp.issubdtype(e.avals[0].dtype, jnp.integer)
  converted = e.name == "convert_element_type" and jnp.issubdtype(
    np.asarray(inputs[0]).dtype, jnp.floating
  )
  return e.name in magnitudes.ROUNDINGS or (whole and (e.name == "div" or converted))
