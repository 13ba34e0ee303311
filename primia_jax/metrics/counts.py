"""Metrics of counts: the confusion matrix and its ratios, and the overlap of masks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.types import Array

ArrayLike = Array | np.ndarray


def confusion_matrix(
  labels: ArrayLike, predictions: ArrayLike, num_classes: int, weights: Any = None
) -> Array:
  """Counts examples by true and predicted class.

  Args:
    labels: [...] integers, the true classes.
    predictions: [...] integers, the predicted classes.
    num_classes: L.
    weights: [...] integers, how often each example counts; 0 marks padding. Default: all 1.

  Returns:
    [L, L] int32: rows true, columns predicted.

  Raises:
    ValueError: shapes differ. Outside `jit` also: a class is outside 0..L-1 or a weight is
      fractional. Inside `jit` values cannot be checked; an example with a class outside 0..L-1 is
      then not counted.
  """
  weights = np.ones(labels.shape, np.int32) if weights is None else weights
  if not labels.shape == predictions.shape == weights.shape:
    raise ValueError(
      f"labels {labels.shape}, predictions {predictions.shape} and weights {weights.shape} differ "
      "in shape; give one prediction and one weight for each label"
    )
  if not any(isinstance(x, jax.core.Tracer) for x in (labels, predictions, weights)):
    counted = np.asarray(weights) != 0
    if (np.asarray(weights) % 1 != 0).any():
      raise ValueError("weights must be whole numbers: a confusion matrix counts examples")
    for name, classes in (("labels", labels), ("predictions", predictions)):
      check_classes(name, np.asarray(classes)[counted], num_classes)
  rows, columns = jnp.ravel(jnp.asarray(labels)), jnp.ravel(jnp.asarray(predictions))
  valid = (rows >= 0) & (rows < num_classes) & (columns >= 0) & (columns < num_classes)
  counts = jnp.where(valid, jnp.ravel(jnp.asarray(weights)).astype(jnp.int32), 0)
  zeros = jnp.zeros((num_classes, num_classes), jnp.int32)
  return zeros.at[jnp.where(valid, rows, 0), jnp.where(valid, columns, 0)].add(counts)


class _Counts(NamedTuple):
  """Each class against the rest, [..., L] floats."""

  tp: Any
  fn: Any
  fp: Any
  tn: Any


def _counts(cm: ArrayLike) -> _Counts:
  if cm.ndim < 2 or cm.shape[-1] != cm.shape[-2]:
    raise ValueError(f"a confusion matrix must be [..., L, L], not {cm.shape}")
  xp, dtype = (jnp, jnp.float32) if isinstance(cm, jax.Array) else (np, np.float64)
  tp = xp.diagonal(cm, axis1=-2, axis2=-1)
  fn, fp = cm.sum(-1) - tp, cm.sum(-2) - tp
  # In integers, so that large counts leave no rounding errors.
  tn = cm.sum((-2, -1))[..., None] - tp - fn - fp
  return _Counts(*(x.astype(dtype) for x in (tp, fn, fp, tn)))


def ratio(numerator: Any, denominator: Any, otherwise: float = float("nan")) -> Any:
  xp = jnp if isinstance(denominator, jax.Array) else np
  defined = denominator > 0
  return xp.where(defined, numerator / xp.where(defined, denominator, 1.0), otherwise)


def accuracy(cm: ArrayLike) -> Any:
  """The share of correct predictions, [...]."""
  c = _counts(cm)
  return ratio(c.tp.sum(-1), (c.tp + c.fn).sum(-1))


def mcc(cm: ArrayLike) -> Any:
  """Multi-class Matthews correlation R_K, [...] in -1..1 (Gorodkin 2004, equation 8).

  0 where it is undefined, that is where all examples or all predictions are of one class.
  """
  c = _counts(cm)
  total = c.tp + c.fn + c.fp + c.tn
  share = lambda x: ratio(x, total, 0.0)
  # The paper's covariances and variances, summed over classes in a form where large numbers do not
  # cancel.
  covariance = (share(c.tp) * share(c.tn) - share(c.fn) * share(c.fp)).sum(-1)
  true_variance = (share(c.tp + c.fn) * share(c.fp + c.tn)).sum(-1)
  predicted_variance = (share(c.tp + c.fp) * share(c.fn + c.tn)).sum(-1)
  return ratio(covariance, (true_variance * predicted_variance) ** 0.5, 0.0)


def sensitivity(cm: ArrayLike) -> Any:
  """The share of each class's examples that are found (recall), [..., L]."""
  c = _counts(cm)
  return ratio(c.tp, c.tp + c.fn)


def specificity(cm: ArrayLike) -> Any:
  """For each class, the share of the other classes' examples not predicted as it, [..., L]."""
  c = _counts(cm)
  return ratio(c.tn, c.tn + c.fp)


def precision(cm: ArrayLike) -> Any:
  """The share of each class's predictions that are correct, [..., L]."""
  c = _counts(cm)
  return ratio(c.tp, c.tp + c.fp)


def f1(cm: ArrayLike) -> Any:
  """The harmonic mean of precision and sensitivity of each class, [..., L]."""
  c = _counts(cm)
  return ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def dice(masks: ArrayLike, predictions: ArrayLike, axes: tuple[int, ...] = (-2, -1)) -> Array:
  """The Dice coefficient 2 |A and B| / (|A| + |B|) of each pair of masks.

  Args:
    masks: [..., H, W] bool or 0/1 integers, the truth.
    predictions: [..., H, W] bool or 0/1 integers.
    axes: the axes of one mask; three for volumes.

  Returns:
    [...] float32; 1 where both masks are empty, because they agree.
  """
  both, sizes = _overlap(masks, predictions, axes)
  return ratio(2 * both, sizes, 1.0)


def iou(masks: ArrayLike, predictions: ArrayLike, axes: tuple[int, ...] = (-2, -1)) -> Array:
  """The intersection over union (Jaccard index) of each pair of masks. Takes and returns what
  `dice` does.
  """
  both, sizes = _overlap(masks, predictions, axes)
  return ratio(both, sizes - both, 1.0)


def _overlap(
  masks: ArrayLike, predictions: ArrayLike, axes: tuple[int, ...]
) -> tuple[Array, Array]:
  if masks.shape != predictions.shape:
    raise ValueError(f"masks {masks.shape} and predictions {predictions.shape} differ in shape")
  for name, x in (("masks", masks), ("predictions", predictions)):
    if not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer)):
      raise ValueError(
        f"{name} are {x.dtype}; threshold them first: a mask is bool or 0/1 integers"
      )
  a, b = jnp.asarray(masks).astype(bool), jnp.asarray(predictions).astype(bool)
  size = lambda x: x.sum(axes, dtype=jnp.int32).astype(jnp.float32)
  return size(a & b), size(a) + size(b)


def check_classes(name: str, classes: np.ndarray, num_classes: int) -> None:
  if not np.issubdtype(classes.dtype, np.integer):
    raise ValueError(f"{name} must be integers, got {classes.dtype}")
  wrong = (classes < 0) | (classes >= num_classes)
  if wrong.any():
    raise ValueError(f"{name} hold class {classes[wrong][0]}, outside 0..{num_classes - 1}")
