"""`secret`: a JAX function as a two-party protocol. And the phases it is made of, for those who run
them apart.

Semi-honest parties; the dealer colludes with neither. The model owner learns nothing; the data
owner learns the output and what the `Plan` says; the dealer learns the plan only.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng, ring
from primia_jax.mpc import dealing, gates, planning, protocol
from primia_jax.mpc.circuit import Apply, Config, Local, Open, Value
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.program import evaluate
from primia_jax.mpc.protocol import Dealt, Operands, Part, Ready
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER, PARTY, Wire
from primia_jax.types import Array, PyTree

_SETUP, _INPUTS = (
  0,
  3,
)  # subkeys: the dealer's for what it draws once per model; of a simulated owner of shares


def secret(
  fn: Callable,
  owners: Sequence[Any],
  config: Config = Config(),  # noqa: B008
  ranges: np.ndarray | None = None,
) -> Callable:
  """Transforms fn(*args) into f(key, *args), which computes it under encryption: both parties and
  the dealer in one.

  For research and tests: whoever runs it sees everything. It traces, so it goes through `jit` and
  `vmap` (with a key for each element), and it deals for every call.

  Args:
    fn, owners, config, ranges: as `planning.plan` takes them.

  Returns:
    f(key, *args) -> fn's outputs in float32; key is [8] uint32, never used twice. Arguments whose
    owner is "shared" are given in the clear here.

  >>> import jax.numpy as jnp
  >>> from primia_jax import prng
  >>> owners = ("model_owner", "data_owner")
  >>> f = secret(lambda w, x: jnp.maximum(w @ x, 0), owners, Config(32, 8, 10))
  >>> f(prng.random_key(), jnp.eye(2), jnp.array([1.5, -2.0])).tolist()
  [1.5, 0.0]
  """

  def wrapped(key: Array, *args: PyTree) -> PyTree:
    plan = planning.plan(fn, owners, args, config, ranges)
    operands = share_inputs(plan, encode(plan, args), key)
    blind = blinds(plan, key)
    dealt = deal(plan, key, blind)
    published = publish(plan, operands, key)
    ready = [
      prepare(plan, party, protocol.part(dealt, party), operands, published) for party in (0, 1)
    ]
    return reveal(plan, simulate(plan, stack(*ready), operands))

  return wrapped


# ---- the owners


def encode(plan: Plan, args: Sequence[PyTree], party: int | None = None) -> Operands:
  """The operands that an owner (None: everybody) puts in, as ring elements; once per model, once
  per image.

  Args:
    plan: the plan.
    args: as given to `plan`; of the other party's arguments only the shapes matter.
    party: whose.

  Raises:
    ValueError: where a number does not fit the ring, or a weight the bits that were planned for it.
  """
  return encoder(plan, party)(args)


def encoder(plan: Plan, party: int | None = None) -> Callable[[Sequence[PyTree]], Operands]:
  """`encode`, compiled once for many images."""
  each = [
    _owner_encoder(plan, owner)
    for owner in ((None, MODEL_OWNER, DATA_OWNER) if party is None else (party,))
  ]

  def run_encoders(args: Sequence[PyTree]) -> Operands:
    return {i: v for encode_owner in each for i, v in encode_owner(args).items()}

  return run_encoders


def _owner_encoder(plan: Plan, owner: int | None) -> Callable[[Sequence[PyTree]], Operands]:
  """One owner's; a program of its own, since another might round a folded weight to the
  neighbouring integer.
  """
  mine = [i for i, operand in enumerate(plan.circuit.operands) if operand.owner == owner]

  @jax.jit
  def integers(leaves: Sequence[Array | None]) -> tuple[list[Array], list[Any]]:
    env: Any = evaluate(plan.program, leaves)
    operands = [plan.circuit.operands[i] for i in mine]
    values = [operand.value(env) for operand in operands]
    largest = [jnp.max(jnp.abs(v), initial=0).astype(jnp.float32) for v in values]
    return largest, [
      protocol.encode(o, v, plan.config) for o, v in zip(operands, values, strict=True)
    ]

  def run_encoder(args: Sequence[PyTree]) -> Operands:
    largest, encoded = integers(_given(plan, args, owner))
    for i, most in zip(mine, largest, strict=True):
      _check_fits(plan.circuit.operands[i], most, plan.config)
    return dict(zip(mine, encoded, strict=True))

  return run_encoder


def publish(plan: Plan, operands: Operands, key: Array) -> Operands:
  """D = W - B for the operands of linear layers, made ready for the other party; once per model.

  Args:
    plan: the plan.
    operands: an owner's, from `encode`.
    key: [8] uint32, the dealer's key of this model, which the owner of W receives and nobody else.
  """
  arrays = protocol.blinds(plan.circuit, plan.config, prng.derive(key, _SETUP))
  return protocol.full(plan.circuit, plan.config, protocol.publish(operands, arrays))


def _given(plan: Plan, args: Sequence[PyTree], owner: int | None) -> list[Array | None]:
  """The arguments of one owner, and None for the others'."""
  leaves = jax.tree.leaves(tuple(args))
  return [
    jnp.asarray(v) if by == owner else None for by, v in zip(plan.owners, leaves, strict=True)
  ]


def _check_fits(operand: protocol.Operand, most: Array, config: Config) -> None:
  if isinstance(most, jax.core.Tracer):  # inside jit nothing can be raised
    return
  largest = float(most)
  limit = 2.0 ** (min(operand.bits or config.num_bits, config.num_bits - 1) - 1) * operand.scale
  if not largest < limit:
    kind = "a weight" if operand.map else "an input or offset"
    raise ValueError(
      f"{operand.layer}: {kind} of magnitude {largest:.4g} does not fit below {limit:.4g}; scale "
      f"it down, plan with "
      "the weights at hand, or use fewer fraction_bits"
    )


# ---- the dealer


def blinds(plan: Plan, key: Array) -> Operands:
  """The dealer's B, ready for use; [8] uint32 key, one for each model."""
  arrays = protocol.blinds(plan.circuit, plan.config, prng.derive(key, _SETUP))
  return protocol.full(plan.circuit, plan.config, arrays)


def deal(plan: Plan, key: Array, blind: Operands | None = None) -> Dealt:
  """The correlations of one inference.

  Args:
    plan: the plan.
    key: [8] uint32, secret to the dealer, never used twice.
    blind: from `blinds` with the model's key; None takes `key` for it.
  """
  return protocol.deal(
    plan.circuit, plan.config, key, blinds(plan, key) if blind is None else blind
  )


# ---- the parties


def prepare(plan: Plan, party: int, dealt: Part, own: Operands, published: Operands) -> Ready:
  """What a party computes by itself before the image is there; see `protocol.prepare`."""
  shapes = planning.dealt_shapes(plan).sent
  return protocol.prepare(plan.circuit, plan.config, party, dealt, own, published, shapes)


def run(plan: Plan, ready: Ready, operands: Operands, wire: Wire = Wire()) -> list[Array]:  # noqa: B008
  """One party's part of the protocol over the axis "party"; see `protocol.run`."""
  return protocol.run(plan.circuit, plan.config, wire, ready, operands)


def stack(*each: PyTree) -> PyTree:
  """Both parties' trees as one, party first."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


class Step(NamedTuple):
  """Operations first to last - 1 of a plan as one compiled function (ready, operands, env) -> env
  of both parties.
  """

  first: int
  last: int
  fn: Callable[[Ready, Operands, protocol.Env], protocol.Env]


def simulate(plan: Plan, ready: Ready, operands: Operands) -> list[Array]:
  """Both parties in one process, what one party computes alone done once.

  Args:
    plan: the plan.
    ready: both parties', stacked.
    operands: everybody's, as their owners have them; arguments given as shares stacked, [2, ...].

  Returns:
    the outputs' shares, each [2, ...].
  """
  both = jax.vmap(
    lambda ready, operands: run(plan, ready, operands),
    in_axes=(0, _operand_axes(plan)),
    axis_name=PARTY,
    axis_size=2,
  )
  return both(ready, operands)


def _operand_axes(plan: Plan) -> dict[int, int | None]:
  """What is given as shares has a row for each party."""
  return {
    i: 0 if operand.owner is None else None for i, operand in enumerate(plan.circuit.operands)
  }


def simulate_steps(plan: Plan) -> list[Step]:
  """`simulate` cut into steps that are compiled and timed one by one: each opens a value, or ends
  the circuit.

  Args:
    plan: the plan.

  Returns:
    steps; run them in order with `env = step.fn(ready, operands, env)`, from an empty env; ready
    and operands are as `simulate` takes them. The last one's env gives the shares of the outputs to
    `outputs`.
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
      plan.circuit, plan.config, Wire(), ready, operands, env, first, last
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
    mine = lambda ready: {i: c for i, c in ready.items() if first <= i < last}
    return Step(first, last, lambda ready, operands, env: both(mine(ready), operands, env))

  return [step(first, last) for first, last in itertools.pairwise(cuts)]


def outputs(plan: Plan, env: protocol.Env) -> list[Array]:
  """The outputs' shares, each [2, ...], from the last step's env."""
  return protocol.outputs(plan.circuit, plan.config, env)


def on_mesh(plan: Plan, mesh: jax.sharding.Mesh, ready: Ready, operands: Operands) -> list[Array]:
  """Each party on a device of its own, by `shard_map` over the axis "party"; opened values as in
  `simulate`.

  Args:
    plan: the plan.
    mesh: with an axis "party" of two devices.
    ready: both parties', stacked.
    operands: stacked: each as its owner has it, and `protocol.blank` at the other.
  """
  spec = jax.sharding.PartitionSpec(PARTY)

  def body(ready: Ready, operands: Operands) -> list[Array]:
    mine = jax.tree.map(lambda v: v[0], (ready, operands))
    return [v[None] for v in run(plan, mine[0], mine[1], Wire(swap=True))]

  return jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
    ready, operands
  )


def reveal(plan: Plan, shares: Sequence[Array]) -> PyTree:
  """The outputs in float32 from both parties' shares, [2, ...] each, put together as fn does."""
  elements = [ring.reduce(v[0] + v[1], plan.config.num_bits) for v in shares]
  return _outputs(plan, elements)


def _outputs(plan: Plan, elements: Sequence[Array]) -> PyTree:
  found = iter(elements)
  leaves = [
    _as(dtype, protocol.decode(next(found), v.scale, plan.config)) if isinstance(v, Value) else v
    for v, dtype in zip(plan.circuit.outputs, plan.program.out_dtypes, strict=True)
  ]
  return jax.tree.unflatten(plan.program.out_tree, leaves)


def _as(dtype: Any, x: Array) -> Array:
  """Positions and comparisons as integers and booleans; real numbers stay float32."""
  return x if jnp.issubdtype(dtype, jnp.floating) else jnp.round(x).astype(dtype)


def share(x: Array, key: Array, config: Config) -> Array:
  """Shares [2, ...] of a float array at the scale of activations; each alone is uniform and tells
  nothing.

  Args:
    x: float array; |x| < 2^(k - 2 - f).
    key: [8] uint32, secret, never used twice.
    config: the ring.
  """
  operand = protocol.Operand(
    None, lambda env: x, 2.0**-config.fraction_bits, x.shape, None, None, "share"
  )
  _check_fits(operand, jnp.max(jnp.abs(x), initial=0), config)
  elements = protocol.encode(operand, x, config)
  first = prng.bits(key, jnp.zeros(3, jnp.uint32), x.shape, config.dtype)
  return jnp.stack([first, elements - first])


def share_inputs(plan: Plan, operands: Operands, key: Array) -> Operands:
  """Splits what is given as shares, [2, ...]; the rest stays as it is."""
  out = dict(operands)
  for i, operand in enumerate(plan.circuit.operands):
    if operand.owner is None:
      first = dealing.uniform(prng.derive(key, _INPUTS), i, 0, operands[i].shape, plan.config.dtype)
      out[i] = jnp.stack([first, operands[i] - first])
  return out


# ---- in the clear


def check(plan: Plan, args: Sequence[PyTree]) -> PyTree:
  """`checker(plan)(args)`, for a single use."""
  return checker(plan)(args)


def checker(plan: Plan) -> Callable[[Sequence[PyTree]], PyTree]:
  """The exact protocol's outputs, bit for bit, computed in the clear, with every gate's range
  checked.

  Returns:
    args -> outputs; it raises a ValueError where a value leaves the range planned for it, which the
    protocol itself could not notice, and names the layer.
  """
  gate_operations = [op for op in plan.circuit.operations if isinstance(op, Apply)]
  wide = jnp.int64 if plan.config.num_bits > 32 else jnp.int32

  @jax.jit
  def integers(operands: Operands) -> tuple[list[Array], list[Array]]:
    largest: list[Array] = []
    watch = lambda op, z: largest.append(jnp.max(jnp.abs(z.astype(wide)), initial=0))
    return protocol.clear(plan.circuit, plan.config, operands, watch), largest

  encode_all = encoder(plan)

  def run_clear(args: Sequence[PyTree]) -> PyTree:
    elements, largest = integers(encode_all(args))
    for op, most in zip(gate_operations, largest, strict=True):
      if int(most) + gates.slack(op.gate) >= 2**op.gate.range_bits:
        raise ValueError(
          f"{op.layer}: the input of a {op.gate.action} takes {int(most).bit_length()} bits but "
          f"was planned for "
          f"{op.gate.range_bits}; calibrate with more examples or a larger margin"
        )
    return _outputs(plan, elements)

  return run_clear
