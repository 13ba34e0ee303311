"""The double-masked protocol with all sites in one process, any of which may be lost at any stage
of a round.

What Bonawitz et al. (CCS 2017, figure 4) do over the sparse graph of Bell et al. (CCS 2020),
without the messages: X25519 keys for each pair of peers, Shamir shares of each site's two secrets
among its closed neighbourhood, and the recovery of what lost sites leave in the sum. `protocol` is
the same as a state machine over messages.

Who learns what: the caller plays everybody and could learn everything. What is simulated is the
server's part: it gets t shares of one secret of each site, never of both. All secrets derive from
one key, so that a run can be resumed, and each process of several plays the same round.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.secagg import graph, keys, shamir
from primia_jax.secagg.masking import SELF_MASK, Links, Residue
from primia_jax.types import Array

_SECRETS = 2**31  # third word of the derivation of one sum's secrets


class RoundAborted(RuntimeError):
  """The sum cannot be opened, or not without opening a part of it. The round's number must not be
  used again.
  """


class Dropouts(NamedTuple):
  """Which sites of a round are lost, and when; each once at most.

  Attributes:
    before: [K] bool. Before they shared their secrets: nobody masks with them.
    during: [K] bool. After that: others have masked with them, but their message never comes.
    after: [K] bool, or None for nobody. After their message came: it is in the sum, but they answer
      no more.
  """

  before: np.ndarray
  during: np.ndarray
  after: np.ndarray | None = None


class Session(NamedTuple):
  """What all sites hold for one sum. Holder 0 of a site's shares is itself, holder 1 + p its peer
  p.

  Attributes:
    round: index of the round.
    ids: [K] int32.
    links: of all sites, [K, P].
    public: K X25519 public keys, which everybody knows.
    shares: [2, K, 1 + P, 32] uint8: of each site's self-mask key, and of its X25519 private key.
    threshold: t.
  """

  round: int
  ids: np.ndarray
  links: Links
  public: list[bytes]
  shares: np.ndarray
  threshold: int


def check(dropouts: Dropouts | None, num_sites: int) -> np.ndarray:
  """The dropouts by stage, [3, K] bool; None stands for none.

  Raises:
    ValueError: for anything but bool [K], or for a site that is lost twice.
  """
  stages = np.zeros((3, num_sites), bool)
  for row, (name, stage) in zip(
    stages, dropouts._asdict().items() if dropouts else (), strict=False
  ):
    if stage is not None:
      stage = np.asarray(stage)
      if stage.shape != (num_sites,) or stage.dtype != bool:
        raise ValueError(
          f"Dropouts.{name} is {stage.dtype}{list(stage.shape)}; it must be bool[{num_sites}]"
        )
      row[:] = stage
  if np.any(twice := np.sum(stages, axis=0) > 1):
    raise ValueError(
      f"the sites in rows {np.flatnonzero(twice).tolist()} are lost twice; give one stage for each"
    )
  return stages


def setup(
  key: Array, nonce: tuple[int, int], ids: np.ndarray, peers: np.ndarray, threshold: int
) -> Session:
  """The keys and shares of all sites for one sum.

  Args:
    key: [8] uint32, from which all secrets of all sites derive.
    nonce: (round, purpose), never used twice with this key.
    ids: [K] int32, distinct.
    peers: [K, P] int32 site numbers, from `peers` or `graph.neighbours`.
    threshold: t, how many of a site's 1 + P shares give its secret.

  Raises:
    ValueError: for more peers than `shamir` has shares for, or peers that are no symmetric relation
      among the sites.
  """
  num_sites, num_peers = peers.shape
  if num_peers >= shamir.MAX_SHARES:
    raise ValueError(
      f"num_peers={num_peers} would hold shares of each site; use num_peers < {shamir.MAX_SHARES}"
    )
  if strangers := set(peers.flat) - set(ids):
    raise ValueError(
      f"peers {sorted(map(int, strangers))} are not among the sites; take peers(key, ids, "
      f"num_peers)"
    )
  column = {
    (i, j): p for i, row in enumerate(_rows(ids, peers).tolist()) for p, j in enumerate(row)
  }
  if any(i == j or (j, i) not in column for i, j in column):
    raise ValueError("somebody is not his peer's peer, or his own; take peers(key, ids, num_peers)")
  own, self_masks, private, coefficients = map(
    np.asarray, _secrets(key, np.asarray(nonce, np.uint32), ids)
  )
  public = [keys.public_key(keys.raw(secret)) for secret in private]
  pair_keys = np.zeros((num_sites, num_peers, 8), np.uint32)
  for (i, j), p in column.items():
    if i < j:  # once for both ends, which get the same
      pair_keys[i, p] = pair_keys[j, column[j, i]] = _pair_key(
        private[i], public[j], nonce[0], ids[i], ids[j]
      )
  points = np.arange(1, num_peers + 2)
  shares = [
    shamir.share(
      np.ascontiguousarray(secrets, "<u4").view(np.uint8), threshold, points, coefficient
    )
    for secrets, coefficient in zip((self_masks, private), coefficients, strict=True)
  ]
  links = Links(*map(jnp.asarray, (peers, pair_keys, own)))
  return Session(nonce[0], ids, links, public, np.stack(shares), threshold)


def links_without(session: Session, lost: np.ndarray) -> Links:
  """The links of sites that know who, [K] bool, is lost before they mask: the site itself takes
  such a peer's place.
  """
  ids, peers = session.ids, np.asarray(session.links.peers)
  return session.links._replace(
    peers=jnp.asarray(np.where(lost[_rows(ids, peers)], ids[:, None], peers))
  )


def recover(session: Session, dropouts: Dropouts | None) -> Residue:
  """What the server learns from the holders of shares that answer: the keys of the masks that are
  left in the sum.

  Each gives its share of the self-mask key of a site whose message came, and of the private key of
  one whose did not.

  Args:
    session: of the sum.
    dropouts: None for none.

  Returns:
    The residue, padded to a multiple of K so that few shapes occur.

  Raises:
    ValueError: as `check`.
    RoundAborted: where fewer than t holders of some site's shares answer, or the graph of the sites
      whose messages came is not connected, so that the sum over each part of it would lie open.
  """
  ids, rows = session.ids, _rows(session.ids, np.asarray(session.links.peers))
  before, during, after = check(dropouts, len(ids))
  came = ~(before | during)
  _check_connected(ids, rows, came)
  masked_with = came[rows] & during[:, None]  # whose messages hold a mask that its other end lacks
  kind, site = np.nonzero([came, masked_with.any(axis=1)])  # which secret is opened, and whose
  holders = np.concatenate([np.arange(len(ids))[:, None], rows], axis=1)[site]
  silent = ~(came & ~after)[holders]
  num_answers = np.sum(~silent, axis=1)
  if np.any(num_answers < session.threshold):
    worst = np.argmin(num_answers)
    raise RoundAborted(
      f"round aborted: {num_answers[worst]} of the {holders.shape[1]} holders of the shares of "
      f"site {ids[site[worst]]} "
      f"are left, and threshold={session.threshold} must answer"
    )
  chosen = np.argsort(silent, axis=1, kind="stable")[:, : session.threshold]
  shares = session.shares[kind[:, None], site[:, None], chosen]
  opened = shamir.combine(chosen + 1, shares, session.threshold).view("<u4").astype(np.uint32)
  private = dict(zip(site[kind == 1].tolist(), opened[kind == 1], strict=True))
  lost, column = np.nonzero(masked_with)
  peer = rows[lost, column]
  pair_keys = [
    _pair_key(private[i], session.public[j], session.round, ids[i], ids[j])
    for i, j in zip(lost, peer, strict=True)
  ]
  found = np.concatenate([opened[kind == 0], np.reshape(pair_keys, (-1, 8)).astype(np.uint32)])
  signs = np.concatenate(
    [np.ones(np.sum(came), np.int32), np.sign(ids[lost] - ids[peer])]
  )  # as the peer masked
  padding = (0, -len(found) % len(ids))
  return Residue(jnp.asarray(np.pad(found, (padding, (0, 0)))), jnp.asarray(np.pad(signs, padding)))


@jax.jit
def _secrets(key: Array, nonce: Array, ids: Array) -> tuple[Array, Array, Array, Array]:
  """Own secrets, self-mask keys and private keys, all [K, 8], and the keys [2, 8] of the shares'
  polynomials.
  """
  of_sum = prng.derive(key, *nonce, jnp.uint32(_SECRETS))
  of_site = jax.vmap(lambda i, use: prng.derive(of_sum, i, use), in_axes=(0, None))
  own, private = (of_site(ids.astype(jnp.uint32), jnp.uint32(use)) for use in (0, 1))
  self_masks = jax.vmap(lambda secret: prng.derive(secret, SELF_MASK))(own)
  return own, self_masks, private, jnp.stack([prng.derive(of_sum, kind) for kind in (0, 1)])


def _pair_key(
  private: np.ndarray, public: bytes, round_index: int, a: np.int32, b: np.int32
) -> np.ndarray:
  return keys.expand(
    keys.agree(keys.raw(private), public), "mask", int(round_index), int(min(a, b)), int(max(a, b))
  )


def _rows(ids: np.ndarray, peers: np.ndarray) -> np.ndarray:
  """Where in `ids` each peer stands."""
  order = np.argsort(ids)
  return order[np.searchsorted(ids, peers, sorter=order)]


def _check_connected(ids: np.ndarray, rows: np.ndarray, came: np.ndarray) -> None:
  if not came.any():
    raise RoundAborted("round aborted: no site's message came")
  reached = graph.reached(rows, came)
  if np.any(came != reached):
    raise RoundAborted(
      f"round aborted: {np.sum(reached)} and {np.sum(came & ~reached)} sites' messages came that "
      f"no pair masks; their "
      "sums would be opened separately: use more peers"
    )
