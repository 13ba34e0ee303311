"""What an attacker knows of images beforehand, as penalties: small for likely images."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from primia_jax.types import ApplyFn, Array, Key, ModelState, Params


def total_variation(images: Array) -> Array:
  """Mean absolute difference of neighbouring pixels, down plus across (anisotropic; Geiping et al.
  2020, equation 4). Images [..., H, W, C] -> scalar.
  """
  down, across = jnp.diff(images, axis=-3), jnp.diff(images, axis=-2)
  return jnp.abs(down).mean() + jnp.abs(across).mean()


def batch_norm(
  apply_fn: ApplyFn, params: Params, model_state: ModelState, images: Array, key: Key | None = None
) -> Array:
  """How far the batch moves the running means and variances of BatchNorm, as the sum of distances
  over all statistics (Yin et al. 2021, equation 9, times 1 - momentum).

  Zero only if every layer's batch statistics equal the running ones.

  Raises:
    ValueError: the model has no BatchNorm.
  """
  if not jax.tree.leaves(model_state):
    raise ValueError("model_state is empty: batch_norm needs a model with BatchNorm")
  _, moved = apply_fn(params, model_state, images, train=True, key=key)
  # the gradient of a norm at 0 is NaN
  distance = lambda a, b: jnp.sqrt(jnp.sum(jnp.square(a - b)) + 1e-12)
  return jax.tree.reduce(jnp.add, jax.tree.map(distance, moved, model_state))


def group(images: Array, axis_name: str) -> Array:
  """Mean squared distance from the mean of all restarts, which get no gradient (Yin et al. 2021,
  equations 10 and 11, without their registration).

  Args:
    images: [B, H, W, C] of one restart.
    axis_name: of the restarts: `inversion.RESTARTS` under `inversion.run`.
  """
  consensus = jax.lax.pmean(jax.lax.stop_gradient(images), axis_name)
  return jnp.square(images - consensus).mean()
