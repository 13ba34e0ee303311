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


def group(images: Array, axis_name: str, *, registered: bool = False) -> Array:
  """Mean squared distance from the mean of all restarts, which get no gradient (Yin et al. 2021,
  equations 10 and 11).

  Args:
    images: [B, H, W, C] of one restart.
    axis_name: of the restarts: `inversion.RESTARTS` under `inversion.run`.
    registered: first move the others onto this one, since restarts often find an image beside its
      place. Images are moved whole (`register`); the paper's flow also bends them.
  """
  images_of_all = jax.lax.stop_gradient(images)
  if not registered:
    consensus = jax.lax.pmean(images_of_all, axis_name)
  else:
    here = images_of_all
    moved = jax.vmap(lambda other: register(other, here))(jax.lax.all_gather(here, axis_name))
    consensus = moved.mean(0)
  return jnp.square(images - consensus).mean()


def register(images: Array, onto: Array) -> Array:
  """Images [B, H, W, C] shifted by whole pixels, around the edge, to agree best with others: the
  shift with the largest cross-correlation, which is found by Fourier transforms.
  """

  def one(image: Array, reference: Array) -> Array:
    transform = lambda x: jnp.fft.rfft2(x - x.mean(), axes=(0, 1))
    product = transform(reference) * jnp.conj(transform(image))
    agreement = jnp.fft.irfft2(product, s=image.shape[:2], axes=(0, 1)).sum(-1)
    shift = jnp.stack(jnp.unravel_index(jnp.argmax(agreement), agreement.shape))
    return jnp.roll(image, shift, axis=(0, 1))

  return jax.vmap(one)(images, onto)
