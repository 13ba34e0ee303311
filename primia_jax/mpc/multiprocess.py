"""One party's online phase in a process of its own.

It is the same protocol function that `roles.online` runs for both parties at once; only what
carries an opening is different. A party is a generator: it yields each message that it sends, and
is sent the other party's. So any carrier will do (`service` has one), two parties in one process
need no threads, and opened values have the same bits as in one process.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from primia_jax.mpc import checks, encoding, inference, keeping, pricing, protocol, replay, segments
from primia_jax.mpc.checks import Crossed, Rounds
from primia_jax.mpc.circuit import CHECKED, SHARING
from primia_jax.mpc.messages import NAMES, Side
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.segments import Program
from primia_jax.mpc.sharing import MODEL_OWNER, PARTY, Wire
from primia_jax.types import Array

# Yields what this party sends (b"" where it only receives), and is sent what the other party sent
# (b"" where that one only receives). It returns the outputs' shares, [2, ...] each, at the data
# owner, and None at the model owner. Where nothing is opened to the data owner, both parties return
# their own.
Party = Generator[bytes, bytes | memoryview, list[Array] | None]


class Online(NamedTuple):
  """One party's program.

  Attributes:
    sizes: bytes of each message, the same in both directions, but for the last one, which goes from
      the model owner to the data owner only; where nothing is opened there is none.
    start: this party's side -> its part of one inference.
    opens: whether the data owner gets the outputs; else both parties keep their shares.
  """

  sizes: tuple[int, ...]
  start: Callable[[Side], Party]
  opens: bool = True


def sizes(plan: Plan) -> tuple[int, ...]:
  """Bytes of each message, as in `Online`; nothing is compiled.

  Their number is that of the rounds. It can be lower than in the plan's own table, whose openings
  follow each other: here those that do not wait for each other share a message.
  """
  return _sizes(plan, _traced(plan)[0], plan.config.client != SHARING)


def online(plan: Plan, party: int, opens: bool = True, kept: pathlib.Path | None = None) -> Online:
  """Traces, cuts and compiles one party's online phase, for many inferences.

  Where the client is "checked", the model owner's part raises `checks.Deviated` before it sends
  its shares of the outputs, unless all openings carry the dealer's tags.

  Args:
    party: MODEL_OWNER or DATA_OWNER; where the client is "sharing", the helper is the latter.
    opens: whether the data owner gets the outputs; never where the client is "sharing".
    kept: a folder in which programs are kept for the next process, unless the client is "checked".

  Raises:
    ValueError: the plan has arguments given as shares, and its client is not "sharing".
  """
  inference.check_owners(plan)
  opens = opens and plan.config.client != SHARING
  checking = None
  if plan.config.client == CHECKED:
    traced, kinds = _traced(plan)
    program = _program(plan, party, opens, traced, exports=False)
    checking = checks.compiled(plan, traced, kinds)
  elif kept is None:
    program = _program(plan, party, opens, _traced(plan)[0], exports=False)
  else:
    program = _kept(plan, party, opens, kept)
  circuit = plan.circuit
  own = [i for i, o in enumerate(circuit.operands) if o.owner in (party, None)]
  shapes = [(v.shape, v.dtype) for v in program.shapes]

  def start(side: Side) -> Party:
    if side.party != party:
      raise ValueError(f"this is the {NAMES[side.party]}'s side, not the {NAMES[party]}'s")
    leaves = jax.tree.leaves((side.ready, {i: side.operands[i] for i in own}))
    if [(v.shape, v.dtype) for v in leaves] != shapes:
      raise ValueError("this side was prepared for another plan; give all roles the same plan")
    env = dict(zip(program.reads, leaves, strict=True))
    if checking is None:
      return _ending(plan, party, opens, _rounds(plan, program, env))
    if side.tags is None:
      raise ValueError("this side has no tags; prepare it for a plan whose client is checked")
    rounds = checking(party, side.tags, _rounds(plan, program, env))
    return _ending(plan, party, opens, rounds)

  return Online(program.sizes, start, opens)


def _program(
  plan: Plan, party: int, opens: bool, traced: core.ClosedJaxpr, exports: bool
) -> Program:
  with plan.config.scope():
    parts, outputs, exported = segments.cut(traced, party, exports)
  numbers = iter(range(len(traced.in_avals)))
  given = inputs(plan)
  numbered = jax.tree.map(lambda _: next(numbers), given)
  own = [i for i, o in enumerate(plan.circuit.operands) if o.owner in (party, None)]
  of_own = lambda tree: jax.tree.leaves((tree[0], {i: tree[1][i] for i in own}))
  mine, shapes = of_own(numbered), of_own(given)
  foreign = set(jax.tree.leaves(numbered)) - set(mine)
  assert not any(foreign & set(part.reads) for part in parts), "it reads the other party's values"
  return Program(parts, outputs, mine, shapes, _sizes(plan, traced, opens), exported)


def _kept(plan: Plan, party: int, opens: bool, folder: pathlib.Path) -> Program:
  """The program that an earlier process kept, or a new one, which is then kept."""
  file = keeping.path(folder, plan, party, opens)
  with plan.config.scope():
    found = keeping.read(file)
  if found is None:
    found = _program(plan, party, opens, _traced(plan)[0], exports=True)
    keeping.write(file, found)
  return found


def inputs(plan: Plan) -> tuple[protocol.Ready, protocol.Operands]:
  """Shapes of what `protocol.run` reads."""
  blanks = lambda: {i: encoding.blank(o, plan.config) for i, o in enumerate(plan.circuit.operands)}
  with plan.config.scope():
    return pricing.ready_shapes(plan.circuit), jax.eval_shape(blanks)


def _traced(plan: Plan) -> tuple[core.ClosedJaxpr, Sequence[str]]:
  """One party's protocol, and the kind of each opening where they are checked."""
  inference.check_owners(plan)
  noting = replay.noting(plan.config.num_bits) if plan.config.client == CHECKED else None
  wire = noting or Wire(swap=True)
  run = lambda ready, operands: protocol.run(plan.circuit, wire, ready, operands)
  with plan.config.scope():
    traced = jax.make_jaxpr(run, axis_env=[(PARTY, 2)])(*inputs(plan))
  return traced, noting.kinds if noting else ()


def _sizes(plan: Plan, traced: core.ClosedJaxpr, opens: bool) -> tuple[int, ...]:
  check = checks.SIZES if plan.config.client == CHECKED else ()
  last = (segments.num_bytes(traced.out_avals),) if opens else ()
  return (*segments.sizes(traced), *check, *last)


def _rounds(plan: Plan, program: Program, env: dict[int, Any]) -> Rounds:
  """The openings, and then this party's shares of the outputs and, to be checked, what crossed."""
  keeps = plan.config.client == CHECKED
  crossed: Crossed = []
  for part in program.parts:
    with plan.config.scope():
      made = part.run(*(env[i] for i in part.reads))
    env |= zip(part.makes, made, strict=True)
    if part.sends:
      own = [env[i] for i in part.sends]
      theirs = _unpacked((yield _packed(own)), part.avals)
      env |= zip(part.receives, theirs, strict=True)
      if keeps:
        crossed.append((own, theirs))
    for i in part.drops:
      del env[i]
  return [env[i] for i in program.outputs], crossed


def _ending(plan: Plan, party: int, opens: bool, rounds: Rounds) -> Party:
  """The openings; then the model owner's shares of the outputs to the data owner, if it opens."""
  shares, _ = yield from rounds
  if not opens:
    return shares
  if party == MODEL_OWNER:
    yield _packed(shares)
    return None
  theirs = _unpacked((yield b""), shares)
  with plan.config.scope():
    return [jnp.stack([jnp.asarray(a), b]) for a, b in zip(theirs, shares, strict=True)]


def simulate(model_owner: Party, data_owner: Party) -> list[Array]:
  """Both parties in one process, message by message: the outputs' shares, [2, ...] each."""
  first, second, shares = next(model_owner), next(data_owner), None
  while True:
    try:
      following = model_owner.send(second)
    except StopIteration as end:
      following, shares = b"", end.value
    try:
      second = data_owner.send(first)
    except StopIteration as end:
      return end.value if shares is None else inference.stack(shares, end.value)
    first = following


def _packed(values: Sequence[Array]) -> bytes:
  return b"".join(np.ascontiguousarray(v).tobytes() for v in values)


def _unpacked(message: bytes | memoryview, like: Sequence[Any]) -> list[np.ndarray]:
  """Arrays of the shapes and dtypes of `like`, which nothing but the message's length can miss."""
  want = segments.num_bytes(like)
  if len(message) != want:
    raise ValueError(f"a message has {len(message)} bytes instead of {want}; end the session")
  found, start = [], 0
  for v in like:
    count = math.prod(v.shape)
    found.append(np.frombuffer(message, v.dtype, count, start).reshape(v.shape))
    start += count * v.dtype.itemsize
  return found
