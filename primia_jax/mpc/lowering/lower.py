"""From a program's equations to a circuit: who holds the inputs decides each equation's protocol.

A party computes what depends on its own values alone in plain floating point. The rest follows the
rules of `rules_linear` and `rules_nonlinear`. An equation without a rule is refused by name, with
its source line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from primia_jax.mpc import clamping, fusing
from primia_jax.mpc.circuit import Circuit, Config
from primia_jax.mpc.lowering import (
  rectifiers,
  rules_complex,
  rules_indexing,
  rules_integer,
  rules_linear,
  rules_masks,
  rules_nonlinear,
  rules_sorting,
)
from primia_jax.mpc.lowering.holders import Owned, is_secret
from primia_jax.mpc.lowering.ownership import Lowering
from primia_jax.mpc.lowering.program import Program, Ref
from primia_jax.mpc.lowering.repeats import without_repeats

_RULES = rules_complex.rules(
  rules_masks.rules(
    rules_integer.rules(
      rules_linear.RULES
      | rules_nonlinear.RULES
      | rectifiers.RULES
      | rules_sorting.RULES
      | rules_indexing.RULES
    )
  )
)


def lower(
  program: Program,
  owners: Sequence[Any],
  config: Config,
  bounds: np.ndarray | None = None,
  magnitude: Callable[[Owned], float] = lambda owned: math.inf,
) -> Circuit:
  """Builds the circuit of a program.

  Args:
    program: the function.
    owners: for each flat input that is not public, its party; None for an argument given as shares.
    config: the ring and whatever else the parties agree on.
    bounds: [number of values] the planned magnitude of each; None assumes nothing.
    magnitude: the largest magnitude of an owned value, or infinity if it is not at hand; the scale
      of an operand follows from it.

  Raises:
    NotImplementedError: a primitive has no rule.
    ValueError: the range of a gate or an output does not fit the ring.
  """
  program = rectifiers.with_leaky_relus(without_repeats(program))
  low = Lowering(program, config, bounds, magnitude)
  for ref, owner, aval in zip(program.inputs, owners, program.avals, strict=True):
    if isinstance(ref, Ref):
      low.enter(ref, owner, aval)
  for equation in program.equations:
    low.lower(equation, _RULES)
  circuit = low.build.circuit([_output(low, v) for v in program.outputs])
  return fusing.fuse(clamping.clamped(circuit))


def _output(low: Lowering, v: Any) -> Any:
  found = low.env[v.number] if isinstance(v, Ref) else v
  if not is_secret(found):
    return found
  low.build.layer = low.labels.get(v.number, "(top)")
  low.build.place = f"the output of {low.places.get(v.number, 'the function, an argument')}"
  return low.build.output(low.value(found))
