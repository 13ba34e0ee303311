"""Secure aggregation: the server opens the sum over sites and nothing else."""

from primia_jax.secagg.masking import (
  NOISE,
  SELF_MASK,
  Links,
  Masked,
  Residue,
  SecureSum,
  bytes_per_number,
  deal_links,
  mask,
  open_sum,
  peers,
  protect,
  secure_sum,
  unmask,
)
from primia_jax.secagg.simulation import Dropouts, RoundAborted

__all__ = [
  "NOISE",
  "SELF_MASK",
  "Dropouts",
  "Links",
  "Masked",
  "Residue",
  "RoundAborted",
  "SecureSum",
  "bytes_per_number",
  "deal_links",
  "mask",
  "open_sum",
  "peers",
  "protect",
  "secure_sum",
  "unmask",
]
