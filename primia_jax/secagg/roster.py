"""Who belongs to a federation: a list of long-lived Ed25519 keys that every site holds.

Each member makes its identity in its own folder and hands out a public part (`offer`). The
coordinator joins the parts into a roster and sends it to all; `pinning` says when a site takes it.
The digest belongs into the `run` bytes of an `exchange.Exchange`, so that sites with different
rosters refuse each other's messages.

A roster has a serial number, and each new one a higher one. A member changes its key by a rotation,
which the old key signs. A roster is public, and hides nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from primia_jax.secagg import keys

VERSION = 1
_NAME = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ROSTER, _PART, _ROTATION = (f"primia_jax {what} v1".encode() for what in ("roster", "part", "key"))


class Rotation(NamedTuple):
  """A key that a member had, and its signature of the key that came next."""

  old: bytes
  signature: bytes


class Member(NamedTuple):
  """A site or the coordinator.

  Attributes:
    number: of the site; None for the coordinator.
    name: letters a to z, digits and hyphens.
    public: its Ed25519 key, 32 bytes.
    rotations: its earlier keys, the oldest first.
  """

  number: int | None
  name: str
  public: bytes
  rotations: tuple[Rotation, ...] = ()

  @property
  def role(self) -> str:
    return "coordinator" if self.number is None else "site"


class Roster(NamedTuple):
  """All members of a federation.

  Attributes:
    federation: its name.
    serial: from 1; each new roster has a higher one.
    members: the coordinator, then the sites by number.
    revoked: public keys that no member may have again.
  """

  federation: str
  serial: int
  members: tuple[Member, ...]
  revoked: tuple[bytes, ...] = ()

  @property
  def coordinator(self) -> Member:
    return self.members[0]

  @property
  def sites(self) -> dict[int, Member]:
    return {m.number: m for m in self.members if m.number is not None}


def fingerprint(public: bytes) -> str:
  """SHA-256 of a public key in groups of four digits, as people compare it."""
  return _spaced(hashlib.sha256(public).hexdigest())


def make(
  federation: str, serial: int, members: Sequence[Member], revoked: Sequence[bytes] = ()
) -> Roster:
  """A roster in its one order.

  Raises:
    ValueError: for a bad name, number, serial or key, two members with one number, name or key, no
      or two coordinators, fewer than two sites, a revoked key, or a rotation that the old key has
      not signed.
  """
  if not _NAME.fullmatch(federation):
    raise ValueError(f"federation={federation!r}; use letters a to z, digits and hyphens")
  if type(serial) is not int or not 1 <= serial < 2**32:
    raise ValueError(f"serial={serial!r}; it must be an integer in [1, 2^32)")
  for member in members:
    _check(member)
  of = lambda what: f"{what.role} {what.name}"
  for name, value in (("number", 0), ("name", 1), ("public key", 2)):
    seen: dict[Any, Member] = {}
    for member in members:
      if name == "number" and member.number is None:
        continue
      if (other := seen.setdefault(member[value], member)) is not member:
        raise ValueError(
          f"{of(other)} and {of(member)} have one {name}; each member needs its own, made in its "
          "own folder"
        )
  coordinators = sum(member.number is None for member in members)
  if coordinators != 1:
    raise ValueError(f"the roster has {coordinators} coordinators; it must have one")
  if len(members) < 3:
    raise ValueError(f"the roster has {len(members) - 1} sites; a sum needs at least two")
  for key in revoked:
    if type(key) is not bytes or len(key) != keys.KEY_BYTES:
      raise ValueError(f"revoked: {key!r} is not a public key of {keys.KEY_BYTES} bytes")
  for member in members:
    if member.public in revoked:
      raise ValueError(f"the key of {of(member)} is revoked; it needs a new one")
  numbered = sorted(members, key=lambda m: -1 if m.number is None else m.number)
  return Roster(federation, serial, tuple(numbered), tuple(sorted(set(revoked))))


def encode(roster: Roster) -> bytes:
  """The file of a roster: JSON in one form, so that one roster has one digest."""
  return canonical(
    {
      "version": VERSION,
      "federation": roster.federation,
      "serial": roster.serial,
      "members": [_fields(member) for member in roster.members],
      "revoked": [key.hex() for key in roster.revoked],
    }
  )


def decode(data: bytes, where: str = "the roster") -> Roster:
  """The roster in a file.

  Raises:
    ValueError: it is none, of another version, not in the one form of `encode`, or as `make`; each
      fingerprint must be that of its key.
  """
  found = _parsed(data, where, {"version", "federation", "serial", "members", "revoked"})
  try:
    made = make(
      str(found["federation"]),
      found["serial"],
      [_member(fields) for fields in found["members"]],
      [bytes.fromhex(key) for key in found["revoked"]],
    )
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"{where} is wrong: {error}") from error
  if encode(made) != data:
    raise ValueError(f"{where} was edited by hand or damaged; ask for it again")
  return made


def digest(roster: Roster) -> bytes:
  """SHA-256 of the whole roster, 32 bytes: what belongs into every transcript."""
  return hashlib.sha256(_ROSTER + encode(roster)).digest()


def spoken(digest: bytes) -> str:
  """A digest as people compare it."""
  return _spaced(digest.hex())


def check_numbers(roster: Roster) -> None:
  """Refuses to train with sites whose numbers have gaps, as where one has left: all others would
  wait for sites that are not there.

  Raises:
    ValueError: naming the numbers, and the cure.
  """
  numbers, last = sorted(roster.sites), len(roster.sites) - 1
  if numbers != list(range(last + 1)):
    raise ValueError(
      f"the sites of roster {roster.serial} have the numbers {numbers}, and to train together they "
      f"must be 0 to {last}. Let the site with the highest number take a free one: it writes that "
      "into site.toml, and offers it with primia-site roster --renumber"
    )


def offer(own: keys.Identity, member: Member) -> bytes:
  """The public part of a member, as a file: it shows that the member has the private key.

  Raises:
    ValueError: the member has another key.
  """
  _check(member)
  if member.public != own.public:
    raise ValueError(f"{member.role} {member.name} has another key than this identity")
  fields = {"version": VERSION, "member": _fields(member)}
  return canonical({**fields, "proof": keys.sign(own.private, _PART + canonical(fields)).hex()})


def offered(data: bytes, where: str = "the public part") -> Member:
  """The member in a public part.

  Raises:
    ValueError: it is none, was edited, or is not signed by the key in it.
  """
  found = _parsed(data, where, {"version", "member", "proof"})
  try:
    member, proof = _member(found["member"]), bytes.fromhex(found["proof"])
    _check(member)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"{where} is wrong: {error}") from error
  fields = {"version": VERSION, "member": _fields(member)}
  signed = keys.verify(member.public, _PART + canonical(fields), proof)
  if not signed or canonical({**fields, "proof": proof.hex()}) != data:
    raise ValueError(f"{where} is not signed by the key in it; ask {member.name} for it again")
  return member


def rotate(member: Member, old: keys.Identity, new: keys.Identity) -> Member:
  """The member with a new key, which the old one signs.

  Raises:
    ValueError: `old` is not the member's identity.
  """
  if old.public != member.public:
    raise ValueError(f"{member.role} {member.name} has another key than the old identity")
  signature = keys.sign(old.private, _succession(member, old.public, new.public))
  rotations = (*member.rotations, Rotation(old.public, signature))
  made = member._replace(public=new.public, rotations=rotations)
  _check(made)
  return made


def _check(member: Member) -> None:
  if not _NAME.fullmatch(member.name):
    raise ValueError(f"name={member.name!r}; use letters a to z, digits and hyphens")
  if member.number is not None and (
    type(member.number) is not int or not 0 <= member.number < 2**32
  ):
    raise ValueError(f"number={member.number!r} of {member.name}; it must be in [0, 2^32)")
  chain = [*(rotation.old for rotation in member.rotations), member.public]
  if any(type(key) is not bytes or len(key) != keys.KEY_BYTES for key in chain):
    raise ValueError(f"{member.name}: a public key has {keys.KEY_BYTES} bytes")
  if len(set(chain)) < len(chain):
    raise ValueError(f"{member.name}: a key comes back after it was rotated; make a fresh one")
  for rotation, new in zip(member.rotations, chain[1:], strict=True):
    if not keys.verify(rotation.old, _succession(member, rotation.old, new), rotation.signature):
      raise ValueError(f"{member.name}: the old key has not signed the new one")


def _succession(member: Member, old: bytes, new: bytes) -> bytes:
  return _ROTATION + canonical([member.number, member.name, old.hex(), new.hex()])


def _fields(member: Member) -> dict[str, Any]:
  return {
    "number": member.number,
    "name": member.name,
    "role": member.role,
    "public_key": member.public.hex(),
    "fingerprint": fingerprint(member.public),
    "rotations": [[r.old.hex(), r.signature.hex()] for r in member.rotations],
  }


def _member(fields: dict[str, Any]) -> Member:
  rotations = tuple(Rotation(*map(bytes.fromhex, pair)) for pair in fields["rotations"])
  public = bytes.fromhex(fields["public_key"])
  member = Member(fields["number"], str(fields["name"]), public, rotations)
  if fields["fingerprint"] != fingerprint(public):
    raise ValueError(f"the fingerprint of {member.name} is not that of its key")
  if fields["role"] != member.role:
    raise ValueError(f"{member.name} is a {member.role} by its number, not a {fields['role']}")
  return member


def _parsed(data: bytes, where: str, names: set[str]) -> dict[str, Any]:
  try:
    found = json.loads(data)
  except ValueError as error:
    raise ValueError(f"{where} is not JSON ({error})") from error
  if not isinstance(found, dict) or found.get("version") != VERSION:
    version = found.get("version") if isinstance(found, dict) else None
    raise ValueError(f"{where} is of version {version!r}; this code reads version {VERSION}")
  if set(found) != names:
    raise ValueError(f"{where} has the fields {sorted(found)}; it must have {sorted(names)}")
  return found


def canonical(value: Any) -> bytes:
  """JSON in one form."""
  return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _spaced(digits: str) -> str:
  return " ".join(digits[i : i + 4] for i in range(0, len(digits), 4))
