"""The local channel between a hospital's SuperNode and its own process: bytes over a Unix socket.

The socket lies in the site's folder, which its owner alone may enter, so no other user of the
machine can speak through it. A message is its length and its bytes; nothing else is read from it:
no pickles. Whoever connects and says nothing, or drips, holds nobody up. This module needs the
standard library only, because Flower starts its process for every message.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import NamedTuple

NAME = "channel"  # of the socket, in a site's folder
_LONGEST = 100  # bytes of a socket's address, which the operating system limits
_MOST = 64  # connections that may be in the middle of a request; one more ends the oldest
_NOTHING_YET = (
  ". Nothing has come at all: see the SuperNode's log. Flower answers 401 where its key is not "
  "registered, or where the clocks here and at the coordinator differ by 5 s: keep both by NTP"
)
_PIECE = 2**20  # bytes read at a time
_HEADER = struct.Struct("<Q")  # the length of what follows


class Channel(NamedTuple):
  """The hospital's end; see `secagg.carrier.Carrier`, whose contract it keeps."""

  hear: Callable[[int], bytes]
  say: Callable[[bytes], None]
  close: Callable[[], None]


def serve(folder: pathlib.Path, timeout: float) -> Channel:
  """Opens the hospital's end.

  Args:
    folder: of the site; or, where the SuperNode is another user's, one of mode 0750 whose group is
      that user's, and which holds nothing else.
    timeout: seconds for which to wait for a request, and for an answer to be taken.

  Raises:
    ValueError: other users can enter the folder or change it.
  """
  found = folder.stat()
  if found.st_mode & 0o027 or found.st_uid != os.getuid():
    raise ValueError(
      f"{folder} has mode {found.st_mode & 0o777:o} and belongs to user {found.st_uid}, so that "
      "others can enter; chmod it 700, or 750 for a group that only the SuperNode's user is in"
    )
  (folder / NAME).unlink(missing_ok=True)  # of a process that was killed
  listener = socket.socket(socket.AF_UNIX)
  with _address(folder) as address:
    listener.bind(address)
    # A socket belongs to the group of this process, which need not be the folder's: so whoever may
    # enter the folder may connect.
    os.chmod(address, 0o666 if found.st_mode & 0o010 else 0o600)
  listener.listen(_MOST)
  listener.setblocking(False)
  begun: dict[socket.socket, bytearray] = {}  # requests that have not come whole
  asked: list[socket.socket] = []
  unheard = [_NOTHING_YET]

  def hear(limit: int) -> bytes:
    _hang_up(asked)
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0:
      for one in connection.wait([listener, *begun], left):
        if one is listener:
          _accept(listener, begun)
        elif one in begun and (request := _take(one, begun, limit)) is not None:
          asked.append(one)
          unheard.clear()
          return request
        _shrink(begun, one, limit + _PIECE)
    raise TimeoutError(
      f"the coordinator has sent nothing for {timeout:g} seconds{''.join(unheard)}"
    )

  def say(answer: bytes) -> None:
    if asked:
      with contextlib.suppress(OSError):  # nobody waits any more: the coordinator will say so
        _send(asked[0], answer, timeout)
    _hang_up(asked)

  def close() -> None:
    _hang_up(asked)
    _hang_up(begun)
    listener.close()
    (folder / NAME).unlink(missing_ok=True)

  return Channel(hear, say, close)


def relay(folder: pathlib.Path, request: bytes, timeout: float, waits: bool = True) -> bytes:
  """Hands a request to the hospital's process and returns its answer.

  Args:
    folder: of the site.
    request: the coordinator's.
    timeout: seconds for which to wait for the answer.
    waits: also for a process that has not opened the channel yet.

  Returns:
    The answer; empty where no process was there, or it ended without one.

  Raises:
    TimeoutError: the process has not opened the channel, or has not answered in time.
  """
  end = time.monotonic() + timeout
  while True:
    try:
      with _address(folder) as address, socket.socket(socket.AF_UNIX) as one:
        one.settimeout(max(1e-3, end - time.monotonic()))
        one.connect(address)
        _send(one, request, max(1e-3, end - time.monotonic()))
        return _answer(one, end)
    except (FileNotFoundError, ConnectionRefusedError):
      if not waits:
        return b""
      if time.monotonic() > end:
        raise TimeoutError(f"no hospital's process waits at {folder / NAME}") from None
      time.sleep(0.2)
    except BlockingIOError:  # too many wait before it
      time.sleep(0.02)
      if time.monotonic() > end:
        raise TimeoutError(f"the hospital's process takes nothing in {timeout:g} seconds") from None
    except TimeoutError:
      raise TimeoutError(
        f"the hospital's process has not answered in {timeout:g} seconds"
      ) from None
    except ConnectionError:  # it has ended
      return b""


def _accept(listener: socket.socket, begun: dict[socket.socket, bytearray]) -> None:
  with contextlib.suppress(OSError):  # whoever connected has gone
    one, _ = listener.accept()
    one.setblocking(False)
    begun[one] = bytearray()
  if len(begun) > _MOST:
    oldest = next(iter(begun))
    del begun[oldest]
    oldest.close()


def _shrink(begun: dict[socket.socket, bytearray], last: object, most: int) -> None:
  """Ends the longest of the others while what has come of all requests is more than so many bytes
  together: many that do not end take no more memory than one.
  """
  while sum(map(len, begun.values())) > most:
    longest = max((one for one in begun if one is not last), key=lambda one: len(begun[one]))
    del begun[longest]
    longest.close()


def _take(one: socket.socket, begun: dict[socket.socket, bytearray], limit: int) -> bytes | None:
  """Reads what has come on a connection; the request, once it is there whole.

  Raises:
    ValueError: it is longer than the limit.
  """
  try:
    piece = one.recv(_PIECE)
  except BlockingIOError:
    return None
  except OSError:
    piece = b""
  data = begun[one]
  data += piece
  size = _HEADER.unpack_from(data)[0] if len(data) >= _HEADER.size else None
  if piece and (size is None or len(data) - _HEADER.size < size <= limit):
    return None
  del begun[one]
  if size is not None and size > limit:
    one.close()
    raise ValueError(f"malformed message: {size} bytes; the limit is {limit}")
  if size is None or len(data) - _HEADER.size != size:  # whoever asked has gone, or says too much
    one.close()
    return None
  return bytes(memoryview(data)[_HEADER.size :])


def _send(one: socket.socket, data: bytes, timeout: float) -> None:
  one.settimeout(timeout)  # of the whole, not of a piece
  one.sendall(_HEADER.pack(len(data)))
  one.sendall(data)


def _answer(one: socket.socket, end: float) -> bytes:
  data, size = bytearray(), _HEADER.size
  while len(data) < size:
    one.settimeout(max(1e-3, end - time.monotonic()))
    piece = one.recv(_PIECE)
    if not piece:
      raise ConnectionResetError("it has ended")
    data += piece
    if size == _HEADER.size and len(data) >= size:
      size += _HEADER.unpack_from(data)[0]
    if time.monotonic() > end:
      raise TimeoutError
  return bytes(memoryview(data)[_HEADER.size : size])


def _hang_up(asked: list[socket.socket] | dict[socket.socket, bytearray]) -> None:
  for one in asked:
    one.close()
  asked.clear()


@contextlib.contextmanager
def _address(folder: pathlib.Path) -> Iterator[str]:
  """The socket's address; through a descriptor of the folder where its path is too long."""
  path = str(folder / NAME)
  if len(path.encode()) <= _LONGEST:
    yield path
    return
  descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
  try:
    yield f"/proc/self/fd/{descriptor}/{NAME}"
  finally:
    os.close(descriptor)
