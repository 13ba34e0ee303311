"""What a site that comes back, and the others, check of each other before it is in a sum again."""

import pytest
import secagg_carried
from secagg_apart import Apart

from primia_jax import secagg
from primia_jax.secagg import keys, meeting, returning
from primia_jax.secagg import messages as msg

APART = Apart(5)
SUMS, PINNED = APART.exchanges, APART.pinned
LEFT = (0, 1, 2, 3)  # site 4 was lost
NOW = returning.Back(7, b"d" * 32, b"common", {})


def starts(sites=LEFT, now=NOW, left=LEFT):
  """What sites say in a roll call, encoded."""
  made = {i: returning.start(SUMS[i], PINNED[i], i, now, b"own %d" % i, left) for i in sites}
  return {i: msg.encode(one) for i, one in made.items()}


def told_by(*messages):
  """A carrier whose coordinator says these."""
  ask, ends = secagg_carried.in_process([0], timeout=0.1)
  for message in messages:
    ask({0: msg.encode(message)}, 0.0)
  return ends[0]


def come_back(said, relayed=None, colluding=1):
  """What site 4 makes of it; it is relayed what it says, unless something else is given."""
  sums = APART.make(4, PINNED[4])
  own = returning.start(sums, PINNED[4], 4, NOW, b"own 4", LEFT)
  relayed = {4: msg.encode(own)} if relayed is None else relayed
  messages = msg.Recalled(b"", b"", {}), msg.Resumed(said, b"state"), msg.Relayed(relayed)
  take = lambda back, state: (back.state, state)
  found = returning.come_back(told_by(*messages), sums, PINNED[4], 4, colluding, take, b"own 4")
  return *found, sums


def test_a_site_goes_on_from_what_the_others_have_signed():
  back, taken, sums = come_back(starts())
  assert back == NOW._replace(own={i: b"own %d" % i for i in LEFT})
  assert taken == (NOW.state, b"state")
  assert sums.sites == (0, 1, 2, 3, 4)
  other = APART.make(0, PINNED[0])
  relayed = msg.Relayed({4: msg.encode(returning.start(SUMS[4], PINNED[4], 4, NOW, b"", LEFT))})
  assert other.chain != sums.chain
  own = msg.decode(starts()[0])
  other.resume(other.chain, LEFT)
  carried = told_by(msg.Returning((4,), 0), relayed)
  assert returning.roll_call(carried, other, PINNED[0], own, lambda: b"state") == (4,)
  assert other.sites == (0, 1, 2, 3, 4)


def forged():
  """Site 3's message, signed by a stranger."""
  stranger = PINNED[3]._replace(own=keys.identity())
  return starts() | {3: msg.encode(returning.start(SUMS[3], stranger, 3, NOW, b"", LEFT))}


def at_the_meeting():
  """A message of the meeting, which says the same state; with another text it is no roll call."""
  told = msg.decode(starts()[3]).told
  said = meeting.start(PINNED[3].own, SUMS[3].label, 3, 7, NOW.state, LEFT, told)
  return starts() | {3: msg.encode(said)}


OTHER = NOW._replace(state=b"e" * 32)


@pytest.mark.parametrize(
  ("said", "reason"),
  [
    (lambda: starts((0,)), "too few"),
    (lambda: {}, "too few"),
    (forged, "forged"),
    (at_the_meeting, "forged"),
    (lambda: starts() | {2: starts()[3]}, "forged"),
    (lambda: starts() | {4: starts()[3]}, "forged"),
    (lambda: starts() | {3: b"\xff"}, "forged"),
    (lambda: starts() | starts((3,), OTHER), "inconsistent"),
    (lambda: starts() | starts((3,), NOW._replace(common=b"other")), "inconsistent"),
    (lambda: starts() | starts((3,), NOW._replace(round=8)), "inconsistent"),
    (lambda: starts() | starts((3,), left=(0, 1, 3)), "inconsistent"),
    (lambda: starts(left=(0, 1, 2, 3, 4)), "inconsistent"),
  ],
)
def test_a_site_comes_back_only_to_what_enough_others_have_signed_alike(said, reason):
  with pytest.raises(secagg.Refused, match=f"site 4 refuses in stage start: {reason}"):
    come_back(said())


def test_each_site_is_to_give_the_state_before_the_return_is_refused():
  """A state that does not fit is answered with a word that the site waits, and not with its end."""
  sums, rounds = APART.make(4, PINNED[4]), range(7, 7 + len(LEFT))
  resumed = [msg.Resumed(starts(now=NOW._replace(round=r)), b"other") for r in rounds]

  def take(back, state):
    raise secagg.Refused(4, "start", "inconsistent", "it is another one")

  carried = told_by(msg.Recalled(b"", b"", {}), *resumed)
  with pytest.raises(
    secagg.Refused, match=r"sites \[0, 1, 2, 3\] were to give the state, one after"
  ):
    returning.come_back(carried, sums, PINNED[4], 4, 1, take)
  carried = told_by(msg.Recalled(b"", b"", {}), *resumed[1:])
  with pytest.raises(secagg.Lost):  # it waits for the fourth
    returning.come_back(carried, sums, PINNED[4], 4, 1, take)


def test_more_sites_must_sign_than_may_collude():
  assert come_back(starts((0, 1, 2)), colluding=2)[0].round == 7
  with pytest.raises(secagg.Refused, match="3 sites have signed the state; at least 4 must"):
    come_back(starts((0, 1, 2)), colluding=3)


def test_the_others_take_back_only_a_site_that_goes_on_from_their_state():
  own = msg.decode(starts()[0])
  of_4 = lambda now=NOW, pinned=PINNED[4]: msg.encode(
    returning.start(SUMS[4], pinned, 4, now, b"", LEFT)
  )
  for said, back in (
    ({4: of_4()}, (4,)),
    ({4: of_4(OTHER)}, ()),
    ({4: of_4(NOW._replace(common=b"other"))}, ()),
    ({4: of_4(pinned=PINNED[4]._replace(own=keys.identity()))}, ()),
    ({4: b"\xff"}, ()),
    ({3: starts()[3]}, ()),  # it was not lost
    ({}, ()),
  ):
    sums = APART.make(0, PINNED[0])
    sums.resume(sums.chain, LEFT)
    before = sums.chain
    carried = told_by(msg.Returning((4,), 1), msg.Relayed(said))
    assert returning.roll_call(carried, sums, PINNED[0], own, lambda: b"") == back
    assert (sums.chain == before) == (back == ())


def test_where_nobody_is_back_nothing_more_is_said():
  sums, own = APART.make(0, PINNED[0]), msg.decode(starts()[0])
  assert returning.roll_call(told_by(msg.Returning((), 0)), sums, PINNED[0], own, None) == ()
  with pytest.raises(secagg.Lost, match="site 0 is out of the run: it was late"):
    returning.roll_call(told_by(msg.Dismissed(b"it was late")), sums, PINNED[0], own, None)


def test_what_was_said_at_the_meeting_is_one_message_of_each():
  invitation = msg.Invitation(keys.identity().public, bytes(32))
  hellos = {i: meeting.hello(PINNED[i].own, i, invitation) for i in range(2)}
  said = {i: msg.encode(one) for i, one in hellos.items()}
  recalled = msg.Recalled(*invitation, said)
  assert returning.met(recalled, 0, 2) == (invitation, hellos)
  for wrong in ({0: said[0]}, said | {1: said[0]}, said | {1: b"\xff"}):
    with pytest.raises(secagg.Refused, match="refuses in stage hello"):
      returning.met(recalled._replace(hellos=wrong), 0, 2)
