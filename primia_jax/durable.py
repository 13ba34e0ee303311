"""Files that are on disk, whole, when a function returns, so that a crash loses nothing of them."""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import IO

_BLOCK = 1 << 16  # bytes read at once


def create(path: pathlib.Path, data: bytes, mode: int = 0o600) -> None:
  """Writes a new file; call `sync_folder` after the last one of a folder.

  Raises:
    FileExistsError: there is one of that name.
  """
  _write(path, data, mode, os.O_EXCL)


def replace(path: pathlib.Path, data: bytes) -> None:
  """Writes a file that only its owner can read, in place of one of that name.

  After a crash the old one or the new one is there, whole.
  """
  part = path.with_suffix(".part")
  _write(part, data, 0o600, os.O_TRUNC)
  part.replace(path)
  sync_folder(path.parent)


def append(path: pathlib.Path, line: bytes) -> None:
  """Adds a line to a file that only its owner can read, which is made where it is missing; over a
  line that a crash left unfinished.
  """
  is_new = not path.exists()
  with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
    file.seek(_after_last_line(file))
    file.write(line + b"\n")
    file.truncate()
    file.flush()
    os.fsync(file.fileno())
  if is_new:
    sync_folder(path.parent)


def _after_last_line(file: IO[bytes]) -> int:
  """The offset behind a file's last whole line, found from its end."""
  end = file.seek(0, os.SEEK_END)
  while end:
    start = max(0, end - _BLOCK)
    file.seek(start)
    if (at := file.read(end - start).rfind(b"\n")) >= 0:
      return start + at + 1
    end = start
  return 0


def sync_folder(folder: pathlib.Path) -> None:
  """Makes the names of a folder's files last: those made, renamed and removed."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _write(path: pathlib.Path, data: bytes, mode: int, flag: int) -> None:
  descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | flag, mode)
  try:
    with open(descriptor, "wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:  # a full disk, for one
    with contextlib.suppress(OSError):
      path.unlink()  # no part of a file stays behind
    raise OSError(error.errno, error.strerror or str(error), str(path)) from error
