"""The sampled Gaussian mechanism of DP-SGD (Abadi et al. 2016) as one frozen object, and the
gradient that it makes.

What is claimed: whoever sees every gradient (or model) of a run, but not the site's secret, learns
about any one unit of the site what a Poisson-subsampled Gaussian mechanism of `noise_multiplier`
and `sampling_rate` tells, once per step. Two data sets are adjacent when one has a unit more than
the other (equivalently: a unit's gradients are replaced by zeros); the number of units is public.
The claim assumes that sampling and noise come from a secret that the site drew from the operating
system, that every step's number is fresh, and that the rows of one unit are of one patient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from primia_jax.privacy import clipping as clip
from primia_jax.privacy import noise, sampling
from primia_jax.types import Array, Batch, Key, LossFn, Metrics, ModelState, Params, PyTree

UNITS = ("example", "patient")
_NORMS = (1e-6, 1e6)  # clip norms whose squares float32 holds with room to spare


@dataclasses.dataclass(frozen=True)
class Mechanism:
  """What sampler, clipping, noise and accountant must agree on.

  Attributes:
    noise_multiplier: sigma; the sum of clipped gradients gets noise of standard deviation sigma x
      l2_clip_norm. 0 is NOT private and must be asked for by `private=False`.
    sampling_rate: q, with which each unit enters each step; rounded up to a multiple of 2^-32 when
      the object is made, so that all see the rate that really runs.
    max_units: rows of a step's batch, see `capacity`.
    l2_clip_norm: C, the norm of a unit's contribution.
    clipping: "flat", "per_layer" or "automatic", see `clipping.clipped_sum`.
    unit: "example" or "patient": whose presence is hidden.
    augmentations: of each row, averaged before the unit is clipped once.
    microbatch: units whose gradients are formed at once; None chooses by the model's size.
    private: False for a run that is openly not private.
  """

  noise_multiplier: float
  sampling_rate: float
  max_units: int
  l2_clip_norm: float = 1.0
  clipping: str = "flat"
  unit: str = "example"
  augmentations: int = 1
  microbatch: int | None = None
  private: bool = True

  def __post_init__(self):
    if not 0 <= self.noise_multiplier < math.inf:
      raise ValueError(f"noise_multiplier={self.noise_multiplier} must be finite and positive")
    if (self.noise_multiplier > 0) != self.private:
      raise ValueError(
        f"noise_multiplier={self.noise_multiplier} with private={self.private}: without noise "
        f"nothing is private; give "
        "noise, or noise_multiplier=0 with private=False"
      )
    if not _NORMS[0] <= self.l2_clip_norm <= _NORMS[1]:
      raise ValueError(f"l2_clip_norm={self.l2_clip_norm} must lie in [{_NORMS[0]}, {_NORMS[1]}]")
    for name, allowed in (("clipping", clip.CLIPPINGS), ("unit", UNITS)):
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)!r} is not one of {allowed}")
    for name in ("max_units", "augmentations", "microbatch"):
      if (value := getattr(self, name)) is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
    object.__setattr__(self, "sampling_rate", sampling.effective_rate(self.sampling_rate))

  @property
  def stddev(self) -> float:
    """Of the noise on the sum of clipped gradients."""
    return self.noise_multiplier * self.l2_clip_norm


def capacity(
  max_examples: int, sampling_rate: float, num_steps: int, failure: float = 1e-12
) -> int:
  """The smallest `max_units` such that batches of a whole run fit with probability 1 - failure at
  least.

  Args:
    max_examples: the most units of any site.
    sampling_rate: q; `sampling.effective_rate(q)` counts.
    num_steps: of the run.
    failure: what the union bound over steps may reach; the accountant adds it to delta.

  Raises:
    ValueError: for a rate outside (0, 1], a failure outside (0, 1), or counts below 1.
  """
  _check_run(max_examples, num_steps)
  if not 0 < failure < 1:
    raise ValueError(f"failure={failure} must lie in (0, 1)")
  rate = sampling.effective_rate(sampling_rate)
  fits = lambda m: num_steps * stats.binom.sf(m, max_examples, rate) <= failure
  low, high = 0, max_examples  # the sampler can draw `max_examples` at most, so `high` always fits
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle + 1, high)
  return max(high, 1)


def overflow_probability(mechanism: Mechanism, max_examples: int, num_steps: int) -> float:
  """A bound on the probability that any step of a run draws more than `max_units`; the accountant
  adds it to delta.
  """
  _check_run(max_examples, num_steps)
  return min(
    1.0,
    num_steps * float(stats.binom.sf(mechanism.max_units, max_examples, mechanism.sampling_rate)),
  )


def private_gradients(
  loss_fn: LossFn, mechanism: Mechanism, has_taps: Callable[[Params], PyTree] | None = None
) -> Callable[..., tuple[Params, tuple[ModelState, Metrics]]]:
  """Makes the function that forms the private gradient of one step.

  Args:
    loss_fn: the mean over rows of non-zero weight; class weights scale a row's loss before its unit
      is clipped.
    mechanism: what all agree on.
    has_taps: see `clipping.clipped_sum`: the same gradient in less time.

  Returns:
    (params, model_state, Batch, key, secret, num_units) -> (gradient, (model_state, Metrics)): the
    sum of clipped gradients plus noise, over q n. The batch is [max_units, ...] or, for patients,
    [max_units, rows, ...], as `sampling` draws it; weight 0 marks padding, and a step without any
    unit gives noise alone. `key` is for augmentation and dropout. `secret`, [8] uint32, must be a
    fresh one for each step: a subkey that `prng.derive` makes of the site's secret and the step.
    num_units, float32, is the site's n. Metrics are NOT private.

    It raises a ValueError for a model with state (BatchNorm), or a batch that is not of the
    mechanism's form.
  """
  summed = clip.clipped_sum(
    loss_fn,
    l2_clip_norm=mechanism.l2_clip_norm,
    clipping=mechanism.clipping,
    augmentations=mechanism.augmentations,
    microbatch=mechanism.microbatch,
    has_taps=has_taps,
  )

  def run(
    params: Params,
    model_state: ModelState,
    batch: Batch,
    key: Key,
    secret: Array,
    num_units: float | Array,
  ):
    wanted = {"example": 1, "patient": 2}[mechanism.unit]
    if batch.weights.ndim != wanted or batch.weights.shape[0] != mechanism.max_units:
      raise ValueError(
        f"weights {list(batch.weights.shape)} do not fit unit={mechanism.unit!r}, "
        f"max_units={mechanism.max_units}; "
        f"give a batch of {'[max_units]' if wanted == 1 else '[max_units, rows]'}, padded with "
        f"weight 0"
      )
    total, metrics, _ = summed(params, model_state, batch, key)
    if mechanism.private:
      total = jax.tree.map(jnp.add, total, noise.gaussian_like(secret, 0, total, mechanism.stddev))
    scale = 1 / (np.float32(mechanism.sampling_rate) * jnp.asarray(num_units, jnp.float32))
    return jax.tree.map(lambda t: t * scale, total), (model_state, metrics)

  return run


def _check_run(max_examples: int, num_steps: int) -> None:
  if max_examples < 1 or num_steps < 1:
    raise ValueError(f"max_examples={max_examples} and num_steps={num_steps} must be at least 1")
