"""A hospital's own process in a federated run: its place, its folder, and how it meets the others.

The process holds the site's images, keys and secrets, and trains. It speaks to nobody but the
SuperNode on its machine, through a local channel (`primia_jax.flower`), which carries signed
messages and masked updates to the coordinator. All that it keeps lies in a folder of its own,
closed to other users: identity, ledger, records of the global states that it has seen, and its run
with its own copy of the global model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from primia_jax import approval, sites, summation
from primia_jax.flower import channel
from primia_jax.secagg import Aborted, SecureSum, exchange, meeting, pinning, returning, roster
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import Carrier
from primia_jax.secagg.errors import Refused

from . import admission, messages_crossed, opened
from .configs import Train
from .configs.scoring import Evaluate
from .crossings import Crossing

RUN = "run"  # of a site's run, in its folder


class Joined(NamedTuple):
  """What a process needs to agree with the others, where each site has one.

  Attributes:
    exchange: its end of all sums.
    pinned: the identities of all.
    settings: of the run, as bytes; the digest of what its operator approved, if there is one.
    own: the folder of what it keeps of the run.
    carrier: to the coordinator.
    num_colluding: sites that may collude with the coordinator.
    is_back: it was lost, and comes back to a run that goes on.
    site: whose own folder says what it may train; None without.
    openings: where it writes down the sums that it opens.
  """

  exchange: exchange.Exchange
  pinned: exchange.Pinned
  settings: bytes
  own: pathlib.Path
  carrier: Carrier
  num_colluding: int
  is_back: bool = False
  site: admission.Site | None = None
  openings: opened.Keeper | None = None


class Place(NamedTuple):
  """Where the sites of an arm run.

  Attributes:
    placement: of the site axis.
    joined: where each site has a process; None where one process plays all.
    number: of this process's site; 0 where one process plays all.
  """

  placement: sites.Placement
  joined: Joined | None = None
  number: int = 0

  def masked(
    self, config: SecureSum, coding: summation.Coding | None = None
  ) -> summation.Summation:
    """How a masked sum forms over these sites."""
    if self.joined is None:
      return summation.masked(config, coding)
    return summation.over(self.joined.exchange, config, coding)

  def missing(self, num_sites: int) -> set[int]:
    """Sites that a run between processes has lost."""
    return set(range(num_sites)).difference(self.joined.exchange.sites) if self.joined else set()

  def crossed(self) -> list[Crossing]:
    """What this process has told the others, and they it."""
    return messages_crossed.listed(self.joined.own / messages_crossed.FILE) if self.joined else []

  @contextlib.contextmanager
  def together(self) -> Iterator[None]:
    """While the sites sum: the coordinator is told at once if this one cannot go on, or is done."""
    if self.joined is None:
      yield
      return
    with leaving(self.joined.carrier, self.number):
      yield
    self.joined.exchange.close()


class Seat(NamedTuple):
  """A process's place in a run.

  Attributes:
    number: of its site.
    timeout: seconds for which it waits for the coordinator's next message: longer than a stage may
      take.
    own: the folder of its own, from `own_folder`.
    site: if `primia-site` has made that folder; the run was admitted.
    channel: the folder of the channel to the SuperNode, if it is another one.
  """

  number: int
  timeout: float
  own: pathlib.Path
  site: admission.Site | None = None
  channel: pathlib.Path | None = None


def sites_folder(folder: pathlib.Path, named: str) -> pathlib.Path:
  """Where the sites' own folders lie: as named, or beside the run folder.

  Raises:
    ValueError: it is within the run folder, which is the coordinator's.
  """
  folder = folder.resolve()
  place = pathlib.Path(named).resolve() if named else folder.with_name(f"{folder.name}.sites")
  if place.is_relative_to(folder):
    raise ValueError(
      f"sites_dir={named} is within the run folder, which is the coordinator's; name another one"
    )
  return place


def own_folder(place: pathlib.Path, number: int) -> pathlib.Path:
  """A site's own folder, made where it is missing.

  Raises:
    ValueError: other users can read it, or it belongs to one of them.
  """
  own = place / f"site_{number}"
  place.mkdir(parents=True, exist_ok=True)
  own.mkdir(mode=0o700, exist_ok=True)
  check_own(own)
  return own


def check_own(own: pathlib.Path) -> None:
  """Refuses a site's folder that others can read.

  Raises:
    ValueError: other users can read it, or it belongs to one of them.
  """
  found = own.stat()
  if found.st_mode & 0o077 or found.st_uid != os.getuid():
    raise ValueError(
      f"{own} holds the secrets of a site, and other users can read it or own it; chmod it to 700, "
      "or use another folder"
    )


def connect(
  config: Train | Evaluate, seat: Seat, told: bytes = b""
) -> tuple[Place, dict[int, bytes]]:
  """Opens the channel for the site's SuperNode, and meets the others; see `meet`."""
  return meet(config, Carrier(*channel.serve(seat.channel or seat.own, seat.timeout)), seat, told)


def meet(
  config: Train | Evaluate, carrier: Carrier, seat: Seat, told: bytes = b""
) -> tuple[Place, dict[int, bytes]]:
  """Says hello to the others with this site's own identity, and checks theirs.

  They are those of the roster that this site has accepted (`secagg.pinning`), whose digest is then
  in every signature. Without a roster the first meeting pins them. What its operator approved is
  in every signature, too, and all must have approved the same. A site that was lost in a run which
  goes on is shown what all have said at its meeting, instead (`secagg.returning`).

  Args:
    config: of the run.
    carrier: to the coordinator.
    seat: of this process.
    told: what all others may know of this site.

  Returns:
    (this process's place, what each site has told).

  Raises:
    Lost: the coordinator or the others do not come in time.
    Refused: a site shows another identity than the roster's, or than at an earlier start, or its
      operator approved something else; or a run that goes on cannot take this site back.
  """
  num_sites, site = config.hospitals.num_sites, seat.site
  approved = b"" if site is None else approval.digest(site.approved)
  settings = approved or settings_of(config)
  known = pinning.needed(seat.own)
  if known is not None:
    roster.check_numbers(known)
  identity = meeting.own_identity if known is None else pinning.own_identity
  own, kept = identity(seat.own / "identity"), seat.own if site is None else site.run
  kept.mkdir(mode=0o700, parents=True, exist_ok=True)
  carrier = messages_crossed.written_down(carrier, kept / messages_crossed.FILE)
  with leaving(carrier, seat.number):
    called = meeting.invited(carrier)
    is_back = isinstance(called, msg.Recalled)
    if isinstance(called, msg.Recalled):
      invitation, hellos = returning.met(called, seat.number, num_sites)
      _check_return(config, seat.number, hellos[seat.number].told == approved + told)
    else:
      invitation = called
      made = meeting.hello(own, seat.number, invitation, approved + told)
      hellos = meeting.tell_all(carrier, made, num_sites)
    first = None if known is None else pinning.pinned(known, own)
    known_file = seat.own / "identities.json"
    pinned = meeting.pin(hellos, invitation, own, seat.number, first or known_file)
    _check_approved(seat.number, approved, {i: one.told for i, one in hellos.items()})
    run = settings + b"".join(msg.encode(hellos[i]) for i in range(num_sites))
    run += b"" if known is None else roster.digest(known)
  sums = exchange.Exchange(carrier, seat.number, pinned, run)
  openings = opened.keeper(seat.own, seat.number, known)
  sums.opens = functools.partial(opened.note, openings)
  colluding = config.aggregation.num_colluding(num_sites)
  joined = Joined(sums, pinned, settings, kept, carrier, colluding, is_back, site, openings)
  place = Place(sites.own_process(seat.number), joined, seat.number)
  return place, {i: message.told[len(approved) :] for i, message in hellos.items()}


def _check_return(config: Train | Evaluate, number: int, is_same: bool) -> None:
  """Refuses to come back to an evaluation, a run whose ledger cannot go on, or with new images."""
  refuse = functools.partial(Refused, number, "start", "inconsistent")
  if not isinstance(config, Train):
    raise refuse("an evaluation goes on without this site; it takes part in the next one")
  if (p := config.privacy).is_charged_whole:
    raise refuse(
      f"with dp_noise={p.dp_noise} each start is charged a whole run, and must be a start of all: "
      "this site takes part again when all start again"
    )
  if not is_same:
    raise refuse(
      "its images or its approval have changed since the run began; it takes part again when all "
      "start again"
    )


def _check_approved(number: int, approved: bytes, told: Mapping[int, bytes]) -> None:
  """Refuses sites whose operator approved something else; all signatures would differ, and not say
  why.
  """
  if others := [i for i, said in told.items() if not said.startswith(approved)]:
    theirs = roster.spoken(told[others[0]][: len(approved)])
    raise Refused(
      number,
      "hello",
      "inconsistent",
      f"site {others[0]} has approved {theirs}, and this site {roster.spoken(approved)}; compare "
      "the digests that primia-site approve printed, and the configurations",
    )


@contextlib.contextmanager
def leaving(carrier: Carrier, number: int) -> Iterator[None]:
  """Tells the coordinator at once when this site cannot go on.

  It is told the reason only where the protocol gave it: other errors may name what is the site's.
  """
  try:
    yield
  except BaseException as error:
    reason = str(error) if isinstance(error, Aborted) else "an error; its own log says which"
    with contextlib.suppress(OSError):
      carrier.say(msg.encode(msg.Ended(number, reason.encode())))
    carrier.close()
    raise


def settings_of(config: Train | Evaluate) -> bytes:
  """The settings of a run, as all sites agree on them."""
  return json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
