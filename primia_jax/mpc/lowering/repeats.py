"""Equations that repeat an earlier one, as in a loop that folds its weights at every step."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from primia_jax.mpc.lowering.program import Equation, Program, Ref

_SMALL = 2**10  # elements of a public array that are compared; larger ones must be the same object


def without_repeats(program: Program) -> Program:
  """The program without such equations; the values that are left keep their numbers.

  Equations are alike if primitive, parameters and inputs are equal; those without outputs, which
  have effects, stay.
  """
  first: dict[Hashable, Equation] = {}
  same: dict[int, Ref] = {}
  follow = lambda v: same.get(v.number, v) if isinstance(v, Ref) else v
  equations = []
  for equation in program.equations:
    equation = equation._replace(inputs=tuple(map(follow, equation.inputs)))
    key = _key(equation)
    if key is None or key not in first:
      equations.append(equation)
      if key is not None:
        first[key] = equation
      continue
    for ref, before in zip(equation.outputs, first[key].outputs, strict=True):
      same[ref.number] = before
  outputs = tuple(map(follow, program.outputs))
  return program._replace(equations=tuple(equations), outputs=outputs)


def _key(equation: Equation) -> Hashable:
  """Equal for equations that compute the same; None for one that is kept anyway."""
  if not equation.outputs:
    return None
  params = tuple(sorted(equation.params.items(), key=lambda item: item[0]))
  inputs = tuple(v if isinstance(v, Ref) else _public(v) for v in equation.inputs)
  avals = tuple((aval.shape, aval.dtype) for aval in equation.avals)
  key = equation.name, params, inputs, avals
  try:
    hash(key)
  except TypeError:  # a parameter that cannot be compared
    return None
  return key


def _public(v: Any) -> Hashable:
  if isinstance(v, jax.core.Tracer) or np.size(v) > _SMALL:
    return id(v)
  if jax.dtypes.issubdtype(getattr(v, "dtype", np.float32), jax.dtypes.extended):
    return id(v)
  array = np.asarray(v)
  return array.dtype, array.shape, array.tobytes()
