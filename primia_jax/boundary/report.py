"""What an audit finds: every value that crosses, and those that nothing hides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.boundary import sources
from primia_jax.boundary.values import Part, Raw, Stream, Value, exposed


class Unmasked(ValueError):
  """A value would cross a trust boundary that is neither public nor under a fresh mask."""


class Crossing(NamedTuple):
  """One value that crosses.

  Attributes:
    what: the message and the place in it.
    shape, dtype, num_bytes: of the value.
    round: of the run, or of the protocol.
    status: "public", "masked", "unmasked", or what a docstring of this package says of it.
    line: file:line where it was masked or, for others, computed.
  """

  what: str
  shape: tuple[int, ...]
  dtype: str
  num_bytes: int
  round: int
  status: str
  line: str


class Violation(NamedTuple):
  """What must not cross.

  Attributes:
    what: the crossing.
    line: file:line of the equation at fault.
    why: what is wrong, and the inputs that are told.
  """

  what: str
  line: str
  why: str

  def __str__(self) -> str:
    return f"{self.line or 'an input as it is'}: {self.what}: {self.why}"


class Report(NamedTuple):
  """All crossings of a round or a secret function, and which of them must not be.

  Attributes:
    name: of what was audited.
    crossings: in order.
    violations: empty if everything that crosses is public or masked.
  """

  name: str
  crossings: tuple[Crossing, ...]
  violations: tuple[Violation, ...]

  def check(self) -> None:
    """Raises `Unmasked`, with the line at fault, if there is a violation."""
    if self.violations:
      more = len(self.violations) - 1
      raise Unmasked(f"{self.violations[0]}" + f" (and {more} more)" * bool(more))

  def __str__(self) -> str:
    head = ("round", "what", "type", "bytes", "status", "line")
    rows = [
      (str(c.round), c.what, f"{c.dtype}{list(c.shape)}", f"{c.num_bytes:,}", c.status, c.line)
      for c in self.crossings
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]
    total = sum(c.num_bytes for c in self.crossings)
    end = [f"{len(rows)} crossings, {total:,} bytes, {len(self.violations)} violations"]
    return "\n".join([self.name, *lines, *end, *map(str, self.violations)])


class Sent(NamedTuple):
  """A crossing before it is judged.

  Attributes:
    what, value, aval, round: of the crossing.
    eqn: where it crosses; named where nothing has made it, as for an input.
    expected: a status that needs no mask, or empty.
  """

  what: str
  value: Value
  aval: Any
  round: int = 0
  eqn: Any = None
  expected: str = ""


def judge(
  name: str, sent: Sequence[Sent], observers: Sequence[tuple[str, Callable[[Stream], bool]]]
) -> Report:
  """The report on values that cross together.

  Args:
    name: of what is audited.
    sent: the values.
    observers: each by name, and whether it lacks the key of a stream. A value must be hidden from
      every one of them; without any, only public values may cross.
  """
  parts = [p for s in sent if not s.expected for p in s.value.parts if p.pads and not p.high]
  found = [(who, exposed(parts, usable)) for who, usable in observers]
  order = {number: i for _, blamed in found for i, number in enumerate(blamed)}
  named = {p.number: f"{s.what}, {_line(s, p)}" for s in sent for p in s.value.parts}
  crossings, ranked = [], list[tuple[int, Violation]]()
  for s in sent:
    wrong = [] if s.expected else list(_wrong(s, found, order, named))
    ranked += wrong
    status = s.expected or ("unmasked" if wrong else "masked" if s.value.parts else "public")
    shape, dtype = tuple(s.aval.shape), str(s.aval.dtype)
    size = int(np.prod(shape)) * s.aval.dtype.itemsize
    line = _line(s, s.value.parts[0]) if s.value.parts else sources.line(s.eqn)
    crossings.append(Crossing(s.what, shape, dtype, size, s.round, status, line))
  ranked.sort(key=lambda pair: pair[0])
  return Report(name, tuple(crossings), tuple(violation for _, violation in ranked))


def _wrong(
  s: Sent,
  found: Sequence[tuple[str, dict[int, int | None]]],
  order: dict[int, int],
  named: dict[int, str],
) -> Iterable[tuple[int, Violation]]:
  """Violations of one crossing, those first that others may follow from."""
  for part in s.value.parts:
    told, line, number = f"it tells {_names(part.rest)}", _line(s, part), part.number
    if not part.pads:
      yield -1, Violation(s.what, line, f"not masked; {told}")
    elif part.high:
      yield -1, Violation(s.what, line, f"only {part.bits or 'its'} low bits are masked; {told}")
    elif not found:
      yield -1, Violation(s.what, line, f"no mask is expected here; {told}")
    elif who := next((who for who, blamed in found if number in blamed), None):
      also = dict(found)[who][number]
      why = "it knows the mask" if also is None else f"its mask is in [{named.get(also)}] too"
      yield order[number], Violation(s.what, line, f"open to {who}: {why}; {told}")


def _line(s: Sent, part: Part) -> str:
  return sources.line(s.eqn if part.eqn is None else part.eqn)


def _names(rest: Iterable[Any]) -> str:
  """The inputs that a value tells of, without the streams in it."""
  inputs = sorted(item for item in rest if isinstance(item, str))
  raw = sorted({f"the key {item.key[0]}" for item in rest if isinstance(item, Raw)})
  return ", ".join(inputs + raw) or "nothing but a mask"
