"""Metrics of probabilities: ROC curves and their areas, calibration, and proper scores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from primia_jax.metrics.counts import ArrayLike, check_classes, ratio

_SUM_TOLERANCE = 2**-8  # a bfloat16 softmax sums to 1 only this closely


class RocCurve(NamedTuple):
  """Points of a ROC curve, each [T], from (0, 0) at the threshold infinity to (1, 1)."""

  false_positive_rate: np.ndarray
  true_positive_rate: np.ndarray
  thresholds: np.ndarray


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
  """The ROC curve of a binary score. Each distinct score gives one point, so ties make one slanted
  segment.

  Args:
    labels: [N] bool or 0/1 integers; high scores indicate class 1.
    scores: [N] finite numbers.

  Returns:
    The curve. A rate is NaN if its class has no examples.
  """
  labels, scores = check_scores(labels, scores)
  order = np.argsort(-scores, kind="stable")
  last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
  hits = np.concatenate([[0], np.cumsum(labels[order])[last]])
  false = np.concatenate([[0], last + 1]) - hits
  thresholds = np.concatenate([[np.inf], scores[order][last]])
  return RocCurve(
    ratio(false, np.float64(false[-1])), ratio(hits, np.float64(hits[-1])), thresholds
  )


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
  """The area under the ROC curve of a binary score: P(positive > negative) + P(equal) / 2.

  Args:
    labels: [N] bool or 0/1 integers.
    scores: [N] finite numbers.

  Returns:
    The area, exact also with ties; NaN if either class has no example.
  """
  labels, scores = check_scores(labels, scores)
  once = np.ones((1, len(labels)), np.int64)
  return float(_pair_auc(scores[labels], scores[~labels], once[:, labels], once[:, ~labels])[0])


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
  """The area under the steps of the precision-recall curve of a binary score: the mean precision at
  each positive example, equal scores together.

  Args:
    labels: [N] bool or 0/1 integers.
    scores: [N] finite numbers.

  Returns:
    The area; NaN without a positive example.
  """
  labels, scores = check_scores(labels, scores)
  if not labels.any():
    return float("nan")
  order = np.argsort(-scores, kind="stable")
  ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
  hits = np.cumsum(labels[order])[ends]
  precision, recall = hits / (ends + 1), hits / hits[-1]
  return float(np.sum(np.diff(recall, prepend=0.0) * precision))


def binary_calibration_error(
  labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15
) -> float:
  """The mean gap between the probability of a finding and how often it is there, over bins of equal
  width, weighted by their examples.

  Args:
    labels: [N] bool or 0/1 integers.
    probabilities: [N], in [0, 1].
    num_bins: of probabilities.
  """
  labels, p = check_scores(labels, probabilities)
  bins = np.minimum((p * num_bins).astype(np.int64), num_bins - 1)
  return float(np.abs(np.bincount(bins, p - labels, num_bins)).sum() / len(p))


def macro_roc_auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
  """The macro one-vs-one ROC-AUC: the mean area over all pairs of classes (Hand and Till 2001,
  equation 7).

  It does not depend on the frequencies of the classes. With two classes it is the binary ROC-AUC of
  the second.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.

  Returns:
    The mean area; NaN if any class has no example, because a mean over fewer classes would be a
    different quantity.
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  return float(ovo_auc(labels, probabilities, np.ones((1, len(labels)), np.int64))[0])


def expected_calibration_error(
  labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15
) -> float:
  """The mean gap between confidence and accuracy, over bins of equal width (Guo et al. 2017,
  equation 3).
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  confidence = probabilities.max(1)
  right = probabilities.argmax(1) == labels
  bins = np.minimum(np.ceil(confidence * num_bins).astype(int) - 1, num_bins - 1)
  gaps = np.bincount(bins, right - confidence, num_bins)
  return float(np.abs(gaps).sum() / len(labels))


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
  """The mean over examples of the squared distance between probabilities and truth, from 0 to 2
  (Brier 1950, equation 2).
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  return float(np.mean(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1)))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
  """The mean of -log(probability of the true class), in nats; infinite if any of them is 0."""
  labels, probabilities = check_probabilities(labels, probabilities)
  with np.errstate(divide="ignore"):
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def check_probabilities(
  labels: ArrayLike, probabilities: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Checks labels [N] and probabilities [N, L] and returns them as NumPy int64 and float64.

  Raises:
    ValueError: an argument is wrong. The message names the first wrong row and the cure.
  """
  labels, p = np.asarray(labels), np.asarray(probabilities).astype(np.float64)
  if labels.ndim != 1 or p.ndim != 2 or len(labels) != len(p) or not len(p) or p.shape[1] < 2:
    raise ValueError(
      f"need labels [N] and probabilities [N, L] with N >= 1, L >= 2; got {labels.shape}, {p.shape}"
    )
  check_classes("labels", labels, p.shape[1])
  for wrong, what in (
    (~np.isfinite(p).all(1), "not finite: did the training diverge?"),
    ((p < 0).any(1), "negative: pass softmax(logits), not logits"),
    (abs(p.sum(1) - 1) > _SUM_TOLERANCE, "do not sum to 1: pass softmax(logits), not logits"),
  ):
    if wrong.any():
      row = int(wrong.argmax())
      raise ValueError(f"probabilities of example {row}, {p[row].tolist()}, {what}")
  return labels.astype(np.int64), p


def check_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  labels, scores = np.asarray(labels), np.asarray(scores).astype(np.float64)
  if labels.ndim != 1 or labels.shape != scores.shape or not len(labels):
    raise ValueError(
      f"need labels [N] and scores [N] with N >= 1; got {labels.shape}, {scores.shape}"
    )
  if not np.isfinite(scores).all():
    raise ValueError(f"score {int((~np.isfinite(scores)).argmax())} is not finite")
  check_classes("labels", labels.astype(np.int64) if labels.dtype == bool else labels, 2)
  return labels.astype(bool), scores


def pair_wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
  """[P] the share of `others` [Q] that each score [P] is above, where equal ones count half."""
  ordered = np.sort(others)
  less, at_most = (np.searchsorted(ordered, scores, side) for side in ("left", "right"))
  return (less + at_most) / (2 * len(ordered))


def _pair_auc(
  positive: np.ndarray, negative: np.ndarray, times: np.ndarray, negative_times: np.ndarray
) -> np.ndarray:
  """[R] areas for scores [P] and [Q] that occur `times` [R, P] and `negative_times` [R, Q] times.
  Takes O(R (P + Q)).
  """
  order = np.argsort(negative)
  below = np.cumsum(np.pad(negative_times[:, order], ((0, 0), (1, 0))), axis=1)  # [R, Q + 1]
  less, at_most = (np.searchsorted(negative[order], positive, side) for side in ("left", "right"))
  twice_wins = (times * (below[:, less] + below[:, at_most])).sum(1)
  return ratio(twice_wins, 2.0 * times.sum(1) * negative_times.sum(1))


def ovo_auc(labels: np.ndarray, probabilities: np.ndarray, times: np.ndarray) -> np.ndarray:
  """[R] macro one-vs-one areas when example n occurs `times[r, n]` times."""
  num_classes = probabilities.shape[1]
  members = [np.flatnonzero(labels == k) for k in range(num_classes)]
  drawn = [times[:, m] for m in members]
  # A(i|j) of the paper: how well p_i separates i from j. With two classes p_0 is p_1 again, but
  # rounded.
  pairs = (
    [(1, 0)]
    if num_classes == 2
    else [(i, j) for i in range(num_classes) for j in range(num_classes) if i != j]
  )
  areas = (
    _pair_auc(probabilities[members[i], i], probabilities[members[j], i], drawn[i], drawn[j])
    for i, j in pairs
  )
  return sum(areas, np.zeros(len(times))) / len(pairs)
