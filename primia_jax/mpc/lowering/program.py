"""A JAX function as a flat list of equations: calls are inlined, loops unrolled, public values
computed on the spot, and what no output needs left out.
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
from primia_jax.mpc.lowering.decompositions import DECOMPOSITIONS, clamped
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
    """One more than the largest number of a secret value."""
    made = (ref.number for e in self.equations for ref in e.outputs)
    given = (v.number for v in self.inputs if isinstance(v, Ref))
    return 1 + max([-1, *given, *made])


def trace(fn: Callable, args: Sequence[PyTree], owners: Sequence[Any]) -> Program:
  """Flattens fn at the given arguments.

  Args:
    fn: a JAX function of positional arguments.
    args: pytrees of arrays or ShapeDtypeStructs; public ones must be arrays.
    owners: for each argument its owner; the values of PUBLIC ones are constants while fn is traced.

  Raises:
    ValueError: owners do not match the arguments, or a public argument has no value.
    NotImplementedError: control flow depends on secret values.
  """
  if len(owners) != len(args):
    raise ValueError(f"{len(owners)} owners for {len(args)} arguments; name one owner for each")
  out_shape: list[Any] = []

  leaves, structure = jax.tree.flatten(tuple(args))
  flat_owners = [
    owner for owner, arg in zip(owners, args, strict=True) for _ in jax.tree.leaves(arg)
  ]
  public = [owner == PUBLIC for owner in flat_owners]
  if any(p and isinstance(v, jax.ShapeDtypeStruct) for p, v in zip(public, leaves, strict=True)):
    raise ValueError("a public argument has only a shape; give its value when the plan is made")

  def flat_fn(*secrets: Array) -> list[Array]:
    given = iter(secrets)
    filled = [v if p else next(given) for p, v in zip(public, leaves, strict=True)]
    outputs, tree = jax.tree.flatten(fn(*jax.tree.unflatten(structure, filled)))
    out_shape.append(tree)
    return outputs

  avals = tuple(jax.ShapeDtypeStruct(np.shape(v), v.dtype) for v in leaves)
  jaxpr = jax.make_jaxpr(flat_fn)(*(v for p, v in zip(public, avals, strict=True) if not p))
  tracer = _Tracer()
  inputs = [v if p else tracer.new() for p, v in zip(public, leaves, strict=True)]
  outputs = tracer.inline(jaxpr, [v for v in inputs if isinstance(v, Ref)], "", "an unknown line")
  dtypes = tuple(v.dtype for v in jaxpr.out_avals)
  equations = needed(tracer.equations, outputs)
  return Program(tuple(inputs), avals, equations, tuple(outputs), out_shape[-1], dtypes)


def evaluate(program: Program, leaves: Sequence[Array | None]) -> dict[int, Array]:
  """The values, by number, that follow from the given inputs (None: not given), in plain JAX."""
  env = _given(program, leaves)
  for equation in program.equations:
    inputs = [env.get(v.number) if isinstance(v, Ref) else v for v in equation.inputs]
    if all(v is not None for v in inputs):
      env |= {
        ref.number: v for ref, v in zip(equation.outputs, equation.bind(*inputs), strict=True)
      }
  return env


_REPEATED = 2  # equations of a kind, on average, above which each kind is compiled by itself
Watch = Callable[[Equation, list[Any], list[Any]], None]


def runs_as_one(program: Program) -> bool:
  """Whether the whole program compiles faster than its equations do one by one.

  A long unrolled one repeats a few kinds of equations, which are compiled once each.
  """
  of = lambda e: (e.name, *((v.shape, str(v.dtype)) for v in e.avals))
  return len(program.equations) <= _REPEATED * len({of(e) for e in program.equations})


def evaluator(program: Program) -> Callable[[Sequence[Array | None]], dict[int, Array]]:
  """`evaluate` for concrete inputs, compiled where that is faster."""
  run = functools.partial(evaluate, program)
  return jax.jit(run) if runs_as_one(program) else run


def follow(program: Program, leaves: Sequence[Array | None]) -> dict[int, Array]:
  """`evaluate` for concrete inputs; nothing is compiled where no equation follows from them."""
  given = _given(program, leaves)
  known = lambda v: not isinstance(v, Ref) or v.number in given
  if any(all(map(known, e.inputs)) for e in program.equations):
    return evaluator(program)(leaves)
  return {number: jax.device_put(v) for number, v in given.items()}


def measurer(
  program: Program, watch: Watch = lambda equation, inputs, outputs: None
) -> Callable[[Sequence[Array]], np.ndarray]:
  """Inputs -> [number of values] float64: the largest magnitude of each value.

  Minus infinity pads maxima and masks; it stands for no number. Values without magnitude (keys of
  random generators), and those that no output needs, count as 0. `watch` sees each equation with
  its inputs and outputs.
  """
  run = evaluator(program) if runs_as_one(program) else None
  last = {v.number: e for e in program.equations for v in e.inputs if isinstance(v, Ref)}

  def measure(leaves: Sequence[Array]) -> np.ndarray:
    """Keeps no value for longer than it is needed."""
    out, env = np.zeros(program.num_values), _given(program, leaves)
    known = run(leaves) if run else {}
    out[list(env)] = [magnitude(v) for v in env.values()]
    for e in program.equations:
      inputs = [env[v.number] if isinstance(v, Ref) else v for v in e.inputs]
      outputs = [known.pop(ref.number) for ref in e.outputs] if run else e.bind(*inputs)
      watch(e, inputs, outputs)
      for ref, v in zip(e.outputs, outputs, strict=True):
        env[ref.number], out[ref.number] = v, magnitude(v)
      for v in e.inputs:
        if isinstance(v, Ref) and last[v.number] is e:
          env.pop(v.number, None)
    return out

  return measure


def magnitude(v: Array) -> float:
  """The largest magnitude of a value's elements, without minus infinity; 0 for keys.

  It is 1 for truth values: that none was true on the examples says nothing about other inputs.
  """
  if jax.dtypes.issubdtype(v.dtype, jax.dtypes.extended):
    return 0.0
  if v.dtype == bool:
    return 1.0
  found = np.abs(np.asarray(v).astype(complex if jnp.iscomplexobj(v) else float))
  return float(np.max(np.where(np.isneginf(np.asarray(v).real), 0, found), initial=0))


def _given(program: Program, leaves: Sequence[Array | None]) -> dict[int, Any]:
  return {
    ref.number: v
    for ref, v in zip(program.inputs, leaves, strict=True)
    if isinstance(ref, Ref) and v is not None
  }


def needed(equations: Sequence[Equation], outputs: Sequence[Any]) -> tuple[Equation, ...]:
  """The equations that outputs need, and those without outputs, which have effects."""
  live = {v.number for v in outputs if isinstance(v, Ref)}
  kept = []
  for equation in reversed(equations):
    if not equation.outputs or any(ref.number in live for ref in equation.outputs):
      live |= {v.number for v in equation.inputs if isinstance(v, Ref)}
      kept.append(equation)
  return tuple(reversed(kept))


def inlined(
  closed: Any, inputs: Sequence[Any], outputs_of: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
  """The outputs of a jaxpr, each of whose equations becomes `outputs_of`(equation, its inputs)."""
  is_closed = isinstance(closed, core.ClosedJaxpr)
  jaxpr, consts = (closed.jaxpr, closed.consts) if is_closed else (closed, [])
  env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
  env |= dict(zip(jaxpr.invars, inputs, strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
  for eqn in jaxpr.eqns:
    outputs = outputs_of(eqn, [read(v) for v in eqn.invars])
    env |= dict(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in jaxpr.outvars]


class _Tracer:
  def __init__(self) -> None:
    self.equations: list[Equation] = []
    self.count = 0
    self.decomposed = ""  # the source of a primitive whose parts are being inlined

  def new(self) -> Ref:
    self.count += 1
    return Ref(self.count - 1)

  def inline(self, closed: Any, inputs: Sequence[Any], layer: str, source: str) -> list[Any]:
    return inlined(closed, inputs, lambda eqn, v: self._equation(eqn, v, layer, source))

  def _equation(self, eqn: Any, values: list[Any], layer: str, source: str) -> list[Any]:
    name, source = eqn.primitive.name, self.decomposed or source_of(eqn) or source
    layer = "/".join(filter(None, [layer, str(eqn.source_info.name_stack)]))
    if name == "platform_index":  # the form for any platform: others have foreign calls
      return [np.int32(len(eqn.params["platforms"]) - 1)]
    if not any(isinstance(v, Ref) for v in values) and not eqn.effects:
      if (found := _by_numpy(eqn, values)) is not None:
        return [found]
      with jax.ensure_compile_time_eval():
        return applied(eqn, values)
    if name == "cond":
      if isinstance(values[0], Ref):
        raise NotImplementedError(
          f"cond on a secret value at {source}; use jnp.where, which runs both branches, or make "
          f"what it depends on a public argument"
        )
      branches = eqn.params["branches"]
      chosen = int(np.clip(int(values[0]), 0, len(branches) - 1))
      return self.inline(branches[chosen], values[1:], layer, source)
    if name == "scan":
      return self._scan(eqn, values, layer, source)
    if name == "while":
      return self._while(eqn, values, layer, source)
    given = [None if isinstance(v, Ref) else v for v in values]
    parts = clamped(eqn, given) if name == "clamp" else look_ups.written_out(eqn, given)
    if parts is not None:
      return self._parts(parts, [v for v in values if isinstance(v, Ref)], layer, source)
    if name in CALLS:
      (body,) = (eqn.params[key] for key in CALLS[name] if key in eqn.params)
      return self.inline(body, values, layer, source)
    if name in DECOMPOSITIONS and not eqn.effects:
      parts = jax.make_jaxpr(functools.partial(DECOMPOSITIONS[name], **eqn.params))
      return self._parts(parts(*(v.aval for v in eqn.invars)), values, layer, source)
    outputs = tuple(self.new() for _ in eqn.outvars)
    avals = tuple(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.outvars)
    bind = lambda *inputs: applied(eqn, inputs)
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

  def _while(self, eqn: Any, values: list[Any], layer: str, source: str) -> list[Any]:
    """A while loop, iteration by iteration, as long as its public condition holds."""
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    cond_consts, body_consts, carry = values[:first], values[first:second], values[second:]
    while True:
      (more,) = self.inline(params["cond_jaxpr"], [*cond_consts, *carry], layer, source)
      if isinstance(more, Ref):
        raise NotImplementedError(
          f"while loop on a secret condition at {source}; its length would tell the secret: loop a "
          f"fixed number of times and choose with jnp.where"
        )
      if not more:
        return carry
      carry = self.inline(params["body_jaxpr"], [*body_consts, *carry], layer, source)

  def _scan(self, eqn: Any, values: list[Any], layer: str, source: str) -> list[Any]:
    """A scan, iteration by iteration."""
    body, length = eqn.params["jaxpr"], eqn.params["length"]
    inner = body.jaxpr if isinstance(body, core.ClosedJaxpr) else body
    # Scanned arrays have one axis more outside than inside. The parameters that say so differ among
    # versions of JAX.
    scanned = lambda outside, inside: [
      len(a.aval.shape) > len(b.aval.shape) for a, b in zip(outside, inside, strict=True)
    ]
    num_carry = scanned(eqn.outvars, inner.outvars).count(False)
    num_consts = scanned(eqn.invars, inner.invars).count(False) - num_carry
    consts, carry = values[:num_consts], values[num_consts : num_consts + num_carry]
    row = lambda x, i: lax.dynamic_index_in_dim(x, i, keepdims=False)
    rows = [
      (x, jax.make_jaxpr(row)(v.aval, np.uint32(0)))
      for x, v in zip(
        values[num_consts + num_carry :], eqn.invars[num_consts + num_carry :], strict=True
      )
    ]
    stacked: dict[int, Sequence[Any]] = {}
    for i in range(length)[::-1] if eqn.params["reverse"] else range(length):
      xs = [v for x, take in rows for v in self.inline(take, [x, np.uint32(i)], layer, source)]
      outputs = self.inline(body, [*consts, *carry, *xs], layer, source)
      carry, stacked[i] = outputs[:num_carry], outputs[num_carry:]
    ys = []
    for j, v in enumerate(inner.outvars[num_carry:]):
      if length:
        stack = jax.make_jaxpr(lambda *each: jnp.stack(each))(*[v.aval] * length)
        ys += self.inline(stack, [stacked[i][j] for i in range(length)], layer, source)
      else:
        ys.append(np.zeros((0, *v.aval.shape), v.aval.dtype))
    return [*carry, *ys]


# Primitives that only call a jaxpr, and the parameters that hold it in one version of JAX or
# another. Other primitives (reductions, kernels) have jaxprs with another meaning.
CALLS = dict.fromkeys(
  (
    "jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_jvp_call",
    "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "composite",
  ),
  ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"),
)  # fmt: skip


def applied(eqn: Any, values: Sequence[Any]) -> list[Any]:
  """The outputs of an equation's primitive."""
  outputs = eqn.primitive.bind(*values, **eqn.params)
  return list(outputs) if eqn.primitive.multiple_results else [outputs]


def _by_numpy(eqn: Any, values: Sequence[Any]) -> np.ndarray | None:
  """The output of a public equation that NumPy computes alike, without compiling it; else None."""
  name, params = eqn.primitive.name, eqn.params
  if len(values) != 1 or isinstance(values[0], jax.Array):
    return None
  x, out = np.asarray(values[0], eqn.invars[0].aval.dtype), eqn.outvars[0].aval
  if name == "stage":
    return x
  if name == "broadcast_in_dim":
    kept = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
    return np.broadcast_to(x.reshape([kept.get(i, 1) for i in range(len(out.shape))]), out.shape)
  is_cut = x.dtype.kind == "f" and out.dtype.kind != "f"
  if name == "convert_element_type" and not is_cut and {x.dtype.kind, out.dtype.kind} <= {*"biuf"}:
    return x.astype(out.dtype)
  return None


def source_of(eqn: Any) -> str:
  """file:line of the innermost call outside JAX and Flax; empty if there is none."""
  traceback = eqn.source_info.traceback
  for frame in traceback.frames if traceback else ():
    if not any(f"/{package}/" in frame.file_name for package in ("jax", "flax", "jaxlib")):
      return f"{frame.file_name.rsplit('/', 1)[-1]}:{frame.line_num}"
  return ""
