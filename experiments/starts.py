"""What each site's process records of the global state, and how all agree on the one to start from.

The process of site 0 saves the global state, and all start from what it has saved. It could give
each site another state, or one of its own making. So each process records a digest of the state
after each round in its own folder, all sign what they have recorded, and every later sum is bound
to it; see `secagg.meeting` for what that gives.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from primia_jax import durable, federated
from primia_jax.secagg import meeting
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused
from primia_jax.types import Key

from .processes import Joined

_RECORDS = "states.json"


class Record(NamedTuple):
  """A site's record of one round: the digest of the global state, and the sites of the round."""

  state: str
  sites: tuple[int, ...]


Step = Callable[[Key, federated.State, federated.Sites], tuple[federated.State, federated.Info]]


def digest(state: federated.State, settings: bytes) -> bytes:
  """SHA-256 of all that the sites share of a state, and of the settings of their run.

  The best model so far is not part of it: it is reported, and no site trains from it.
  """
  out = hashlib.sha256(hashlib.sha256(settings).digest())
  for path, leaf in jax.tree_util.tree_leaves_with_path(state._replace(site_state=())):
    a = np.asarray(leaf)
    out.update(repr((jax.tree_util.keystr(path), a.dtype.str, a.shape)).encode())
    out.update(a.tobytes())
  return out.digest()


def agree(
  joined: Joined, number: int, initial: federated.State, state: federated.State, told: bytes
) -> list[bytes]:
  """Agrees with all other sites on the state to start from, before anything is trained.

  Records of later rounds are dropped: these rounds are repeated.

  Args:
    joined: this process's.
    number: of its site.
    initial: the state before the first round, as this process makes it from the settings.
    state: the same, or what it has read from a checkpoint.
    told: what this site tells all others.

  Returns:
    What the sites have told, this one first.

  Raises:
    Refused: this site has recorded another state of that round, or as `meeting.check`.
    Lost: the others do not come in time.
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
  meeting.publish(joined.meeting, made)
  starts = meeting.gather(joined.meeting, msg.Start, len(joined.pinned.sites), joined.timeout)
  starts[number] = made
  label, colluding = joined.exchange.label, joined.num_colluding
  sites = meeting.check(starts, joined.pinned, label, number, colluding)
  joined.exchange.bind(found)
  _write(path, records | {now: Record(found.hex(), sites)})
  return [told, *(starts[i].told for i in sorted(starts) if i != number)]


def recorded(joined: Joined, step: Step) -> Step:
  """The step of a round, which then records its state: before the next sum, or a save."""

  def recorded_step(key: Key, state: federated.State, sites: federated.Sites):
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
