"""Comparisons of two classifiers on the same images, and the spread of one over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from primia_jax.metrics.counts import ArrayLike
from primia_jax.metrics.curves import check_probabilities, check_scores, pair_wins
from primia_jax.metrics.intervals import Intervals, Scores, resampled, scores, summarised
from primia_jax.types import Key


class McNemar(NamedTuple):
  """Two classifiers on the same images.

  Attributes:
    only_first, only_second: how many images one alone is right on.
    p: two-sided; how likely so unequal numbers are where both are equally often right.
  """

  only_first: int
  only_second: int
  p: float


class DeLong(NamedTuple):
  """The areas under the ROC curves of two scores of the same images.

  Attributes:
    first, second: the areas.
    difference, low, high: first minus second, and the ends of its interval.
    p: two-sided, of equal areas.
  """

  first: float
  second: float
  difference: float
  low: float
  high: float
  p: float


class Spread(NamedTuple):
  """The mean over seeds and the interval of that mean; an interval of one seed is NaN."""

  mean: float
  low: float
  high: float


def mcnemar(labels: ArrayLike, first: ArrayLike, second: ArrayLike) -> McNemar:
  """McNemar's exact test (McNemar 1947): the images on which one alone is right are coin flips.

  Args:
    labels: [N] integers, the true classes.
    first, second: [N] integers, the classes that each predicts.

  Raises:
    ValueError: shapes differ, or there is no image.
  """
  labels, first, second = np.asarray(labels), np.asarray(first), np.asarray(second)
  if labels.ndim != 1 or not labels.shape == first.shape == second.shape or not len(labels):
    raise ValueError(
      f"labels {labels.shape}, first {first.shape} and second {second.shape} must all be [N] with "
      "N >= 1; give each image's true class and both predictions"
    )
  right, other = first == labels, second == labels
  return _mcnemar(int((right & ~other).sum()), int((other & ~right).sum()))


def worst_mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
  """McNemar's exact test where only two confusion matrices are known, and not which image was
  called what: of all pairings that the matrices allow, the one with the largest p.

  Of n images of a class, of which one reader has a right and the other b, both are right on at
  least max(0, a + b - n) and at most min(a, b), and each number between is possible.

  Args:
    first, second: [L, L] integers, rows true, of the same images.

  Raises:
    ValueError: no such matrices, or they count different images.
  """
  first, second = np.asarray(first), np.asarray(second)
  for name, cm in (("first", first), ("second", second)):
    if cm.ndim != 2 or cm.shape[0] != cm.shape[1] or not np.issubdtype(cm.dtype, np.integer):
      raise ValueError(f"{name} must be an [L, L] matrix of counts, not {cm.dtype} {cm.shape}")
    if (cm < 0).any() or not cm.sum():
      raise ValueError(f"{name} must hold counts of at least one image, not {cm.tolist()}")
  if first.shape != second.shape or (first.sum(1) != second.sum(1)).any():
    raise ValueError(
      f"the matrices count {first.sum(1).tolist()} and {second.sum(1).tolist()} images of the "
      "classes; compare readers of the same images"
    )
  of_class, a, b = first.sum(1), np.diagonal(first), np.diagonal(second)
  fewest, most = int(np.maximum(a + b - of_class, 0).sum()), int(np.minimum(a, b).sum())
  pairings = [_mcnemar(int(a.sum()) - n, int(b.sum()) - n) for n in range(fewest, most + 1)]
  return max(pairings, key=lambda test: test.p)


def delong(labels: ArrayLike, first: ArrayLike, second: ArrayLike, level: float = 0.95) -> DeLong:
  """Compares two areas under ROC curves on the same images (DeLong et al. 1988, equations 4 to 8).

  Args:
    labels: [N] bool or 0/1 integers, e.g. one class against the rest; two of each at least.
    first, second: [N] scores, high where the label is 1.
    level: of the interval.

  Raises:
    ValueError: wrong shapes or values, or fewer than two images of either kind.
  """
  truth, first = check_scores(labels, first)
  _, second = check_scores(labels, second)
  if min(truth.sum(), (~truth).sum()) < 2:
    raise ValueError(
      f"{truth.sum()} of {len(truth)} labels are 1; a variance needs two of each at least"
    )
  _check_level(level)
  of_positives, of_negatives = [], []  # V10 and V01: the share of pairs that each image wins
  for one in (first, second):
    positive, negative = one[truth], one[~truth]
    of_positives.append(pair_wins(positive, negative))
    of_negatives.append(1 - pair_wins(negative, positive))
  areas = [float(v.mean()) for v in of_positives]
  gap = areas[0] - areas[1]
  parts = (np.subtract(*of_positives), np.subtract(*of_negatives))
  deviation = float(np.sqrt(sum(part.var(ddof=1) / len(part) for part in parts)))
  half = float(scipy.stats.norm.ppf((1 + level) / 2)) * deviation
  p = float(2 * scipy.stats.norm.sf(abs(gap) / deviation)) if deviation > 0 else float(gap == 0)
  return DeLong(areas[0], areas[1], gap, gap - half, gap + half, p)


def over_seeds(values: Sequence[float], level: float = 0.95) -> Spread:
  """The mean of a figure over seeds, with Student's interval of the mean.

  Args:
    values: one for each seed, at least one.
    level: of the interval.

  Raises:
    ValueError: no values, or values that are not finite.
  """
  known = np.asarray(values, np.float64)
  if known.ndim != 1 or not len(known) or not np.isfinite(known).all():
    raise ValueError(f"values must be finite numbers, one for each seed, not {[*values]}")
  _check_level(level)
  mean = float(known.mean())
  if len(known) == 1:
    return Spread(mean, float("nan"), float("nan"))
  error = float(known.std(ddof=1)) / len(known) ** 0.5
  half = float(scipy.stats.t.ppf((1 + level) / 2, len(known) - 1)) * error
  return Spread(mean, mean - half, mean + half)


def bootstrap_mean_difference(
  labels: ArrayLike,
  probabilities: Sequence[ArrayLike],
  baseline: Sequence[ArrayLike],
  key: Key,
  *,
  groups: Any = None,
  num_resamples: int = 2000,
  level: float = 0.95,
) -> Intervals:
  """Metrics of one arm minus those of another, as the mean over seeds: each resample of images
  scores all seeds of both arms, so the interval is of new images and not of new seeds.

  Takes the arguments of `bootstrap_difference`, with [N, L] probabilities of each seed.
  """
  if not len(probabilities) == len(baseline) >= 1:
    raise ValueError(
      f"{len(probabilities)} seeds of one arm and {len(baseline)} of the other: pair them"
    )
  models = []
  for one in (*probabilities, *baseline):
    truth, p = check_probabilities(labels, one)
    models.append(p)
  if len(shapes := {p.shape for p in models}) > 1:
    raise ValueError(f"probabilities differ in shape: {sorted(shapes)}")

  def minus(of_models: Sequence[Scores]) -> Scores:
    half = len(probabilities)
    mean = lambda some: [np.mean(x, axis=0) for x in zip(*some, strict=True)]
    pairs = zip(mean(of_models[:half]), mean(of_models[half:]), strict=True)
    return Scores(*(a - b for a, b in pairs))

  samples = minus(resampled(truth, tuple(models), key, groups, num_resamples))
  return summarised(minus([scores(truth, p) for p in models]), samples, level)


def predicted(labels: ArrayLike, probabilities: ArrayLike) -> np.ndarray:
  """[N] the most probable class of each image, for probabilities [N, L]."""
  return check_probabilities(labels, probabilities)[1].argmax(1)


def _mcnemar(only_first: int, only_second: int) -> McNemar:
  total = only_first + only_second
  p = float(scipy.stats.binomtest(only_first, total).pvalue) if total else 1.0
  return McNemar(only_first, only_second, p)


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}")
