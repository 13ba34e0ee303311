"""A report's rows on secure aggregation: what hides single updates, and from whom."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from primia_jax import secagg
from primia_jax.secagg import graph
from primia_jax.types import PyTree

from . import inputs
from .configs import Train
from .configs.aggregation import may_lie, min_survivors


def facts(config: Train, images: inputs.Inputs, sent: PyTree) -> dict[str, Any] | None:
  """What the report says of the protection of updates, given what a site sends; None where they
  went in the clear.
  """
  if not config.aggregation.is_secure:
    return None
  n = config.sites_in_round
  secure = config.aggregation.secure_sum(n, n, config.in_processes)
  sizes = [n for n in images.train.sizes if n]
  numbers, count = sum(np.size(a) for a in jax.tree.leaves(sent)), config.disclosure.policy().count
  encoding = {
    "ring": f"integers modulo 2^{secure.fixed.num_bits}, {secure.fixed.fraction_bits} fraction "
    f"bits",
    "largest magnitude of a number in an update": secure.max_abs,
    # Rounded down, and up by at most 1 %, so that both claims hold.
    "largest magnitude of a sum before overflow": math.floor(1e3 * secure.fixed.max_abs) / 1e3,
    "largest quantisation error of a sum": float(f"{1.005 * secure.error_bound:.3g}"),
    "bytes of a masked update": numbers * secagg.bytes_per_number(secure),
  }
  if config.privacy.dp_noise == "distributed":  # which has an encoding of its own
    encoding = {
      "ring": f"integers modulo 2^{secure.fixed.num_bits}; their encoding stands under privacy"
    }
  return {
    "sites in a sum": secure.num_sites,
    "peers of each site (pairwise masks by ChaCha20)": secure.num_peers,
    "how many of a site and its peers must answer": secure.threshold or "all: no site may drop out",
    "sites that may collude with the server": _collusion(config, secure),
    **encoding,
    "who learns what": (
      "the coordinator and all sites see masked inputs and open their sums only; "
      if config.in_processes
      else "the server sees sums only; "
    )
    + _whose_keys(config, secure)
    + _of_two(n),
    "known to all": (
      f"sizes of the smallest and largest site: {count(min(sizes))} and {count(max(sizes))} "
      "training images"
      + "; each site has told all others how many images and patients it has"
      * bool(images.patients)
    ),
  }


def _collusion(config: Train, secure: secagg.SecureSum) -> str:
  """How many colluding sites are allowed for, and how many would be too many."""
  n, peers, threshold = secure.num_sites, secure.num_peers, secure.threshold
  lies = may_lie(secure, config.in_processes)
  enough = min(peers, graph.num_to_open(peers, threshold, lies))  # all: they subtract their own
  told = f"{config.aggregation.num_colluding(n)} (secagg_colluding)"
  if threshold is None:
    return f"{told}; all {peers} peers of a site would open its update"
  if lies:
    return f"{told}; {enough} peers of a site and a lying server would open its update"
  return (
    f"{told}; {enough} peers of a site would open its update, and {enough - 1} if only "
    f"{min_survivors(secure)} sites are left"
  )


def _whose_keys(config: Train, secure: secagg.SecureSum) -> str:
  if config.in_processes:
    keys = (
      "each site's process agrees on keys with the others anew for each sum, and no other "
      "process knows them"
    )
    return keys
  keys = (
    "keys are agreed and shared anew for each sum"
    if secure.threshold
    else "pair keys come from a trusted dealer"
  )
  return f"{keys}. This run was a simulation: one process played the server and all sites"


def _of_two(num_sites: int) -> str:
  if num_sites > 2:
    return ""
  return ". Each of two sites can subtract its own update from the sum and learns the other's"
