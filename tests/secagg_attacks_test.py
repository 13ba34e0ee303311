"""Attacks: what a server gets out of masked messages, with help of corrupt sites and without."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from secagg_world import ROUND, answer, play, world

from primia_jax import secagg
from primia_jax.secagg import graph, keys, protocol, rounds, shamir, subkeys
from primia_jax.secagg import messages as msg
from primia_jax.secagg import server as serving

# The 0.1 % and 99.9 % quantiles of chi-square with 255 degrees of freedom (Wilson and Hilferty's
# cube root).
LOW, HIGH = (255 * (1 - 2 / (9 * 255) + z * (2 / (9 * 255)) ** 0.5) ** 3 for z in (-3.09, 3.09))


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
  public = {v: site.roster[v].mask_key for v in out[victim].boxes}
  pair = subkeys.pair_mask_keys(site.secrets.mask.private, public, ROUND, victim).values()
  signs = [1 if v > victim else -1 for v in out[victim].boxes]
  own = [subkeys.self_mask_key(site.secrets.seed, ROUND, victim)]
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
  shown = lambda alive, dead: msg.Survivors(ROUND, alive, dead, bytes(32))
  views = {True: shown(everyone, ()), False: shown(rest, (victim,))}
  signed, signatures = {}, {True: {}, False: {}}
  for i, (site, _) in said.items():
    for view in (True, False) if i in corrupt else (i in believers,):
      try:
        after, consent = protocol.consistency(site, views[view])
      except secagg.Refused:
        continue
      signed[i, view] = after
      signatures[view][i] = consent.signature
  shares = {True: {}, False: {}}
  for (i, view), site in signed.items():
    try:
      _, given = protocol.unmask(site, msg.Consents(ROUND, signatures[view]))
    except secagg.Refused:
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
  public = {v: sites[v].advert.mask_key for v in rest}
  pair = subkeys.pair_mask_keys(secret[False], public, ROUND, victim)
  mask_keys = [*pair.values(), subkeys.self_mask_key(secret[True], ROUND, victim)]
  masks = rounds.mask_total(
    mask_keys, [*[1 if v > victim else -1 for v in rest], 1], ROUND, w.setup
  )
  return tuple(rounds.reduce(a - b, w.setup) for a, b in zip(masked, masks, strict=True))


def opened_by_peers(w, colluding):
  """Site 0's input as a curious server and these peers compute it from an honest round."""
  sites, _, out = play(w, 2)
  _, masked = answer(w, 2, sites[0], out[0])
  known = {i: answer(w, 2, sites[i], out[i])[0].shares[0] for i in colluding}
  points = np.array([sites[0].neighbours.index(i) + 1 for i in known])
  of_kind = [
    [np.frombuffer(shares[kind], np.uint8) for shares in known.values()] for kind in (0, 1)
  ]
  private, seed = (
    shamir.combine(points, np.stack(values)[None], len(known))[0].tobytes() for values in of_kind
  )
  public = {v: sites[0].roster[v].mask_key for v in out[0].boxes}
  pair = subkeys.pair_mask_keys(private, public, ROUND, 0)
  mask_keys = [*pair.values(), subkeys.self_mask_key(seed, ROUND, 0)]
  masks = rounds.mask_total(mask_keys, [1] * len(mask_keys), ROUND, w.setup)
  return tuple(rounds.reduce(a - b, w.setup) for a, b in zip(masked.vectors, masks, strict=True))


@pytest.mark.parametrize("colluding", [1, 2, 3, 4])
def test_a_threshold_of_peers_opens_an_input_and_one_fewer_does_not(colluding):
  """Not all peers are needed, but t, with a server that is no more than curious."""
  w = world(malicious_server=False)
  got = opened_by_peers(w, range(1, 1 + colluding))
  opened = all(np.array_equal(a, b) for a, b in zip(got, w.inputs[0], strict=True))
  assert opened == (colluding >= graph.num_to_open(4, w.setup.threshold)) == (colluding >= 3)


@pytest.mark.parametrize("colluding", [1, 2])
def test_one_peer_fewer_is_enough_where_the_fewest_sites_are_left(colluding):
  """The sum over t survivors, less the inputs of those that collude."""
  w = world(malicious_server=False)
  _, _, opened = play(w, 5, lambda stage, site: stage < 2 or site < w.setup.threshold)
  assert opened.survivors == (0, 1, 2)
  left = rounds.reduce(
    opened.total[0] - sum(w.inputs[i][0] for i in range(1, 1 + colluding)), w.setup
  )
  assert np.array_equal(left, w.inputs[0][0]) == (colluding == w.setup.threshold - 1)
  chance = graph.chance_of_opening(5, 4, w.setup.threshold, colluding)
  assert chance == (colluding == w.setup.threshold - 1)


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
    shown = msg.Survivors(ROUND, tuple(v for v in range(5) if v not in gone), gone, bytes(32))
    site, consent = protocol.consistency(said[i][0], shown)
    signatures = {v: consent.signature for v in shown.survivors}
    try:
      _, given = protocol.unmask(site, msg.Consents(ROUND, signatures))
    except secagg.Refused as e:
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
  secret = {4: said[4][0].secrets.mask.private}
  for v in range(4):
    points, values = zip(*held[v], strict=True)
    values = np.stack([np.frombuffer(share, np.uint8) for share in values])[None]
    secret[v] = shamir.combine(np.array(points) + 1, values, w.setup.threshold)[0].tobytes()
  others, mine = (0, 2, 3, 4), sites[1].advert.mask_key
  mask_keys = [subkeys.pair_mask_keys(secret[v], {1: mine}, ROUND, v)[1] for v in others]
  masks = rounds.mask_total(
    [*mask_keys, subkeys.self_mask_key(secret[1], ROUND, 1)], [-1, 1, 1, 1, 1], ROUND, w.setup
  )
  for sent, mask, x in zip(said[1][1].vectors, masks, w.inputs[1], strict=True):
    assert np.array_equal(sent - mask, x)


def test_declaring_a_live_site_dead_gains_nothing():
  """The server has its masked input and gets the key of its pairwise masks; its self mask stays."""
  w = constant(world(sizes=(2**14,)), 0x01020304)
  sites, server, out = play(w, 2)
  said = {i: answer(w, 2, s, out[i]) for i, s in sites.items()}
  lying = msg.Survivors(ROUND, (0, 2, 3, 4), (1,), bytes(32))
  with pytest.raises(secagg.Refused, match="declared dead"):
    protocol.consistency(said[1][0], lying)
  honest = functools.reduce(serving.receive, [said[i][1] for i in lying.survivors], server)
  honest, told = serving.close_masked_input(honest)
  assert told._replace(inputs=lying.inputs) == lying
  stage3 = {i: protocol.consistency(said[i][0], told) for i in lying.survivors}
  honest = functools.reduce(serving.receive, [m for _, m in stage3.values()], honest)
  honest, consents = serving.close_consistency(honest)
  answers = [protocol.unmask(s, consents)[1] for s, _ in stage3.values()]
  assert all(1 not in a.self_shares and 1 in a.mask_shares for a in answers)
  assert all(not set(a.self_shares) & set(a.mask_shares) for a in answers)
  honest, opened = serving.open_total(functools.reduce(serving.receive, answers, honest))
  assert np.array_equal(opened.total[0], np.full(2**14, 4 * 0x01020304, np.uint32))
  assert LOW / 1.2 < chi_square(bare(w, sites, out, 1, False, True)) < HIGH * 1.2
