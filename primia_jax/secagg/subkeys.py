"""All secrets of a site in one masked sum, and every key that is derived from one.

`Site.secret`, of noise and batches, is another; `privacy.subkeys` lists its keys.

  secret        fresh for   opened by shares   keys made from it, and their use
  mask.private  each sum    of a lost site     HKDF(X25519(own, peer's), "mask", round, low, high):
                                               the mask of a pair of sites
  seed          each sum    of a survivor      HKDF(seed, "self mask", round, site, site): the
                                               site's own mask
  noise         each sum    never              is itself the key of the site's noise (`privacy`)
  box.private   each sum    never              HKDF(X25519(own, peer's), "box", round, from, to):
                                               seals one site's shares for another
  identity      each run    never              Ed25519: signs the site's messages

A mask's key is of one sum and its nonce is (round, purpose, leaf of the message). No two rows share
a secret, and HKDF's info (label, round, ordered pair) tells the keys of one row apart. Simulation
draws the first three of each site. It also has two secrets that a deployment does not have:

  dealer        each sum    -                  `prng.derive` by two words (low, high): the mask of a
                                               pair; by one word (site): a site's noise
  broadcast     each sum    -                  HKDF(secret, "simulated NAME", 0, 0, 0): the stream
                                               that is the entropy of NAME

The dealer serves sums without a threshold; `prng.derive` keeps one word and two words apart. The
broadcast serves several processes of one operator; NAME is a site, "graph" or "dealer".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.secagg import keys
from primia_jax.types import Array

_MASK, _SELF_MASK, _BOX, _SIMULATED = "mask", "self mask", "box", "simulated "  # labels of HKDF


class Secrets(NamedTuple):
  """A site's secrets for one sum, never sent, stored or printed.

  Attributes:
    mask: X25519 pair behind its pair masks.
    seed: 32 bytes behind its own mask.
    noise: 32 bytes, the key of its noise.
  """

  mask: keys.KeyPair
  seed: bytes
  noise: bytes

  def __repr__(self) -> str:
    return f"Secrets(mask={self.mask})"


FORGOTTEN = Secrets(keys.KeyPair(b"", b""), b"", b"")


def draw(entropy: keys.Entropy) -> Secrets:
  """A site's secrets for one sum."""
  mask, seed, noise = (entropy(keys.KEY_BYTES) for _ in range(3))
  return Secrets(keys.key_pair(mask), seed, noise)


def pair_mask_keys(
  private: bytes, peers: Mapping[int, bytes], round: int, site: int
) -> dict[int, np.ndarray]:
  """The keys of the masks that a site shares with its peers, [8] uint32 each.

  Either site of a pair can make its key, and so can whoever recovers one private key.

  Args:
    private: the site's mask key.
    peers: peer to its public mask key.
    round: the round.
    site: the site's number.
  """
  shared = zip(peers, keys.agree(private, *peers.values()), strict=True)
  return {v: keys.expand(s, _MASK, round, min(site, v), max(site, v)) for v, s in shared}


def self_mask_key(seed: bytes, round: int, site: int) -> np.ndarray:
  """The key of a site's own mask, [8] uint32."""
  return keys.expand(seed, _SELF_MASK, round, site, site)


def box_key(
  private: bytes, peer_public: bytes, round: int, sender: int, recipient: int
) -> np.ndarray:
  """The key of the box with one site's shares for another, [8] uint32."""
  (shared,) = keys.agree(private, peer_public)
  return keys.expand(shared, _BOX, round, sender, recipient)


def dealt(dealer: Array, ids: Array, peers: Array) -> tuple[Array, Array]:
  """A trusted dealer's pair keys and the sites' noise keys; the dealer could make them all.

  Args:
    dealer: [8] uint32, the dealer's secret, fresh for each sum.
    ids: [K] int32.
    peers: [K, P] int32.

  Returns:
    [K, P, 8] and [K, 8] uint32.
  """

  def pair(a: Array, b: Array) -> Array:
    low, high = jnp.minimum(a, b), jnp.maximum(a, b)
    return prng.derive(dealer, low, high)

  ids, peers = ids.astype(np.uint32), peers.astype(np.uint32)
  of_pairs = jax.vmap(jax.vmap(pair, in_axes=(None, 0)))(ids, peers)
  return of_pairs, jax.vmap(lambda site: prng.derive(dealer, site))(ids)


def simulated(seed: bytes, name: int | str) -> keys.Entropy:
  """The entropy of one role, from the seed that all processes of a simulation share."""
  return keys.expanding(keys.expand(seed, f"{_SIMULATED}{name}", 0, 0, 0))
