"""The local channel between a hospital's SuperNode and its own process: bytes over a Unix socket.

The socket lies in the site's folder, which its owner alone may enter, so no other user of the
machine can speak through it. Nothing but bytes is read from it: no pickles. This module needs the
standard library only, because Flower starts its process for every message.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing import connection
from typing import NamedTuple

NAME = "channel"  # of the socket, in a site's folder
_LONGEST = 100  # bytes of a socket's address, which the operating system limits
_LARGEST = 2**31 - 1


class Channel(NamedTuple):
  """The hospital's end; see `secagg.carrier.Carrier`, whose contract it keeps."""

  hear: Callable[[int], bytes]
  say: Callable[[bytes], None]
  close: Callable[[], None]


def serve(folder: pathlib.Path, timeout: float) -> Channel:
  """Opens the hospital's end.

  Args:
    folder: of the site.
    timeout: seconds for which to wait for a request.

  Raises:
    ValueError: other users can enter the folder.
  """
  if (mode := folder.stat().st_mode) & 0o077:
    raise ValueError(f"{folder} has mode {mode & 0o777:o}, so that others can enter; chmod it 700")
  (folder / NAME).unlink(missing_ok=True)  # of a process that was killed
  listener = socket.socket(socket.AF_UNIX)
  with _address(folder) as address:
    listener.bind(address)
  listener.listen(16)
  asked: list[connection.Connection] = []

  def hear(limit: int) -> bytes:
    _hang_up(asked)
    end = time.monotonic() + timeout
    while True:
      listener.settimeout(max(1e-3, end - time.monotonic()))
      try:
        accepted, _ = listener.accept()
      except TimeoutError:
        raise TimeoutError(f"the coordinator has sent nothing for {timeout:g} seconds") from None
      one = connection.Connection(accepted.detach())
      try:
        if not one.poll(max(0.0, end - time.monotonic())):
          raise EOFError
        request = one.recv_bytes(min(limit, _LARGEST))
      except (EOFError, ConnectionError):  # whoever asked has gone
        one.close()
        continue
      except OSError as error:
        one.close()
        raise ValueError(f"malformed message: it has more than {limit} bytes ({error})") from error
      asked.append(one)
      return request

  def say(answer: bytes) -> None:
    if asked:
      with contextlib.suppress(OSError):  # nobody waits any more: the coordinator will say so
        asked[0].send_bytes(answer)
    _hang_up(asked)

  def close() -> None:
    _hang_up(asked)
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
      with _address(folder) as address, connection.Client(address, "AF_UNIX") as one:
        one.send_bytes(request)
        if not one.poll(max(0.0, end - time.monotonic())):
          raise TimeoutError(f"the hospital's process has not answered in {timeout:g} seconds")
        return one.recv_bytes(_LARGEST)
    except (FileNotFoundError, ConnectionRefusedError):
      if not waits:
        return b""
      if time.monotonic() > end:
        raise TimeoutError(f"no hospital's process waits at {folder / NAME}") from None
      time.sleep(0.2)
    except (EOFError, ConnectionError):
      return b""


def _hang_up(asked: list[connection.Connection]) -> None:
  while asked:
    asked.pop().close()


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
