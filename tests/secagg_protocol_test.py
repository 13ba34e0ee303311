import dataclasses
import functools
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
import pytest

from primia_jax.secagg import graph, keys, protocol, rounds, shamir
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving

ROUND = 3
STEPS = (protocol.share_keys, protocol.masked_input, protocol.consistency, protocol.unmask)
# The 0.1 % and 99.9 % quantiles of chi-square with 255 degrees of freedom (Wilson and Hilferty's
# cube root).
LOW, HIGH = (255 * (1 - 2 / (9 * 255) + z * (2 / (9 * 255)) ** 0.5) ** 3 for z in (-3.09, 3.09))


class World(NamedTuple):
  setup: rounds.Setup
  identities: dict
  inputs: dict


def world(numbers=(0, 1, 2, 3, 4), sizes=(6, 1), num_bits=32, **kwargs):
  entropy = lambda i: lambda size: hashlib.sha256(b"%d" % i).digest()[:size]
  identities = {i: keys.identity(entropy(i)) for i in numbers}
  setup = rounds.setup(
    {i: k.public for i, k in identities.items()}, sizes, b"test", num_bits=num_bits, **kwargs
  )
  rng = np.random.default_rng(0)
  draw = lambda size: rng.integers(0, 2**num_bits, size, dtype=np.uint64).astype(setup.dtype)
  return World(setup, identities, {i: tuple(map(draw, sizes)) for i in numbers})


def total(w, sites):
  """The sum by Python integers."""
  rows = lambda leaf: zip(*[w.inputs[i][leaf].tolist() for i in sites], strict=True)
  return [
    [sum(column) % 2**w.setup.num_bits for column in rows(leaf)]
    for leaf in range(len(w.setup.sizes))
  ]


def answer(w, stage, site, told):
  """What a site sends in this stage when told so much."""
  return (
    STEPS[stage - 1](site, told, w.inputs[site.number])
    if stage == 2
    else STEPS[stage - 1](site, told)
  )


def begin(w, round_index=ROUND):
  return {i: protocol.advertise(w.setup, round_index, i, k) for i, k in w.identities.items()}


def for_site(out, site):
  return out[site] if isinstance(out, dict) else out


def play(w, until=5, who=lambda stage, site: True, round_index=ROUND):
  """Plays honestly up to a stage's closing; returns the sites, the server and what it tells them
  next.
  """
  said, server, out = begin(w, round_index), serving.start(w.setup, round_index), None
  for stage in range(until):
    if stage:
      said = {i: answer(w, stage, said[i][0], for_site(out, i)) for i in server.received[stage - 1]}
    said = {i: s for i, s in said.items() if who(stage, i)}
    for _, message in said.values():
      server = serving.receive(server, message)
    server, out = (*serving.CLOSE, serving.open_total)[stage](server)
  return {i: s for i, (s, _) in said.items()}, server, out


@pytest.mark.parametrize(("malicious", "threshold"), [(False, 3), (True, 4)])
def test_every_dropout_pattern_of_five_sites_gives_the_exact_sum_or_an_error(malicious, threshold):
  """Every way to lose sites before each of the five messages: 6^5 patterns, cut where an error ends
  them.
  """
  w = world(malicious_server=malicious)
  assert (w.setup.threshold, w.setup.quorum) == (threshold, threshold)
  outcomes = {"sum": 0, **dict.fromkeys(msg.STAGES, 0)}

  def explore(stage, server, said):
    for size in range(len(said) + 1):
      for speakers in itertools.combinations(said, size):
        after = functools.reduce(serving.receive, [said[i][1] for i in speakers], server)
        close = (*serving.CLOSE, serving.open_total)[stage]
        if size < threshold:
          with pytest.raises(
            serving.RoundFailed, match=f"stage {msg.STAGES[stage]}: {size} sites"
          ) as failed:
            close(after)
          assert (failed.value.stage, failed.value.have, failed.value.need) == (
            msg.STAGES[stage],
            size,
            threshold,
          )
          outcomes[msg.STAGES[stage]] += 1
          continue
        after, out = close(after)
        if stage == 4:
          assert [v.tolist() for v in out.total] == total(w, out.survivors)
          assert out.survivors == tuple(sorted(after.received[2]))
          assert set(out.survivors) | set(out.dropouts) == set(after.received[1])
          assert out.liars == ()
          outcomes["sum"] += 1
        else:
          explore(
            stage + 1,
            after,
            {i: answer(w, stage + 1, said[i][0], for_site(out, i)) for i in speakers},
          )

  explore(0, serving.start(w.setup, ROUND), begin(w))
  lost_ways = {0: 1, 1: 5 * 5, 2: 10 * 25}  # which sites, and for each the stage
  assert outcomes["sum"] == sum(n for lost, n in lost_ways.items() if 5 - lost >= threshold)
  assert all(outcomes[stage] for stage in msg.STAGES)


def test_a_site_lost_before_sharing_keys_does_not_end_the_round():
  """Flower 1.42 ends in a KeyError here."""
  w = world()
  _, _, opened = play(w, who=lambda stage, site: site != 2 or stage < 1)
  assert opened.survivors == (0, 1, 3, 4)
  assert opened.dropouts == ()  # nobody has masked with it, so that nothing of it need be opened
  assert [v.tolist() for v in opened.total] == total(w, (0, 1, 3, 4))


@pytest.mark.parametrize("num_bits", [1, 20, 32, 33, 64])
def test_rings_of_every_width_and_any_site_numbers(num_bits):
  w = world((17, 4, 2**32 - 1, 90, 5), (3, 0, 130), num_bits)
  _, _, opened = play(w, who=lambda stage, site: site != 90 or stage < 2)
  assert opened.survivors == (4, 5, 17, 2**32 - 1)
  assert [v.tolist() for v in opened.total] == total(w, opened.survivors)
  assert all(v.dtype == w.setup.dtype for v in opened.total)


def test_a_sparse_graph_gives_the_exact_sum_or_an_error_for_random_dropouts():
  w = world(
    range(14),
    (5,),
    degree=6,
    threshold=4,
    malicious_server=False,
    graph_key=np.arange(8, dtype=np.uint32),
  )
  opened_rounds = failed = 0
  for seed in range(12):
    rng = np.random.default_rng(seed)
    leaves = {i: rng.integers(0, 5) if rng.random() < 0.3 else 5 for i in range(14)}
    try:
      _, _, opened = play(
        w, who=lambda stage, site, leaves=leaves: stage < leaves[site], round_index=seed
      )
    except (serving.RoundFailed, protocol.Refused) as e:
      if isinstance(e, protocol.Refused) and e.reason != "too few":
        raise
      failed += 1
      continue
    assert [v.tolist() for v in opened.total] == total(w, opened.survivors)
    assert set(opened.survivors) == {i for i, stage in leaves.items() if stage > 2}
    opened_rounds += 1
  assert opened_rounds
  assert failed


def test_survivors_who_fall_into_parts_refuse_since_each_part_would_lie_open(monkeypatch):
  """Sixteen sites on a circle, each with two neighbours on either side; runs of two are lost after
  sharing keys.
  """
  w = world(
    range(16),
    (5,),
    degree=4,
    threshold=3,
    malicious_server=False,
    graph_key=np.arange(8, dtype=np.uint32),
  )
  rows = graph.neighbours(w.setup.graph_key, 16, 4, ROUND)
  circle = [0]
  while len(circle) < 16:
    circle.append(int(rows[circle[-1], 0]))
  lost = lambda gone: lambda stage, site: stage < 2 or site not in gone
  run, both = circle[:2], circle[:2] + circle[8:10]
  _, _, opened = play(w, who=lost(run))
  assert [v.tolist() for v in opened.total] == total(w, set(range(16)) - {*run})
  with pytest.raises(protocol.Refused, match="falls apart"):
    play(w, who=lost(both))
  # Without the check the round goes on, though no mask joins the two parts: each part's messages
  # add up to its own sum.
  monkeypatch.setattr(graph, "reached", lambda neighbours, present: present)
  _, _, opened = play(w, who=lost(both))
  assert len(opened.survivors) == 12
  assert not any({*rows[i].tolist()} & {*circle[10:]} for i in circle[2:8])


def test_a_secret_that_too_few_neighbours_can_open_fails_by_name():
  w = world(
    range(9),
    (5,),
    degree=4,
    threshold=3,
    malicious_server=False,
    graph_key=np.arange(8, dtype=np.uint32),
  )
  around = rounds.neighbourhoods(w.setup, ROUND)
  victim = 0
  silent = set(around[victim][:3])
  with pytest.raises(
    serving.RoundFailed, match=r"unmask: 2 sites answered with a share of site \d"
  ) as failed:
    play(w, who=lambda stage, site: stage < 4 or site not in silent)
  assert (failed.value.have, failed.value.need) == (2, 3)


# What sites may do wrong, and what the server says: (stage, the wrong message from world, site and
# right one, reason).


def resigned(w, message, context=b"", identity=None):
  identity = w.identities[message.site] if identity is None else identity
  text = rounds.signed_text(w.setup, message, context)
  return message._replace(signature=keys.sign(identity.private, text))


def without_last(boxes):
  return dict(list(boxes.items())[:-1])


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
        with pytest.raises(serving.Rejected, match=reason) as rejected:
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
      with pytest.raises(serving.Rejected) as rejected:
        serving.receive(server, said[i][1])
      assert (rejected.value.site, rejected.value.reason) == (i, "repeated")
    for earlier in range(stage):
      with pytest.raises(serving.Rejected) as rejected:
        serving.receive(server, sent[earlier][1])
      assert rejected.value.reason == "repeated"
    if stage:
      with pytest.raises(serving.Rejected) as rejected:
        serving.receive(server, sent[0][0])
      assert (rejected.value.site, rejected.value.reason) == (0, "late")
    server, out = (*serving.CLOSE, serving.open_total)[stage](server)
  assert out.survivors == (1, 2, 3, 4)
  honest = [protocol.advertise(w.setup, ROUND, 1, w.identities[1])[1], *(s[1] for s in sent[1:])]
  fresh = serving.start(w.setup, ROUND)
  for message in honest[1:]:
    with pytest.raises(serving.Rejected) as rejected:
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
  with pytest.raises(serving.Rejected, match="missed stage share_keys") as rejected:
    serving.receive(server, masked)
  assert rejected.value.reason == "late"


def test_an_advert_with_another_site_s_keys_is_rejected():
  w = world()
  server = serving.start(w.setup, ROUND)
  said = begin(w)
  server = serving.receive(server, said[0][1])
  copied = resigned(w, said[0][1]._replace(site=1))
  with pytest.raises(serving.Rejected, match="not its own") as rejected:
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
  return lambda w, m: msg.Survivors(round_index, alive, dead)


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
    protocol.Refused, match=f"site 1 refuses in stage {msg.STAGES[stage]}: {reason}"
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
        with pytest.raises(protocol.Refused, match="out of turn"):
          answer(w, stage, site, told[stage])
  done = sites[-1]
  assert (done.mask.private, done.box.private, done.seed, done.shares) == (b"", b"", b"", {})


def test_a_neighbour_who_shares_nothing_with_one_site_is_missed_by_that_site_only():
  """The server holds back one box: the two lists cannot please both ends, so nothing is opened."""
  w = world()
  sites, _, out = play(w, 2)
  held_back = {**out, 1: out[1]._replace(boxes={v: b for v, b in out[1].boxes.items() if v != 4})}
  said = {i: answer(w, 2, s, held_back[i]) for i, s in sites.items()}
  with pytest.raises(protocol.Refused, match="inconsistent"):
    protocol.consistency(said[1][0], msg.Survivors(ROUND, (0, 1, 2, 3, 4), ()))
  for i in (0, 2, 3):
    with pytest.raises(protocol.Refused, match="inconsistent"):
      protocol.consistency(said[i][0], msg.Survivors(ROUND, (0, 1, 2, 3), ()))


def test_two_rosters_for_two_sites_are_noticed_before_anything_is_masked():
  w = world()
  sites, _, roster = play(w, 1)
  shorter = roster._replace(adverts=roster.adverts[:4])
  told = {0: shorter, 1: roster, 2: roster, 3: roster}
  said = {i: protocol.share_keys(sites[i], told[i]) for i in told}
  boxes = lambda i: msg.Delivery(ROUND, {v: m.boxes[i] for v, (_, m) in said.items() if v != i})
  with pytest.raises(protocol.Refused, match="forged: site 0's shares"):
    protocol.masked_input(said[1][0], boxes(1), w.inputs[1])


def chi_square(words):
  counts = np.bincount(np.asarray(words).view(np.uint8).ravel(), minlength=256)
  return np.sum((counts - counts.sum() / 256) ** 2 / (counts.sum() / 256))


def constant(w, value):
  return w._replace(
    inputs={i: tuple(np.full(n, value, w.setup.dtype) for n in w.setup.sizes) for i in w.inputs}
  )


@pytest.mark.parametrize("masked", [True, False])
def test_masked_inputs_are_uniform_and_unmasked_ones_are_not(masked, monkeypatch):
  w = constant(world(sizes=(2**14, 2**14)), 0x01020304)
  sites, _, out = play(w, 2)
  if not masked:
    monkeypatch.setattr(
      rounds, "mask_total", lambda k, s, r, setup: [np.zeros(n, setup.dtype) for n in setup.sizes]
    )
  sent = [answer(w, 2, s, out[i])[1].vectors for i, s in sites.items()]
  for vectors in sent:
    for v in vectors:
      assert (LOW / 1.2 < chi_square(v) < HIGH * 1.2) == masked
  words = {v.tobytes() for vectors in sent for v in vectors}
  assert (len(words) == 10) == masked


@pytest.mark.parametrize("masked", [True, False])
def test_a_masked_input_is_independent_of_the_input(masked, monkeypatch):
  """Correlation with the input; and one input number under fresh keys takes all values."""
  w = world(sizes=(40_000,))
  sites, _, out = play(w, 2)
  if not masked:
    monkeypatch.setattr(
      rounds, "mask_total", lambda k, s, r, setup: [np.zeros(n, setup.dtype) for n in setup.sizes]
    )
  sent = answer(w, 2, sites[1], out[1])[1].vectors[0]
  correlation = abs(np.corrcoef(sent.astype(float), w.inputs[1][0].astype(float))[0, 1])
  assert (correlation < 4 / 200) == masked  # four standard errors


def bare(w, sites, out, victim, seed_known, private_known):
  """What is left of a victim's masked input when the server knows one of its two secrets, or
  both.
  """
  _, masked = answer(w, 2, sites[victim], out[victim])
  site = sites[victim]
  pair = [
    rounds.pair_mask_key(site.mask.private, site.roster[v].mask_key, ROUND, victim, v)
    for v in out[victim].boxes
  ]
  signs = [1 if v > victim else -1 for v in out[victim].boxes]
  own = [rounds.self_mask_key(site.seed, ROUND, victim)]
  known = [*(pair if private_known else []), *(own if seed_known else [])]
  masks = rounds.mask_total(
    known, [*(signs if private_known else []), *([1] if seed_known else [])], ROUND, w.setup
  )
  return masked.vectors[0] - masks[0]


def test_either_secret_alone_leaves_the_input_uniform_and_both_open_it():
  w = constant(world(sizes=(2**14,)), 0x01020304)
  sites, _, out = play(w, 2)
  for seed_known, private_known in itertools.product((False, True), repeat=2):
    left = bare(w, sites, out, 1, seed_known, private_known)
    assert (LOW / 1.2 < chi_square(left) < HIGH * 1.2) == (not (seed_known and private_known))
  assert np.array_equal(left, w.inputs[1][0])


def attack(w, victim, believers, corrupt=()):
  """A server that shows `believers` that the victim survives and all others that it dropped out, to
  get both secrets.

  It answers each site with all the signatures it has of that site's lists, adds those and the
  shares of corrupt sites, and returns the victim's input where it can be put together, or None.
  """
  sites, _, out = play(w, 2)
  said = {i: answer(w, 2, s, out[i]) for i, s in sites.items()}
  masked = said[victim][1].vectors
  everyone = tuple(sorted(sites))
  rest = tuple(i for i in everyone if i != victim)
  views = {True: msg.Survivors(ROUND, everyone, ()), False: msg.Survivors(ROUND, rest, (victim,))}
  signed, signatures = {}, {True: {}, False: {}}
  for i, (site, _) in said.items():
    for view in (True, False) if i in corrupt else (i in believers,):
      try:
        after, consent = protocol.consistency(site, views[view])
      except protocol.Refused:
        continue
      signed[i, view] = after
      signatures[view][i] = consent.signature
  shares = {True: {}, False: {}}
  for (i, view), site in signed.items():
    try:
      _, given = protocol.unmask(site, msg.Consents(ROUND, signatures[view]))
    except protocol.Refused:
      if i not in corrupt:
        continue
      own = {True: site.shares[victim][1], False: site.shares[victim][0]}
      given = msg.Answer(
        i, ROUND, {victim: own[True]} if view else {}, {} if view else {victim: own[False]}, b""
      )
    for held in (given.self_shares, given.mask_shares):
      if victim in held:
        shares[view][i] = held[victim]
  if min(map(len, shares.values())) < w.setup.threshold:
    return None
  secret = {}
  for view, held in shares.items():
    points = np.array([sites[victim].neighbours.index(i) + 1 for i in held])
    values = np.stack([np.frombuffer(s, np.uint8) for s in held.values()])[None]
    secret[view] = shamir.combine(points, values, w.setup.threshold)[0].tobytes()
  adverts = {i: s.advert for i, s in sites.items()}
  pair = [rounds.pair_mask_key(secret[False], adverts[v].mask_key, ROUND, victim, v) for v in rest]
  mask_keys = [*pair, rounds.self_mask_key(secret[True], ROUND, victim)]
  masks = rounds.mask_total(
    mask_keys, [*[1 if v > victim else -1 for v in rest], 1], ROUND, w.setup
  )
  return tuple(rounds.reduce(a - b, w.setup) for a, b in zip(masked, masks, strict=True))


@pytest.mark.parametrize(("malicious", "corrupt"), [(False, ()), (True, ()), (True, (4,))])
def test_a_lying_server_never_gets_both_secrets_of_a_site(malicious, corrupt):
  """Flower 1.42 gives both. Every way to split the sites into two beliefs, with a corrupt site
  where assumed.
  """
  w = world(malicious_server=malicious)
  for size in range(6):
    for believers in itertools.combinations(range(5), size):
      assert attack(w, 1, believers, corrupt) is None


def test_the_same_attack_works_where_a_threshold_is_too_low():
  """So the test above would notice if a bound were missing."""
  for w, believers, corrupt in (
    (world()._replace(setup=dataclasses.replace(world().setup, threshold=2, quorum=2)), (0, 1), ()),
    (
      world(malicious_server=False),
      (0, 1),
      (4,),
    ),  # above half is enough against sites that follow the protocol, only
  ):
    got = attack(w, 1, believers, corrupt)
    assert all(np.array_equal(a, b) for a, b in zip(got, w.inputs[1], strict=True))


@pytest.mark.parametrize("checked", [True, False])
def test_signed_lists_keep_a_server_from_isolating_a_site(checked, monkeypatch):
  """Each site is shown its own lists, all of them legal, so that site 4's help opens the pairwise
  masks of all but 1.

  It gets one secret of each site, and thereby the input of site 1; were the signatures of the lists
  not checked.
  """
  w = world(malicious_server=False)
  sites, _, out = play(w, 2)
  said = {i: answer(w, 2, s, out[i]) for i, s in sites.items()}
  dead = {0: (2, 3), 1: (), 2: (0, 3), 3: (0, 2)}
  if not checked:
    monkeypatch.setattr(keys, "verify", lambda *_: True)
  held = {
    i: [] for i in range(5)
  }  # (holder, share): of the seed of site 1, of the mask keys of the others
  refused = 0
  for i, gone in dead.items():
    shown = msg.Survivors(ROUND, tuple(v for v in range(5) if v not in gone), gone)
    site, consent = protocol.consistency(said[i][0], shown)
    signatures = {v: consent.signature for v in shown.survivors}
    try:
      _, given = protocol.unmask(site, msg.Consents(ROUND, signatures))
    except protocol.Refused as e:
      if e.reason != "forged":
        raise
      refused += 1
      continue
    held[1].append((i, given.self_shares[1]))
    for v, share in given.mask_shares.items():
      held[v].append((i, share))
  for v, shares in said[4][0].shares.items():
    held[v].append((4, shares[v == 1]))
  assert refused == (4 if checked else 0)
  if checked:
    assert all(len(held[v]) < w.setup.threshold for v in range(4))
    return
  secret = {4: said[4][0].mask.private}
  for v in range(4):
    points, values = zip(*held[v], strict=True)
    values = np.stack([np.frombuffer(share, np.uint8) for share in values])[None]
    secret[v] = shamir.combine(np.array(points) + 1, values, w.setup.threshold)[0].tobytes()
  others, mine = (0, 2, 3, 4), sites[1].advert.mask_key
  mask_keys = [*[rounds.pair_mask_key(secret[v], mine, ROUND, 1, v) for v in others]]
  masks = rounds.mask_total(
    [*mask_keys, rounds.self_mask_key(secret[1], ROUND, 1)], [-1, 1, 1, 1, 1], ROUND, w.setup
  )
  for sent, mask, x in zip(said[1][1].vectors, masks, w.inputs[1], strict=True):
    assert np.array_equal(sent - mask, x)


def test_declaring_a_live_site_dead_gains_nothing():
  """The server has its masked input and gets the key of its pairwise masks; its self mask stays."""
  w = constant(world(sizes=(2**14,)), 0x01020304)
  sites, server, out = play(w, 2)
  said = {i: answer(w, 2, s, out[i]) for i, s in sites.items()}
  lying = msg.Survivors(ROUND, (0, 2, 3, 4), (1,))
  with pytest.raises(protocol.Refused, match="declared dead"):
    protocol.consistency(said[1][0], lying)
  honest = functools.reduce(serving.receive, [said[i][1] for i in lying.survivors], server)
  honest, told = serving.close_masked_input(honest)
  assert told == lying
  stage3 = {i: protocol.consistency(said[i][0], told) for i in lying.survivors}
  honest = functools.reduce(serving.receive, [m for _, m in stage3.values()], honest)
  honest, consents = serving.close_consistency(honest)
  answers = [protocol.unmask(s, consents)[1] for s, _ in stage3.values()]
  assert all(1 not in a.self_shares and 1 in a.mask_shares for a in answers)
  assert all(not set(a.self_shares) & set(a.mask_shares) for a in answers)
  honest, opened = serving.open_total(functools.reduce(serving.receive, answers, honest))
  assert np.array_equal(opened.total[0], np.full(2**14, 4 * 0x01020304, np.uint32))
  assert LOW / 1.2 < chi_square(bare(w, sites, out, 1, False, True)) < HIGH * 1.2


def forge_shares(w, message, which, owner, flip=1):
  shares = dict(getattr(message, which))
  shares[owner] = bytes([shares[owner][0] ^ flip]) + shares[owner][1:]
  return resigned(w, message._replace(**{which: shares}))


@pytest.mark.parametrize("which", ["self_shares", "mask_shares"])
def test_a_false_share_is_noticed_and_does_no_harm_where_there_are_enough_others(which):
  w = world(range(7), malicious_server=False)  # t = 4
  for silent in (0, 2):  # with two more sites silent there are just t shares
    sites, server, out = play(w, 4, who=lambda stage, site: site != 6 or stage < 2)
    said = {i: answer(w, 4, s, out)[1] for i, s in sites.items()}
    owner = 0 if which == "self_shares" else 6
    said[2] = forge_shares(w, said[2], which, owner)
    for i in list(said)[: 6 - silent]:
      server = serving.receive(server, said[i])
    if silent:
      with pytest.raises(
        serving.RoundFailed, match=f"site {owner}'s 4 shares give the secret it has advertised"
      ):
        serving.open_total(server)
    else:
      _, opened = serving.open_total(server)
      assert opened.liars == (2,)
      assert [v.tolist() for v in opened.total] == total(w, range(6))


@pytest.mark.parametrize(
  ("kwargs", "told"),
  [
    ({"numbers": (0,)}, "at least 2"),
    ({"threshold": 3}, "above two thirds: 4 to 5"),
    ({"threshold": 6}, "4 to 5"),
    ({"threshold": 2, "malicious_server": False}, "above half: 3 to 5"),
    ({"quorum": 3}, "quorum=3 of 5"),
    ({"degree": 2}, "needs a graph_key"),
    ({"degree": 3, "graph_key": np.zeros(8, np.uint32)}, "degree=3 among 5"),
    ({"numbers": range(300)}, "use a sparser graph"),
    ({"sizes": ()}, "at least one vector"),
    ({"sizes": (-1,)}, "at least one vector"),
    ({"num_bits": 65}, "1 to 64"),
    ({"numbers": (0, 2**32)}, "uint32"),
  ],
)
def test_unsound_setups_are_refused(kwargs, told):
  identities = {i: i.to_bytes(32, "little") for i in kwargs.pop("numbers", range(5))}
  with pytest.raises(ValueError, match=told):
    rounds.setup(identities, kwargs.pop("sizes", (3,)), b"test", **kwargs)


def test_two_sites_with_one_identity_are_refused():
  with pytest.raises(ValueError, match="one identity"):
    rounds.setup({0: bytes(32), 1: bytes(32)}, (3,), b"")
  with pytest.raises(ValueError, match="31 bytes"):
    rounds.setup({0: bytes(32), 1: bytes(31)}, (3,), b"")


def test_a_site_with_another_identity_or_another_input_is_told_at_once():
  w = world()
  with pytest.raises(ValueError, match="another identity"):
    protocol.advertise(w.setup, ROUND, 0, w.identities[1])
  sites, _, out = play(w, 2)
  for vectors in (
    (w.inputs[1][0],),
    (w.inputs[1][0].astype(np.uint64), w.inputs[1][1]),
    (w.inputs[1][1],) * 2,
  ):
    with pytest.raises(ValueError, match="the input must be"):
      protocol.masked_input(sites[1], out[1], vectors)


def test_every_part_of_the_setup_is_signed():
  base = {"numbers": range(5), "sizes": (6, 1), "malicious_server": False}
  other = [
    {"numbers": range(6)},
    {"sizes": (6, 2)},
    {"num_bits": 31},
    {"threshold": 4},
    {"quorum": 4},
    {"purpose": 1},
  ]
  other += [{"malicious_server": True}, {"graph_key": np.ones(8, np.uint32)}]
  labels = {world(**{**base, **change}).setup.label for change in [{}, *other]}
  w = world(**base)
  labels.add(rounds.setup(w.setup.identities, (6, 1), b"another run", malicious_server=False).label)
  assert len(labels) == len(other) + 2
  assert w.setup.label == world(**base).setup.label


def test_no_secret_is_printed():
  sites, _, _ = play(world(), 3)
  text = repr(sites)
  assert all(
    repr(s)[2:-1] not in text for site in sites.values() for s in (site.seed, site.mask.private)
  )
