"""Encrypted inference: `secret` turns a JAX function into a two-party protocol, whose phases stand
in `inference`.
"""

from primia_jax.mpc.circuit import Config
from primia_jax.mpc.fitting import fit
from primia_jax.mpc.inference import check, deal, encode, publish, reveal, secret, share
from primia_jax.mpc.planning import Network, Plan, calibrate, plan

__all__ = [
  "Config",
  "Network",
  "Plan",
  "calibrate",
  "check",
  "deal",
  "encode",
  "fit",
  "plan",
  "publish",
  "reveal",
  "secret",
  "share",
]
