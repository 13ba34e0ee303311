"""What `primia-site` does: it makes a member's folder, and rosters; it records approvals, and says
where a site stands. Each function prints what it did in two lines.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

from primia_jax import approval, durable
from primia_jax.privacy import histories
from primia_jax.privacy.chain import Chain
from primia_jax.secagg import keys, pinning, roster

from . import (
  approving,
  evaluations,
  imageless,
  inputs,
  ledger_table,
  ledgers,
  settings,
  site_folders,
)
from .configs import Train
from .configs.data import Data
from .evaluations import NO_MODEL, Finished
from .site_folders import COORDINATOR, SITE, Limits, Member, Own

_ROLES = (SITE, COORDINATOR)


@dataclasses.dataclass(frozen=True)
class Init:
  """Who this member is; with init."""

  number: int = settings.setting(-1, "this site's number, from 0; the coordinator has none")
  name: str = settings.setting("", "the institution's name: letters a to z, digits and hyphens")
  role: str = settings.setting(SITE, f"{SITE} or {COORDINATOR}, which has no images")


@dataclasses.dataclass(frozen=True)
class Join:
  """Who belongs to the federation; with roster."""

  federation: str = settings.setting("", "coordinator: name of a new federation")
  join: str = settings.setting("", "coordinator: files of public parts, separated by commas")
  leave: str = settings.setting("", "coordinator: names of members that leave, separated by commas")
  revoke: str = settings.setting(
    "", "coordinator: names of members whose key is revoked, separated by commas; give their new "
    "public part with join, or name them in leave, too"
  )  # fmt: skip
  accept: str = settings.setting("", "file of a roster to accept")
  digest: str = settings.setting(
    "",
    "the roster's digest, as compared with the other operators; needed unless keys were only "
    "rotated",
  )
  rotate: bool = settings.setting(
    False, "make a new key, which the old one signs; it counts from the next roster on"
  )
  renumber: bool = settings.setting(
    False, "offer the number that stands in site.toml now, after another site has left"
  )


@dataclasses.dataclass(frozen=True)
class Approve:
  """What may be trained or scored; with approve."""

  config: str = settings.setting("", "the configuration that the coordinator sent, config.json")


def init(site_dir: str, s: Init, own: Own, limits: Limits) -> None:
  """Makes a folder.

  Raises:
    ValueError, OSError: naming what is wrong; nothing is made.
  """
  settings.choose("role", s.role, _ROLES)
  is_site = s.role == SITE
  folder = site_folders.named(site_dir)
  if folder.is_dir() and any(folder.iterdir()):
    raise ValueError(
      f"site_dir={site_dir} is not empty, and may hold a member's secrets; name another one"
    )
  if is_site and s.number < 0:
    raise ValueError(f"number={s.number}: give this site's number, from 0, as agreed")
  if not is_site and (s.number >= 0 or own.data):
    raise ValueError(
      f"role=coordinator with number={s.number}, data={own.data!r}: the coordinator has no number "
      "and no images; a hospital that coordinates, too, has a folder for each role"
    )
  if is_site and not own.data:
    raise ValueError("data is empty; name this site's images, or --data=none if it has none")
  if is_site and own.data != site_folders.NO_IMAGES:
    inputs.source(Data(**dataclasses.asdict(own)))
  identity = keys.identity()
  number = s.number if is_site else None
  part = roster.offer(identity, roster.Member(number, s.name, identity.public))
  folder.mkdir(mode=0o700, parents=True, exist_ok=True)
  folder.chmod(0o700)
  durable.create(folder / site_folders.IDENTITY, identity.private)
  durable.create(folder / site_folders.PUBLIC, part)
  if is_site:
    Chain(folder / site_folders.LEDGER)
  site_folders.note(folder, "init", name=s.name, fingerprint=roster.fingerprint(identity.public))
  own = own if is_site else Own(site_folders.NO_IMAGES)
  site_folders.write(folder, Member(s.number, s.name, own, limits))  # last: it makes it a site's
  who = f"site {s.number}" if is_site else "the coordinator"
  print(f"made {folder} for {s.name}, {who}; fingerprint {roster.fingerprint(identity.public)}")
  if is_site:
    print(f"give {folder / site_folders.PUBLIC} to the coordinator; the key beside it stays here")
  else:
    print("collect the sites' public.json, and join them with primia-site roster --join")


def rosters(site_dir: str, s: Join) -> None:
  """Makes, accepts or lists a roster, or rotates the own key."""
  folder = site_folders.find(site_dir)
  member = site_folders.read(folder)
  makes = bool(s.join or s.leave or s.revoke)
  if makes + bool(s.accept) + s.rotate + s.renumber > 1:
    raise ValueError("join, leave and revoke, or accept, rotate or renumber: do one after another")
  if s.digest and not s.accept:
    raise ValueError(f"digest={s.digest!r} without accept; name the roster's file")
  if s.federation and not makes:
    raise ValueError(f"federation={s.federation!r} without join; name the members' public parts")
  if s.rotate:
    _rotate(folder)
  elif s.renumber:
    _renumber(folder, member)
  elif makes:
    _make(folder, member, s)
  elif s.accept:
    _accept(folder, _read("accept", s.accept), s.digest)
  else:
    _list(pinning.held(folder))


def _rotate(folder: pathlib.Path) -> None:
  path, place = folder / site_folders.PUBLIC, folder / pinning.NEXT
  known, old = roster.offered(path.read_bytes(), str(path)), site_folders.identity(folder)
  if not place.exists():
    durable.replace(place, keys.identity().private)
  new = pinning.own_identity(place)  # perhaps of an earlier start, which has not offered it yet
  if known.public == new.public:
    raise ValueError(f"{path} already offers a new key; accept a roster that has it first")
  made = roster.rotate(known, old, new)
  durable.replace(path, roster.offer(new, made))
  site_folders.note(folder, "rotate", fingerprint=roster.fingerprint(new.public))
  print(f"made a new key, signed by the old one; fingerprint {roster.fingerprint(new.public)}")
  print(f"give {path} to the coordinator; the old key is used until a roster has the new one")


def _renumber(folder: pathlib.Path, member: Member) -> None:
  path, own = folder / site_folders.PUBLIC, site_folders.identity(folder)
  if member.role == COORDINATOR:
    raise ValueError(f"{folder} is the coordinator's, which has no number")
  if (folder / pinning.NEXT).exists():
    raise ValueError(f"{path} offers a new key; accept a roster that has it first")
  offered = roster.Member(member.number, member.name, own.public)
  durable.replace(path, roster.offer(own, offered))
  site_folders.note(folder, "renumber", number=member.number)
  print(f"{member.name} offers to be site {member.number}, with the key that it has")
  print(f"give {path} to the coordinator, who joins it as the other site leaves")


def _make(folder: pathlib.Path, member: Member, s: Join) -> None:
  if member.role != COORDINATOR:
    raise ValueError(f"{folder} is the folder of a site; the coordinator makes the roster")
  before = pinning.held(folder) if (folder / pinning.FILE).is_file() else None
  if before and s.federation not in ("", before.federation):
    raise ValueError(f"federation={s.federation!r}: this folder's is {before.federation!r}")
  known = {m.name: m for m in before.members} if before else {}
  revoked = set(before.revoked) if before else set()
  for what, given in (("leave", s.leave), ("revoke", s.revoke)):
    if unknown := [name for name in settings.names(given) if name not in known]:
      raise ValueError(f"{what}={unknown[0]!r} is not a member; there are {', '.join(known)}")
  revoked |= {known[name].public for name in settings.names(s.revoke)}
  for name in settings.names(s.leave):
    del known[name]
  own = _read("site_dir", str(folder / site_folders.PUBLIC))
  parts = {name: _read("join", name) for name in settings.names(s.join)}
  for where, data in {str(folder / site_folders.PUBLIC): own, **parts}.items():
    part = roster.offered(data, where)
    known[part.name] = part
  serial = before.serial + 1 if before else 1
  name = before.federation if before else s.federation
  made = roster.make(name, serial, list(known.values()), sorted(revoked))
  data = roster.encode(made)
  _accept(folder, data, roster.digest(made).hex(), is_maker=True)
  _list(made, head=False)


def _accept(folder: pathlib.Path, data: bytes, digest: str, is_maker: bool = False) -> None:
  new = folder / pinning.NEXT
  offered, own = roster.decode(data), site_folders.identity(folder)
  rotates = new.exists() and pinning.own_identity(new).public in {m.public for m in offered.members}
  made, said = pinning.accept(folder, data, pinning.own_identity(new) if rotates else own, digest)
  site_folders.identity(folder)  # the new key takes its place
  spoken = roster.spoken(roster.digest(made))
  site_folders.note(folder, "roster", serial=made.serial, digest=roster.digest(made).hex())
  what = "made" if is_maker else "accepted"
  print(f"{what} roster {made.serial} of {made.federation}, {len(made.sites)} sites: "
        f"{'; '.join(said) or 'as before'}")  # fmt: skip
  print(
    f"send {folder / pinning.FILE} to all, and tell them its digest: {spoken}"
    if is_maker
    else f"its digest, which all others must have: {spoken}"
  )


def _list(known: roster.Roster, head: bool = True) -> None:
  if head:
    print(f"roster {known.serial} of {known.federation}, {len(known.revoked)} keys revoked")
    print(f"digest {roster.spoken(roster.digest(known))}")
  for member in known.members:
    number = "" if member.number is None else f" {member.number}"
    print(f"  {member.role + number:12} {member.name:16} {roster.fingerprint(member.public)}")
  try:
    roster.check_numbers(known)
  except ValueError as error:
    print(f"  nothing is trained yet: {error}")


def approve(site_dir: str, s: Approve, finished: Finished = NO_MODEL) -> None:
  """Records what may be trained, or which model may be scored."""
  folder = site_folders.find(site_dir)
  member = site_folders.read(folder)
  if evaluations.is_one(s.config):
    evaluations.approve(folder, member, s.config, finished.model)
    return
  if finished.model and s.config and pathlib.Path(s.config).expanduser().is_file():
    raise ValueError(
      f"model={finished.model}: {s.config or 'config'} is not the configuration of an evaluation; "
      "leave model out"
    )
  config = _config(s.config)
  approving.label_names(config)
  approving.check(config, member.limits)
  held = approving.held(config, member)
  if member.role == SITE and held.images:
    member.limits.policy().check_site(held.images)
  known = pinning.held(folder)
  if len(known.sites) != config.hospitals.num_sites:
    raise ValueError(
      f"num_sites={config.hospitals.num_sites} of {s.config}, and roster {known.serial} has "
      f"{len(known.sites)} sites; ask the coordinator which is right"
    )
  roster.check_numbers(known)
  offered = approving.offered(config)
  site_folders.record(folder, offered)
  size = sum(math.prod(shape) for _, _, shape in offered.parameters)
  d = config.data
  print(
    f"approved {offered.model} of {size:,} parameters, {config.training.rounds} rounds, "
    f"classes {', '.join(approving.label_names(config))}, images {d.image_size} x {d.image_size} x "
    f"{d.channels}; {approving.protection(config, held)}; here {held}"
  )
  print(f"digest, which all sites must have: {roster.spoken(approval.digest(offered))}")


def status(site_dir: str) -> None:
  """Says where the site stands."""
  folder = site_folders.find(site_dir)
  member, identity = site_folders.read(folder), site_folders.identity(folder)
  approved, did = site_folders.approved(folder), site_folders.notes(folder)
  who = f"site {member.number}" if member.role == SITE else member.role
  images = f"images in {member.own.data}, counted once a configuration is approved"
  if not member.has_images:
    images = imageless.WORD
  elif approved:
    images = str(_held(approved, member))
  print(f"{member.name}, {who}, fingerprint {roster.fingerprint(identity.public)}: {images}")
  said = ["no roster accepted"]
  if (folder / pinning.FILE).is_file():
    known = pinning.held(folder)
    said = [f"roster {known.serial} of {known.federation} with {len(known.sites)} sites"]
  digest = approved and roster.spoken(approval.digest(approved))[:19]
  what = "evaluation of " * _is_evaluation(approved)
  said.append(f"approved {what}{approved.model} ({digest} ...)" if approved else "nothing approved")
  said.append(f"{sum(one['did'] == 'round' for one in did)} rounds")
  if member.role == SITE:
    said.append(_budget(folder, member.limits))
  print("; ".join(said))


def ledger(site_dir: str) -> None:
  """Prints what all runs on the site's images were charged."""
  folder = site_folders.find(site_dir)
  member = site_folders.read(folder)
  if member.role != SITE:
    raise ValueError(f"site_dir={site_dir} is the coordinator's, which has no ledger")
  chain = Chain(folder / site_folders.LEDGER, read_only=True)
  print(
    f"{chain.path}: {len(histories.runs(chain))} runs charged; {_budget(folder, member.limits)}"
  )
  print(f"last entry {chain.last}")
  if histories.runs(chain):
    ledger_table.show(ledgers.summary(chain))


def _budget(folder: pathlib.Path, limits: Limits) -> str:
  spent = ledgers.spent(Chain(folder / site_folders.LEDGER, read_only=True))
  if not limits.max_epsilon:
    return f"epsilon {spent:.4g} spent, no limit set"
  left = max(0.0, limits.max_epsilon - spent)
  return f"epsilon {spent:.4g} of {limits.max_epsilon:g} spent, {left:.4g} left"


def _is_evaluation(approved: approval.Approval | None) -> bool:
  return approved is not None and approving.purpose(approved) == approving.EVALUATION


def _held(approved: approval.Approval, member: Member) -> approving.Held:
  if _is_evaluation(approved):
    return evaluations.held_here(evaluations.agreed(approved, member.own), member)
  return approving.held(_agreed(approved, member.own), member)


def _agreed(approved: approval.Approval, own: Own) -> Train:
  found = json.loads(approved.configuration)
  return settings.replace(Train(), **dataclasses.asdict(own), **found)


def _config(path: str) -> Train:
  if not path:
    raise ValueError("config is empty; name the configuration that the coordinator sent")
  saved = settings.load(_file("config", path))
  if unknown := set(saved) - set(settings.flat(Train())):
    raise ValueError(f"config={path} holds {sorted(unknown)}, which this version of the code lacks")
  return settings.replace(Train(), **saved)


def _file(name: str, value: str) -> pathlib.Path:
  path = pathlib.Path(value).expanduser()
  if not path.is_file():
    raise FileNotFoundError(f"{name}={value}: there is no such file; check the path")
  return path


def _read(name: str, value: str) -> bytes:
  return _file(name, value).read_bytes()
