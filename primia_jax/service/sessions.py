"""A session, from either side, over any carrier of messages.

The parties compare what they are about to compute before they compute anything. Then follow
inferences, one after the other: the correlations are taken, and thereby used up, both sides
prepare, the data owner asks, and the parties exchange the rounds of `mpc.apart`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from primia_jax.mpc.apart import Online
from primia_jax.mpc.checks import Deviated
from primia_jax.mpc.helping import Helper
from primia_jax.mpc.messages import Correlations, Prepared, Question
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.roles import DataOwner, ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import frames
from primia_jax.service.errors import PeerLost, Refused, SessionEnded
from primia_jax.service.frames import Place, Terms
from primia_jax.types import PyTree

Send = Callable[[bytes], None]
Receive = Callable[..., bytes | None]  # (idle) -> None: the other side has ended the session
Take = Callable[[str], Correlations]  # by number of the inference; raises Refused


def terms(plan: Plan, online: Online, publication: str) -> Terms:
  """What a side wants a session to be about.

  Args:
    plan: the plan.
    online: its program.
    publication: its name.
  """
  _, tag, number = publication.split("-")
  sizes = hashlib.sha256(" ".join(map(str, online.sizes)).encode()).digest()
  from_hex = bytes.fromhex
  return Terms(plan.config.num_bits, from_hex(plan.digest), sizes, from_hex(tag), from_hex(number))


def agree(own: Terms, other: Terms) -> None:
  """Raises Refused, with the reason, unless both sides want the same."""
  reasons = {
    "num_bits": f"the rings differ: {own.num_bits} and {other.num_bits} bits",
    "plan": "the plans differ; give both sides the same plan, and the same versions of the code",
    "rounds": "the messages' sizes differ; use the same versions of the code on both sides",
    "tag": "the publication is of other weights; take the model owner's present one",
    "number": "the publication is of another dealing; take the model owner's present one",
  }
  for name, reason in reasons.items():
    if getattr(own, name) != getattr(other, name):
      raise Refused(reason)


def asked(hello: bytes | None) -> Terms | None:
  """What a first message is about, or None if it is none; `serve` says why."""
  try:
    place = Place(frames.HELLO, frames.NO_SESSION)
    return frames.decode_terms(frames.decode(some(hello), place, frames.TERMS_BYTES))
  except SessionEnded:
    return None


def largest_message(plan: Plan, online: Online) -> int:
  """Bytes of the longest message of a session."""
  payloads = (frames.TERMS_BYTES, question_bytes(plan), *online.sizes)
  return frames.HEADER_BYTES + max(payloads)


def serve(
  owner: ModelOwner, online: Online, publication: str, take: Take, receive: Receive
) -> Iterator[bytes]:
  """The model owner's side of a session; yields what it sends.

  Args:
    owner: the model owner, with its publication.
    online: its program.
    publication: which publication it serves.
    take: gives the correlations of an inference, once.
    receive: waits for the next message.

  Raises:
    SessionEnded: whatever ends it early.
  """
  own = terms(owner.plan, online, publication)
  hello = frames.decode(some(receive()), Place(frames.HELLO, frames.NO_SESSION), frames.TERMS_BYTES)
  agree(own, frames.decode_terms(hello))
  session = os.urandom(frames.SESSION_BYTES)
  yield frames.encode(Place(frames.WELCOME, session), frames.encode_terms(own))
  while (message := receive(idle=True)) is not None:
    number = frames.decode(message, Place(frames.PREPARE, session), frames.INFERENCE_BYTES)
    correlations = take(number.hex())
    if correlations.inference != number.hex():
      raise Refused("the correlations of this inference are filed under another number")
    prepared = prepared_by(owner, correlations)
    yield frames.encode(Place(frames.READY, session))
    if (message := receive(idle=True)) is None:
      return
    place = Place(frames.QUESTION, session)
    asked = frames.decode(message, place, question_bytes(owner.plan))
    question = Question(correlations.inference, _arrays(owner.plan, asked))
    party = online.start(owner.answer(prepared, question))
    payload = next(party)
    for i, size in enumerate(online.sizes[:-1]):
      place = Place(frames.ROUND, session, i)
      yield frames.encode(place, payload)
      theirs = frames.decode(some(receive()), place, size)
      try:
        payload = party.send(theirs)
      except Deviated as error:
        raise Refused(str(error)) from error
    yield frames.encode(Place(frames.OUTPUT, session), payload)


class Asking:
  """The data owner's side of a session: `prepare`, then `ask`, any number of times.

  Args:
    owner: the data owner.
    online: its program.
    publication: which publication it asks about.
    send, receive: the carrier.

  Raises:
    SessionEnded: the sides do not agree, or the other side has gone.
  """

  def __init__(
    self, owner: DataOwner, online: Online, publication: str, send: Send, receive: Receive
  ):
    self._owner, self._online, self._send, self._receive = owner, online, send, receive
    self._prepared: Prepared | None = None
    own = terms(owner.plan, online, publication)
    send(frames.encode(Place(frames.HELLO, frames.NO_SESSION), frames.encode_terms(own)))
    welcome = some(receive())
    place = Place(frames.WELCOME, frames.NO_SESSION)
    agree(own, frames.decode_terms(frames.decode(welcome, place, frames.TERMS_BYTES)))
    self._session = frames.session_of(welcome)

  def prepare(self, correlations: Correlations) -> None:
    """Both sides' work for one inference that needs no image. The correlations are then used."""
    number = bytes.fromhex(correlations.inference)
    self._send(frames.encode(Place(frames.PREPARE, self._session), number))
    self._prepared = prepared_by(self._owner, correlations)
    frames.decode(some(self._receive()), Place(frames.READY, self._session), 0)

  def ask(self, *images: PyTree) -> PyTree:
    """fn's outputs for these images, which nobody else learns.

    Raises:
      ValueError: an image does not fit the plan, or `prepare` was not called before.
      SessionEnded: there is no answer; ask again in a new session, with new correlations.
    """
    if self._prepared is None:
      raise ValueError("nothing is prepared; call prepare with unused correlations first")
    prepared, self._prepared = self._prepared, None
    side, question = self._owner.ask(prepared, *images)
    payload = b"".join(np.asarray(v).tobytes() for _, v in sorted(question.arrays.items()))
    self._send(frames.encode(Place(frames.QUESTION, self._session), payload))
    party = self._online.start(side)
    payload = next(party)
    for i, size in enumerate(self._online.sizes[:-1]):
      place = Place(frames.ROUND, self._session, i)
      self._send(frames.encode(place, payload))
      payload = party.send(frames.decode(some(self._receive()), place, size))
    place = Place(frames.OUTPUT, self._session)
    last = frames.decode(some(self._receive()), place, self._online.sizes[-1])
    try:
      party.send(last)
    except StopIteration as end:
      return self._owner.reveal(end.value)
    raise AssertionError("the protocol has more messages than its plan")


def question_bytes(plan: Plan) -> int:
  """Bytes of a QUESTION's payload."""
  return sum(math.prod(shape) for _, shape in _asked(plan)) * _dtype(plan).itemsize


def _asked(plan: Plan) -> list[tuple[int, Sequence[int]]]:
  operands = plan.circuit.operands
  return [(i, operands[i].shape) for i in sorted(plan.circuit.linear_operands(DATA_OWNER))]


def _dtype(plan: Plan) -> np.dtype:
  """Of ring elements, in a process that has 64-bit integers only where a plan asks for them."""
  with plan.config.scope():
    return np.dtype(plan.config.dtype)


def _arrays(plan: Plan, payload: memoryview) -> dict[int, Any]:
  dtype, found, start = _dtype(plan), {}, 0
  for i, shape in _asked(plan):
    count = math.prod(shape)
    found[i] = np.frombuffer(payload, dtype, count, start).reshape(shape)
    start += count * dtype.itemsize
  return found


def prepared_by(owner: ModelOwner | DataOwner | Helper, correlations: Correlations) -> Prepared:
  """What a party has ready once its work is done; raises Refused if it cannot."""
  try:
    prepared = owner.prepare(correlations)
    prepared.block_until_ready()
  except ValueError as error:
    raise Refused(str(error)) from error
  return prepared


def some(message: bytes | None) -> bytes:
  """A message that must not be missing."""
  if message is None:
    raise PeerLost("the other side ended the session in the middle of an inference")
  return message
