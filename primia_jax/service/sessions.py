"""A session, from either side, over any carrier of messages.

The parties compare what they are about to compute before they compute anything. Then follow
inferences, one after the other: the model owner accepts or refuses; both sides take their
correlations, which are thereby used up, and prepare; the data owner asks, and the parties exchange
the rounds of `mpc.multiprocess`. What is refused costs neither side any correlations.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from primia_jax.mpc.checks import Deviated
from primia_jax.mpc.helping import Helper
from primia_jax.mpc.messages import Correlations, Prepared, Question, Side
from primia_jax.mpc.multiprocess import Online
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.roles import DataOwner, ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import frames, receipts
from primia_jax.service.errors import PeerLost, Refused, SessionEnded, UsedUp
from primia_jax.service.folders import Reserved
from primia_jax.service.frames import Numbered, Place, Terms
from primia_jax.types import Array, PyTree

Send = Callable[[bytes], None]
Receive = Callable[..., bytes | None]  # (idle) -> None: the other side has ended the session
# (number of the inference, the receipt that is shown) -> correlations and their receipt. It raises
# Refused before anything is drawn, or UsedUp.
Take = Callable[[str, bytes], tuple[Correlations, bytes]]
_PREPARE_BYTES = frames.INFERENCE_BYTES + receipts.SHOWN_BYTES


def terms(plan: Plan, online: Online, publication: str) -> Terms:
  """What a side wants a session to be about.

  Args:
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
  scores = 0 if online.opens else frames.MOST_SCORE_BYTES
  payloads = (frames.TERMS_BYTES, _PREPARE_BYTES, scores, question_bytes(plan), *online.sizes)
  return frames.HEADER_BYTES + max(payloads)


def serve(
  owner: ModelOwner, online: Online, publication: str, take: Take, receive: Receive
) -> Iterator[bytes]:
  """The model owner's side of a session; yields what it sends.

  Args:
    owner: the model owner, with its publication.
    online: its program.
    publication: which publication it serves.
    take: gives the correlations of an inference, once (`receipts.take`).
    receive: waits for the next message.

  Raises:
    SessionEnded: whatever ends it early.
  """
  frame = yield from welcomed(terms(owner.plan, online, publication), receive)
  while (message := receive(idle=True)) is not None:
    prepared = yield from accepted(owner, take, frame, message)
    if (message := receive(idle=True)) is None:
      return
    yield from answered(owner, online, frame, receive, prepared, message)


def welcomed(own: Terms, receive: Receive) -> Generator[bytes, None, Numbered]:
  """The beginning of the model owner's side: both want the same."""
  frame = Numbered()
  hello = frame.decode(some(receive()), frames.HELLO, frames.TERMS_BYTES)
  agree(own, frames.decode_terms(hello))
  frame.session = os.urandom(frames.SESSION_BYTES)
  yield frame.encode(frames.WELCOME, frames.encode_terms(own))
  return frame


def accepted(
  owner: ModelOwner, take: Take, frame: Numbered, message: bytes
) -> Generator[bytes, None, Prepared]:
  """The model owner's side from a PREPARE to READY."""
  payload = frame.decode(message, frames.PREPARE, _PREPARE_BYTES)
  number, shown = payload[: frames.INFERENCE_BYTES], payload[frames.INFERENCE_BYTES :]
  correlations, receipt = take(number.hex(), bytes(shown))
  if correlations.inference != number.hex():
    raise Refused("the correlations of this inference are filed under another number")
  yield frame.encode(frames.ACCEPTED, receipt)
  prepared = prepared_by(owner, correlations)
  yield frame.encode(frames.READY)
  return prepared


def answered(
  owner: ModelOwner,
  online: Online,
  frame: Numbered,
  receive: Receive,
  prepared: Prepared,
  message: bytes,
) -> Generator[bytes, None, list[Array]]:
  """The model owner's side from a QUESTION on; its shares of the outputs, if it does not send them.

  Raises:
    Refused: the data owner deviated.
  """
  asked = frame.decode(message, frames.QUESTION, question_bytes(owner.plan))
  question = Question(prepared.inference, _arrays(owner.plan, asked))
  party = online.start(owner.answer(prepared, question))
  payload = next(party)
  for size in online.sizes[:-1] if online.opens else online.sizes:
    yield frame.encode(frames.SHARES_0, payload)
    theirs = frame.decode(some(receive()), frames.SHARES_1, size)
    try:
      payload = party.send(theirs)
    except Deviated as error:
      raise Refused(str(error)) from error
    except StopIteration as end:
      return end.value
  yield frame.encode(frames.OUTPUT, payload)
  return []


def drawn(reserved: Reserved, frame: Numbered, send: Send, receive: Receive) -> Correlations:
  """The other side of `accepted`: the correlations, once the model owner has drawn its own.

  If the model owner refuses before it has drawn any, they are released and serve another time;
  UsedUp says that its own were used before.

  Args:
    reserved: this side's.
    frame: of this session.
    send, receive: the carrier.

  Raises:
    SessionEnded: whatever ends the session.
  """
  number = bytes.fromhex(reserved.inference)
  try:
    shown = receipts.shown(reserved.folder)
  except ValueError:  # nothing was sent
    reserved.release()
    raise
  send(frame.encode(frames.PREPARE, number + shown))
  try:
    answer = some(receive())
  except Refused as error:
    if not isinstance(error, UsedUp):
      reserved.release()
    raise
  receipt = frame.decode(answer, frames.ACCEPTED, receipts.BYTES)
  with contextlib.suppress(OSError):  # a full disk: the receipt before serves, too
    receipts.keep(reserved.folder, reserved.inference, bytes(receipt))
  return reserved.take()


class Asking:
  """The data owner's side of a session: `prepare`, then `ask`, any number of times.

  Args:
    online: its program.
    publication: which publication it asks about.
    send, receive: the carrier.

  Raises:
    SessionEnded: the sides do not agree, or the other side has gone. What ended a session once is
      raised again whenever it is used, before anything more is used up.
  """

  def __init__(
    self, owner: DataOwner, online: Online, publication: str, send: Send, receive: Receive
  ):
    self._owner, self._online, self._send, self._receive = owner, online, send, receive
    self._prepared: Prepared | None = None
    self._end: SessionEnded | None = None
    own, self._frame = terms(owner.plan, online, publication), Numbered()
    send(self._frame.encode(frames.HELLO, frames.encode_terms(own)))
    welcome = some(receive())
    other = self._frame.decode(welcome, frames.WELCOME, frames.TERMS_BYTES)
    agree(own, frames.decode_terms(other))
    self._frame.session = frames.session_of(welcome)

  @property
  def plan(self) -> Plan:
    """What is asked."""
    return self._owner.plan

  @property
  def is_prepared(self) -> bool:
    """Whether it can ask now; raises SessionEnded if the session is over."""
    if self._end is not None:
      raise type(self._end)(f"this session is over: {self._end}")
    return self._prepared is not None

  def prepare(self, reserved: Reserved) -> None:
    """Both sides' work for one inference that needs no image.

    The correlations are then used, unless the model owner refuses them (`drawn`).
    """
    if self.is_prepared:
      raise ValueError("an inference is prepared already; ask first")
    with self._remembered():
      correlations = drawn(reserved, self._frame, self._send, self._receive)
      prepared = prepared_by(self._owner, correlations)
      self._frame.decode(some(self._receive()), frames.READY, 0)
      self._prepared = prepared

  def check(self, *images: PyTree) -> None:
    """Raises ValueError, as `ask` does, for images that do not fit the plan."""
    self._owner.encoded(*images)

  def ask(self, *images: PyTree) -> PyTree:
    """fn's outputs for these images, which nobody else learns.

    Raises:
      ValueError: an image does not fit the plan, and what is prepared still serves; or `prepare`
        was not called before.
      SessionEnded: there is no answer; ask again in a new session, with new correlations.
    """
    return self._owner.reveal(self.shares(*images))

  def shares(self, *images: PyTree) -> list[Array]:
    """The shares of fn's outputs: both parties' [2, ...], or its own where nothing is opened to it.

    Raises:
      ValueError, SessionEnded: as `ask`.
    """
    if not self.is_prepared or self._prepared is None:
      raise ValueError("nothing is prepared; call prepare with unused correlations first")
    side, question = self._owner.ask(self._prepared, *images)
    self._prepared = None
    with self._remembered():
      return self._shares(side, question)

  def tell(self, kind: int, payload: bytes = b"") -> None:
    """Sends a message of another kind than an inference has."""
    self._send(self._frame.encode(kind, payload))

  def hear(self, kind: int, num_bytes: int) -> memoryview:
    """The payload of such a message, which must come next; raises SessionEnded."""
    with self._remembered():
      return self._frame.decode(some(self._receive()), kind, num_bytes)

  def _shares(self, side: Side, question: Question) -> list[Array]:
    frame, sizes = self._frame, self._online.sizes
    payload = b"".join(np.asarray(v).tobytes() for _, v in sorted(question.arrays.items()))
    self._send(frame.encode(frames.QUESTION, payload))
    party = self._online.start(side)
    payload = next(party)
    for size in sizes[:-1] if self._online.opens else sizes:
      self._send(frame.encode(frames.SHARES_1, payload))
      theirs = frame.decode(some(self._receive()), frames.SHARES_0, size)
      try:
        payload = party.send(theirs)
      except StopIteration as end:
        return end.value
    last = frame.decode(some(self._receive()), frames.OUTPUT, sizes[-1])
    try:
      party.send(last)
    except StopIteration as end:
      return end.value
    raise AssertionError("the protocol has more messages than its plan")

  @contextlib.contextmanager
  def _remembered(self) -> Iterator[None]:
    try:
      yield
    except SessionEnded as error:
      self._end = error
      raise


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
