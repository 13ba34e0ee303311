"""Which equations of a jaxpr show their inputs to others: by a collective, or on the host."""

from __future__ import annotations

import math
from typing import Any

# Functions, by the parameter that holds the inner one.
CALLS = dict.fromkeys(
  (
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "composite",
  ),
  ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"),
)  # fmt: skip
_COLLECTIVES = frozenset(
  (
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "ppermute", "pshuffle", "all_gather",
    "all_gather_invariant", "all_to_all", "reduce_scatter", "psum_scatter", "ragged_all_to_all",
    "pgather", "pbroadcast", "debug_callback", "debug_print", "io_callback", "pure_callback",
    "outside_call", "outfeed",
  )
)  # fmt: skip
# They have an axis or an effect, and show nothing: where one is, and what type a value has.
_STAYING = frozenset(("axis_index", "pvary", "pcast", "sharding_constraint", "mesh_cast"))


def crosses(eqn: Any) -> bool:
  """Whether the equation shows its inputs to others: by a collective, or on the host."""
  name, params = eqn.primitive.name, eqn.params
  if name in _COLLECTIVES:
    return True
  if name in _STAYING or name in CALLS or bodies(eqn):
    return False
  if name == "ffi_call":
    return not str(params.get("target_name", "")).startswith("primia_")
  axes = params.get("axes", params.get("axis_name", ()))
  named = [axis for axis in (axes if isinstance(axes, tuple | list) else (axes,))]
  return bool(eqn.effects) or any(isinstance(axis, str) for axis in named)


def bodies(eqn: Any) -> list[Any]:
  found = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
  return [v for v in found if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def sizes_met(closed: Any) -> list[int]:
  """Bytes of everything that crosses in a jaxpr, in order."""
  avals = [v.aval for eqn in meetings(closed) for v in eqn.invars]
  return [math.prod(a.shape) * a.dtype.itemsize for a in avals]


def meetings(body: Any) -> list[Any]:
  out = []
  for eqn in jaxpr_of(body).eqns:
    if crosses(eqn):
      out.append(eqn)
    for inner in bodies(eqn):
      out += meetings(inner)
  return out


def jaxpr_of(body: Any) -> Any:
  return body.jaxpr if hasattr(body, "jaxpr") else body
