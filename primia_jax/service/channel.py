"""gRPC over mutual TLS 1.3 (`ciphers`): one method, a stream of messages each way, nothing else.

Who fails in TLS, with an unknown or expired certificate, reaches no code here, so that no log has a
line of it. A certificate that a pinned one has signed passes TLS; it is refused by its fingerprint.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

from primia_jax.service import ciphers

ciphers.permit_tls_1_3_only()

try:
  import grpc
except ImportError as e:
  raise ImportError("the service needs gRPC: pip install 'primia-jax[service]'") from e

from primia_jax.service import certificates, sharing  # noqa: E402
from primia_jax.service.certificates import Identity  # noqa: E402
from primia_jax.service.errors import PeerLate, PeerLost, PutBack, Refused, SessionEnded, UsedUp  # noqa: E402

_SERVICE, _METHOD = sharing.METHOD[1:].split("/")
_END = b""  # a client's last message: to a server, a connection that breaks can look like an end
_POLL = 0.2  # seconds between two looks whether a server is stopping
_AHEAD = 2  # messages that may come before they are read
# (the clinic's name, (idle) -> the next message or None at the end) -> what the server sends
Receive = Callable[..., bytes | None]
Session = Callable[[str, Receive], Iterator[bytes]]
# (the clinic's name) -> entered for as long as its session lasts; raises Refused to turn it away
Admit = Callable[[str], contextlib.AbstractContextManager[Any]]


class Limits(NamedTuple):
  """What a connection may take.

  Attributes:
    timeout: seconds to wait for the other side's next message within an inference, and for it to
      take one.
    idle: seconds to wait for the next inference.
    sessions: at once; a server turns further ones away.
    session: seconds that one session may last.
    message: bytes of the longest message.
  """

  timeout: float = 60.0
  idle: float = 600.0
  sessions: int = 8
  session: float = 3600.0
  message: int = 2**28


@contextlib.contextmanager
def listen(
  address: str,
  identity: Identity,
  clinics: Mapping[str, bytes],
  session: Session,
  limits: Limits,
  ended: Callable[[str, SessionEnded], None] = lambda clinic, error: None,
  stopping: threading.Event | None = None,
  admit: Admit = contextlib.nullcontext,
) -> Iterator[int]:
  """A server for as long as the context lasts; gives the port.

  Args:
    address: host:port; port 0 takes any free one.
    identity: the server's.
    clinics: the certificates, PEM, that it lets in, by the clinic's name.
    session: what the server does in each session.
    limits: what they may take.
    ended: is told of each session that ended early.
    stopping: once it is set, sessions that idle are ended.
    admit: counts a session from the moment on at which its clinic is known, before any message.
  """
  known = {certificates.fingerprint(pem): name for name, pem in clinics.items()}

  def handle(messages: Iterator[bytes], context: Any) -> Iterator[bytes]:
    (peer,) = context.auth_context()["x509_pem_cert"]
    clinic = known.get(certificates.fingerprint(peer), "")
    inbox = _Inbox(messages, context.cancel, limits, _END, stopping)
    watch = _Watch(context.cancel, limits)
    try:
      if not clinic:
        raise Refused("this certificate is not known here")
      certificates.check_valid(peer)
      with admit(clinic):
        for message in session(clinic, inbox.receive):
          watch.sending_since = time.monotonic()
          yield message
          watch.sending_since = None
    except GeneratorExit:  # gRPC could not send the message
      ended(clinic, watch.late or PeerLost("the connection ended"))
      raise
    except SessionEnded as error:
      ended(clinic, watch.late or error)
      context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{type(error).__name__}: {error}")
    except Exception:  # its text might tell a secret
      ended(clinic, SessionEnded("a fault of this side"))
      context.abort(grpc.StatusCode.INTERNAL, "a fault of the other side")
    finally:
      watch.close()
      inbox.close()

  credentials = grpc.ssl_server_credentials(
    [(identity.key, identity.certificate)], b"".join(clinics.values()), require_client_auth=True
  )
  pool = futures.ThreadPoolExecutor(limits.sessions)
  server = grpc.server(pool, options=_options(limits), maximum_concurrent_rpcs=limits.sessions)
  handler = grpc.stream_stream_rpc_method_handler(handle, None, None)
  server.add_generic_rpc_handlers(
    [grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})]
  )
  port = server.add_secure_port(address, credentials)
  server.start()
  try:
    yield port
  finally:
    server.stop(grace=limits.timeout).wait()
    pool.shutdown()  # waits until each session has said how it ended


@contextlib.contextmanager
def connect(
  address: str, identity: Identity, server: bytes, limits: Limits
) -> Iterator[tuple[Callable[[bytes], None], Receive]]:
  """A connection to a server for as long as the context lasts: (send, receive).

  Args:
    address: host:port.
    identity: the clinic's.
    server: the server's certificate, PEM; no other is accepted.
    limits: what the connection may take.

  Raises:
    Refused: a certificate has expired.
    PeerLost: nobody listens there. send and receive raise SessionEnded; receive raises Refused if
      the server does not take the clinic's certificate, or is not the one expected.
  """
  for certificate in (identity.certificate, server):
    certificates.check_valid(certificate)
  host, _, port = address.rpartition(":")
  try:
    socket.create_connection((host.strip("[]"), int(port)), limits.timeout).close()
  except OSError as error:
    raise PeerLost(f"nobody listens at {address}: {error}") from error
  credentials = grpc.ssl_channel_credentials(server, identity.key, identity.certificate)
  name = ("grpc.ssl_target_name_override", certificates.name(server))
  outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
  with grpc.secure_channel(address, credentials, [*_options(limits), name]) as channel:
    method = channel.stream_stream(sharing.METHOD, None, None)
    call = method(iter(outbox.get, None), timeout=limits.session)
    inbox = _Inbox(call, call.cancel, limits)
    try:
      yield outbox.put, inbox.receive
      outbox.put(_END)
    finally:
      outbox.put(None)
      inbox.close(limits.timeout)
      call.cancel()


class _Watch:
  """Cancels a server's session that lasts too long, or whose client does not take a message.

  Attributes:
    sending_since: when the message began that is being sent; None if none is.
    late: why it cancelled the session.
  """

  def __init__(self, cancel: Callable[[], Any], limits: Limits):
    self.sending_since: float | None = None
    self.late: PeerLate | None = None
    self._cancel, self._limits, self._over = cancel, limits, threading.Event()
    threading.Thread(target=self._run, daemon=True).start()

  def close(self) -> None:
    """Watches no longer."""
    self._over.set()

  def _run(self) -> None:
    limits, start = self._limits, time.monotonic()
    while not self._over.wait(min(limits.timeout, limits.session) / 8):
      now, since = time.monotonic(), self.sending_since
      if now - start > limits.session:
        self.late = PeerLate(f"the session took longer than {limits.session} s")
      elif since is not None and now - since > limits.timeout:
        self.late = PeerLate(f"the other side took no message for {limits.timeout} s")
      if self.late:
        self._cancel()
        return


class _Inbox:
  """Waits for messages of a stream, but not for ever."""

  def __init__(
    self,
    messages: Iterator[bytes],
    cancel: Callable[[], Any],
    limits: Limits,
    last: bytes | None = None,
    stopping: threading.Event | None = None,
  ):
    self._queue: queue.Queue[bytes | SessionEnded | None] = queue.Queue(_AHEAD)
    self._cancel, self._limits, self._last = cancel, limits, last
    self._stopping = stopping
    self._closed, self._over = threading.Event(), threading.Event()
    self._end: list[SessionEnded | None] = []  # once it has come
    threading.Thread(target=self._pump, args=(messages,), daemon=True).start()

  def receive(self, idle: bool = False) -> bytes | None:
    """The next message, or None at the end of the stream; after the end, the same again.

    Raises:
      PeerLate: nothing came in time.
      PeerLost: the stream broke.
      Refused: the other side says why it ended the session.
    """
    seconds = self._limits.idle if idle else self._limits.timeout
    if not self._end:
      try:
        found = self._next(seconds, self._stopping if idle else None)
      except queue.Empty:
        self._cancel()
        found = PeerLate(f"the other side sent nothing for {seconds} s")
      if isinstance(found, bytes):
        return found
      self._end.append(found)
    if self._end[0] is not None:
      raise self._end[0]
    return None

  def _next(self, seconds: float, stopping: threading.Event | None) -> Any:
    end = time.monotonic() + seconds
    while stopping is not None and (left := end - time.monotonic()) > 0:
      with contextlib.suppress(queue.Empty):
        return self._queue.get(timeout=min(_POLL, left))
      if stopping.is_set():
        raise Refused("the server is stopping; ask again later")
    return self._queue.get(timeout=seconds if stopping is None else 0.0)

  def close(self, seconds: float = 0.0) -> None:
    """Takes no more messages, and waits for the other side to end its stream, too."""
    self._closed.set()
    self._over.wait(seconds)

  def _pump(self, messages: Iterator[bytes]) -> None:
    end: SessionEnded | None = None if self._last is None else PeerLost("the connection ended")
    begun = False
    try:
      for message in messages:
        if message == self._last:
          end = None
          break
        begun = True
        self._put(message)
    except grpc.RpcError as error:  # a server's has no code: its client has gone
      known = isinstance(error, grpc.Call)
      end = _named(error, begun) if known else PeerLost("the connection ended")
    self._over.set()
    self._put(end)

  def _put(self, message: bytes | SessionEnded | None) -> None:
    while not self._closed.is_set():
      with contextlib.suppress(queue.Full):
        return self._queue.put(message, timeout=0.2)


def _named(error: Any, begun: bool) -> SessionEnded:
  code, details = error.code(), error.details()
  if code in sharing.REFUSALS:
    kinds = {kind.__name__: kind for kind in (UsedUp, PutBack)}
    return kinds.get(details.partition(":")[0], Refused)(details)
  if code == grpc.StatusCode.DEADLINE_EXCEEDED:
    return PeerLate("the session took longer than it may")
  if code == grpc.StatusCode.UNAVAILABLE and not begun:  # somebody listens, but TLS failed
    return Refused(
      "the other side's certificate is not the pinned one, or it turned this side's away as "
      f"unknown or expired ({details})"
    )
  return PeerLost(f"the connection ended ({code.name}: {details})")


def _options(limits: Limits) -> list[tuple[str, int]]:
  """Also pings, so that a machine that has vanished is noticed between messages, too."""
  ping = max(1000, int(1000 * limits.timeout / 3))
  return [
    ("grpc.max_receive_message_length", limits.message),
    ("grpc.max_send_message_length", limits.message),
    ("grpc.keepalive_time_ms", ping),
    ("grpc.keepalive_timeout_ms", 5 * ping),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # the other side's timeout may be short
    ("grpc.enable_retries", 0),
    ("grpc.so_reuseport", 0),
  ]
