"""What each site's process records of the global state, and how all agree on the one to start from.

Each site keeps its own copy of the global state, and a digest of it after each round. All sign what
they have recorded, and every later sum is bound to it; see `secagg.meeting` for what that gives. A
site that was lost takes the newest state from another one, and trusts it only if enough sites have
signed its digest.
"""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from primia_jax import durable, federated
from primia_jax.secagg import meeting
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused
from primia_jax.types import Key, PyTree

from . import opened
from .processes import Joined

if TYPE_CHECKING:
  from .checkpoints import Best, Checkpoints

_RECORDS = "states.json"


class Record(NamedTuple):
  """A site's record of one round: the digest of the global state, and the sites of the round."""

  state: str
  sites: tuple[int, ...]


class Kept(NamedTuple):
  """What a site continues from: the state, its best model, and the hash of its ledger then."""

  state: federated.State
  best: Best
  ledger: str


Step = Callable[[Key, federated.State, federated.Sites], tuple[federated.State, federated.Info]]


def digest(state: Any, settings: bytes) -> bytes:
  """SHA-256 of all that the sites share of a state, and of the settings of their run.

  The best model so far is not part of it, and is bound apart: no site trains from it.
  """
  out = hashlib.sha256(hashlib.sha256(settings).digest())
  for path, leaf in jax.tree_util.tree_leaves_with_path(state._replace(site_state=())):
    a = np.asarray(leaf)
    out.update(repr((jax.tree_util.keystr(path), a.dtype.str, a.shape)).encode())
    out.update(a.tobytes())
  return out.digest()


def catch_up(joined: Joined, number: int, initial: Kept, checkpoints: Checkpoints) -> Kept:
  """What this site continues from: the newest round on which the sites can agree.

  Sites that lack that round, because they were lost in it, get its state from another one. It is
  checked later, by `agree`.

  Args:
    joined: this process's.
    number: of its site.
    initial: what it has before the first round.
    checkpoints: its own.

  Raises:
    Refused, Lost: as `meeting.tell_all`; or what a site tells is no such state.
  """
  num_sites, known = len(joined.pinned.sites), _read(joined.own / _RECORDS)
  mine = {n: known[n] for n in checkpoints.rounds if n in known}
  mine[0] = Record("", tuple(range(num_sites)))
  told = json.dumps(mine).encode()
  said = meeting.tell_all(joined.carrier, msg.Word(number, told), num_sites)
  recorded = {i: _rounds(number, i, word.told) for i, word in said.items()}
  held = {i: {n: one.sites for n, one in rounds.items()} for i, rounds in recorded.items()}
  now = _newest(held, max(2, joined.num_colluding + 1))
  lacking = [i for i in held if now not in held[i]]
  restore = lambda step: Kept(*checkpoints.restore(initial.state, initial.best, step))
  earlier = [n for n in checkpoints.rounds if n <= now]
  own = restore(max(earlier)) if earlier else initial
  if not lacking:
    return own
  able = sorted(set(held) - set(lacking))
  giver = able[joined.exchange.label[0] % len(able)]  # at the next start perhaps another one
  given = to_bytes(own) if giver == number else b""
  said = meeting.tell_all(joined.carrier, msg.Word(number, given), num_sites)
  if number not in lacking:
    return own
  print(f"site {number}: takes the state of round {now} from site {giver}")
  again = "start again: another site may be asked for it then"
  try:
    found = of_bytes(said[giver].told, own)
  except ValueError as error:
    what = f"what site {giver} gives is no state; {again}"
    raise Refused(number, "start", "malformed", what) from error
  made = digest(found.state, joined.settings).hex()
  if others := [i for i in able if i != giver and recorded[i][now].state != made]:
    what = f"site {giver} gives another state of round {now} than sites {others} have; {again}"
    raise Refused(number, "start", "inconsistent", what)
  return found


def _newest(held: Mapping[int, Mapping[int, tuple[int, ...]]], least: int) -> int:
  """The newest round that all sites hold, or that `meeting.check` lets the others take."""
  for n in sorted({n for rounds in held.values() for n in rounds}, reverse=True):
    lists = {rounds[n] for rounds in held.values() if n in rounds}
    holders = {i for i, rounds in held.items() if n in rounds}
    needed = [set(next(iter(lists))) - {i} for i in held if i not in holders]
    enough = not needed or len(holders) >= least
    if len(lists) == 1 and enough and all(some <= holders for some in needed):
      return n
  return 0


def _rounds(number: int, site: int, told: bytes) -> dict[int, Record]:
  try:
    found = dict(json.loads(told)).items()
    return {int(n): Record(str(state), tuple(map(int, sites))) for n, (state, sites) in found}
  except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
    what = f"site {site} does not say which rounds it has ({error})"
    raise Refused(number, "start", "malformed", what) from error


def to_bytes(kept: Kept) -> bytes:
  """All that the sites share of it."""
  return b"".join(np.asarray(a).tobytes() for a in jax.tree.leaves(_shared(kept)))


def _shared(kept: Kept) -> PyTree:
  return [part._replace(site_state=()) for part in (kept.state, kept.best)]


def of_bytes(data: bytes, like: Kept) -> Kept:
  """The state in these bytes, with what the site itself keeps.

  Raises:
    ValueError: they are no such state.
  """
  leaves, structure = jax.tree.flatten(_shared(like))
  sizes = [np.asarray(a).nbytes for a in leaves]
  if len(data) != sum(sizes):
    raise ValueError(f"{len(data)} bytes of a state that has {sum(sizes)}")
  ends = np.cumsum(sizes)
  found = [
    np.frombuffer(data[end - size : end], np.asarray(a).dtype).reshape(np.shape(a))
    for a, size, end in zip(leaves, sizes, ends, strict=True)
  ]
  state, best = jax.tree.unflatten(structure, [jax.numpy.asarray(a) for a in found])
  own = like.state.site_state, like.best.site_state
  return Kept(state._replace(site_state=own[0]), best._replace(site_state=own[1]), like.ledger)


def agree(
  joined: Joined, number: int, initial: federated.State, state: federated.State, told: bytes
) -> dict[int, bytes]:
  """Agrees with all other sites on the state to start from, before anything is trained.

  Records of later rounds are dropped: these rounds are repeated.

  Args:
    joined: this process's.
    number: of its site.
    initial: the state before the first round, as this process makes it from the settings.
    state: the same, or what it has read from a checkpoint.
    told: what this site tells all others.

  Returns:
    What each site has told.

  Raises:
    Refused: this site has recorded another state of that round, or as `meeting.check`.
    Lost: the coordinator ends the run.
  """
  path, now, found = joined.own / _RECORDS, int(state.round), digest(state, joined.settings)
  known_rounds = _read(path)
  records = {n: record for n, record in known_rounds.items() if n <= now}
  if later := sorted(set(known_rounds) - set(records)):
    print(f"site {number}: rounds {later[0]} to {later[-1]} were not saved and are repeated")
  made_here = digest(initial, joined.settings).hex()
  records.setdefault(0, Record(made_here, tuple(sorted(joined.pinned.sites))))
  known = records.get(now)
  if known and known.state != found.hex():
    raise Refused(
      number,
      "start",
      "inconsistent",
      f"the state of round {now} is not the one in its record {path}. The checkpoint was replaced, "
      "or the record belongs to another run. Use another --run_dir, or bring the checkpoint back",
    )
  made = meeting.start(
    joined.pinned.own, joined.exchange.label, number, now, found, known.sites if known else (), told
  )
  starts = meeting.tell_all(joined.carrier, made, len(joined.pinned.sites))
  label, colluding = joined.exchange.label, joined.num_colluding
  sites = meeting.check(starts, joined.pinned, label, number, colluding)
  joined.exchange.bind(found)
  _write(path, records | {now: Record(found.hex(), sites)})
  return {i: one.told for i, one in starts.items()}


def recorded(joined: Joined, step: Step, is_fresh: bool = False) -> Step:
  """The step of a round, which then records its state: before the next sum, or a save.

  Where what this site sends carries no fresh noise, the sums of a round from one state are only
  ever opened over the same sites (`opened`).
  """

  def recorded_step(key: Key, state: federated.State, sites: federated.Sites):
    if not is_fresh and joined.openings is not None:
      note = functools.partial(opened.note, joined.openings, since=digest(state, b""))
      joined.exchange.opens = note
    state, info = step(key, state, sites)
    path = joined.own / _RECORDS
    made = Record(digest(state, joined.settings).hex(), tuple(info.survivors.tolist()))
    _write(path, _read(path) | {int(state.round): made})
    return state, info

  return recorded_step


def _read(path: pathlib.Path) -> dict[int, Record]:
  if not path.is_file():
    return {}
  try:
    saved = json.loads(path.read_text())
    return {int(n): Record(str(state), tuple(sites)) for n, (state, sites) in saved.items()}
  except (AttributeError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error}); restore it") from error


def _write(path: pathlib.Path, records: dict[int, Record]) -> None:
  durable.replace(path, json.dumps(records).encode())
