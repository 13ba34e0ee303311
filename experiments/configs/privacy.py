"""Differential privacy of a run: from settings to a plan of the library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from primia_jax import prng
from primia_jax.federated import fresh_secrets
from primia_jax.privacy import accounting, clipping, noise, plan
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.summation import Purpose
from primia_jax.types import LossFn, Params, PyTree

from ..settings import choose, require, setting
from .training import Training

_CORRELATED = ("banded", "tree")
_OF_STEPS = ("site", *_CORRELATED)
_KINDS = {
  "none": ("site",),
  "example": _OF_STEPS,
  "patient": _OF_STEPS,
  "site": ("site", "distributed"),
}
_CLIP_RATE = 0.2
_DELTA = 0.1  # times 1 / n, at which a mechanism could publish a random unit whole


@dataclasses.dataclass(frozen=True)
class Privacy:
  """What is protected, and by how much noise."""

  dp: str = setting(
    "none",
    "differential privacy: none; example or patient (of each site's images, by DP-SGD or DP-FTRL; "
    "patient needs known patients, see patient_column and patient_pattern); site (of each site's "
    "whole update)",
  )
  dp_noise: str = setting(
    "site",
    "dp: the noise: site (drawn by each site, fresh at each step); dp=example or patient: banded "
    "or tree (DP-FTRL: noise that cancels from step to step, batches in a fixed order, for sites "
    "that cannot sample); dp=site: distributed (each site a share of it, before masking)",
  )
  dp_bands: int = setting(
    0,
    "dp_noise=banded: number of bands, each of which takes the memory of a gradient; 0 takes as "
    "many as batches allow, at most 16",
  )
  target_epsilon: float = setting(
    0.0,
    "dp: the budget of this run, at which training stops. Without noise_multiplier it also sets "
    "the noise; 0 for no budget",
  )
  delta: float = setting(
    0.0,
    "dp: the delta of the claim, at most 1 / n, with n the images or patients of the largest site, "
    "or with dp=site the number of sites; 0 takes a tenth of that, which is weak for few sites",
  )
  noise_multiplier: float = setting(
    0.0,
    "dp: standard deviation of the noise over the clipping norm; with banded and tree, of the one "
    "Gaussian mechanism that the whole run amounts to; with dp_clip_quantile, of updates and of "
    "what moves their clip together; 0 takes the least that keeps target_epsilon",
  )
  l2_clip_norm: float = setting(
    1.0,
    "dp: largest L2 norm of what one image, patient or site adds to a sum; with dp_clip_quantile, "
    "of round 1",
  )
  dp_clip_quantile: float = setting(
    0.0,
    "dp=site: target share of sites whose updates are within the clip, e.g. 0.5. The clip then "
    "moves from round to round (Andrew et al. 2021), and each site reports, under noise, whether "
    "its update was within; 0 keeps l2_clip_norm",
  )
  dp_clip_rate: float = setting(
    _CLIP_RATE,
    "dp_clip_quantile: how fast the clip moves: a round changes its logarithm by this times the "
    "share's error",
  )
  dp_clipping: str = setting(
    "flat", "dp: flat, per_layer, or automatic (every gradient scaled to the norm)"
  )
  dp_augmentations: int = setting(
    1, "dp: augmented copies of an image, whose mean gradient is clipped as one"
  )
  dp_count_noise: float = setting(
    20.0,
    "dp with class_weights: standard deviation of the noise on each site's class counts, of images "
    "or patients",
  )
  dp_average: float = setting(
    0.0, "decay of the average over rounds of the parameters that are evaluated; 0 takes the last"
  )
  validation: str = setting(
    "auto",
    "validation images: exact (counts and losses, summed over sites after each round, choose the "
    "round whose model is kept; no ledger is charged for them), none (unused; the last round's "
    "model is kept), or auto: exact, and with dp none",
  )
  dp_seed: int = setting(
    -1,
    "dp: a seed for noise and batches, to repeat a run, which is then NOT PRIVATE; -1 draws them "
    "from the operating system",
  )

  ledger_dir: str = setting(
    "",
    "dp: folder of the ledger, which all runs on the same data share; it must outlive run folders. "
    "Empty takes PATH.ledger beside the images in PATH, and for the phantom the run folder",
  )

  def __post_init__(self):
    choose("dp", self.dp, _KINDS)
    choose("dp_clipping", self.dp_clipping, clipping.CLIPPINGS)
    choose("validation", self.validation, ("auto", "exact", "none"))
    for name in ("target_epsilon", "noise_multiplier", "delta", "dp_count_noise", "dp_bands"):
      value = getattr(self, name)
      require(0 <= value < math.inf, name, value, "must be finite and not negative")
    require(self.delta < 1, "delta", self.delta, "must be less than 1, and at most 1 / n")
    value = self.l2_clip_norm
    require(0 < value < math.inf, "l2_clip_norm", value, "must be positive and finite")
    value = self.dp_augmentations
    require(value > 0, "dp_augmentations", value, "must be at least 1")
    require(0 <= self.dp_average < 1, "dp_average", self.dp_average, "must lie in [0, 1)")
    require(self.dp_seed >= -1, "dp_seed", self.dp_seed, "must be at least 0, or -1")
    if self.dp_bands and self.dp_noise != "banded":
      raise ValueError(
        f"dp_bands={self.dp_bands} belongs to dp_noise=banded, not {self.dp_noise}; use dp_bands=0"
      )
    if self.dp != "site" and self.dp_clip_quantile:
      raise ValueError(
        f"dp_clip_quantile={self.dp_clip_quantile} moves the clip of whole sites' updates, which "
        f"dp={self.dp} does not clip; use dp_clip_quantile=0, or dp=site"
      )
    value = self.dp_clip_quantile
    cure = "must lie between 0 and 1, e.g. 0.5; 0 fixes the clip"
    require(0 <= value < 1, "dp_clip_quantile", value, cure)
    if not self.dp_clip_quantile and self.dp_clip_rate != _CLIP_RATE:
      raise ValueError(
        f"dp_clip_rate={self.dp_clip_rate} belongs to a clip that moves; leave it out, or set "
        "dp=site and dp_clip_quantile"
      )
    value = self.dp_clip_rate
    require(0 < value < math.inf, "dp_clip_rate", value, f"must be positive, e.g. {_CLIP_RATE}")
    if self.dp == "none":
      if self.dp_noise in _CORRELATED:
        raise ValueError(
          f"dp_noise={self.dp_noise} belongs to differential privacy; set dp=example or patient"
        )
      if self.target_epsilon or self.noise_multiplier:
        raise ValueError(
          f"target_epsilon={self.target_epsilon:g} and noise_multiplier={self.noise_multiplier:g} "
          "belong to differential privacy, and dp=none; set dp=example, patient or site"
        )
      if self.ledger_dir:
        raise ValueError(
          f"ledger_dir={self.ledger_dir}: dp=none is charged in no ledger; leave it out, or set "
          "dp=example, patient or site"
        )
      return
    choose(f"dp={self.dp} with dp_noise", self.dp_noise, _KINDS[self.dp])
    if not self.target_epsilon and not self.noise_multiplier:
      raise ValueError(
        f"dp={self.dp} needs target_epsilon (noise follows) or noise_multiplier; without noise "
        "nothing is private"
      )

  @property
  def is_charged_whole(self) -> bool:
    """Whether the noise of a run belongs together, so that each start is charged a whole run."""
    return self.dp_noise in _CORRELATED

  @property
  def by_patient(self) -> bool:
    return self.dp == "patient"

  @property
  def validates(self) -> bool:
    """Whether scores on validation images leave the sites, exactly, and choose the model."""
    return self.validation == "exact" or (self.validation == "auto" and self.dp == "none")

  def build_steps(
    self,
    training: Training,
    loss_fn: LossFn,
    sizes: Sequence[int],
    *,
    max_examples: int | None = None,
    rows_per_unit: int = 1,
    has_taps: Callable[[Params], PyTree] | None = None,
  ) -> plan.StepPlan:
    """The plan of private steps at each site, for dp=example or patient.

    Args:
      training: the run's.
      loss_fn: of a batch.
      sizes: units of each site; the largest and the smallest become public.
      max_examples: the most images of a site.
      rows_per_unit: the most images of a patient.
      has_taps: see `clipping.clipped_sum`.

    Raises:
      ValueError: a delta that is too large, or a budget that nothing can meet.
    """
    most, batch = max(sizes), training.batch_size
    counts = None
    if training.class_weights:
      error = noise.error_of_release()
      counts = accounting.gaussian("class counts", self.dp_count_noise, extra_delta=error)
    options = {
      "num_units": most,
      "steps": (training.sync_epochs or 1) * -(-most // batch),
      "rounds": training.rounds,
      "delta": self.delta or _DELTA / most,
      "target_epsilon": self.target_epsilon or None,
      "noise_multiplier": self.noise_multiplier or None,
      "l2_clip_norm": self.l2_clip_norm,
      "clipping": self.dp_clipping,
      "unit": self.dp,
      "rows_per_unit": rows_per_unit,
      "max_examples": max_examples,
      "augmentations": self.dp_augmentations,
      "has_taps": has_taps,
      "before": (counts,) if counts else (),
    }
    if self.dp_noise in _CORRELATED:
      return plan.dp_ftrl(
        loss_fn,
        batch_size=batch,
        min_units=min(sizes),
        kind=self.dp_noise,
        bands=self.dp_bands or None,
        **options,  # type: ignore[arg-type]
      )
    return plan.dp_sgd(loss_fn, sampling_rate=min(1.0, batch / most), **options)  # type: ignore[arg-type]

  def build_sites(
    self,
    training: Training,
    num_sites: int,
    sites_in_round: int,
    num_parameters: int,
    secagg_bits: int,
    min_survivors: int | None,
    num_colluding: int,
  ) -> plan.SiteLevel:
    """The plan of whole sites, for dp=site.

    Args:
      training: the run's.
      num_sites, sites_in_round: all sites, and those of a round.
      num_parameters: of the model.
      secagg_bits: of the ring.
      min_survivors: the fewest sites in a sum.
      num_colluding: sites whose own shares of distributed noise do not hide the others from them.

    Raises:
      ValueError: as `build_steps`.
    """
    together = None
    if self.dp_noise == "distributed":
      together = DistributedNoise(
        dim=num_parameters,
        num_sites=sites_in_round,
        min_survivors=min_survivors or sites_in_round,
        l2_clip_norm=self.l2_clip_norm,
        noise_multiplier=1.0,
        num_bits=secagg_bits,
        num_colluding=num_colluding,
      )
    return plan.site_level(
      num_sites=num_sites,
      rounds=training.rounds,
      delta=self.delta or _DELTA / num_sites,
      target_epsilon=self.target_epsilon or None,
      noise_multiplier=self.noise_multiplier or None,
      l2_clip_norm=self.l2_clip_norm,
      target_quantile=self.dp_clip_quantile or None,
      clip_rate=self.dp_clip_rate,
      together=together,
    )

  def secrets(self) -> Callable[[int, Purpose, np.ndarray], np.ndarray]:
    """Where sites' noise and batches come from: the operating system, unless dp_seed is set."""
    if self.dp_seed < 0:
      return fresh_secrets
    seed = prng.key_of(self.dp_seed.to_bytes(32, "little"))

    def repeated(round: int, purpose: Purpose, ids: np.ndarray) -> np.ndarray:
      of_sum = prng.derive(seed, round, int(purpose))
      return np.stack([np.asarray(prng.derive(of_sum, int(i))) for i in ids])

    return repeated
