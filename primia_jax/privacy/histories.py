"""What all runs in a ledger cost a unit together: sequential composition over runs.

Two records are of one unit if they have the same group (their patient, or their own id in the data
set) or the same pixels. So a unit is recognised whatever site it is dealt to, under another name,
and, by its id, at another size; not where both have changed. Of a run, a unit is charged the most
that any of its records was: each release at a site counts once.

Who learns what: take one unit. Two data sets are adjacent when, in every run, what that run
protects (one image of the unit, its patient, or its whole site) is there, or zeros in its place.
Whoever sees all that the runs released learns no more about which of the two it is than epsilon and
delta say. This assumes what each run assumes, and that nothing else was released of these data.
Equal images are distinct units to a run that protects examples, so one that occurs twice is
protected as two; protect patients to cover both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy

from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.chain import NAME_BYTES, Chain, Entry, unpacked
from primia_jax.privacy.ledger import release_of


class History(NamedTuple):
  """Units that were charged alike.

  Attributes:
    num_units: how many.
    runs: names of the runs that charged them.
    ledger: all that these runs have released of them; its unit is that of the last run.
    is_private: False where anyone can repeat the noise of one of the runs.
  """

  num_units: int
  runs: tuple[str, ...]
  ledger: Ledger
  is_private: bool

  @property
  def epsilon(self) -> float:
    return accounting.epsilon(self.ledger) if self.is_private else math.inf


def runs(chain: Chain) -> dict[str, Entry]:
  """The runs that were charged anything: name -> the entry that begins it.

  Raises:
    ValueError: a charge names a run that was not begun.
  """
  out = {}
  for name in dict.fromkeys(entry["run"] for entry in chain.entries if entry["kind"] == "charge"):
    if (place := chain.place(name)) is None:
      raise ValueError(f"{chain.path} charges a run {name[:16]} that it does not hold")
    out[name] = chain.entries[place]
  return out


def histories(chain: Chain, delta: float | None = None) -> list[History]:
  """All units of a chain, by what they were charged.

  Args:
    chain: of the data.
    delta: of the claims; by default the least of all runs.

  Raises:
    ValueError: an entry is none that `ledger` writes.
  """
  if not (begun := runs(chain)):
    return []
  units, num_units = _units(chain)
  charges = _charges(chain, begun)
  kinds = list(dict.fromkeys(kind for of_run in charges.values() for _, kind in of_run))
  spent = np.zeros((num_units, len(kinds)), np.int64)
  took_part = np.zeros((num_units, len(begun)), np.int64)
  for number, (name, begin) in enumerate(begun.items()):
    most = np.zeros_like(spent)
    for site, group in enumerate(begin["groups"]):
      row = [charges[name].get((site, kind), 0) for kind in kinds]
      if group is not None and any(row):
        most[units[group]] = np.maximum(most[units[group]], row)
    spent += most
    took_part[:, number] = most.any(axis=1)
  distinct, counts = np.unique(np.concatenate([took_part, spent], 1), axis=0, return_counts=True)
  last, claimed = list(begun.values())[-1], min(begin["delta"] for begin in begun.values())
  out = []
  for row, count in zip(distinct, counts.tolist(), strict=True):
    mine = [name for name, took in zip(begun, row, strict=False) if took]
    times = zip(kinds, row[len(begun) :].tolist(), strict=True)
    releases = tuple(kind._replace(times=n) for kind, n in times if n)
    ledger = Ledger(last["unit"], delta or claimed, releases)
    is_private = all(begun[name]["private"] for name in mine)
    out.append(History(count, tuple(mine), ledger, is_private))
  return [one for one in out if one.runs]


def worst(known: Sequence[History]) -> History:
  """The history with the largest epsilon, computed for those alone that no other contains."""
  times = lambda one: {r._replace(times=1): r.times for r in one.ledger.releases}
  front: list[tuple[History, Mapping[Release, int]]] = []
  size = lambda one: sum(r.times for r in one.ledger.releases)
  for one in sorted(known, key=lambda one: (one.is_private, -size(one))):
    mine = times(one)
    covered = lambda more, mine=mine: all(more.get(kind, 0) >= n for kind, n in mine.items())
    if not any(covered(other) for _, other in front):
      front.append((one, mine))
  return max((one for one, _ in front), key=lambda one: one.epsilon)


def _charges(chain: Chain, begun: Iterable[str]) -> dict[str, dict[tuple[int, Release], int]]:
  """By run: (site, release) -> how often."""
  out: dict[str, dict[tuple[int, Release], int]] = {name: {} for name in begun}
  for entry in chain.entries:
    if entry["kind"] == "charge":
      release = release_of(entry["release"])
      kind, of_run = release._replace(times=1), out[entry["run"]]
      for site in entry["sites"]:
        of_run[site, kind] = of_run.get((site, kind), 0) + release.times
  return out


def _units(chain: Chain) -> tuple[dict[str, np.ndarray], int]:
  """(group -> numbers of its units, how many units there are in all)."""
  records = {
    entry["group"]: unpacked(entry["units"], 2 * NAME_BYTES)
    for entry in chain.entries
    if entry["kind"] == "group"
  }
  numbers: dict[bytes, int] = {}
  number = lambda name: numbers.setdefault(name, len(numbers))
  edges = {
    group: np.array(
      [(number(r[:NAME_BYTES]), number(r[NAME_BYTES:])) for r in rows], np.int64
    ).reshape(-1, 2)
    for group, rows in records.items()
  }
  ends = np.concatenate(list(edges.values()))
  ones = np.ones(len(ends), np.int8)
  graph = scipy.sparse.coo_matrix((ones, (ends[:, 0], ends[:, 1])), (len(numbers),) * 2)
  num_units, unit_of = scipy.sparse.csgraph.connected_components(graph, directed=False)
  return {group: np.unique(unit_of[rows[:, 0]]) for group, rows in edges.items()}, num_units
