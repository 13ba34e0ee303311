"""The ranges of what enters the protocol: which values these are, and whether an owner keeps them.

A gate that gets more than it was planned for wraps around, and the protocol cannot notice. What one
party puts in, it can compare itself with the plan, at no cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from primia_jax.mpc import encoding
from primia_jax.mpc.lowering.program import Ref
from primia_jax.mpc.messages import NAMES
from primia_jax.mpc.planning import SHARED, Plan
from primia_jax.types import Array


class Entry(NamedTuple):
  """A value that one owner puts in.

  Attributes:
    where: the layer, the operation that takes it, and its line.
    bound: its planned magnitude: the examples' largest times `Config.margin`, rounded up to a power
      of two less a 64th.
  """

  where: str
  bound: float


def shared(plan: Plan) -> dict[int, str]:
  """The values that enter the protocol or arise in it, and where: their ranges must hold."""
  found: dict[int, str] = {}
  holders = _holders(plan)
  for e in plan.program.equations:
    inputs = [v.number for v in e.inputs if isinstance(v, Ref)]
    held = frozenset().union(*(holders[i] for i in inputs))
    if len(held) > 1 or held == {SHARED}:
      where = f"{e.layer}, {e.name} at {e.source}"
      found |= {i: found.get(i, where) for i in inputs}
      found |= {ref.number: where for ref in e.outputs}
  return found


def entries(plan: Plan, owner: int | None) -> dict[int, Entry]:
  """The values of a program, by number, that an owner (None: who shares) puts in; none without
  calibration.
  """
  if plan.bounds is None:
    return {}
  holders, inside = _holders(plan), shared(plan)
  # Outputs of less than 1 are kept finer than others, and truncated; larger ones pass no gate.
  outputs = [v.number for v in plan.program.outputs if isinstance(v, Ref)]
  inside = {i: "the output" for i in outputs if 0 < plan.bounds[i] < 1} | inside
  given = {v.number for v in plan.program.inputs if isinstance(v, Ref)}
  mine = {SHARED if owner is None else owner}
  return {
    i: Entry(where, float(plan.bounds[i]))
    for i, where in inside.items()
    if holders[i] == mine and (owner is not None or i in given)
  }


def largest(v: Array) -> Array:
  """The largest magnitude in float32, as `program.magnitude` counts it; it traces."""
  if jax.dtypes.issubdtype(v.dtype, jax.dtypes.extended):  # a PRNG key
    return jnp.zeros((), jnp.float32)
  real = v if jnp.iscomplexobj(v) else v.astype(jnp.float32)
  return encoding.largest(jnp.where(jnp.isneginf(real.real), 0, jnp.abs(real)))


def keeps(entry: Entry, most: Array) -> Array:
  """Whether a magnitude is in the planned range; NaN is not. It traces."""
  return most <= jnp.float32(entry.bound)


def check(found: Mapping[int, Entry], most: Mapping[int, Array], owner: int | None) -> None:
  """Raises a ValueError unless each value `keeps` its range, and does nothing for tracers."""
  for i, entry in found.items():
    if isinstance(most[i], jax.core.Tracer) or bool(keeps(entry, most[i])):
      continue
    whose = "a shared value" if owner is None else f"a value of the {NAMES[owner]}"
    raise ValueError(
      f"{entry.where}: {whose} has magnitude {float(most[i]):.4g}, which leaves its planned range "
      f"of {entry.bound:.4g}; scale inputs as the examples were, or plan with examples that reach "
      "so far, or with a larger margin"
    )


def _holders(plan: Plan) -> dict[int, frozenset[Any]]:
  """Who knows all that a value of the program follows from."""
  holders = {
    ref.number: frozenset([SHARED if owner is None else owner])
    for ref, owner in zip(plan.program.inputs, plan.owners, strict=True)
    if isinstance(ref, Ref)
  }
  for e in plan.program.equations:
    held = (holders[v.number] for v in e.inputs if isinstance(v, Ref))
    both = frozenset[Any]().union(*held)
    holders |= {ref.number: both for ref in e.outputs}
  return holders
