"""Privacy-preserving medical image analysis in JAX.

These names are loaded on first use (PEP 562), so that importing the package takes no time:

  training    Recipe, epochs, gradients, classification_loss
  rounds      federate, Sites, in_memory; fedavg, fedprox, fedopt, fedbn, scaffold, fednova
  sums        masked, clear, by_rule
  placements  loop, scan, vmapped, chunked, on_mesh
  privacy     dp_sgd, dp_ftrl, site_level

Everything else is in its module, such as `primia_jax.secagg.secure_sum` or `primia_jax.mpc.secret`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from primia_jax.algorithms import fedavg, fedbn, fednova, fedopt, fedprox, scaffold
  from primia_jax.federated import Sites, federate, in_memory
  from primia_jax.local import Recipe, classification_loss, epochs, gradients
  from primia_jax.privacy.plan import dp_ftrl, dp_sgd, site_level
  from primia_jax.sites import chunked, loop, on_mesh, scan, vmapped
  from primia_jax.summation import by_rule, clear, masked

_NAMES = {
  "algorithms": ("fedavg", "fedbn", "fednova", "fedopt", "fedprox", "scaffold"),
  "federated": ("Sites", "federate", "in_memory"),
  "local": ("Recipe", "classification_loss", "epochs", "gradients"),
  "privacy.plan": ("dp_ftrl", "dp_sgd", "site_level"),
  "sites": ("chunked", "loop", "on_mesh", "scan", "vmapped"),
  "summation": ("by_rule", "clear", "masked"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_PACKAGES = ("attacks", "boundary", "data", "metrics", "models", "mpc", "privacy", "secagg")

__all__ = [
  "Recipe",
  "Sites",
  "by_rule",
  "chunked",
  "classification_loss",
  "clear",
  "dp_ftrl",
  "dp_sgd",
  "epochs",
  "fedavg",
  "fedbn",
  "federate",
  "fednova",
  "fedopt",
  "fedprox",
  "gradients",
  "in_memory",
  "loop",
  "masked",
  "on_mesh",
  "scaffold",
  "scan",
  "site_level",
  "vmapped",
]


def __getattr__(name: str) -> Any:
  if name in _HOME:
    return getattr(importlib.import_module(f"primia_jax.{_HOME[name]}"), name)
  if name in _PACKAGES:
    return importlib.import_module(f"primia_jax.{name}")
  raise AttributeError(f"module 'primia_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted({*globals(), *__all__, *_PACKAGES})
