"""The graph of masks: a random circle whose sites mask with their nearest (Bell et al., CCS 2020).

A site masks with P neighbours instead of all other sites, so its work does not grow with their
number. Three things must then hold on the random circle (section 3.2): no honest site's neighbours
can put its secrets together, the honest survivors' graph is connected, and every site keeps enough
neighbours to open its secrets.

Assumption: which sites collude with the server, and which drop out, does not depend on the circle.
The key is public, but the sites agree on it beforehand: a server that chose it could surround a
site with colluding ones.
"""

from __future__ import annotations

import math

import numpy as np

from primia_jax.secagg import keys, shamir


def neighbours(key: np.ndarray, num_sites: int, degree: int, round: int = 0) -> np.ndarray:
  """Arranges sites in a random circle and makes each the neighbour of its nearest on both sides.

  Args:
    key: [8] uint32, public randomness.
    num_sites: K.
    degree: P, even, or K - 1 for the complete graph.
    round: each round has another circle.

  Returns:
    [K, P] int32: row i holds the neighbours of site i. The relation is symmetric.

  Raises:
    ValueError: for an impossible degree.
  """
  if num_sites < 2 or not 1 <= degree < num_sites or (degree % 2 and degree != num_sites - 1):
    raise ValueError(
      f"degree={degree} among {num_sites} sites; use an even number from 2 to {num_sites - 1}, or "
      f"{num_sites - 1} (all)"
    )
  low, high = keys.stream(key, (round, 0, 0), 2 * num_sites).reshape(2, num_sites).astype(np.uint64)
  circle = np.argsort((high << np.uint64(32)) | low, kind="stable")
  if degree == num_sites - 1:
    offsets = np.arange(1, num_sites)
  else:
    half = np.arange(1, degree // 2 + 1)
    offsets = np.concatenate([half, -half])
  place = np.argsort(circle)
  return circle[(place[:, None] + offsets) % num_sites].astype(np.int32)


def reached(neighbours: np.ndarray, present: np.ndarray) -> np.ndarray:
  """The present sites that paths over present sites connect with the first of them.

  Present sites that are not reached share no mask with those that are: the server could open the
  sum over each part separately.

  Args:
    neighbours: [K, P], a symmetric graph.
    present: [K] bool.

  Returns:
    [K] bool; equal to `present` where their graph is connected.
  """
  before, now = np.zeros_like(present), present & (np.cumsum(present) == 1)
  while np.any(before != now):
    before, now = now, now | (present & now[neighbours].any(axis=1))
  return now


def degree_for(
  num_sites: int,
  corrupt_fraction: float,
  dropout_fraction: float,
  security: int = 40,
  correctness: int = 30,
  malicious_server: bool = False,
) -> tuple[int, int]:
  """The sparsest circle, and its threshold, that withstands the given corrupt sites and dropouts.

  C corrupt sites and D dropouts of K are spread over the circle at random, and t of the P + 1
  shares (P neighbours' and a site's own) open a secret. Union bounds over the sites:

    K Pr[Hypergeometric(K - 1, C, P) >= c]     no c corrupt neighbours      <= 2^-(security + 1)
    K^2/2 prod_{i < P} (C + D - i)/(K - i)     survivors are connected      <= 2^-(security + 1)
    K Pr[P - Hypergeometric(K - 1, D, P) < t]  every site keeps t           <= 2^-correctness

  with c of `num_to_open`. (Bell et al., theorem 3.10. They bound the second by one run of P/2
  removed sites; it takes two runs for a circle to fall apart.)

  Args:
    num_sites: K.
    corrupt_fraction: share of the sites that may collude with the server.
    dropout_fraction: share of the sites that may leave in one round.
    security: negative base-2 logarithm of the chance that a round's circle leaves some site
      unprotected.
    correctness: negative base-2 logarithm of the chance that a round cannot be opened.
    malicious_server: True for a threshold above 2/3 of a neighbourhood, False for above half.

  Returns:
    (P, t), with the largest t that is correct: if the assumption is wrong, a round fails rather
    than opens too much. If no circle is enough, the complete graph, which leaves nothing to chance.

  Raises:
    ValueError: for fractions outside [0, 1), or if not even the complete graph is enough.
  """
  fractions = {"corrupt_fraction": corrupt_fraction, "dropout_fraction": dropout_fraction}
  for name, fraction in fractions.items():
    if not 0 <= fraction < 1:
      raise ValueError(f"{name}={fraction}; it must be in [0, 1)")
  if num_sites < 2:
    raise ValueError(
      f"num_sites={num_sites}; the sum over one site is that site's input, so use at least 2"
    )
  corrupt, dropped = (math.floor(f * num_sites + 1e-9) for f in fractions.values())
  unsafe, failed = 0.5 * 2.0**-security / num_sites, 2.0**-correctness / num_sites
  for degree in range(2, min(num_sites - 1, shamir.MAX_SHARES), 2):
    if _apart(num_sites, degree, corrupt + dropped) > 0.5 * 2.0**-security:
      continue
    captured, lost = (_tails(num_sites - 1, marked, degree) for marked in (corrupt, dropped))
    legal = range(smallest_threshold(degree + 1, malicious_server), degree + 1)
    opens = lambda t, degree=degree: num_to_open(degree, t, malicious_server)
    if enough := [
      t for t in legal if captured[opens(t)] <= unsafe and lost[degree - t + 1] <= failed
    ]:
      return degree, enough[-1]
  threshold = num_sites - dropped
  if (
    num_sites <= shamir.MAX_SHARES
    and threshold >= smallest_threshold(num_sites, malicious_server)
    and num_to_open(num_sites - 1, threshold, malicious_server) > corrupt
  ):
    return num_sites - 1, threshold
  raise ValueError(
    f"no graph of {num_sites} sites with at most {shamir.MAX_SHARES - 1} neighbours tolerates "
    f"{corrupt} corrupt sites "
    f"and {dropped} dropouts{' under a malicious server' if malicious_server else ''}; assume fewer"
  )


def num_to_open(degree: int, threshold: int | None, malicious_server: bool = False) -> int:
  """How many of a site's P neighbours, with the server, open its message.

  Without a threshold all of them: they know all of its masks. With a threshold t of them: they hold
  t shares of both secrets. If the server also tells the honest holders different stories, half of
  those give it shares of each secret, and 2 t - P - 1 are enough.
  """
  if threshold is None:
    return degree
  return 2 * threshold - degree - 1 if malicious_server else threshold


def chance_of_opening(
  num_sites: int,
  degree: int,
  threshold: int | None,
  num_colluding: int,
  num_lost: int = 0,
  malicious_server: bool = False,
) -> float:
  """Bounds the chance that colluding sites and the server open a message of any other site.

  They open it if they are enough neighbours of a site (`num_to_open`), if the masks of the others
  do not join all of these, or if fewer than two others are in the smallest sum that is opened.

  Args:
    num_sites, degree: K and P.
    threshold: t of P + 1 shares; None if no site may be lost.
    num_colluding: sites that tell the server all they know, spread over the circle at random.
    num_lost: of the other sites, in the same round.
    malicious_server: whether it lies to sites.

  Returns:
    0 where no arrangement of these sites is enough, up to 1.
  """
  fewest = num_sites if threshold is None else -(-num_sites * threshold // (degree + 1))
  if num_colluding > fewest - 2:
    return 1.0 if num_colluding else 0.0
  enough = num_to_open(degree, threshold, malicious_server)
  if degree == num_sites - 1:
    return float(num_colluding >= enough)
  apart = _apart(num_sites, degree, num_colluding + num_lost)
  tails = _tails(num_sites - 1, num_colluding, degree)
  captured = num_sites * tails[enough] if enough <= degree else 0.0  # more than all neighbours
  return min(1.0, float(captured) + apart)


def _apart(num_sites: int, degree: int, removed: int) -> float:
  """Bounds the chance that a circle falls apart: K^2/2 prod_{i < P} (removed - i) / (K - i)."""
  chances = [max(removed - i, 0) / (num_sites - i) for i in range(degree)]
  return num_sites**2 / 2 * math.prod(chances)


def smallest_threshold(num_shares: int, malicious_server: bool) -> int:
  """The smallest integer above half (malicious server: two thirds) of the shares.

  With t above half, two disjoint groups of honest holders cannot open both secrets of a site. A
  malicious server gets both kinds of share from its c corrupt holders, so 2 t > n + c is needed:
  c < n/3 and t > 2n/3 (Bonawitz et al. 2017, section 6).
  """
  return 2 * num_shares // 3 + 1 if malicious_server else num_shares // 2 + 1


def _tails(population: int, marked: int, drawn: int) -> np.ndarray:
  """Pr[at least i of `drawn` are marked] for i from 0 to `drawn`, without replacement; relative
  error below 1e-10.
  """

  def log_ways(n: int, k: int) -> float:
    return (
      math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) if 0 <= k <= n else -math.inf
    )

  logs = [log_ways(marked, i) + log_ways(population - marked, drawn - i) for i in range(drawn + 1)]
  return np.cumsum(np.exp(np.array(logs) - log_ways(population, drawn))[::-1])[::-1]
