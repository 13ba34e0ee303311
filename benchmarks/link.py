"""A link of a given delay and bandwidth between two processes on this machine.

It passes on the bytes of TCP connections, each direction by itself: a byte leaves when the link is
free, and arrives `delay` later. What a kernel would do with a namespace and `tc netem` (which needs
the kernel's module sch_netem), at the cost of one more copy on each side.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

_PIECE = 2**14  # bytes, so that a short message does not wait for a long read


class Link:
  """Listens on `port` and passes everything on to another port of this machine.

  Args:
    target: the other port.
    delay: seconds, one way.
    bandwidth: bits per second, each way.
  """

  def __init__(self, target: int, delay: float, bandwidth: float):
    self._target, self._delay, self._bandwidth = target, delay, bandwidth
    self._listener = socket.create_server(("127.0.0.1", 0))
    self.port = self._listener.getsockname()[1]
    threading.Thread(target=self._accept, daemon=True).start()

  def __enter__(self) -> Link:
    return self

  def __exit__(self, *_: object) -> None:
    self._listener.close()

  def _accept(self) -> None:
    with contextlib.suppress(OSError):
      while True:
        ends = self._listener.accept()[0], socket.create_connection(("127.0.0.1", self._target))
        for one in ends:
          one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, sink in (ends, ends[::-1]):
          waiting: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
          threading.Thread(target=self._take, args=(source, waiting), daemon=True).start()
          threading.Thread(target=self._give, args=(sink, waiting), daemon=True).start()

  def _take(self, source: socket.socket, waiting: queue.SimpleQueue) -> None:
    free, data = 0.0, b"-"
    while data:
      data = b""
      with contextlib.suppress(OSError):
        data = source.recv(_PIECE)
      free = max(free, time.monotonic()) + 8 * len(data) / self._bandwidth
      waiting.put((free + self._delay, data))

  def _give(self, sink: socket.socket, waiting: queue.SimpleQueue) -> None:
    data = b"-"
    with contextlib.suppress(OSError):
      while data:
        due, data = waiting.get()
        time.sleep(max(0.0, due - time.monotonic()))
        sink.sendall(data)
    with contextlib.suppress(OSError):
      sink.shutdown(socket.SHUT_WR)
