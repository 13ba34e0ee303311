"""A hospital's log: what its program prints, each line with its time, in the hospital's own folder.

log    the newest lines, of all starts
log.1  those before; at most a mebibyte in each
"""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import sys
import threading
from typing import Any, TextIO

from absl import logging

from . import site_folders

FILE, OLDER = "log", "log.1"
_MOST = 2**20  # bytes


class _Told:
  """A stream that also writes each of its lines down."""

  def __init__(self, shown: TextIO, path: pathlib.Path, lock: threading.Lock):
    self._shown, self._path, self._lock, self._begun = shown, path, lock, ""

  def write(self, text: str) -> int:
    self._shown.write(text)
    with self._lock:
      *lines, self._begun = (self._begun + text).split("\n")
      for line in lines:
        note(self._path, line)
    return len(text)

  def __getattr__(self, name: str) -> Any:
    return getattr(self._shown, name)


def note(path: pathlib.Path, line: str) -> None:
  """Adds a line with the time. A disk that is full ends no run: the line was shown, too."""
  line = line.rpartition("\r")[2].rstrip()  # of a bar, as it stands at the end
  if not line:
    return
  at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  data = f"{at} {line}\n".encode(errors="backslashreplace")
  with contextlib.suppress(OSError):
    if path.exists() and path.stat().st_size + len(data) > _MOST:
      path.replace(path.with_name(OLDER))
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    with open(opened, "wb") as file:
      file.write(data)


def keep(run_dir: str) -> None:
  """From now on, writes down what this process prints, if the folder is one of `primia-site` and
  closed to other users; another one is refused later.
  """
  folder = pathlib.Path(run_dir).expanduser()
  is_site = bool(run_dir) and (folder / site_folders.SETTINGS).is_file()
  if not is_site or folder.stat().st_mode & 0o077:
    return
  path, lock = folder / FILE, threading.Lock()
  note(path, f"started: {' '.join(sys.argv)}")
  sys.stdout, sys.stderr = (_Told(one, path, lock) for one in (sys.stdout, sys.stderr))
  logging.get_absl_handler().python_handler.stream = sys.stderr
