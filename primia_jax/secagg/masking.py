"""Additive masks: the server opens the sum over sites and nothing else. Pure functions of one site.

Each site encodes its message in Z_2^k, adds one mask for each peer of higher number and subtracts
one for each peer of lower number. Both ends of a pair make the same mask from the same key, so all
masks cancel in the sum over sites (Bonawitz et al., CCS 2017, section 4.0.1; peers on a random
regular graph: Bell et al., CCS 2020).

Where sites may be lost during a round (`SecureSum.threshold`), each also adds a mask of its own
(Bonawitz et al., section 4.0.2). Its peers then tell the server one of two things: the key of its
own mask, if its message arrived, or the secret behind its pair keys, if not. They never tell both,
since both together would open a message that arrives late. The masks left in the sum are a
`Residue`, which `unmask` removes.

Who learns what: whoever sees the masked messages (server, network) learns their sum, assuming that
ChaCha20 is a pseudorandom function and that the observer knows no key. With P peers and no
threshold, a site's message stays hidden unless all of its P peers collude with the server. With
threshold t, it stays hidden unless t of them do, or 2 t - P - 1 of them if the server also tells
honest peers different stories (hence 2 t > P + 1). `simulation.begin` makes the keys (`Row`) where
one process plays all sites; `protocol` agrees on the same keys by messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng, ring
from primia_jax.types import Array, PyTree

Words = tuple[Array | int, Array | int]  # (round, purpose) of a sum, each a uint32


@dataclasses.dataclass(frozen=True)
class SecureSum:
  """How the messages of a sum are encoded and masked; made by `secure_sum`, which checks it.

  Attributes:
    fixed: the encoding in Z_2^k.
    num_sites: the most sites that are ever summed.
    max_abs: the largest magnitude of any number in one site's message.
    num_peers: peers of each site.
    masked: False adds no masks: a baseline for benchmarks, without any protection.
    threshold: t, how many of a site and its P peers must answer once messages are in; None if no
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
    """The largest quantisation error of any number of the opened sum, before float32 rounding."""
    return self.num_sites * self.fixed.resolution / 2


class Row(NamedTuple):
  """One site's keys for one sum, or those of K sites stacked: [K, ...]. Never saved or used twice.

  Attributes:
    site: int32, the site's number.
    peers: [P] int32, the peers' numbers; the site's own number stands for no peer and adds no mask.
    keys: [P, 8] uint32, the key that the site shares with each peer for this sum.
    self_mask: [8] uint32, the key of the site's own mask; None without a threshold.
    noise: [8] uint32, the key of the noise that the site adds in this sum; no other site knows it.
  """

  site: Array
  peers: Array
  keys: Array
  self_mask: Array | None
  noise: Array

  def __repr__(self) -> str:
    return f"Row(site={self.site}, peers={self.peers}, keys hidden)"


class Masked(NamedTuple):
  """What one site sends, once masked: ring elements, uniform to whoever lacks the masks' keys.

  Attributes:
    message: the encoded message, plus masks.
    out_of_range: 1 if some number of the message was beyond `max_abs` or not finite, else 0; plus
      masks.
  """

  message: PyTree
  out_of_range: Array


class Residue(NamedTuple):
  """The masks left in a sum: the survivors' own, and those between survivors and lost sites.

  Attributes:
    keys: [M, 8] uint32.
    signs: [M] int32, the sign of each mask in the sum; 0 for padding.
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
  """Chooses the finest encoding in which the sum cannot overflow, and checks all settings.

  Args:
    num_sites: sites summed in a round, at least 2: the sum over one site is that site's message.
    max_abs: the largest magnitude of any number in a message.
    num_bits: k, the width of the ring.
    num_peers: peers of each site (even, unless it is all others); None for all others.
    masked, threshold: see `SecureSum`. A threshold must be more than half of a site and its peers.

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
      f"{holders}: with half of them or fewer, a server that tells them different stories learns "
      f"both secrets of a site"
    )
  ring.storage(num_bits)
  return SecureSum(
    ring.fit(max_abs, num_sites, num_bits), num_sites, max_abs, num_peers, masked, threshold
  )


def encode(message: PyTree, config: SecureSum) -> Masked:
  """Encodes one site's message in the ring, without masks.

  Args:
    message: a pytree of float arrays.
    config: the encoding.

  Returns:
    Ring elements. A number beyond `max_abs`, or not finite, is encoded as 0 and sets out_of_range,
    so that the round can be refused.
  """
  leaves, structure = jax.tree.flatten(message)
  legal = [jnp.abs(x) <= jnp.asarray(config.max_abs, x.dtype) for x in leaves]
  clean = [jnp.where(ok, x, jnp.zeros_like(x)) for ok, x in zip(legal, leaves, strict=True)]
  wrong = jnp.logical_not(jnp.stack([jnp.all(ok) for ok in legal]).all()).astype(
    ring.storage(config.fixed.num_bits)
  )
  encoded = [ring.encode(x, config.fixed) for x in clean]
  return Masked(jax.tree.unflatten(structure, encoded), wrong)


def mask(encoded: Masked, row: Row, words: Words, config: SecureSum) -> Masked:
  """Masks one site's ring elements; without `config.masked` it returns them as they are.

  Args:
    encoded: from `encode`, or ring elements made otherwise, e.g. with noise in them.
    row: this site's keys.
    words: (round, purpose), the same as `simulation.begin` was given.
    config: the encoding.

  Raises:
    ValueError: where the config has a threshold and the row no key of the site's own mask.
  """
  keys, signs = row.keys, jnp.sign(row.peers - row.site)
  if config.masked and config.threshold is not None:
    if row.self_mask is None:
      raise ValueError(
        f"row.self_mask is None, and threshold={config.threshold} needs the key of the site's own "
        f"mask; make the row by simulation.begin with this config"
      )
    keys = jnp.concatenate([keys, row.self_mask[None]])
    signs = jnp.concatenate([signs, jnp.ones(1, jnp.int32)])
  return _add_masks(encoded, keys, signs, words, config)


def unmask(total: Masked, residue: Residue, words: Words, config: SecureSum) -> Masked:
  """Removes from the survivors' ring sum the masks that have not cancelled; `open_sum` follows.

  Who learns what: the server learns the survivors' sum, and no part of it if their graph is
  connected, which `simulation.begin` and `protocol.consistency` check. (A circle of neighbours
  falls apart only where P / 2 sites in a row are missing, at two places.)

  Args:
    total: the sum, with each survivor's message in it once.
    residue: from `simulation.begin`.
    words: (round, purpose), as the sites had them.
    config: the encoding.
  """
  return _add_masks(total, residue.keys, -residue.signs, words, config)


def open_sum(total: Masked, config: SecureSum) -> tuple[PyTree, Array]:
  """Decodes the ring sum of the sites' messages, in which no masks are left.

  Returns:
    The sum of the messages as float32, each number off by at most `config.error_bound` (and
    float32's rounding), and the number of sites whose message was out of range. Do not use the sum
    unless that number is 0.
  """
  num_bits = config.fixed.num_bits
  message = jax.tree.map(
    lambda v: ring.decode(ring.reduce(v, num_bits), config.fixed), total.message
  )
  return message, ring.reduce(total.out_of_range, num_bits)


def leaf_masks(
  keys: Array, signs: Array, words: Words, shapes: Sequence[tuple[int, ...]], dtype
) -> list[Array]:
  """The signed sum of all keys' masks for each leaf of a message, not yet reduced to k bits.

  The nonce is (round, purpose, leaf), so a leaf's masks do not depend on how many leaves there are,
  nor on its shape but for the number of elements. Every mask of this package is made here.

  Args:
    keys: [M, 8] uint32.
    signs: [M] int32; 0 for padding.
    words: (round, purpose).
    shapes: of the leaves.
    dtype: uint32 or uint64.
  """
  nonce = lambda leaf: jnp.stack([jnp.asarray(n, jnp.uint32) for n in (*words, leaf)])
  return [prng.mask_sum(keys, signs, nonce(i), shape, dtype) for i, shape in enumerate(shapes)]


def _add_masks(v: Masked, keys: Array, signs: Array, words: Words, config: SecureSum) -> Masked:
  if not config.masked:
    return v
  leaves, structure = jax.tree.flatten(v)
  masks = leaf_masks(keys, signs, words, [a.shape for a in leaves], leaves[0].dtype)
  add = lambda a, m: ring.reduce(a + m, config.fixed.num_bits)
  return jax.tree.unflatten(structure, list(map(add, leaves, masks)))


def bytes_per_number(config: SecureSum) -> int:
  """The bytes of one number of a message on the wire: k bits, in whole bytes."""
  return -(-config.fixed.num_bits // 8)
