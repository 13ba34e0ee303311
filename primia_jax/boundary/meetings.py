"""Which equations of a jaxpr show their inputs to others: by a collective, on the host, or in code
that cannot be read.

An equation that is not known stays at its party only if it has no effect and no named axis. Native
code can do anything, so of it only this package's own stays.
"""

from __future__ import annotations

import math
from typing import Any

from primia_jax import native
from primia_jax.mpc.lowering.program import CALLS

# They show their inputs, and some say so neither by an effect nor by an axis: collectives and their
# asynchronous halves, calls of the host, and what holds compiled code instead of a jaxpr.
_SHOWING = frozenset(
  (
    "psum", "psum2", "psum_invariant", "pmax", "pmin", "ppermute", "pshuffle", "all_gather",
    "all_gather_invariant", "all_gather_reduced", "all_to_all", "reduce_scatter", "psum_scatter",
    "ragged_all_to_all", "pgather", "pbroadcast", "psend", "unreduced_psum",
    "unreduced_reduce_scatter", "debug_callback", "debug_print", "io_callback", "pure_callback",
    "outside_call", "outfeed", "call_exported", "xla_call_module", "custom_partitioning",
    "pallas_call", "tpu_custom_call", "triton_kernel_call", "mosaic_gpu", "bass_exec",
  )
)  # fmt: skip
# They have an axis or an effect, and show nothing: where one is, and what type a value has.
STAYING = frozenset(
  ("axis_index", "pvary", "pcast", "preduced", "vary_unreduced_cast_p", "sharding_constraint",
   "mesh_cast")
)  # fmt: skip
_FOLLOWED = frozenset((*CALLS, "cond", "scan", "while", "shard_map"))  # by what is in them


def crosses(eqn: Any) -> bool:
  """Whether the equation shows its inputs to others."""
  name, params = eqn.primitive.name, eqn.params
  if name in STAYING or name in _FOLLOWED:
    return False
  if name == "ffi_call":
    return params.get("target_name") not in native.TARGETS
  axes = params.get("axes", params.get("axis_name", ()))
  named = any(
    isinstance(axis, str) for axis in (axes if isinstance(axes, tuple | list) else [axes])
  )
  return name in _SHOWING or bool(eqn.effects) or named


def bodies(eqn: Any) -> list[Any]:
  """The jaxprs that an equation holds."""
  found = [v for p in eqn.params.values() for v in (p if isinstance(p, tuple | list) else (p,))]
  return [v for v in found if hasattr(v, "eqns") or hasattr(v, "jaxpr")]


def sizes_met(closed: Any) -> list[int]:
  """Bytes of everything that crosses in a jaxpr, in order."""
  avals = [v.aval for eqn in meetings(closed) for v in eqn.invars]
  return [math.prod(a.shape) * a.dtype.itemsize for a in avals]


def meetings(body: Any) -> list[Any]:
  """All equations in a jaxpr that show their inputs, at any depth."""
  out = []
  for eqn in jaxpr_of(body).eqns:
    if crosses(eqn):
      out.append(eqn)
    for inner in bodies(eqn):
      out += meetings(inner)
  return out


def constants(body: Any) -> list[Any]:
  """The arrays that a jaxpr closes over, at any depth."""
  out = list(getattr(body, "consts", ()))
  for eqn in jaxpr_of(body).eqns:
    for inner in bodies(eqn):
      out += constants(inner)
  return out


def is_barrier(eqn: Any) -> bool:
  """Whether the equation returns its inputs as they are."""
  name, params = eqn.primitive.name, eqn.params
  return name == "optimization_barrier" or params.get("target_name") == native.BARRIER


def jaxpr_of(body: Any) -> Any:
  return body.jaxpr if hasattr(body, "jaxpr") else body
