import copy
import functools
import hashlib
import itertools
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from secagg_world import masked_input

from primia_jax import ring, secagg
from primia_jax.secagg import graph, keys, protocol, rounds, simulation, subkeys
from primia_jax.secagg import server as serving

WORDS = (4, 1)
HIGH = (
  255 + 5 * (2 * 255) ** 0.5
)  # of chi-square with 255 degrees of freedom, five standard deviations above the mean


def entropy(name):
  """The same secrets at every call, of a site, the graph or the dealer."""
  return keys.expanding(keys.words(hashlib.sha256(f"{name}".encode()).digest()))


def stages(num_sites, before=(), during=(), after=()):
  rows = lambda chosen: np.isin(np.arange(num_sites), list(chosen))
  return secagg.Dropouts(rows(before), rows(during), rows(after))


@functools.cache
def world(num_sites, num_peers, threshold, num_bits=32, first=0):
  """The configuration, the sites' numbers, the messages, and their encoding."""
  config = secagg.secure_sum(
    num_sites, 1.0, num_bits=num_bits, num_peers=num_peers, threshold=threshold
  )
  ids = np.random.default_rng(num_sites).permutation(num_sites).astype(np.int32) + first
  draw = lambda *shape: (
    np.random.default_rng(1).uniform(-1, 1, (num_sites, *shape)).astype(np.float32)
  )
  message = {"w": draw(3, 5), "b": draw()}
  encoded = jax.tree.map(lambda x: np.asarray(ring.encode(jnp.asarray(x), config.fixed)), message)
  return config, ids, message, encoded


@functools.partial(jax.jit, static_argnums=2)
def send(message, rows, config):
  one = lambda message, row: secagg.mask(secagg.encode(message, config), row, WORDS, config)
  return jax.vmap(one)(message, rows)


unmask = jax.jit(
  lambda total, residue, config: secagg.unmask(total, residue, WORDS, config), static_argnums=2
)


def begin(config, ids, dropouts=None, source=entropy, words=WORDS):
  return simulation._begin(config, words, ids, dropouts, source)


def play(config, ids, message, dropouts):
  """What the server has in the end, and whose messages came."""
  begun = secagg.begin(config, WORDS, ids, dropouts)
  sent = send(message, begun.rows, config)
  total = jax.tree.map(lambda a: np.asarray(a)[begun.counted].sum(0, dtype=a.dtype), sent)
  return unmask(total, begun.residue, config), begun.counted


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


def told(round_index, setup, identities, vectors, lost):
  """An honest round by messages: each site's masked input, its noise key, and the opened sum."""
  said, draw = {}, subkeys.draw
  for i, k in identities.items():
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(subkeys, "draw", lambda _, i=i: draw(entropy(i)))
      said |= {} if lost.before[i] else {i: protocol.advertise(setup, round_index, i, k)}
  noise, inputs, server = {i: s.secrets.noise for i, (s, _) in said.items()}, {}, None
  server = serving.start(setup, round_index)
  steps = protocol.share_keys, masked_input, protocol.consistency, protocol.unmask
  for step, close in zip(steps, serving.CLOSE, strict=True):
    server = functools.reduce(serving.receive, [m for _, m in said.values()], server)
    server, out = close(server)
    to = lambda i, out=out: out[i] if isinstance(out, dict) else out
    own = lambda i, step=step: [vectors[i]] if step is masked_input else []
    said = {i: step(s, to(i), *own(i)) for i, (s, _) in said.items()}
    if step is masked_input:
      inputs = {i: m.vectors for i, (_, m) in said.items()}
      said = {i: s for i, s in said.items() if not lost.during[i]}
  said = {i: s for i, s in said.items() if not lost.after[i]}
  server = functools.reduce(serving.receive, [m for _, m in said.values()], server)
  return inputs, noise, serving.open_total(server)[1].total


@pytest.mark.parametrize(
  ("num_sites", "num_peers", "num_bits"), [(5, 4, 32), (9, 6, 20), (7, 4, 64)]
)
def test_simulated_and_deployed_masked_messages_are_equal_bit_for_bit(
  num_sites, num_peers, num_bits
):
  """With the same entropy at each site: what it sends, its noise, and the sum without the lost."""
  threshold = num_peers // 2 + 1
  with jax.enable_x64(num_bits > 32):
    config, ids, message, encoded = world(num_sites, num_peers, threshold, num_bits)
    lost = stages(num_sites, before=[0], during=[2])
    in_rows = jax.tree.map(lambda stage: stage[ids], lost)  # `ids` is a permutation
    begun = begin(config, ids, in_rows)
    sent = jax.tree.map(np.asarray, send(message, begun.rows, config))
    leaves = jax.tree.leaves(secagg.Masked(encoded, np.zeros_like(encoded["b"])))
    vectors = {int(i): tuple(a[k].reshape(-1) for a in leaves) for k, i in enumerate(ids)}
    vectors = {
      i: tuple(a & a.dtype.type(2**num_bits - 1) for a in own) for i, own in vectors.items()
    }
    identities = {i: keys.identity(entropy(f"identity {i}")(32)) for i in range(num_sites)}
    setup = rounds.setup(
      {i: k.public for i, k in identities.items()},
      [a.size for a in vectors[0]],
      b"run",
      num_bits=num_bits,
      graph_key=keys.words(entropy("graph")(32)),
      degree=num_peers,
      threshold=threshold,
      malicious_server=False,
      purpose=WORDS[1],
    )
    inputs, noise, opened = told(WORDS[0], setup, identities, vectors, lost)
    for k, i in enumerate(ids.tolist()):
      if i == 0:
        continue
      assert noise[i] == keys.raw(np.asarray(begun.rows.noise[k]))
      for a, b, plain in zip(jax.tree.leaves(sent), inputs[i], vectors[i], strict=True):
        assert np.array_equal(a[k].reshape(-1), b)
        assert not np.any(b == plain)
    total = jax.tree.map(lambda a: a[begun.counted].sum(0, dtype=a.dtype), sent)
    mine = jax.tree.leaves(unmask(total, begun.residue, config))
    assert all(np.array_equal(a.reshape(-1), b) for a, b in zip(mine, opened, strict=True))


def test_the_sum_of_the_survivors_is_exact_for_every_pattern_of_five_sites():
  """Each site stays, or is lost at one of the three stages: 4^5 patterns, opened or refused."""
  config, ids, message, encoded = world(5, 4, 3, first=7)
  opened = 0
  for pattern in itertools.product(range(4), repeat=5):
    dropouts = stages(5, *(np.flatnonzero(np.equal(pattern, stage)) for stage in (1, 2, 3)))
    if pattern.count(0) < 3:  # of the complete graph three must answer, for everybody
      with pytest.raises(secagg.RoundAborted, match="round aborted"):
        secagg.begin(config, WORDS, ids, dropouts)
      continue
    got, came = play(config, ids, message, dropouts)
    assert same(got.message, sums(encoded, came, config)), pattern
    assert got.out_of_range == 0
    opened += 1
  assert opened == 1 + 5 * 3 + 10 * 9


@pytest.mark.parametrize("num_bits", [20, 64])
def test_narrow_and_wide_rings(num_bits):
  with jax.enable_x64(num_bits > 32):
    config, ids, message, encoded = world(6, 4, 3, num_bits)
    got, came = play(config, ids, message, stages(6, before=[1], during=[4]))
    assert same(got.message, sums(encoded, came, config))


@pytest.mark.slow
def test_a_thousand_sites_with_random_dropouts():
  config, ids, message, encoded = world(1000, 10, 6)
  for seed in range(3):
    u = np.random.default_rng(seed).uniform(size=1000)
    dropouts = secagg.Dropouts(u < 0.02, (u >= 0.02) & (u < 0.05), u > 0.98)
    got, came = play(config, ids, message, dropouts)
    assert 900 < came.sum() < 1000
    assert same(got.message, sums(encoded, came, config))


def test_sites_out_of_range_are_counted_among_the_survivors_only():
  config, ids, message, _ = world(5, 4, 3)
  wrong = {"w": message["w"].copy(), "b": message["b"]}
  wrong["w"][[0, 2, 3], 1, 1] = np.nan
  assert play(config, ids, wrong, stages(5, before=[0], during=[2]))[0].out_of_range == 1
  assert play(config, ids, wrong, stages(5, after=[0, 2]))[0].out_of_range == 3


def test_until_unmasked_the_sum_is_uniform():
  config, ids, *_ = world(5, 4, 3)
  begun = begin(config, ids)  # nobody is lost
  sent = send(np.full((5, 4096), 0.25, np.float32), begun.rows, config)
  total = jax.tree.map(lambda a: np.asarray(a).sum(0, dtype=a.dtype), sent)
  assert chi_square(total.message) < HIGH
  assert chi_square(unmask(total, begun.residue, config).message) > 10 * HIGH
  for missing in range(5):  # and so it stays while a single key is missing
    fewer = begun.residue._replace(signs=begun.residue.signs.at[missing].set(0))
    assert chi_square(unmask(total, fewer, config).message) < HIGH


@pytest.mark.parametrize("threshold", [3, None])
def test_a_message_that_comes_late_stays_hidden_and_would_not_without_own_masks(threshold):
  """The server has taken row 2's site for lost, learnt its private key, and then receives its
  message after all.
  """
  config = secagg.secure_sum(5, 1.0, threshold=threshold)
  tolerant, ids, *_ = world(5, 4, 3)
  message = np.full((5, 4096), 0.25, np.float32)
  begun = begin(tolerant, ids, stages(5, during=[2]))
  late = jax.tree.map(lambda a: a[2], send(message, begun.rows, config))
  pair_masks = (
    begun.residue.keys[4:8],
    -begun.residue.signs[4:8],
  )  # of the four survivors with the site, as the site has them
  stripped = unmask(late, secagg.Residue(*pair_masks), config)
  assert (chi_square(stripped.message) < HIGH) == (threshold is not None)
  if threshold is None:
    assert np.array_equal(stripped.message, ring.encode(message[2], config.fixed))


def test_of_each_site_one_secret_is_opened_and_never_the_one_behind_its_noise(monkeypatch):
  opened, combine = [], simulation.shamir.combine
  monkeypatch.setattr(
    simulation.shamir, "combine", lambda *args: opened.append(combine(*args)) or opened[-1]
  )
  config, ids, *_ = world(5, 4, 3)
  begun = begin(config, ids, stages(5, before=[0], during=[3]))
  own = [subkeys.draw(entropy(i)) for i in ids.tolist()]
  assert [keys.raw(np.asarray(k)) for k in begun.rows.noise] == [s.noise for s in own]
  told = [row.tobytes() for row in opened[0]]  # nothing of the site that shared nothing
  assert sorted(told) == sorted([own[1].seed, own[2].seed, own[4].seed, own[3].mask.private])
  reached = {keys.raw(k) for k in np.asarray(begun.residue.keys)} | {*told}
  assert not reached & {s.noise for s in own}


def test_a_graph_that_falls_apart_is_refused_since_each_part_would_lie_open(monkeypatch):
  """Of a circle of ten with four peers each, two sites in a row are lost at two places."""
  config, ids, message, encoded = world(10, 4, 3)
  following = graph.neighbours(keys.words(entropy("graph")(32)), 10, 2, WORDS[0])[:, 0]
  numbers = [0]
  while len(numbers) < 10:
    numbers.append(int(following[numbers[-1]]))
  circle = np.argsort(ids)[numbers]  # in rows
  dropouts = stages(10, during=circle[[0, 1, 5, 6]])
  with pytest.raises(secagg.RoundAborted, match="3 and 3 sites"):
    begin(config, ids, dropouts)
  monkeypatch.setattr(simulation, "_check_connected", lambda *_: None)
  begun = begin(config, ids, dropouts)
  part = np.isin(np.arange(10), circle[2:5])
  sent = jax.tree.map(lambda a: np.asarray(a).copy(), send(message, begun.rows, config))
  known = {k.tobytes() for k in np.asarray(begun.rows.keys)[part].reshape(-1, 8)}
  known |= {k.tobytes() for k in np.asarray(begun.rows.self_mask)[part]}
  theirs = np.array([k.tobytes() in known for k in np.asarray(begun.residue.keys)])
  residue = secagg.Residue(begun.residue.keys[theirs], begun.residue.signs[theirs])
  total = jax.tree.map(lambda a: a[part].sum(0, dtype=a.dtype), sent)
  assert same(unmask(total, residue, config).message, sums(encoded, part, config))


@pytest.mark.parametrize(
  ("lost", "why"),
  [
    ({"before": range(10)}, "no site's message came"),
    ({"before": range(5), "during": range(5, 10)}, "no site's message came"),
    ({"after": range(10)}, "0 of the 5 holders"),
    ({"during": range(9)}, "threshold=3 must answer"),
  ],
)
def test_rounds_that_lost_too_many_are_aborted(lost, why):
  config, ids, *_ = world(10, 4, 3)
  with pytest.raises(secagg.RoundAborted, match=f"round aborted: .*{why}"):
    secagg.begin(config, WORDS, ids, stages(10, **lost))


def mask_keys(begun):
  """All keys of a sum, each once: of pairs, of own masks, of noise."""
  rows = [begun.rows.keys.reshape(-1, 8), begun.rows.noise]
  rows += [] if begun.rows.self_mask is None else [begun.rows.self_mask]
  return {keys.raw(k) for a in rows for k in np.asarray(a)}


RESTART = """
import numpy as np
from primia_jax import secagg
for threshold in (None, 3):
  config = secagg.secure_sum(5, threshold=threshold)
  rows = secagg.begin(config, (4, 1), np.arange(5, dtype=np.int32)).rows
  found = rows.keys.reshape(-1, 8), rows.noise, *[rows.self_mask][: rows.self_mask is not None]
  print(*[np.asarray(k).astype("<u4").tobytes().hex() for a in found for k in a])
"""


@pytest.fixture(scope="module")
def restarted():
  """Of two restarts, and each threshold: the keys that one sum has drawn."""
  out = []
  for _ in range(2):
    told = subprocess.run(
      [sys.executable, "-c", RESTART], capture_output=True, text=True, check=True
    ).stdout
    lines = [{bytes.fromhex(key) for key in line.split()} for line in told.splitlines()]
    out.append(dict(zip((None, 3), lines, strict=True)))
  return out


@pytest.mark.parametrize("threshold", [None, 3])
def test_no_two_sums_share_a_key_whatever_a_caller_repeats(restarted, threshold):
  """The same arguments again, pickled and copied configurations, and restarts of the process."""
  config = secagg.secure_sum(5, threshold=threshold)
  ids, each = np.arange(5, dtype=np.int32), 10 + 5 + (0 if threshold is None else 5)
  again = [config, pickle.loads(pickle.dumps(config)), copy.deepcopy(config)]
  found = [mask_keys(secagg.begin(c, WORDS, ids)) for c in again * 2]
  found += [of[threshold] for of in restarted]
  assert [len(keys) for keys in found] == [each] * len(found)
  assert len(set.union(*found)) == each * len(found)
  fixed = [mask_keys(begin(config, ids)) for _ in range(2)]
  assert fixed[0] == fixed[1]  # so this test sees keys that depend on arguments only


@pytest.mark.parametrize("threshold", [None, 3])
def test_several_processes_expand_one_broadcast_secret_to_the_same_keys(monkeypatch, threshold):
  config, ids = secagg.secure_sum(5, threshold=threshold), np.arange(5, dtype=np.int32)
  sent = []

  def broadcast(drawn, first):
    sent.extend([drawn] if first else [])
    return sent[-1]

  def process(first):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
      simulation.multihost_utils, "broadcast_one_to_all", lambda drawn: broadcast(drawn, first)
    )
    return secagg.begin(config, WORDS, ids, stages(5, during=[1]) if threshold else None)

  first, second, next_sum = process(True), process(False), process(True)
  assert same(first, second)
  assert not mask_keys(first) & mask_keys(next_sum)
  assert len(mask_keys(first)) == 10 + 5 + (5 if threshold else 0)


def test_a_sum_without_masks_has_noise_keys_and_no_peers():
  config, ids = secagg.secure_sum(4, masked=False, threshold=3), np.arange(4, dtype=np.int32)
  rows, counted, residue = secagg.begin(config, WORDS, ids, stages(4, during=[2]))
  assert counted.tolist() == [True, True, False, True]
  assert (rows.peers.shape, rows.keys.shape, rows.self_mask) == ((4, 0), (4, 0, 8), None)
  assert len({np.asarray(k).tobytes() for k in rows.noise}) == 4
  assert residue.keys.shape == (0, 8)
  with pytest.raises(secagg.RoundAborted, match="no site's message came"):
    secagg.begin(config, WORDS, ids, stages(4, during=range(4)))


def test_wrong_dropouts_are_refused():
  none, first = np.zeros(3, bool), np.array([True, False, False])
  config, ids = secagg.secure_sum(3, threshold=2), np.arange(3, dtype=np.int32)
  got = secagg.begin(config, WORDS, ids, secagg.Dropouts(none, first))
  assert got.counted.tolist() == [False, True, True]
  with pytest.raises(ValueError, match=r"rows \[0\] are lost twice"):
    secagg.begin(config, WORDS, ids, secagg.Dropouts(first, none, first))
  with pytest.raises(ValueError, match=r"Dropouts.during is bool\[4\]; it must be bool\[3\]"):
    secagg.begin(config, WORDS, ids, secagg.Dropouts(none, np.zeros(4, bool)))
  with pytest.raises(ValueError, match=r"Dropouts.before is int64\[3\]"):
    secagg.begin(config, WORDS, ids, secagg.Dropouts(np.arange(3), none))
  for dropouts in (
    secagg.Dropouts(first, none),
    secagg.Dropouts(none, first),
    secagg.Dropouts(none, none, first),
  ):
    with pytest.raises(ValueError, match=r"the sites in rows \[0\] are lost.*a threshold"):
      secagg.begin(secagg.secure_sum(3), WORDS, ids, dropouts)


def test_impossible_sites_are_refused():
  config = secagg.secure_sum(4, threshold=3)
  for ids in ([], [0, 1, 1], [0, -1, 2], [0, 1, 2, 3, 4]):
    with pytest.raises(ValueError, match="give 1 to 4 site numbers, all different"):
      secagg.begin(config, WORDS, np.array(ids, np.int32))
  with pytest.raises(ValueError, match="degree=3 among 3 sites"):
    secagg.begin(config, WORDS, np.arange(3, dtype=np.int32))
  with pytest.raises(ValueError, match=r"num_peers=299 .* use num_peers < 255"):
    secagg.begin(secagg.secure_sum(300, threshold=200), WORDS, np.arange(300, dtype=np.int32))
  for words in ((2**32, 0), (0, 2**32), (-1, 0), (0, -1)):
    with pytest.raises(ValueError, match=r"\(round, purpose\) must be two integers"):
      secagg.begin(config, words, np.arange(4, dtype=np.int32))
