"""The three roles of an encrypted inference: what each holds, and what each may do.

| role | holds | learns |
| --- | --- | --- |
| `ModelOwner` | its weights | nothing about the image |
| `DataOwner` | its images | the output and the plan, nothing else about the weights |
| `Dealer` | the plan; its own seeds and blinds | nothing about weights or images |

All three are semi-honest, and the dealer colludes with neither party. The dealer works before the
image exists. ChaCha20 with a uniform key is a pseudorandom function.

One inference, as messages:

  tag            model owner -> dealer, once: HMAC-SHA256(a secret of the model owner, plan and
                 encoded weights), so that the dealer cannot confirm a guess of the weights
  Blind          dealer -> model owner, once: the key from which, with the tag, B follows
  Publication    model owner -> data owner, once: D = W - B, uniform without B
  Correlations   dealer -> each party, for one inference
  Question       data owner -> model owner, for one inference: D = x - B' for those of its values
                 that multiply shared ones; only the data owner and the dealer know B'; most plans
                 have none
  (online)       both parties open masked values; then the model owner sends its shares of the
                 outputs

Every key is drawn from the operating system where it is used. Blinds and correlations serve once:
they refuse a second use, a copy and a pickle. B depends on the tag, so that even a key used twice
never blinds two sets of weights, or one set with two plans, alike. Each message names its
publication (the plan's digest and the tag), and a role refuses those of another. Roles take arrays
and refuse tracers: under `vmap`, one mask would hide many images. `saving` writes plans and
messages to files.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc import dealer, inference, protocol, tags
from primia_jax.mpc.circuit import CHECKED
from primia_jax.mpc.dealer import Dealer, checked
from primia_jax.mpc.messages import (
  NAMES,
  Blind,
  Correlations,
  Prepared,
  Publication,
  Question,
  Side,
)
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands, Ready
from primia_jax.mpc.publications import bound, check_plan, check_publication, tag_of
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import Array, PyTree


class ModelOwner:
  """Holds the weights, encoded, and computes with them.

  Args:
    weights: the arguments of fn whose owner is "model_owner", in order.
    secret: 32 uniform bytes that only the model owner has, to have the same tag in its next process
      (`resume`); None draws them.

  Attributes:
    plan: the plan.
    tag: for the dealer: HMAC-SHA256(the secret, the plan and the encoded weights), hexadecimal.

  Raises:
    ValueError: the arguments do not have the planned shapes, a number leaves its planned range, or
      the secret is too short.
  """

  def __init__(self, plan: Plan, *weights: PyTree, secret: bytes | None = None):
    circuit = checked(plan).circuit
    encode = inference.owner_encoder(plan, MODEL_OWNER)
    self.plan, self._operands = plan, encode(_leaves(plan, MODEL_OWNER, weights))
    self._own = {i: self._operands[i] for i in circuit.linear_operands(MODEL_OWNER)}
    self.tag = tag_of(plan, self._operands, os.urandom(32) if secret is None else secret)
    self._publications: dict[str, Operands | None] = {}
    self._prepare, self._complete = _preparing(plan, MODEL_OWNER)
    self._keep = plan.compiled("keep", functools.partial(tags.keep, circuit))

  def publish(self, blind: Blind) -> Publication:
    """D = W - B, for the data owner.

    Raises:
      ValueError: the blind is for another plan or other weights, or was used.
    """
    publication = _typed(blind, Blind).publication
    check_plan(publication, self.plan)
    if publication.split("-")[1] != self.tag:
      raise ValueError("this Blind is for other weights; the dealer needs this model owner's tag")
    key = bound(blind.take(MODEL_OWNER), publication)
    with self.plan.config.scope():
      blinds = protocol.blinds(self.plan.circuit, key, MODEL_OWNER)
      arrays = protocol.publish(self._own, blinds)
    self._publications[publication] = arrays if _checking(self.plan) else None
    return Publication(publication, arrays)

  def resume(self, published: str | Publication) -> None:
    """Serves a publication of an earlier process, which had the same weights and secret.

    Args:
      published: its name; the whole of it where the client is "checked".

    Raises:
      ValueError: it is of another plan, or of other weights, or only a name where more is needed.
    """
    publication = published if isinstance(published, str) else published.publication
    arrays = None if isinstance(published, str) else published.arrays
    check_plan(publication, self.plan)
    if _checking(self.plan) and arrays is None:
      raise ValueError(f"client={CHECKED!r} needs the whole publication to resume, not its name")
    if publication.split("-")[1] != self.tag:
      raise ValueError("this publication is of other weights, or of another secret; publish anew")
    self._publications[publication] = arrays if _checking(self.plan) else None

  def warm_up(self) -> None:
    """Compiles what `prepare` and `answer` run, so that the first inference need not wait."""
    circuit = self.plan.circuit
    zeros = lambda tree: jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), tree)
    with self.plan.config.scope():
      seed, common = jnp.zeros(8, jnp.uint32), zeros(protocol.dealt_shapes(circuit).common)
      ready = self._prepare(protocol.Part(seed, None, common), self._own, {})
      asked = circuit.linear_operands(DATA_OWNER)
      if asked:
        dtype = circuit.config.dtype
        blank = {i: np.zeros(circuit.operands[i].shape, dtype) for i in asked}
        ready = self._complete(ready, {}, protocol.full(circuit, blank))
      jax.block_until_ready(ready)

  def recomputed(self, publication: Publication, seed: bytes) -> str:
    """The number of an inference that the dealer opened to it; see `dealer.recomputed`.

    It must never be given the seed of an inference that was used, or will be: with what the parties
    opened, the image follows from it.
    """
    check_publication(publication, self.plan, self._publications)
    name, published = publication
    return dealer.recomputed(self.plan, self._own, published, name, seed)

  def prepare(self, correlations: Correlations) -> Prepared:
    """Its part of the work that needs no image; it communicates with nobody.

    Raises:
      ValueError: the correlations are another party's, another publication's, or used.
    """
    check_publication(_typed(correlations, Correlations), self.plan, self._publications)
    part, keys = correlations.take(MODEL_OWNER), None
    with self.plan.config.scope():
      ready = self._prepare(part, self._own, {})
    if _checking(self.plan):
      with jax.enable_x64(True):
        keys = self._keep(part, self._publications[correlations.publication])
    secret = ready, keys
    return Prepared(MODEL_OWNER, correlations.publication, correlations.inference, secret)

  def answer(self, prepared: Prepared, question: Question, shares: Operands | None = None) -> Side:
    """Its side of the online phase.

    Args:
      prepared: its own, unused.
      question: the other party's.
      shares: its shares of the image, by number of the operand, where the client is "sharing".

    Raises:
      ValueError: the question belongs to another inference, `prepared` was used, or the shares are
        not those of the plan.
    """
    shares = inference.checked_shares(self.plan, shares)
    if _typed(question, Question).inference != _typed(prepared, Prepared).inference:
      raise ValueError(
        "question and prepared belong to different inferences; pair those of one deal"
      )
    ready, keys = prepared.take(MODEL_OWNER)
    if question.arrays:
      with self.plan.config.scope():
        ready = self._complete(ready, {}, protocol.full(self.plan.circuit, question.arrays))
    return Side(MODEL_OWNER, prepared.inference, ready, self._operands | shares, keys)


class DataOwner:
  """Asks about its images and alone learns the answers.

  Args:
    publication: the model owner's.

  Raises:
    ValueError: the publication was made for another plan.
  """

  def __init__(self, plan: Plan, publication: Publication):
    circuit = checked(plan).circuit
    self.plan, self._publication = plan, _typed(publication, Publication).publication
    check_plan(self._publication, plan)
    with plan.config.scope():
      self._published = jax.block_until_ready(protocol.full(circuit, publication.arrays))
    self._arrays = publication.arrays if _checking(plan) else None
    self._hold = plan.compiled("hold", functools.partial(tags.hold, circuit))
    self._encode = inference.owner_encoder(plan, DATA_OWNER)
    self._prepare, self._complete = _preparing(plan, DATA_OWNER)

  def warm_up(self) -> None:
    """Compiles what `prepare` runs, so that the first inference need not wait."""
    zeros = lambda tree: jax.tree.map(lambda v: np.zeros(v.shape, v.dtype), tree)
    with self.plan.config.scope():
      shapes = protocol.dealt_shapes(self.plan.circuit)
      part = protocol.Part(jnp.zeros(8, jnp.uint32), zeros(shapes.sent), zeros(shapes.common))
      jax.block_until_ready(self._prepare(part, {}, self._published))

  def prepare(self, correlations: Correlations) -> Prepared:
    """Its part of the work that needs no image; raises as `ModelOwner.prepare` does."""
    check_publication(_typed(correlations, Correlations), self.plan, {self._publication})
    part, key = correlations.take(DATA_OWNER)
    with self.plan.config.scope():
      ready = self._prepare(part._replace(tags=None), {}, self._published)
    holding = None
    if _checking(self.plan):
      if part.tags is None:
        raise ValueError("these correlations have no tags; have the dealer deal for this plan")
      with jax.enable_x64(True):
        holding = self._hold(part._replace(tags=None), tags.Tagged(*part.tags), self._arrays)
    secret = ready, key, holding
    return Prepared(DATA_OWNER, correlations.publication, correlations.inference, secret)

  def encoded(self, *images: PyTree) -> Operands:
    """The arguments of fn whose owner is "data_owner" as ring elements; raises as `ask` does."""
    return self._encode(_leaves(self.plan, DATA_OWNER, images))

  def ask(self, prepared: Prepared, *images: PyTree) -> tuple[Side, Question]:
    """Its side of the online phase, which it keeps, and what it sends to the model owner.

    Args:
      prepared: its own, unused.
      images: the arguments of fn whose owner is "data_owner", in order.

    Raises:
      ValueError: the arguments do not have the planned shapes, a number leaves its planned range,
        or `prepared` is the model owner's or was used.
    """
    operands = self.encoded(*images)
    ready, key, holding = _typed(prepared, Prepared).take(DATA_OWNER)
    circuit, sent = self.plan.circuit, Operands()
    own = {i: operands[i] for i in circuit.linear_operands(DATA_OWNER)}
    if own:
      with self.plan.config.scope():
        sent = protocol.publish(own, protocol.blinds(circuit, key, DATA_OWNER))
        ready = self._complete(ready, own, {})
    side = Side(DATA_OWNER, prepared.inference, ready, operands, holding)
    return side, Question(prepared.inference, sent)

  def reveal(self, shares: Sequence[Array]) -> PyTree:
    """fn's outputs in float32, from both parties' shares of them [2, ...]."""
    return inference.reveal(self.plan, shares)


# ---- all roles in one process


def infer(plan: Plan, *args: PyTree) -> PyTree:
  """One inference by all three roles in this process, for research: the caller sees everything.

  Args:
    args: fn's arguments; public ones are those of the plan.

  Returns:
    fn's outputs in float32.
  """
  leaves = jax.tree.leaves(args)
  of = lambda party: [v for by, v in zip(plan.owners, leaves, strict=True) if by == party]
  model_owner = ModelOwner(plan, of(MODEL_OWNER))
  of_plan = Dealer(plan, model_owner.tag)
  data_owner = DataOwner(plan, model_owner.publish(of_plan.blind()))
  first, second = of_plan.deal()
  asked, question = data_owner.ask(data_owner.prepare(second), of(DATA_OWNER))
  answered = model_owner.answer(model_owner.prepare(first), question)
  return data_owner.reveal(online(plan)(answered, asked))


def online(plan: Plan, mesh: jax.sharding.Mesh | None = None) -> Callable[..., list[Array]]:
  """The online phase of both parties, compiled once for many inferences.

  Args:
    mesh: with an axis "party" of two devices, one for each party; None simulates both on one
      device.

  Returns:
    (the model owner's side, the data owner's side) -> shares of the outputs, [2, ...] each.
  """
  if mesh is None:
    run = plan.compiled("online", functools.partial(inference.simulate, plan))
  else:
    run = plan.compiled(("online", mesh), functools.partial(inference.on_mesh, plan, mesh))

  def both(answered: Side, asked: Side) -> list[Array]:
    with plan.config.scope():
      ready, operands = together(answered, asked)
      if mesh is not None:
        filled = [inference.filled(plan, side.operands) for side in (answered, asked)]
        operands = inference.stack(*filled)
      return run(ready, operands)

  return both


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


def _checking(plan: Plan) -> bool:
  return plan.config.client == CHECKED


def _preparing(plan: Plan, party: int) -> tuple[Callable, Callable]:
  """A party's work before the image exists, and its end, compiled."""
  prepare = functools.partial(protocol.prepare, plan.circuit, party)
  complete = functools.partial(protocol.complete, plan.circuit, party)
  return plan.compiled(("prepare", party), prepare), plan.compiled(("complete", party), complete)


def _leaves(plan: Plan, party: int, arguments: Sequence[PyTree]) -> list[Array]:
  """The arrays of one party's arguments, with the planned shapes."""
  leaves = jax.tree.leaves(tuple(arguments))
  if any(isinstance(v, jax.core.Tracer) for v in leaves):
    raise TypeError(
      f"the {NAMES[party]} takes arrays, not tracers, since a mask serves once; call it outside "
      f"of jit and vmap, or use `secret`"
    )
  planned = [a for by, a in zip(plan.owners, plan.program.avals, strict=True) if by == party]
  got, want = [np.shape(v) for v in leaves], [a.shape for a in planned]
  if got != want:
    raise ValueError(
      f"the plan has arrays of shapes {want} for the {NAMES[party]}, not {got}; plan again or "
      f"reshape"
    )
  return leaves


def _typed(value: Any, kind: type) -> Any:
  if not isinstance(value, kind):
    raise TypeError(f"expected a {kind.__name__}, not a {type(value).__name__}")
  return value
