"""Metrics of a classifier from counts of scores in agreed bins, which add up over sites.

A site counts its images by true class and by the bin of each class's probability
(`evaluation.score_counting`); only the sum over sites is opened. What the bins hide of a score is
bounded: pairs of images in one bin are the only ones whose order is unknown.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from primia_jax.metrics.counts import ratio


class Bounded(NamedTuple):
  """A value that is known up to an error: the true one is at most so far from it."""

  value: float
  error: float


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


def binned_macro_roc_auc(table: Any) -> Bounded:
  """The macro one-vs-one area of `macro_roc_auc`, from bins.

  Args:
    table: [L, L, B] images by true class, class whose probability it is, and bin.

  Returns:
    The mean area and the mean of the bounds; NaN if any class has no example.
  """
  table = np.asarray(table)
  size = len(table)
  pairs = [(1, 0)] if size == 2 else [(i, j) for i in range(size) for j in range(size) if i != j]
  areas = [binned_roc_auc(table[i, i], table[j, i]) for i, j in pairs]
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
