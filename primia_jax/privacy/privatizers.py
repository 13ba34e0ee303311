"""What draws the noise of a private step: optax transformations from a sum of clipped gradients to
the gradient that the optimiser sees.

`update` takes (sum, state, params, secret=, step=, num_units=) as `local.Recipe` says; the sum's
bound is the caller's (`clipping.clipped_gradients`). Who learns what: whoever sees the results, and
not the secret, learns what a Gaussian mechanism tells; whoever knows the secret can subtract the
noise. The secret is an argument, so that no state, checkpoint or folder holds it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local
from primia_jax.privacy import correlated, noise, subkeys
from primia_jax.privacy.strategies import Config
from primia_jax.types import Array, Params, PyTree


def gaussian(
  stddev: float, sampling_rate: float, most_units: int | None = None
) -> local.Privatizer:
  """Fresh noise at each step, as DP-SGD adds it; the state is ().

  Args:
    stddev: of the noise on the sum; 0 adds none, and then nothing is private.
    sampling_rate: q; noised sums are divided by q times the site's number of units.
    most_units: of any site; a site with more gets NaN for noise and so releases nothing, since its
      batches would overflow. None for no bound.
  """

  def update(
    grads: PyTree,
    state: PyTree,
    params: Params | None = None,
    *,
    secret: Array | None,
    step: Array,
    num_units: Array,
  ) -> tuple[PyTree, PyTree]:
    drawn = noise.gaussian_like(subkeys.of_step(secret, step), 0, grads, stddev)
    if most_units is not None:
      fits = num_units <= most_units
      drawn = jax.tree.map(lambda n: jnp.where(fits, n, jnp.nan), drawn)
    scale = 1 / (np.float32(sampling_rate) * jnp.asarray(num_units, jnp.float32))
    return jax.tree.map(lambda g, n: (g + n) * scale, grads, drawn), state

  return local.Privatizer(lambda params: (), update)


def correlate(config: Config, batch_size: int) -> local.Privatizer:
  """Noise that cancels from step to step, as DP-FTRL adds it; the state is `correlated.NoiseState`.

  The secret may be another in every round: the state holds what later noise needs of earlier draws,
  and the secret draws fresh numbers only. Where the site's units come more often than `config`
  allows, all noise is NaN, so that nothing is released.

  Args:
    config: the noise of all steps of a run.
    batch_size: B, units of a step of `batches.cyclic`; noised sums are divided by it.
  """
  fewest = max(
    config.min_separation * batch_size,
    -(-config.num_steps * batch_size // config.max_participations),
  )

  def update(
    grads: PyTree,
    state: correlated.NoiseState,
    params: Params | None = None,
    *,
    secret: Array | None,
    step: Array,
    num_units: Array,
  ) -> tuple[PyTree, correlated.NoiseState]:
    key = subkeys.of_step(secret, step)
    drawn, state = correlated.next_noise(config, state, key, state.step)
    drawn = jax.tree.map(lambda n: jnp.where(num_units >= fewest, n, jnp.nan), drawn)
    return jax.tree.map(lambda g, n: (g + n) / np.float32(batch_size), grads, drawn), state

  return local.Privatizer(lambda params: correlated.init(config, params), update)
