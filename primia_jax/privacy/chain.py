"""A file that only grows, each of its entries chained to the one before: where ledgers are kept.

A folder holds the file, a lock, and a secret key by which units are named. An entry is a line of
canonical JSON that holds the SHA-256 of the line before. Lines are on the disk before `append`
returns. Several processes may append at a time.

Who learns what: a reader of the file alone learns what was released, when, and how many units runs
share, but not whose: names are HMACs. A reader of the key, too, can test whether an image that he
has is in it. An entry that was changed, removed or moved in the middle is seen when the file is
opened. Lines missing at the end are seen by whoever kept a later hash, such as a checkpoint
(`Chain.place`). Anyone who can write the file and finds all these hashes, too, can rewrite all.
Nobody can see that a folder existed if everything that names it is gone.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from primia_jax import durable

FILE = "ledger.jsonl"
NAME_BYTES = 16  # of a unit; two of 2^40 units share a name with probability 2^-49
_KEY, _LOCK, _START = "key", "lock", "0" * 64
_CHECK = b"check"
Entry = Mapping[str, Any]


class Chain:
  """The entries of a folder.

  Attributes:
    folder, path: the folder, and the file in it.
    entries: all so far, in order; those of other processes are seen when this one appends.
    last: the hash of the last, in hexadecimal.
  """

  def __init__(self, folder: pathlib.Path, read_only: bool = False):
    """Opens a folder, or makes it in one that exists.

    Args:
      folder: of a data set.
      read_only: makes nothing and needs no key; nothing can be appended or named.

    Raises:
      ValueError: the folder cannot be written, the file or its key is missing or is another's, or
        the chain is broken.
      FileNotFoundError: read_only, and there is no such file.
    """
    self.folder, self.path = folder, folder / FILE
    self.entries: list[Entry] = []
    self.last = _START
    self._places: dict[str, int] = {}  # of entries, by their hashes
    self._end = 0  # of the last entry in the file
    if read_only:
      if not self.path.is_file():
        raise FileNotFoundError(f"{folder} holds no ledger (no {FILE}); check ledger_dir")
      self._absorb(self.path.read_bytes())
      return
    with _named(folder):
      folder.mkdir(mode=0o700, exist_ok=True)
      with _locked(folder):
        self._key = _key(folder)
        self._absorb(self.path.read_bytes())
        self.path.open("r+b").close()  # refuses a file that cannot be written before any work
    if not self.entries or self.entries[0].get("key") != self.name(_CHECK).hex():
      raise ValueError(
        f"{self.path} was begun with another key than {folder / _KEY}; restore the key from a "
        "backup: without it nobody can tell which units were charged"
      )

  def append(self, *entries: Entry) -> str:
    """Adds entries and returns the hash of the last; they are on the disk then.

    Raises:
      ValueError: the file was changed by something else than `append`, or cannot be written.
    """
    with _named(self.folder), _locked(self.folder), self.path.open("r+b") as file:
      if file.seek(0, os.SEEK_END) < self._end:
        raise ValueError(f"{self.path} has lost lines while it was open; restore it from a backup")
      file.seek(self._end)
      self._absorb(file.read())
      text, last = b"", self.last
      for entry in entries:
        line = _line(entry, last)
        text, last = text + line + b"\n", _hash(line)
      file.truncate(self._end)  # a line that a crash left unfinished
      file.seek(self._end)
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
      self._absorb(text)
    return self.last

  def place(self, digest: str) -> int | None:
    """The index of the entry with a hash; None where there is none."""
    return self._places.get(digest)

  def name(self, *parts: bytes) -> bytes:
    """The name of a unit, 16 bytes: an HMAC-SHA256 of what identifies it."""
    return _name(self._key, *parts)

  def _absorb(self, data: bytes) -> None:
    """Takes the complete lines of data. An incomplete last one is of an `append` that has not
    returned, so that nothing was released under it.
    """
    *lines, _ = data.split(b"\n")
    for line in lines:
      try:
        entry = json.loads(line)
        holds = entry["previous"] == self.last and isinstance(entry["kind"], str)
      except (ValueError, KeyError, TypeError):
        holds = False
      if not holds:
        raise ValueError(
          f"{self.path}: the chain is broken at line {len(self.entries) + 1}: this line or the one "
          "before is not what was written; restore the file from a backup. What was charged "
          "cannot be known without it"
        )
      self.last = _hash(line)
      self._places[self.last] = len(self.entries)
      self.entries.append(entry)
      self._end += len(line) + 1


def packed(names: Iterable[bytes]) -> str:
  """Names of units, or of records of several names, as sorted text for an entry."""
  return base64.b64encode(b"".join(sorted(set(names)))).decode()


def unpacked(text: str, size: int) -> list[bytes]:
  """The inverse of `packed`, for names of `size` bytes.

  Raises:
    ValueError: for another text.
  """
  try:
    data = base64.b64decode(text, validate=True)
  except binascii.Error as error:
    raise ValueError(f"these are not names of units ({error}): {text[:80]!r}") from error
  if len(data) % size:
    raise ValueError(f"these are not names of units, but {len(data)} bytes")
  return [data[i : i + size] for i in range(0, len(data), size)]


def _name(key: bytes, *parts: bytes) -> bytes:
  framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
  return hmac.digest(key, framed, "sha256")[:NAME_BYTES]


def _line(entry: Entry, previous: str) -> bytes:
  whole = {**entry, "previous": previous}
  return json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _hash(line: bytes) -> str:
  return hashlib.sha256(line).hexdigest()


def _key(folder: pathlib.Path) -> bytes:
  """The folder's key; makes key and file where there is neither."""
  path, file = folder / _KEY, folder / FILE
  if path.exists() != file.exists():
    here, gone = (path, file) if path.exists() else (file, path)
    raise ValueError(
      f"{gone} is missing and {here} is there: restore it from a backup. Only if nothing was ever "
      f"charged in {folder}, remove the folder"
    )
  if not path.exists():
    key = os.urandom(32)
    durable.create(path, key)
    durable.create(file, _line({"kind": "start", "key": _name(key, _CHECK).hex()}, _START) + b"\n")
    for one in (folder, folder.parent):
      durable.sync_folder(one)
    return key
  if path.stat().st_mode & 0o077:
    raise ValueError(
      f"{path} can be read by others, who could test which images are in the ledger; chmod 600 it"
    )
  return path.read_bytes()


@contextlib.contextmanager
def _locked(folder: pathlib.Path) -> Iterator[None]:
  with (folder / _LOCK).open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # it ends with the process, even a killed one
    yield


@contextlib.contextmanager
def _named(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"ledger_dir={folder} cannot be written ({error}); set --ledger_dir to a folder that "
      "can be, and that all runs on these data share"
    ) from error
