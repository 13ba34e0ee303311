"""Both servers of clients that share their images: the model owner's, and the helper's.

A client sends each server its shares, under one random number of its request. The helper then opens
a session with the model owner, names the request in it, and both run the protocol; each sends the
client its own shares of the outputs.

| file in the model owner's folder | what |
| --- | --- |
| as in `institutions` | its identity, its secret, and clients' certificates |
| helper.pem | the helper's certificate |
| helper/correlations, helper/used | from the dealer |

| file in the helper's folder | what |
| --- | --- |
| key.pem, certificate.pem, clinics/NAME.pem | its identity, and clients' certificates |
| correlations, used | from the dealer |

Both servers count a client's requests by its own certificate; a request is served once, and only
where the same number came to both.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from primia_jax.mpc import apart, helping
from primia_jax.mpc.apart import Online
from primia_jax.mpc.helping import Helper
from primia_jax.mpc.messages import Correlations, Question
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands
from primia_jax.mpc.roles import ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import certificates, channel, folders, frames, sessions, sharing
from primia_jax.service.channel import Limits, Receive
from primia_jax.service.errors import PeerLate, PeerLost, Refused, SessionEnded
from primia_jax.service.frames import Numbered, Place
from primia_jax.service.institutions import CLINICS

HELPER = "helper"
REQUEST_BYTES = frames.SESSION_BYTES


class _Waiting(NamedTuple):
  shares: Operands
  answer: queue.SimpleQueue[bytes | SessionEnded]


class Desk:
  """Where the model owner keeps clients' shares until the helper asks for them.

  Args:
    timeout: seconds that one side waits for the other.
  """

  def __init__(self, timeout: float):
    self._timeout, self._waiting = timeout, dict[bytes, _Waiting]()
    self._changed = threading.Condition()

  def submit(self, request: bytes, shares: Operands) -> bytes:
    """Waits until the request is answered; the model owner's shares of the outputs.

    Raises:
      SessionEnded: it is not answered.
    """
    waiting = _Waiting(shares, queue.SimpleQueue())
    with self._changed:
      if request in self._waiting:
        raise Refused("a request of this number waits already; draw another")
      self._waiting[request] = waiting
      self._changed.notify_all()
    try:
      answer = waiting.answer.get(timeout=self._timeout)
    except queue.Empty:
      raise PeerLate("the helper did not ask for this request in time") from None
    finally:
      with self._changed:
        self._waiting.pop(request, None)
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
        raise Refused("no client has sent this request here")
      waiting = self._waiting.pop(request)
    try:
      yield waiting.shares, waiting.answer.put
    except BaseException:
      waiting.answer.put(PeerLost("the protocol ended without an answer; ask again"))
      raise


# ---- the sessions


def serve_client(
  plan: Plan, answer: Callable[[bytes, Operands], bytes], receive: Receive
) -> Iterator[bytes]:
  """A server's session with a client; yields what it sends.

  Args:
    plan: the plan.
    answer: (number of the request, this server's shares of the images) -> of the outputs.
    receive: waits for the next message.
  """
  message = sessions.some(receive())
  request = frames.session_of(message) if len(message) >= frames.HEADER_BYTES else b""
  size = sharing.PLAN_BYTES + helping.share_bytes(plan)
  payload = frames.decode(message, Place(frames.REQUEST, request), size)
  if payload[: sharing.PLAN_BYTES] != bytes.fromhex(plan.digest):
    raise Refused("the client's card is of another plan; take the model owner's present one")
  shares = helping.parsed(plan, payload[sharing.PLAN_BYTES :])
  yield frames.encode(Place(frames.RESULT, request), answer(request, shares))


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
  frame.session = os.urandom(frames.SESSION_BYTES)
  yield frame.encode(frames.WELCOME, frames.encode_terms(own))
  correlations = take(next_of(frames.PREPARE, frames.INFERENCE_BYTES).hex())
  prepared = sessions.prepared_by(owner, correlations)
  yield frame.encode(frames.READY)
  request = bytes(next_of(frames.QUESTION, REQUEST_BYTES))
  with desk.taken(request) as (shares, answer):
    question = Question(correlations.inference, {})
    party = online.start(owner.answer(prepared, question, shares))
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
  correlations: Correlations,
  request: bytes,
  shares: Operands,
  send: sessions.Send,
  receive: Receive,
) -> bytes:
  """The helper's session with the model owner, for one request: its shares of the outputs.

  Raises:
    SessionEnded: there is no answer.
  """
  own, frame = sessions.terms(helper.plan, online, publication), Numbered()
  send(frame.encode(frames.HELLO, frames.encode_terms(own)))
  welcome = sessions.some(receive())
  theirs = frame.decode(welcome, frames.WELCOME, frames.TERMS_BYTES)
  sessions.agree(own, frames.decode_terms(theirs))
  frame.session = frames.session_of(welcome)
  next_of = lambda kind, size: frame.decode(sessions.some(receive()), kind, size)
  send(frame.encode(frames.PREPARE, bytes.fromhex(correlations.inference)))
  prepared = sessions.prepared_by(helper, correlations)
  next_of(frames.READY, 0)
  send(frame.encode(frames.QUESTION, request))
  party, found = online.start(helper.assist(prepared, shares)), None
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


# ---- the servers


@contextlib.contextmanager
def serve(
  folder: pathlib.Path,
  owner: ModelOwner,
  publication: str,
  address: str = "127.0.0.1:0",
  online: Online | None = None,
  limits: Limits = Limits(),  # noqa: B008
  ended: Callable[[str, SessionEnded], None] = lambda client, error: None,
) -> Iterator[int]:
  """The model owner's server, for clients and the helper; arguments as `institutions.serve`'s."""
  online = apart.online(owner.plan, MODEL_OWNER) if online is None else online
  desk = Desk(limits.timeout)
  certificates_of = _clients(folder) | {HELPER: (folder / f"{HELPER}.pem").read_bytes()}

  def session(client: str, receive: Receive) -> Iterator[bytes]:
    if client != HELPER:
      return serve_client(owner.plan, desk.submit, receive)
    take = lambda inference: folders.take(folder / HELPER, inference)
    return serve_helper(owner, online, publication, take, desk, receive)

  limits = limits._replace(message=_largest(owner.plan, online))
  identity = certificates.load(folder)
  with channel.listen(address, identity, certificates_of, session, limits, ended) as port:
    yield port


@contextlib.contextmanager
def help(
  folder: pathlib.Path,
  helper: Helper,
  publication: str,
  model_owner: tuple[str, bytes],
  address: str = "127.0.0.1:0",
  online: Online | None = None,
  limits: Limits = Limits(),  # noqa: B008
  ended: Callable[[str, SessionEnded], None] = lambda client, error: None,
) -> Iterator[int]:
  """The helper's server for as long as the context lasts; gives the port.

  Args:
    folder: the helper's.
    helper: the helper.
    publication: the name of the model owner's publication.
    model_owner: host:port of its server, and its certificate in PEM.
    address, online, limits, ended: as `institutions.serve`'s.
  """
  online = apart.online(helper.plan, DATA_OWNER) if online is None else online
  limits = limits._replace(message=_largest(helper.plan, online))
  identity, lock = certificates.load(folder), threading.Lock()

  def answer(request: bytes, shares: Operands) -> bytes:
    with lock:
      found = folders.unused(folder)
      if not found:
        raise Refused("the helper has no unused correlations; have the dealer deal more")
      correlations = folders.take(folder, found[0])
    with channel.connect(model_owner[0], identity, model_owner[1], limits) as (send, receive):
      return assist(helper, online, publication, correlations, request, shares, send, receive)

  session = lambda client, receive: serve_client(helper.plan, answer, receive)
  with channel.listen(address, identity, _clients(folder), session, limits, ended) as port:
    yield port


def _clients(folder: pathlib.Path) -> dict[str, bytes]:
  found = {path.stem: path.read_bytes() for path in (folder / CLINICS).glob("*.pem")}
  if HELPER in found:
    raise ValueError(f"{folder / CLINICS} has a client named {HELPER!r}; give it another name")
  return found


def _largest(plan: Plan, online: Online) -> int:
  shared = sharing.PLAN_BYTES + helping.share_bytes(plan)
  return frames.HEADER_BYTES + max(frames.TERMS_BYTES, shared, *online.sizes)
