"""A circuit carried out: in the clear, by the dealer, by each party beforehand, and by both parties
together.

The phases of one inference, and who holds what:

  encode    an owner's values as integers, once per model and once per image
  blind     the model owner publishes D = W - B, uniform, to the data owner; B is the
            dealer's, once per model
  deal      the dealer's correlations, before the image exists; party 0 receives a seed
            and party 1 a seed and arrays
  prepare   each party expands its seed and maps its mask shares, alone
  run       the parties open masked values to each other: the only phase that communicates
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from primia_jax import native, prng, ring
from primia_jax.mpc import dealing, gates, products
from primia_jax.mpc.circuit import (
  Apply,
  Circuit,
  Config,
  Input,
  Linear,
  Local,
  Offset,
  Open,
  Operand,
  Product,
  Value,
)
from primia_jax.mpc.dealing import ADDITIVE, Correlation, Derived, Masks, Uniform
from primia_jax.mpc.maps import MULTIPLY
from primia_jax.mpc.products import multiply, product
from primia_jax.mpc.sharing import Wire, at, compute_at
from primia_jax.types import Array

Operands = dict[
  int, Any
]  # by number: ring elements, or a linear layer's Weight; B and D as products.Operand
Ready = dict[int, Correlation]  # by number of the operation: what a party needs of it during `run`
_BLIND, _SEED = 1, 2  # the dealer's subkeys


class Weight(NamedTuple):
  """A linear layer's operand: its ring elements, and the same made ready for products."""

  elements: Array
  ready: products.Operand


class Dealt(NamedTuple):
  """What the dealer sends for one inference.

  Attributes:
    seeds: [2, 8] uint32; party p receives row p.
    sent: by number of the operation, party 1's shares of what was derived.
    common: what both parties receive as it is (correction words of function secret sharing).
  """

  seeds: Array
  sent: dict[int, Correlation]
  common: dict[int, Correlation]


def encode(operand: Operand, value: Array, config: Config) -> Any:
  """An owner's float array as ring elements, ready for its linear layer where it serves one.

  Rounding is off by at most half of the operand's scale.
  """
  wide = jnp.float64 if config.num_bits > 32 else jnp.float32
  integers = jnp.round(value.astype(wide) / jnp.asarray(operand.scale, wide))
  elements = integers.astype(jnp.int64 if config.num_bits > 32 else jnp.int32).astype(config.dtype)
  if operand.map is None:
    return elements
  # Used twice, here and for D: computed again, a fused multiply-add might round it to the
  # neighbouring integer.
  elements = native.once(elements)
  return Weight(
    elements,
    products.split(operand.map, elements, operand.bits or config.num_bits, config.num_bits),
  )


def blank(operand: Operand, config: Config) -> Any:
  """What stands for an operand at the party that does not hold it: zeros of the same shapes."""
  return encode(operand, jnp.zeros(operand.shape, jnp.float32), config)


# ---- in the clear


def clear(
  circuit: Circuit,
  config: Config,
  operands: Operands,
  watch: Callable[[Apply, Array], None] | None = None,
) -> list[Array]:
  """The integers that the protocol computes, in the clear: what its exact mode equals bit for bit.

  Args:
    circuit: what to compute.
    config: the ring.
    operands: everybody's, encoded.
    watch: called with each gate's operation and its input, signed.
  """
  env: dict[int, Array] = {}
  for op in circuit.operations:
    match op:
      case Input():
        env[op.out] = operands[op.operand]
      case Local():
        env[op.out] = op.fn(*(env[i] for i in op.inputs))
      case Offset():
        env[op.out] = env[op.input] + _offset(op, operands, config)
      case Open():
        env[op.out] = env[op.input]
      case Linear():
        env[op.out] = multiply(op.map, env[op.input], operands[op.operand].ready, config.num_bits)
      case Product():
        a, b = (env[i] for i in op.inputs)
        env[op.out] = product(op.map, a, b, config.num_bits)
      case Apply():
        if watch is not None:
          watch(op, gates.to_signed(env[op.input], config.num_bits))
        env[op.out] = gates.clear(op.gate, env[op.input].reshape(-1)).reshape(op.shape)
  return [
    ring.reduce(env[v.number], config.num_bits) for v in circuit.outputs if isinstance(v, Value)
  ]


def _offset(op: Offset, operands: Operands, config: Config) -> Array:
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
      return gates.masks(op.gate)
  return {}


def blinds(circuit: Circuit, config: Config, key: Array) -> Operands:
  """The dealer's B for every operand of a linear layer: uniform ring elements, once per model."""
  return {
    i: dealing.uniform(prng.derive(key, _BLIND), i, 0, operand.shape, config.dtype, config.prng)
    for i, operand in enumerate(circuit.operands)
    if operand.map is not None
  }


def full(circuit: Circuit, config: Config, arrays: Operands) -> Operands:
  """Whole ring elements made ready for their linear layers: B, or the published D."""
  split = lambda i, v: products.split(
    circuit.operands[i].map or MULTIPLY, v, config.num_bits, config.num_bits
  )
  return {i: split(i, v) for i, v in arrays.items()}


def publish(operands: Operands, blind: Operands) -> Operands:
  """D = W - B for every operand of a linear layer; uniform to whoever lacks B."""
  return {i: v.elements - blind[i] for i, v in operands.items() if isinstance(v, Weight)}


def deal(circuit: Circuit, config: Config, key: Array, blind: Operands) -> Dealt:
  """The dealer's work for one inference.

  Args:
    circuit: what to deal for.
    config: the ring.
    key: [8] uint32, the dealer's secret for this inference; never used for another.
    blind: `full(blinds(...))`, the dealer's operands of this model.
  """
  seeds = [prng.derive(key, _SEED, party) for party in (0, 1)]
  opened: dict[int, list[Array]] = {}  # the mask shares of every masked value
  sent, common = {}, {}
  for number, op in enumerate(circuit.operations):
    each = [dealing.expand_masks(seed, number, masks(op, config), config.prng) for seed in seeds]
    derived = None
    match op:
      case Open():
        opened[op.out] = [m["r"] for m in each]
      case Local() if op.opened:
        opened[op.out] = [op.fn(*(opened[i][p] for i in op.inputs)) for p in (0, 1)]
      case Linear():
        r = opened[op.input][1 - op.owner]
        derived = Derived({"u": multiply(op.map, r, blind[op.operand], config.num_bits)}, {}, {})
      case Product():
        a, b = (opened[i][0] + opened[i][1] for i in op.inputs)
        derived = Derived({"u": product(op.map, a, b, config.num_bits)}, {}, {})
      case Apply():
        derived = gates.derive(
          op.gate, {name: jnp.stack([m[name] for m in each]) for name in each[0]}
        )
    if derived is not None:
      sent[number] = dealing.split(seeds[0], number, derived, config.prng)
      if derived.common:
        common[number] = derived.common
  return Dealt(jnp.stack(seeds), sent, common)


# ---- a party


class Part(NamedTuple):
  """What one party receives from the dealer."""

  seed: Array
  sent: dict[int, Correlation] | None  # None at party 0, which expands its seed instead
  common: dict[int, Correlation]


def part(dealt: Dealt, party: int) -> Part:
  """The part of what was dealt that goes to a party."""
  return Part(dealt.seeds[party], dealt.sent if party == 1 else None, dealt.common)


def prepare(
  circuit: Circuit,
  config: Config,
  party: int,
  dealt: Part,
  own: Operands,
  published: Operands,
  shapes: Mapping[int, Mapping[str, Any]],
) -> Ready:
  """A party's work before the image is there; it communicates with nobody.

  Args:
    circuit: what will be computed.
    config: the ring.
    party: which.
    dealt: from the dealer.
    own: this party's own operands of linear layers, encoded.
    published: the other party's D, made ready by `full`.
    shapes: of what is dealt to party 1, by which party 0 expands its seed.
  """
  opened: dict[int, Array] = {}
  ready: Ready = {}
  for number, op in enumerate(circuit.operations):
    mine = dealing.expand_masks(dealt.seed, number, masks(op, config), config.prng)
    if number in shapes:
      if dealt.sent is None:
        mine |= dealing.expand_shares(dealt.seed, number, shapes[number], config.prng)
      else:
        mine |= dealt.sent[number]
    mine |= dealt.common.get(number, {})
    match op:
      case Open():
        opened[op.out] = mine["r"]
      case Local() if op.opened:
        opened[op.out] = op.fn(*(opened[i] for i in op.inputs))
      case Linear():
        weight = own[op.operand].ready if op.owner == party else published[op.operand]
        mine = {"u": mine["u"] + multiply(op.map, opened[op.input], weight, config.num_bits)}
    if mine:
      ready[number] = mine
  return ready


Env = dict[int, Any]  # by number: shares, or (masked value, this party's share of its mask)


def run(
  circuit: Circuit, config: Config, wire: Wire, ready: Ready, operands: Operands
) -> list[Array]:
  """One party's part of the protocol, on the axis "party".

  Args:
    circuit: what to compute.
    config: the ring.
    wire: to the other party.
    ready: from `prepare`.
    operands: encoded; each as its owner has it and `blank` at the other party, or the same array at
      both in a simulation. Arguments given as shares are this party's.

  Returns:
    This party's shares of the outputs; a party learns an output only from the other's share of it.
  """
  return outputs(
    circuit, config, advance(circuit, config, wire, ready, operands, {}, 0, len(circuit.operations))
  )


def outputs(circuit: Circuit, config: Config, env: Env) -> list[Array]:
  """The shares of the outputs, once every operation is done."""
  return [
    ring.reduce(env[v.number], config.num_bits) for v in circuit.outputs if isinstance(v, Value)
  ]


def advance(
  circuit: Circuit,
  config: Config,
  wire: Wire,
  ready: Ready,
  operands: Operands,
  env: Env,
  first: int,
  last: int,
) -> Env:
  """Carries out operations first to last - 1 on what came before; returns what the rest still
  needs.
  """
  env, k = dict(env), config.num_bits
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
            0 if op.owner is None else op.owner, _offset(op, operands, config)
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
          env[op.out] = gates.run(op.gate, wire, z, c).reshape(op.shape)
    if wire.log is not None:
      wire.log[before:] = [sent._replace(operation=number) for sent in wire.log[before:]]
  return {i: env[i] for i in live(circuit, last)}


def live(circuit: Circuit, number: int) -> list[int]:
  """The values from before operation `number` that it or a later one reads, or that are outputs."""
  made = {op.out for op in circuit.operations[:number]}
  needed = {v.number for v in circuit.outputs if isinstance(v, Value)}
  for op in circuit.operations[number:]:
    match op:
      case Local() | Product():
        needed |= set(op.inputs)
      case Offset() | Open() | Linear() | Apply():
        needed.add(op.input)
  return sorted(made & needed)


def decode(elements: Array, scale: float, config: Config) -> Array:
  """Ring elements as float32 numbers."""
  signed = gates.to_signed(elements, config.num_bits)
  wide = jnp.float64 if config.num_bits > 32 else jnp.float32
  return (signed.astype(wide) * jnp.asarray(scale, wide)).astype(jnp.float32)
