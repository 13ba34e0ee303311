"""How a site that was lost comes back in a later round of the same run: what it gets, and checks.

Where a site is missing, the others look for it before each round (`secagg.returning`). One that is
back is given the global state, the best model so far, the weights of the classes and what the
others' ledgers hold. It has its own images, ledger and site state, as it last saved them.
"""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from primia_jax import federated
from primia_jax.privacy import ledger
from primia_jax.secagg import returning
from primia_jax.secagg.errors import Refused
from primia_jax.types import Array

from . import starts
from .processes import Joined

if TYPE_CHECKING:
  from .checkpoints import Best, Checkpoints

_DIGEST = 32  # bytes of that of the best model, which the weights of the classes follow


class Returned(NamedTuple):
  """What a site that is back goes on with.

  Attributes:
    kept: see `starts.Kept`.
    ledgers: what each site has told of its ledger; nothing of those that are missing.
    class_weights: [L] float32; None without.
  """

  kept: starts.Kept
  ledgers: dict[int, bytes]
  class_weights: Array | None


def roll_call(
  joined: Joined,
  number: int,
  state: federated.State,
  best: Best,
  class_weights: Array | None,
  path: pathlib.Path,
) -> None:
  """Before a round: takes back the sites that were lost and are there again, if any is missing.

  Args:
    joined: this process's.
    number: of its site.
    state, best: that all go on with.
    class_weights: [L] float32, or None.
    path: of the run's own file of its ledger.

  Raises:
    Lost, Refused: as `returning.roll_call`.
  """
  sums = joined.exchange
  if len(sums.sites) == len(joined.pinned.sites):
    return
  weights = b"" if class_weights is None else np.asarray(class_weights, np.float32).tobytes()
  common = starts.digest(best, joined.settings) + weights
  now = returning.Back(int(state.round), starts.digest(state, joined.settings), common, {})
  own = returning.start(sums, joined.pinned, number, now, ledger.public(path), sums.sites)
  give = lambda: starts.to_bytes(starts.Kept(state, best, ""))
  if back := returning.roll_call(joined.carrier, sums, joined.pinned, own, give):
    print(f"site {number}: {_named(back)} back from round {int(state.round) + 1} on")


def _named(sites: tuple[int, ...]) -> str:
  return f"site {sites[0]} is" if len(sites) == 1 else f"sites {[*sites]} are"


def come_back(
  joined: Joined, number: int, initial: starts.Kept, checkpoints: Checkpoints, path: pathlib.Path
) -> Returned:
  """Takes part again in a run that goes on.

  Args:
    joined: this process's, which `processes.meet` says is back.
    number: of its site.
    initial: what it has before the first round.
    checkpoints: its own.
    path: of the run's own file of its ledger.

  Raises:
    Lost, Refused: as `returning.come_back`, or what it is given is not what the others have signed.
  """
  like = initial
  if known := checkpoints.rounds:
    like = starts.Kept(*checkpoints.restore(initial.state, initial.best, max(known)))

  def take(back: returning.Back, data: bytes) -> starts.Kept:
    try:
      kept = starts.of_bytes(data, like)
    except ValueError as error:
      raise Refused(number, "start", "malformed", "the state that it is given") from error
    found = starts.digest(kept.state, joined.settings), starts.digest(kept.best, joined.settings)
    if found != (back.state, back.common[:_DIGEST]) or int(kept.state.round) != back.round:
      raise Refused(
        number, "start", "inconsistent", "the state that it is given is not what the others signed"
      )
    return kept

  told, links = ledger.public(path), (joined.carrier, joined.exchange, joined.pinned)
  back, kept = returning.come_back(*links, number, joined.num_colluding, take, told, tell=print)
  print(f"site {number}: is back from round {back.round + 1} on")
  weights = np.frombuffer(back.common[_DIGEST:], np.float32)
  ledgers = dict.fromkeys(joined.pinned.sites, b"") | {**back.own, number: told}
  return Returned(kept, ledgers, jnp.asarray(weights) if weights.size else None)
