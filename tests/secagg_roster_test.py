"""Rosters: every attack on who belongs to a federation, and what a member accepts."""

import json
import stat

import pytest

from primia_jax import secagg
from primia_jax.secagg import keys, pinning, roster
from primia_jax.secagg.roster import Member

OWN = [keys.identity() for _ in range(4)]
STRANGER = keys.identity()


def members(own=OWN):
  named = [Member(i, f"hospital-{'abc'[i]}", own[i].public) for i in range(3)]
  return [*named, Member(None, "coordinator", own[3].public)]


def made(serial=1, of=None, revoked=()):
  return roster.make("lungs", serial, members() if of is None else of, revoked)


def with_member(member, serial=2):
  return made(serial, [m if m.name != member.name else member for m in members()])


def spoken(one):
  return roster.spoken(roster.digest(one))


def take(folder, one, confirmed="", own=OWN[0]):
  return pinning.accept(folder, roster.encode(one), own, confirmed)


def refused(reason):
  return pytest.raises(secagg.Refused, match=f"site 0 refuses in stage roster: {reason}")


@pytest.fixture
def folder(tmp_path):
  take(tmp_path, made(), spoken(made()))
  return tmp_path


def test_a_roster_is_written_and_read_in_one_form():
  one = made(3, members()[::-1], [STRANGER.public])
  assert one == made(3, revoked=[STRANGER.public]) == roster.decode(roster.encode(one))
  assert one.coordinator.name == "coordinator"
  assert [*one.sites] == [0, 1, 2]
  assert len(roster.digest(one)) == 32
  others = [made(4), made(3), with_member(Member(1, "hospital-b", STRANGER.public), 3)]
  assert len({roster.digest(r) for r in [one, *others]}) == 4
  assert roster.fingerprint(OWN[0].public).replace(" ", "") not in roster.encode(one).decode()


def test_nobody_is_trusted_because_he_came_first(tmp_path):
  with refused("not confirmed: no roster was held here before. Compare the digest"):
    take(tmp_path, made())
  with pytest.raises(FileNotFoundError, match="no roster was accepted"):
    pinning.held(tmp_path)
  other = with_member(Member(1, "hospital-b", STRANGER.public))
  with refused("inconsistent: the roster's digest is .* another one was confirmed"):
    take(tmp_path, other, spoken(made()))
  with pytest.raises(ValueError, match="must have 64 hexadecimal digits"):
    take(tmp_path, made(), "yes")
  assert take(tmp_path, made(), spoken(made()).upper())[0] == pinning.held(tmp_path) == made()
  assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
  assert pinning.pinned(made(), OWN[0]).server == OWN[3].public


def test_a_swapped_key_is_refused(folder):
  """Whoever carries the rosters puts a key of their own in a hospital's place."""
  swapped = with_member(Member(1, "hospital-b", STRANGER.public))
  with refused("not confirmed: site hospital-b has another key, which a key in force"):
    take(folder, swapped)
  with refused("inconsistent: there are two rosters of serial 1"):
    take(folder, with_member(Member(1, "hospital-b", STRANGER.public), serial=1))
  with refused("not confirmed: coordinator coordinator has another key"):
    take(folder, with_member(Member(None, "coordinator", STRANGER.public)))
  own_key = with_member(Member(0, "hospital-a", STRANGER.public))
  with pytest.raises(secagg.Refused, match="unknown: no member has this folder's key"):
    take(folder, own_key, spoken(own_key))
  assert pinning.held(folder) == made()


def test_a_new_member_or_one_that_left_needs_the_telephone(folder):
  more = made(2, [*members(), Member(7, "hospital-x", STRANGER.public)])
  fewer = made(2, members()[:2] + members()[3:])
  renamed = made(2, [*members()[1:], Member(0, "hospital-z", OWN[0].public)])
  for one, said in (
    (more, "site hospital-x is new"),
    (fewer, "site hospital-c is gone"),
    (renamed, "site hospital-z is new; site hospital-a is gone"),
  ):
    with refused(f"not confirmed: {said}"):
      take(folder, one)
  assert take(folder, more, spoken(more))[1] == ["site hospital-x is new"]
  assert pinning.held(folder) == more


def test_an_older_roster_is_refused(folder):
  """Else a key that was stolen and revoked would come back with the roster that still has it."""
  fresh = keys.identity()
  later = made(2, [m if m.number != 1 else m._replace(public=fresh.public) for m in members()])
  later = roster.make("lungs", 2, later.members, [OWN[1].public])
  assert "1 more keys are revoked" in take(folder, later, spoken(later))[1]
  with refused("older: the roster has serial 1, and 2 was accepted before"):
    take(folder, made(), spoken(made()))
  (folder / pinning.FILE).unlink()  # nor does the loss of the file help
  with refused("older"):
    take(folder, made(), spoken(made()))
  assert take(folder, later) == (later, [])  # the one that was accepted may be put back
  assert pinning.held(folder) == later


def test_whoever_carries_a_roster_cannot_keep_later_ones_out(folder):
  """The roster that is held, with the highest serial, would make all others older."""
  with refused("not confirmed: serial 4294967295 does not follow 1"):
    take(folder, made(2**32 - 1))
  assert take(folder, made(2)) == (made(2), [])


def test_two_members_with_one_key_number_or_name_are_refused():
  """With two places in one hand, a sum over three is a sum over two."""
  a, b, c, server = members()
  for wrong, said in (
    ([a, b._replace(public=a.public), c, server], "site hospital-a and site hospital-b have one p"),
    ([a, b, c, server._replace(public=a.public)], "site hospital-a and coordinator coordinator"),
    ([a, b._replace(number=0), c, server], "hospital-a and site hospital-b have one number"),
    ([a, b._replace(name="hospital-a"), c, server], "have one name"),
    ([a, b, c], "has 0 coordinators"),
    ([a, b, server, server._replace(name="x", public=STRANGER.public)], "has 2 coordinators"),
    ([a, server], "has 1 sites; a sum needs at least two"),
    ([a, b._replace(public=b"short"), server], "hospital-b: a public key has 32 bytes"),
    ([a, b._replace(number=-1), server], "number=-1 of hospital-b"),
    ([a, b._replace(name="../b"), server], r"name='\.\./b'; use letters"),
  ):
    with pytest.raises(ValueError, match=said):
      made(of=wrong)
  for federation, serial in (("", 1), ("lungs", 0), ("lungs", True), ("lungs", 2**32)):
    with pytest.raises(ValueError, match=r"federation=|serial="):
      roster.make(federation, serial, members())
  with pytest.raises(ValueError, match="the key of site hospital-b is revoked"):
    made(revoked=[b.public])


def edit(change):
  found = json.loads(roster.encode(made()))
  change(found)
  return roster.canonical(found)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda r: r["members"][1].update(public_key=STRANGER.public.hex()), "the fingerprint of"),
    (lambda r: r["members"][1].update(role="coordinator"), "is a site by its number"),
    (lambda r: r["members"].reverse(), "was edited by hand or damaged"),
    (lambda r: r["members"][1].update(note="x"), "was edited by hand or damaged"),
    (lambda r: r.update(version=2), "is of version 2; this code reads version 1"),
    (lambda r: r.update(more=1), "has the fields"),
    (lambda r: r["members"][1].pop("name"), "is wrong: 'name'"),
    (lambda r: r.update(members=7), "is wrong"),
    (lambda r: r["members"].append("x"), "is wrong"),
    (lambda r: r.update(revoked=["zz"]), "is wrong"),
  ],
)
def test_an_edited_file_is_refused(change, said):
  with pytest.raises(ValueError, match=said):
    roster.decode(edit(change))
  for wrong in (b"", b"7", b"\xff", roster.encode(made()) + b"\n"):
    with pytest.raises(ValueError, match="the roster"):
      roster.decode(wrong)


def test_an_edited_file_in_the_own_folder_is_refused(folder):
  """Well-formed, with the fingerprint of the stranger's key: the digest gives it away."""
  path = folder / pinning.FILE
  path.write_bytes(roster.encode(with_member(Member(1, "hospital-b", STRANGER.public), serial=1)))
  with pytest.raises(ValueError, match="is not the roster of serial 1 that was accepted"):
    pinning.held(folder)
  with pytest.raises(ValueError, match="is not the roster of serial 1"):
    take(folder, made(2))
  path.write_bytes(roster.encode(made()))
  (folder / pinning.SEEN).write_text("{}")
  with pytest.raises(ValueError, match=r"roster_seen\.json is damaged"):
    pinning.held(folder)


def test_a_rotated_key_needs_no_telephone_and_a_chain_of_them_neither(folder):
  b, second, third = members()[1], keys.identity(), keys.identity()
  once = roster.rotate(b, OWN[1], second)
  twice = roster.rotate(once, second, third)
  assert take(folder, with_member(twice))[1] == ["site hospital-b has rotated its key"]
  assert pinning.held(folder).sites[1].public == third.public
  with pytest.raises(ValueError, match="another key than the old identity"):
    roster.rotate(b, STRANGER, third)
  with pytest.raises(ValueError, match="a key comes back after it was rotated"):
    roster.rotate(twice, third, OWN[1])


def test_a_rotation_that_the_old_key_has_not_signed_is_refused(folder):
  b = members()[1]
  forged = roster.Rotation(b.public, keys.sign(STRANGER.private, b"x"))
  with pytest.raises(ValueError, match="the old key has not signed the new one"):
    with_member(b._replace(public=STRANGER.public, rotations=(forged,)))
  own = roster.rotate(members()[2], OWN[2], STRANGER)  # another member's signature
  with pytest.raises(ValueError, match="the old key has not signed the new one"):
    with_member(b._replace(public=STRANGER.public, rotations=own.rotations))


def test_a_stolen_key_that_was_revoked_rotates_no_more(folder):
  stolen = roster.rotate(members()[1], OWN[1], STRANGER)
  others = [m for m in members() if m.number != 1]
  revoking = made(2, [*others, stolen], [OWN[1].public])
  with refused("not confirmed: site hospital-b has another key, which a key in force"):
    take(folder, revoking)
  assert take(folder, made(2, [*others, stolen]))[1]  # before, the thief can rotate


def test_a_public_part_is_signed_by_its_key():
  b = members()[1]
  part = roster.offer(OWN[1], b)
  assert roster.offered(part) == b
  assert OWN[1].private.hex() not in part.decode()
  with pytest.raises(ValueError, match="has another key than this identity"):
    roster.offer(STRANGER, b)
  found = json.loads(part)
  found["member"]["number"] = 2
  foreign = json.loads(part)
  foreign["proof"] = keys.sign(STRANGER.private, b"x").hex()
  for wrong in (found, foreign):
    with pytest.raises(ValueError, match="is not signed by the key in it; ask hospital-b"):
      roster.offered(roster.canonical(wrong))
  with pytest.raises(ValueError, match="the public part"):
    roster.offered(roster.encode(made()))


def test_an_identity_is_never_made_anew_by_chance(tmp_path):
  path = tmp_path / "identity"
  with pytest.raises(FileNotFoundError, match="the identity is missing; restore it"):
    pinning.own_identity(path)
  path.write_bytes(OWN[0].private)
  assert pinning.own_identity(path) == OWN[0]
  path.write_bytes(b"short")
  with pytest.raises(ValueError, match="is not a private key"):
    pinning.own_identity(path)
  with pytest.raises(secagg.Refused, match="no member has the key"):
    pinning.pinned(made(), STRANGER)
