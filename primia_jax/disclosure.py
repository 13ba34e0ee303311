"""What may leave a site, and a list of all that left it.

A `Policy` names the kinds of numbers that a site lets out, and floors: a count of too few patients
is suppressed, and a sum over too few sites, or a site of too few images, is refused. A suppressed
number is a `Suppressed`, which is no number: it prints as "suppressed (<10)", and arithmetic with
it is a TypeError, so it can never be taken for zero.

Who learns what: suppression hides a small count from whoever reads a table alone. It is no
differential privacy: two tables that differ by one patient, or a total and all but one of its
parts, may tell a suppressed count. `Policy.table` hides a second cell of a row or column in which
only one is small, so that its totals do not tell it. Noise, charged to a ledger, is what bounds
the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

UPDATES, NOISED_COUNTS, EXACT_COUNTS, METRICS = (
  "sums of updates",
  "noised counts",
  "exact counts",
  "metrics",
)
KINDS = (UPDATES, NOISED_COUNTS, EXACT_COUNTS, METRICS)


@dataclasses.dataclass(frozen=True)
class Suppressed:
  """A count below the floor; it has no value, is equal to no number, and adds to none."""

  floor: int

  def __str__(self) -> str:
    return f"suppressed (<{self.floor})"

  def __bool__(self) -> bool:
    raise TypeError(f"{self} is not a number, and not zero; test with isinstance")


@dataclasses.dataclass(frozen=True)
class Policy:
  """What a site lets out; a floor of 0 hides and refuses nothing.

  Attributes:
    leaves: kinds, of `KINDS`.
    fewest_patients: in a count.
    fewest_sites: in a sum.
    fewest_images: at a site that takes part.
  """

  leaves: tuple[str, ...] = KINDS
  fewest_patients: int = 10
  fewest_sites: int = 2
  fewest_images: int = 0

  def __post_init__(self):
    if unknown := [kind for kind in self.leaves if kind not in KINDS]:
      raise ValueError(f"leaves={unknown}; use some of {', '.join(KINDS)}")
    for name in ("fewest_patients", "fewest_sites", "fewest_images"):
      if getattr(self, name) < 0:
        raise ValueError(f"{name}={getattr(self, name)} is negative; 0 sets no floor")

  def check(self, kind: str) -> None:
    """Raises a ValueError for a kind that may not leave."""
    if kind not in self.leaves:
      allowed = ", ".join(self.leaves) or "nothing"
      raise ValueError(f"{kind} may not leave this site, whose policy lets out: {allowed}")

  def check_sum(self, num_sites: int) -> None:
    """Raises a ValueError for a sum over too few sites."""
    if num_sites < self.fewest_sites:
      raise ValueError(
        f"a sum over {num_sites} sites; this site's policy needs at least {self.fewest_sites}"
      )

  def check_site(self, num_images: int) -> None:
    """Raises a ValueError for a site of too few images, which does not say how many."""
    if num_images < self.fewest_images:
      raise ValueError(
        f"this site has fewer than fewest_images={self.fewest_images} images, so that a sum tells "
        "too much of each; it takes no part"
      )

  def count(self, number: int) -> int | Suppressed:
    """A count of patients or images, or that it is below the floor; zero is below it, too."""
    return Suppressed(self.fewest_patients) if number < self.fewest_patients else int(number)

  def ratio(self, value: Any, *parts: int) -> Any:
    """A score that is a ratio of counts, which are known from it: suppressed with any of them."""
    hidden = any(isinstance(self.count(part), Suppressed) for part in parts)
    return Suppressed(self.fewest_patients) if hidden else value

  def table(self, counts: Any, patients: Any = None) -> list[list[int | Suppressed]]:
    """A table of counts [R, C], such as a confusion matrix, whose totals may be known.

    `patients` says how many each cell is of, where several images may be of one patient. Where one
    cell of a row or column is suppressed, the smallest other one is suppressed as well,
    until no row or column has exactly one; a row or column of one cell is as it is.
    """
    counts = np.asarray(counts, np.int64)
    hidden = np.asarray(counts if patients is None else patients) < self.fewest_patients
    while (alone := _alone(hidden)) is not None:
      line, of_line = alone(hidden), alone(counts)  # views
      line[np.argmin(np.where(line, np.iinfo(np.int64).max, of_line))] = True
    shown = Suppressed(self.fewest_patients)
    return [
      [shown if is_hidden else int(n) for n, is_hidden in zip(*row, strict=True)]
      for row in zip(counts, hidden, strict=True)
    ]


class Crossing(NamedTuple):
  """What crossed the boundary of one or several sites.

  Attributes:
    what: it was.
    sender, receiver: who sent it, and who can read it.
    messages: how many.
    num_bytes: of all together.
    protection: what keeps the receiver from learning more.
    charge: what ledgers were charged for it.
  """

  what: str
  sender: str
  receiver: str
  messages: int
  num_bytes: int
  protection: str
  charge: str


def markdown(
  title: str,
  policy: Policy,
  crossings: Iterable[Crossing],
  numbers: Mapping[str, Any] | None = None,
  note: str = "",
) -> str:
  """The page `disclosure.md`: the policy, all that crossed with a note on it, and numbers that were
  let out.
  """
  rows = [
    ["what", "from", "to", "messages", "bytes", "protected by", "charged"],
    *(
      [
        one.what,
        one.sender,
        one.receiver,
        f"{one.messages:,}",
        f"{one.num_bytes:,}",
        one.protection,
        one.charge,
      ]
      for one in crossings
    ),
  ]
  floors: list[list[Any]] = [
    ["what may leave a site", ", ".join(policy.leaves) or "nothing"],
    ["fewest patients in a count", policy.fewest_patients],
    ["fewest sites in a sum", policy.fewest_sites],
    ["fewest images at a site", policy.fewest_images],
  ]
  lines = [f"# What crossed: {title}", "", "## Policy", "", *_table([["", ""], *floors])]
  lines += ["", "Below a floor a number is suppressed, which does not mean that it is zero."]
  lines += ["", "## Everything that left a site or reached one", ""]
  lines += _table(rows) if len(rows) > 1 else ["Nothing crossed."]
  lines += ["", note] if note else []
  if numbers:
    lines += ["", "## Numbers that were let out", ""]
    lines += _table([["", ""], *([name, value] for name, value in numbers.items())])
  return "\n".join(lines) + "\n"


def _alone(hidden: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
  """What takes the first row or column, of several cells, that has a single hidden one."""
  for axis in (1, 0):
    if hidden.shape[axis] > 1 and len(found := np.flatnonzero(hidden.sum(axis) == 1)):
      return lambda table: np.moveaxis(table, axis, 1)[found[0]]
  return None


def _table(rows: Sequence[Sequence[Any]]) -> list[str]:
  cell = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
  written = [f"| {' | '.join(map(cell, row))} |" for row in rows]
  return [written[0], f"|{'---|' * len(rows[0])}", *written[1:]]
