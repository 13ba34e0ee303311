"""Secure aggregation: the sum over sites is opened, and nothing else."""

from primia_jax.secagg.errors import Aborted, Lost, Refused, Rejected, RoundAborted, RoundFailed
from primia_jax.secagg.masking import (
  Masked,
  Residue,
  Row,
  SecureSum,
  bytes_per_number,
  encode,
  mask,
  open_sum,
  secure_sum,
  unmask,
)
from primia_jax.secagg.simulation import Begun, Dropouts, begin

__all__ = [
  "Aborted",
  "Begun",
  "Dropouts",
  "Lost",
  "Masked",
  "Refused",
  "Rejected",
  "Residue",
  "RoundAborted",
  "RoundFailed",
  "Row",
  "SecureSum",
  "begin",
  "bytes_per_number",
  "encode",
  "mask",
  "open_sum",
  "secure_sum",
  "unmask",
]
