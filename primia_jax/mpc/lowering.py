"""From a program's equations to a circuit: who knows what decides the protocol of each equation.

What depends on one party's values alone that party computes in plain floating point; the rest
follows the rules of `arithmetic` and `choices`. Anything without a rule is refused by name, with
its source line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from primia_jax.mpc import arithmetic, choices
from primia_jax.mpc.circuit import Circuit, Config
from primia_jax.mpc.knowledge import Env, Lowering, is_secret
from primia_jax.mpc.program import Program, Ref

_RULES = arithmetic.RULES | choices.RULES


def lower(
  program: Program,
  owners: Sequence[Any],
  config: Config,
  ranges: np.ndarray | None = None,
  known: Mapping[int, Env] | None = None,
) -> Circuit:
  """Builds the circuit of a program.

  Args:
    program: the function.
    owners: for each flat input that is not public, its party; None for an argument given as shares.
    config: the ring and what else the parties agree on.
    ranges: [number of values] the largest magnitude of each, as calibrated; None assumes nothing.
    known: for an owner who plans with its values at hand, those values, from which the scales of
      its operands follow.

  Raises:
    NotImplementedError: for a primitive without a rule.
    ValueError: where a calibrated range does not fit the ring.
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
