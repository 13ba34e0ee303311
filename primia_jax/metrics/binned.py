"""Metrics of a classifier from counts of scores in agreed bins, which add up over sites.

A site counts its images by true class and by the bin of each class's probability (`score_counts`);
only the sum over sites is opened (`evaluation.score_summing`). What the bins hide of a score is
bounded: pairs of images in one bin are the only ones whose order is unknown.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy

from primia_jax.metrics.counts import ArrayLike, accuracy, mcc, ratio, sensitivity, specificity
from primia_jax.metrics.curves import check_probabilities
from primia_jax.metrics.intervals import Intervals, Scores, summarised
from primia_jax.types import Key


class ScoreCounts(NamedTuple):
  """What images score: float64 counts that add up over sites, where patients of two sites count as
  different.

  Attributes:
    confusion: [L, L] images, rows true and columns predicted.
    patients: [L, L] patients who have an image in that cell.
    everyone: [] patients in all.
    squares: [3] over patients, with n images of which r are answered rightly, the sums of n^2, n r
      and r^2.
    table: [L, L, B] images by true class, class whose probability it is, and its bin.
    calibration: [3, C] images, right answers and the sum of confidences, by bin of confidence.
  """

  confusion: Any
  patients: Any
  everyone: Any
  squares: Any
  table: Any
  calibration: Any


class Bounded(NamedTuple):
  """A value that is known up to an error: the true one is at most so far from it."""

  value: float
  error: float


def score_counts(
  labels: ArrayLike,
  probabilities: ArrayLike,
  groups: Any = None,
  num_bins: int = 64,
  num_confidences: int = 15,
) -> ScoreCounts:
  """Counts images by what a model makes of them.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.
    groups: [N] the patient of each image; None counts each image as a patient.
    num_bins: B, of a probability: bin b holds [b / B, (b + 1) / B), and the last one 1, too.
    num_confidences: C, of the largest probability: bin c holds (c / C, (c + 1) / C].

  Raises:
    ValueError: fewer than two bins, or as `curves.check_probabilities`.
  """
  if min(num_bins, num_confidences) < 2:
    raise ValueError(f"num_bins={num_bins}, num_confidences={num_confidences}: give at least 2")
  labels, p = check_probabilities(labels, probabilities)
  num, size = p.shape
  said, most = p.argmax(1), p.max(1)
  bins = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
  table = np.zeros((size, size, num_bins))
  np.add.at(table, (labels[:, None], np.arange(size)[None], bins), 1.0)
  place = np.minimum(np.ceil(most * num_confidences).astype(np.int64) - 1, num_confidences - 1)
  columns = np.ones(num), (said == labels).astype(np.float64), most
  who = np.arange(num) if groups is None else np.unique(groups, return_inverse=True)[1]
  cells = labels * size + said
  of_patients = np.unique(np.stack([cells, who], 1), axis=0)[:, 0]
  of_each = np.bincount(who), np.bincount(who, columns[1])  # n and r
  pairs = ((0, 0), (0, 1), (1, 1))
  square = lambda found: np.bincount(found, minlength=size**2).reshape(size, size)
  return ScoreCounts(
    square(cells).astype(np.float64),
    square(of_patients).astype(np.float64),
    np.float64(len(of_each[0])),
    np.array([(of_each[i] * of_each[j]).sum() for i, j in pairs], np.float64),
    table,
    np.stack([np.bincount(place, column, num_confidences) for column in columns]),
  )


def binned_roc_auc(positive: Any, negative: Any) -> Bounded:
  """The area under a ROC curve, from the scores of each class in bins.

  Pairs in one bin count one half, as ties do; in truth each is 0, 1/2 or 1. So the error is at most
  sum_b p_b n_b / (2 P N), and some scores attain it.

  Args:
    positive, negative: [B] counts of either class, by rising score.

  Returns:
    The area and its bound; NaN if either class has no example.
  """
  p, n = (np.asarray(a, np.float64) for a in (positive, negative))
  pairs = p.sum() * n.sum()
  below = np.cumsum(n) - n
  return Bounded(
    float(ratio((p * (below + n / 2)).sum(), pairs)), float(ratio((p * n).sum() / 2, pairs))
  )


def binned_deviation(positive: Any, negative: Any) -> float:
  """The standard deviation of `binned_roc_auc` over draws of independent images (DeLong et al.
  1988, equation 5, for scores that are the numbers of their bins).

  Args:
    positive, negative: as `binned_roc_auc`.

  Returns:
    The deviation; NaN if either class has fewer than two examples.
  """
  p, n = (np.asarray(a, np.float64) for a in (positive, negative))
  num_p, num_n = p.sum(), n.sum()
  if min(num_p, num_n) < 2:
    return math.nan
  above = (np.cumsum(n) - n / 2) / num_n  # of a positive: the share of the negatives below it
  below = 1 - (np.cumsum(p) - p / 2) / num_p  # of a negative: the share of the positives above it
  area = (p * above).sum() / num_p
  of = lambda counts, shares, num: (counts * (shares - area) ** 2).sum() / (num * (num - 1))
  return math.sqrt(of(p, above, num_p) + of(n, below, num_n))


def binned_macro_roc_auc(table: Any) -> Bounded:
  """The macro one-vs-one area of `macro_roc_auc`, from bins.

  Args:
    table: [L, L, B] images by true class, class whose probability it is, and bin.

  Returns:
    The mean area and the mean of the bounds; NaN if any class has no example.
  """
  areas = [binned_roc_auc(*pair) for pair in _pairs(table)]
  return Bounded(*(float(np.mean(column)) for column in zip(*areas, strict=True)))


def binned_roc_curve(positive: Any, negative: Any) -> tuple[np.ndarray, np.ndarray]:
  """The points of a ROC curve at the edges of the bins, from (0, 0): each [B + 1]; false and true
  positive rates, NaN if a class has no example.
  """
  rates = []
  for counts in (negative, positive):
    falling = np.asarray(counts, np.float64)[::-1]
    reached = np.concatenate([[0.0], np.cumsum(falling)])
    rates.append(ratio(reached, reached[-1]))
  return rates[0], rates[1]


def binned_calibration_error(calibration: Any) -> float:
  """The expected calibration error over the bins; exact, with as many bins as there are.

  Args:
    calibration: [3, B] images, right answers, and the sum of confidences, by bin of confidence.
  """
  images, right, confidence = np.asarray(calibration, np.float64)
  return float(ratio(np.abs(right - confidence).sum(), images.sum()))


def normal_interval(value: Bounded, deviation: float, level: float = 0.95) -> tuple[float, float]:
  """The normal interval of a score, wider by its error, and cut to [0, 1]."""
  reach = value.error + float(scipy.special.ndtri((1 + level) / 2)) * deviation
  return float(np.clip(value.value - reach, 0, 1)), float(np.clip(value.value + reach, 0, 1))


def clustered_deviation(counts: ScoreCounts) -> float:
  """The standard deviation of the accuracy over draws of independent patients, who may have several
  images: that of a ratio of sums, linearised (Cochran 1977, section 6.3).

  With one image a patient it is that of a proportion, times sqrt(P / (P - 1)) for P patients.

  Returns:
    The deviation; NaN for fewer than two patients.
  """
  cm, people = np.asarray(counts.confusion), float(counts.everyone)
  if people < 2:
    return math.nan
  share = np.trace(cm) / cm.sum()
  images, both, right = np.asarray(counts.squares, np.float64)
  scatter = right - 2 * share * both + share**2 * images  # of r - share n, whose sum is 0
  return math.sqrt(max(float(scatter), 0.0) * people / (people - 1)) / float(cm.sum())


def binned_intervals(
  counts: ScoreCounts, key: Key, *, num_resamples: int = 2000, level: float = 0.95
) -> Intervals:
  """The metrics of a report with their intervals, from counts alone.

  Those of ratios of counts are percentile bootstrap intervals: to draw images anew is to draw the
  cells of their confusion matrix. That of the area is `normal_interval`; where it is a mean over
  pairs of classes, the deviation of the mean is at most the mean of the deviations, which is taken.
  They count images as independent. Where patients have several, that of accuracy is the normal one
  of `clustered_deviation`, cut to [0, 1]; all others are then too narrow.

  Args:
    counts: of all images.
    key: decides the resamples.
    num_resamples: R.
    level: the coverage, between 0 and 1.

  Raises:
    ValueError: there are no images.
  """
  cm = np.asarray(counts.confusion, np.int64)
  if not cm.sum():
    raise ValueError("no images were counted, so that there is nothing to score")
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  drawn = rng.multinomial(cm.sum(), cm.ravel() / cm.sum(), num_resamples).reshape(-1, *cm.shape)
  area = binned_macro_roc_auc(counts.table)
  deviation = float(np.mean([binned_deviation(*pair) for pair in _pairs(counts.table)]))
  of = lambda m, areas: Scores(accuracy(m), mcc(m), areas, sensitivity(m), specificity(m))
  found = summarised(of(cm, area.value), of(drawn, np.zeros(num_resamples)), level)
  ends = {"macro_roc_auc": normal_interval(area, deviation, level)}
  if float(counts.everyone) < cm.sum():
    exact = Bounded(float(found.value.accuracy), 0.0)
    ends["accuracy"] = normal_interval(exact, clustered_deviation(counts), level)
  low, high = ({name: pair[end] for name, pair in ends.items()} for end in (0, 1))
  return found._replace(low=found.low._replace(**low), high=found.high._replace(**high))


def _pairs(table: Any) -> list[tuple[np.ndarray, np.ndarray]]:
  """The counts [B] of either class of each pair, as `macro_roc_auc` takes pairs."""
  table = np.asarray(table)
  size = len(table)
  pairs = [(1, 0)] if size == 2 else [(i, j) for i in range(size) for j in range(size) if i != j]
  return [(table[i, i], table[j, i]) for i, j in pairs]
