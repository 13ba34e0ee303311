"""How the messages of a round become their sum."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import jax
import numpy as np

from primia_jax import robust, summation
from primia_jax import secagg as protocol
from primia_jax.secagg import graph

from ..settings import choose, require, setting

# (encoding and masks, coding) -> how such sums form
Masked = Callable[[protocol.SecureSum, summation.Coding | None], summation.Summation]
_CHANCE = 2.0**-40  # that colluding sites happen to be enough of a site's peers on a random circle
_LOST_FRACTION = 0.1  # of the sites; it allows for them where sites are really lost
_MIN_FRACTION_BITS = 10  # an update's numbers are off by less than 1/2048
_COUNT_BITS = 32  # of sums of counts, for any ring of updates
_DROPOUTS = 1  # use of the seed


@dataclasses.dataclass(frozen=True)
class Aggregation:
  """How updates are combined, and how the sums are masked."""

  aggregation: str = setting(
    "secure",
    "secure, clear, or a robust rule in the clear: median, trimmed_mean=FRACTION, krum=BAD_SITES",
  )
  secagg: str = setting(
    "pairwise", "secure: pairwise (masks with all others), bell (with a sparse graph of peers), "
    "or none"
  )  # fmt: skip
  secagg_bits: int = setting(
    32,
    "secure: bits of a masked number of an update (of counts 32 at least); more than 32 need "
    "JAX_ENABLE_X64=1",
  )
  secagg_max_abs: float = setting(
    32.0, "secure: largest magnitude in a site's update; larger ones stop the run"
  )
  secagg_peers: int = setting(
    0,
    "secure: peers of each site, an even number or all others; 0 takes all others, or with "
    "secagg=bell what its graph needs",
  )
  secagg_threshold: int = setting(
    0,
    "secure: how many of a site and its peers must answer to unmask a round. 0 tolerates no loss, "
    "-1 takes just over two thirds. With placement=flower 0 is -1, and a smaller number is safe "
    "only if the server follows the protocol",
  )
  secagg_colluding: int = setting(
    -1,
    "secure: number of sites of a sum that may tell the server all they know; a run in which they "
    "could open another site's message is refused, and shares of distributed noise do not count on "
    "them. -1 takes a tenth of the sites, at least 1; 0 trusts every site, as two sites must. With "
    "placement=flower each site sees what the server sees, so with secagg_peers it is at least 1",
  )
  dropout_rate: float = setting(
    0.0, "simulated chance that a site is lost in a round, before or after it masks, equally often"
  )  # fmt: skip

  def __post_init__(self):
    choose("secagg", self.secagg, ("pairwise", "bell", "none"))
    require(self.secagg_peers >= 0, "secagg_peers", self.secagg_peers, "must not be negative")
    bits, bound, needed = self.secagg_bits, self.secagg_max_abs, self.secagg_threshold
    require(1 < bits <= 64, "secagg_bits", bits, "must lie between 2 and 64")
    require(0 < bound < math.inf, "secagg_max_abs", bound, "must be positive and finite")
    cure = "must be a number of sites, 0 or -1"
    require(needed >= -1, "secagg_threshold", needed, cure)
    colluding = self.secagg_colluding
    require(colluding >= -1, "secagg_colluding", colluding, "must be at least 0, or -1")
    require(0 <= self.dropout_rate < 1, "dropout_rate", self.dropout_rate, "must lie in [0, 1)")

  @property
  def is_secure(self) -> bool:
    """Whether updates are masked."""
    return self.aggregation == "secure" and self.secagg != "none"

  def build(
    self,
    num_sites: int,
    in_processes: bool = False,
    masked: Masked = summation.masked,
    coding: summation.Coding | None = None,
  ) -> summation.Summation:
    """How the updates of a round's sites are combined.

    Args:
      num_sites: of a round.
      in_processes: whether each site has a process.
      masked: makes a masked sum over these sites.
      coding: of distributed noise; None without.

    Raises:
      ValueError: an unknown rule, or one that cannot work with so many sites.
    """
    kind, _, argument = self.aggregation.partition("=")
    if (kind == "clear" and not argument) or (kind == "secure" and self.secagg == "none"):
      return summation.clear()
    if kind == "secure" and not argument:
      config = self.secure_sum(num_sites, num_sites, in_processes)
      if config.fixed.fraction_bits < _MIN_FRACTION_BITS and coding is None:
        raise ValueError(
          f"secagg_bits={self.secagg_bits} for {num_sites} sites and numbers up to "
          f"{config.max_abs} leave {config.fixed.fraction_bits} fraction bits, and updates need "
          f"{_MIN_FRACTION_BITS}; raise secagg_bits or lower secagg_max_abs"
        )
      return masked(config, coding)
    try:
      match kind, argument:
        case "median", "":
          rule = robust.median()
        case "trimmed_mean", share:
          rule = robust.trimmed_mean(float(share))
        case "krum", bad:
          rule = robust.krum(int(bad))
        case _:
          raise ValueError("there is no such rule")
      jax.eval_shape(rule, {"update": jax.ShapeDtypeStruct((num_sites, 1), np.float32)})
    except ValueError as error:
      raise ValueError(
        f"aggregation={self.aggregation!r}: {error}; use secure, clear, median, "
        "trimmed_mean=FRACTION or krum=BAD_SITES"
      ) from error
    return summation.by_rule(self.aggregation, rule)

  def secure_sum(
    self, num_sites: int, sites_in_round: int, processes: bool, max_abs: float | None = None
  ) -> protocol.SecureSum:
    """The encoding and the masks of a sum of updates, or of counts up to max_abs.

    Args:
      num_sites: in the sum.
      sites_in_round: in a sum of updates, to which `secagg_peers` refers.
      processes: whether sites are processes, which may end at any time.
      max_abs: None for that of updates.

    Raises:
      ValueError: as `secagg.secure_sum`, or where `secagg_colluding` sites could open a message.
    """
    peers, threshold = self.secagg_peers, self.secagg_threshold
    if processes and not threshold:
      threshold = -1  # the protocol between them always has one
    if peers == sites_in_round - 1:
      peers = 0  # all others in a round means all others in the sums over all sites, too
    if self.secagg == "bell" and not peers:
      # Between processes the server is not trusted, and no setting says how many sites are lost.
      lost = _LOST_FRACTION if processes else self.dropout_rate
      corrupt = self.num_colluding(num_sites) / num_sites
      peers, needed = graph.degree_for(num_sites, corrupt, lost, malicious_server=processes)
      is_complete = processes and peers == num_sites - 1
      threshold = threshold if threshold > 0 or is_complete else needed
    holders = (peers or num_sites - 1) + 1
    bits = self.secagg_bits if max_abs is None else max(self.secagg_bits, _COUNT_BITS)
    try:
      secure = protocol.secure_sum(
        num_sites,
        self.secagg_max_abs if max_abs is None else max_abs,
        num_bits=bits,
        num_peers=peers or None,
        threshold=2 * holders // 3 + 1 if threshold < 0 else threshold or None,
      )
    except ValueError as error:
      own_names = r"\b(?:num_)?(bits|peers|threshold|max_abs)\b(?=[ =])"
      raise ValueError(re.sub(own_names, r"secagg_\1", str(error))) from error
    self._check_collusion(secure, processes)
    return secure

  def num_colluding(self, num_sites: int) -> int:
    """How many sites of a sum may collude with the server."""
    return max(1, num_sites // 10) if self.secagg_colluding < 0 else self.secagg_colluding

  def _check_collusion(self, secure: protocol.SecureSum, processes: bool) -> None:
    n, peers, threshold = secure.num_sites, secure.num_peers, secure.threshold
    colluding, lost = self.num_colluding(n), _lost(n, processes, self.dropout_rate)
    lies = may_lie(secure, processes)
    chance = graph.chance_of_opening(n, peers, threshold, colluding, lost, lies)
    if processes and peers < n - 1:  # each site sees what the server sees
      chance = max(chance, graph.chance_of_opening(n, peers, threshold, 1, lost))
    if chance > _CHANCE:
      raise ValueError(
        f"secagg_colluding={colluding} of {n} sites, each with {peers} peers"
        + (f" and secagg_threshold={threshold}" if threshold else "")
        + ", could open another site's message with the server"
        + (f" (chance {chance:.1g})" if chance < 1 else "")
        + "; take more sites or peers, a higher secagg_threshold, or assume fewer colluding sites "
        "(0 trusts them all)"
      )

  def check_survives(self, num_sites: int, sites_in_round: int, fewest: int) -> None:
    """Refuses sums between processes that so many sites could open with a server that lies,
    whatever `secagg_colluding` assumes.

    Raises:
      ValueError: naming `fewest_colluding`, the limit of a site.
    """
    for n in {num_sites, sites_in_round}:
      secure = self.secure_sum(n, sites_in_round, True)
      lost = _lost(n, True, 0.0)
      opened = graph.chance_of_opening(
        n, secure.num_peers, secure.threshold, fewest, lost, malicious_server=True
      )
      if opened > _CHANCE or self.num_colluding(n) < fewest:
        raise ValueError(
          f"fewest_colluding={fewest} of this site, and sums of {n} sites with "
          f"secagg_threshold={secure.threshold} and secagg_colluding={self.num_colluding(n)} hold "
          "against fewer sites that collude with a coordinator that lies; have the coordinator "
          "raise both, or leave them out; or lower fewest_colluding in site.toml if the sites are "
          "trusted"
        )

  def said(self, num_sites: int) -> str:
    """Who can open a sum between processes, in words."""
    secure = self.secure_sum(num_sites, num_sites, True)
    holders = secure.num_peers + 1
    of = f"{num_sites} sites" if holders == num_sites else f"{holders} neighbours"
    colluding = self.num_colluding(num_sites)
    against = (
      f"at most {colluding} site{'s' * (colluding != 1)} may collude"
      if colluding
      else ("no site may collude")
    )
    return f"a sum opens once {secure.threshold} of {of} answer, {against}"

  def losing(self, summed: summation.Summation, seed: int) -> summation.Summation:
    """The summation with sites lost at `dropout_rate`, half of them before they mask."""
    if not self.dropout_rate:
      return summed

    def dropouts(round: int, purpose: summation.Purpose, ids: np.ndarray) -> protocol.Dropouts:
      rng = np.random.default_rng((seed, _DROPOUTS, round))
      lost, early = rng.random(len(ids)) < self.dropout_rate, rng.random(len(ids)) < 0.5
      return protocol.Dropouts(lost & early, lost & ~early)

    return summation.losing(summed, dropouts)


def may_lie(secure: protocol.SecureSum, processes: bool) -> bool:
  """Whether the protocol holds against a server that lies, as it does between processes with a
  threshold above two thirds.
  """
  return (
    processes
    and secure.threshold is not None
    and secure.threshold >= graph.smallest_threshold(secure.num_peers + 1, malicious_server=True)
  )


def min_survivors(secure: protocol.SecureSum) -> int | None:
  """The fewest sites in a sum for which noise is calibrated; None without a threshold."""
  if secure.threshold is None:
    return None
  return max(2, -(-secure.num_sites * secure.threshold // (secure.num_peers + 1)))


def _lost(num_sites: int, processes: bool, rate: float) -> int:
  """How many sites of a sum may be lost. Between processes no setting says it; one always may."""
  if processes:
    return max(1, math.floor(num_sites * _LOST_FRACTION))
  return math.floor(num_sites * rate)
