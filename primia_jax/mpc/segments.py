"""One party's program, cut where it meets the other party.

The protocol is traced as a device of `shard_map` would run it, and this party's branches are taken.
What is left are plain equations and exchanges. An exchange takes part in the earliest round that
its value allows, in both parties alike, so openings that do not wait for each other share a
message. Each other equation stands as late as possible. Equal segments share a compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import export
from jax.extend import core

from primia_jax import native
from primia_jax.mpc.lowering.program import CALLS, Ref, applied, inlined
from primia_jax.types import Array

_EXCHANGE = "ppermute"
_OURS = [export.DisabledSafetyCheck.custom_call(name) for name in native.TARGETS]
_SMALL = 64  # elements of a constant that is computed while a program is cut


class Segment(NamedTuple):
  """What a party computes between two messages.

  Attributes:
    run: compiled; arrays -> arrays.
    reads: the numbers of the values that it takes.
    makes: the numbers of those that it gives.
    sends: the numbers of those that the party then sends, in this order.
    receives: the numbers of what it receives in their place.
    avals: shape and dtype of each value sent, and so of each received.
    drops: the numbers of values that nothing later needs.
  """

  run: Callable[..., Sequence[Array]]
  reads: tuple[int, ...]
  makes: tuple[int, ...]
  sends: tuple[int, ...]
  receives: tuple[int, ...]
  avals: tuple[jax.ShapeDtypeStruct, ...]
  drops: tuple[int, ...]


class Program(NamedTuple):
  """All that a party computes.

  Attributes:
    parts: its segments.
    outputs: the numbers of its shares of the outputs.
    reads: the numbers of this party's own inputs.
    shapes: shape and dtype of each of these.
    sizes: bytes of each message.
    exported: by segment, the program in `jax.export`'s form, equal ones as one object; empty unless
      asked for.
  """

  parts: Sequence[Segment]
  outputs: Sequence[int]
  reads: Sequence[int]
  shapes: Sequence[jax.ShapeDtypeStruct]
  sizes: tuple[int, ...]
  exported: Sequence[bytes] = ()


def num_bytes(values: Sequence[Any]) -> int:
  """Bytes of arrays or their shapes, together."""
  return sum(math.prod(v.shape) * v.dtype.itemsize for v in values)


class _Equation(NamedTuple):
  run: Callable[..., list[Any]]
  inputs: tuple[Any, ...]  # Refs, or arrays
  outputs: tuple[int, ...]


def places(traced: core.ClosedJaxpr) -> list[tuple[int, int]]:
  """Of each exchange, in the program's order: its round, and its place in that round's message."""
  filled: dict[int, int] = {}
  found = []
  for level, _ in _exchanges(traced):
    found.append((level, filled.get(level, 0)))
    filled[level] = filled.get(level, 0) + 1
  return found


def exchanged(traced: core.ClosedJaxpr) -> list[jax.ShapeDtypeStruct]:
  """Shape and dtype of each exchange, in the program's order."""
  return [jax.ShapeDtypeStruct(v.shape, v.dtype) for _, v in _exchanges(traced)]


def sizes(traced: core.ClosedJaxpr) -> list[int]:
  """Bytes that each party sends in each round."""
  found = _exchanges(traced)
  out = [0] * (1 + max((level for level, _ in found), default=-1))
  for level, aval in found:
    out[level] += num_bytes([aval])
  return out


def _exchanges(traced: core.ClosedJaxpr) -> list[tuple[int, Any]]:
  """The round of each exchange, in order, and what is exchanged.

  The round is one more than the latest that it waits for. This follows from both parties' work
  together, so both find the same.
  """
  done: dict[Any, int] = {}
  found = []
  for eqn in traced.jaxpr.eqns:
    inputs = [v for v in eqn.invars if not isinstance(v, core.Literal)]
    level = max((done.get(v, 0) for v in inputs), default=0)
    if eqn.primitive.name == _EXCHANGE:
      found.append((level, eqn.invars[0].aval))
      level += 1
    done |= dict.fromkeys(eqn.outvars, level)
  return found


def cut(
  traced: core.ClosedJaxpr, party: int, exports: bool = False
) -> tuple[list[Segment], list[int], list[bytes]]:
  """A party's segments, the numbers of the outputs, and `Program.exported`; inputs count from 0.

  Args:
    traced: the protocol of one party, with the axis "party" bound.
    exports: whether the programs shall be kept on disk.
  """
  taken = _Taken(party)
  inputs = [taken.new(v.aval) for v in traced.jaxpr.invars]
  outputs = [taken.ref(v).number for v in taken.inline(traced, inputs)]
  levels = [level for level, _ in _exchanges(traced)]
  assert len(levels) == len(taken.exchanges), "an exchange is inside another primitive"
  last = max(levels, default=-1) + 1
  needed = dict.fromkeys(outputs, last)  # by number of a value, the first segment that needs it
  for level, (sent, _) in zip(levels, taken.exchanges, strict=True):
    needed[sent] = min(level, needed.get(sent, last))
  placed: list[list[_Equation]] = [[] for _ in range(last + 1)]
  for equation in reversed(taken.equations):
    where = min((needed[i] for i in equation.outputs if i in needed), default=None)
    if where is not None:
      placed[where].append(equation)
      for v in equation.inputs:
        if isinstance(v, Ref):
          needed[v.number] = min(where, needed.get(v.number, last))
  exchanges: list[list[tuple[int, int]]] = [[] for _ in range(last + 1)]
  for level, exchange in zip(levels, taken.exchanges, strict=True):
    exchanges[level].append(exchange)
  found, exported = _segments(placed, exchanges, outputs, taken.avals, exports)
  return found, outputs, exported


class _Taken:
  """Equations with this party's branches taken and calls inlined."""

  def __init__(self, party: int):
    self.party = party
    self.avals: list[jax.ShapeDtypeStruct] = []
    self.equations: list[_Equation] = []
    self.exchanges: list[tuple[int, int]] = []  # what is sent, and what comes in its place

  def new(self, aval: Any) -> Ref:
    self.avals.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
    return Ref(len(self.avals) - 1)

  def ref(self, v: Any) -> Ref:
    """A number for a value, even if it is a constant."""
    if isinstance(v, Ref):
      return v
    out = self.new(v)
    self.equations.append(_Equation(lambda: [v], (), (out.number,)))
    return out

  def inline(self, closed: Any, values: Sequence[Any]) -> list[Any]:
    return inlined(closed, values, self._equation)

  def _equation(self, eqn: Any, values: list[Any]) -> list[Any]:
    name = eqn.primitive.name
    first: Any = values[0] if values else None
    known = not any(isinstance(v, Ref) for v in values)
    if name == "axis_index":
      return [np.int32(self.party)]
    if name == _EXCHANGE:
      out = self.new(eqn.outvars[0].aval)
      self.exchanges.append((self.ref(first).number, out.number))
      return [out]
    if name == "cond" and not isinstance(first, Ref):
      branches = eqn.params["branches"]
      return self.inline(branches[int(np.clip(int(first), 0, len(branches) - 1))], values[1:])
    if name == "select_n" and not isinstance(first, Ref) and np.ndim(first) == 0:
      return [values[1 + int(first)]]
    if name in CALLS:
      (body,) = (eqn.params[key] for key in CALLS[name] if key in eqn.params)
      return self.inline(body, values)
    if known and values and all(math.prod(v.aval.shape) <= _SMALL for v in eqn.outvars):
      with jax.ensure_compile_time_eval():
        return applied(eqn, values)
    outputs = [self.new(v.aval) for v in eqn.outvars]
    numbers = tuple(v.number for v in outputs)
    self.equations.append(_Equation(lambda *each: applied(eqn, each), tuple(values), numbers))
    return list(outputs)


def _segments(
  placed: Sequence[Sequence[_Equation]],
  exchanges: Sequence[Sequence[tuple[int, int]]],
  outputs: Sequence[int],
  avals: Sequence[jax.ShapeDtypeStruct],
  exports: bool,
) -> tuple[list[Segment], list[bytes]]:
  programs: dict[str, tuple[Callable, bytes]] = {}
  found: list[Segment] = []
  exported: list[bytes] = []
  later = set(outputs)
  for equations, exchanged in reversed(list(zip(placed, exchanges, strict=True))):
    made = {i for equation in equations for i in equation.outputs}
    read = {v.number for equation in equations for v in equation.inputs if isinstance(v, Ref)}
    sends, receives = tuple(s for s, _ in exchanged), tuple(r for _, r in exchanged)
    reads = tuple(sorted(read - made))
    makes = tuple(sorted(made & (later | set(sends))))
    drops = tuple(sorted(({*reads, *makes, *sends, *receives}) - later))
    run, kept = _compiled(equations[::-1], reads, makes, avals, programs, exports)
    exported.append(kept)
    found.append(Segment(run, reads, makes, sends, receives, tuple(avals[i] for i in sends), drops))
    later = (later - made - set(receives)) | set(reads) | (set(sends) - made)
  return found[::-1], exported[::-1] if exports else []


def _compiled(
  equations: Sequence[_Equation],
  reads: Sequence[int],
  makes: Sequence[int],
  avals: Sequence[jax.ShapeDtypeStruct],
  programs: dict[str, tuple[Callable, bytes]],
  exports: bool,
) -> tuple[Callable[..., Sequence[Array]], bytes]:
  def run(*arrays: Array) -> list[Array]:
    env: dict[int, Any] = dict(zip(reads, arrays, strict=True))
    for equation in equations:
      inputs = [env[v.number] if isinstance(v, Ref) else v for v in equation.inputs]
      env |= dict(zip(equation.outputs, equation.run(*inputs), strict=True))
    return [env[i] for i in makes]

  jitted, given = jax.jit(run, keep_unused=True), [avals[i] for i in reads]
  if not exports:
    lowered = jitted.lower(*given)
    if (text := lowered.as_text()) not in programs:
      programs[text] = lowered.compile(), b""
    return programs[text]
  exported = export.export(jitted, disabled_checks=_OURS)(*given)
  if (text := exported.mlir_module()) not in programs:
    kept = bytes(exported.serialize())
    programs[text] = compiled(kept), kept
  return programs[text]


def compiled(exported: bytes) -> Callable[..., Sequence[Array]]:
  """A program as `Program.exported` holds it, compiled."""
  found = export.deserialize(bytearray(exported))
  avals = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in found.in_avals]
  return jax.jit(found.call, keep_unused=True).lower(*avals).compile()
