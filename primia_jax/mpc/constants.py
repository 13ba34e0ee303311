"""What a function holds besides its arguments: everybody reads it in the plan.

A traced function lists all of it, however it came to hold it: closures, globals, defaults,
attributes of `self`, a bound module's variables. Python's own objects only give the names.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from primia_jax.mpc.lowering.program import source_of
from primia_jax.types import Array, PyTree

_FEW = 8  # whole numbers or truth values, such as an index or a shape
_MOST_OBJECTS = 10_000  # that are looked through for a name
_LIBRARIES = ("jax", "jaxlib", "numpy", "flax", "equinox")  # their own arrays have no names here


def held(call: Callable, args: Sequence[PyTree], fn: Any, public: PyTree = ()) -> list[str]:
  """The name, dtype and shape of each array that is in a function's computation, but no argument.

  Real and complex arrays of more than one number count, and whole numbers and truth values from
  nine on.

  Args:
    call: the function; it is traced.
    args: its arguments.
    fn: where the names come from: the function as its caller wrote it.
    public: arrays that the caller gave as public ones; they do not count.
  """
  found = {_content(v): (v, where) for v, where in _constants(jax.make_jaxpr(call)(*args))}
  for v in jax.tree.leaves(public):
    if _is_array(v):
      found.pop(_content(v), None)
  if not found:
    return []
  names = {_content(v): name for name, v in _reached("", fn, {})}
  named = lambda key, where: names.get(key) or f"an array at {where or 'an unknown line'}"
  return sorted(
    f"{named(key, where)} ({np.dtype(v.dtype).name}{list(np.shape(v))})"
    for key, (v, where) in found.items()
  )


def warn(arrays: Sequence[str], stacklevel: int) -> None:
  """Warns of what `held` found."""
  if arrays:
    warnings.warn(
      f"the function closes over {', '.join(arrays)}: such arrays are public, part of the plan. "
      "Pass them as arguments to keep them secret",
      stacklevel=stacklevel + 1,
    )


def _is_array(v: Any) -> bool:
  """Whether v is an array that tells more than a number or a few switches."""
  if not isinstance(v, jax.Array | np.ndarray) or isinstance(v, jax.core.Tracer):
    return False
  if jax.dtypes.issubdtype(v.dtype, jax.dtypes.extended) or v.dtype.hasobject:
    return False
  return np.size(v) > (1 if jnp.issubdtype(v.dtype, jnp.inexact) else _FEW)


def _content(v: Array) -> tuple[Any, ...]:
  """Equal for arrays of equal content, in the types that JAX computes in."""
  array = np.asarray(v)
  array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
  return array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest()


def _constants(closed: Any, where: str = "") -> Iterator[tuple[Array, str]]:
  """The arrays in a jaxpr and all inside it, with the line that uses each first."""
  whole = isinstance(closed, core.ClosedJaxpr)
  jaxpr, consts = (closed.jaxpr, closed.consts) if whole else (closed, ())
  values = dict(zip(jaxpr.constvars, consts, strict=False))

  def read(atom: Any, line: str) -> Iterator[tuple[Array, str]]:
    v = atom.val if isinstance(atom, core.Literal) else values.pop(atom, None)
    if _is_array(v):
      yield v, line

  for eqn in jaxpr.eqns:
    line = source_of(eqn) or where
    for atom in eqn.invars:
      yield from read(atom, line)
    for param in eqn.params.values():
      for inner in param if isinstance(param, tuple | list) else (param,):
        if isinstance(inner, core.ClosedJaxpr | core.Jaxpr):
          yield from _constants(inner, line)
  for atom in jaxpr.outvars:
    yield from read(atom, where)


# ---- names


def _reached(name: str, v: Any, seen: dict[int, Any]) -> Iterator[tuple[str, Any]]:
  """The arrays that can be reached from an object, with a name for each."""
  if id(v) in seen or len(seen) > _MOST_OBJECTS:
    return
  seen[id(v)] = v
  if isinstance(v, jax.Array | np.ndarray):
    if _is_array(v):
      yield name, v
    return
  for part, inner in _parts(v):
    whole = part if not name else name + (part if part[:1] in ("[", "") else f".{part}")
    yield from _reached(whole, inner, seen)


def _parts(v: Any) -> Iterator[tuple[str, Any]]:
  """What an object holds, with the name of each part; hidden attributes have none."""
  if isinstance(v, Mapping):
    yield from ((f"[{key!r}]", inner) for key, inner in v.items())
  elif isinstance(v, tuple | list):
    yield from ((f"[{i}]", inner) for i, inner in enumerate(v))
  elif isinstance(v, functools.partial):
    yield from ((f"argument {i} of partial", inner) for i, inner in enumerate(v.args))
    yield from v.keywords.items()
    yield "", v.func
  elif isinstance(v, types.MethodType):
    yield "self", v.__self__
    yield "", v.__func__
  elif _is_function(v):
    if (v.__module__ or "").partition(".")[0] not in _LIBRARIES:
      yield from _of_function(v) if isinstance(v, types.FunctionType) else [("", v.__wrapped__)]
  elif not isinstance(v, types.ModuleType | type) and hasattr(v, "__dict__"):
    yield from (("" if key.startswith("_") else key, inner) for key, inner in vars(v).items())


def _is_function(v: Any) -> bool:
  """Whether v is written in Python, or wraps what is, as `jax.jit` does."""
  return isinstance(v, types.FunctionType) or (callable(v) and hasattr(v, "__wrapped__"))


def _of_function(fn: types.FunctionType) -> Iterator[tuple[str, Any]]:
  """Its closure, defaults and globals, and what functions of its own module hold."""
  code, defaults = fn.__code__, fn.__defaults__ or ()
  first = code.co_argcount - len(defaults)
  yield from zip(code.co_varnames[first : code.co_argcount], defaults, strict=True)
  yield from (fn.__kwdefaults__ or {}).items()
  known = {k: fn.__globals__[k] for k in _words(code) if k in fn.__globals__}
  for k, cell in zip(code.co_freevars, fn.__closure__ or (), strict=True):
    with contextlib.suppress(ValueError):  # it is empty
      known[k] = cell.cell_contents
  for k, v in known.items():
    if not _is_function(v):
      yield k, v
    elif v.__module__ == fn.__module__:
      yield "", v


def _words(code: types.CodeType) -> Iterator[str]:
  """The names in code, and in functions that are made there."""
  yield from code.co_names
  for inner in code.co_consts:
    if isinstance(inner, types.CodeType):
      yield from _words(inner)
