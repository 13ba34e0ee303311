"""What crosses in an encrypted inference: the whole protocol of a plan, as one party sees it.

For each observer, the model owner and the data owner, the audit traces what the dealer and the
other party do, from the keys that the dealer and the owners draw to the last opened value: blinds,
publication or question, correlations, preparation and the party's program, all by the functions of
`mpc.protocol`. The observer's keys and values are public, all else is secret. What crosses to it
together must be hidden together.

Three kinds of values need no mask, each for a reason:
  key      the keys in what the dealer gives a party (`protocol.part`), and that of its own blind.
           All streams of these are public.
  output   the model owner's shares of the outputs. The data owner learns the outputs, and with them
           and its own shares it can compute these. Such a share must depend on the shares that
           the output's operations were dealt (after gates, on nothing else), and on no operand but
           theirs.
  assumed  the correction words of function secret sharing, which are uniform to each party alone by
           Boyle et al. 2021, theorem 1; their trees grow inside and not by `prng`'s streams.

Not seen: `mpc.roles`, which draws the keys and keeps them apart by the types in `mpc.messages`; the
tags of a checked client (`mpc.tags`); the plan, and constants of the function, which are public;
whether an output's share has the right value, which tests of the results see; what the data owner
learns from outputs, query by query; a party that does not follow the protocol; sizes and times.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.boundary import flow, meetings, report
from primia_jax.boundary.values import PUBLIC, KeyName, Value, Word, depends, secret
from primia_jax.mpc import circuit as circuits
from primia_jax.mpc import encoding, protocol
from primia_jax.mpc.circuit import Apply, Circuit, Input, Linear, Local, Offset, Open, Product
from primia_jax.mpc.dealing import Masks
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.gates.elementwise import Gate
from primia_jax.mpc.messages import NAMES
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER, PARTY, Sent, Wire

_NUM = 8 * 521  # elements of a traced gate; neither it nor its eighth is a size of anything else
_DEALER: KeyName = ("the dealer's key",)
_BLINDS: dict[int, KeyName] = {p: (f"the key of the {NAMES[p]}'s blind",) for p in NAMES}


def audit_secret(private: Any) -> report.Report:
  """Audits what each party of a secret function sees.

  Args:
    private: from `mpc.secret`, or a plan from `mpc.plan`.

  Raises:
    ValueError: the plan has arguments of the owner "shared", whose shares no role sends.
  """
  plan: Plan = getattr(private, "plan", private)
  if None in plan.owners:
    raise ValueError(
      'the plan has arguments of the owner "shared", which no role holds; name an owner'
    )
  with plan.config.scope(), _without_collection():
    traced = _trace(plan)
    found = [_seen_by(plan, traced, party) for party in (MODEL_OWNER, DATA_OWNER)]
  return report.Report(
    "encrypted inference",
    tuple(c for each in found for c in each.crossings),
    tuple(v for each in found for v in each.violations),
  )


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
  """Traces live until the audit ends. Python's collector would walk them again and again."""
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


class _Gate(NamedTuple):
  """A gate, traced for `_NUM` elements.

  Attributes:
    deal, run: `protocol.deal_gate`, and one party's `elementwise.run`.
    dealt: the structure of what `deal` returns.
    rounds: what each round of `run` is, and how many arrays it opens.
  """

  deal: Any
  run: Any
  dealt: Any
  rounds: list[tuple[str, int]]


class _Phases(NamedTuple):
  """The phases of `protocol`, traced, and shapes of what passes between them."""

  blinds: Any  # keys -> B of both owners, and `full`
  deal: Any
  dealt: protocol.Dealt
  parts: Sequence[Any]  # of each party: dealt -> `protocol.Part`
  part: Sequence[Any]  # its structure
  prepare: Sequence[Any]  # of each party: (its operands, all B, dealt) -> (published, ready)
  run: Any  # -> shares of the outputs, then what each gate returns
  operands: dict[int, Any]
  gates: dict[Gate, _Gate]


def _trace(plan: Plan) -> _Phases:
  circuit = plan.circuit
  key: Any = jax.ShapeDtypeStruct((8,), jnp.uint32)
  alike = {_alike(op.gate) for op in circuit.operations if isinstance(op, Apply)}
  gates = {gate: _trace_gate(gate) for gate in alike}

  def deal_gate(gate: Gate, seeds: Sequence[Any], number: int) -> Any:
    traced = gates[_alike(gate)]
    out = _fold(traced.deal, _resized(gate.num), *seeds, np.uint32(number))
    return jax.tree.unflatten(traced.dealt, out)

  applied: list[Any] = []

  def apply(gate: Gate, wire: Wire, z: Any, correlation: dict[str, Any]) -> Any:
    leaves = jax.tree.leaves((z, correlation))
    applied.append(_fold(gates[_alike(gate)].run, _resized(gate.num), *leaves)[0])
    return applied[-1]

  expanding: dict[Any, Any] = {}

  def expand(masks: Masks, shapes: dict[str, Any], seed: Any, number: int) -> dict[str, Any]:
    small = {k: m._replace(shape=(1,)) for k, m in masks.items()}
    others = {k: jax.ShapeDtypeStruct((1,), v.dtype) for k, v in shapes.items()}
    kind = repr((small, others))
    if kind not in expanding:
      fn = lambda seed, number: protocol.expand(small, others, seed, number)
      expanding[kind] = jax.make_jaxpr(fn, return_shape=True)(key, np.uint32(0))
    inner, out = expanding[kind]
    shapes = {k: (masks | shapes)[k] for k in sorted(out)}
    avals = tuple(jax.core.ShapedArray(v.shape, v.dtype) for v in shapes.values())
    found = flow.folded.bind(seed, np.uint32(number), inner=inner, avals=avals, resized=None)
    return dict(zip(sorted(out), found, strict=True))

  def blinds(first: Any, second: Any) -> tuple[protocol.Operands, protocol.Operands]:
    both = protocol.blinds(circuit, first, MODEL_OWNER) | protocol.blinds(
      circuit, second, DATA_OWNER
    )
    return both, protocol.full(circuit, both)

  def prepare(party: int, operands: protocol.Operands, blind: protocol.Operands, dealt: Any) -> Any:
    published = protocol.publish(operands, blind)
    own = {i: operands[i] for i in circuit.linear_operands(party)}
    theirs = {i: published[i] for i in circuit.linear_operands(1 - party)}
    ready = protocol.prepare(
      circuit, party, protocol.part(dealt, party), own, protocol.full(circuit, theirs), expand
    )
    return {i: published[i] for i in own}, ready

  operands = {
    i: jax.eval_shape(functools.partial(encoding.blank, o, plan.config))
    for i, o in enumerate(circuit.operands)
  }
  blinded, (arrays, full) = jax.make_jaxpr(blinds, return_shape=True)(key, key)
  deal = functools.partial(protocol.deal, circuit, deal_gate=deal_gate)
  dealing, dealt = jax.make_jaxpr(deal, return_shape=True)(key, full)
  parts = [
    jax.make_jaxpr(functools.partial(protocol.part, party=p), return_shape=True)(dealt)
    for p in (MODEL_OWNER, DATA_OWNER)
  ]
  prepared = [
    jax.make_jaxpr(functools.partial(prepare, p), return_shape=True)(operands, arrays, dealt)
    for p in (MODEL_OWNER, DATA_OWNER)
  ]
  party = functools.partial(protocol.run, circuit, Wire(swap=True), apply=apply)
  run = lambda ready, operands: (party(ready, operands), applied)
  ready = prepared[0][1][1]
  running = jax.make_jaxpr(run, axis_env=[(PARTY, 2)])(ready, operands)
  parting, part = zip(*parts, strict=True)
  preparing, _ = zip(*prepared, strict=True)
  return _Phases(blinded, dealing, dealt, parting, part, preparing, running, operands, gates)


def _alike(gate: Gate) -> Gate:
  return gate._replace(num=_NUM)


def _trace_gate(gate: Gate) -> _Gate:
  log: list[Sent] = []
  seed: Any = jax.ShapeDtypeStruct((8,), jnp.uint32)
  deal, dealt = jax.make_jaxpr(
    lambda a, b, number: protocol.deal_gate(gate, (a, b), number), return_shape=True
  )(seed, seed, np.uint32(0))
  masks = {k: jax.ShapeDtypeStruct(m.shape, m.dtype) for k, m in elementwise.masks(gate).items()}
  correlation = masks | dealt[0] | dealt[1]
  run = jax.make_jaxpr(
    lambda z, c: elementwise.run(gate, Wire(swap=True, log=log), z, c), axis_env=[(PARTY, 2)]
  )(masks["r"], correlation)
  sizes = iter(meetings.sizes_met(run))
  rounds = []
  for sent in log:
    total, count = 0, 0
    while total < sent.num_bytes and (size := next(sizes, None)) is not None:
      total, count = total + size, count + 1
    rounds.append((sent.what, count))
  return _Gate(deal, run, jax.tree.structure(dealt), rounds)


def _fold(inner: Any, resized: Callable[[Any], Any], *args: Any) -> list[Any]:
  avals = tuple(map(resized, inner.out_avals))
  return flow.folded.bind(*args, inner=inner, avals=avals, resized=resized)


def _resized(num: int) -> Callable[[Any], Any]:
  """The shape that an array of a gate traced for `_NUM` elements has for this many."""
  sizes = {_NUM: num, _NUM // 8: -(-num // 8)}
  return lambda aval: jax.core.ShapedArray([sizes.get(n, n) for n in aval.shape], aval.dtype)


def _seen_by(plan: Plan, phases: _Phases, observer: int) -> report.Report:
  """What the dealer and the other party send to the observer."""
  circuit, party, them = plan.circuit, 1 - observer, NAMES[observer]
  dealer, keys = flow.key(_DEALER), [flow.key(_BLINDS[p]) for p in (MODEL_OWNER, DATA_OWNER)]
  walk = flow.start(party, {_BLINDS[observer], *_keys_dealt(phases, observer, dealer)})

  # offline
  blinded = flow.follow(walk, phases.blinds, keys)
  num_arrays = len(phases.prepare[party].in_avals) - len(jax.tree.leaves(phases.operands))
  num_arrays -= len(jax.tree.leaves(phases.dealt))
  arrays, full = blinded[:num_arrays], blinded[num_arrays:]
  dealt = flow.follow(walk, phases.deal, [dealer, *full])
  operands = _operands(circuit, phases, observer, None)
  prepared = flow.follow(walk, phases.prepare[party], [*operands, *arrays, *dealt])
  own = circuit.linear_operands(party)
  published, ready = prepared[: len(own)], prepared[len(own) :]
  shapes = phases.prepare[party].out_avals
  sent = [
    *_dealt(circuit, phases, observer, flow.follow(walk, phases.parts[observer], dealt)),
    *[
      report.Sent(f"{NAMES[party]} to {them}: D of {circuit.operands[i].layer}", value, aval)
      for i, value, aval in zip(own, published, shapes, strict=False)
    ],
  ]

  # online
  met = len(walk.met)
  blanks = _operands(circuit, phases, observer, np.zeros((), np.uint32))
  found = flow.follow(walk, phases.run, [*ready, *blanks])
  sent += _opened(circuit, phases, party, walk.met[met:])
  last = sent[-1].round + 1
  if observer == DATA_OWNER:
    gates = [op.out for op in circuit.operations if isinstance(op, Apply)]
    shares = found[: len(found) - len(gates)]
    made = dict(zip(gates, found[len(shares) :], strict=True))
    planned = [v.number for v in circuit.outputs if isinstance(v, circuits.Value)]
    dealt_to = jax.tree.unflatten(jax.tree.structure(phases.dealt), dealt).sent
    for i, (value, aval) in enumerate(zip(shares, phases.run.out_avals, strict=False)):
      what = f"{NAMES[party]} to {them}: share of output {i}"
      is_share = i < len(planned) and _is_share(circuit, planned[i], value, made, dealt_to)
      sent.append(report.Sent(what, value, aval, last, None, "output" * is_share))
  lacks = lambda stream: not flow.held(walk, stream.key)
  return report.judge(f"what the {them} sees", sent, [(f"the {them}", lacks)])


def _keys_dealt(phases: _Phases, observer: int, dealer: Value) -> set[KeyName]:
  """The keys that are in what the dealer gives the observer, whole or in part."""
  public = [PUBLIC] * (len(phases.deal.in_avals) - 1)
  seeds = flow.follow_one(flow.start(), phases.deal, [dealer, *public], 0)
  dealt = [seeds, *[PUBLIC] * (len(phases.deal.out_avals) - 1)]
  found = flow.follow(flow.start(), phases.parts[observer], dealt)
  known = [v.known for v in found if v.known is not None and v.known.dtype == object]
  return {word.key for words in known for word in words.flat if isinstance(word, Word)}


def _is_share(
  circuit: Circuit,
  number: int,
  value: Value,
  made: dict[int, Value],
  dealt: dict[int, dict[str, Value]],
) -> bool:
  """Whether the model owner's share of a value depends on what such a share may depend on.

  Args:
    number: of the circuit's value.
    value: the label of what is sent as its share.
    made: the labels of what gates return, by number of the value.
    dealt: the labels of what the dealer sends to the data owner, by number of the operation.
  """
  makers = {op.out: (i, op) for i, op in enumerate(circuit.operations)}
  needed, operands = set[Any](), set[str]()
  queue, only_gates = [number], True
  while queue:
    place, op = makers[queue.pop()]
    match op:
      case Apply():
        needed |= depends([made[op.out]])
      case Linear() | Product():
        needed |= {pad for v in dealt[place].values() for part in v.parts for pad in part.pads}
        only_gates = False
      case Local():
        queue += op.inputs
      case Offset():
        queue.append(op.input)
    if isinstance(op, Input | Linear | Offset) and op.owner == MODEL_OWNER:
      operands.add(_secret(circuit, op.operand))
  told = depends([value])
  names = {item for item in told if isinstance(item, str)}
  rest = told - names
  return names <= operands and (rest == needed if only_gates else rest >= needed)


def _operands(
  circuit: Circuit, phases: _Phases, observer: int, blank: np.ndarray | None
) -> list[Value]:
  """Labels of all operands: the observer knows its own, and online the other party has blanks."""
  labels = []
  for i, operand in enumerate(circuit.operands):
    leaves = len(jax.tree.leaves(phases.operands[i]))
    if operand.owner == observer:
      labels += [Value((), blank)] * leaves
    else:
      labels += [secret([_secret(circuit, i)])] * leaves
  return labels


def _secret(circuit: Circuit, number: int) -> str:
  operand = circuit.operands[number]
  assert operand.owner is not None  # or `audit_secret` refuses the plan
  return f"the {NAMES[operand.owner]}'s values for {operand.layer} ({number})"


def _dealt(
  circuit: Circuit, phases: _Phases, observer: int, received: list[Value]
) -> list[report.Sent]:
  """What the dealer sends: a seed, shares to the data owner, correction words to both."""
  out = []
  paths = jax.tree_util.tree_flatten_with_path(phases.part[observer])[0]
  for (path, aval), value in zip(paths, received, strict=True):
    kind, *where = path
    what, expected = f"dealer to {NAMES[observer]}: {kind.name}", ""
    if where:
      number, name = (entry.key for entry in where)
      what = f"dealer to {NAMES[observer]}: {circuit.operations[number].layer}, {name}"
    if kind.name == "common":
      expected = "assumed"
    elif not value.parts and value.known is not None and value.known.dtype == object:
      expected = "key"  # whose streams are public
    out.append(report.Sent(what, value, aval, 0, None, expected))
  return out


def _opened(
  circuit: Circuit, phases: _Phases, party: int, met: Sequence[flow.Met]
) -> list[report.Sent]:
  """What a party opens, message by message; rounds are numbered from 1."""
  left, out, number = iter(met), list[report.Sent](), 0
  for op in circuit.operations:
    match op:
      case Open():
        rounds = [("open", 1)]
      case Apply():
        rounds = phases.gates[_alike(op.gate)].rounds
      case _:
        rounds = []
    for what, count in rounds:
      number += 1
      for m in itertools.islice(left, count):
        out.append(_opening(f"{NAMES[party]} opens {op.layer}: {what}", m, number))
  return out + [_opening(f"{NAMES[party]} opens more than planned", m, number + 1) for m in left]


def _opening(what: str, m: flow.Met, number: int) -> report.Sent:
  return report.Sent(what, m.value, m.aval, number, m.eqn)
