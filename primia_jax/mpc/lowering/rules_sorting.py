"""Rules for sorting; rounds as in `functions.sorting`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import sorting
from primia_jax.mpc.lowering.holders import is_secret
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation
from primia_jax.mpc.lowering.rules_indexing import shared


def _sort(low: Lowering, equation: Equation, inputs: list[Any]) -> list[Any]:
  """All operands in the order of the first."""
  axis, (key, *rest) = equation.params["dimension"], inputs
  if equation.params["num_keys"] > 1:
    raise NotImplementedError(
      f"sort by {equation.params['num_keys']} keys at {equation.source}; sort by one number made "
      f"of them, such as a * n + b"
    )
  if not is_secret(key):  # a permutation that everybody knows
    order = np.argsort(np.asarray(key), axis, kind="stable")
    move = lambda v: jnp.take_along_axis(v, jnp.asarray(order), axis)
    return [
      low.build.local(move, low.value(v)) if is_secret(v) else np.asarray(move(jnp.asarray(v)))
      for v in inputs
    ]
  key = low.value(key)
  rest = [low.value(v) if is_secret(v) else shared(low.build, v, key) for v in rest]
  return sorting.sort(low.build, [key, *rest], axis)


def _top_k(low: Lowering, equation: Equation, inputs: list[Any]) -> list[Value]:
  x = low.value(inputs[0])
  axis = equation.params.get("axis", -1) % len(x.shape)
  values, positions = sorting.largest(low.build, x, equation.params["k"], axis)
  low.counts.add(positions.number)
  return [values, positions]


RULES: dict[str, Rule] = {"sort": _sort, "top_k": _top_k}
