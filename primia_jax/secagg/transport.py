"""The protocol between separate processes over sockets: one server, and one process for each site.

A frame is four bytes of length, little-endian, and a message's encoding; the length is checked before anything is read.
A site that does not answer within a stage's timeout, or whose connection ends, has dropped out. Messages are signed and
shares are sealed, so that the network is trusted with nothing but delivery: who can cut connections can end a round.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.secagg import keys, protocol, rounds
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving


class Report(NamedTuple):
  """How a round went.

  Attributes:
    opened: the sum, and over whom.
    rejected: every message that was not taken: site, stage and reason.
  """

  opened: serving.Opened
  rejected: tuple[serving.Rejected, ...]


def listen(host: str = "127.0.0.1", port: int = 0) -> socket.socket:
  """A listening socket for `serve`; port 0 takes any free one (`getsockname` says which)."""
  return socket.create_server((host, port))


def serve(listener: socket.socket, setup: rounds.Setup, round: int, timeout: float) -> Report:
  """The server of one round.

  Args:
    listener: of `listen`; closed at the end.
    setup: what all agreed on.
    round: the round.
    timeout: seconds that each of the five stages may take.

  Raises:
    RoundFailed: as `server`, with a note of what was rejected; the sites' connections are closed.
  """
  return asyncio.run(_serve(listener, setup, round, timeout))


def join(
  address: tuple[str, int],
  setup: rounds.Setup,
  round: int,
  number: int,
  identity: keys.Identity,
  vectors: Sequence[np.ndarray],
  timeout: float,
  entropy: keys.Entropy = os.urandom,
) -> msg.Survivors:
  """One site's part in one round.

  Args:
    address: the server's host and port.
    setup: what all agreed on.
    round: the round.
    number: this site.
    identity: its signing pair.
    vectors: its input, elements of Z_2^k.
    timeout: seconds to wait for the server at each stage; longer than the server waits for the sites.
    entropy: of all keys.

  Returns:
    The survivors and dropouts that it has signed. It sees no sum.

  Raises:
    Refused: where the server's message would make it unsafe to go on.
    ConnectionError: where the server ends the round.
    TimeoutError: where the server does not speak.
  """
  site: protocol.Site
  message: Any
  site, message = protocol.advertise(setup, round, number, identity, entropy)
  mask = functools.partial(protocol.masked_input, vectors=vectors)
  steps: tuple[Callable[..., Any], ...] = (protocol.share_keys, mask, protocol.consistency, protocol.unmask)
  with socket.create_connection(address, timeout) as connection:
    for step in steps:
      connection.sendall(frame(message))
      site, message = step(site, msg.decode(_receive(connection, rounds.message_bytes(setup))))
    connection.sendall(frame(message))
  assert site.lists is not None
  return site.lists


def frame(message: msg.Message) -> bytes:
  """A message as it goes over the wire."""
  body = msg.encode(message)
  return struct.pack("<I", len(body)) + body


def _length(head: bytes, limit: int) -> int:
  (size,) = struct.unpack("<I", head)
  if size > limit:
    raise ValueError(f"malformed message: {size} bytes announced; no message of this round is longer than {limit}")
  return size


def _receive(connection: socket.socket, limit: int) -> bytes:
  def exactly(size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
      if not (some := connection.recv(min(size - len(parts), 2**20))):
        raise ConnectionError("the server has ended the round, or closed this site's connection")
      parts += some
    return bytes(parts)

  return exactly(_length(exactly(4), limit))


class _Hub:
  """The server's connections: frames of all of them arrive in one queue."""

  def __init__(self, limit: int, num_sites: int):
    self.limit, self.inbox = limit, asyncio.Queue[tuple[asyncio.StreamWriter, bytes | ValueError | None]](num_sites)
    self.open: set[asyncio.StreamWriter] = set()

  async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    self.open.add(writer)
    try:
      while True:
        size = _length(await reader.readexactly(4), self.limit)
        await self.inbox.put((writer, await reader.readexactly(size)))
    except ValueError as e:
      await self.inbox.put((writer, e))
    except (asyncio.IncompleteReadError, ConnectionError):
      pass  # whoever breaks off is told of below, and falls silent: a dropout
    await self.inbox.put((writer, None))


async def _serve(listener: socket.socket, setup: rounds.Setup, round: int, timeout: float) -> Report:
  hub = _Hub(rounds.message_bytes(setup), len(setup.identities))
  state, rejected = serving.start(setup, round), list[serving.Rejected]()
  writers: dict[int, asyncio.StreamWriter] = {}
  acceptor = await asyncio.start_server(hub.connected, sock=listener)
  try:
    for close in serving.CLOSE:
      state = await _gather(state, hub, writers, rejected, timeout)
      state, out = close(state)
      sites = state.received[state.stage - 1]
      await _send_all([(writers[u], out[u] if isinstance(out, dict) else out) for u in sites], timeout)
    state = await _gather(state, hub, writers, rejected, timeout)
    return Report(serving.open_total(state)[1], tuple(rejected))
  except serving.RoundFailed as e:
    e.add_note(f"rejected messages: {[str(r) for r in rejected]}")
    raise
  finally:
    acceptor.close()
    for writer in hub.open:
      writer.close()


async def _gather(
  state: serving.Server,
  hub: _Hub,
  writers: dict[int, asyncio.StreamWriter],
  rejected: list[serving.Rejected],
  timeout: float,
) -> serving.Server:
  """Takes messages until all have spoken that still can, or time is up."""
  loop = asyncio.get_running_loop()
  deadline, stage = loop.time() + timeout, msg.STAGES[state.stage]
  while any(u not in writers or writers[u] in hub.open for u in serving.expected(state)):
    try:
      writer, data = await asyncio.wait_for(hub.inbox.get(), max(0.0, deadline - loop.time()))
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
      rejected.append(serving.Rejected(sender, stage, "malformed", str(e)))
      writer.close()  # its reader then reports the end
      continue
    try:
      state = serving.receive(state, message)
    except serving.Rejected as e:
      rejected.append(e)
      continue
    if isinstance(message, msg.Advert):
      writers[message.site] = writer
  return state


async def _send_all(outbox: Sequence[tuple[asyncio.StreamWriter, msg.Message]], timeout: float) -> None:
  """Sends to every site; who does not take it in time will be missed in the next stage."""

  async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    try:
      writer.write(data)
      await asyncio.wait_for(writer.drain(), timeout)
    except (ConnectionError, TimeoutError):
      writer.close()

  await asyncio.gather(*[send(writer, frame(message)) for writer, message in outbox])
