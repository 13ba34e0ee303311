"""Honest rounds: the sum is exact or refused, whoever is lost; and what a setup must be."""

import functools
import itertools

import numpy as np
import pytest
from secagg_world import ROUND, answer, begin, for_site, masked_input, play, resigned, total, world

from primia_jax import secagg
from primia_jax.secagg import graph, protocol, rounds
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving


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
            secagg.RoundFailed, match=f"stage {msg.STAGES[stage]}: {size} sites"
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
    except (secagg.RoundFailed, secagg.Refused) as e:
      if isinstance(e, secagg.Refused) and e.reason != "too few":
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
  with pytest.raises(secagg.Refused, match="falls apart"):
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
    secagg.RoundFailed, match=r"unmask: 2 sites answered with a share of site \d"
  ) as failed:
    play(w, who=lambda stage, site: stage < 4 or site not in silent)
  assert (failed.value.have, failed.value.need) == (2, 3)


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
        secagg.RoundFailed, match=f"site {owner}'s 4 shares give the secret it has advertised"
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
      masked_input(sites[1], out[1], vectors)


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
  secrets = [s for site in sites.values() for s in (site.secrets.mask.private, *site.secrets[1:])]
  assert len(secrets) == 3 * 5
  assert all(repr(s)[2:-1] not in text for s in secrets)
