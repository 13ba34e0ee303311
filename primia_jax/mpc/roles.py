"""The three roles of an encrypted inference: what each holds, and what each may do.

| role | holds | learns |
| --- | --- | --- |
| `ModelOwner` | its weights | nothing about the image |
| `DataOwner` | its images | the output and the plan, nothing else about the weights |
| `Dealer` | the plan; its own seeds and blinds | nothing about weights or images |

All three are semi-honest, and the dealer colludes with neither party. The dealer works before the
image exists. ChaCha20 with a uniform key is a pseudorandom function.

One inference, as messages:

  Blind          dealer -> model owner, once: the key of B
  Publication    model owner -> data owner, once: D = W - B, uniform without B
  Correlations   dealer -> each party, for one inference
  Question       data owner -> model owner, for one inference: D = x - B' for those of its values
                 that multiply shared ones; only the data owner and the dealer know B'; most plans
                 have none
  (online)       both parties open masked values; then the model owner sends its shares of the
                 outputs

Every key is drawn from the operating system where it is used. Blinds and correlations serve once:
they refuse a second use, a copy and a pickle. Roles take arrays and refuse tracers: under `vmap`,
one mask would hide many images.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import prng
from primia_jax.mpc import inference, protocol
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands, Ready
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import Array, PyTree

_NAMES = {MODEL_OWNER: "model owner", DATA_OWNER: "data owner"}


class Once:
  """A secret that serves once; the base of what is single-use.

  Attributes:
    party: whom it is for.
    publication: which publication it belongs to; public.
    inference: which inference it belongs to, or empty; public.
  """

  def __init__(self, party: int, publication: str, inference: str, secret: Any):
    self.party, self.publication, self.inference = party, publication, inference
    self._secret, self._process = [secret], os.getpid()

  def take(self, party: int) -> Any:
    """The secret, for its party, once.

    Raises:
      ValueError: it is for the other party, was used, or was made before this process was forked.
    """
    kind = type(self).__name__
    if os.getpid() != self._process:
      raise ValueError(
        f"this {kind} was made before this process was forked and may be used in the other one; "
        "the dealer must make a new one"
      )
    if party != self.party:
      raise ValueError(f"this {kind} is for the {_NAMES[self.party]}, not the {_NAMES[party]}")
    try:
      return self._secret.pop()
    except IndexError:
      raise ValueError(f"this {kind} was used; the dealer must make a new one") from None

  def block_until_ready(self) -> Once:
    """Waits until its arrays are computed, as arrays do."""
    jax.block_until_ready(self._secret)
    return self

  def __reduce_ex__(self, protocol: Any) -> Any:
    raise TypeError(f"a {type(self).__name__} serves once and cannot be copied or pickled")

  def __repr__(self) -> str:
    return f"{type(self).__name__}(for the {_NAMES[self.party]}, used={not self._secret})"


class Blind(Once):
  """The key of B, from the dealer to the model owner, for one publication."""


class Correlations(Once):
  """One party's part of the correlated randomness of one inference."""


class Prepared(Once):
  """What a party has ready for one inference before the image exists."""


class Publication(NamedTuple):
  """D = W - B for the weights of linear layers: uniform without B.

  Attributes:
    publication: which one.
    arrays: by number of the operand, ring elements.
  """

  publication: str
  arrays: Operands


class Question(NamedTuple):
  """D = x - B' for the data owner's operands of linear layers: uniform without B'.

  Attributes:
    inference: which one.
    arrays: by number of the operand, ring elements; mostly empty.
  """

  inference: str
  arrays: Operands


class Side(NamedTuple):
  """What one party brings to the online phase of one inference; it stays with this party.

  Attributes:
    party: which.
    inference: which one.
    ready: its correlations, prepared.
    operands: its own values, encoded.
  """

  party: int
  inference: str
  ready: Ready
  operands: Operands


class Dealer:
  """Deals for one plan and one publication. It sees neither weights nor images."""

  def __init__(self, plan: Plan):
    key, circuit = prng.random_key(), _checked(plan).circuit
    self.plan, self._publication = plan, os.urandom(16).hex()
    self._blind = Blind(MODEL_OWNER, self._publication, "", key)
    arrays = protocol.full(circuit, protocol.blinds(circuit, key, MODEL_OWNER))
    self._blinds = jax.block_until_ready(arrays)
    self._deal = jax.jit(functools.partial(protocol.deal, circuit))

  def blind(self) -> Blind:
    """The key of B for the model owner, which takes it once; the data owner must not have it."""
    return self._blind

  def deal(self) -> tuple[Correlations, Correlations]:
    """Fresh correlations of one inference: for the model owner, and for the data owner."""
    circuit, key, own = self.plan.circuit, prng.random_key(), prng.random_key()
    fresh = protocol.full(circuit, protocol.blinds(circuit, own, DATA_OWNER))
    dealt = self._deal(key, self._blinds | fresh)
    new = functools.partial(Correlations, publication=self._publication)
    number = os.urandom(16).hex()
    return (
      new(MODEL_OWNER, inference=number, secret=protocol.part(dealt, MODEL_OWNER)),
      new(DATA_OWNER, inference=number, secret=(protocol.part(dealt, DATA_OWNER), own)),
    )


class ModelOwner:
  """Holds the weights, encoded, and computes with them.

  Args:
    plan: the plan.
    weights: the arguments of fn whose owner is "model_owner", in order.

  Raises:
    ValueError: the arguments do not have the planned shapes, or a number does not fit.
  """

  def __init__(self, plan: Plan, *weights: PyTree):
    circuit = _checked(plan).circuit
    encode = inference.owner_encoder(plan, MODEL_OWNER)
    self.plan, self._operands = plan, encode(_leaves(plan, MODEL_OWNER, weights))
    self._own = {i: self._operands[i] for i in circuit.linear_operands(MODEL_OWNER)}
    self._publications: set[str] = set()
    self._prepare = jax.jit(functools.partial(protocol.prepare, circuit, MODEL_OWNER))
    self._complete = jax.jit(functools.partial(protocol.complete, circuit, MODEL_OWNER))

  def publish(self, blind: Blind) -> Publication:
    """D = W - B, for the data owner."""
    key = _typed(blind, Blind).take(MODEL_OWNER)
    arrays = protocol.publish(self._own, protocol.blinds(self.plan.circuit, key, MODEL_OWNER))
    self._publications.add(blind.publication)
    return Publication(blind.publication, arrays)

  def prepare(self, correlations: Correlations) -> Prepared:
    """Its part of the work that needs no image; it communicates with nobody.

    Raises:
      ValueError: the correlations are another party's, another publication's, or used.
    """
    _check_publication(_typed(correlations, Correlations), self._publications)
    ready = self._prepare(correlations.take(MODEL_OWNER), self._own, {})
    return Prepared(MODEL_OWNER, correlations.publication, correlations.inference, ready)

  def answer(self, prepared: Prepared, question: Question) -> Side:
    """Its side of the online phase.

    Raises:
      ValueError: the question belongs to another inference, or `prepared` was used.
    """
    if _typed(question, Question).inference != _typed(prepared, Prepared).inference:
      raise ValueError(
        "question and prepared belong to different inferences; pair those of one deal"
      )
    ready = prepared.take(MODEL_OWNER)
    if question.arrays:
      ready = self._complete(ready, {}, protocol.full(self.plan.circuit, question.arrays))
    return Side(MODEL_OWNER, prepared.inference, ready, self._operands)


class DataOwner:
  """Asks about its images and alone learns the answers.

  Args:
    plan: the plan.
    publication: the model owner's.
  """

  def __init__(self, plan: Plan, publication: Publication):
    circuit = _checked(plan).circuit
    self.plan, self._publication = plan, _typed(publication, Publication).publication
    self._published = jax.block_until_ready(protocol.full(circuit, publication.arrays))
    self._encode = inference.owner_encoder(plan, DATA_OWNER)
    self._prepare = jax.jit(functools.partial(protocol.prepare, circuit, DATA_OWNER))
    self._complete = jax.jit(functools.partial(protocol.complete, circuit, DATA_OWNER))

  def prepare(self, correlations: Correlations) -> Prepared:
    """Its part of the work that needs no image; raises as `ModelOwner.prepare` does."""
    _check_publication(_typed(correlations, Correlations), {self._publication})
    part, key = correlations.take(DATA_OWNER)
    secret = self._prepare(part, {}, self._published), key
    return Prepared(DATA_OWNER, correlations.publication, correlations.inference, secret)

  def ask(self, prepared: Prepared, *images: PyTree) -> tuple[Side, Question]:
    """Its side of the online phase, which it keeps, and what it sends to the model owner.

    Args:
      prepared: its own, unused.
      images: the arguments of fn whose owner is "data_owner", in order.

    Raises:
      ValueError: the arguments do not have the planned shapes, a number does not fit, or `prepared`
        is the model owner's or was used.
    """
    operands = self._encode(_leaves(self.plan, DATA_OWNER, images))
    ready, key = _typed(prepared, Prepared).take(DATA_OWNER)
    circuit, sent = self.plan.circuit, Operands()
    own = {i: operands[i] for i in circuit.linear_operands(DATA_OWNER)}
    if own:
      sent = protocol.publish(own, protocol.blinds(circuit, key, DATA_OWNER))
      ready = self._complete(ready, own, {})
    side = Side(DATA_OWNER, prepared.inference, ready, operands)
    return side, Question(prepared.inference, sent)

  def reveal(self, shares: Sequence[Array]) -> PyTree:
    """fn's outputs in float32, from both parties' shares of them [2, ...]."""
    return inference.reveal(self.plan, shares)


# ---- all roles in one process


def infer(plan: Plan, *args: PyTree) -> PyTree:
  """One inference by all three roles in this process, for research: the caller sees everything.

  Args:
    plan: the plan.
    args: fn's arguments; public ones are those of the plan.

  Returns:
    fn's outputs in float32.
  """
  leaves = jax.tree.leaves(args)
  of = lambda party: [v for by, v in zip(plan.owners, leaves, strict=True) if by == party]
  dealer, model_owner = Dealer(plan), ModelOwner(plan, of(MODEL_OWNER))
  data_owner = DataOwner(plan, model_owner.publish(dealer.blind()))
  first, second = dealer.deal()
  asked, question = data_owner.ask(data_owner.prepare(second), of(DATA_OWNER))
  answered = model_owner.answer(model_owner.prepare(first), question)
  return data_owner.reveal(online(plan)(answered, asked))


def online(plan: Plan, mesh: jax.sharding.Mesh | None = None) -> Callable[..., list[Array]]:
  """The online phase of both parties, compiled once for many inferences.

  Args:
    plan: the plan.
    mesh: with an axis "party" of two devices, one for each party; None simulates both on one
      device.

  Returns:
    (the model owner's side, the data owner's side) -> shares of the outputs, [2, ...] each.
  """
  if mesh is None:
    run = jax.jit(functools.partial(inference.simulate, plan))
    return lambda answered, asked: run(*together(answered, asked))
  run = jax.jit(functools.partial(inference.on_mesh, plan, mesh))

  def apart(answered: Side, asked: Side) -> list[Array]:
    ready, _ = together(answered, asked)
    filled = [inference.filled(plan, side.operands) for side in (answered, asked)]
    return run(ready, inference.stack(*filled))

  return apart


def together(answered: Side, asked: Side) -> tuple[Ready, Operands]:
  """Both parties' correlations and operands, as `inference.simulate` takes them.

  Raises:
    ValueError: the sides belong to different inferences or to one party.
  """
  if (answered.party, asked.party) != (MODEL_OWNER, DATA_OWNER):
    raise ValueError("the model owner's side comes first, then the data owner's")
  if answered.inference != asked.inference:
    raise ValueError("the sides belong to different inferences; pair those of one deal")
  return inference.stack(answered.ready, asked.ready), answered.operands | asked.operands


# ---- checks


def _checked(plan: Plan) -> Plan:
  if None in plan.owners:
    raise ValueError(
      'the plan has arguments of the owner "shared", which no role holds; use `secret`, or '
      "name an owner"
    )
  return plan


def _leaves(plan: Plan, party: int, arguments: Sequence[PyTree]) -> list[Array]:
  """The arrays of one party's arguments, with the planned shapes."""
  leaves = jax.tree.leaves(tuple(arguments))
  if any(isinstance(v, jax.core.Tracer) for v in leaves):
    raise TypeError(
      f"the {_NAMES[party]} takes arrays, not tracers, since a mask serves once; call it outside "
      f"of jit and vmap, or use `secret`"
    )
  planned = [a for by, a in zip(plan.owners, plan.program.avals, strict=True) if by == party]
  got, want = [np.shape(v) for v in leaves], [a.shape for a in planned]
  if got != want:
    raise ValueError(
      f"the plan has arrays of shapes {want} for the {_NAMES[party]}, not {got}; plan again or "
      f"reshape"
    )
  return leaves


def _typed(value: Any, kind: type) -> Any:
  if not isinstance(value, kind):
    raise TypeError(f"expected a {kind.__name__}, not a {type(value).__name__}")
  return value


def _check_publication(correlations: Correlations, known: set[str]) -> None:
  if correlations.publication not in known:
    raise ValueError(
      "these correlations belong to another publication; take them from the dealer whose blind it "
      "used"
    )
