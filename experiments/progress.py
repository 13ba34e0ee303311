"""Progress of work: a bar on a terminal, and plain lines where the output goes to a file."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from typing import Any

import tqdm

__all__ = ["Lines", "bar", "closing"]

_SECONDS = 10.0  # between two lines


def bar(**options: Any) -> Any:
  """tqdm's bar with these options, or, where nobody sees it move, `Lines`."""
  return tqdm.tqdm(**options) if sys.stderr.isatty() else Lines(**options)


class Lines:
  """A bar's calls, each at most a line: of the first step, then of one every ten seconds, and of
  the last.
  """

  def __init__(
    self,
    total: int,
    desc: str = "",
    unit: str = "step",
    initial: int = 0,
    disable: bool = False,
    **_: Any,
  ):
    self._what, self._unit, self._is_silent = desc, unit, disable
    self._done, self._total, self._shown = initial, total, initial
    self._said, self._printed = "", -_SECONDS

  def set_description_str(self, text: str) -> None:
    """What is at work, in its next line."""
    self._what = " ".join(text.split())

  def set_postfix_str(self, text: str, refresh: bool = True) -> None:
    """What stands behind the step, in its next line; now, if `refresh`."""
    self._said = text
    if refresh:
      self._print()

  def update(self) -> None:
    """A step has ended."""
    self._done += 1
    if time.monotonic() - self._printed >= _SECONDS:
      self._print()

  def write(self, text: str) -> None:
    """Prints a line of its own."""
    if not self._is_silent:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """The work has ended."""
    if self._shown != self._done:
      self._print()

  def _print(self) -> None:
    said = f"  {self._said}" if self._said else ""
    self.write(f"{self._what}: {self._unit} {self._done} of {self._total}{said}")
    self._shown, self._printed = self._done, time.monotonic()
