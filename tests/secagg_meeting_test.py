"""How sites meet: their identities over several starts, and the state from which all start."""

import os
import stat

import pytest
import secagg_carried

from primia_jax import secagg
from primia_jax.secagg import exchange, keys, meeting
from primia_jax.secagg import messages as msg

SERVER = keys.identity()
OWN = [keys.identity() for _ in range(5)]
PINNED = exchange.Pinned(OWN[3], {i: k.public for i, k in enumerate(OWN)}, SERVER.public)
LABEL, STATE, EVERYBODY = b"l" * 32, b"s" * 32, (0, 1, 2, 3, 4)


INVITATION = msg.Invitation(SERVER.public, b"f" * 32)


def hellos(own=OWN, invitation=INVITATION):
  return {i: meeting.hello(k, i, invitation, b"told") for i, k in enumerate(own)}


def say(site, sites=EVERYBODY, state=STATE, round_index=7, label=LABEL, own=OWN):
  return meeting.start(own[site], label, site, round_index, state, sites)


def check(starts, number=3, colluding=1):
  return meeting.check({s.site: s for s in starts}, PINNED, LABEL, number, colluding)


def refused(reason):
  return pytest.raises(secagg.Refused, match=f"site 3 refuses in stage start: {reason}")


def test_an_identity_is_kept_where_its_owner_alone_reads_it(tmp_path):
  path = tmp_path / "identity"
  made = meeting.own_identity(path)
  assert meeting.own_identity(path) == made
  assert stat.S_IMODE(path.stat().st_mode) == 0o600
  assert os.listdir(tmp_path) == ["identity"]
  assert keys.verify(made.public, b"x", keys.sign(made.private, b"x"))
  path.write_bytes(b"short")
  with pytest.raises(ValueError, match=r"identity has 5 bytes and is not a private key"):
    meeting.own_identity(path)


def told_by(*messages):
  """A carrier whose coordinator says these; what the site answers."""
  ask, ends = secagg_carried.in_process([0], timeout=0.1)
  for message in messages:
    ask({0: message if isinstance(message, bytes) else msg.encode(message)}, 0.0)
  return ends[0]


def test_an_invitation_is_awaited_and_what_an_earlier_run_asks_is_left_unanswered():
  stale = msg.Evidence(3, b"", {}, {}, bytes(64))
  assert meeting.invited(told_by(stale, b"\xff", INVITATION)) == INVITATION
  with pytest.raises(secagg.Lost, match="no invitation of a coordinator"):
    meeting.invited(told_by(stale))


def test_what_all_sites_say_is_taken_whole_or_not_at_all():
  said = hellos(OWN[:2])
  relayed = lambda: msg.Relayed({i: msg.encode(one) for i, one in said.items()})
  all_of = lambda message: meeting.tell_all(told_by(message), said[0], 2)
  assert all_of(relayed()) == said
  wrong = msg.Relayed({0: msg.encode(said[0])})
  swapped = msg.Relayed({0: msg.encode(said[0]), 1: msg.encode(said[0])})
  other = msg.Relayed({0: msg.encode(said[1]), 1: msg.encode(said[1])})
  changed = said[0]._replace(told=b"x")
  own = msg.Relayed({0: msg.encode(changed), 1: msg.encode(said[1])})
  torn = msg.Relayed({0: b"\xff", 1: b""})
  for message, reason in (
    (wrong, "too few"),
    (swapped, "malformed"),
    (other, "malformed"),
    (own, "forged"),
    (torn, "malformed"),
    (msg.Word(1, b""), "malformed"),
    (b"\xff", "malformed"),
  ):
    with pytest.raises(secagg.Refused, match=f"site 0 refuses in stage hello: {reason}"):
      all_of(message)
  with pytest.raises(secagg.Lost, match="met no others: site 1 is gone"):
    all_of(msg.Dismissed(b"site 1 is gone"))
  with pytest.raises(secagg.Lost, match="met no others: a coordinator invites to another run"):
    all_of(INVITATION)
  with pytest.raises(secagg.Lost, match="has sent nothing"):
    meeting.tell_all(told_by(), said[0], 2)


def test_an_identity_that_changes_between_two_starts_is_refused_by_name(tmp_path):
  """Else the coordinator could take a site's place at a restart, or another its own."""
  known = tmp_path / "identities.json"
  first = meeting.pin(hellos(), INVITATION, OWN[3], 3, known)
  assert first == PINNED
  assert meeting.pin(hellos(), INVITATION, OWN[3], 3, known) == first
  own, stranger = [*OWN], keys.identity()
  own[1] = stranger
  another = INVITATION._replace(identity=stranger.public)
  for said, invitation, who in (
    (hellos(own), INVITATION, "site 1"),
    (hellos(invitation=another), another, "the coordinator"),
  ):
    with pytest.raises(secagg.Refused, match=f"changed key: {who} shows another identity"):
      meeting.pin(said, invitation, OWN[3], 3, known)
  mixed = hellos() | {1: hellos(invitation=another)[1]}
  with pytest.raises(secagg.Refused, match="site 1 was invited by another coordinator"):
    meeting.pin(mixed, INVITATION, OWN[3], 3, known)
  old = hellos(invitation=INVITATION._replace(fresh=b"o" * 32))
  with pytest.raises(secagg.Refused, match="forged: site 0's is not signed"):
    meeting.pin(old, INVITATION, OWN[3], 3, known)
  said = hellos()
  said[1] = said[1]._replace(told=b"another")
  with pytest.raises(secagg.Refused, match="forged: site 1's is not signed"):
    meeting.pin(said, INVITATION, OWN[3], 3, known)
  with pytest.raises(secagg.Refused, match="another identity stands in its own place"):
    meeting.pin(hellos(), INVITATION, stranger, 3, known)
  assert meeting.pin(hellos(), INVITATION, OWN[3], 3, PINNED) == PINNED  # of a roster
  with pytest.raises(secagg.Refused, match="site 1 shows another identity than in the roster"):
    meeting.pin(hellos(own), INVITATION, OWN[3], 3, PINNED)
  for damaged in ("", "7"):
    known.write_text(damaged)
    with pytest.raises(ValueError, match=r"identities\.json is damaged"):
      meeting.pin(hellos(), INVITATION, OWN[3], 3, known)


def test_a_site_starts_only_from_the_state_that_all_others_start_from():
  everybody = [say(i) for i in EVERYBODY]
  assert check(everybody) == EVERYBODY
  for wrong in (say(1, state=b"o" * 32), say(1, round_index=6)):
    with refused(r"inconsistent: sites \[1\] start from another state"):
      check([*everybody[:1], wrong, *everybody[2:]])
  stale = say(1, label=b"m" * 32)
  stranger = say(1, own=[keys.identity()] * 5)
  for wrong in (stale, stranger, say(1)._replace(sites=(0, 1))):
    with refused("forged: site 1's message"):
      check([*everybody[:1], wrong, *everybody[2:]])


def test_a_site_that_was_lost_takes_the_state_that_all_others_of_the_round_have_signed():
  """Site 3 was lost: without the others' record it would take any state that the host has made."""
  of_round = (0, 1, 2, 4)
  lost, others = say(3, ()), [say(i, of_round) for i in of_round]
  assert check([*others, lost]) == of_round
  with_it = [say(i) for i in of_round]  # it was killed after the sum and before its record
  assert check([*with_it, lost]) == EVERYBODY
  assert check([*others, lost], colluding=3) == of_round
  with refused("too few: it has no record of round 7"):
    check([*others, lost], colluding=4)
  with refused("too few"):  # site 1 was in the round, and does not say what came of it
    check([others[0], say(1, ()), *others[2:], lost])
  with refused("too few"):  # two of the sites tell of different rounds
    check([others[0], say(1, (0, 1, 2)), *others[2:], lost])
  with refused("too few"):
    check([*(say(i, ()) for i in of_round), lost])


@pytest.mark.parametrize(("signers", "enough"), [((0,), False), ((0, 1), True)])
def test_one_site_that_colludes_with_the_host_cannot_give_a_lost_site_a_state(signers, enough):
  """Two of which one is honest can: the honest one has recorded the state."""
  starts = [say(i, signers if i in signers else ()) for i in EVERYBODY]
  if enough:
    assert check(starts) == signers
    return
  with refused("too few"):
    check(starts)
