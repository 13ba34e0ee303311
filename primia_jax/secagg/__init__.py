"""Secure aggregation: the server opens the sum over sites and nothing else."""

from primia_jax.secagg.masking import (
  Links,
  Masked,
  SecureSum,
  bytes_per_number,
  deal_links,
  open_sum,
  peers,
  protect,
  secure_sum,
)

__all__ = [
  "Links",
  "Masked",
  "SecureSum",
  "bytes_per_number",
  "deal_links",
  "open_sum",
  "peers",
  "protect",
  "secure_sum",
]
