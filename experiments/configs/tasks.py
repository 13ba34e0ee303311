"""What differs between the tasks: images of one class, of any number, and of masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from primia_jax import evaluation, local, models, multilabel, segmentation
from primia_jax.data.dataset import Dataset
from primia_jax.types import ApplyFn, LossFn

from .model import Augment, normalise

Prepare = Callable[..., Any]


class Task(NamedTuple):
  """What a model learns.

  Attributes:
    of_pixels: a class for each pixel.
    is_multi: any number of classes for each image.
    loss: (apply, prepare, number of classes, label smoothing) -> LossFn.
    augment: settings -> the loss's `prepare`.
    errors: counts of a site's errors, as `evaluation.count_errors`.
    predictor: (apply, prepare) -> (models, images) -> probabilities [N, L], or masks [N, H, W].
  """

  of_pixels: bool
  is_multi: bool
  loss: Callable[[ApplyFn, Prepare, int, float], LossFn]
  augment: Callable[[Augment], Prepare]
  predictor: Callable[[ApplyFn], Callable[..., Any]]
  errors: Callable[..., Any] = evaluation.count_errors


def of(model_name: str, is_multi: bool = False) -> Task:
  """The task of a model, which gives images one class or any number."""
  if model_name in models.SEGMENTERS:
    loss = lambda apply, prepare, num, _: segmentation.segmentation_loss(apply, prepare, num)
    predict = lambda apply: segmentation.predictor(apply, normalise)
    return Task(True, False, loss, Augment.build_with_masks, predict)
  if is_multi:
    predict = lambda apply: multilabel.predictor(apply, normalise)
    return Task(
      False, True, multilabel.multilabel_loss, Augment.build, predict, multilabel.count_errors
    )
  return Task(
    False,
    False,
    local.classification_loss,
    Augment.build,
    lambda apply: evaluation.predictor(apply, normalise),
  )


def check(model_name: str, dataset: Dataset, is_multi: bool = False) -> None:
  """Raises ValueError if a model's task is not that of the images."""
  if is_multi != dataset.is_multi:
    raise ValueError(
      f"the model gives images {'any number of classes' if is_multi else 'one class'}, and those "
      f"of {dataset.name} have {'any number' if dataset.is_multi else 'one'}; set multi_label or "
      "label_columns in both or in neither"
    )
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
