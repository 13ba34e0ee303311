"""Sessions of clients that share their images, with both servers: the model owner's, the helper's.

A client sends each server its share, under one random number of its request, and each says that it
has it (READY). The helper then opens a session with the model owner and names the request in it. If
the same request is there, both use up correlations and run the protocol, and each sends the client
its own shares of the outputs. `helped` has the servers.

  client -> each     REQUEST: which publication, shares of the image
  each -> client     READY
  helper -> owner    HELLO: terms; QUESTION: the number of the request
  owner -> helper    WELCOME: terms, once the request is there
  helper -> owner    PREPARE: the number of an inference, and the last receipt (`receipts`)
  owner -> helper    ACCEPTED: its receipt, it is now used up on both sides; then READY
  both               SHARES_0 and SHARES_1, in each round; then OUTPUT, empty
  each -> client     RESULT: shares of the outputs
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from primia_jax.mpc import helping
from primia_jax.mpc.helping import Helper
from primia_jax.mpc.messages import Question
from primia_jax.mpc.multiprocess import Online
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands
from primia_jax.mpc.roles import ModelOwner
from primia_jax.service import frames, sessions, sharing
from primia_jax.service.channel import Receive
from primia_jax.service.errors import PeerLate, PeerLost, Refused, SessionEnded
from primia_jax.service.folders import Reserved
from primia_jax.service.frames import Numbered, Place

REQUEST_BYTES = frames.SESSION_BYTES
_POLL = 0.05  # seconds between two looks whether a client has gone


class _Waiting(NamedTuple):
  shares: Operands
  begun: threading.Event
  answer: queue.SimpleQueue[bytes | SessionEnded]


class Desk:
  """Where the model owner keeps clients' shares until the helper asks for them.

  Args:
    timeout: seconds that one side waits for the other.
    session: seconds that the protocol may then take.
    most: requests that may be here at once.
  """

  def __init__(self, timeout: float, session: float = 3600.0, most: int = 8):
    self._timeout, self._session, self._most = timeout, session, most
    self._waiting, self._count = dict[bytes, _Waiting](), 0
    self._changed = threading.Condition()

  def submit(self, request: bytes, shares: Operands, left: threading.Event | None = None) -> bytes:
    """Waits until the request is answered; the model owner's shares of the outputs.

    Args:
      request: its number.
      shares: of the images.
      left: is set once the client has gone.

    Raises:
      SessionEnded: it is not answered.
    """
    waiting = _Waiting(shares, threading.Event(), queue.SimpleQueue())
    with self._changed:
      if request in self._waiting:
        raise Refused("a request of this number waits already; draw another")
      if self._count >= self._most:
        raise Refused(f"{self._count} requests are at work, as many as may be; ask again later")
      self._waiting[request], self._count = waiting, self._count + 1
      self._changed.notify_all()
    try:
      end = time.monotonic() + self._timeout
      while not waiting.begun.wait(_POLL) and time.monotonic() < end:
        if left is not None and left.is_set():
          break
      with self._changed:
        if self._waiting.pop(request, None) is not None:
          if left is not None and left.is_set():
            raise PeerLost("the client has gone before the helper asked for its request")
          raise PeerLate("the helper did not ask for this request in time")
      answer = waiting.answer.get(timeout=self._session)
    except queue.Empty:
      raise PeerLate("the protocol took longer than a session may") from None
    finally:
      with self._changed:
        self._count -= 1
    if isinstance(answer, SessionEnded):
      raise answer
    return answer

  @contextlib.contextmanager
  def taken(self, request: bytes) -> Iterator[tuple[Operands, Callable[[bytes], None]]]:
    """The shares of a request, once it is there, and what takes their answer.

    Raises:
      Refused: no client sent it in time.
    """
    with self._changed:
      there = lambda: request in self._waiting
      if not self._changed.wait_for(there, self._timeout):
        raise Refused("no client has sent this request to the model owner")
      waiting = self._waiting.pop(request)
    waiting.begun.set()
    try:
      yield waiting.shares, waiting.answer.put
    except SessionEnded as error:
      waiting.answer.put(type(error)(f"between helper and model owner: {error}"))
      raise
    except BaseException:
      waiting.answer.put(PeerLost("the protocol ended without an answer; ask again"))
      raise


# ---- with a client


class Asked(NamedTuple):
  """A client's request at one server.

  Attributes:
    publication: `mpc.helping.digest` of its name.
    number: drawn by the client, the same at both servers.
    shares: of the images, this server's.
  """

  publication: bytes
  number: bytes
  shares: Operands


def asked(plans: Mapping[bytes, Plan], message: bytes) -> Asked:
  """What a client's first message asks.

  Args:
    plans: of what is served, by the digest of the publication's name.
    message: as received.

  Raises:
    Refused: it is about another publication.
    Malformed: it is none.
  """
  number = frames.session_of(message) if len(message) >= frames.HEADER_BYTES else b""
  end = frames.HEADER_BYTES + sharing.PUBLICATION_BYTES
  publication = bytes(message[frames.HEADER_BYTES : end])
  plan = plans.get(publication)
  if plan is None:
    is_request = frames.kind_of(message) == frames.REQUEST
    size = max(0, len(message) - frames.HEADER_BYTES)
    frames.decode(message, Place(frames.REQUEST, number), size if is_request else 0)
    raise Refused("the card is of another publication; take the model owner's present one")
  size = sharing.PUBLICATION_BYTES + helping.share_bytes(plan)
  payload = frames.decode(message, Place(frames.REQUEST, number), size)
  return Asked(publication, number, helping.parsed(plan, payload[sharing.PUBLICATION_BYTES :]))


def serve_client(
  plans: Mapping[bytes, Plan],
  accept: Callable[[Asked], None],
  answer: Callable[[Asked, threading.Event], bytes],
  receive: Receive,
) -> Iterator[bytes]:
  """A server's session with a client; yields what it sends.

  Args:
    plans: as in `asked`.
    accept: counts a request; raises Refused to turn it away.
    answer: this server's shares of the outputs; is also told when the client has gone.
    receive: waits for the next message.
  """
  request, left = asked(plans, sessions.some(receive())), threading.Event()
  accept(request)
  yield frames.encode(Place(frames.READY, request.number))

  def watch() -> None:
    with contextlib.suppress(Refused):  # this side is stopping, and finishes what it has accepted
      try:
        receive(idle=True)
      except (PeerLost, PeerLate):
        left.set()

  threading.Thread(target=watch, daemon=True).start()
  yield frames.encode(Place(frames.RESULT, request.number, 1), answer(request, left))


# ---- between helper and model owner


def serve_helper(
  owner: ModelOwner,
  online: Online,
  publication: str,
  take: sessions.Take,
  desk: Desk,
  receive: Receive,
) -> Iterator[bytes]:
  """The model owner's session with the helper, for one request; yields what it sends.

  Raises:
    SessionEnded: whatever ends it early.
  """
  own, frame = sessions.terms(owner.plan, online, publication), Numbered()
  next_of = lambda kind, size: frame.decode(sessions.some(receive()), kind, size)
  sessions.agree(own, frames.decode_terms(next_of(frames.HELLO, frames.TERMS_BYTES)))
  with desk.taken(bytes(next_of(frames.QUESTION, REQUEST_BYTES))) as (shares, answer):
    frame.session = os.urandom(frames.SESSION_BYTES)
    yield frame.encode(frames.WELCOME, frames.encode_terms(own))
    prepared = yield from sessions.accepted(owner, take, frame, sessions.some(receive()))
    number = prepared.inference
    party = online.start(owner.answer(prepared, Question(number, {}), shares))
    payload = next(party)
    for size in online.sizes:
      yield frame.encode(frames.SHARES_0, payload)
      theirs = next_of(frames.SHARES_1, size)
      try:
        payload = party.send(theirs)
      except StopIteration as end:
        answer(helping.packed(end.value))
  yield frame.encode(frames.OUTPUT)


def assist(
  helper: Helper,
  online: Online,
  publication: str,
  reserve: Callable[[], Reserved],
  used: Callable[[str], None],
  asked: Asked,
  send: sessions.Send,
  receive: sessions.Receive,
) -> bytes:
  """The helper's session with the model owner, for one request: its shares of the outputs.

  Args:
    helper, online, publication: as in `sessions.serve`.
    reserve: gives unused correlations, once the model owner has the request, too; they are released
      if it refuses them.
    used: is told which inference is used up.
    asked: the request.
    send, receive: the carrier.

  Raises:
    SessionEnded: there is no answer.
  """
  own, frame = sessions.terms(helper.plan, online, publication), Numbered()
  send(frame.encode(frames.HELLO, frames.encode_terms(own)))
  send(frame.encode(frames.QUESTION, asked.number))
  welcome = sessions.some(receive())
  theirs = frame.decode(welcome, frames.WELCOME, frames.TERMS_BYTES)
  sessions.agree(own, frames.decode_terms(theirs))
  frame.session = frames.session_of(welcome)
  next_of = lambda kind, size: frame.decode(sessions.some(receive()), kind, size)
  correlations = sessions.drawn(reserve(), frame, send, receive)
  used(correlations.inference)
  prepared = sessions.prepared_by(helper, correlations)
  next_of(frames.READY, 0)
  party, found = online.start(helper.assist(prepared, asked.shares)), None
  payload = next(party)
  for size in online.sizes:
    send(frame.encode(frames.SHARES_1, payload))
    message = next_of(frames.SHARES_0, size)
    try:
      payload = party.send(message)
    except StopIteration as end:
      found = helping.packed(end.value)
  next_of(frames.OUTPUT, 0)
  assert found is not None, "the protocol has more messages than its plan"
  return found


def largest_message(plan: Plan, online: Online) -> int:
  """Bytes of the longest message of either session."""
  shared = sharing.PUBLICATION_BYTES + helping.share_bytes(plan)
  return frames.HEADER_BYTES + max(frames.TERMS_BYTES, shared, *online.sizes)
