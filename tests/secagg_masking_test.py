import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import prng, ring, secagg, sites
from primia_jax.secagg import keys, simulation

# The 0.1 % and 99.9 % quantiles of chi-square with 255 degrees of freedom (Wilson and Hilferty's
# cube root).
LOW, HIGH = (255 * (1 - 2 / (9 * 255) + z * (2 / (9 * 255)) ** 0.5) ** 3 for z in (-3.09, 3.09))


def messages(num_sites, scale=1.0):
  rng = np.random.default_rng(3)
  draw = lambda *shape: (scale * rng.uniform(-1, 1, (num_sites, *shape))).astype(np.float32)
  return {"kernel": draw(5, 7), "bias": draw(4), "weight": draw()}


def rows(config, ids=None, seed=0):
  """The keys of all sites for one sum, the same ones for the same seed."""
  ids = np.arange(config.num_sites) if ids is None else np.asarray(ids)
  key = lambda name: keys.words(hashlib.sha256(f"{seed} {name}".encode()).digest())
  source = lambda name: keys.expanding(key(name))
  return simulation._begin(config, (0, 0), ids.astype(np.int32), None, source).rows


@functools.partial(jax.jit, static_argnums=2)
def protect_all(message, rows, config, round_index=0, purpose=0):
  one = lambda message, row: secagg.mask(
    secagg.encode(message, config), row, (round_index, purpose), config
  )
  return jax.vmap(one)(message, rows)


def total(sent):
  return jax.tree.map(lambda a: jnp.sum(a, axis=0, dtype=a.dtype), sent)


def chi_square(words):
  counts = np.bincount(np.asarray(words).view(np.uint8).ravel(), minlength=256)
  expected = counts.sum() / 256
  return np.sum((counts - expected) ** 2 / expected)


@pytest.mark.parametrize(
  ("num_sites", "num_peers", "num_bits"),
  [
    (2, None, 32),
    (3, None, 32),
    (6, None, 20),
    (7, 2, 32),
    (7, 4, 20),
    (8, 4, 32),
    (5, 2, 64),
    (4, None, 64),
  ],
)
def test_the_opened_sum_is_the_sum_of_the_encoded_updates_bit_for_bit(
  num_sites, num_peers, num_bits
):
  with jax.enable_x64(num_bits > 32):
    config = secagg.secure_sum(num_sites, 1.0, num_bits=num_bits, num_peers=num_peers)
    update = messages(num_sites)
    summed = total(protect_all(update, rows(config, np.arange(num_sites) * 3 + 1), config, 5))
    for name, x in update.items():
      encoded = np.asarray(ring.encode(jnp.asarray(x), config.fixed)).reshape(num_sites, -1)
      want = [sum(map(int, column)) % 2**num_bits for column in encoded.T]
      assert [int(n) % 2**num_bits for n in np.asarray(summed.message[name]).ravel()] == want
    opened, out_of_range = secagg.open_sum(summed, config)
    assert int(out_of_range) == 0
    for name, x in update.items():
      exact = x.astype(np.float64).sum(0)
      assert opened[name].dtype == jnp.float32
      assert np.all(
        np.abs(np.asarray(opened[name], np.float64) - exact)
        <= config.error_bound + np.abs(exact) * 2**-24
      )


@pytest.mark.parametrize("text", ["loop", "scan", "vmap", "chunk=2", "mesh"])
def test_every_placement_opens_the_same_bits(text):
  config = secagg.secure_sum(5, num_peers=2)
  placement, of_all = sites.parse_placement(text), rows(config)

  def site(_, inputs):
    message, row = inputs
    return secagg.mask(secagg.encode(message, config), row, (2, 1), config), ()

  summed, _ = placement.sum_over_sites(site)((), placement.put((messages(5), of_all)))
  opened, _ = secagg.open_sum(summed, config)
  want, _ = secagg.open_sum(total(protect_all(messages(5), of_all, config, 2, 1)), config)
  assert all(
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(opened), jax.tree.leaves(want), strict=True)
  )


@pytest.mark.parametrize("masked", [True, False])
def test_one_masked_update_is_uniform_and_an_unmasked_one_is_not(masked):
  """Chi-square on bytes; the same statistic must reject where the protection is taken out."""
  config = secagg.secure_sum(3, 1.0, masked=masked)
  update = {"w": np.full((3, 4096), 0.25, np.float32)}
  for seed in range(8):
    sent = protect_all(update, rows(config, seed=seed), config, seed)
    for site in range(3):
      accepted = LOW / 1.2 < chi_square(sent.message["w"][site]) < HIGH * 1.2
      assert accepted == masked


@pytest.mark.parametrize("masked", [True, False])
def test_over_many_keys_every_byte_of_one_number_is_uniform(masked):
  """One fixed number, fresh keys and nonces: the masked value and the masked flag take all values
  equally often.
  """
  config = secagg.secure_sum(2, 1.0, masked=masked)

  def send(trial):
    key = prng.derive(jnp.arange(8, dtype=jnp.uint32), trial)
    row = secagg.Row(jnp.int32(0), jnp.ones(1, jnp.int32), key[None], None, key)
    encoded = secagg.encode(jnp.full(1, 0.7, jnp.float32), config)
    sent = secagg.mask(encoded, row, (trial, 0), config)
    return sent.message[0], sent.out_of_range

  values, flags = jax.jit(lambda trials: jax.lax.map(send, trials))(
    jnp.arange(4096, dtype=jnp.uint32)
  )
  for words in (values, flags):
    for byte in range(4):
      column = np.asarray(words).view(np.uint8).reshape(-1, 4)[:, byte]
      assert (LOW / 1.2 < chi_square(column.copy()) < HIGH * 1.2) == masked


def test_a_narrow_ring_is_uniform_over_all_its_values():
  config = secagg.secure_sum(2, 1.0, num_bits=8)
  of_all = rows(config)
  sent = protect_all({"w": np.full((2, 1 << 16), 0.3, np.float32)}, of_all, config)
  for words in np.asarray(sent.message["w"]):
    assert words.max() < 256
    assert LOW / 1.2 < chi_square(words.astype(np.uint8)) < HIGH * 1.2


def test_masked_values_do_not_depend_on_the_update():
  config = secagg.secure_sum(3, 1.0)
  of_all = rows(config)
  x = np.random.default_rng(0).uniform(-1, 1, (3, 40_000)).astype(np.float32)
  correlation = lambda sent: np.corrcoef(x[0], ring.decode(sent.message["w"][0], config.fixed))[
    0, 1
  ]
  assert abs(correlation(protect_all({"w": x}, of_all, config))) < 4 / 200  # four standard errors
  unmasked = secagg.secure_sum(3, 1.0, masked=False)
  assert correlation(protect_all({"w": x}, of_all, unmasked)) > 0.999


def test_masks_of_rounds_purposes_leaves_and_pairs_all_differ():
  config = secagg.secure_sum(4, 1.0)
  of_all = rows(config)
  zero = {
    "a": np.zeros((4, 64), np.float32),
    "b": np.zeros((4, 64), np.float32),
  }  # what is sent is the mask itself
  seen = []
  for round_index in (0, 1, 256):
    for purpose in (0, 1, 2):
      sent = protect_all(zero, of_all, config, round_index, purpose)
      seen += [np.asarray(leaf[site]) for leaf in sent.message.values() for site in range(4)]
      assert not set(np.asarray(sent.out_of_range)) & set(seen[-1])
  assert len({mask.tobytes() for mask in seen}) == len(seen) == 3 * 3 * 2 * 4
  for i, mask in enumerate(seen):  # not shifted copies of each other either
    assert all(not np.intersect1d(mask, other).size for other in seen[i + 1 :])


@pytest.mark.parametrize(
  ("num_sites", "num_peers"), [(2, 1), (5, 2), (6, 4), (6, 5), (9, 8), (11, 6)]
)
def test_peers_are_symmetric_regular_and_never_oneself(num_sites, num_peers):
  ids = np.random.default_rng(0).permutation(100)[:num_sites]
  config, graphs = secagg.secure_sum(num_sites, num_peers=num_peers), []
  for seed in range(6):
    got = rows(config, ids, seed)
    assert np.array_equal(got.site, ids)
    assert got.peers.shape == (num_sites, num_peers)
    of = {int(i): set(row) for i, row in zip(ids, got.peers.tolist(), strict=True)}
    assert all(len(row) == num_peers and i not in row for i, row in of.items())
    assert all(i in of[j] for i, row in of.items() for j in row)
    graphs.append(tuple(sorted((i, j) for i, row in of.items() for j in row)))
  assert (len(set(graphs)) > 1) == (num_peers < num_sites - 1)  # random, where there is a choice


@pytest.mark.parametrize("threshold", [None, 3])
def test_both_ends_of_a_pair_hold_one_key_and_no_two_pairs_share_one(threshold):
  got = rows(secagg.secure_sum(5, threshold=threshold), [4, 0, 9, 2, 7])
  of_pair = {}
  for site, peers, own in zip(got.site.tolist(), got.peers.tolist(), got.keys, strict=True):
    for peer, key in zip(peers, np.asarray(own), strict=True):
      of_pair.setdefault(frozenset((site, peer)), set()).add(key.tobytes())
  assert len(of_pair) == 10
  assert all(len(one) == 1 for one in of_pair.values())
  noise = {np.asarray(key).tobytes() for key in got.noise}
  assert len(set.union(*of_pair.values(), noise)) == 10 + 5


def test_the_sum_without_any_one_site_stays_uniform():
  config = secagg.secure_sum(6, 1.0, num_peers=2)
  of_all = rows(config)
  sent = protect_all({"w": np.full((6, 4096), 0.25, np.float32)}, of_all, config)
  for absent in range(6):
    rest = total(jax.tree.map(lambda a, absent=absent: np.delete(a, absent, axis=0), sent))
    assert LOW / 1.2 < chi_square(rest.message["w"]) < HIGH * 1.2
  assert chi_square(total(sent).message["w"]) > 10 * HIGH


@pytest.mark.parametrize("bad", [1.001, -3e38, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("num_bad", [1, 3])
def test_numbers_out_of_range_are_counted_and_sent_as_nothing(bad, num_bad):
  config = secagg.secure_sum(4, 1.0)
  of_all = rows(config)
  update = messages(4)
  update["kernel"][:num_bad, 2, 3] = bad
  opened, out_of_range = secagg.open_sum(total(protect_all(update, of_all, config)), config)
  assert int(out_of_range) == num_bad
  clean = np.where(np.abs(update["kernel"]) <= 1, update["kernel"], 0).astype(np.float64).sum(0)
  np.testing.assert_allclose(opened["kernel"], clean, atol=config.error_bound + 1e-6)


@pytest.mark.parametrize("max_abs", [1.0, 0.1, 32.0, 2.0**31 / 3 / 2**20])
def test_the_very_largest_numbers_are_in_range_and_do_not_overflow(max_abs):
  config = secagg.secure_sum(3, max_abs)
  of_all = rows(config)
  edge = np.float32(config.max_abs)
  opened, wrong = secagg.open_sum(total(protect_all(np.full((3, 2), edge), of_all, config)), config)
  assert int(wrong) == 0
  np.testing.assert_allclose(opened, 3 * float(edge), atol=config.error_bound, rtol=2**-23)
  beyond = np.full((3, 2), np.nextafter(edge, np.float32(np.inf)))
  assert int(secagg.open_sum(total(protect_all(beyond, of_all, config)), config)[1]) == 3


def test_without_masks_the_encoding_is_sent_as_it_is():
  config = secagg.secure_sum(3, 1.0, masked=False)
  of_all = rows(config)
  update = messages(3)
  sent = protect_all(update, of_all, config)
  assert all(
    np.array_equal(sent.message[n], ring.encode(jnp.asarray(x), config.fixed))
    for n, x in update.items()
  )


@pytest.mark.parametrize(
  ("kwargs", "told"),
  [
    ({"num_sites": 1}, "at least 2 sites"),
    ({"num_sites": 0}, "at least 2 sites"),
    ({"num_sites": 6, "num_peers": 3}, "even number"),
    ({"num_sites": 6, "num_peers": 6}, "even number"),
    ({"num_sites": 6, "num_peers": 0}, "even number"),
    ({"num_sites": 6, "num_peers": -2}, "even number"),
    ({"num_sites": 100, "max_abs": 1000.0, "num_bits": 16}, "use num_bits >= 18"),
    ({"num_sites": 3, "num_bits": 40}, "JAX_ENABLE_X64"),
    ({"num_sites": 3, "max_abs": 0.0}, "positive"),
    ({"num_sites": 3, "max_abs": float("nan")}, "positive"),
    ({"num_sites": 3, "num_bits": 1}, "bits"),
  ],
)
def test_unsound_settings_are_refused(kwargs, told):
  with pytest.raises(ValueError, match=told):
    secagg.secure_sum(**kwargs)


def test_the_error_bound_is_reached_and_not_passed():
  config = secagg.secure_sum(4, 1.0, num_bits=16)
  half = config.fixed.resolution / 2
  x = np.full((4, 1), 2 * config.fixed.resolution + 0.999 * half, np.float32)
  of_all = rows(config)
  opened, _ = secagg.open_sum(total(protect_all(x, of_all, config)), config)
  error = abs(float(opened[0]) - 4 * float(x[0, 0]))
  assert 0.99 * config.error_bound < error <= config.error_bound


def test_a_threshold_adds_one_mask_from_the_sites_own_secret():
  config, tolerant = (
    secagg.secure_sum(5, 1.0, num_peers=4),
    secagg.secure_sum(5, 1.0, num_peers=4, threshold=3),
  )
  of_all, update = rows(tolerant), messages(5)
  without, sent = (protect_all(update, of_all, c, 3, 1) for c in (config, tolerant))
  for i in range(5):
    leaves = zip(jax.tree.leaves(without), jax.tree.leaves(sent), strict=True)
    for leaf, (a, b) in enumerate(leaves):
      nonce = jnp.asarray([3, 1, leaf], jnp.uint32)
      assert np.array_equal(b[i] - a[i], prng.bits(of_all.self_mask[i], nonce, a.shape[1:]))
  residue = secagg.Residue(
    jnp.concatenate([of_all.self_mask, jnp.ones((1, 8), jnp.uint32)]),
    jnp.asarray([1] * 5 + [0], jnp.int32),
  )
  opened = secagg.unmask(total(sent), residue, (3, 1), tolerant)
  assert all(map(np.array_equal, jax.tree.leaves(opened), jax.tree.leaves(total(without))))


def test_a_peer_that_is_the_site_itself_adds_no_mask():
  config = secagg.secure_sum(3, 1.0)
  of_all = rows(config)
  update = messages(3)
  alone = of_all._replace(peers=jnp.broadcast_to(of_all.site[:, None], of_all.peers.shape))
  bare = secagg.secure_sum(3, 1.0, masked=False)
  sent, encoded = protect_all(update, alone, config), protect_all(update, of_all, bare)
  assert all(map(np.array_equal, jax.tree.leaves(sent), jax.tree.leaves(encoded)))


@pytest.mark.parametrize(
  ("num_sites", "num_peers", "fits"),
  [(2, None, [2]), (5, 4, [3, 4, 5]), (6, None, [4, 5, 6]), (9, 2, [2, 3])],
)
def test_a_threshold_is_more_than_half_of_a_site_and_its_peers(num_sites, num_peers, fits):
  for threshold in range(-1, 9):
    if threshold in fits:
      assert (
        secagg.secure_sum(num_sites, num_peers=num_peers, threshold=threshold).threshold
        == threshold
      )
    else:
      with pytest.raises(ValueError, match=f"threshold={threshold} .*use {fits[0]} to {fits[-1]}"):
        secagg.secure_sum(num_sites, num_peers=num_peers, threshold=threshold)


def test_a_threshold_needs_secrets_of_the_sites_own():
  config = secagg.secure_sum(5, 1.0, threshold=3)
  of_all = rows(secagg.secure_sum(5, 1.0))
  with pytest.raises(ValueError, match=r"row\.self_mask is None, and threshold=3"):
    protect_all(messages(5), of_all, config)
