"""How far an update that a guess would cause is from the update that was seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from primia_jax.types import Array, PyTree


def l2(update: PyTree, seen: PyTree) -> Array:
  """Half the squared distance (Zhu et al. 2019, "Deep leakage from gradients", equation 4)."""
  gaps = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), update, seen)
  return 0.5 * jax.tree.reduce(jnp.add, gaps)


def cosine(update: PyTree, seen: PyTree) -> Array:
  """1 - the cosine of the angle, in [0, 2] (Geiping et al. 2020, "Inverting gradients", equation
  4). It ignores lengths, so it needs neither clipping norms nor learning rates.
  """
  norms = jnp.sqrt(_dot(update, update) * _dot(seen, seen))
  return 1 - _dot(update, seen) / jnp.where(norms < 1e-30, 1e-30, norms)


def _dot(a: PyTree, b: PyTree) -> Array:
  return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))
