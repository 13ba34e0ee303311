"""Secure aggregation by additive masks: the server opens the sum over sites and nothing else.

Each site encodes its message in Z_2^k, adds one mask for each peer of higher number and subtracts
one for each peer of lower number. Both ends of a pair make the same mask from the same key, so in
the sum over sites all masks cancel (Bonawitz et al., CCS 2017, section 4.0.1; peers on a random
regular graph: Bell et al., CCS 2020).

Where sites may be lost during a round (`SecureSum.threshold`), each adds a mask of its own as well
(Bonawitz et al., section 4.0.2). Peers then tell the server either the key of a site's own mask, if
its message arrived, or the secret behind its pair keys, if not, and never both: with both, a
message that came late would lie open. What is left in the sum is a `Residue`, which `unmask` takes
away.

Who learns what: whoever sees the masked messages (server, network) learns their sum, under the
assumption that ChaCha20 is a pseudorandom function and that no key is known to him. With P peers
and no threshold, a site's message stays hidden unless all of its P peers collude with the server;
with threshold t, unless t of them do, or 2 t - P - 1 of them if the server also tells honest peers
different stories (hence 2 t > P + 1). `links` are data: from a trusted dealer (`deal_links`) or
from key agreement (`simulation`, `protocol`).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng, ring
from primia_jax.types import Array, Key, PyTree

SELF_MASK, NOISE = range(
  2
)  # uses of a site's own secret; peers may reveal the key of the first, never the secret


@dataclasses.dataclass(frozen=True)
class SecureSum:
  """How messages of one kind are encoded and masked; made by `secure_sum`, which checks it.

  Attributes:
    fixed: the encoding in Z_2^k.
    num_sites: the most sites that are ever summed.
    max_abs: the largest magnitude of any number in one site's message.
    num_peers: peers of each site.
    masked: False leaves the masks out: what a benchmark compares with, and no protection at all.
    threshold: t, how many of a site and its P peers must answer once messages are in; None where no
      site may be lost.
  """

  fixed: ring.FixedPoint
  num_sites: int
  max_abs: float
  num_peers: int
  masked: bool = True
  threshold: int | None = None

  @property
  def error_bound(self) -> float:
    """The largest quantisation error of any number of the opened sum, before its rounding to
    float32.
    """
    return self.num_sites * self.fixed.resolution / 2


class Links(NamedTuple):
  """What connects sites to their peers in one round, for one site or stacked over sites.

  Attributes:
    peers: [..., P] int32, the numbers of the peers; the site's own number stands for none, and adds
      no mask.
    keys: [..., P, 8] uint32, the secret that the site shares with each of them.
    own: [..., 8] uint32, the site's own secret, fresh for each sum that is opened, from which it
      derives a key for each use (`SELF_MASK`, `NOISE`); None without a threshold.
  """

  peers: Array
  keys: Array
  own: Array | None = None


class Masked(NamedTuple):
  """What one site sends: ring elements, uniform to whoever lacks the pair keys.

  Attributes:
    message: the encoded message plus masks.
    out_of_range: a masked 1 where some number of the message was beyond `max_abs` or not finite,
      else a masked 0.
  """

  message: PyTree
  out_of_range: Array


class Residue(NamedTuple):
  """The masks left in a sum from which sites are missing: survivors' own, and those between
  survivors and the lost.

  Attributes:
    keys: [M, 8] uint32.
    signs: [M] int32, with which each mask stands in the sum; 0 for padding.
  """

  keys: Array
  signs: Array


def secure_sum(
  num_sites: int,
  max_abs: float = 32.0,
  *,
  num_bits: int = 32,
  num_peers: int | None = None,
  masked: bool = True,
  threshold: int | None = None,
) -> SecureSum:
  """Chooses the finest encoding in which the sum cannot overflow, and checks the whole before any
  work.

  Args:
    num_sites: sites summed in a round, at least 2: the sum over one site is that site's message.
    max_abs: the largest magnitude of any number in a message.
    num_bits: k, the width of the ring.
    num_peers: peers of each site (even, unless it is all others); None for all others.
    masked, threshold: see `SecureSum`. A threshold is more than half of a site and its peers.

  Raises:
    ValueError: for fewer than two sites, an impossible number of peers or threshold, or numbers
      that do not fit the ring.
  """
  if num_sites < 2:
    raise ValueError(
      f"secure aggregation over {num_sites} site would open that site's own message; use at least "
      f"2 sites a round"
    )
  all_others = num_sites - 1
  num_peers = all_others if num_peers is None else num_peers
  max_abs = float(np.float32(max_abs))  # the very number that float32 messages are compared with
  if num_peers < 1 or num_peers > all_others or (num_peers % 2 and num_peers != all_others):
    raise ValueError(
      f"num_peers={num_peers} of {num_sites} sites; use an even number from 2 to {all_others}, or "
      f"{all_others} (all)"
    )
  holders = num_peers + 1
  if threshold is not None and not holders < 2 * threshold <= 2 * holders:
    raise ValueError(
      f"threshold={threshold} of a site and its {num_peers} peers; use {holders // 2 + 1} to "
      f"{holders}: from half of "
      "them or fewer, a server that tells them different stories learns both secrets of a site"
    )
  ring.storage(num_bits)
  return SecureSum(
    ring.fit(max_abs, num_sites, num_bits), num_sites, max_abs, num_peers, masked, threshold
  )


def peers(key: Key, site_ids: Array, num_peers: int) -> Array:
  """Arranges sites in a random circle and makes each the peer of its nearest neighbours on both
  sides.

  Args:
    key: public randomness, the same for everybody.
    site_ids: [K] int32.
    num_peers: P, even, or K - 1 for the complete graph.

  Returns:
    [K, P] int32 site numbers; the relation is symmetric.
  """
  num_sites = site_ids.shape[0]
  if num_peers == num_sites - 1:
    offsets = np.arange(1, num_sites)
  else:
    half = np.arange(1, num_peers // 2 + 1)
    offsets = np.concatenate([half, -half])
  circle = jax.random.permutation(key, num_sites)
  place = jnp.argsort(circle).astype(jnp.int32)
  return site_ids[circle[(place[:, None] + jnp.asarray(offsets, jnp.int32)[None, :]) % num_sites]]


def deal_links(dealer_key: Array, site_ids: Array, peer_ids: Array) -> Links:
  """A trusted dealer's pair keys: the dealer and the two sites of a pair know its key, nobody else
  does.

  Args:
    dealer_key: [8] uint32, the dealer's secret.
    site_ids: [K] int32.
    peer_ids: [K, P] int32.
  """

  def pair_key(a: Array, b: Array) -> Array:
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    return prng.derive(dealer_key, low.astype(jnp.uint32), high.astype(jnp.uint32))

  of_site = jax.vmap(pair_key, in_axes=(None, 0))
  return Links(peer_ids, jax.vmap(of_site)(site_ids, peer_ids))


def protect(
  message: PyTree, site_id: Array, links: Links, nonce: tuple[Array | int, int], config: SecureSum
) -> Masked:
  """Encodes and masks one site's message.

  Args:
    message: a pytree of float arrays.
    site_id: int32 scalar.
    links: this site's peers [P] and keys [P, 8], and its own secret [8] where there is a threshold.
    nonce: (round, purpose), never used twice with the same keys: masks are one-time.
    config: the encoding.

  Returns:
    Ring elements. A number beyond `max_abs`, or not finite, is sent as 0 and counted, so that the
    round can be refused.

  Raises:
    ValueError: as `mask`.
  """
  leaves, structure = jax.tree.flatten(message)
  legal = [jnp.abs(x) <= jnp.asarray(config.max_abs, x.dtype) for x in leaves]
  clean = [jnp.where(ok, x, jnp.zeros_like(x)) for ok, x in zip(legal, leaves, strict=True)]
  wrong = jnp.logical_not(jnp.stack([jnp.all(ok) for ok in legal]).all()).astype(
    ring.storage(config.fixed.num_bits)
  )
  encoded = [ring.encode(x, config.fixed) for x in clean]
  return mask(Masked(jax.tree.unflatten(structure, encoded), wrong), site_id, links, nonce, config)


def mask(
  encoded: Masked, site_id: Array, links: Links, nonce: tuple[Array | int, int], config: SecureSum
) -> Masked:
  """Masks one site's message that is in the ring already, e.g. with noise in it; the arguments are
  those of `protect`.

  Raises:
    ValueError: for a threshold and no own secret.
  """
  keys, signs = links.keys, jnp.sign(links.peers - site_id)
  if config.masked and config.threshold is not None:
    if links.own is None:
      raise ValueError(f"threshold={config.threshold} needs each site's own secret: see Links.own")
    keys = jnp.concatenate([keys, prng.derive(links.own, SELF_MASK)[None]])
    signs = jnp.concatenate([signs, jnp.ones(1, jnp.int32)])
  return _add_masks(encoded, keys, signs, nonce, config)


def unmask(
  total: Masked, residue: Residue, nonce: tuple[Array | int, int], config: SecureSum
) -> Masked:
  """Takes from the ring sum of the survivors' messages the masks that have not cancelled, before
  `open_sum`.

  Who learns what: the server learns the survivors' sum, and no part of it where their graph is
  connected, which `simulation.recover` makes sure of. (The circle of `peers` falls apart only where
  P / 2 sites in a row are missing, at two places.)

  Args:
    total: the sum, in which each survivor's message stands once.
    residue: from the protocol, or from `simulation.recover`.
    nonce: (round, purpose), as the sites had it.
    config: the encoding.
  """
  return _add_masks(total, residue.keys, -residue.signs, nonce, config)


def open_sum(total: Masked, config: SecureSum) -> tuple[PyTree, Array]:
  """Decodes the ring sum of all sites' masked messages, in which the masks have cancelled.

  Returns:
    The sum of the messages as float32, each number off by at most `config.error_bound` (and
    float32's rounding), and the number of sites whose message was out of range: unless it is 0, the
    sum is not to be used.
  """
  num_bits = config.fixed.num_bits
  message = jax.tree.map(
    lambda v: ring.decode(ring.reduce(v, num_bits), config.fixed), total.message
  )
  return message, ring.reduce(total.out_of_range, num_bits)


def _add_masks(
  v: Masked, keys: Array, signs: Array, nonce: tuple[Array | int, int], config: SecureSum
) -> Masked:
  """Adds to every leaf of ring elements the signed masks of all keys, with the leaf's number as
  third nonce word.
  """
  if not config.masked:
    return v

  def add(leaf: int, a: Array) -> Array:
    words = jnp.stack([jnp.asarray(n, jnp.uint32) for n in (*nonce, leaf)])
    return ring.reduce(
      a + prng.mask_sum(keys, signs, words, a.shape, a.dtype), config.fixed.num_bits
    )

  leaves, structure = jax.tree.flatten(v)
  return jax.tree.unflatten(structure, [add(i, a) for i, a in enumerate(leaves)])


def bytes_per_number(config: SecureSum) -> int:
  """What one number of a message weighs on the wire: k bits, in whole bytes."""
  return -(-config.fixed.num_bits // 8)
