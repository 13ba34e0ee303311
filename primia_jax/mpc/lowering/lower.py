"""From a program's equations to a circuit: who holds the inputs decides each equation's protocol.

A party computes what depends on its own values alone in plain floating point. The rest follows the
rules of `rules_linear` and `rules_nonlinear`. An equation without a rule is refused by name, with
its source line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from primia_jax.mpc.circuit import Circuit, Config, Values
from primia_jax.mpc.lowering import (
  rules_complex,
  rules_indexing,
  rules_integer,
  rules_linear,
  rules_nonlinear,
  rules_sorting,
)
from primia_jax.mpc.lowering.ownership import Lowering, is_secret
from primia_jax.mpc.lowering.program import Program, Ref

_RULES = rules_complex.rules(
  rules_integer.rules(
    rules_linear.RULES | rules_nonlinear.RULES | rules_sorting.RULES | rules_indexing.RULES
  )
)


def lower(
  program: Program,
  owners: Sequence[Any],
  config: Config,
  ranges: np.ndarray | None = None,
  known: Mapping[int, Values] | None = None,
) -> Circuit:
  """Builds the circuit of a program.

  Args:
    program: the function.
    owners: for each flat input that is not public, its party; None for an argument given as shares.
    config: the ring and whatever else the parties agree on.
    ranges: [number of values] the calibrated largest magnitude of each; None assumes nothing.
    known: the values of each owner who plans with them at hand; the scales of its operands follow
      from them.

  Raises:
    NotImplementedError: a primitive has no rule.
    ValueError: a calibrated range does not fit the ring.
  """
  low = Lowering(program, config, ranges, known or {})
  for ref, owner, aval in zip(program.inputs, owners, program.avals, strict=True):
    if isinstance(ref, Ref):
      low.enter(ref, owner, aval)
  for equation in program.equations:
    low.lower(equation, _RULES)
  found = [low.env[v.number] if isinstance(v, Ref) else v for v in program.outputs]
  outputs = [low.value(v) if is_secret(v) else v for v in found]
  return low.build.circuit(outputs)
