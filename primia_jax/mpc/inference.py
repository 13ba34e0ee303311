"""The phases of an inference on a plan: values in and out, and both parties online.

Semi-honest parties; the dealer colludes with neither. `roles` keeps the roles apart; `transform`
plays all of them in one traceable function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng, ring
from primia_jax.mpc import dealing, encoding, protocol, ranges
from primia_jax.mpc.circuit import SHARING, Apply, Local, Open, Value
from primia_jax.mpc.lowering.program import evaluate
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Env, Operands, Ready
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER, PARTY, Wire
from primia_jax.types import Array, PyTree

_OWNERS_BLIND = {MODEL_OWNER: 0, DATA_OWNER: 4}  # subkeys of `transform`'s key
_SHARED_INPUTS = 3


def transform(plan: Plan) -> Callable:
  """The whole protocol as one traceable function f(key, *args), for simulation only.

  Both parties and the dealer run in one call, and the caller sees everything. It deals and
  publishes anew in every call. Under `jit` a key is an array and cannot know that it was used: two
  calls with one key use every mask twice. Under `vmap` a key that is not mapped is folded with the
  index, so that no two elements share a mask; a `scan` over images must be given a key for each.

  Returns:
    f(key, *args) -> fn's outputs in float32. key is [8] uint32, never used twice. Public arguments
    are those of the plan; arguments of the owner "shared" are given in the clear here. An argument
    that is NaN or infinite, or beyond the ring or its planned range, makes the outputs NaN.
  """
  encode_all = _tracing_encoder(plan)

  def run(key: Array, leaves: list[Array]) -> list[Array]:
    operands, good = encode_all(leaves)
    with plan.config.scope():
      operands = share_inputs(plan, operands, key)
      shares = simulate(plan, offline(plan, key, operands), operands)
    return encoding.spoiled(jax.tree.leaves(reveal(plan, shares)), good)

  folding = _folding(run)

  def transformed(key: Array, *args: PyTree) -> PyTree:
    leaves = [jnp.asarray(v) for v in jax.tree.leaves(args)]
    return jax.tree.unflatten(plan.program.out_tree, folding(jnp.asarray(key), leaves))

  return transformed


def _folding(run: Callable[[Array, list[Array]], list[Array]]) -> Callable:
  """run(key [..., 8], leaves) with a key folded with the index by a vmap that does not map it."""
  folding = jax.custom_batching.custom_vmap(run)

  @folding.def_vmap
  def _(axis_size: int, mapped: Any, key: Array, leaves: list[Array]) -> Any:
    key_mapped, leaves_mapped = mapped
    if not key_mapped:
      fold = lambda i: jnp.vectorize(lambda k: prng.derive(k, i), signature="(8)->(8)")(key)
      key = jax.vmap(fold)(jnp.arange(axis_size, dtype=jnp.uint32))
    each = jax.vmap(run, in_axes=(0, [0 if m else None for m in leaves_mapped]))
    out = _folding(each)(key, leaves)
    return out, [True] * len(out)

  return folding


def offline(plan: Plan, key: Array, operands: Operands) -> Ready:
  """What both parties hold before the online phase, stacked; pure, with all roles in one call.

  Args:
    key: [8] uint32, never used twice.
    operands: everybody's, from `encode`.
  """
  circuit = plan.circuit
  blind: Operands = {}
  for owner, subkey in _OWNERS_BLIND.items():
    blind |= protocol.blinds(circuit, prng.derive(key, subkey), owner)
  dealt = protocol.deal(circuit, key, protocol.full(circuit, blind))
  published = protocol.full(circuit, protocol.publish(operands, blind))
  prepare = lambda party: protocol.prepare(
    circuit, party, protocol.part(dealt, party), operands, published
  )
  return stack(*(prepare(party) for party in (MODEL_OWNER, DATA_OWNER)))


# ---- values in and out


def encode(plan: Plan, args: Sequence[PyTree]) -> Operands:
  """`encoder(plan)(args)`, for a single use."""
  return encoder(plan)(args)


def encoder(plan: Plan) -> Callable[[Sequence[PyTree]], Operands]:
  """Everybody's arguments as operands; compiled once, raises as `owner_encoder`'s result does."""
  each = {owner: owner_encoder(plan, owner) for owner in (None, MODEL_OWNER, DATA_OWNER)}

  def run_encoders(args: Sequence[PyTree]) -> Operands:
    leaves = jax.tree.leaves(tuple(args))
    out: Operands = {}
    for owner, encode_owner in each.items():
      out |= encode_owner(_of(plan, owner, leaves))
    return out

  return run_encoders


def owner_encoder(plan: Plan, owner: int | None) -> Callable[[Sequence[Array]], Operands]:
  """One owner's arguments as operands: once per model, or once per image.

  Returns:
    leaves -> operands, where leaves are the arrays of this owner's arguments, in order. It raises a
    ValueError if a number does not fit the ring, a weight the bits that were planned for it, or
    anything that enters the protocol its planned range.
  """
  entries = ranges.entries(plan, owner)
  measured = _measured(plan, owner, entries)

  def run_encoder(leaves: Sequence[Array]) -> Operands:
    found = measured(leaves)
    for i, most in found.largest.items():
      encoding.check_fits(plan.circuit.operands[i], most, plan.config)
    ranges.check(entries, found.entering, owner)
    return found.operands

  return run_encoder


def _tracing_encoder(plan: Plan) -> Callable[[Sequence[Array]], tuple[Operands, Array]]:
  """leaves -> everybody's operands, and whether all numbers fit: a transform cannot raise."""
  entries = {owner: ranges.entries(plan, owner) for owner in (None, MODEL_OWNER, DATA_OWNER)}
  each = {owner: _measured(plan, owner, found) for owner, found in entries.items()}

  def run_encoders(leaves: Sequence[Array]) -> tuple[Operands, Array]:
    out: Operands = {}
    good = jnp.bool_(True)
    for owner, measured in each.items():
      found = measured(_of(plan, owner, leaves))
      out |= found.operands
      for i, most in found.largest.items():
        good &= encoding.fits(plan.circuit.operands[i], most, plan.config)
      for i, most in found.entering.items():
        good &= ranges.keeps(entries[owner][i], most)
    return out, good

  return run_encoders


def _of(plan: Plan, owner: int | None, leaves: Sequence[Array]) -> list[Array]:
  return [v for by, v in zip(plan.owners, leaves, strict=True) if by == owner]


class _Measured(NamedTuple):
  """One owner's operands, the largest magnitude of each, and that of each of its values that enters
  the protocol (`ranges.entries`).
  """

  operands: Operands
  largest: dict[int, Array]
  entering: dict[int, Array]


def _measured(
  plan: Plan, owner: int | None, entries: Iterable[int]
) -> Callable[[Sequence[Array]], _Measured]:
  """leaves -> what an owner puts in, measured.

  Each owner has its own program: in another program, a folded weight might round to the
  neighbouring integer.
  """
  mine = [i for i, operand in enumerate(plan.circuit.operands) if operand.owner == owner]
  operands = [plan.circuit.operands[i] for i in mine]
  if not mine:
    return lambda leaves: _Measured({}, {}, {})

  def integers(leaves: Sequence[Array]) -> _Measured:
    own = iter(leaves)
    env: Any = evaluate(plan.program, [next(own) if by == owner else None for by in plan.owners])
    values = [operand.value(env) for operand in operands]
    encoded = [encoding.encode(o, v, plan.config) for o, v in zip(operands, values, strict=True)]
    largest = [encoding.largest(v) for v in values]
    return _Measured(
      dict(zip(mine, encoded, strict=True)),
      dict(zip(mine, largest, strict=True)),
      {i: ranges.largest(env[i]) for i in entries},
    )

  compiled = plan.compiled(("encode", owner), integers)

  def run(leaves: Sequence[Array]) -> _Measured:
    # in the caller's types; `jnp.asarray` would compile a program for each shape
    leaves = [v if isinstance(v, jax.Array) else jax.device_put(v) for v in leaves]
    with plan.config.scope():
      return compiled(leaves)

  return run


def share_inputs(plan: Plan, operands: Operands, key: Array) -> Operands:
  """Splits the arguments of the owner "shared" into shares, [2, ...]; the rest stays as it is."""
  out, key = dict(operands), prng.derive(key, _SHARED_INPUTS)
  for i, operand in enumerate(plan.circuit.operands):
    if operand.owner is None:
      first = dealing.uniform(key, i, 0, operands[i].shape, plan.config.dtype)
      out[i] = jnp.stack([first, operands[i] - first])
  return out


def check_owners(plan: Plan) -> None:
  """Raises a ValueError if the plan's arguments are not such that roles can hold them."""
  if plan.config.client != SHARING and None in plan.owners:
    raise ValueError(
      'the plan has arguments of the owner "shared", which no role holds; use `secret`, name an '
      f"owner, or plan for client={SHARING!r}"
    )
  if plan.config.client == SHARING and (None not in plan.owners or DATA_OWNER in plan.owners):
    raise ValueError(
      f'client={SHARING!r} is for arguments of the owner "shared": name it in the place of '
      '"data_owner"'
    )


def checked_shares(plan: Plan, shares: Operands | None) -> Operands:
  """One party's shares of the arguments of the owner "shared".

  Raises:
    ValueError: they are not of the plan's shapes and ring.
  """
  with plan.config.scope():
    want = {
      i: (operand.shape, plan.config.dtype)
      for i, operand in enumerate(plan.circuit.operands)
      if operand.owner is None
    }
    got = {i: (np.shape(v), v.dtype) for i, v in (shares or {}).items()}
    if got != want:
      raise ValueError(f"the plan takes shares {want}, not {got}")
    return {i: jnp.asarray(v) for i, v in (shares or {}).items()}


def reveal(plan: Plan, shares: Sequence[Array]) -> PyTree:
  """The outputs in float32 from both parties' shares, [2, ...] each, in fn's own structure."""
  add = lambda v: ring.reduce(v[0] + v[1], plan.config.num_bits)
  decode = plan.compiled("reveal", lambda shares: decoded(plan, list(map(add, shares))))
  with plan.config.scope():
    return outputs(plan, decode(list(shares)))


def decoded(plan: Plan, elements: Sequence[Array]) -> list[Array]:
  """The secret outputs from their ring elements: float32, or integers and truth values."""
  pairs = zip(plan.circuit.outputs, plan.program.out_dtypes, strict=True)
  of = [(v.scale, dtype) for v, dtype in pairs if isinstance(v, Value)]
  return [
    encoding.decode(e, scale, plan.config, dtype)
    for e, (scale, dtype) in zip(elements, of, strict=True)
  ]


def outputs(plan: Plan, secrets: Sequence[Array]) -> PyTree:
  """fn's outputs in its own structure: the secret ones, from `decoded`, among the public ones."""
  found = iter(secrets)
  leaves = [next(found) if isinstance(v, Value) else v for v in plan.circuit.outputs]
  return jax.tree.unflatten(plan.program.out_tree, leaves)


# ---- both parties online


def stack(*each: PyTree) -> PyTree:
  """Both parties' trees as one, party first."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def simulate(plan: Plan, ready: Ready, operands: Operands) -> list[Array]:
  """The online phase in one process; work of one party alone is done once.

  Args:
    ready: both parties', stacked.
    operands: everybody's, as their owners have them; arguments given as shares stacked, [2, ...].

  Returns:
    The outputs' shares, each [2, ...].
  """
  both = jax.vmap(
    lambda ready, operands: protocol.run(plan.circuit, Wire(), ready, operands),
    in_axes=(0, _operand_axes(plan)),
    axis_name=PARTY,
    axis_size=2,
  )
  return both(ready, operands)


def _operand_axes(plan: Plan) -> dict[int, int | None]:
  """Arguments given as shares have a row for each party."""
  return {
    i: 0 if operand.owner is None else None for i, operand in enumerate(plan.circuit.operands)
  }


class Step(NamedTuple):
  """Operations first to last - 1 of a plan as one compiled function (ready, operands, env) -> env
  of both parties.
  """

  first: int
  last: int
  fn: Callable[[Ready, Operands, Env], Env]


def simulate_steps(plan: Plan) -> list[Step]:
  """`simulate` cut into steps that are compiled and timed one by one.

  Each step ends with an opening, or with the circuit. Run them in order from an empty env, with
  `env = step.fn(ready, operands, env)`; ready and operands are as `simulate` takes them. The last
  env holds the outputs' shares: `protocol.outputs`.
  """
  operations = plan.circuit.operations
  cuts = [i for i, op in enumerate(operations) if isinstance(op, Open | Apply)]
  cuts = [0, *(i + 1 for i in cuts if i + 1 < len(operations)), len(operations)]
  opened = {
    op.out for op in operations if isinstance(op, Open) or (isinstance(op, Local) and op.opened)
  }
  axes = _operand_axes(plan)
  env_axes = lambda number: {
    i: (None, 0) if i in opened else 0 for i in protocol.live(plan.circuit, number)
  }

  def step(first: int, last: int) -> Step:
    part = lambda ready, operands, env: protocol.advance(
      plan.circuit, Wire(), ready, operands, env, first, last
    )
    both = jax.jit(
      jax.vmap(
        part,
        in_axes=(0, axes, env_axes(first)),
        out_axes=env_axes(last),
        axis_name=PARTY,
        axis_size=2,
      )
    )

    def run(ready: Ready, operands: Operands, env: Env) -> Env:
      with plan.config.scope():
        return both({i: c for i, c in ready.items() if first <= i < last}, operands, env)

    return Step(first, last, run)

  return [step(first, last) for first, last in itertools.pairwise(cuts)]


def on_mesh(plan: Plan, mesh: jax.sharding.Mesh, ready: Ready, operands: Operands) -> list[Array]:
  """The online phase with a device for each party, by `shard_map` over the axis "party".

  Opened values have the same bits as in `simulate`.

  Args:
    mesh: with an axis "party" of two devices.
    ready: both parties', stacked.
    operands: both parties', stacked: each as its owner has it, and `filled` at the other party.
  """
  spec = jax.sharding.PartitionSpec(PARTY)

  def body(ready: Ready, operands: Operands) -> list[Array]:
    mine = jax.tree.map(lambda v: v[0], (ready, operands))
    return [v[None] for v in protocol.run(plan.circuit, Wire(swap=True), *mine)]

  return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
    ready, operands
  )


def filled(plan: Plan, operands: Operands) -> Operands:
  """One party's operands, with blanks for those of the other party."""
  return {
    i: operands[i] if i in operands else encoding.blank(operand, plan.config)
    for i, operand in enumerate(plan.circuit.operands)
  }
