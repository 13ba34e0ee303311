import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng, ring, secagg
from primia_jax.secagg import simulation

KEY = jnp.arange(8, dtype=jnp.uint32) + 3
NONCE = (4, 1)
HIGH = (
  255 + 5 * (2 * 255) ** 0.5
)  # of chi-square with 255 degrees of freedom, five standard deviations above the mean


@functools.cache
def world(num_sites, num_peers, threshold, num_bits=32, first=0):
  """The configuration, one sum's keys and shares, the messages, and their encoding."""
  config = secagg.secure_sum(
    num_sites, 1.0, num_bits=num_bits, num_peers=num_peers, threshold=threshold
  )
  ids = np.random.default_rng(num_sites).permutation(num_sites).astype(np.int32) + first
  peers = np.asarray(secagg.peers(jax.random.key(0), jnp.asarray(ids), num_peers))
  session = simulation.setup(KEY, NONCE, ids, peers, threshold)
  draw = lambda *shape: (
    np.random.default_rng(1).uniform(-1, 1, (num_sites, *shape)).astype(np.float32)
  )
  message = {"w": draw(3, 5), "b": draw()}
  encoded = jax.tree.map(lambda x: np.asarray(ring.encode(jnp.asarray(x), config.fixed)), message)
  return config, session, message, encoded


@functools.partial(jax.jit, static_argnums=3)
def send(message, ids, links, config):
  return jax.vmap(lambda *site: secagg.protect(*site, NONCE, config))(message, ids, links)


unmask = jax.jit(
  lambda total, residue, config: secagg.unmask(total, residue, NONCE, config), static_argnums=2
)


def stages(num_sites, before=(), during=(), after=()):
  rows = lambda chosen: np.isin(np.arange(num_sites), list(chosen))
  return secagg.Dropouts(rows(before), rows(during), rows(after))


def play(config, session, message, dropouts, sent=None):
  """What the server has in the end, and whose messages came."""
  residue = simulation.recover(session, dropouts)
  came = ~(dropouts.before | dropouts.during)
  if sent is None:
    sent = send(message, session.ids, simulation.links_without(session, dropouts.before), config)
  total = jax.tree.map(lambda a: np.asarray(a)[came].sum(0, dtype=a.dtype), sent)
  return unmask(total, residue, config), came


def sums(encoded, came, config):
  mask = 2**config.fixed.num_bits - 1
  return jax.tree.map(lambda v: v[came].sum(0, dtype=v.dtype) & v.dtype.type(mask), encoded)


def same(a, b):
  return all(
    np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def chi_square(words):
  counts = np.bincount(np.asarray(words).view(np.uint8).ravel(), minlength=256)
  return np.sum((counts - counts.sum() / 256) ** 2 / (counts.sum() / 256))


def test_the_sum_of_the_survivors_is_exact_for_every_pattern_of_five_sites():
  """Each site stays, or is lost at one of the three stages: 4^5 patterns, opened or refused."""
  config, session, message, encoded = world(5, 4, 3, first=7)
  opened, sent = 0, {}
  for pattern in itertools.product(range(4), repeat=5):
    dropouts = stages(5, *(np.flatnonzero(np.equal(pattern, stage)) for stage in (1, 2, 3)))
    before = dropouts.before.tobytes()
    if before not in sent:
      links = simulation.links_without(session, dropouts.before)
      sent[before] = jax.tree.map(np.asarray, send(message, session.ids, links, config))
    if pattern.count(0) < 3:  # of the complete graph three must answer, for everybody
      with pytest.raises(secagg.RoundAborted, match="round aborted"):
        simulation.recover(session, dropouts)
      continue
    got, came = play(config, session, message, dropouts, sent[before])
    assert same(got.message, sums(encoded, came, config)), pattern
    assert got.out_of_range == 0
    opened += 1
  assert opened == 1 + 5 * 3 + 10 * 9


@pytest.mark.parametrize("num_bits", [20, 64])
def test_narrow_and_wide_rings(num_bits):
  with jax.enable_x64(num_bits > 32):
    config, session, message, encoded = world(6, 4, 3, num_bits)
    got, came = play(config, session, message, stages(6, before=[1], during=[4]))
    assert same(got.message, sums(encoded, came, config))


@pytest.mark.slow
def test_a_thousand_sites_with_random_dropouts():
  config, session, message, encoded = world(1000, 10, 6)
  for seed in range(3):
    u = np.random.default_rng(seed).uniform(size=1000)
    dropouts = secagg.Dropouts(u < 0.02, (u >= 0.02) & (u < 0.05), u > 0.98)
    got, came = play(config, session, message, dropouts)
    assert 900 < came.sum() < 1000
    assert same(got.message, sums(encoded, came, config))


def test_sites_out_of_range_are_counted_among_the_survivors_only():
  config, session, message, _ = world(5, 4, 3)
  wrong = {"w": message["w"].copy(), "b": message["b"]}
  wrong["w"][[0, 2, 3], 1, 1] = np.nan
  assert play(config, session, wrong, stages(5, before=[0], during=[2]))[0].out_of_range == 1
  assert play(config, session, wrong, stages(5, after=[0, 2]))[0].out_of_range == 3


def test_until_unmasked_the_sum_is_uniform():
  config = secagg.secure_sum(5, 1.0, threshold=3)
  _, session, *_ = world(5, 4, 3)
  sent = send(np.full((5, 4096), 0.25, np.float32), session.ids, session.links, config)
  total = jax.tree.map(lambda a: np.asarray(a).sum(0, dtype=a.dtype), sent)  # nobody is lost
  residue = simulation.recover(session, stages(5))
  assert chi_square(total.message) < HIGH
  assert chi_square(unmask(total, residue, config).message) > 10 * HIGH
  for missing in range(5):  # and so it stays while a single key is missing
    fewer = residue._replace(signs=residue.signs.at[missing].set(0))
    assert chi_square(unmask(total, fewer, config).message) < HIGH


@pytest.mark.parametrize("threshold", [3, None])
def test_a_message_that_comes_late_stays_hidden_and_would_not_without_own_masks(threshold):
  """The server has taken site 2 for lost, learnt its private key, and then receives its message
  after all.
  """
  config = secagg.secure_sum(5, 1.0, threshold=threshold)
  _, session, *_ = world(5, 4, 3)
  message = np.full((5, 4096), 0.25, np.float32)
  late = jax.tree.map(lambda a: a[2], send(message, session.ids, session.links, config))
  residue = simulation.recover(session, stages(5, during=[2]))
  pair_masks = (
    residue.keys[4:8],
    -residue.signs[4:8],
  )  # of the four survivors with site 2, as site 2 has them
  stripped = unmask(late, secagg.Residue(*pair_masks), config)
  assert (chi_square(stripped.message) < HIGH) == (threshold is not None)
  if threshold is None:
    assert np.array_equal(stripped.message, ring.encode(message[2], config.fixed))


def test_of_each_site_one_secret_is_opened_and_never_the_one_behind_its_noise(monkeypatch):
  opened = []
  combine = simulation.shamir.combine
  monkeypatch.setattr(
    simulation.shamir, "combine", lambda *args: opened.append(combine(*args)) or opened[-1]
  )
  _, session, *_ = world(5, 4, 3)
  simulation.recover(session, stages(5, before=[0], during=[3]))
  assert len(opened[0]) == 4  # nothing of the site that shared nothing
  told = {row.tobytes() for row in opened[0].view("<u4")}
  own = [prng.derive(jnp.asarray(k), secagg.SELF_MASK) for k in session.links.own]
  assert [np.asarray(k).tobytes() in told for k in own] == [False, True, True, False, True]
  noise = [prng.derive(jnp.asarray(k), secagg.NOISE) for k in session.links.own]
  assert not told & {np.asarray(k).tobytes() for k in [*noise, *session.links.own]}


def test_a_graph_that_falls_apart_is_refused_since_each_part_would_lie_open(monkeypatch):
  """Of a circle of ten with four peers each, two sites in a row are lost at two places."""
  config, session, message, encoded = world(10, 4, 3)
  circle = np.asarray(jax.random.permutation(jax.random.key(0), 10))
  dropouts = stages(10, during=circle[[0, 1, 5, 6]])
  with pytest.raises(secagg.RoundAborted, match="3 and 3 sites"):
    simulation.recover(session, dropouts)
  monkeypatch.setattr(simulation, "_check_connected", lambda *_: None)
  part = np.isin(np.arange(10), circle[2:5])
  sent = jax.tree.map(
    lambda a: np.asarray(a).copy(), send(message, session.ids, session.links, config)
  )
  residue = simulation.recover(session, dropouts)
  came = np.flatnonzero(~dropouts.during)
  keys = np.asarray(residue.keys)
  theirs = {k.tobytes() for k in np.asarray(session.links.keys)[part].reshape(-1, 8)}
  rows = [k for k, i in enumerate(came) if part[i]] + [
    k for k in range(len(came), 20) if keys[k].tobytes() in theirs
  ]
  known = secagg.Residue(residue.keys[np.array(rows)], residue.signs[np.array(rows)])
  total = jax.tree.map(lambda a: a[part].sum(0, dtype=a.dtype), sent)
  assert same(unmask(total, known, config).message, sums(encoded, part, config))


@pytest.mark.parametrize(
  ("lost", "told"),
  [
    ({"before": range(10)}, "no site's message came"),
    ({"before": range(5), "during": range(5, 10)}, "no site's message came"),
    ({"after": range(10)}, "0 of the 5 holders"),
    ({"during": range(9)}, "threshold=3 must answer"),
  ],
)
def test_rounds_that_lost_too_many_are_aborted(lost, told):
  _, session, *_ = world(10, 4, 3)
  with pytest.raises(secagg.RoundAborted, match=f"round aborted: .*{told}"):
    simulation.recover(session, stages(10, **lost))


def test_every_sum_has_secrets_of_its_own_and_the_same_ones_when_played_again():
  rows = lambda links: np.concatenate([links.own, links.keys.reshape(-1, 8)])
  _, session, *_ = world(5, 4, 3)
  seen = {row.tobytes() for row in rows(session.links)}
  assert len(seen) == 5 + 10
  again = simulation.setup(KEY, NONCE, session.ids, np.asarray(session.links.peers), 3)
  assert same(again, session)
  others = [(KEY, (5, 1)), (KEY, (4, 2)), (KEY, (1, 4)), (prng.derive(KEY, 0), NONCE)]
  for key, nonce in others:
    links = simulation.setup(key, nonce, session.ids, np.asarray(session.links.peers), 3).links
    new = {row.tobytes() for row in rows(links)}
    assert not seen & new
    seen |= new


def test_wrong_dropouts_are_refused():
  none, first = np.zeros(3, bool), np.array([True, False, False])
  assert simulation.check(None, 3).tolist() == [[False] * 3] * 3
  assert simulation.check(secagg.Dropouts(none, first), 3).tolist() == [
    [False] * 3,
    first.tolist(),
    [False] * 3,
  ]
  with pytest.raises(ValueError, match=r"rows \[0\] are lost twice"):
    simulation.check(secagg.Dropouts(first, none, first), 3)
  with pytest.raises(ValueError, match=r"Dropouts.during is bool\[3\]; it must be bool\[4\]"):
    simulation.check(secagg.Dropouts(np.zeros(4, bool), none), 4)
  with pytest.raises(ValueError, match=r"Dropouts.before is int64\[3\]"):
    simulation.check(secagg.Dropouts(np.arange(3), none), 3)


def test_impossible_graphs_are_refused():
  wrong = {
    (1, 9): r"peers \[9\] are not among the sites",
    (1, 0): "not his peer's peer",
    (1, 3): "or his own",
  }
  for row, told in wrong.items():
    with pytest.raises(ValueError, match=told):
      simulation.setup(
        KEY,
        NONCE,
        np.arange(4, dtype=np.int32),
        np.array([row, [0, 2], [1, 3], [2, 1]], np.int32),
        2,
      )
  ids = np.arange(300, dtype=np.int32)
  with pytest.raises(ValueError, match=r"num_peers=299 .* use num_peers < 255"):
    simulation.setup(KEY, NONCE, ids, np.zeros((300, 299), np.int32), 200)
