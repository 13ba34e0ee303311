"""Fixed statistics by which features are standardised before the last layer.

They come from other images than those of the task, public ones, so they tell nothing of any image
that is trained on, and are no part of what differential privacy charges. Like all frozen layers
they are a part of the saved model.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from primia_jax.models.config import FEATURE_NORM
from primia_jax.types import Params

FLOOR = 0.25


class FeatureStatistics(NamedTuple):
  """Of each feature over public images.

  Attributes:
    mean, std: float64 [F].
  """

  mean: np.ndarray
  std: np.ndarray


def statistics_of(features: np.ndarray) -> FeatureStatistics:
  """Mean and deviation (of all rows, not of a sample) of each column of [N, F].

  Raises:
    ValueError: fewer than two rows, or no table.
  """
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(f"features {list(features.shape)} must be [N, F] of at least two images")
  features = np.asarray(features, np.float64)
  return FeatureStatistics(features.mean(0), features.std(0))


def with_statistics(params: Params, statistics: FeatureStatistics) -> Params:
  """Parameters of a model with `features="standardised"`, whose features x become
  (x - mean) / (std + FLOOR * mean of std); the last term keeps features that hardly vary on the
  public images from drowning the others.

  Args:
    params: of the model, or their shapes.
    statistics: of the features before they are standardised, which `features="mean"` gives.

  Raises:
    ValueError: another number of features, a deviation that is negative, or all of them zero.
  """
  wanted = params[FEATURE_NORM]["scale"].shape
  mean, std = (np.asarray(v, np.float64) for v in statistics)
  if mean.shape != wanted or std.shape != wanted:
    raise ValueError(
      f"statistics of {mean.size} and {std.size} features, and the model has {wanted[0]}; take "
      "statistics of the same model, of the same width"
    )
  if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all() and std.any()):
    raise ValueError("statistics must be finite, deviations not negative and some of them positive")
  scale = 1 / (std + FLOOR * std.mean())
  layer = {
    "scale": jnp.asarray(scale, jnp.float32),
    "bias": jnp.asarray(-mean * scale, jnp.float32),
  }
  return {**params, FEATURE_NORM: layer}
