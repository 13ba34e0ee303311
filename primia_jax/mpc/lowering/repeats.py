"""Equations that repeat an earlier one, as in a loop that folds its weights at every step."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from primia_jax.mpc.lowering.portable import UNUSED
from primia_jax.mpc.lowering.program import Equation, Program, Ref


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
  params = {k: v for k, v in equation.params.items() if k not in UNUSED}
  avals = tuple((aval.shape, str(aval.dtype)) for aval in equation.avals)
  try:
    return equation.name, _plain(sorted(params.items())), _plain(equation.inputs), avals
  except TypeError:
    return None


def _plain(v: Any) -> Hashable:
  """Equal for equal content.

  It asks for no object's identity, so that parties who read a program from a file find the same
  repeats. Raises a TypeError for what has no plain content: functions, jaxprs and tracers.
  """
  if v is None or isinstance(v, Ref | bool | str | int | enum.Enum | np.dtype):
    return type(v).__name__, v
  if isinstance(v, float):
    return v.hex()
  if isinstance(v, np.ndarray | np.generic | jax.Array) and not isinstance(v, jax.core.Tracer):
    array = np.asarray(v)
    return str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest()
  if isinstance(v, tuple | list):
    return type(v).__name__, *map(_plain, v)
  if dataclasses.is_dataclass(v):
    return type(v).__name__, *(_plain(getattr(v, f.name)) for f in dataclasses.fields(v))
  raise TypeError(f"a {type(v).__name__} has no plain content")
