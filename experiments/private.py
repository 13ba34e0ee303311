"""Differential privacy of a training run: from settings to a mechanism, its noise and what it
costs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.settings import Train
from primia_jax import prng, site_privacy
from primia_jax.privacy import accounting, adaptive, correlated, distributed
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.adaptive import Clip
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.privacy.mechanism import Mechanism, capacity, overflow_probability
from primia_jax.privacy.training import participation

_FAILURE = 1e-12  # probability that any batch of a run overflows; taken from delta
_CORRELATED = ("banded", "tree")
_OF_STEPS = ("site", *_CORRELATED)
_KINDS = {
  "none": ("site",),
  "example": _OF_STEPS,
  "patient": _OF_STEPS,
  "site": ("site", "distributed"),
}
_CURIOUS = 1  # sites whose own share of distributed noise does not hide the others from them
_MAX_BANDS = 16  # more take memory and hardly any error
_RELEASED = ("updates", "updates, and whether they were within the clip")


class Privacy(NamedTuple):
  """What protects the units of one cohort.

  Attributes:
    unit: "example", "patient" or "site".
    release: of every site in every round, `num_steps` times; with `correlated`, once for the whole
      run.
    num_steps: steps of a round, or 1 for sites as units.
    counts: the release of the class counts before training; None where there is none.
    delta: of the claim.
    target: epsilon at which training stops; infinite without one.
    num_units: of the largest site, or sites.
    mechanism: of a training step; None for sites as units, and with `correlated`.
    noise: of a sum, where sites make it together; else None.
    clip: of sites' updates; None for other units.
    correlated: the noise of all steps of a run, where batches come in a fixed order; else None.
  """

  unit: str
  release: Release
  num_steps: int
  counts: Release | None
  delta: float
  target: float
  num_units: int
  mechanism: Mechanism | None = None
  noise: DistributedNoise | None = None
  correlated: correlated.Config | None = None
  clip: Clip | None = None


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


def make(
  settings: Train, sizes: Sequence[int], num_sites: int, num_parameters: int, threshold: int | None
) -> Privacy | None:
  """What protects a cohort, with noise calibrated to the target where none is given; None without
  privacy.

  Args:
    settings: of the run.
    sizes: units of each site; the largest and the smallest become public.
    num_sites: sites in a round.
    num_parameters: of the model.
    threshold: the fewest sites in a sum.

  Raises:
    ValueError: a delta that is too large, or a budget that nothing can meet.
  """
  s = settings
  if s.dp == "none":
    return None
  target = s.target_epsilon or math.inf
  if s.dp == "site":
    return _of_sites(s, num_sites, num_parameters, threshold, target)
  most = max(sizes)
  delta = s.delta or 1 / most
  accounting.ledger(s.dp, delta, most)  # checks delta
  rate = min(1.0, s.batch_size / most)
  num_steps = s.sync_epochs * -(-most // s.batch_size)
  total = num_steps * s.rounds
  counts = accounting.gaussian("class counts", s.dp_count_noise) if s.class_weights else None
  if s.dp_noise in _CORRELATED:
    noises = _of_run(s, total, min(sizes), delta, counts)
    release = accounting.gaussian("gradients", noises.noise_multiplier)
    return Privacy(s.dp, release, num_steps, counts, delta, target, most, correlated=noises)
  mechanism = Mechanism(
    noise_multiplier=s.noise_multiplier or 1.0,
    sampling_rate=rate,
    max_units=capacity(most, rate, total, _FAILURE),
    l2_clip_norm=s.l2_clip_norm,
    clipping=s.dp_clipping,
    unit=s.dp,
    augmentations=s.dp_augmentations,
  )
  overflow = overflow_probability(mechanism, most, total) / total
  if not s.noise_multiplier:
    before = (counts,) if counts else ()
    rate = mechanism.sampling_rate
    noise = accounting.calibrate(s.target_epsilon, delta, rate, total, before, overflow)
    mechanism = dataclasses.replace(mechanism, noise_multiplier=noise)
  release = accounting.gaussian(
    "gradients", mechanism.noise_multiplier, mechanism.sampling_rate, overflow
  )
  return Privacy(s.dp, release, num_steps, counts, delta, target, most, mechanism)


def _of_run(
  s: Train, total: int, fewest: int, delta: float, counts: Release | None
) -> correlated.Config:
  """The noise of all steps of a run, which together are one Gaussian mechanism."""
  before = (counts,) if counts else ()
  sigma = s.noise_multiplier or accounting.calibrate(s.target_epsilon, delta, 1.0, 1, before)
  if s.noise_multiplier and s.target_epsilon:
    spent = Ledger(s.dp, delta)
    for release in (*before, accounting.gaussian("gradients", sigma)):
      spent = accounting.spend(spent, release)
    if (epsilon := accounting.epsilon(spent)) > s.target_epsilon:
      raise ValueError(
        f"noise_multiplier={sigma:g} costs epsilon {epsilon:.4g} for the whole run, more than "
        f"target_epsilon="
        f"{s.target_epsilon:g}; leave one of them out"
      )
  separation, times = participation(total, s.batch_size, fewest)
  if s.dp_noise == "tree":
    return correlated.tree(total, separation, sigma, s.l2_clip_norm, max_participations=times)
  if s.dp_bands > separation:
    raise ValueError(
      f"dp_bands={s.dp_bands} reach beyond the {separation} steps after which the smallest site's "
      f"{fewest} units, "
      f"{s.batch_size} in a batch, come again; use dp_bands={separation} or less, or a smaller "
      f"batch_size"
    )
  bands = min(s.dp_bands or min(separation, _MAX_BANDS), total)
  coefficients = correlated.optimal_coefficients(bands, total)
  return correlated.banded(
    total, separation, sigma, s.l2_clip_norm, coefficients.tolist(), max_participations=times
  )


def _of_sites(
  s: Train, num_sites: int, num_parameters: int, threshold: int | None, target: float
) -> Privacy:
  delta = s.delta or 1 / s.num_sites
  accounting.ledger("site", delta, s.num_sites)
  if s.dp_noise == "site":
    sigma = s.noise_multiplier or accounting.calibrate(s.target_epsilon, delta, 1.0, s.rounds)
    release = accounting.gaussian(_RELEASED[s.dp_clip_quantile > 0], sigma)
    return Privacy("site", release, 1, None, delta, target, s.num_sites, clip=_clip(s, sigma))
  noise = DistributedNoise(
    dim=num_parameters,
    num_sites=num_sites,
    min_survivors=threshold or num_sites,
    l2_clip_norm=1.0 if s.dp_clip_quantile else s.l2_clip_norm,
    noise_multiplier=s.noise_multiplier or 1.0,
    num_bits=s.secagg_bits,
    num_colluding=_CURIOUS,
  )
  z, split = s.noise_multiplier, lambda z: _split(s, noise, z)
  if not z:
    z = distributed.calibrate(noise, s.target_epsilon, delta, s.rounds).noise_multiplier
    start = accounting.ledger("site", delta, s.num_sites)
    # The ledger knows whole orders only, and so claims a little more than `distributed.epsilon`.
    while (
      accounting.epsilon(accounting.spend(start, _of_sum(*split(z)), s.rounds)) > s.target_epsilon
    ):
      z *= 1.001
  noise, clip = split(z)
  return Privacy(
    "site", _of_sum(noise, clip), 1, None, delta, target, s.num_sites, noise=noise, clip=clip
  )


def _clip(s: Train, noise_multiplier: float, num_sites: int = 0) -> Clip:
  """The clip of updates; its bits' noise is that of `num_sites` together, or of a site alone where
  none are given.

  Of one noise multiplier z for both, bits get 2 z or more, so that updates get 1.16 z at most; many
  sites together get num_sites / 20 (Andrew et al. 2021), which costs next to nothing.
  """
  if not s.dp_clip_quantile:
    return Clip(s.l2_clip_norm)
  return Clip(
    s.l2_clip_norm, s.dp_clip_quantile, s.dp_clip_rate, max(noise_multiplier, num_sites / 20)
  )


def _split(
  s: Train, noise: DistributedNoise, noise_multiplier: float
) -> tuple[DistributedNoise, Clip]:
  """One noise multiplier, between updates and the bits that move their clip."""
  clip = _clip(s, noise_multiplier, noise.num_sites)
  left = adaptive.update_noise_multiplier(noise_multiplier, clip)
  return dataclasses.replace(noise, noise_multiplier=left), clip


def _of_sum(noise: DistributedNoise, clip: Clip) -> Release:
  """What a round opens: the sum of updates and, where the clip moves, that of bits, whose
  divergences add up.
  """
  moves = clip.target_quantile is not None
  noises = (noise, site_privacy.bit_noise(noise, clip)) if moves else (noise,)
  curve = np.sum([distributed.rdp(n, accounting.ORDERS)[1] for n in noises], axis=0)
  return accounting.renyi(_RELEASED[moves], curve, math.fsum(n.sampler_error for n in noises))


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
