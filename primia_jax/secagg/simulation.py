"""The whole protocol with all sites in one process; any of them may be lost at any stage of a sum.

`begin` does for all sites what `protocol` does for one by messages (Bonawitz et al., CCS 2017,
figure 4, over the sparse graph of Bell et al., CCS 2020). It makes X25519 keys for each pair of
peers and Shamir shares of each site's two secrets among its neighbourhood, and recovers the masks
that lost sites leave in the sum. Both take the graph, the secrets, the keys and the masks from the
same functions: where a site's secrets are equal, so is its masked message, bit for bit.

Who learns what: the caller plays every site and could learn everything. The simulated
server gets t shares of one secret of each site, never of both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from primia_jax.secagg import graph, keys, rounds, shamir, subkeys
from primia_jax.secagg.errors import RoundAborted
from primia_jax.secagg.masking import Residue, Row, SecureSum

Source = Callable[[int | str], keys.Entropy]  # of a site, of the "graph" or of the "dealer"


class Dropouts(NamedTuple):
  """The sites that are lost in a round, by stage; each at one stage at most.

  Attributes:
    before: [K] bool. Lost before they shared their secrets: no site masks with them.
    during: [K] bool. Lost after that: others have masked with them, but their message never comes.
    after: [K] bool, or None for no site. Lost after their message came: it is in the sum, but they
      no longer answer.
  """

  before: np.ndarray
  during: np.ndarray
  after: np.ndarray | None = None


class Begun(NamedTuple):
  """One sum that has begun. Its keys are of this sum only and must not be saved.

  Attributes:
    rows: the sites' keys, [K, ...] jax arrays.
    counted: [K] bool, the sites whose message will be in the sum.
    residue: the masks that will be left in the sum.
  """

  rows: Row
  counted: np.ndarray
  residue: Residue


def begin(
  config: SecureSum, words: tuple[int, int], ids: np.ndarray, dropouts: Dropouts | None = None
) -> Begun:
  """Draws all keys of one sum from the operating system, and simulates losses and recovery.

  No key is an argument or is derived from one, so no two sums share a key, even if a caller begins
  twice with the same arguments. With several processes (`jax.distributed`, all of one operator)
  process 0 draws 32 bytes and broadcasts them; every process expands them to the same keys.

  With a threshold, pair keys and self-masks are those of `protocol`. Without one, a trusted dealer
  makes the pair keys; no site may be lost then. Without `config.masked` there are no peers (P = 0).

  Args:
    config: of the sum.
    words: (round, purpose), each in [0, 2^32).
    ids: [K] int32, the sites' numbers, in any order.
    dropouts: the sites to lose; None for none.

  Raises:
    ValueError: for site numbers that are repeated, negative or more than `config.num_sites`; for
      dropouts that are not bool [K], or name a site twice, or come without a threshold.
    RoundAborted: where no message comes, fewer than t holders of some site's shares answer, or the
      graph of the sites whose messages come is not connected, so that the sum over each part of it
      would lie open.
  """
  if jax.process_count() == 1:
    return _begin(config, words, ids, dropouts, lambda name: os.urandom)
  drawn = np.frombuffer(os.urandom(keys.KEY_BYTES), "<u4").astype(np.uint32)
  seed = keys.raw(np.asarray(multihost_utils.broadcast_one_to_all(drawn)))
  return _begin(config, words, ids, dropouts, lambda name: subkeys.simulated(seed, name))


def _begin(
  config: SecureSum,
  words: tuple[int, int],
  ids: np.ndarray,
  dropouts: Dropouts | None,
  entropy: Source,
) -> Begun:
  """`begin` with given entropy: what tests compare with the messages of `protocol`."""
  ids, stages, (round, _) = np.asarray(ids), stages_of(dropouts, len(ids)), words
  _check(config, words, ids, stages)
  counted = np.logical_not(stages[0] | stages[1])
  if not counted.any():
    raise RoundAborted("round aborted: no site's message came")
  order = np.argsort(ids)  # sites in increasing order, as in `rounds`; `back` undoes it
  back, numbers = np.argsort(order), ids[order].astype(np.int32)
  draw = lambda name: keys.words(entropy(name)(keys.KEY_BYTES))
  if config.masked:
    rows = graph.neighbours(draw("graph"), len(ids), config.num_peers, round)
  row: tuple[Any, ...]
  residue = Residue(jnp.zeros((0, 8), jnp.uint32), jnp.zeros(0, jnp.int32))
  if not config.masked:
    nobody, no_keys = np.zeros((len(ids), 0), np.int32), np.zeros((len(ids), 0, 8), np.uint32)
    row = numbers, nobody, no_keys, None, np.array([draw(i) for i in numbers.tolist()])
  elif config.threshold is None:
    of_pairs, noise = _dealt(draw("dealer"), numbers, numbers[rows])
    row = numbers, numbers[rows], of_pairs, None, noise
  else:
    secrets = [subkeys.draw(entropy(i)) for i in numbers.tolist()]
    row = _agreed(round, numbers, rows, secrets, stages[0, order])
    residue = _recovered(round, numbers, rows, secrets, stages[:, order], config.threshold)
  in_order = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[back]), row)
  return Begun(Row(*in_order), counted, residue)


def _check(config: SecureSum, words: tuple[int, int], ids: np.ndarray, stages: np.ndarray) -> None:
  if not all(0 <= word < 2**32 for word in words):
    raise ValueError(f"words={words}; (round, purpose) must be two integers in [0, 2^32)")
  if len(np.unique(ids)) < len(ids) or np.any(ids < 0) or not 1 <= len(ids) <= config.num_sites:
    raise ValueError(
      f"ids={ids.tolist()}; give 1 to {config.num_sites} site numbers, all different and none "
      f"negative"
    )
  if not config.masked:
    return
  if config.threshold is None and stages.any():
    raise ValueError(
      f"the sites in rows {np.flatnonzero(stages.any(axis=0)).tolist()} are lost, and their masks "
      f"cannot be recovered; give secure_sum a threshold"
    )
  if config.threshold is not None and config.num_peers >= shamir.MAX_SHARES:
    raise ValueError(
      f"num_peers={config.num_peers} would hold shares of each site; use num_peers < "
      f"{shamir.MAX_SHARES}"
    )


def stages_of(dropouts: Dropouts | None, num_sites: int) -> np.ndarray:
  """The dropouts by stage, [3, K] bool; None stands for none."""
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


_dealt = jax.jit(subkeys.dealt)


def _agreed(
  round: int,
  numbers: np.ndarray,
  rows: np.ndarray,
  secrets: Sequence[subkeys.Secrets],
  before: np.ndarray,
) -> tuple[np.ndarray, ...]:
  """What key agreement gives each site, as in `Row`; a peer lost before does not count."""
  sites, of_pair = numbers.tolist(), {}
  for i, row in enumerate(rows.tolist()):
    later = {sites[j]: secrets[j].mask.public for j in row if j > i}  # once for both ends
    found = subkeys.pair_mask_keys(secrets[i].mask.private, later, round, sites[i])
    of_pair.update({(sites[i], v): key for v, key in found.items()})
  pair_keys = [
    [of_pair[min(a, b), max(a, b)] for b in row]
    for a, row in zip(sites, numbers[rows].tolist(), strict=True)
  ]
  own = [subkeys.self_mask_key(s.seed, round, i) for s, i in zip(secrets, sites, strict=True)]
  peers = np.where(before[rows], numbers[:, None], numbers[rows])
  noise = [keys.words(s.noise) for s in secrets]
  return numbers, peers, *map(np.array, (pair_keys, own, noise))


def _recovered(
  round: int,
  numbers: np.ndarray,
  rows: np.ndarray,
  secrets: Sequence[subkeys.Secrets],
  stages: np.ndarray,
  threshold: int,
) -> Residue:
  """What the server learns from the holders of shares that answer: the keys of the masks left.

  Each holder gives its share of the seed of a site whose message came, and of the private key of
  one whose message did not. The residue is padded to a multiple of K, so that few shapes occur.
  Holder and point are those of `protocol`: the i-th of a neighbourhood in increasing order. Each of
  several processes draws other coefficients of the shares, which open to the same secrets.
  """
  before, during, after = stages
  came = ~(before | during)
  _check_connected(rows, came)
  around = np.sort(np.concatenate([np.arange(len(rows))[:, None], rows], axis=1), axis=1)
  exposed = during & came[rows].any(axis=1)  # some message holds a mask that its other end lacks
  kind, site = np.nonzero([came, exposed])  # the secret that is opened, and whose
  silent = ~(came & ~after)[around[site]]
  num_answers = np.sum(~silent, axis=1)
  if np.any(num_answers < threshold):
    worst = np.argmin(num_answers)
    raise RoundAborted(
      f"round aborted: {num_answers[worst]} of the {around.shape[1]} holders of the shares of site "
      f"{numbers[site[worst]]} are left, and threshold={threshold} must answer"
    )
  both = b"".join([*(s.seed for s in secrets), *(s.mask.private for s in secrets)])
  flat = np.frombuffer(both, np.uint8).reshape(-1, keys.KEY_BYTES)
  points = np.arange(1, around.shape[1] + 1)
  shares = shamir.share(flat, threshold, points).reshape(2, len(rows), len(points), -1)
  chosen = np.argsort(silent, axis=1, kind="stable")[:, :threshold]
  held = shares[kind[:, None], site[:, None], chosen]
  opened = shamir.combine(points[chosen], held, threshold)
  told = lambda k: {  # site number to opened secret
    int(numbers[i]): secret.tobytes()
    for i, secret in zip(site[kind == k], opened[kind == k], strict=True)
  }
  mask_keys = dict(zip(numbers.tolist(), [s.mask.public for s in secrets], strict=True))
  near = dict(zip(numbers.tolist(), numbers[around].tolist(), strict=True))
  found, signs = rounds.masks_left(round, told(0), told(1), mask_keys, near)
  padding = (0, -len(found) % len(rows))
  return Residue(
    jnp.asarray(np.pad(np.array(found), (padding, (0, 0)))),
    jnp.asarray(np.pad(np.array(signs, np.int32), padding)),
  )


def _check_connected(rows: np.ndarray, came: np.ndarray) -> None:
  reached = graph.reached(rows, came)
  if np.any(came != reached):
    raise RoundAborted(
      f"round aborted: {np.sum(reached)} and {np.sum(came & ~reached)} sites' messages came that "
      f"no pair masks; their sums would be opened separately: use more peers"
    )
