"""What differs between the two tasks: images that are classified, and images that are segmented."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from primia_jax import evaluation, local, models, segmentation
from primia_jax.data.dataset import Dataset
from primia_jax.types import ApplyFn, LossFn

from .model import Augment, normalise

Prepare = Callable[..., Any]


class Task(NamedTuple):
  """What a model learns.

  Attributes:
    of_pixels: a class for each pixel.
    loss: (apply, prepare, number of classes, label smoothing) -> LossFn.
    augment: settings -> the loss's `prepare`.
    predictor: (apply, prepare) -> (models, images) -> probabilities [N, L], or masks [N, H, W].
  """

  of_pixels: bool
  loss: Callable[[ApplyFn, Prepare, int, float], LossFn]
  augment: Callable[[Augment], Prepare]
  predictor: Callable[[ApplyFn], Callable[..., Any]]


def of(model_name: str) -> Task:
  """The task of a model."""
  if model_name in models.SEGMENTERS:
    loss = lambda apply, prepare, num, _: segmentation.segmentation_loss(apply, prepare, num)
    predict = lambda apply: segmentation.predictor(apply, normalise)
    return Task(True, loss, Augment.build_with_masks, predict)
  return Task(
    False,
    local.classification_loss,
    Augment.build,
    lambda apply: evaluation.predictor(apply, normalise),
  )


def check(model_name: str, dataset: Dataset) -> None:
  """Raises ValueError if a model's task is not that of the images."""
  if of(model_name).of_pixels and dataset.masks is None:
    raise ValueError(
      f"model={model_name} gives each pixel a class, and {dataset.name} has no masks; use npz:PATH "
      "with train_masks, msd:PATH, or another model"
    )
  if not of(model_name).of_pixels and dataset.masks is not None:
    raise ValueError(
      f"model={model_name} classifies images, and {dataset.name} has masks; use "
      f"--model={' or '.join(models.SEGMENTERS)}"
    )
