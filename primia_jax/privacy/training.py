"""DP-SGD as a site's recipe: sampler, clip and noise of one mechanism, each from a subkey of the site's own secret.

Who learns what: whoever sees a site's update, or the sums and models that follow from it, learns of any one unit no
more than the ledger's epsilon and delta say, under the assumption that the site's secret is fresh, uniform and known to
nobody else (then ChaCha20's output stands for true randomness). The site itself sees its images.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from primia_jax import local, prng
from primia_jax.privacy import sampling
from primia_jax.privacy.mechanism import Mechanism, private_gradients
from primia_jax.types import Array, LossFn, Params, PyTree

_SAMPLING, _NOISE = 1, 2  # subkeys of a site's secret


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

  def draw(secret: Array, step: Array, num_units: Array, size: int, units: Array | None) -> Array:
    key, how = prng.derive(secret, _SAMPLING), (size, mechanism.sampling_rate, mechanism.max_units)
    if mechanism.unit == "example":
      return sampling.poisson(key, step, num_units, *how)[0]
    if units is None:
      raise ValueError("unit='patient' needs the patient of each image: give Site.units")
    return sampling.poisson_patients(key, step, units, num_units, *how, rows_per_unit)[0][0]

  def grad_fn(params, model_state, batch, key, secret, step, num_units):
    noise_key = prng.derive(secret, _NOISE, step)
    return gradient(params, model_state, batch, key, noise_key, num_units.astype(jnp.float32))

  return local.Private(draw, grad_fn, num_steps)
