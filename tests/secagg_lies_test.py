"""Messages that a site or the server must not send: each is rejected or refused by its name."""

import numpy as np
import pytest
from secagg_world import (
  ROUND,
  answer,
  begin,
  for_site,
  masked_input,
  play,
  resigned,
  total,
  without_last,
  world,
)

from primia_jax import secagg
from primia_jax.secagg import keys, protocol
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving

# What sites may do wrong, and what the server says: (stage, the wrong message from world, site and
# right one, reason).


MISDEEDS = [
  (0, lambda w, m: resigned(w, m._replace(mask_key=bytes(32))), "malformed"),
  (0, lambda w, m: resigned(w, m._replace(mask_key=m.box_key)), "malformed"),
  (0, lambda w, m: resigned(w, m._replace(box_key=b"short")), "malformed"),
  (0, lambda w, m: resigned(w, m._replace(commitment=b"")), "malformed"),
  (0, lambda w, m: m._replace(commitment=bytes(32)), "forged"),
  (0, lambda w, m: resigned(w, m._replace(site=4), identity=w.identities[1]), "forged"),
  (0, lambda w, m: resigned(w, m, b"other"), "forged"),
  (0, lambda w, m: resigned(w._replace(setup=world(sizes=(6, 2)).setup), m), "forged"),
  (0, lambda w, m: resigned(w, m._replace(site=5), identity=w.identities[1]), "unknown"),
  (0, lambda w, m: resigned(w, m._replace(round=ROUND + 1)), "another round"),
  (0, lambda w, m: m._replace(round=ROUND - 1), "another round"),
  (0, lambda w, m: m._replace(signature=b""), "forged"),
  (0, lambda w, m: msg.Roster(ROUND, ()), "malformed"),
  (0, lambda w, m: None, "malformed"),
  (1, lambda w, m: resigned(w, m._replace(boxes=without_last(m.boxes))), "malformed"),
  (1, lambda w, m: resigned(w, m._replace(boxes={**m.boxes, m.site: m.boxes[0]})), "malformed"),
  (1, lambda w, m: resigned(w, m._replace(boxes={**m.boxes, 0: b"short"})), "malformed"),
  (1, lambda w, m: m._replace(boxes={**m.boxes, 0: m.boxes[2]}), "forged"),
  (2, lambda w, m: resigned(w, m._replace(vectors=m.vectors[:1])), "malformed"),
  (2, lambda w, m: resigned(w, m._replace(vectors=(m.vectors[0][:-1], m.vectors[1]))), "malformed"),
  (
    2,
    lambda w, m: resigned(w, m._replace(vectors=tuple(v.astype(np.uint64) for v in m.vectors))),
    "malformed",
  ),
  (
    2,
    lambda w, m: resigned(w, m._replace(vectors=tuple(v | np.uint32(2**31) for v in m.vectors))),
    "malformed",
  ),
  (2, lambda w, m: m._replace(vectors=tuple(v ^ np.uint32(1) for v in m.vectors)), "forged"),
  (2, lambda w, m: m._replace(vectors=tuple(v.astype(np.float32) for v in m.vectors)), "malformed"),
  (3, lambda w, m: m._replace(signature=bytes(64)), "forged"),
  (3, lambda w, m: resigned(w, m), "forged"),  # lists that the server has not shown
  (4, lambda w, m: resigned(w, m._replace(self_shares=without_last(m.self_shares))), "malformed"),
  (4, lambda w, m: resigned(w, m._replace(mask_shares={0: bytes(32)})), "malformed"),
  (4, lambda w, m: resigned(w, m._replace(self_shares={**m.self_shares, 0: b""})), "malformed"),
  (4, lambda w, m: m._replace(self_shares={**m.self_shares, 0: bytes(32)}), "forged"),
]


@pytest.mark.parametrize("case", range(len(MISDEEDS)))
def test_a_site_s_misdeed_is_rejected_by_name_and_the_round_goes_on(case):
  bad_stage, wrong, reason = MISDEEDS[case]
  w = world(num_bits=31)
  said, server, out = begin(w), serving.start(w.setup, ROUND), None
  for stage in range(5):
    if stage:
      said = {i: answer(w, stage, said[i][0], for_site(out, i)) for i in said}
    for i, (_, message) in said.items():
      if stage == bad_stage and i == 1:
        bad = wrong(w, message)
        with pytest.raises(secagg.Rejected, match=reason) as rejected:
          serving.receive(server, bad)
        assert (rejected.value.reason, rejected.value.stage) == (reason, msg.STAGES[stage])
        assert rejected.value.site == getattr(bad, "site", None)
      server = serving.receive(server, message)
    server, out = (*serving.CLOSE, serving.open_total)[stage](server)
  assert [v.tolist() for v in out.total] == total(w, w.inputs)


def test_repeated_early_and_late_messages_are_rejected_by_name_at_every_stage():
  w = world()
  said, server, out, sent = begin(w), serving.start(w.setup, ROUND), None, []
  for stage in range(5):
    if stage:
      said = {i: answer(w, stage, said[i][0], for_site(out, i)) for i in server.received[stage - 1]}
    sent.append({i: m for i, (_, m) in said.items()})
    present = [i for i in said if i != stage or stage > 0]  # site 0 says nothing at first
    for i in present:
      server = serving.receive(server, said[i][1])
    for i in present:
      with pytest.raises(secagg.Rejected) as rejected:
        serving.receive(server, said[i][1])
      assert (rejected.value.site, rejected.value.reason) == (i, "repeated")
    for earlier in range(stage):
      with pytest.raises(secagg.Rejected) as rejected:
        serving.receive(server, sent[earlier][1])
      assert rejected.value.reason == "repeated"
    if stage:
      with pytest.raises(secagg.Rejected) as rejected:
        serving.receive(server, sent[0][0])
      assert (rejected.value.site, rejected.value.reason) == (0, "late")
    server, out = (*serving.CLOSE, serving.open_total)[stage](server)
  assert out.survivors == (1, 2, 3, 4)
  honest = [protocol.advertise(w.setup, ROUND, 1, w.identities[1])[1], *(s[1] for s in sent[1:])]
  fresh = serving.start(w.setup, ROUND)
  for message in honest[1:]:
    with pytest.raises(secagg.Rejected) as rejected:
      serving.receive(fresh, message)
    assert rejected.value.reason == "early"


def test_who_missed_a_stage_cannot_come_back():
  w = world()
  sites, server, out = play(w, 1)
  said = {i: answer(w, 1, s, out) for i, s in sites.items()}
  for i in (0, 1, 3, 4):
    server = serving.receive(server, said[i][1])
  server, out = serving.close_share_keys(server)
  boxes = {i: said[i][1].boxes[2] for i in (0, 1, 3, 4)}
  _, masked = answer(w, 2, said[2][0], msg.Delivery(ROUND, boxes))
  with pytest.raises(secagg.Rejected, match="missed stage share_keys") as rejected:
    serving.receive(server, masked)
  assert rejected.value.reason == "late"


def test_an_advert_with_another_site_s_keys_is_rejected():
  w = world()
  server = serving.start(w.setup, ROUND)
  said = begin(w)
  server = serving.receive(server, said[0][1])
  copied = resigned(w, said[0][1]._replace(site=1))
  with pytest.raises(secagg.Rejected, match="another site has advertised one of them") as rejected:
    serving.receive(server, copied)
  assert (rejected.value.site, rejected.value.reason) == (1, "malformed")


# What the server may do wrong, and what a site says: (stage, the wrong message from world and right
# one, reason).


def adverts(m, change):
  return m._replace(
    adverts=tuple(sorted(change.get(a.site, a) for a in m.adverts if change.get(a.site, a)))
  )


def swapped(m):
  a, b = m.adverts[0], m.adverts[2]
  return adverts(m, {2: b._replace(mask_key=a.box_key[::-1])})


def own_key_for(w, m, site):
  """The server in the middle: it puts keys of its own in a site's advert, and cannot sign them."""
  pair = keys.key_pair()
  return adverts(m, {site: m.adverts[site]._replace(box_key=pair.public)})


def old_advert(w, m, site):
  """A signed advert of another round."""
  return adverts(m, {site: protocol.advertise(w.setup, ROUND - 1, site, w.identities[site])[1]})


def lists(alive, dead, round_index=ROUND):
  return lambda w, m: msg.Survivors(round_index, alive, dead, bytes(32))


LIES = [
  (1, lambda w, m: swapped(m), "forged"),
  (1, lambda w, m: own_key_for(w, m, 3), "forged"),
  (1, lambda w, m: old_advert(w, m, 3), "forged"),
  (1, lambda w, m: own_key_for(w, m, 1), "changed key"),
  (1, lambda w, m: adverts(m, {1: None}), "changed key"),
  (1, lambda w, m: adverts(m, {2: resigned(w, m.adverts[3]._replace(site=2))}), "changed key"),
  (1, lambda w, m: adverts(m, {2: m.adverts[2]._replace(site=7)}), "unknown"),
  (1, lambda w, m: adverts(m, {3: None, 4: None}), "too few"),
  (1, lambda w, m: m._replace(adverts=m.adverts[::-1]), "malformed"),
  (1, lambda w, m: m._replace(adverts=(*m.adverts, m.adverts[4])), "malformed"),
  (1, lambda w, m: m._replace(round=ROUND + 1), "another round"),
  (1, lambda w, m: msg.Delivery(ROUND, {}), "malformed"),
  (2, lambda w, m: m._replace(boxes={**m.boxes, 0: m.boxes[2], 2: m.boxes[0]}), "forged"),
  (2, lambda w, m: m._replace(boxes={**m.boxes, 3: bytes(len(m.boxes[3]))}), "forged"),
  (2, lambda w, m: m._replace(boxes={**m.boxes, 1: m.boxes[0]}), "unknown"),
  (2, lambda w, m: m._replace(boxes={**m.boxes, 6: m.boxes[0]}), "unknown"),
  (2, lambda w, m: m._replace(boxes={0: m.boxes[0]}), "too few"),
  (
    2,
    lambda w, m: play(w, 2)[2][1],
    "forged",
  ),  # the same round, tried again: boxes under other keys
  (2, lambda w, m: m._replace(round=ROUND + 1), "another round"),
  (3, lists((0, 1, 2, 3, 4), (0,)), "overlapping"),
  (3, lists((0, 1, 2, 3, 4), (1,)), "overlapping"),
  (3, lists((0, 1, 2, 3, 4), (0, 1, 2, 3, 4)), "overlapping"),
  (3, lists((0, 2, 3, 4), (1,)), "declared dead"),
  (3, lists((0, 1, 2), (3, 4)), "too few"),
  (3, lists((1,), (0, 2, 3, 4)), "too few"),
  (3, lists((0, 1, 2, 3), ()), "inconsistent"),
  (3, lists((0, 1, 2, 3, 4, 5), ()), "unknown"),
  (3, lists((0, 1, 2, 3), (9,)), "unknown"),
  (3, lists((0, 2, 1, 3, 4), ()), "malformed"),
  (3, lists((0, 1, 1, 2, 3, 4), ()), "malformed"),
  (3, lists((0, 1, 2, 3, 4), (), ROUND + 1), "another round"),
  (4, lambda w, m: m._replace(signatures=without_last(without_last(m.signatures))), "too few"),
  (4, lambda w, m: m._replace(signatures={**m.signatures, 0: m.signatures[2]}), "forged"),
  (4, lambda w, m: m._replace(signatures={**m.signatures, 8: m.signatures[2]}), "unknown"),
  (
    4,
    lambda w, m: play(w, 4)[2],
    "forged",
  ),  # consents to the same lists in another attempt at the round
  (4, lambda w, m: m._replace(round=ROUND + 1), "another round"),
]


@pytest.mark.parametrize("case", range(len(LIES)))
def test_a_server_s_lie_is_refused_by_name_and_the_truth_is_not(case):
  stage, lie, reason = LIES[case]
  w = world()
  sites, _, out = play(w, stage)
  told = for_site(out, 1)
  with pytest.raises(
    secagg.Refused, match=f"site 1 refuses in stage {msg.STAGES[stage]}: {reason}"
  ) as refused:
    answer(w, stage, sites[1], lie(w, told))
  assert (refused.value.site, refused.value.stage, refused.value.reason) == (
    1,
    msg.STAGES[stage],
    reason,
  )
  answer(w, stage, sites[1], told)


def test_a_site_answers_each_stage_once_and_in_order():
  w = world()
  told = {stage: for_site(play(w, stage)[2], 1) for stage in range(1, 5)}
  site, _ = protocol.advertise(w.setup, ROUND, 1, w.identities[1])
  sites = [site, *(play(w, stage)[0][1] for stage in range(2, 6))]
  for num_sent, site in enumerate(sites, 1):
    for stage in range(1, 5):
      if stage != num_sent:
        with pytest.raises(secagg.Refused, match="out of turn"):
          answer(w, stage, site, told[stage])
  done = sites[-1]
  kept = (done.secrets.mask.private, *done.secrets[1:], done.box.private, *done.shares)
  assert kept == (b"",) * 4


def test_a_neighbour_who_shares_nothing_with_one_site_is_missed_by_that_site_only():
  """The server holds back one box: the two lists cannot please both ends, so nothing is opened."""
  w = world()
  sites, _, out = play(w, 2)
  held_back = {**out, 1: out[1]._replace(boxes={v: b for v, b in out[1].boxes.items() if v != 4})}
  said = {i: answer(w, 2, s, held_back[i]) for i, s in sites.items()}
  with pytest.raises(secagg.Refused, match="inconsistent"):
    protocol.consistency(said[1][0], msg.Survivors(ROUND, (0, 1, 2, 3, 4), (), bytes(32)))
  for i in (0, 2, 3):
    with pytest.raises(secagg.Refused, match="inconsistent"):
      protocol.consistency(said[i][0], msg.Survivors(ROUND, (0, 1, 2, 3), (), bytes(32)))


def test_two_rosters_for_two_sites_are_noticed_before_anything_is_masked():
  w = world()
  sites, _, roster = play(w, 1)
  shorter = roster._replace(adverts=roster.adverts[:4])
  told = {0: shorter, 1: roster, 2: roster, 3: roster}
  said = {i: protocol.share_keys(sites[i], told[i]) for i in told}
  boxes = lambda i: msg.Delivery(ROUND, {v: m.boxes[i] for v, (_, m) in said.items() if v != i})
  with pytest.raises(secagg.Refused, match="forged: site 0's shares"):
    masked_input(said[1][0], boxes(1), w.inputs[1])
