"""The protocol between separate processes over sockets: one server, and one process for each site.

A frame is four bytes of length, little-endian, and a message's encoding; the length is checked
before the message is read. A site that does not answer within a stage's timeout, or whose
connection ends, has dropped out. Messages are signed and shares are sealed, so the network is
trusted with delivery only: an attacker who can cut connections can end a round, and one who listens
sees the sums and who takes part.

`Host` serves one round after another over connections that the sites keep, so it notices at once
that a process has ended between rounds. `begin` and `finish` are a site's part of a round, before
and after the work whose result it sends.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.secagg import keys, protocol, rounds
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving
from primia_jax.secagg.errors import Rejected, RoundFailed

_ADVERT_BYTES = 2**12  # frame limit until a site's advert is accepted; no honest advert is longer


class Report(NamedTuple):
  """The server's result of a round.

  Attributes:
    opened: the sum and the sites in it.
    rejected: every message that the server did not take: site, stage and reason.
  """

  opened: serving.Opened
  rejected: tuple[Rejected, ...]


class Joined(NamedTuple):
  """A site's result of a round.

  Attributes:
    lists: the survivors and dropouts that it has signed.
    total: the sum over the survivors, as the server tells it.
  """

  lists: msg.Survivors
  total: tuple[np.ndarray, ...]


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
  """A listening socket for `Host`; port 0 takes any free port (`getsockname` tells which)."""
  return socket.create_server((host, port))


Pending = concurrent.futures.Future[Report]


class Host:
  """A server in a thread of its own, for one round after another over the same connections.

  Its memory holds only what the server may see anyway, so one of the sites' processes can host it.
  """

  def __init__(
    self, listener: socket.socket, num_sites: int, timeout: float, identity: keys.Identity
  ):
    """Starts to listen.

    Args:
      listener: from `listen`; `close` closes it.
      num_sites: the most sites that ever take part.
      timeout: seconds that each of the five stages of a round may take.
      identity: the server's signing pair.
    """
    self._timeout, self._identity, self._hub = timeout, identity, _Hub(num_sites)
    self._round: asyncio.Task[Any] | None = None
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    asyncio.run_coroutine_threadsafe(self._hub.listen(listener), self._loop).result()

  def serve(self, setup: rounds.Setup, round: int) -> Pending:
    """Starts a round when the one before is over.

    Returns:
      A future of the report. If the round fails, it closes all connections, and the future raises
      RoundFailed as `server` does, with a note of the messages rejected.
    """

    async def one() -> Report:
      self._round = asyncio.current_task()
      try:
        return await _serve(self._hub, setup, round, self._timeout, self._identity)
      except BaseException:
        self._hub.close()
        raise

    return asyncio.run_coroutine_threadsafe(one(), self._loop)

  def close(self) -> None:
    """Ends a running round, and closes the listener and, once all data is sent, all connections.

    A second call does nothing.
    """
    if not self._thread.is_alive():
      return

    async def end() -> None:
      if self._round:
        self._round.cancel()
        await asyncio.wait([self._round])
      await self._hub.end(self._timeout)

    asyncio.run_coroutine_threadsafe(end(), self._loop).result()
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(self._timeout)
    self._loop.close()


def begin(
  connection: socket.socket, setup: rounds.Setup, round: int, number: int, identity: keys.Identity
) -> protocol.Site:
  """A site's part of a round up to its shares, before its input need be known.

  Args:
    connection: to the server. Its timeout bounds the wait for each of the server's messages; it
      must be longer than the server waits for the sites.
    setup: what all agreed on.
    round: the round.
    number: this site.
    identity: its signing pair.

  Raises:
    Refused: the server's message would make it unsafe to continue.
    ConnectionError: the server has ended the round.
    TimeoutError: the server sends nothing.
  """
  site, advert = protocol.advertise(setup, round, number, identity)
  connection.sendall(frame(advert))
  site, shares = protocol.share_keys(site, _next(connection, site))
  connection.sendall(frame(shares))
  return site


def finish(
  connection: socket.socket, site: protocol.Site, vectors: Sequence[np.ndarray], server: bytes
) -> Joined:
  """The rest of a site's part after `begin`; raises as `begin`.

  Args:
    connection: that of `begin`.
    site: from `begin`.
    vectors: its input, elements of Z_2^k.
    server: the server's pinned public key.
  """
  site, masked = protocol.masked_input(site, _next(connection, site), vectors)
  connection.sendall(frame(masked))
  site, consent = protocol.consistency(site, _next(connection, site))
  connection.sendall(frame(consent))
  site, answer = protocol.unmask(site, _next(connection, site))
  connection.sendall(frame(answer))
  assert site.lists is not None
  return Joined(site.lists, protocol.take_total(site, _next(connection, site), server))


def _next(connection: socket.socket, site: protocol.Site) -> Any:
  """The server's next message, of any type; the stages of `protocol` check the type."""
  return msg.decode(_receive(connection, rounds.message_bytes(site.setup)))


def frame(message: msg.Message) -> bytes:
  """The bytes of a message on the wire."""
  body = msg.encode(message)
  return struct.pack("<I", len(body)) + body


def _length(head: bytes, limit: int) -> int:
  (size,) = struct.unpack("<I", head)
  if size > limit:
    raise ValueError(
      f"malformed message: {size} bytes announced; no message of this round is longer than {limit}"
    )
  return size


def _receive(connection: socket.socket, limit: int) -> bytes:
  def exactly(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
      if not (some := connection.recv(min(size - len(parts), 2**20))):
        raise ConnectionError("the server has ended the round or closed this site's connection")
      parts += some
    return bytes(parts)

  return exactly(_length(exactly(4), limit))


class _Hub:
  """The server's connections, whose frames all arrive in one queue."""

  def __init__(self, num_sites: int):
    self.limit = _ADVERT_BYTES  # frame limit of the sites that take part
    self.inbox = asyncio.Queue[tuple[asyncio.StreamWriter, bytes | ValueError | None]](num_sites)
    self.open: set[asyncio.StreamWriter] = set()
    self.num_readers = 0  # running calls of `connected`
    self.writers: dict[int, asyncio.StreamWriter] = {}  # site to where its signed advert came from
    self.acceptor: asyncio.Server | None = None

  async def listen(self, listener: socket.socket) -> None:
    self.acceptor = await asyncio.start_server(self.connected, sock=listener)

  def close(self) -> None:
    if self.acceptor:
      self.acceptor.close()
    for writer in self.open:
      writer.close()

  async def end(self, timeout: float) -> None:
    """Closes everything, and waits until all data is sent and no reader runs."""
    writers = [*self.open]
    self.close()
    with contextlib.suppress(TimeoutError):
      closed = asyncio.gather(*[writer.wait_closed() for writer in writers], return_exceptions=True)
      await asyncio.wait_for(closed, timeout)
    for writer in self.open:  # those that take no data
      writer.transport.abort()
    while self.num_readers:  # at its end each puts something, and may wait until there is room
      await self.inbox.get()

  def knows(self, writer: asyncio.StreamWriter) -> bool:
    """Whether a site's signed advert has come over this connection."""
    return writer in self.writers.values()

  async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    self.open.add(writer)
    self.num_readers += 1
    if self.acceptor and not self.acceptor.is_serving():  # it came while everything was closed
      writer.close()
    try:
      while True:
        head = await reader.readexactly(4)
        size = _length(head, self.limit if self.knows(writer) else _ADVERT_BYTES)
        await self.inbox.put((writer, await reader.readexactly(size)))
    except ValueError as e:
      await self.inbox.put((writer, e))
    except (asyncio.IncompleteReadError, OSError):
      pass  # the connection is broken: the site is reported below and counts as a dropout
    await self.inbox.put((writer, None))
    self.num_readers -= 1


async def _serve(
  hub: _Hub, setup: rounds.Setup, round: int, timeout: float, identity: keys.Identity
) -> Report:
  hub.limit = rounds.message_bytes(setup)
  state, rejected = serving.start(setup, round), list[Rejected]()
  try:
    for close in serving.CLOSE:
      state = await _gather(state, hub, rejected, timeout)
      state, out = close(state)
      sites = state.received[state.stage - 1]
      await _send_all(
        [(hub.writers[u], out[u] if isinstance(out, dict) else out) for u in sites], timeout
      )
    state = await _gather(state, hub, rejected, timeout)
    state, opened = serving.open_total(state)
    total = serving.sign_total(state, opened, identity)
    await _send_all([(hub.writers[u], total) for u in state.received[3]], timeout)
    for u in set(hub.writers) - set(state.received[3]):  # perhaps survivors that missed stage 3
      hub.writers[u].close()  # this tells the site that it was lost
    return Report(opened, tuple(rejected))
  except RoundFailed as e:
    e.add_note(f"rejected messages: {[str(r) for r in rejected]}")
    raise


async def _gather(
  state: serving.Server, hub: _Hub, rejected: list[Rejected], timeout: float
) -> serving.Server:
  """Takes messages until every site that still can has spoken, or the time is up."""
  loop = asyncio.get_running_loop()
  deadline, stage, writers = loop.time() + timeout, msg.STAGES[state.stage], hub.writers
  while any(u not in writers or writers[u] in hub.open for u in serving.expected(state)):
    try:
      async with asyncio.timeout_at(deadline):  # `wait_for` can swallow a cancellation from outside
        writer, data = await hub.inbox.get()
    except TimeoutError:
      break
    if data is None:
      hub.open.discard(writer)
      writer.close()
      continue
    try:
      if isinstance(data, ValueError):
        raise data
      message = msg.decode(data)
    except ValueError as e:
      sender = next((u for u, w in writers.items() if w is writer), None)
      rejected.append(Rejected(sender, stage, "malformed", str(e)))
      writer.close()  # its reader then reports the end
      continue
    try:
      state = serving.receive(state, message)
    except Rejected as e:
      rejected.append(e.with_traceback(None))  # the traceback would keep the message in memory
      if not hub.knows(writer):
        writer.close()  # a stranger, or a late site, or one of another run, which need not wait
      continue
    if isinstance(message, msg.Advert):
      writers[message.site] = writer
  return state


async def _send_all(
  outbox: Sequence[tuple[asyncio.StreamWriter, msg.Message]], timeout: float
) -> None:
  """Sends to every site; a site that does not take it in time is missing in the next stage."""

  async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    try:
      writer.write(data)
      await asyncio.wait_for(writer.drain(), timeout)
    except OSError:
      writer.transport.abort()  # `close` would wait until everything is sent

  await asyncio.gather(*[send(writer, frame(message)) for writer, message in outbox])
