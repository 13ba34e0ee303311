"""Counts of a finished model's scores under noise: what a site adds to them, and what it costs.

A site counts its patients by what the model makes of their images (`metrics.shared_counts`), and
adds Gaussian noise to every count before it sends them (`noised`). The noise is whole, as that of
class counts is (`evaluation.class_counting`): it protects against every observer, whoever colludes,
and does not rest on the sum's masks.

Who learns what: whoever sees what the site sent learns no more of whether one patient's images were
scored there, zeros in their place otherwise, than epsilon and delta of `release` say. This assumes
that the site's secret is fresh and known to nobody else, and that images of one patient are known
to be (images whose patient is unknown are each a patient).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from primia_jax import metrics
from primia_jax.privacy import accounting, grid, noise, subkeys
from primia_jax.privacy.accounting import Release
from primia_jax.types import Array

WHAT = "counts of scores"
REACH = 10.0  # deviations within which noise stays: it ends at 6.8


def release(num_classes: int, stddev: float) -> Release:
  """What a ledger is charged for L classes: a Gaussian mechanism whose sensitivity is sqrt(1 + L)
  counts (`metrics.shared_counts`).

  Raises:
    ValueError: no noise.
  """
  multiplier = stddev / math.sqrt(1 + num_classes)
  return accounting.gaussian(WHAT, multiplier, extra_delta=noise.error_of_release())


def variance(num_classes: int, num_bins: int, most_images: int, stddev: float) -> float:
  """Of one site's noise in a count: stddev^2 or a little more, by the grid."""
  on = _grid(num_classes, num_bins, most_images, stddev)
  return (noise.stddev(on.level) / int(on.steps)) ** 2


def noised(
  labels: Any,
  probabilities: Any,
  groups: Any,
  num_bins: int,
  most_images: int,
  stddev: float,
  secret: Array,
) -> dict[str, np.ndarray]:
  """A site's counts with its noise.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.
    groups: [N] the patient of each image.
    num_bins: B, of a class's probability.
    most_images: that any site may have: it decides the grid, which is the same at all sites.
    stddev: of the noise, in counts.
    secret: of this site and this release alone, `prng.random_key()`.

  Returns:
    "confusion" [L, L] and "table" [L, L, B], float32, as `metrics.NoisedCounts` has them.

  Raises:
    ValueError: more images than `most_images`; as `metrics.shared_counts`; or 32 bits cannot hold
      the counts with their noise.
  """
  if len(labels) > most_images:
    raise ValueError(f"{len(labels)} images, and most_images={most_images}")
  on = _grid(np.shape(probabilities)[1], num_bins, most_images, stddev)
  whole = int(on.steps)
  found = metrics.shared_counts(labels, probabilities, groups, num_bins, whole)
  counts = {name: a.astype(np.int32) for name, a in zip(("confusion", "table"), found, strict=True)}
  sent = grid.noised(counts, on, subkeys.of_counts(secret), 0)
  return {name: np.asarray(a, np.float64).astype(np.float32) / whole for name, a in sent.items()}


def _grid(num_classes: int, num_bins: int, most_images: int, stddev: float) -> grid.Grid:
  """The finest grid of these counts; a number of a patient has at most `steps` of it."""
  numbers = num_classes**2 * (1 + num_bins)
  try:
    return grid.choose(numbers, stddev, most_images)
  except ValueError as error:
    raise ValueError(
      f"noise of standard deviation {stddev:g} in {numbers} counts of up to {most_images} images: "
      "32 bits cannot hold them; lower most_images, the number of bins or the noise"
    ) from error
