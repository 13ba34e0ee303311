"""Segmentation: the loss of a class for each pixel, and what comes of it.

Images are [B, H, W, C] as for classification, and labels [B, H, W] int32: `Batch.labels` and
`Site.labels` hold masks. Rounds, sums, privacy and validation are those of classification.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from primia_jax import evaluation, metrics
from primia_jax.types import ApplyFn, Array, Batch, Key, LossFn, Metrics, ModelState, Params


def segmentation_loss(
  apply_fn: ApplyFn,
  prepare: Callable[[Key, Array, Array], tuple[Array, Array]],
  num_classes: int,
  dice_weight: float = 1.0,
) -> LossFn:
  """Cross-entropy of the pixels plus the soft Dice loss of the classes, of each image alone.

  The Dice loss of an image is 1 - mean over classes 1 to L - 1 of (2 sum p t + 1) / (sum p + sum t
  + 1), with probabilities p, targets t, and sums over pixels (Milletari et al. 2016, arXiv
  1606.04797, without its squares). The 1 makes an empty mask that is found empty cost nothing. No
  image changes another's loss, so a gradient can be clipped image by image.

  Args:
    apply_fn: (params, model_state, images, train=, key=) -> (logits [B, H, W, L], new model_state).
    prepare: (key, images as stored, targets [B, H, W, L]) -> (float32 images as the model takes
      them, targets), e.g. `augment.augment_with_masks`. Targets are one-hot, or soft where a warp
      has interpolated them.
    num_classes: L, of which 0 is the background.
    dice_weight: of the Dice loss.

  Returns:
    A loss whose `Metrics.correct` is the share of right pixels, summed over images.

  Raises:
    ValueError: there are fewer than two classes, or the weight is negative.
  """
  if num_classes < 2:
    raise ValueError(f"num_classes={num_classes}; a segmentation has a background and a class")
  if not dice_weight >= 0:
    raise ValueError(f"dice_weight={dice_weight} must not be negative")

  def loss_fn(params: Params, model_state: ModelState, batch: Batch, key: Key):
    prepare_key, model_key = jax.random.split(key)
    targets = jax.nn.one_hot(batch.labels, num_classes, dtype=jnp.float32)
    images, targets = prepare(prepare_key, batch.images, targets)
    logits, model_state = apply_fn(params, model_state, images, train=True, key=model_key)
    entropy = optax.softmax_cross_entropy(logits, targets).mean((1, 2))
    overlap = 1 - soft_dice(jax.nn.softmax(logits), targets)
    loss = jnp.sum(batch.weights * (entropy + dice_weight * overlap))
    is_right = jnp.argmax(logits, axis=-1) == jnp.argmax(targets, axis=-1)
    counts = (batch.weights > 0).astype(jnp.float32)
    right = jnp.sum(counts * is_right.astype(jnp.float32).mean((1, 2)))
    found = Metrics(loss, right, jnp.sum(counts))
    return loss / jnp.maximum(found.num_examples, 1.0), (model_state, found)

  return loss_fn


def soft_dice(probabilities: Array, targets: Array) -> Array:
  """The soft Dice coefficient of each image, as in `segmentation_loss`: [..., H, W, L] -> [...]."""
  p, t = probabilities[..., 1:], targets[..., 1:]
  both, sizes = (p * t).sum((-3, -2)), (p + t).sum((-3, -2))
  return ((2 * both + 1) / (sizes + 1)).mean(-1)


def predictor(
  apply_fn: ApplyFn, prepare: Callable[[Array], Array], batch_size: int = 16
) -> Callable[[Sequence[tuple[Params, ModelState]], Any], np.ndarray]:
  """Makes (models, images [N, H, W, C]) -> masks uint8 [N, H, W], each pixel's most probable class.

  Of several models, probabilities are averaged.
  """
  masks = lambda probabilities: probabilities.argmax(-1).astype(np.uint8)
  return evaluation.predictor(apply_fn, prepare, batch_size, told=masks)


def case_dice(
  masks: np.ndarray, predictions: np.ndarray, num_classes: int, cases: Any = None
) -> np.ndarray:
  """The Dice coefficient of each case and class: [M, L - 1] float64, 1 where both are empty.

  Args:
    masks: [N, H, W] integers, the truth.
    predictions: [N, H, W] integers.
    num_classes: L; class 0, the background, is left out.
    cases: [N] the case of each image, e.g. its volume, whose slices count together; by default each
      image is a case. Cases are in sorted order.

  Raises:
    ValueError: shapes differ.
  """
  if masks.shape != predictions.shape or masks.ndim != 3:
    raise ValueError(
      f"masks {masks.shape} and predictions {predictions.shape} must be [N, H, W], and alike"
    )
  of_case = np.arange(len(masks)) if cases is None else np.unique(cases, return_inverse=True)[1]
  out = []
  for k in range(1, num_classes):
    counts = [
      np.bincount(of_case, (a).sum((1, 2)))
      for a in ((masks == k) & (predictions == k), masks == k, predictions == k)
    ]
    both, sizes = counts[0], counts[1] + counts[2]
    out.append(np.where(sizes > 0, 2 * both / np.maximum(sizes, 1), 1.0))
  return np.stack(out, axis=1)


def bootstrap_mean(
  values: np.ndarray, seed: int, num_resamples: int = 2000, level: float = 0.95
) -> metrics.Interval:
  """The mean of cases' values [M] with its percentile bootstrap interval over cases.

  The same seed resamples the same cases, so that the difference of two arms' values gives a paired
  interval.
  """
  drawn = values[metrics.resamples(len(values), seed, num_resamples)].mean(1)
  return metrics.percentile_interval(values.mean(), drawn, level)


def best_threshold(images: np.ndarray, masks: np.ndarray) -> tuple[int, bool]:
  """The threshold of grey values that finds a class best on these images, by mean Dice.

  It is what any network must beat.

  Args:
    images: uint8 [N, H, W, 1].
    masks: [N, H, W]; what is not 0 is the class.

  Returns:
    (t, whether the class is what is brighter than or equal to t; else what is darker).
  """
  scores = {}
  for t in range(0, 256, 4):
    brighter = images[..., 0] >= t
    for is_bright in (True, False):
      found = np.asarray(metrics.dice(masks > 0, brighter if is_bright else ~brighter))
      scores[t, is_bright] = float(found.mean())
  return max(scores, key=lambda choice: scores[choice])
