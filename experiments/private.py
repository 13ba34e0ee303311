"""Differential privacy of a training run: from settings to a plan, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.settings import Train
from primia_jax import prng
from primia_jax.privacy import accounting
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.privacy.plan import SiteLevel, StepPlan, dp_ftrl, dp_sgd, site_level
from primia_jax.types import LossFn, Params, PyTree

_CORRELATED = ("banded", "tree")
_OF_STEPS = ("site", *_CORRELATED)
_KINDS = {
  "none": ("site",),
  "example": _OF_STEPS,
  "patient": _OF_STEPS,
  "site": ("site", "distributed"),
}
_CURIOUS = 1  # sites whose own share of distributed noise does not hide the others from them


def check(settings: Train, federated: bool = True) -> None:
  """Refuses what could not be claimed, before any work; sites as units only where several train
  together.

  Raises:
    ValueError: naming the setting and the cure.
  """
  s = settings
  if s.dp not in _KINDS:
    raise ValueError(f"dp={s.dp!r}; use one of {', '.join(_KINDS)}")
  if s.dp_bands and s.dp_noise != "banded":
    raise ValueError(
      f"dp_bands={s.dp_bands} belongs to dp_noise=banded, not {s.dp_noise}; use dp_bands=0"
    )
  if s.dp_bands < 0:
    raise ValueError(f"dp_bands={s.dp_bands} must not be negative; 0 takes what batches allow")
  _check_clip(s)
  if s.dp == "none":
    if s.dp_noise in _CORRELATED:
      raise ValueError(
        f"dp_noise={s.dp_noise} belongs to differential privacy; set dp=example or patient"
      )
    if s.target_epsilon or s.noise_multiplier:
      raise ValueError(
        "target_epsilon and noise_multiplier belong to differential privacy; set dp=example, "
        "patient or site"
      )
    return
  if s.dp == "site" and not federated:
    raise ValueError(
      "dp=site protects sites of a federation; one site alone has dp=example or patient"
    )
  if s.dp_noise not in _KINDS[s.dp]:
    raise ValueError(f"dp_noise={s.dp_noise!r} with dp={s.dp}; use {' or '.join(_KINDS[s.dp])}")
  for name in ("target_epsilon", "noise_multiplier", "delta", "dp_count_noise"):
    if not 0 <= getattr(s, name) < math.inf:
      raise ValueError(f"{name}={getattr(s, name)} must be finite and not negative")
  if not s.target_epsilon and not s.noise_multiplier:
    raise ValueError(
      f"dp={s.dp} needs target_epsilon (noise follows) or noise_multiplier; without noise nothing "
      f"is private"
    )
  if s.mixup:
    raise ValueError(
      "mixup blends the images of several units, so that clipping bounds nobody's part; use mixup=0"
    )
  if s.norm == "batch":
    raise ValueError(
      "norm=batch mixes the images of a batch, which clipping cannot bound; use norm=group"
    )
  if s.dp == "site":
    if s.class_weights:
      raise ValueError(
        "class counts of a site cannot be bounded as one unit's; use --noclass_weights with dp=site"
      )
    if s.weighting != "uniform":
      raise ValueError(
        f"weighting={s.weighting} tells sizes of sites, which dp=site protects; use "
        f"weighting=uniform"
      )
    if s.algorithm not in ("fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad"):
      raise ValueError(
        f"dp=site bounds one update of a site, and {s.algorithm} sends more; use fedavg or its kin"
      )
  elif s.class_weights and not s.dp_count_noise:
    raise ValueError(
      "class_weights releases exact class counts; set dp_count_noise, or --noclass_weights"
    )
  if s.dp_noise == "distributed" and (
    s.aggregation != "secure" or s.secagg == "none" or not s.secagg_threshold
  ):
    raise ValueError(
      "dp_noise=distributed protects the sum of at least secagg_threshold sites and no single "
      "update; "
      "use aggregation=secure and set secagg_threshold"
    )
  if s.sync_batches:
    raise ValueError(
      "dp counts rounds in sync_epochs, of as many steps at every site; use sync_batches=0"
    )


def _check_clip(s: Train) -> None:
  """Refuses a clip that moves where nothing would move it."""
  if s.dp != "site" and s.dp_clip_quantile:
    raise ValueError(
      f"dp_clip_quantile={s.dp_clip_quantile} moves the clip of whole sites' updates, which "
      f"dp={s.dp} does not clip; "
      "use dp_clip_quantile=0, or dp=site"
    )
  if not 0 <= s.dp_clip_quantile < 1:
    raise ValueError(
      f"dp_clip_quantile={s.dp_clip_quantile} must lie between 0 and 1, e.g. 0.5; 0 fixes the clip"
    )
  if not s.dp_clip_quantile and s.dp_clip_rate != Train.dp_clip_rate:
    raise ValueError(
      f"dp_clip_rate={s.dp_clip_rate} belongs to a clip that moves; leave it out, or set dp=site "
      f"and dp_clip_quantile"
    )
  if not 0 < s.dp_clip_rate < math.inf:
    raise ValueError(
      f"dp_clip_rate={s.dp_clip_rate} must be positive and finite, e.g. {Train.dp_clip_rate}"
    )
  if s.dp_clip_quantile and s.aggregation not in ("secure", "clear"):
    raise ValueError(
      f"aggregation={s.aggregation} does not give the share of sites within the clip, which moves "
      f"it; use secure or "
      "clear, or dp_clip_quantile=0"
    )


def plan(
  settings: Train,
  loss_fn: LossFn,
  sizes: Sequence[int],
  num_sites: int,
  num_parameters: int,
  threshold: int | None,
  *,
  rows_per_unit: int = 1,
  max_examples: int | None = None,
  has_taps: Callable[[Params], PyTree] | None = None,
) -> StepPlan | SiteLevel | None:
  """What protects a cohort, with noise calibrated to the target where none is given; None without
  privacy.

  Args:
    settings: of the run.
    loss_fn: what steps differentiate.
    sizes: units of each site; the largest and the smallest become public.
    num_sites: sites in a round.
    num_parameters: of the model.
    threshold: the fewest sites in a sum.
    rows_per_unit: the most images of one patient.
    max_examples: the most images of one site; None where each unit is one image.
    has_taps: of the model, see `clipping.clipped_sum`.

  Raises:
    ValueError: a delta that is too large, or a budget that nothing can meet.
  """
  s = settings
  if s.dp == "none":
    return None
  noise: dict[str, Any] = {
    "rounds": s.rounds,
    "target_epsilon": s.target_epsilon or None,
    "noise_multiplier": s.noise_multiplier or None,
    "l2_clip_norm": s.l2_clip_norm,
  }
  if s.dp == "site":
    together = None
    if s.dp_noise == "distributed":
      together = DistributedNoise(
        dim=num_parameters,
        num_sites=num_sites,
        min_survivors=threshold or num_sites,
        l2_clip_norm=1.0 if s.dp_clip_quantile else s.l2_clip_norm,
        noise_multiplier=s.noise_multiplier or 1.0,
        num_bits=s.secagg_bits,
        num_colluding=_CURIOUS,
      )
    return site_level(
      num_sites=s.num_sites,
      delta=s.delta or 1 / s.num_sites,
      target_quantile=s.dp_clip_quantile or None,
      clip_rate=s.dp_clip_rate,
      together=together,
      **noise,
    )
  most = max(sizes)
  before: tuple[accounting.Release, ...] = ()
  if s.class_weights:
    before = (accounting.gaussian("class counts", s.dp_count_noise),)
  steps: dict[str, Any] = {
    **noise,
    "num_units": most,
    "delta": s.delta or 1 / most,
    "steps": s.sync_epochs * -(-most // s.batch_size),
    "unit": s.dp,
    "rows_per_unit": rows_per_unit,
    "max_examples": max_examples,
    "clipping": s.dp_clipping,
    "augmentations": s.dp_augmentations,
    "has_taps": has_taps,
    "before": before,
  }
  if s.dp_noise in _CORRELATED:
    return dp_ftrl(
      loss_fn,
      batch_size=s.batch_size,
      min_units=min(sizes),
      kind=s.dp_noise,
      bands=s.dp_bands or None,
      **steps,
    )
  return dp_sgd(loss_fn, sampling_rate=min(1.0, s.batch_size / most), **steps)


def secrets(settings: Train, site_ids: np.ndarray) -> np.ndarray:
  """The secrets of sites, [K, 8] uint32: from the operating system, or from `dp_seed`, and then
  nothing is private.
  """
  if settings.dp_seed < 0:
    return np.stack([np.asarray(prng.random_key()) for _ in site_ids])
  words = np.random.SeedSequence(settings.dp_seed).generate_state(8)
  return np.stack(
    [np.asarray(prng.derive(jnp.asarray(words, jnp.uint32), int(i))) for i in site_ids]
  )
