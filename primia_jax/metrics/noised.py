"""Metrics of a classifier from counts of scores that carry noise, with intervals that know of it.

A site's patient counts 1 in all, shared among the patient's images (`shared_counts`); the site adds
Gaussian noise to each count (`score_noise`), and only the sum over sites is opened. Counts may
then be negative, and nothing is rounded up to 0: a ratio of sums stays nearly unbiased. The
variance of a score is that of a function of the counts, linearised: with its gradient g over counts
c with noise of variance v, sampling adds sum g^2 c, since independent patients make counts of
Poisson variance and the scores do not depend on the counts' scale, and the noise adds v sum g^2.
Where patients have several images, the first is an upper bound: squares are convex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy

from primia_jax.metrics.binned import Bounded, binned_roc_auc, normal_interval
from primia_jax.metrics.counts import ArrayLike, accuracy, mcc, sensitivity, specificity
from primia_jax.metrics.curves import check_probabilities
from primia_jax.metrics.intervals import Intervals, Scores

_STEP = 1e-4  # of the total: by which a count is moved for a derivative


class NoisedCounts(NamedTuple):
  """Counts of scores, float64, of all sites together.

  Attributes:
    confusion: [L, L] patients, rows true and columns predicted.
    table: [L, L, B] patients by true class, class whose probability it is, and its bin.
    variance: of the noise in each of these numbers.
  """

  confusion: Any
  table: Any
  variance: float


def shared_counts(
  labels: ArrayLike, probabilities: ArrayLike, groups: Any, num_bins: int, whole: int
) -> tuple[np.ndarray, np.ndarray]:
  """Counts images by what a model makes of them, so that a patient's images count at most `whole`
  together: each of n counts whole // n.

  One patient changes (confusion, table) by at most whole * sqrt(1 + L) in L2 norm: each image has
  its count in one cell of the first and in L of the second, and the norm of a sum over images is at
  most the sum of their norms.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.
    groups: [N] the patient of each image.
    num_bins: B, as `score_counts`.
    whole: what a patient counts, an integer.

  Returns:
    (confusion [L, L], table [L, L, B]), int64.

  Raises:
    ValueError: as `curves.check_probabilities`.
  """
  labels, p = check_probabilities(labels, probabilities)
  size = p.shape[1]
  who = np.unique(groups, return_inverse=True)[1]
  shares = whole // np.bincount(who)[who]
  bins = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
  confusion = np.zeros((size, size), np.int64)
  table = np.zeros((size, size, num_bins), np.int64)
  np.add.at(confusion, (labels, p.argmax(1)), shares)
  np.add.at(table, (labels[:, None], np.arange(size)[None], bins), shares[:, None])
  return confusion, table


def noised_intervals(counts: NoisedCounts, level: float = 0.95) -> Intervals:
  """The metrics of a report with normal intervals, of sampling and noise together, cut to the
  range of each score; NaN where noise leaves a score undefined.

  That of the area is wider by the bound of its bins, as far as noised counts tell it. Where the
  area is a mean over pairs of classes, its deviation is taken to be the mean of theirs, which is at
  least its own.
  """
  cm = np.asarray(counts.confusion, np.float64)
  size, reach = range(len(cm)), float(scipy.special.ndtri((1 + level) / 2))
  pairs = [(1, 0)] if len(cm) == 2 else [(i, j) for i in size for j in size if i != j]
  areas = [noised_area(counts, i, [j]) for i, j in pairs]
  area = Bounded(*(float(np.mean(part)) for part in zip(*(a for a, _ in areas), strict=True)))
  of_area = area.value, *normal_interval(area, float(np.mean([d for _, d in areas])), level)
  ends: dict[str, Sequence[Any]] = {"macro_roc_auc": [np.clip(x, 0, 1) for x in of_area]}
  for name, fn in (("accuracy", accuracy), ("mcc", _mcc),
                   ("sensitivity", sensitivity), ("specificity", specificity)):  # fmt: skip
    value, deviation = np.asarray(fn(cm)), _deviation(fn, cm, counts.variance)
    least = -1.0 if name == "mcc" else 0.0
    ends[name] = [np.clip(value + times * deviation, least, 1) for times in (0, -reach, reach)]
  of_end = lambda end: Scores(**{name: of[end] for name, of in ends.items()})
  unknown = Scores(*(np.zeros_like(part) for part in of_end(0)))
  return Intervals(of_end(0), of_end(1), of_end(2), unknown)


def noised_area(counts: NoisedCounts, k: int, others: Sequence[int]) -> tuple[Bounded, float]:
  """The area under the ROC curve of class k against others, and its standard deviation.

  The gradient of the area at a positive is the share of the negatives below it, less the area, over
  the number of positives; at a negative the share of the positives above it likewise (DeLong et al.
  1988, equation 5, without noise).

  Returns:
    (`binned_roc_auc` of the noised counts, whose error is an estimate of the bound; the deviation).
    All are NaN where noise leaves one side without a positive total.
  """
  table = np.asarray(counts.table, np.float64)
  p, n = table[k, k], table[list(others), k].sum(0)
  total_p, total_n = p.sum(), n.sum()
  if min(total_p, total_n) <= 0:
    return Bounded(math.nan, math.nan), math.nan
  area = binned_roc_auc(p, n)
  of_p = ((np.cumsum(n) - n / 2) / total_n - area.value) / total_p
  of_n = (1 - (np.cumsum(p) - p / 2) / total_p - area.value) / total_n
  sampled = max(0.0, float((of_p**2 * p).sum() + (of_n**2 * n).sum()))
  noise = counts.variance * float((of_p**2).sum() + len(others) * (of_n**2).sum())
  return Bounded(area.value, max(area.error, 0.0)), math.sqrt(sampled + noise)


def _mcc(cm: np.ndarray) -> Any:
  """MCC; NaN where noise has left a class without a positive total of examples or predictions."""
  return mcc(cm) if min(cm.sum(0).min(), cm.sum(1).min()) > 0 else np.float64(math.nan)


def _deviation(fn: Callable[[np.ndarray], Any], cm: np.ndarray, variance: float) -> np.ndarray:
  """The standard deviation of a function of a confusion matrix; see the module's text."""
  step = _STEP * max(float(cm.sum()), 1.0)
  sampled = noise = np.zeros(np.shape(fn(cm)))
  for cell in np.ndindex(cm.shape):
    moved = np.zeros_like(cm)
    moved[cell] = step
    slope = (np.asarray(fn(cm + moved)) - np.asarray(fn(cm - moved))) / (2 * step)
    sampled, noise = sampled + slope**2 * cm[cell], noise + slope**2 * variance
  return np.sqrt(np.maximum(sampled, 0) + noise)
