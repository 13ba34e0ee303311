"""Private training as a site's recipe: DP-SGD, or DP-FTRL for sites that cannot sample.

Sampler, clip and noise are of one mechanism, each from a subkey of the site's own secret. Who
learns what: whoever sees a site's update, or the sums and models that follow from it, learns of any
one unit no more than the ledger's epsilon and delta say, under the assumption that the site's
secret is fresh, uniform and known to nobody else (then ChaCha20's output stands for true
randomness). The site itself sees its images.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local, prng
from primia_jax.privacy import clipping as clip
from primia_jax.privacy import correlated, sampling
from primia_jax.privacy.mechanism import UNITS, Mechanism, private_gradients
from primia_jax.types import Array, LossFn, Params, PyTree

_SAMPLING, _NOISE = 1, 2  # subkeys of a site's secret
_NO_UNITS = "unit='patient' needs the patient of each image: give Site.units"
_ORDER = np.zeros(
  8, np.uint32
)  # public: an order that mixes the classes of sorted images, the same at every start


def private(
  loss_fn: LossFn, mechanism: Mechanism, num_steps: int, rows_per_unit: int = 1,
  has_taps: Callable[[Params], PyTree] | None = None,
) -> local.Private:  # fmt: skip
  """What makes a `local.Recipe` private.

  Args:
    loss_fn: of a batch; it is called with one unit at a time, or several.
    mechanism: what is done to gradients.
    num_steps: of a round, at every site alike; the accountant composes as many releases.
    rows_per_unit: the most images of a patient at any site, where patients are the unit.
    has_taps: see `clipping.clipped_sum`: the same steps in less time.

  Raises:
    ValueError: for fewer steps than one.
  """
  if num_steps < 1:
    raise ValueError(f"num_steps={num_steps} of private training must be at least 1")
  gradient = private_gradients(loss_fn, mechanism, has_taps)

  def draw(
    secret: Array, step: Array, num_units: Array, size: int, units: Array | None, state: tuple
  ) -> Array:
    key, how = prng.derive(secret, _SAMPLING), (size, mechanism.sampling_rate, mechanism.max_units)
    if mechanism.unit == "example":
      return sampling.poisson(key, step, num_units, *how)[0]
    if units is None:
      raise ValueError(_NO_UNITS)
    return sampling.poisson_patients(key, step, units, num_units, *how, rows_per_unit)[0][0]

  def grad_fn(params, model_state, batch, key, secret, step, num_units, state):
    noise_key = prng.derive(secret, _NOISE, step)
    return *gradient(
      params, model_state, batch, key, noise_key, num_units.astype(jnp.float32)
    ), state

  return local.Private(draw, grad_fn, num_steps)


def participation(num_steps: int, batch_size: int, min_units: int) -> tuple[int, int]:
  """How often units come in batches of a fixed order: steps between two uses of one at least, and
  uses at most.

  Args:
    num_steps: T, of the whole run.
    batch_size: B, units of a step.
    min_units: of the smallest site, n; larger ones use a unit less often.

  Returns:
    floor(n / B) and ceil(T B / n): what `correlated.banded` and `tree` take.

  Raises:
    ValueError: for a site that is smaller than a batch, or numbers below 1.
  """
  if min(num_steps, batch_size) < 1:
    raise ValueError(f"num_steps={num_steps} and batch_size={batch_size} must be at least 1")
  if min_units < batch_size:
    raise ValueError(
      f"the smallest site has {min_units} units, less than batch_size={batch_size}: one would be "
      f"in every step, twice; "
      f"use batch_size={max(min_units, 1)} or less"
    )
  return min_units // batch_size, -(-num_steps * batch_size // min_units)


def correlated_noise(
  loss_fn: LossFn,
  config: correlated.Config,
  num_steps: int,
  batch_size: int,
  *,
  unit: str = "example",
  rows_per_unit: int = 1,
  clipping: str = "flat",
  augmentations: int = 1,
  microbatch: int | None = None,
  has_taps: Callable[[Params], PyTree] | None = None,
) -> local.Private:
  """DP-FTRL (Kairouz et al. 2021) in place of `private`: batches in one fixed order and noise that
  cancels.

  Step t of a site takes the units at places t B, ..., t B + B - 1 of an order that is public and
  never changes, modulo the site's number of units; its gradient is the sum of clipped gradients
  plus `correlated.next_noise`, over B. Steps are counted by the noise's own state, so that a site
  that was not in a round, or was lost, goes on where it was.

  Who learns what: as `correlated` says; adjacent data sets have a unit, or zeros in place of its
  gradients (so that the number of units is public). The whole run is one Gaussian release of
  config.noise_multiplier, for a site of whatever number of units but too few: where they come more
  often than config allows, the noise is NaN. What is released twice (a run gone on with from a
  checkpoint, a round repeated that was refused) has other noise the second time, since step numbers
  never repeat, and costs another whole release at most: given the first, the rows of C X + Z that
  are drawn anew are a Gaussian mechanism of no larger sensitivity.

  Args:
    loss_fn: of a batch; it is called with one unit at a time, or several.
    config: the noise, for all steps of the run; its separation and participations from
      `participation`.
    num_steps: of a round, at every site alike.
    batch_size: B.
    unit: "example" or "patient".
    rows_per_unit: the most images of a patient at any site, where patients are the unit.
    clipping, augmentations, microbatch, has_taps: see `clipping.clipped_sum`.

  Raises:
    ValueError: for another unit, fewer steps than one, or a run of 2^32 places and more.
  """
  if unit not in UNITS:
    raise ValueError(f"unit={unit!r} is not one of {UNITS}")
  if min(num_steps, batch_size) < 1 or config.num_steps * batch_size >= 2**32:
    raise ValueError(
      f"num_steps={num_steps} and batch_size={batch_size} must be at least 1, and places of the "
      f"whole run, "
      f"{config.num_steps} x {batch_size}, fewer than 2^32"
    )
  summed = clip.clipped_sum(
    loss_fn,
    l2_clip_norm=config.l2_clip_norm,
    clipping=clipping,
    augmentations=augmentations,
    microbatch=microbatch,
    has_taps=has_taps,
  )
  fewest = max(
    config.min_separation * batch_size,
    -(-config.num_steps * batch_size // config.max_participations),
  )

  def draw(
    secret, step, num_units: Array, size: int, units: Array | None, state: correlated.NoiseState
  ) -> Array:
    place = state.step * np.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)
    place = (place % jnp.maximum(num_units, 1).astype(jnp.uint32)).astype(jnp.int32)
    real = jnp.arange(size, dtype=jnp.int32) < num_units
    words = prng.bits(jnp.asarray(_ORDER), jnp.zeros(3, jnp.uint32), (size,))
    chosen = jnp.lexsort((words, ~real)).astype(jnp.int32)[place]
    if unit == "example":
      return chosen
    if units is None:
      raise ValueError(_NO_UNITS)
    return sampling.rows_of(units, chosen, rows_per_unit)[0]

  def grad_fn(params, model_state, batch, key, secret, step, num_units, state):
    total, metrics, _ = summed(params, model_state, batch, key)
    drawn, state = correlated.next_noise(
      config, state, prng.derive(secret, _NOISE, step), state.step
    )
    drawn = jax.tree.map(lambda n: jnp.where(num_units >= fewest, n, jnp.nan), drawn)
    grads = jax.tree.map(lambda t, n: (t + n) / np.float32(batch_size), total, drawn)
    return grads, (model_state, metrics), state

  return local.Private(draw, grad_fn, num_steps, lambda params: correlated.init(config, params))
