"""How good a classifier or a segmentation is, and how sure one can be of it.

The central object is the confusion matrix: whole numbers that add up over batches and sites, so a
federation's metrics need nothing from a site but the matrix, and that leaves it only through secure
aggregation. Functions of a matrix take [..., L, L] and return JAX arrays (float32, jittable) for
JAX matrices and NumPy arrays (float64) for NumPy ones. Functions of probabilities sort, so they run
in NumPy on the host.

A ratio whose denominator is 0, such as the sensitivity to a class without examples, is NaN,
"undefined"; only `mcc` is then 0, by convention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from primia_jax.types import Array, Key

ArrayLike = Array | np.ndarray

_SUM_TOLERANCE = 2**-8  # a bfloat16 softmax sums to 1 only this closely


def confusion_matrix(
  labels: ArrayLike, predictions: ArrayLike, num_classes: int, weights: Any = None
) -> Array:
  """Counts examples by true and predicted class.

  Args:
    labels: [...] integers, the true classes.
    predictions: [...] integers, the predicted classes.
    num_classes: L.
    weights: [...] whole numbers, how often each example counts; 0 marks padding. All 1 when absent.

  Returns:
    [L, L] int32: rows true, columns predicted.

  Raises:
    ValueError: shapes that differ; outside `jit`, also a class outside 0..L-1 or a fractional
      weight. Inside `jit` values cannot be checked: there an example with a class outside 0..L-1
      counts for nothing.
  """
  weights = np.ones(labels.shape, np.int32) if weights is None else weights
  if not labels.shape == predictions.shape == weights.shape:
    raise ValueError(
      f"labels {labels.shape}, predictions {predictions.shape} and weights {weights.shape} differ "
      f"in shape"
    )
  if not any(isinstance(x, jax.core.Tracer) for x in (labels, predictions, weights)):
    counted = np.asarray(weights) != 0
    if (np.asarray(weights) % 1 != 0).any():
      raise ValueError("weights of a confusion matrix must be whole numbers: it counts examples")
    for name, classes in (("labels", labels), ("predictions", predictions)):
      _check_classes(name, np.asarray(classes)[counted], num_classes)
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
    raise ValueError(f"a confusion matrix is [..., L, L], got {cm.shape}")
  xp, dtype = (jnp, jnp.float32) if isinstance(cm, jax.Array) else (np, np.float64)
  tp = xp.diagonal(cm, axis1=-2, axis2=-1)
  fn, fp = cm.sum(-1) - tp, cm.sum(-2) - tp
  tn = (
    cm.sum((-2, -1))[..., None] - tp - fn - fp
  )  # in integers: large counts leave no rounding behind
  return _Counts(*(x.astype(dtype) for x in (tp, fn, fp, tn)))


def _ratio(numerator: Any, denominator: Any, otherwise: float = float("nan")) -> Any:
  xp = jnp if isinstance(denominator, jax.Array) else np
  defined = denominator > 0
  return xp.where(defined, numerator / xp.where(defined, denominator, 1.0), otherwise)


def accuracy(cm: ArrayLike) -> Any:
  """The share of right predictions, [...]."""
  c = _counts(cm)
  return _ratio(c.tp.sum(-1), (c.tp + c.fn).sum(-1))


def mcc(cm: ArrayLike) -> Any:
  """Multi-class Matthews correlation R_K, [...] in -1..1 (Gorodkin 2004, equation 8).

  0 when undefined, that is when all examples or all predictions are of one class.
  """
  c = _counts(cm)
  total = c.tp + c.fn + c.fp + c.tn
  share = lambda x: _ratio(x, total, 0.0)
  # The paper's covariances and variances, summed over the classes in a form in which large numbers
  # do not cancel.
  covariance = (share(c.tp) * share(c.tn) - share(c.fn) * share(c.fp)).sum(-1)
  true_variance = (share(c.tp + c.fn) * share(c.fp + c.tn)).sum(-1)
  predicted_variance = (share(c.tp + c.fp) * share(c.fn + c.tn)).sum(-1)
  return _ratio(covariance, (true_variance * predicted_variance) ** 0.5, 0.0)


def sensitivity(cm: ArrayLike) -> Any:
  """The share of each class's examples that are found (recall), [..., L]."""
  c = _counts(cm)
  return _ratio(c.tp, c.tp + c.fn)


def specificity(cm: ArrayLike) -> Any:
  """The share of the other classes' examples that are not taken for each class, [..., L]."""
  c = _counts(cm)
  return _ratio(c.tn, c.tn + c.fp)


def precision(cm: ArrayLike) -> Any:
  """The share of each class's predictions that are right, [..., L]."""
  c = _counts(cm)
  return _ratio(c.tp, c.tp + c.fp)


def f1(cm: ArrayLike) -> Any:
  """The harmonic mean of precision and sensitivity of each class, [..., L]."""
  c = _counts(cm)
  return _ratio(2 * c.tp, 2 * c.tp + c.fp + c.fn)


def dice(masks: ArrayLike, predictions: ArrayLike, axes: tuple[int, ...] = (-2, -1)) -> Array:
  """The Dice coefficient 2 |A and B| / (|A| + |B|) of each pair of masks.

  Args:
    masks: [..., H, W] bool or 0/1 integers, the truth.
    predictions: [..., H, W], the same.
    axes: the axes of one mask; three for volumes.

  Returns:
    [...] float32; 1 where both masks are empty, for they agree.
  """
  both, sizes = _overlap(masks, predictions, axes)
  return _ratio(2 * both, sizes, 1.0)


def iou(masks: ArrayLike, predictions: ArrayLike, axes: tuple[int, ...] = (-2, -1)) -> Array:
  """The intersection over union (Jaccard index) of each pair of masks; arguments and result as
  `dice`.
  """
  both, sizes = _overlap(masks, predictions, axes)
  return _ratio(both, sizes - both, 1.0)


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


class RocCurve(NamedTuple):
  """Points of a ROC curve, each [T], from (0, 0) at the threshold infinity to (1, 1)."""

  false_positive_rate: np.ndarray
  true_positive_rate: np.ndarray
  thresholds: np.ndarray


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> RocCurve:
  """The ROC curve of a binary score: one point for each distinct score, so that ties make one
  slanted segment.

  Args:
    labels: [N] bool or 0/1 integers; 1 is the class that high scores mean.
    scores: [N] finite numbers.

  Returns:
    The curve. The rate of a class without examples is NaN.
  """
  labels, scores = _check_scores(labels, scores)
  order = np.argsort(-scores, kind="stable")
  last = np.flatnonzero(np.diff(scores[order], append=-np.inf))
  hits = np.concatenate([[0], np.cumsum(labels[order])[last]])
  false = np.concatenate([[0], last + 1]) - hits
  thresholds = np.concatenate([[np.inf], scores[order][last]])
  return RocCurve(
    _ratio(false, np.float64(false[-1])), _ratio(hits, np.float64(hits[-1])), thresholds
  )


def roc_auc(labels: ArrayLike, scores: ArrayLike) -> float:
  """The area under the ROC curve of a binary score: P(positive > negative) + P(equal) / 2.

  Args:
    labels: [N] bool or 0/1 integers.
    scores: [N] finite numbers.

  Returns:
    The area, exact with ties; NaN when either class has no example.
  """
  labels, scores = _check_scores(labels, scores)
  once = np.ones((1, len(labels)), np.int64)
  return float(_pair_auc(scores[labels], scores[~labels], once[:, labels], once[:, ~labels])[0])


def macro_roc_auc(labels: ArrayLike, probabilities: ArrayLike) -> float:
  """The macro one-vs-one ROC-AUC: the mean area over all pairs of classes (Hand and Till 2001,
  equation 7).

  It does not depend on how frequent the classes are. For two classes it is the binary ROC-AUC of
  the second.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.

  Returns:
    The mean area; NaN when any class has no example, for a mean over fewer classes is another
    quantity.
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  return float(_ovo_auc(labels, probabilities, np.ones((1, len(labels)), np.int64))[0])


def expected_calibration_error(
  labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 15
) -> float:
  """The mean gap between confidence and accuracy over equal bins of confidence (Guo et al. 2017,
  equation 3).
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  confidence = probabilities.max(1)
  right = probabilities.argmax(1) == labels
  bins = np.minimum(np.ceil(confidence * num_bins).astype(int) - 1, num_bins - 1)
  gaps = np.bincount(bins, right - confidence, num_bins)
  return float(np.abs(gaps).sum() / len(labels))


def brier_score(labels: ArrayLike, probabilities: ArrayLike) -> float:
  """The mean squared distance between probabilities and truth, summed over classes: 0..2 (Brier
  1950, equation 2).
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  return float(np.mean(((probabilities - np.eye(probabilities.shape[1])[labels]) ** 2).sum(1)))


def log_loss(labels: ArrayLike, probabilities: ArrayLike) -> float:
  """The mean of -log of the true class's probability, in nats; infinite when any of them is 0."""
  labels, probabilities = check_probabilities(labels, probabilities)
  with np.errstate(divide="ignore"):
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


class Scores(NamedTuple):
  """The metrics of a report; each may have leading axes. Predictions are the most probable
  classes.
  """

  accuracy: Any  # [...]
  mcc: Any  # [...]
  macro_roc_auc: Any  # [...] one-vs-one
  sensitivity: Any  # [..., L]
  specificity: Any  # [..., L]


class Intervals(NamedTuple):
  """Metrics with their percentile bootstrap intervals.

  Attributes:
    value: on the examples themselves.
    low, high: the ends of the interval.
    undefined: the number of resamples in which a metric was undefined (a class drawn not even
      once); the interval is that of the others, and NaN when there are none.
  """

  value: Scores
  low: Scores
  high: Scores
  undefined: Scores


def scores(labels: ArrayLike, probabilities: ArrayLike) -> Scores:
  """All metrics of a report at once, for labels [N] and probabilities [N, L]."""
  labels, probabilities = check_probabilities(labels, probabilities)
  return Scores(
    *(x[0] for x in _scores(labels, probabilities, np.ones((1, len(labels)), np.int64)))
  )


def bootstrap_intervals(
  labels: ArrayLike,
  probabilities: ArrayLike,
  key: Key,
  *,
  groups: Any = None,
  num_resamples: int = 2000,
  level: float = 0.95,
) -> Intervals:
  """Percentile bootstrap intervals, all metrics from the same resamples (Efron and Tibshirani 1993,
  section 13.3).

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.
    key: decides the resamples. The same key and groups mean the same resamples.
    groups: [N] the patient of each example. Given, patients are drawn instead of examples: images
      of one patient are not independent, and intervals that think so are too narrow.
    num_resamples: R.
    level: the coverage, between 0 and 1.

  Returns:
    The metrics and their intervals.
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  samples = _bootstrap(labels, (probabilities,), key, groups, num_resamples)[0]
  return _summarise(scores(labels, probabilities), samples, level)


def bootstrap_difference(
  labels: ArrayLike,
  probabilities: ArrayLike,
  baseline: ArrayLike,
  key: Key,
  *,
  groups: Any = None,
  num_resamples: int = 2000,
  level: float = 0.95,
) -> Intervals:
  """Metrics of `probabilities` minus those of `baseline`, with paired intervals: both scored on
  each resample.

  Arguments as `bootstrap_intervals`; `baseline` is [N, L], another model's probabilities for the
  same examples.
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  _, baseline = check_probabilities(labels, baseline)
  if baseline.shape != probabilities.shape:
    raise ValueError(
      f"probabilities {probabilities.shape} and baseline {baseline.shape} differ in shape"
    )
  minus = lambda a, b: Scores(*(x - y for x, y in zip(a, b, strict=True)))
  samples = minus(*_bootstrap(labels, (probabilities, baseline), key, groups, num_resamples))
  return _summarise(minus(scores(labels, probabilities), scores(labels, baseline)), samples, level)


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
  """The exact interval of a proportion (Clopper and Pearson 1934): it has a width even where all
  trials succeed.
  """
  if not 0 <= successes <= trials or trials < 1 or not 0 < level < 1:
    raise ValueError(
      f"need 0 <= successes <= trials, trials >= 1, 0 < level < 1; got {successes}, {trials}, "
      f"{level}"
    )
  tail = (1 - level) / 2
  low = scipy.special.betaincinv(successes, trials - successes + 1, tail) if successes else 0.0
  high = (
    scipy.special.betaincinv(successes + 1, trials - successes, 1 - tail)
    if successes < trials
    else 1.0
  )
  return float(low), float(high)


def check_probabilities(
  labels: ArrayLike, probabilities: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
  """Checks labels [N] and probabilities [N, L] and returns them as NumPy int64 and float64.

  Raises:
    ValueError: naming the first row that is wrong, and the cure.
  """
  labels, p = np.asarray(labels), np.asarray(probabilities).astype(np.float64)
  if labels.ndim != 1 or p.ndim != 2 or len(labels) != len(p) or not len(p) or p.shape[1] < 2:
    raise ValueError(
      f"need labels [N] and probabilities [N, L] with N >= 1, L >= 2; got {labels.shape}, {p.shape}"
    )
  _check_classes("labels", labels, p.shape[1])
  for wrong, what in (
    (~np.isfinite(p).all(1), "not finite: did the training diverge?"),
    ((p < 0).any(1), "negative: pass softmax(logits), not logits"),
    (abs(p.sum(1) - 1) > _SUM_TOLERANCE, "do not sum to 1: pass softmax(logits), not logits"),
  ):
    if wrong.any():
      row = int(wrong.argmax())
      raise ValueError(f"probabilities of example {row}, {p[row].tolist()}, {what}")
  return labels.astype(np.int64), p


def _check_classes(name: str, classes: np.ndarray, num_classes: int) -> None:
  if not np.issubdtype(classes.dtype, np.integer):
    raise ValueError(f"{name} must be integers, got {classes.dtype}")
  wrong = (classes < 0) | (classes >= num_classes)
  if wrong.any():
    raise ValueError(f"{name} hold class {classes[wrong][0]}, outside 0..{num_classes - 1}")


def _check_scores(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
  labels, scores = np.asarray(labels), np.asarray(scores).astype(np.float64)
  if labels.ndim != 1 or labels.shape != scores.shape or not len(labels):
    raise ValueError(
      f"need labels [N] and scores [N] with N >= 1; got {labels.shape}, {scores.shape}"
    )
  if not np.isfinite(scores).all():
    raise ValueError(f"score {int((~np.isfinite(scores)).argmax())} is not finite")
  _check_classes("labels", labels.astype(np.int64) if labels.dtype == bool else labels, 2)
  return labels.astype(bool), scores


def _pair_auc(
  positive: np.ndarray, negative: np.ndarray, times: np.ndarray, negative_times: np.ndarray
) -> np.ndarray:
  """[R] areas for scores [P] and [Q] that occur `times` [R, P] and `negative_times` [R, Q]; O(R (P
  + Q)).
  """
  order = np.argsort(negative)
  below = np.cumsum(np.pad(negative_times[:, order], ((0, 0), (1, 0))), axis=1)  # [R, Q + 1]
  less, at_most = (np.searchsorted(negative[order], positive, side) for side in ("left", "right"))
  twice_wins = (times * (below[:, less] + below[:, at_most])).sum(1)
  return _ratio(twice_wins, 2.0 * times.sum(1) * negative_times.sum(1))


def _ovo_auc(labels: np.ndarray, probabilities: np.ndarray, times: np.ndarray) -> np.ndarray:
  """[R] macro one-vs-one areas when example n occurs `times[r, n]` times."""
  num_classes = probabilities.shape[1]
  members = [np.flatnonzero(labels == k) for k in range(num_classes)]
  drawn = [times[:, m] for m in members]
  # A(i|j) of the paper: how well p_i tells i from j. With two classes p_0 only repeats p_1,
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


def _scores(labels: np.ndarray, probabilities: np.ndarray, times: np.ndarray) -> Scores:
  num_classes = probabilities.shape[1]
  cells = labels * num_classes + probabilities.argmax(1)
  order = np.argsort(cells, kind="stable")
  present, starts = np.unique(cells[order], return_index=True)
  cm = np.zeros((len(times), num_classes**2), np.int64)
  cm[:, present] = np.add.reduceat(times[:, order], starts, axis=1)
  cm = cm.reshape(-1, num_classes, num_classes)
  return Scores(
    accuracy(cm), mcc(cm), _ovo_auc(labels, probabilities, times), sensitivity(cm), specificity(cm)
  )


def _bootstrap(
  labels: np.ndarray, models: tuple, key: Key, groups: Any, num_resamples: int
) -> list[Scores]:
  """[R] scores of each model's probabilities on the same resamples, in chunks that bound the
  memory.
  """
  if num_resamples < 1:
    raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
  groups = np.arange(len(labels)) if groups is None else np.asarray(groups)
  if groups.shape != labels.shape:
    raise ValueError(f"groups {groups.shape} and labels {labels.shape} differ in shape")
  names, member = np.unique(groups, return_inverse=True)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  chunk = max(1, 2**22 // max(len(labels), models[0].shape[1] ** 2))
  parts: list[list[Scores]] = [[] for _ in models]
  for start in range(0, num_resamples, chunk):
    rows = min(chunk, num_resamples - start)
    draws = (
      rng.integers(len(names), size=(rows, len(names))) + len(names) * np.arange(rows)[:, None]
    )
    times = np.bincount(draws.ravel(), minlength=rows * len(names)).reshape(rows, -1)[:, member]
    for part, probabilities in zip(parts, models, strict=True):
      part.append(_scores(labels, probabilities, times))
  return [Scores(*(np.concatenate(x) for x in zip(*part, strict=True))) for part in parts]


def _summarise(value: Scores, samples: Scores, level: float) -> Intervals:
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}")

  def ends(x: np.ndarray) -> np.ndarray:  # [R] -> [3]
    defined = x[~np.isnan(x)]
    quantiles = (
      np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]) if len(defined) else [np.nan, np.nan]
    )
    return np.array([*quantiles, len(x) - len(defined)])

  low, high, undefined = zip(*(np.apply_along_axis(ends, 0, x) for x in samples), strict=True)
  return Intervals(value, Scores(*low), Scores(*high), Scores(*(x.astype(int) for x in undefined)))
