"""What sites take of a sum: they open it themselves, and no coordinator can plant another one."""

import numpy as np
import pytest
from secagg_world import ROUND, play, resigned, total, world

from primia_jax import secagg
from primia_jax.secagg import following, keys, opening
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving

COORDINATOR = keys.identity()


def total_of(site, told):
  return opening.total(site, told, COORDINATOR.public)


@pytest.fixture(scope="module")
def opened():
  """A sum of five sites of which one drops out: the world, sites, server and evidence."""
  w = world()
  sites, server, _ = play(w, who=lambda stage, i: i != 3 or stage < 2)
  return w, sites, server, opening.evidence(server, COORDINATOR)


def refused(site, told):
  with pytest.raises(secagg.Refused, match=f"site {site.number} refuses in stage total") as caught:
    total_of(site, told)
  return caught.value.reason


def plain(vectors):
  return [v.tolist() for v in vectors]


def test_each_site_and_who_follows_opens_the_sum_of_the_survivors(opened):
  w, sites, server, told = opened
  told = msg.decode(msg.encode(told))
  whole = total(w, (0, 1, 2, 4))
  assert all(plain(total_of(sites[i], told)) == whole for i in (0, 1, 2, 4))
  parts = msg.apart(msg.decode(msg.encode(following.tell(server, told))))
  vectors, survivors = following.take(w.setup, ROUND, 9, parts, COORDINATOR.public)
  assert (plain(vectors), survivors) == (whole, (0, 1, 2, 4))
  assert len(msg.encode(told)) <= opening.message_bytes(w.setup)


def test_a_sum_opens_with_as_many_answers_as_the_threshold(opened):
  w, sites, _, told = opened
  enough = {i: told.answers[i] for i in list(told.answers)[: w.setup.threshold]}
  assert plain(total_of(sites[0], told._replace(answers=enough))) == total(w, (0, 1, 2, 4))
  few = {i: told.answers[i] for i in (0, 1)}
  assert refused(sites[0], told._replace(answers=few)) == "too few"


def planted(w, told, member, wanted):
  """What a coordinator passes on that plants a sum, with the key of one site of it."""
  message = msg.decode(told.masked[member])
  honest = total(w, (0, 1, 2, 4))
  shift = [np.uint32(a) - np.array(b, np.uint32) for a, b in zip(wanted, honest, strict=True)]
  vectors = tuple(v + s for v, s in zip(message.vectors, shift, strict=True))
  changed = resigned(w, message._replace(vectors=vectors))
  return told._replace(masked=told.masked | {member: msg.encode(changed)})


@pytest.mark.parametrize("protected", [True, False])
def test_one_false_sum_for_all_sites_cannot_be_planted_even_with_a_member(
  opened, monkeypatch, protected
):
  """The coordinator knows the sum, and a member then signs an input that makes it another one."""
  w, sites, _, told = opened
  wanted = [[7] * 6, [7]]
  attack = planted(w, told, 1, wanted)
  if not protected:  # without the digest that the sites signed before anything was opened
    monkeypatch.setattr(serving, "digest_of_inputs", lambda encoded: sites[0].lists.inputs)
    assert plain(total_of(sites[0], attack)) == wanted
    return
  assert {refused(sites[i], attack) for i in (0, 1, 2, 4)} == {"forged"}


def changed(told, site, field):
  """One byte or number of a message that is passed on, changed, without its sender's key."""
  message = msg.decode(getattr(told, field)[site])
  if field == "masked":
    message = message._replace(vectors=tuple(v ^ np.uint32(1) for v in message.vectors))
  else:
    message = message._replace(self_shares={i: bytes(32) for i in message.self_shares})
  return told._replace(**{field: getattr(told, field) | {site: msg.encode(message)}})


@pytest.mark.parametrize("protected", [True, False])
def test_what_a_coordinator_changes_without_a_member_is_not_signed(opened, monkeypatch, protected):
  """Without signatures and the digest of inputs, the changed input is in the sum."""
  w, sites, _, told = opened
  attack = changed(told, 2, "masked")
  if not protected:
    monkeypatch.setattr(keys, "verify", lambda *args: True)
    monkeypatch.setattr(serving, "digest_of_inputs", lambda encoded: sites[0].lists.inputs)
    assert plain(total_of(sites[0], attack)) != total(w, (0, 1, 2, 4))
    return
  assert refused(sites[0], attack) == "forged"
  assert refused(sites[0], changed(told, 2, "answers")) == "forged"


def test_evidence_of_another_attempt_roster_round_or_form_is_refused_by_name(opened):
  w, sites, server, told = opened
  _, other, _ = play(w)
  again = opening.evidence(other, COORDINATOR)
  roster = msg.decode(told.roster)
  fewer = msg.encode(roster._replace(adverts=roster.adverts[:-1]))
  for wrong, reason in (
    (again, "forged"),  # another attempt at this round, with keys of its own
    (told._replace(roster=again.roster), "forged"),
    (told._replace(roster=fewer), "forged"),
    (told._replace(roster=b"\xff"), "forged"),
    (told._replace(roster=msg.encode(server.lists)), "forged"),
    (told._replace(round=ROUND + 1), "another round"),
    (told._replace(masked={i: again.masked[i] for i in told.masked}), "forged"),
    (told._replace(masked=again.masked), "unknown"),
    (told._replace(masked={i: told.masked[i] for i in (0, 1, 2)}), "unknown"),
    (told._replace(answers=told.answers | {3: told.answers[0]}), "unknown"),
    (told._replace(masked=told.masked | {0: told.masked[1]}), "forged"),
    (told._replace(masked=told.masked | {0: bytes(10**6)}), "malformed"),
    (told._replace(answers=told.answers | {0: b""}), "malformed"),
    (msg.Consents(ROUND, {}), "malformed"),
  ):
    assert refused(sites[0], wrong) == reason, reason


def test_another_coordinator_than_the_pinned_one_passes_nothing_on(opened):
  _, sites, server, _ = opened
  with pytest.raises(secagg.Refused, match="not signed by the coordinator's pinned identity"):
    opening.total(sites[0], opening.evidence(server, keys.identity()), COORDINATOR.public)


def test_a_site_that_is_not_done_opens_nothing(opened):
  w, _, _, told = opened
  sites, _, _ = play(w, until=4)
  assert refused(sites[0], told) == "out of turn"


def test_sums_of_another_ring_open_as_well():
  w = world((0, 1, 2), sizes=(3,), num_bits=40)
  sites, server, _ = play(w)
  assert plain(total_of(sites[1], opening.evidence(server, COORDINATOR))) == total(w, (0, 1, 2))
