"""A JAX function as a flat list of equations: calls are inlined, scans unrolled, public values
computed on the spot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core

from primia_jax.mpc.lowering import look_ups
from primia_jax.mpc.lowering.decompositions import DECOMPOSITIONS
from primia_jax.types import Array, PyTree

PUBLIC = "public"


class Ref(NamedTuple):
  """The number of a value that somebody keeps secret; public values are arrays."""

  number: int


class Equation(NamedTuple):
  """One primitive applied to values, at least one of them a Ref.

  Attributes:
    name: the primitive's name.
    bind: inputs -> list of outputs, the primitive itself.
    params: its static parameters.
    inputs: Refs, or arrays if public.
    outputs: Refs.
    avals: shape and dtype of each output.
    layer: its named scope (a Flax module's path), or "(top)".
    source: the file and line that called it.
  """

  name: str
  bind: Callable[..., list[Any]]
  params: dict[str, Any]
  inputs: tuple[Any, ...]
  outputs: tuple[Ref, ...]
  avals: tuple[jax.ShapeDtypeStruct, ...]
  layer: str
  source: str


class Program(NamedTuple):
  """A whole function.

  Attributes:
    inputs: for each flat argument its Ref, or the array itself if it is public.
    avals: of each flat argument.
    equations: in order.
    outputs: Refs, or arrays if public.
    out_tree: the structure of the outputs.
    out_dtypes: of each output.
  """

  inputs: tuple[Any, ...]
  avals: tuple[jax.ShapeDtypeStruct, ...]
  equations: tuple[Equation, ...]
  outputs: tuple[Any, ...]
  out_tree: Any
  out_dtypes: tuple[Any, ...]

  @property
  def num_values(self) -> int:
    """The number of secret values."""
    return (
      1 + max(ref.number for e in self.equations for ref in e.outputs)
      if self.equations
      else len(self.inputs)
    )


def trace(fn: Callable, args: Sequence[PyTree], owners: Sequence[Any]) -> Program:
  """Flattens fn at the given arguments.

  Args:
    fn: a JAX function of positional arguments.
    args: pytrees of arrays or ShapeDtypeStructs; public ones must be arrays.
    owners: for each argument its owner; PUBLIC makes its values part of the program.

  Raises:
    ValueError: owners do not match the arguments, or a public argument has no value.
    NotImplementedError: control flow depends on secret values.
  """
  if len(owners) != len(args):
    raise ValueError(f"{len(owners)} owners for {len(args)} arguments; name one owner for each")
  out_shape: list[Any] = []

  def flat_fn(*leaves: Array) -> list[Array]:
    outputs, tree = jax.tree.flatten(fn(*jax.tree.unflatten(structure, leaves)))
    out_shape.append(tree)
    return outputs

  leaves, structure = jax.tree.flatten(tuple(args))
  flat_owners = [
    owner for owner, arg in zip(owners, args, strict=True) for _ in jax.tree.leaves(arg)
  ]
  avals = tuple(jax.ShapeDtypeStruct(np.shape(v), v.dtype) for v in leaves)
  jaxpr = jax.make_jaxpr(flat_fn)(*avals)
  tracer = _Tracer()
  inputs = []
  for owner, leaf in zip(flat_owners, leaves, strict=True):
    if owner == PUBLIC and isinstance(leaf, jax.ShapeDtypeStruct):
      raise ValueError("a public argument has only a shape; give its value when the plan is made")
    inputs.append(leaf if owner == PUBLIC else tracer.new())
  outputs = tracer.inline(jaxpr, inputs, "", "an unknown line")
  dtypes = tuple(v.dtype for v in jaxpr.out_avals)
  return Program(
    tuple(inputs), avals, tuple(tracer.equations), tuple(outputs), out_shape[-1], dtypes
  )


def evaluate(program: Program, leaves: Sequence[Array | None]) -> dict[int, Array]:
  """The values, by number, that follow from the given inputs (None: not given), in plain JAX."""
  env = {
    ref.number: v
    for ref, v in zip(program.inputs, leaves, strict=True)
    if isinstance(ref, Ref) and v is not None
  }
  for equation in program.equations:
    inputs = [env.get(v.number) if isinstance(v, Ref) else v for v in equation.inputs]
    if all(v is not None for v in inputs):
      env |= {
        ref.number: v for ref, v in zip(equation.outputs, equation.bind(*inputs), strict=True)
      }
  return env


class _Tracer:
  def __init__(self) -> None:
    self.equations: list[Equation] = []
    self.count = 0
    self.decomposed = ""  # the source of a primitive whose parts are being inlined

  def new(self) -> Ref:
    self.count += 1
    return Ref(self.count - 1)

  def inline(self, closed: Any, inputs: Sequence[Any], layer: str, source: str) -> list[Any]:
    jaxpr, consts = (
      (closed.jaxpr, closed.consts) if isinstance(closed, core.ClosedJaxpr) else (closed, [])
    )
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    env |= dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
    for eqn in jaxpr.eqns:
      outputs = self._equation(eqn, [read(v) for v in eqn.invars], layer, source)
      env |= dict(zip(eqn.outvars, outputs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def _equation(self, eqn: Any, values: list[Any], layer: str, source: str) -> list[Any]:
    name, source = eqn.primitive.name, self.decomposed or _source(eqn) or source
    layer = "/".join(filter(None, [layer, str(eqn.source_info.name_stack)]))
    if name == "cond":
      if isinstance(values[0], Ref):
        raise NotImplementedError(
          f"cond on a secret value at {source}; use jnp.where, which runs both branches"
        )
      return self.inline(eqn.params["branches"][int(values[0])], values[1:], layer, source)
    if name == "scan":
      return self.inline(_unrolled(eqn, values), values, layer, source)
    if name == "while" and any(isinstance(v, Ref) for v in values):
      raise NotImplementedError(
        f"while loop over secret values at {source}; use scan or a static fori_loop"
      )
    parts = look_ups.written_out(eqn, [None if isinstance(v, Ref) else v for v in values])
    if parts is not None:
      return self._parts(parts, [v for v in values if isinstance(v, Ref)], layer, source)
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
      if isinstance(eqn.params.get(key), (core.ClosedJaxpr, core.Jaxpr)):
        return self.inline(eqn.params[key], values, layer, source)
    if not any(isinstance(v, Ref) for v in values) and not eqn.effects:
      with jax.ensure_compile_time_eval():
        return _bind(eqn, values)
    if name in DECOMPOSITIONS and not eqn.effects:
      parts = jax.make_jaxpr(functools.partial(DECOMPOSITIONS[name], **eqn.params))
      return self._parts(parts(*(v.aval for v in eqn.invars)), values, layer, source)
    outputs = tuple(self.new() for _ in eqn.outvars)
    avals = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars)
    bind = lambda *inputs: _bind(eqn, inputs)
    self.equations.append(
      Equation(name, bind, eqn.params, tuple(values), outputs, avals, layer or "(top)", source)
    )
    return list(outputs)

  def _parts(self, parts: Any, values: list[Any], layer: str, source: str) -> list[Any]:
    """A jaxpr in an equation's place."""
    outside, self.decomposed = self.decomposed, source
    out = self.inline(parts, values, layer, source)
    self.decomposed = outside
    return out


def _bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
  outputs = eqn.primitive.bind(*values, **eqn.params)
  return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _unrolled(eqn: Any, values: Sequence[Any]) -> Any:
  """The jaxpr of a scan, iteration by iteration."""
  closed, length = eqn.params["jaxpr"], eqn.params["length"]
  if not isinstance(closed, core.ClosedJaxpr):
    closed = core.ClosedJaxpr(closed, ())
  body, inner = core.jaxpr_as_fun(closed), closed.jaxpr
  # Scanned arrays have one axis more outside than inside. The parameters that say so differ among
  # versions of JAX.
  scanned = lambda outside, inside: [
    len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True)
  ]
  num_carry = scanned(eqn.outvars, inner.outvars).count(False)
  num_consts = scanned(eqn.invars, inner.invars).count(False) - num_carry
  steps = range(length)[::-1] if eqn.params["reverse"] else range(length)

  def loop(*args: Array) -> list[Array]:
    consts, carry, xs = (
      args[:num_consts],
      args[num_consts : num_consts + num_carry],
      args[num_consts + num_carry :],
    )
    stacked: dict[int, Sequence[Array]] = {}
    for i in steps:
      outputs = body(*consts, *carry, *(lax.index_in_dim(x, i, keepdims=False) for x in xs))
      carry, stacked[i] = outputs[:num_carry], outputs[num_carry:]
    ys = [
      jnp.stack([stacked[i][j] for i in range(length)]) for j in range(len(eqn.outvars) - num_carry)
    ]
    return [*carry, *ys]

  return jax.make_jaxpr(loop)(
    *(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars)
  )


def _source(eqn: Any) -> str:
  """file:line of the innermost call outside JAX and Flax; empty if there is none."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if not any(f"/{package}/" in frame.file_name for package in ("jax", "flax", "jaxlib")):
      return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.line_num}"
  return ""
