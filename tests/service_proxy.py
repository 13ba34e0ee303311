"""A network between a clinic and a model owner that does something to the bytes of a connection."""

import contextlib
import socket
import threading
import time

# What the network does, and what the sides may end with.
EXPECTED = {
  "nothing": "the right answer",
  "it flips a bit": "PeerLost; at the clinic Refused within the handshake",
  "it loses a byte": "as if it flipped a bit, or PeerLate where the rest never comes",
  "it repeats bytes": "as if it flipped a bit",
  "it breaks": "PeerLost; at the clinic Refused within the handshake",
  "it stalls": "PeerLate after `Limits.timeout`, or PeerLost where the other side was first",
  "it is slow": "the right answer",
}
PIECE = 256  # bytes of a slow network's steps


class Broken(Exception):
  """The connection ends here."""


def passed(name, first, data):
  """What a network makes of data, in which the fault comes at byte `first`."""
  at = data[first : first + 16]
  match name:
    case "it flips a bit":
      return data[:first] + bytes([at[0] ^ 4]) + data[first + 1 :]
    case "it loses a byte":
      return data[:first] + data[first + 1 :]
    case "it repeats bytes":
      return data[:first] + at + data[first:]
    case "it breaks":
      raise Broken
  return data


class Proxy:
  """Passes bytes on to a port, but for a fault at one byte of one direction.

  Attributes:
    port: where it listens.
    passed: bytes so far, from the clinic and from the model owner.
  """

  def __init__(self, port, name="nothing", direction=0, byte=0):
    self._name, self._direction, self._byte = name, direction, byte
    self.passed, self._target = [0, 0], port
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.port = self._listener.getsockname()[1]
    self._open, self._stopped = [], threading.Event()
    threading.Thread(target=self._accept, daemon=True).start()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stopped.set()
    for one in (self._listener, *self._open):
      one.close()

  def _accept(self):
    with contextlib.suppress(OSError):
      while True:
        ends = [self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._target))]
        self._open += ends
        self.passed = [0, 0]  # of the last connection
        for direction in (0, 1):
          args = ends[direction], ends[1 - direction], direction
          threading.Thread(target=self._pump, args=args, daemon=True).start()

  def _pump(self, source, sink, direction):
    with contextlib.suppress(OSError, Broken):
      while data := source.recv(PIECE if self._name == "it is slow" else 2**16):
        first = self._byte - self.passed[direction]
        self.passed[direction] += len(data)
        if direction == self._direction and 0 <= first < len(data):
          if self._name == "it stalls":
            self._stopped.wait()
          data = passed(self._name, first, data)
        if self._name == "it is slow":
          time.sleep(0.005)
        sink.sendall(data)
    for one in (source, sink):
      with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
