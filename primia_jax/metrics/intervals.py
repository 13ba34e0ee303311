"""Confidence intervals: bootstrap intervals of all metrics, and exact ones of a proportion."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy

from primia_jax.metrics.counts import ArrayLike, accuracy, mcc, sensitivity, specificity
from primia_jax.metrics.curves import check_probabilities, ovo_auc
from primia_jax.types import Key


class Scores(NamedTuple):
  """The metrics of a report, each possibly with leading axes. The prediction is the most probable
  class.
  """

  accuracy: Any  # [...]
  mcc: Any  # [...]
  macro_roc_auc: Any  # [...] one-vs-one
  sensitivity: Any  # [..., L]
  specificity: Any  # [..., L]


class Interval(NamedTuple):
  """A figure and its percentile bootstrap interval, whose ends are NaN where it has none."""

  value: float
  low: float
  high: float


class Intervals(NamedTuple):
  """Metrics with their percentile bootstrap intervals.

  Attributes:
    value: the metrics of the examples themselves.
    low, high: the ends of the interval.
    undefined: in how many resamples a metric was undefined (a class was never drawn). The interval
      is over the other resamples, and NaN if there are none.
  """

  value: Scores
  low: Scores
  high: Scores
  undefined: Scores


def scores(labels: ArrayLike, probabilities: ArrayLike) -> Scores:
  """Computes all metrics of a report, for labels [N] and probabilities [N, L]."""
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
  """Percentile bootstrap intervals of all metrics, from the same resamples (Efron and Tibshirani
  1993, section 13.3).

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1.
    key: decides the resamples. The same key and groups give the same resamples.
    groups: [N] the patient of each example. If given, patients are drawn instead of examples:
      images of one patient are not independent, and intervals that treat them so are too narrow.
    num_resamples: R.
    level: the coverage, between 0 and 1.

  Returns:
    The metrics and their intervals.
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  samples = resampled(labels, (probabilities,), key, groups, num_resamples)[0]
  return summarised(scores(labels, probabilities), samples, level)


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
  """Metrics of `probabilities` minus those of `baseline`, with paired intervals: each resample
  scores both.

  Takes the arguments of `bootstrap_intervals` and `baseline` [N, L], another model's probabilities
  for the same examples.
  """
  labels, probabilities = check_probabilities(labels, probabilities)
  _, baseline = check_probabilities(labels, baseline)
  if baseline.shape != probabilities.shape:
    raise ValueError(
      f"probabilities {probabilities.shape} and baseline {baseline.shape} differ in shape"
    )
  minus = lambda a, b: Scores(*(x - y for x, y in zip(a, b, strict=True)))
  samples = minus(*resampled(labels, (probabilities, baseline), key, groups, num_resamples))
  return summarised(minus(scores(labels, probabilities), scores(labels, baseline)), samples, level)


def resamples(num_units: int, seed: int, num_resamples: int) -> np.ndarray:
  """[R, U] units drawn with replacement; the same seed draws the same, which pairs models."""
  return np.random.default_rng(seed).integers(0, num_units, (num_resamples, num_units))


def percentile_interval(value: float, drawn: np.ndarray, level: float = 0.95) -> Interval:
  """A figure with its interval from the same figure of [R] resamples; NaN there is left out."""
  low, high, _ = _ends(drawn, level)
  return Interval(float(value), float(low), float(high))


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
  """The exact interval of a proportion (Clopper and Pearson 1934). It has a width even if all
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


def matrices(
  labels: np.ndarray, predictions: np.ndarray, num_classes: int, times: np.ndarray
) -> np.ndarray:
  """[R, L, L] the confusion matrix of each of R resamples, of labels and predictions [N].

  Args:
    times: [R, N] how often each resample has each example.
  """
  cells = labels * num_classes + predictions
  order = np.argsort(cells, kind="stable")
  present, starts = np.unique(cells[order], return_index=True)
  cm = np.zeros((len(times), num_classes**2), np.int64)
  cm[:, present] = np.add.reduceat(times[:, order], starts, axis=1)
  return cm.reshape(-1, num_classes, num_classes)


def draws(
  num_examples: int, num_classes: int, key: Key, groups: Any, num_resamples: int
) -> Iterator[np.ndarray]:
  """How often each resample has each example, [r, N] at a time, R in all; chunks bound the memory.
  Groups are drawn where they are given, and the same key and groups give the same draws.
  """
  if num_resamples < 1:
    raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
  groups = np.arange(num_examples) if groups is None else np.asarray(groups)
  if groups.shape != (num_examples,):
    raise ValueError(f"groups {groups.shape} and labels {(num_examples,)} differ in shape")
  names, member = np.unique(groups, return_inverse=True)
  rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
  chunk = max(1, 2**22 // max(num_examples, num_classes**2))
  for start in range(0, num_resamples, chunk):
    rows = min(chunk, num_resamples - start)
    drawn = (
      rng.integers(len(names), size=(rows, len(names))) + len(names) * np.arange(rows)[:, None]
    )
    yield np.bincount(drawn.ravel(), minlength=rows * len(names)).reshape(rows, -1)[:, member]


def _scores(labels: np.ndarray, probabilities: np.ndarray, times: np.ndarray) -> Scores:
  cm = matrices(labels, probabilities.argmax(1), probabilities.shape[1], times)
  return Scores(
    accuracy(cm), mcc(cm), ovo_auc(labels, probabilities, times), sensitivity(cm), specificity(cm)
  )


def resampled(
  labels: np.ndarray, models: tuple, key: Key, groups: Any, num_resamples: int
) -> list[Scores]:
  """[R] scores of each model's probabilities on the same resamples."""
  parts: list[list[Scores]] = [[] for _ in models]
  for times in draws(len(labels), models[0].shape[1], key, groups, num_resamples):
    for part, probabilities in zip(parts, models, strict=True):
      part.append(_scores(labels, probabilities, times))
  return [Scores(*(np.concatenate(x) for x in zip(*part, strict=True))) for part in parts]


def summarised(value: Scores, samples: Scores, level: float) -> Intervals:
  """The percentile intervals of metrics, from the same metrics of [R] resamples."""
  if not 0 < level < 1:
    raise ValueError(f"level must lie between 0 and 1, got {level}")
  ends = [np.apply_along_axis(_ends, 0, x, level) for x in samples]
  low, high, undefined = zip(*ends, strict=True)
  return Intervals(value, Scores(*low), Scores(*high), Scores(*(x.astype(int) for x in undefined)))


def _ends(drawn: np.ndarray, level: float) -> np.ndarray:
  """[R] -> the interval's ends, and how many are NaN and left out."""
  known = drawn[~np.isnan(drawn)]
  quantiles = np.quantile(known, [(1 - level) / 2, (1 + level) / 2]) if len(known) else [np.nan] * 2
  return np.array([*quantiles, len(drawn) - len(known)])
