"""Images for tests of augmentation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage


def some_images(num=4, height=24, width=20, channels=1, seed=0) -> jax.Array:
  """Smooth images with some texture, in [0, 1]."""
  rng = np.random.default_rng(seed)
  noise = rng.random((num, height, width, channels))
  smooth = scipy.ndimage.gaussian_filter(noise, (0, 2, 2, 0))
  smooth = (smooth - smooth.min()) / np.ptp(smooth)
  return jnp.asarray(0.9 * smooth + 0.1 * noise, jnp.float32)


def jitted(function, **strengths):
  """Compiles `function` with fixed strengths: much faster than compiling each operation."""
  return jax.jit(functools.partial(function, **strengths))
