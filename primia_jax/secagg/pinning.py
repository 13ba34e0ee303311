"""Which roster a member trusts: the one whose digest its operator compared with the others'.

The operators compare a roster's digest over a channel that they trust, such as the telephone, and
only then does a member `accept` it: no key is trusted because it came first. A member remembers the
highest serial number that it accepted, and refuses an older roster, so that a key which was revoked
stays revoked. A roster in which keys were only rotated needs no telephone call, since the old keys
have signed the new ones. Whatever else changes (members, names, revoked keys, a key without such a
signature) needs the digest again.

Who learns what: see `roster`; nothing is secret but the identity. Assuming that Ed25519 is
unforgeable and SHA-256 has no collisions, whoever carries rosters can keep sites apart, but cannot
give a site another's key. Whoever steals a key can rotate it, until the others accept a roster that
revokes it.
"""

from __future__ import annotations

import json
import pathlib
import re

from primia_jax import durable
from primia_jax.secagg import keys, roster
from primia_jax.secagg.errors import Refused
from primia_jax.secagg.exchange import Pinned
from primia_jax.secagg.roster import Roster

FILE, SEEN = "roster.json", "roster_seen.json"  # in a member's folder
NEXT = "identity_next"  # there: the key that was made last, until a roster has it
_MARKS = FILE, SEEN, "site.toml"  # that one was accepted, or must be


def own_identity(path: pathlib.Path) -> keys.Identity:
  """The identity in a file, which must be there: a fresh one would be a stranger to all others.

  A key that was rotated takes its place here, if a crash has kept it from that when the roster was
  accepted.

  Raises:
    FileNotFoundError, ValueError: the file is missing, or holds no private key.
  """
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: the identity is missing; restore it. A new one is a stranger to the others, who "
      "must revoke the old one and compare fingerprints again"
    )
  own, new = kept(path), path.with_name(NEXT)
  if path.name == NEXT or not new.is_file() or not (path.parent / FILE).is_file():
    return own
  known = {member.public for member in roster.decode((path.parent / FILE).read_bytes()).members}
  if own.public in known or kept(new).public not in known:
    return own
  new.replace(path)
  durable.sync_folder(path.parent)
  return kept(path)


def kept(path: pathlib.Path) -> keys.Identity:
  """The identity in a file.

  Raises:
    FileNotFoundError, ValueError: there is no file, or it holds no private key.
  """
  private = path.read_bytes()
  if len(private) != keys.KEY_BYTES:
    raise ValueError(f"{path} has {len(private)} bytes and is not a private key; restore it")
  return keys.identity(private)


def changes(held: Roster, new: Roster) -> tuple[list[str], list[str]]:
  """What differs: keys that were rotated, and all else, which people must confirm; in words."""
  rotated, other = [], []
  revoked = {*held.revoked, *new.revoked}
  before = {(m.number, m.name): m for m in held.members}
  after = {(m.number, m.name): m for m in new.members}
  if held.federation != new.federation:
    other.append(f"the federation {held.federation} is now {new.federation}")
  for key, member in after.items():
    who = f"{member.role} {member.name}"
    if key not in before:
      other.append(f"{who} is new")
    elif member.public != before[key].public:
      chain = [rotation.old for rotation in member.rotations]
      at = chain.index(before[key].public) if before[key].public in chain else None
      if at is None or revoked & set(chain[at:]):
        other.append(f"{who} has another key, which a key in force has not signed")
      else:
        rotated.append(f"{who} has rotated its key")
  other += [f"{m.role} {m.name} is gone" for key, m in before.items() if key not in after]
  if gone := set(held.revoked) - set(new.revoked):
    other.append(f"{len(gone)} revoked keys are no longer revoked")
  if added := set(new.revoked) - set(held.revoked):
    other.append(f"{len(added)} more keys are revoked")
  return rotated, other


def accept(
  folder: pathlib.Path, data: bytes, own: keys.Identity, confirmed: str = ""
) -> tuple[Roster, list[str]]:
  """Takes a roster as this member's own, and remembers it.

  Args:
    folder: of this member.
    data: the roster's file, from whoever carried it.
    own: this member's identity.
    confirmed: the digest that the operator compared with the other operators, in hexadecimal
      digits; empty where keys were only rotated.

  Returns:
    The roster, and what changed, in words.

  Raises:
    ValueError: as `roster.decode`, or the digest given is no digest.
    Refused: the roster is older than one accepted before, is another one of the same serial, lacks
      this member's key, or changes what the operator has not confirmed.
  """
  new = roster.decode(data)
  numbers = [n for n, member in new.sites.items() if member.public == own.public]
  found, site = roster.digest(new), numbers[0] if numbers else -1
  refuse = lambda reason, detail: Refused(site, "roster", reason, detail)
  told = re.sub("[ :\n]", "", confirmed.lower())
  if confirmed and not re.fullmatch("[0-9a-f]{64}", told):
    raise ValueError(f"the digest {confirmed!r} is none; it must have 64 hexadecimal digits")
  if own.public not in {member.public for member in new.members}:
    raise refuse("unknown", f"no member has this folder's key, {roster.fingerprint(own.public)}")
  seen = _seen(folder)
  if seen and new.serial < seen[0]:
    raise refuse("older", f"the roster has serial {new.serial}, and {seen[0]} was accepted before")
  if seen and new.serial == seen[0] and found != seen[1]:
    raise refuse("inconsistent", f"there are two rosters of serial {new.serial}; ask who made them")
  if confirmed and told != found.hex():
    raise refuse(
      "inconsistent",
      f"the roster's digest is {roster.spoken(found)}, and another one was confirmed: this "
      "member was sent another roster than the others",
    )
  if seen and found == seen[1]:  # accepted before; the file may have been lost in a crash
    durable.replace(folder / FILE, data)
    return new, []
  before = held(folder) if seen and (folder / FILE).is_file() else None
  rotated, other = changes(before, new) if before else ([], ["no roster was held here before"])
  if seen and new.serial != seen[0] + 1:  # a high one would keep every later roster out
    other.append(f"serial {new.serial} does not follow {seen[0]}")
  if other and not confirmed:
    raise refuse(
      "not confirmed",
      f"{'; '.join(other)}. Compare the digest {roster.spoken(found)} with the other operators by "
      "telephone, and accept the roster with it",
    )
  seen_now = {"serial": new.serial, "digest": found.hex()}
  durable.replace(folder / SEEN, roster.canonical(seen_now))  # first: it must never fall back
  durable.replace(folder / FILE, data)
  return new, [*rotated, *other]


def needed(folder: pathlib.Path) -> Roster | None:
  """The roster that a member must have; None where nothing says that one was ever accepted.

  A member that has lost its roster trusts nobody for having come first; raises as `held`.
  """
  return held(folder) if any((folder / name).exists() for name in _MARKS) else None


def held(folder: pathlib.Path) -> Roster:
  """The roster that a member accepted.

  Raises:
    FileNotFoundError: there is none.
    ValueError: the file is not the one that was accepted.
  """
  path, seen = folder / FILE, _seen(folder)
  if not path.is_file() or seen is None:
    raise FileNotFoundError(f"{path}: no roster was accepted; compare its digest, then accept it")
  found = roster.decode(path.read_bytes(), str(path))
  if (found.serial, roster.digest(found)) != seen:
    raise ValueError(
      f"{path} is not the roster of serial {seen[0]} that was accepted, or a crash came between; "
      "restore it, or accept that roster once more"
    )
  return found


def pinned(known: Roster, own: keys.Identity) -> Pinned:
  """The identities by which a member takes part in sums.

  Raises:
    Refused: its own key is not in the roster.
  """
  if own.public not in {member.public for member in known.members}:
    raise Refused(
      -1, "roster", "unknown", f"no member has the key {roster.fingerprint(own.public)}"
    )
  sites = {number: member.public for number, member in known.sites.items()}
  return Pinned(own, sites, known.coordinator.public)


def _seen(folder: pathlib.Path) -> tuple[int, bytes] | None:
  path = folder / SEEN
  if not path.is_file():
    return None
  try:
    found = json.loads(path.read_bytes())
    return int(found["serial"]), bytes.fromhex(found["digest"])
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{path} is damaged ({error!r}); restore it") from error
