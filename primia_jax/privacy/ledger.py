"""Ledgers on disk and in reports: a book is written before anything is released.

All sites of a cohort spend the same in a round, since all draw with the same probability and add
the same noise. A book holds one ledger for each site, charged for the rounds that it took part in;
the claim is that of the worst.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from primia_jax.privacy import accounting
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.plan import Plan

LEDGER = "ledger.json"


class Book:
  """The ledgers of a cohort in a file. A crash can overcharge them, never undercharge.

  Correlated noise (a plan of a whole run) is charged to a site before its first round, and again by
  every start that continues training: the steps after the checkpoint are released a second time,
  under other noise, and that reveals more than one release (`plan.dp_ftrl`).

  Attributes:
    ledgers: one for each site.
    counts: the noised class counts, which are released once, restarts included; None before.
  """

  def __init__(self, plan: Plan, num_sites: int, path: pathlib.Path):
    """Opens the book, with what earlier starts have charged.

    Raises:
      ValueError: for a damaged file, or one of another number of sites.
    """
    self._plan, self._path = plan, path
    self.ledgers = [Ledger(plan.unit, plan.delta)] * num_sites
    self.counts: list[float] | None = None
    self._begun: set[int] = set()  # sites that this start has charged for the whole run
    if path.is_file():
      saved = json.loads(path.read_text())
      self.ledgers = [from_json(json.dumps(one)) for one in saved["ledgers"]]
      self.counts = saved["class_counts"]
      if len(self.ledgers) != num_sites:
        raise ValueError(
          f"{path} has ledgers of {len(self.ledgers)} sites, not {num_sites}; use another --run_dir"
        )

  def spend(self, release: Release, site_ids: Sequence[int], count: int = 1) -> None:
    """Charges a release to sites."""
    for i in site_ids:
      self.ledgers[i] = accounting.spend(self.ledgers[i], release, count)
    self.save()

  def save(self) -> None:
    """Writes the file anew."""
    ledgers = [json.loads(to_json(one)) for one in self.ledgers]
    _write(self._path, {"ledgers": ledgers, "class_counts": self.counts})

  @property
  def epsilon(self) -> float:
    """The epsilon claimed so far: the worst site's."""
    return accounting.of_sites(self.ledgers)

  def within_budget(self, site_ids: Sequence[int]) -> bool:
    """Whether one more round of these sites keeps within the target."""
    if math.isinf(self._plan.target_epsilon):
      return True
    after = {self._after(i) for i in site_ids}
    return accounting.of_sites(list(after)) <= self._plan.target_epsilon

  def spend_round(self, site_ids: Sequence[int]) -> None:
    """Charges a round to its sites; call it before anything is released."""
    for i in site_ids:
      self.ledgers[i] = self._after(i)
    self._begun |= set(site_ids)
    self.save()

  def repeats(self, site_ids: Sequence[int]) -> None:
    """Says that these sites' round was refused, so that the next releases its steps again.

    A whole run is then charged once more. Fresh noise is charged for each round in any case.
    """
    self._begun -= set(site_ids)

  def _after(self, site: int) -> Ledger:
    """A site's ledger after one more round."""
    paid = self._plan.whole_run and site in self._begun
    return self._plan.charge(self.ledgers[site], 0 if paid else 1)


def reconcile(books: Sequence[bytes], path: pathlib.Path) -> None:
  """Writes the ledgers with which all continue: of each site the one with the largest epsilon.

  A process that was killed may have charged a round that no other has begun. Books hold only
  public numbers.

  Args:
    books: the content of each site's file, this one's first, since its own class counts go first;
      empty where there is none.
    path: of this site's file.

  Raises:
    ValueError: one is no ledger.
  """
  found = [json.loads(book) for book in books if book]
  if not found:
    return
  epsilon = lambda one: accounting.epsilon(from_json(json.dumps(one)))
  ledgers = [
    max(rows, key=epsilon) for rows in zip(*(book["ledgers"] for book in found), strict=True)
  ]
  counts = next((book["class_counts"] for book in found if book["class_counts"] is not None), None)
  _write(path, {"ledgers": ledgers, "class_counts": counts})


def statement(ledgers: Sequence[Ledger]) -> dict[str, Any]:
  """A report's rows on the releases and the claim (rounded up) of one run's ledgers.

  Raises:
    ValueError: as `accounting.of_sites`.
  """
  worst = accounting.worst(ledgers)
  claim = lambda value: math.ceil(value * 1e4) / 1e4 if math.isfinite(value) else "infinite"
  rows: dict[str, Any] = {
    "unit of privacy": f"one {worst.unit}: adjacent data have it, or zeros in its place; numbers "
    f"of units are public",
    "delta": worst.delta,
    "epsilon (of a unit of any one site, the worst)": claim(accounting.epsilon(worst)),
    "epsilon by Renyi divergences": claim(accounting.epsilon(worst, "rdp")),
    "composition": "sequential over rounds and statistics of a site, parallel over sites",
  }
  for release in worst.releases:
    rows[f"released: {release.what}"] = _told(release)
  return rows


def to_json(ledger: Ledger) -> str:
  """A ledger as text."""
  return json.dumps(ledger._asdict() | {"releases": [r._asdict() for r in ledger.releases]})


def from_json(text: str) -> Ledger:
  """The inverse of `to_json`.

  Raises:
    ValueError: for another text, or releases that `accounting` could not have made.
  """
  try:
    values: Mapping[str, Any] = json.loads(text)
    one = Ledger(values["unit"], float(values["delta"]), tuple(map(_release, values["releases"])))
    if one.unit not in accounting.UNITS or not 0 < one.delta <= 1:
      raise ValueError(f"unit={one.unit!r}, delta={one.delta}")
    return one
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"this is no ledger ({error}): {text[:80]!r}") from error


def _release(saved: Mapping[str, Any]) -> Release:
  made = Release(**{**saved, "curve": tuple(saved["curve"])})
  if made.times < 1 or (made.curve and (made.noise_multiplier or made.sampling_rate != 1)):
    raise ValueError(f"{made.what}: times={made.times}, or both noise and a curve")
  if made.curve:
    checked = accounting.renyi(made.what, made.curve, made.extra_delta)
  else:
    checked = accounting.gaussian(
      made.what, made.noise_multiplier, made.sampling_rate, made.extra_delta
    )
  return checked._replace(times=made.times)


def _told(release: Release) -> str:
  times = f"{release.times} times" if release.times != 1 else "once"
  if release.curve:
    return f"{times}, by integer noise of all sites together"
  q = release.sampling_rate
  rate = f", each unit drawn with probability {q:.6g} (Poisson)" if q < 1 else ""
  return (
    f"{times}, Gaussian noise of {release.noise_multiplier:.6g} times the largest "
    f"contribution of a unit{rate}"
  )


def _write(path: pathlib.Path, book: dict[str, Any]) -> None:
  part = path.with_suffix(".part")
  with part.open("w") as file:
    file.write(json.dumps(book, indent=2) + "\n")
    file.flush()
    os.fsync(file.fileno())  # before anything is released
  part.replace(path)
