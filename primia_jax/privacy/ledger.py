"""Ledgers of a run and in reports: a release is charged on the disk before it happens.

All sites of a run spend the same in a round, since all draw with the same probability and add the
same noise. A run has one ledger for each site, charged for the rounds that it took part in; the
run's claim is that of the worst. All runs on the same data are charged in one file (`chain`), and
`histories` says what they cost a unit together.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from primia_jax.privacy import accounting, reconstruction
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.chain import Chain, Entry, packed
from primia_jax.privacy.plan import Plan

LEDGER = "ledger.json"  # of a run: which entry of which file begins it
EPSILON = "epsilon (of a unit of any one site, the worst)"  # the row of a statement
_AGREED = "agreed.json"  # what `agreeing` leaves for a process
_RUN_FACTS = ("unit", "delta", "groups", "private")


class Ledgers:
  """The ledgers of a run. A crash can overcharge them, never undercharge.

  Correlated noise (a plan of a whole run) is charged to a site before its first round, and again by
  every start that continues training: the steps after the checkpoint are released a second time,
  under other noise, and that reveals more than one release (`plan.dp_ftrl`).

  Attributes:
    plan: what is charged.
    ledgers: one for each site.
    counts: the noised class counts, which are released once, restarts included; None before.
    chain: where all of it is written.
  """

  def __init__(
    self,
    plan: Plan,
    path: pathlib.Path,
    chain: Chain,
    units: Sequence[Iterable[bytes] | None],
    is_private: bool = True,
  ):
    """Begins a run, or continues it with what earlier starts have charged.

    Args:
      plan: what is charged.
      path: of the run's own small file, which says where the run begins in the chain.
      chain: of the data.
      units: of each site: `record`s of its units, with which other runs' are compared; None where
        another process has the site's images, and charges its units.
      is_private: False where anyone can repeat the noise. Nothing can then be claimed of the units.

    Raises:
      ValueError: the chain does not hold what the run was charged, or the run was of other units.
    """
    self.plan, self._path, self.chain = plan, path, chain
    groups = [None if names is None else _group(names) for names in units]
    named = [None if group is None else group["group"] for group in groups]
    begin = {"unit": plan.unit, "delta": plan.delta, "groups": named, "private": is_private}
    if not path.is_file():
      known = {entry["group"] for entry in chain.entries if entry["kind"] == "group"}
      new = [group for group in groups if group is not None and group["group"] not in known]
      self._save(chain.append(*new, {"kind": "run", **begin, "at": _now()}))
    self._run, entry = _begun(path, chain)
    if changed := [name for name in _RUN_FACTS if entry[name] != begin[name]]:
      raise ValueError(
        f"{path}: the run began with other {', '.join(changed)}: its images or its plan have "
        "changed since; use another --run_dir"
      )
    self._save(self._run)  # the folder may have moved
    self.ledgers, self.counts = replayed(chain, self._run)
    self._paid: set[int] = set()  # sites that this start has charged for the whole run
    if (agreed := path.with_name(_AGREED)).is_file():
      self._top_up(json.loads(agreed.read_text()))

  def check(self, last: str) -> None:
    """Checks what a checkpoint remembers: the hash of the chain's last entry when it was saved.

    Raises:
      ValueError: the chain has lost entries, or never held them.
    """
    begun, place = self.chain.place(self._run), self.chain.place(last)
    if place is None or begun is None or place < begun:
      raise ValueError(
        f"{self.chain.path} has lost entries: a checkpoint beside {self._path} was saved after "
        f"the entry {last[:16]}, which it does not hold; restore the file from a backup. Without "
        "it nobody knows what was spent, so that the run cannot go on"
      )

  def spend(self, release: Release, site_ids: Sequence[int]) -> None:
    """Charges a release to sites; call it before the release."""
    self._charge([release], site_ids)

  def keep_counts(self, counts: list[float]) -> None:
    """Writes down class counts that were released."""
    self.chain.append({"kind": "counts", "run": self._run, "counts": counts})
    self.counts = counts

  @property
  def epsilon(self) -> float:
    """The epsilon claimed so far: the worst site's."""
    return accounting.of_sites(self.ledgers)

  def within_budget(self, site_ids: Sequence[int]) -> bool:
    """Whether one more round of these sites keeps within the target."""
    if math.isinf(self.plan.target_epsilon):
      return True
    cost = lambda i: () if self._has_paid(i) else self._of_a_round
    after = {functools.reduce(accounting.spend, cost(i), self.ledgers[i]) for i in site_ids}
    return accounting.of_sites(list(after)) <= self.plan.target_epsilon

  def spend_round(self, site_ids: Sequence[int]) -> None:
    """Charges a round to its sites; call it before anything is released."""
    self._charge(self._of_a_round, [i for i in site_ids if not self._has_paid(i)])
    self._paid |= set(site_ids)

  def repeats(self, site_ids: Sequence[int]) -> None:
    """Says that these sites' round was refused, so that the next releases its steps again.

    A whole run is then charged once more. Fresh noise is charged for each round in any case.
    """
    self._paid -= set(site_ids)

  @property
  def _of_a_round(self) -> tuple[Release, ...]:
    return self.plan.charge(Ledger(self.plan.unit, self.plan.delta)).releases

  def _has_paid(self, site: int) -> bool:
    return self.plan.whole_run and site in self._paid

  def _charge(self, releases: Iterable[Release], site_ids: Sequence[int]) -> None:
    about = {"kind": "charge", "run": self._run, "sites": list(site_ids), "at": _now()}
    entries = [{**about, "release": release._asdict()} for release in releases if site_ids]
    if entries:
      self.chain.append(*entries)
    for i in site_ids:
      self.ledgers[i] = functools.reduce(accounting.spend, releases, self.ledgers[i])

  def _save(self, run: str) -> None:
    _write(self._path, {"ledger": str(self.chain.folder.resolve()), "run": run})

  def _top_up(self, agreed: Mapping[str, Any]) -> None:
    all_agreed = [from_json(json.dumps(saved)) for saved in agreed["ledgers"]]
    for i, one in enumerate(all_agreed):
      self._charge(_missing(self.ledgers[i], one), [i])
    self.ledgers = all_agreed  # alike in all processes, so that all end at the same round
    if self.counts is None and agreed["counts"] is not None:
      self.keep_counts(agreed["counts"])
    self.counts = agreed["counts"]


def record(chain: Chain, group: str, image: Any) -> bytes:
  """What an image's unit is known by: the names of its group (its patient, or its own id) and of
  its pixels, 32 bytes.

  Args:
    chain: of the data, whose key is used.
    group: of the image in its data set.
    image: [H, W, C], decoded; its label does not count.
  """
  of_group, shape = chain.name(b"group", group.encode()), repr((image.shape, image.dtype.str))
  return of_group + chain.name(b"pixels", shape.encode(), image.tobytes())


def public(path: pathlib.Path) -> bytes:
  """What a process tells the others of its run's charges, which are public; empty before a run.

  Raises:
    ValueError, FileNotFoundError: as `Ledgers`.
  """
  if not path.is_file():
    return b""
  chain = Chain(pathlib.Path(_read(path)["ledger"]), read_only=True)
  ledgers, counts = replayed(chain, _begun(path, chain)[0])
  return json.dumps({"ledgers": [_plain(one) for one in ledgers], "counts": counts}).encode()


def note_agreed(path: pathlib.Path, ledgers: Sequence[Ledger], counts: list[float] | None) -> None:
  """Notes what all processes of a run agreed on, for the `Ledgers` that this one begins next."""
  path.parent.mkdir(parents=True, exist_ok=True)
  _write(path.with_name(_AGREED), {"ledgers": [_plain(x) for x in ledgers], "counts": counts})


def forget_agreed(path: pathlib.Path) -> None:
  """Takes away what an earlier start has noted."""
  path.with_name(_AGREED).unlink(missing_ok=True)


def of_run(path: pathlib.Path, chain: Chain) -> list[Ledger]:
  """The ledgers of each site that a run's own file leads to; raises as `Ledgers`."""
  return replayed(chain, _begun(path, chain)[0])[0]


def replayed(chain: Chain, run: str) -> tuple[list[Ledger], list[float] | None]:
  """(ledger of each site, class counts) of the run that begins with the entry of this hash."""
  place = chain.place(run)
  assert place is not None
  begin, counts = chain.entries[place], None
  ledgers = [Ledger(begin["unit"], begin["delta"])] * len(begin["groups"])
  for entry in chain.entries[place:]:
    if entry.get("run") != run:
      continue
    if entry["kind"] == "counts":
      counts = entry["counts"]
    elif entry["kind"] == "charge":
      for i in entry["sites"]:
        ledgers[i] = accounting.spend(ledgers[i], release_of(entry["release"]))
  return ledgers, counts


def statement(ledgers: Sequence[Ledger]) -> dict[str, Any]:
  """A report's rows on the releases and the claim (rounded up) of one run's ledgers.

  Raises:
    ValueError: as `accounting.of_sites`.
  """
  worst = accounting.worst(ledgers)
  rows: dict[str, Any] = {
    "unit of privacy": f"one {worst.unit}: adjacent data have it, or zeros in its place; numbers "
    f"of units are public",
    "delta": worst.delta,
    EPSILON: claim(accounting.epsilon(worst)),
    "epsilon by Renyi divergences": claim(accounting.epsilon(worst, "rdp")),
    **_against_reconstruction(worst),
    "composition": "sequential over rounds and statistics of a site, parallel over sites",
  }
  for release in worst.releases:
    rows[f"released: {release.what}"] = _told(release)
  return rows


def _against_reconstruction(worst: Ledger) -> dict[str, Any]:
  count, bound = reconstruction.NUM_CANDIDATES, reconstruction.reconstruction_bound(worst)
  name = f"chance to name the {worst.unit} that was used among {count:,} candidates"
  return {name: f"at most {percent(bound)}; {1 / count:.3%} by a guess (Kaissis et al. 2023)"}


def claim(epsilon: float) -> float | str:
  """An epsilon as reports show it, rounded up."""
  return math.ceil(epsilon * 1e4) / 1e4 if math.isfinite(epsilon) else "infinite"


def percent(chance: float) -> str:
  """A chance as reports show it, rounded up."""
  return f"{min(1.0, math.ceil(chance * 1e5) / 1e5):.3%}"


def to_json(ledger: Ledger) -> str:
  """A ledger as text."""
  return json.dumps(_plain(ledger))


def from_json(text: str) -> Ledger:
  """The inverse of `to_json`.

  Raises:
    ValueError: for another text, or releases that `accounting` could not have made.
  """
  try:
    values: Mapping[str, Any] = json.loads(text)
    one = Ledger(values["unit"], float(values["delta"]), tuple(map(release_of, values["releases"])))
    if one.unit not in accounting.UNITS or not 0 < one.delta <= 1:
      raise ValueError(f"unit={one.unit!r}, delta={one.delta}")
    return one
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"this is not a ledger ({error}): {text[:80]!r}") from error


def release_of(saved: Mapping[str, Any]) -> Release:
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


def _plain(ledger: Ledger) -> dict[str, Any]:
  return ledger._asdict() | {"releases": [r._asdict() for r in ledger.releases]}


def times_of(ledger: Ledger) -> dict[Release, int]:
  """How often each release was given, each with `times` 1."""
  return {r._replace(times=1): r.times for r in ledger.releases}


def _missing(have: Ledger, want: Ledger) -> list[Release]:
  """The releases that `want` has more often."""
  times = times_of(have)
  more = [(r, r.times - times.get(r._replace(times=1), 0)) for r in want.releases]
  return [r._replace(times=n) for r, n in more if n > 0]


def _read(path: pathlib.Path) -> dict[str, str]:
  try:
    saved = json.loads(path.read_text())
    return {"ledger": str(saved["ledger"]), "run": str(saved["run"])}
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error}); restore it from a backup") from error


def _write(path: pathlib.Path, what: Mapping[str, Any]) -> None:
  part = path.with_suffix(".part")
  part.write_text(json.dumps(what, indent=2) + "\n")
  part.replace(path)


def _begun(path: pathlib.Path, chain: Chain) -> tuple[str, Entry]:
  """(name of a run, the entry that begins it), from the run's own file."""
  run = _read(path)["run"]
  place = chain.place(run)
  if place is None or chain.entries[place]["kind"] != "run":
    raise ValueError(
      f"{chain.path} does not hold the run of {path}, which began with the entry {run[:16]}: the "
      "ledger was lost or replaced; restore it from a backup. Without it nobody knows what was "
      "spent, so that the run cannot go on"
    )
  return run, chain.entries[place]


def _group(records: Iterable[bytes]) -> dict[str, str]:
  """The entry of a group of units, named by what it holds."""
  units = packed(records)
  name = hashlib.sha256(units.encode()).hexdigest()[:32]
  return {"kind": "group", "group": name, "units": units}


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
