"""What a model owner's server did, as JSON lines in a file that only grows, and the budget of
queries that is counted from it.

A line has known fields only: names, numbers and reasons of refusals. There is no field for a key, a
share, an image or an output, so none can be logged. A query is on disk before anything is computed
for it, so a crash can count one too many and never one too few. Where the disk takes no line, no
query is answered. What a clinic does costs the log a bounded number of lines a minute.

A log that is put back to an earlier state has forgotten the queries since then.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TextIO

from primia_jax.service.errors import Refused, SessionEnded

AUDIT = "audit.jsonl"
QUERY, REFUSAL = "query", "refusal"
_REFUSALS = 20  # of a clinic in a minute have a line each; the others are counted
_FIELDS = {
  "clinic": str, "model": str, "inference": str, "images": int, "seconds": float, "bytes": int,
  "error": str, "reason": str, "address": str, "sessions": int,
}  # fmt: skip
_LONGEST = 300  # characters of a field


class Contract(NamedTuple):
  """What each clinic may ask; 0 of `per_minute` or `attempts` sets no limit.

  Outputs tell something about any model, so the number of queries is part of the contract.

  Attributes:
    daily: images a day, in UTC.
    total: images in all.
    per_minute: images in any 60 seconds.
    sessions: open at once.
    attempts: to open a session in any 60 seconds, those that were refused included.
  """

  daily: int = 100
  total: int = 10000
  per_minute: int = 0
  sessions: int = 2
  attempts: int = 600


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
    self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # unbuffered: a line is all or none
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(self._file)
      raise ValueError(f"another server is at work in {folder}; stop it first") from None
    self._day = ""  # the latest that was seen, so that a clock set back gives nothing
    self._daily: collections.Counter[str] = collections.Counter()
    self._total: collections.Counter[str] = collections.Counter()
    self._recent: dict[str, collections.deque[tuple[float, int]]] = {}
    self._sessions: collections.Counter[str] = collections.Counter()
    self._attempts: dict[str, collections.deque[float]] = {}
    self._refusals: dict[str, tuple[float, int]] = {}  # since when, and how many
    self._end = self._recover(path)  # of the last whole line
    self._turn(self._today())

  def charge(self, clinic: str, model: str, inference: str, images: int) -> None:
    """Counts a query; it is on disk when this returns.

    Raises:
      Refused: the clinic's budget or rate is used up, or the disk is full; nothing was counted.
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
      try:
        self._write(QUERY, True, clinic=clinic, model=model, inference=inference, images=images)
      except OSError as error:
        raise Refused("the server's disk takes no more queries; ask again later") from error
      recent.append((self._now(), images))
      self._count(clinic, images)

  def left(self, clinic: str) -> int:
    """Images that a clinic may ask about now, by its budgets of the day and in all."""
    with self._lock:
      self._turn(self._today())
      daily = self._contract.daily - self._daily[clinic]
      return max(0, min(daily, self._contract.total - self._total[clinic]))

  @contextlib.contextmanager
  def session(self, clinic: str) -> Iterator[None]:
    """Counts a session for as long as the context lasts.

    Raises:
      Refused: the clinic has too many, or has tried too often within a minute.
    """
    with self._lock:
      most, minute = self._contract.attempts or 2**62, self._now() - 60
      tries = self._attempts.setdefault(clinic, collections.deque())
      while tries and tries[0] <= minute:
        tries.popleft()
      if len(tries) >= most:
        raise Refused(
          f"{clinic} has tried to open {most} sessions within a minute; ask more slowly"
        )
      tries.append(self._now())
      if self._sessions[clinic] >= self._contract.sessions:
        raise Refused(
          f"{clinic} has {self._sessions[clinic]} sessions open, as many as it may; end one first"
        )
      self._sessions[clinic] += 1
    try:
      yield
    finally:
      with self._lock:
        self._sessions[clinic] -= 1

  def refused(self, clinic: str, error: SessionEnded) -> None:
    """A line about a session that ended early; of very many, how many they were."""
    with self._lock:
      since, count = self._refusals.get(clinic, (self._now(), 0))
      if self._now() - since >= 60:
        self._say_refusals(clinic)
        since, count = self._now(), 0
      self._refusals[clinic] = since, count + 1
      fields = {"clinic": clinic, "error": type(error).__name__, "reason": str(error)}
      if count < _REFUSALS:
        self._say(REFUSAL, **fields)
      else:
        self._tell(REFUSAL, fields)

  def _say_refusals(self, clinic: str) -> None:
    _, count = self._refusals.pop(clinic)
    if count > _REFUSALS:
      self._say("refusals", clinic=clinic, sessions=count - _REFUSALS)

  @property
  def sessions(self) -> int:
    """Open sessions."""
    return self._sessions.total()

  def note(self, event: str, **fields: Any) -> None:
    """A line about something else than a query; fields as in `_FIELDS`."""
    with self._lock:
      self._say(event, **fields)

  def close(self) -> None:
    """Ends the log."""
    with self._lock:
      for clinic in [*self._refusals]:
        self._say_refusals(clinic)
      with contextlib.suppress(OSError):
        os.fsync(self._file)
      os.close(self._file)
      self._file = -1  # or a late line would go to whatever file has its number next

  def _today(self) -> str:
    return datetime.datetime.fromtimestamp(self._now(), datetime.UTC).date().isoformat()

  def _turn(self, day: str) -> None:
    if day > self._day:
      self._day = day
      self._daily.clear()

  def _count(self, clinic: str, images: int) -> None:
    self._daily[clinic] += images
    self._total[clinic] += images

  def _say(self, event: str, **fields: Any) -> None:
    try:
      self._write(event, False, **fields)
    except OSError as error:  # nothing hangs on this line, so the session goes on
      self._print(f"{AUDIT} lacks a line ({event}): {error.strerror}")

  def _write(self, event: str, is_durable: bool, **fields: Any) -> None:
    for name, value in fields.items():
      if not isinstance(value, _FIELDS[name]):
        raise TypeError(f"{name} of {event} must be of type {_FIELDS[name].__name__}")
    moment = datetime.datetime.fromtimestamp(self._now(), datetime.UTC).isoformat()
    plain = {k: v[:_LONGEST] if isinstance(v, str) else v for k, v in fields.items()}
    line = json.dumps({"time": moment, "day": self._day, "event": event} | plain)
    self._append(line.encode() + b"\n", is_durable)
    self._tell(event, plain)
    self._print(line)

  def _print(self, line: str) -> None:
    """The file is the record: no query waits for readers of the copy."""
    if self._echo is not None:
      with contextlib.suppress(OSError, ValueError):  # a pipe whose reader has gone
        print(line, file=self._echo, flush=True)

  def _tell(self, event: str, fields: dict[str, Any]) -> None:
    for listener in self.listeners:
      listener(event, fields)

  def _append(self, line: bytes, is_durable: bool) -> None:
    """Writes a whole line, or raises OSError and leaves none."""
    try:
      written = 0
      while written < len(line):
        written += os.pwrite(self._file, line[written:], self._end + written)
      if is_durable:
        os.fsync(self._file)
    except OSError:
      os.ftruncate(self._file, self._end)
      raise
    self._end += len(line)

  def _recover(self, path: pathlib.Path) -> int:
    """Counts what was asked before, and drops a last line that a crash cut: nothing was computed
    for it. Returns the bytes of the others.
    """
    end = 0
    with path.open("rb") as lines:
      for number, line in enumerate(lines, start=1):
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
            f"{path}, line {number} is damaged, and the budgets are counted from it; mend this line"
          ) from error
    os.ftruncate(self._file, end)
    return end
