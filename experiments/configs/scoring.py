"""The settings of hospitals that score a finished model together, each its own images."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from primia_jax import score_noise, secagg
from primia_jax.privacy.plan import Plan

from ..settings import require, setting
from .aggregation import Aggregation, min_survivors
from .data import Data, Hospitals

_MOST_COUNTED = 2**24  # float32 holds every whole number up to it


def _of_sums(name: str) -> Any:
  field = Aggregation.__dataclass_fields__[name]
  return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class Scoring:
  """Hospitals that score a model together, with placement=flower."""

  num_sites: int = setting(3, "hospitals; in a trial on the run's own images as many as it had")
  score_bins: int = setting(
    64,
    "bins of equal width of a class's probability: more make the bound on the error of ROC-AUC "
    "smaller and let a count be of fewer images",
  )
  confidence_bins: int = setting(15, "bins of the largest probability, for calibration")
  most_images: int = setting(
    100_000, "most images that a hospital may score; the sums have room for this many"
  )
  held_out: float = setting(
    0.0,
    "score only the images that training held out to test: its test_fraction, with its seed. It "
    "serves hospitals apart whose source has no test split; 0 scores all images there",
  )
  dp_count_noise: float = setting(
    0.0,
    "standard deviation of Gaussian noise that each hospital adds to each of its counts before "
    "they are summed; its ledger is charged. A patient then counts 1, and there is no calibration. "
    "0 sums exact counts",
  )
  model_sha256: str = setting(
    "", "hash of the model's parameters, in hexadecimal: another model is refused; empty takes any"
  )
  secagg_threshold: int = _of_sums("secagg_threshold")
  secagg_colluding: int = _of_sums("secagg_colluding")

  def __post_init__(self):
    least = "must be at least 2"
    for name in ("num_sites", "score_bins", "confidence_bins"):
      require(getattr(self, name) >= 2, name, getattr(self, name), least)
    require(self.most_images > 0, "most_images", self.most_images, "must be positive")
    if self.most_images * self.num_sites > _MOST_COUNTED:
      raise ValueError(
        f"most_images={self.most_images} at each of num_sites={self.num_sites} sites: a sum holds "
        f"{_MOST_COUNTED:,} images; lower most_images"
      )
    require(0 <= self.held_out < 1, "held_out", self.held_out, "must lie in [0, 1)")
    sigma = self.dp_count_noise
    require(0 <= sigma < math.inf, "dp_count_noise", sigma, "must be finite and not negative")
    if sigma:
      try:
        score_noise.variance(2, self.score_bins, self.most_images, sigma)
      except ValueError as error:
        raise ValueError(f"dp_count_noise={sigma:g}: {error}") from error
    self.sums()

  @property
  def aggregation(self) -> Aggregation:
    """Of sums over all sites."""
    return Aggregation(
      secagg_threshold=self.secagg_threshold, secagg_colluding=self.secagg_colluding
    )

  @property
  def largest(self) -> float:
    """The largest magnitude of a hospital's count."""
    return self.most_images + score_noise.REACH * self.dp_count_noise

  def cost(self, num_classes: int, unit: str = "patient") -> Plan:
    """What each hospital's ledger is charged for counts with noise.

    Its delta is a tenth of one over `most_images`, and so tells nobody's number of images.
    """
    release = score_noise.release(num_classes, self.dp_count_noise)
    delta, most = 0.1 / self.most_images, self.most_images
    return Plan(unit, delta, most, math.inf, 1, (release,), before=(), whole_run=False)

  def sums(self) -> secagg.SecureSum:
    """The encoding and the masks of the counts; raises as `Aggregation.secure_sum`."""
    n = self.num_sites
    return self.aggregation.secure_sum(n, n, True, self.largest)


@dataclasses.dataclass(frozen=True)
class Evaluate:
  """Everything that decides what hospitals find together."""

  seed: int = setting(0, "seed of the phantom's images and of the bootstrap")
  data: Data = dataclasses.field(default_factory=lambda: Data(data=""))
  scoring: Scoring = dataclasses.field(default_factory=Scoring)

  def __post_init__(self):
    require(0 <= self.seed < 2**32, "seed", self.seed, "must lie between 0 and 4294967295")
    if self.data.site_data and len(self.data.sources) != self.scoring.num_sites:
      raise ValueError(
        f"site_data={self.data.site_data!r} names {len(self.data.sources)} sources for "
        f"num_sites={self.scoring.num_sites}; give one for each site"
      )
    if self.data.site_data and self.data.data:
      raise ValueError(
        f"data={self.data.data!r} and site_data={self.data.site_data!r}: give one of them; "
        "site_data has a source for each site"
      )
    if self.data.is_multi:
      raise ValueError(
        "multi_label with placement=flower: the counts that hospitals sum are of images with one "
        "class each; leave multi_label and label_columns out"
      )

  @property
  def hospitals(self) -> Hospitals:
    """How many sites there are."""
    return Hospitals(num_sites=self.scoring.num_sites)

  @property
  def aggregation(self) -> Aggregation:
    """How counts are summed."""
    return self.scoring.aggregation

  @property
  def fewest_in_sum(self) -> int:
    """The fewest sites over which the sum may open."""
    return min_survivors(self.scoring.sums()) or self.scoring.num_sites
