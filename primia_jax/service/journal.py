"""What a model owner's server did, as JSON lines in a file that only grows, and the budget of
queries that is counted from it.

A line has known fields only: names, numbers and reasons of refusals. There is no field for a key, a
share, an image or an output, so none can be logged. A query is on disk before anything is computed
for it, so a crash can count one too many and never one too few.
"""

from __future__ import annotations

import collections
import datetime
import fcntl
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from primia_jax.service.errors import Refused

AUDIT = "audit.jsonl"
QUERY = "query"
_FIELDS = {
  "clinic": str, "model": str, "inference": str, "images": int, "seconds": float, "bytes": int,
  "error": str, "reason": str, "address": str, "sessions": int,
}  # fmt: skip
_LONGEST = 300  # characters of a field


class Contract(NamedTuple):
  """What each clinic may ask; 0 of `per_minute` sets no limit.

  Outputs tell something about any model, so the number of queries is part of the contract.

  Attributes:
    daily: images a day, in UTC.
    total: images in all.
    per_minute: images in any 60 seconds.
    sessions: open at once.
  """

  daily: int = 100
  total: int = 10000
  per_minute: int = 0
  sessions: int = 2


class Journal:
  """The audit log of one server, and the budgets of its clinics; made by one process at a time.

  Args:
    folder: the model owner's; the log is `AUDIT` in it.
    contract: of every clinic.
    echo: where the same lines go as a running log; None for nowhere.
    now: seconds since 1970.

  Attributes:
    listeners: told of each event and its fields, such as `monitoring`.

  Raises:
    ValueError: another process has it open, or a line before the last one is damaged.
  """

  def __init__(
    self, folder: pathlib.Path, contract: Contract = Contract(),  # noqa: B008
    echo: TextIO | None = None, now: Callable[[], float] = time.time,
  ):  # fmt: skip
    self._contract, self._echo, self._now = contract, echo, now
    self.listeners: list[Callable[[str, dict[str, Any]], None]] = []
    self._lock = threading.Lock()
    path = folder / AUDIT
    self._file: Any = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      self._file.close()
      raise ValueError(f"another server is at work in {folder}; stop it first") from None
    self._day = ""  # the latest that was seen, so that a clock set back gives nothing
    self._daily: collections.Counter[str] = collections.Counter()
    self._total: collections.Counter[str] = collections.Counter()
    self._recent: dict[str, collections.deque[tuple[float, int]]] = {}
    self._sessions: collections.Counter[str] = collections.Counter()
    self._recover(path)
    self._turn(self._today())

  def charge(self, clinic: str, model: str, inference: str, images: int) -> None:
    """Counts a query; it is on disk when this returns.

    Raises:
      Refused: the clinic's budget or rate is used up; nothing was counted.
    """
    with self._lock:
      self._turn(self._today())
      kept, minute = self._contract, self._now() - 60
      recent = self._recent.setdefault(clinic, collections.deque())
      while recent and recent[0][0] <= minute:
        recent.popleft()
      for used, most, what, cure in (
        (self._total[clinic], kept.total, "in all", "agree on more with the model owner"),
        (self._daily[clinic], kept.daily, "a day", "ask again tomorrow (UTC)"),
        (sum(n for _, n in recent), kept.per_minute or 2**62, "a minute", "ask more slowly"),
      ):
        if used + images > most:
          raise Refused(
            f"the budget of {clinic} is {most} images {what}, and {used} are used; {cure}"
          )
      self._write(QUERY, True, clinic=clinic, model=model, inference=inference, images=images)
      recent.append((self._now(), images))
      self._count(clinic, images)

  def left(self, clinic: str) -> int:
    """Images that a clinic may ask about now, by its budgets of the day and in all."""
    with self._lock:
      self._turn(self._today())
      daily = self._contract.daily - self._daily[clinic]
      return max(0, min(daily, self._contract.total - self._total[clinic]))

  def open_session(self, clinic: str) -> None:
    """Counts a session until `close_session`; raises Refused if the clinic has too many."""
    with self._lock:
      if self._sessions[clinic] >= self._contract.sessions:
        raise Refused(
          f"{clinic} has {self._sessions[clinic]} sessions open, as many as it may; end one first"
        )
      self._sessions[clinic] += 1

  def close_session(self, clinic: str) -> None:
    """The end of a session that `open_session` admitted."""
    with self._lock:
      self._sessions[clinic] -= 1

  @property
  def sessions(self) -> int:
    """Open sessions."""
    return self._sessions.total()

  def note(self, event: str, **fields: Any) -> None:
    """A line about something else than a query; fields as in `_FIELDS`."""
    with self._lock:
      self._write(event, False, **fields)

  def close(self) -> None:
    """Ends the log."""
    with self._lock:
      self._file.flush()
      os.fsync(self._file.fileno())
      self._file.close()

  def _today(self) -> str:
    return datetime.datetime.fromtimestamp(self._now(), datetime.UTC).date().isoformat()

  def _turn(self, day: str) -> None:
    if day > self._day:
      self._day = day
      self._daily.clear()

  def _count(self, clinic: str, images: int) -> None:
    self._daily[clinic] += images
    self._total[clinic] += images

  def _write(self, event: str, is_durable: bool, **fields: Any) -> None:
    for name, value in fields.items():
      if not isinstance(value, _FIELDS[name]):
        raise TypeError(f"{name} of {event} must be of type {_FIELDS[name].__name__}")
    moment = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).isoformat()
    plain = {k: v[:_LONGEST] if isinstance(v, str) else v for k, v in fields.items()}
    line = json.dumps({"time": moment, "day": self._day, "event": event} | plain)
    self._file.write(line.encode() + b"\n")
    self._file.flush()
    if is_durable:
      os.fsync(self._file.fileno())
    for listener in self.listeners:
      listener(event, plain)
    if self._echo is not None:
      print(line, file=self._echo, flush=True)

  def _recover(self, path: pathlib.Path) -> None:
    """Counts what was asked before, and drops a last line that a crash cut: nothing was computed
    for it.
    """
    whole, end = self._file.read(), 0
    for number, line in enumerate(whole.splitlines(keepends=True), start=1):
      if not line.endswith(b"\n"):
        break
      end += len(line)
      try:
        found = json.loads(line)
        if found["event"] == QUERY:
          self._turn(found["day"])
          if found["day"] == self._day:
            self._daily[found["clinic"]] += found["images"]
          self._total[found["clinic"]] += found["images"]
      except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
          f"{path}, line {number} is damaged, and the budgets are counted from it; restore the file"
        ) from error
    self._file.seek(end)
    self._file.truncate()
