"""Where in the source a jaxpr, or an equation of it, comes from."""

from __future__ import annotations

from typing import Any

from primia_jax.boundary import meetings

_FOREIGN = ("jax", "flax", "jaxlib", "optax")


def function(body: Any) -> str:
  """The Python function that a jaxpr was traced from: "name at file"."""
  info = getattr(meetings.jaxpr_of(body), "debug_info", None)
  return str(getattr(info, "func_src_info", "")).rsplit(":", 1)[0]


def is_foreign(source: str) -> bool:
  """Whether a function or a file is of a library."""
  return any(f"/{package}/" in source for package in _FOREIGN)


def line(eqn: Any) -> str:
  """file:line of the innermost call outside JAX and Flax; empty if there is none."""
  traceback = eqn.source_info.traceback if eqn is not None else None
  for frame in traceback.frames if traceback else ():
    path = frame.file_name
    if not is_foreign(path):
      return f"{path[max(path.rfind('primia_jax/'), 0) :]}:{frame.line_num}"
  return ""
