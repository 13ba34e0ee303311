"""What draws the noise of a private step: optax transformations from a sum of clipped gradients to
the gradient that the optimiser sees.

`update` takes (sum, state, params, secret=, step=, num_units=) as `local.Recipe` says; the sum is
that of `clipping.clipped_gradients`, in integers (`grid`). Who learns what: whoever sees the
results, and not the secret, learns what a Gaussian mechanism tells; whoever knows the secret can
subtract the noise. The secret is an argument, so that no state, checkpoint or folder holds it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local
from primia_jax.privacy import correlated, grid, strategies, subkeys
from primia_jax.privacy.grid import Rounded
from primia_jax.privacy.strategies import Config
from primia_jax.types import Array, Params, PyTree


def gaussian(
  noise_multiplier: float, sampling_rate: float, most_units: int | None = None
) -> local.Privatizer:
  """Fresh noise at each step, as DP-SGD adds it; the state is ().

  Args:
    noise_multiplier: of the noise on the sum; a sum that was rounded for another raises a
      ValueError.
    sampling_rate: q; noised sums are divided by q times the site's number of units.
    most_units: of any site; a site with more gets NaN for a gradient and so releases nothing, since
      its batches would overflow. None for no bound.
  """

  def update(
    grads: Rounded,
    state: PyTree,
    params: Params | None = None,
    *,
    secret: Array | None,
    step: Array,
    num_units: Array,
  ) -> tuple[PyTree, PyTree]:
    _check(grads, noise_multiplier, 1)
    total = grid.noised(grads.integers, grads.grid, subkeys.of_step(secret, step), 0)
    scale = grads.step / (np.float32(sampling_rate) * jnp.asarray(num_units, jnp.float32))
    if most_units is not None:
      scale = jnp.where(num_units <= most_units, scale, jnp.nan)
    return grid.real(total, scale), state

  return local.Privatizer(lambda params: (), update)


def correlate(config: Config, batch_size: int) -> local.Privatizer:
  """Noise that cancels from step to step, as DP-FTRL adds it; the state is `correlated.NoiseState`.

  The secret may be another in every round: the state holds what later noise needs of earlier draws,
  and the secret draws fresh numbers only. Where the site's units come more often than `config`
  allows, all gradients are NaN, so that nothing is released.

  Args:
    config: the noise of all steps of a run.
    batch_size: B, units of a step of `batches.cyclic`; noised sums are divided by it.
  """
  multiplier = strategies.stddev(config) / config.l2_clip_norm
  fewest = max(
    config.min_separation * batch_size,
    -(-config.num_steps * batch_size // config.max_participations),
  )

  def update(
    grads: Rounded,
    state: correlated.NoiseState,
    params: Params | None = None,
    *,
    secret: Array | None,
    step: Array,
    num_units: Array,
  ) -> tuple[PyTree, correlated.NoiseState]:
    _check(grads, multiplier, correlated.fraction(config))
    going = (num_units >= fewest) & (state.step < np.uint32(config.num_steps))
    key = subkeys.of_step(secret, step)
    drawn, state = correlated.next_noise(config, state, key, state.step, grads.grid.level)
    total = jax.tree.map(jnp.add, grads.integers, drawn)
    scale = jnp.where(going, grads.step / np.float32(batch_size), jnp.nan)
    return grid.real(total, scale), state

  return local.Privatizer(lambda params: correlated.init(config, params), update)


def _check(grads: Rounded, noise_multiplier: float, fraction: int) -> None:
  if not isinstance(grads, Rounded):
    raise ValueError("a privatizer takes sums of `clipping.clipped_gradients`, which are rounded")
  made_for = grads.grid.noise_multiplier, grads.grid.fraction
  if made_for != (noise_multiplier, fraction):
    raise ValueError(
      f"the sum was rounded for noise_multiplier={made_for[0]:g} (fraction {made_for[1]}), and the "
      f"noise is {noise_multiplier:g} (fraction {fraction}); give both the same grid"
    )
