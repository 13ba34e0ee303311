"""The phases of one inference on a circuit: deal, prepare, run.

  publish   an owner's D = W - B for its operands of linear layers; B is the dealer's and uniform,
            so D reveals nothing without B
  deal      the dealer's correlations, before the image exists; party 0 receives a seed, party 1 a
            seed and arrays
  prepare   each party expands its seed and maps its mask shares, alone
  run       the parties open masked values to each other; only this phase communicates

These functions are pure and trace. Their caller must use each key once and give each
party its own operands only; `roles` does both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from primia_jax import prng, ring
from primia_jax.mpc import dealing, products
from primia_jax.mpc.circuit import (
  Apply,
  Circuit,
  Config,
  Input,
  Linear,
  Local,
  Offset,
  Open,
  Product,
  Value,
)
from primia_jax.mpc.dealing import ADDITIVE, Correlation, Derived, Masks, Uniform
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.maps import MULTIPLY
from primia_jax.mpc.products import multiply, product
from primia_jax.mpc.sharing import PARTY, Sent, Wire, at, compute_at
from primia_jax.types import Array

# By number of the operand: ring elements or, for linear layers, an `encoding.Weight`; B and D are
# ring elements too, and `products.Factor` once they are `full`.
Operands = dict[int, Any]
Ready = dict[int, Correlation]  # by number of the operation: what a party needs for it in `run`
Env = dict[int, Any]  # by number: shares, or (masked value, this party's share of its mask)
_BLIND, _SEED = 1, 2  # the dealer's subkeys


class Dealt(NamedTuple):
  """What the dealer sends for one inference.

  Attributes:
    seeds: [2, 8] uint32; party p receives row p.
    sent: by number of the operation, party 1's shares of the derived values.
    common: what both parties receive as it is (correction words of function secret sharing).
  """

  seeds: Array
  sent: dict[int, Correlation]
  common: dict[int, Correlation]


def offset(op: Offset, operands: Operands, config: Config) -> Array:
  """The ring elements that an `Offset` adds."""
  if op.owner is not None:
    return operands[op.operand]
  return jnp.asarray(op.operand.astype(config.dtype))


# ---- the dealer


def masks(op: Any, config: Config) -> Masks:
  """The uniform masks of one operation."""
  match op:
    case Open():
      return {"r": Uniform(op.shape, config.dtype, ADDITIVE)}
    case Apply():
      return elementwise.masks(op.gate)
  return {}


def blinds(circuit: Circuit, key: Array, owner: int) -> Operands:
  """B for each operand that an owner has in linear layers: uniform ring elements.

  Args:
    key: [8] uint32, known to the dealer and to this owner only: with it, the other party reads the
      operands off D. One key serves one set of values: two D under one B give their difference.
    owner: the party.
  """
  key, dtype = prng.derive(key, _BLIND), circuit.config.dtype
  return {
    i: dealing.uniform(key, i, 0, circuit.operands[i].shape, dtype)
    for i in circuit.linear_operands(owner)
  }


def full(circuit: Circuit, arrays: Operands) -> Operands:
  """B or D, whole ring elements, made ready for their linear layers."""
  bits = circuit.config.num_bits
  return {
    i: products.split(circuit.operands[i].map or MULTIPLY, v, bits, bits) for i, v in arrays.items()
  }


def publish(operands: Operands, blind: Operands) -> Operands:
  """D = W - B for each operand that has a B."""
  return {i: operands[i].elements - b for i, b in blind.items()}


def deal_gate(gate: elementwise.Gate, seeds: Sequence[Array], number: Any) -> tuple:
  """What the dealer deals for one gate: party 1's shares, and what both receive as it is.

  Args:
    seeds: of both parties.
    number: of the operation in the circuit.
  """
  each = [dealing.expand_masks(seed, number, elementwise.masks(gate)) for seed in seeds]
  both = {name: jnp.stack([m[name] for m in each]) for name in each[0]}
  derived = elementwise.derive(gate, both)
  return dealing.split(seeds[0], number, derived), derived.common


def deal(circuit: Circuit, key: Array, blind: Operands, deal_gate: Callable = deal_gate) -> Dealt:
  """The dealer's work for one inference.

  Args:
    circuit: what to deal for.
    key: [8] uint32, the dealer's secret for this inference alone.
    blind: `full(blinds(...))` of both owners.
    deal_gate: deals for a gate; an audit traces it by itself, once for all gates alike.
  """
  config = circuit.config
  seeds = [prng.derive(key, _SEED, party) for party in (0, 1)]
  opened: dict[int, list[Array]] = {}  # the mask shares of every masked value
  sent, common = {}, {}
  for number, op in enumerate(circuit.operations):
    derived = None
    match op:
      case Open():
        each = [dealing.expand_masks(seed, number, masks(op, config)) for seed in seeds]
        opened[op.out] = [m["r"] for m in each]
      case Local() if op.opened:
        opened[op.out] = [op.fn(*(opened[i][p] for i in op.inputs)) for p in (0, 1)]
      case Linear():
        r = opened[op.input][1 - op.owner]
        derived = {"u": multiply(op.map, r, blind[op.operand], config.num_bits)}
      case Product():
        a, b = (opened[i][0] + opened[i][1] for i in op.inputs)
        derived = {"u": product(op.map, a, b, config.num_bits)}
      case Apply():
        sent[number], shown = deal_gate(op.gate, seeds, number)
        if shown:
          common[number] = shown
    if derived is not None:
      sent[number] = dealing.split(seeds[0], number, Derived(derived, {}, {}))
  return Dealt(jnp.stack(seeds), sent, common)


# ---- a party


class Part(NamedTuple):
  """What one party receives from the dealer."""

  seed: Array
  sent: dict[int, Correlation] | None  # None for party 0, which expands its seed instead
  common: dict[int, Correlation]
  tags: Any = None  # `tags.Tagged` of party 1, where its openings are checked


def part(dealt: Dealt, party: int) -> Part:
  """What goes to one party."""
  return Part(dealt.seeds[party], dealt.sent if party == 1 else None, dealt.common)


def dealt_shapes(circuit: Circuit) -> Dealt:
  """Shapes and dtypes of what is dealt for one inference."""
  sent: dict[int, Any] = {}
  common: dict[int, Any] = {}
  for number, op in enumerate(circuit.operations):
    if isinstance(op, Linear | Product):
      sent[number] = {"u": jax.ShapeDtypeStruct(op.shape, circuit.config.dtype)}
    elif isinstance(op, Apply):
      derived = derived_shapes(op.gate)
      sent[number] = derived.additive | derived.boolean
      if derived.common:
        common[number] = derived.common
  seeds: Any = jax.ShapeDtypeStruct((2, 8), jnp.uint32)
  return Dealt(seeds, sent, common)


@functools.cache
def derived_shapes(gate: elementwise.Gate) -> Derived:
  """Traced once for all equal gates: a recurrent network has the same ones at every step."""
  both = {
    name: jax.ShapeDtypeStruct((2, *mask.shape), mask.dtype)
    for name, mask in elementwise.masks(gate).items()
  }
  return jax.eval_shape(functools.partial(elementwise.derive, gate), both)


def messages(circuit: Circuit) -> list[Sent]:
  """The messages that each party sends in `run`, in order; one for each round."""
  sent: list[Sent] = []
  for number, op in enumerate(circuit.operations):
    match op:
      case Open():
        sent.append(Sent("open", math.prod(op.shape) * circuit.config.dtype.itemsize, number))
      case Apply():
        sent += [message._replace(operation=number) for message in _gate_messages(op.gate)]
  return sent


@functools.cache
def _gate_messages(gate: elementwise.Gate) -> tuple[Sent, ...]:
  log: list[Sent] = []
  run = functools.partial(elementwise.run, gate, Wire(log=log))
  derived, masks = derived_shapes(gate), elementwise.masks(gate)
  shapes: dict[str, Any] = {
    name: jax.ShapeDtypeStruct(mask.shape, mask.dtype) for name, mask in masks.items()
  }
  shapes |= derived.additive | derived.boolean | derived.common
  both = jax.vmap(run, in_axes=(None, None), axis_name=PARTY, axis_size=2)
  jax.eval_shape(both, jax.ShapeDtypeStruct((gate.num,), ring.storage(gate.num_bits)), shapes)
  return tuple(log)


def expand(masks: Masks, shapes: Any, seed: Array, number: Any) -> Correlation:
  """A party's share of an operation's masks and, at party 0, of values of these shapes."""
  return dealing.expand_masks(seed, number, masks) | dealing.expand_shares(seed, number, shapes)


def prepare(
  circuit: Circuit,
  party: int,
  dealt: Part,
  own: Operands,
  published: Operands,
  expand: Callable = expand,
) -> Ready:
  """A party's work before the image exists, without communication.

  Args:
    circuit: what will be computed.
    dealt: from the dealer.
    own: this party's encoded operands of linear layers. One that does not exist yet (it depends on
      the image) may be missing, here and in the other party's `published`; then `complete` follows.
    published: the other party's D, made ready by `full`.
  """
  config = circuit.config
  shapes: Any = dealt_shapes(circuit).sent if dealt.sent is None else {}
  opened: dict[int, Array] = {}
  ready: Ready = {}
  for number, op in enumerate(circuit.operations):
    mine = expand(masks(op, config), shapes.get(number, {}), dealt.seed, number)
    mine |= (dealt.sent or {}).get(number, {}) | dealt.common.get(number, {})
    match op:
      case Open():
        opened[op.out] = mine["r"]
      case Local() if op.opened:
        opened[op.out] = op.fn(*(opened[i] for i in op.inputs))
      case Linear():
        mine = _complete(op, mine | {"r": opened[op.input]}, party, own, published, config)
    if mine:
      ready[number] = mine
  return ready


def complete(
  circuit: Circuit, party: int, ready: Ready, own: Operands, published: Operands
) -> Ready:
  """Finishes `prepare` with the operands that did not exist then; arguments as there."""
  out = dict(ready)
  for number, op in enumerate(circuit.operations):
    if isinstance(op, Linear) and "r" in ready[number]:
      out[number] = _complete(op, ready[number], party, own, published, circuit.config)
  return out


def _complete(
  op: Linear, mine: Correlation, party: int, own: Operands, published: Operands, config: Config
) -> Correlation:
  """u + L_W(r) at the owner and u + L_D(r) at the other party, once W or D is there."""
  if op.owner == party:
    weight = own[op.operand].ready if op.operand in own else None
  else:
    weight = published.get(op.operand)
  if weight is None:
    return mine
  return {"u": mine["u"] + multiply(op.map, mine["r"], weight, config.num_bits)}


def run(
  circuit: Circuit, wire: Wire, ready: Ready, operands: Operands, apply: Callable = elementwise.run
) -> list[Array]:
  """One party's part of the protocol, on the axis "party".

  Args:
    circuit: what to compute.
    wire: to the other party.
    ready: from `prepare`.
    operands: encoded. Each is as its owner has it, and `encoding.blank` at the other party; in a
      simulation both have the same array. Arguments given as shares are this party's shares.
    apply: runs a gate; see `deal`.

  Returns:
    This party's shares of the outputs. A party learns an output only from the other's share.
  """
  env = advance(circuit, wire, ready, operands, {}, 0, len(circuit.operations), apply)
  return outputs(circuit, env)


def outputs(circuit: Circuit, env: Env) -> list[Array]:
  """The shares of the outputs, once every operation is done."""
  secrets = [v.number for v in circuit.outputs if isinstance(v, Value)]
  return [ring.reduce(env[number], circuit.config.num_bits) for number in secrets]


def advance(
  circuit: Circuit,
  wire: Wire,
  ready: Ready,
  operands: Operands,
  env: Env,
  first: int,
  last: int,
  apply: Callable = elementwise.run,
) -> Env:
  """Carries out operations first to last - 1 and returns the values that later ones need."""
  env, k = dict(env), circuit.config.num_bits
  for number in range(first, last):
    op = circuit.operations[number]
    c, before = ready.get(number, {}), len(wire.log or ())
    with jax.named_scope(op.layer):
      match op:
        case Input():
          env[op.out] = (
            operands[op.operand] if op.owner is None else at(op.owner, operands[op.operand])
          )
        case Local() if op.opened:
          masked, r = zip(*(env[i] for i in op.inputs), strict=True)
          env[op.out] = op.fn(*masked), op.fn(*r)
        case Local():
          env[op.out] = op.fn(*(env[i] for i in op.inputs))
        case Offset():
          env[op.out] = env[op.input] + at(
            0 if op.owner is None else op.owner, offset(op, operands, circuit.config)
          )
        case Open():
          env[op.out] = wire.open_additive(env[op.input] + c["r"], "open"), c["r"]
        case Linear():
          masked, _ = env[op.input]
          known = operands[op.operand].ready
          whole = compute_at(op.owner, functools.partial(multiply, op.map, masked, known, k), wire)
          env[op.out] = whole - c["u"]
        case Product():
          (a, ra), (b, rb) = (env[i] for i in op.inputs)
          env[op.out] = product(op.map, a, at(0, b) - rb, k) - product(op.map, ra, b, k) + c["u"]
        case Apply():
          z = env[op.input].reshape(-1)
          env[op.out] = apply(op.gate, wire, z, c).reshape(op.shape)
    if wire.log is not None:
      wire.log[before:] = [sent._replace(operation=number) for sent in wire.log[before:]]
  return {i: env[i] for i in live(circuit, last)}


def live(circuit: Circuit, number: int) -> list[int]:
  """The values made before operation `number` that it, a later one or the outputs read."""
  made = {op.out for op in circuit.operations[:number]}
  needed = {v.number for v in circuit.outputs if isinstance(v, Value)}
  for op in circuit.operations[number:]:
    match op:
      case Local() | Product():
        needed |= set(op.inputs)
      case Offset() | Open() | Linear() | Apply():
        needed.add(op.input)
  return sorted(made & needed)
