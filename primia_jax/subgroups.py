"""How well a classifier does in each subgroup of the images, and how far subgroups are apart.

A subgroup is the images with one value of a column, such as one sex, one site, or ages between two
edges. Its scores have percentile bootstrap intervals. A gap is the largest score of a subgroup
minus the smallest. Its interval holds for all pairs of subgroups at once (Tukey's range,
bootstrapped): to both sides it reaches as far as, in 95 % of the resamples, the largest error of
any subgroup's score lies above the smallest, but not beyond what a difference can be. So it holds 0
where subgroups may well be alike, however many are compared; the interval of a pair that was named
beforehand would be narrower.

Who learns what: with a floor of patients, whoever reads the table and knows the totals of all
images learns no count of fewer patients. Two columns of which one refines the other, such as a
hospital and its wards, may still tell one by their difference; a floor is no differential privacy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import metrics
from primia_jax.disclosure import Policy, Suppressed
from primia_jax.metrics import Interval, intervals
from primia_jax.types import Key

MOST = 20  # subgroups of a column
NOT_GIVEN = "not given"  # the name of the subgroup of images without a value
OUTSIDE = "outside of the bins"  # and of that of images with a number that is in no bin
_ALL = Policy(fewest_patients=0)


class Members(NamedTuple):
  """Which subgroup each image is in.

  Attributes:
    names: of G subgroups that have images, those without a value last.
    of: [N] integers in 0..G-1.
  """

  names: tuple[str, ...]
  of: np.ndarray


class Gap(NamedTuple):
  """A score of the best subgroup minus that of the worst, and the interval of all differences."""

  value: float
  low: float
  high: float
  best: str
  worst: str


class Row(NamedTuple):
  """A subgroup, how many images it has, and its scores. MCC is NaN where all are of one class."""

  name: str
  images: int | Suppressed
  accuracy: Interval | Suppressed
  mcc: Interval | Suppressed


class Table(NamedTuple):
  """The scores of all subgroups.

  Attributes:
    rows: the subgroups.
    accuracy, mcc: their gaps, over subgroups with a value whose score is shown and defined; None
      where fewer than two are.
  """

  rows: tuple[Row, ...]
  accuracy: Gap | None
  mcc: Gap | None


def members(column: str, values: Any, edges: Sequence[float] = ()) -> Members:
  """Divides images by the values of a column.

  Args:
    column: its name, for messages.
    values: [N] texts, integers or floats. An empty text, `not given` and NaN are no
      value.
    edges: of bins of numbers, rising; a bin holds its lower edge and not its upper one. Without
      any, each value is a subgroup.

  Raises:
    ValueError: the values are not of that form, none is given, or there are more than `MOST`.
  """
  values = np.asarray(values)
  if values.ndim != 1:
    raise ValueError(f"column {column} holds {values.shape[1:]} values an image; take another")
  texts = [_text(value) for value in values.tolist()]
  given = list(dict.fromkeys(text for text in texts if text))
  if not given:
    raise ValueError(f"column {column} has no value for any test image; take another")
  if edges:
    texts = [_bin(column, text, edges) for text in texts]
    bins = [_bin_name(low, high) for low, high in itertools.pairwise(edges)]
    order = [name for name in (*bins, OUTSIDE) if name in set(texts)]
  elif len(given) > MOST:
    cure = (
      f"give edges of bins, such as {column}:0:18:65:200"
      if all(map(_is_number, given))
      else "take a column with fewer"
    )
    raise ValueError(f"column {column} has {len(given)} values, more than {MOST}; {cure}")
  else:
    order = sorted(given, key=float if all(map(_is_number, given)) else None)  # type: ignore[arg-type]
  names = (*order, NOT_GIVEN) if "" in texts else tuple(order)
  number = {name: i for i, name in enumerate(names)} | {"": len(names) - 1}
  return Members(names, np.array([number[text] for text in texts]))


def table(
  labels: Any,
  probabilities: Any,
  of: Members,
  key: Key,
  *,
  groups: Any = None,
  patients: Any = None,
  policy: Policy = _ALL,
  num_resamples: int = 2000,
  level: float = 0.95,
) -> Table:
  """Scores of each subgroup, and the gaps between them.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L], rows that sum to 1; the most probable class is the prediction.
    of: the subgroups.
    key: decides the resamples.
    groups: [N] the patient of each image; if given, patients of a subgroup are drawn instead of its
      images.
    patients: [N] the same for the floor; None counts images.
    policy: its floor of patients. A subgroup below it has neither a count nor scores, nor have
      scores that tell how many are right and wrong, or (MCC) a cell of the confusion matrix; where
      the total of all images would tell what is hidden, the next larger number is hidden as well.
    num_resamples, level: of the intervals.

  Raises:
    ValueError: shapes or values are wrong.
  """
  labels, probabilities = metrics.check_probabilities(labels, probabilities)
  said, num_classes = probabilities.argmax(1), probabilities.shape[1]
  if of.of.shape != labels.shape:
    raise ValueError(f"{len(of.of)} images are in subgroups, and there are {len(labels)} labels")
  shown = _shown(labels, said, num_classes, of, patients, policy)
  hidden = policy.count(0)
  rows, drawn = [], []
  for k, name in enumerate(of.names):
    chosen = np.flatnonzero(of.of == k)
    y, p = labels[chosen], said[chosen]
    own = None if groups is None else np.asarray(groups)[chosen]
    own_key = jax.random.fold_in(key, k)
    parts = [
      _scores(intervals.matrices(y, p, num_classes, times))
      for times in intervals.draws(len(y), num_classes, own_key, own, num_resamples)
    ]
    samples = np.concatenate(parts, axis=1)  # [2, R]
    values = _scores(intervals.matrices(y, p, num_classes, np.ones((1, len(y)), np.int64)))[:, 0]
    found = [
      metrics.percentile_interval(value, sample, level)
      for value, sample in zip(values, samples, strict=True)
    ]
    told: list[Any] = [x if s else hidden for x, s in zip((len(y), *found), shown[k], strict=True)]
    rows.append(Row(name, *told))
    drawn.append(samples)
  gaps = [
    _gap(of.names, [row[2 + i] for row in rows], [one[i] for one in drawn], level, most)
    for i, most in enumerate((1.0, 2.0))
  ]
  return Table(tuple(rows), *gaps)


def class_gap(
  labels: Any, probabilities: Any, label_names: Sequence[str], key: Key, **options: Any
) -> Gap | None:
  """The largest sensitivity of a class minus the smallest: the accuracy of images by their true
  class. Classes without images are left out. Options are those of `table`.
  """
  labels = np.asarray(labels)
  there, of = np.unique(labels, return_inverse=True)
  named = Members(tuple(label_names[i] for i in there), of)
  return table(labels, probabilities, named, key, **options).accuracy


def _scores(matrices: np.ndarray) -> np.ndarray:
  """[2, R] accuracy and MCC, which is NaN where all images are of one class."""
  of_one = (matrices.sum(-1) > 0).sum(-1) < 2
  return np.stack([metrics.accuracy(matrices), np.where(of_one, np.nan, metrics.mcc(matrices))])


def _gap(
  names: Sequence[str],
  scores: Sequence[Any],
  drawn: Sequence[np.ndarray],
  level: float,
  most: float,
) -> Gap | None:
  """The gap of a score of which two differ by `most` at most."""
  known = [
    i
    for i, one in enumerate(scores)
    if isinstance(one, Interval) and names[i] not in (NOT_GIVEN, OUTSIDE) and one.value == one.value
  ]
  if len(known) < 2:
    return None
  best, worst = (end(known, key=lambda i: scores[i].value) for end in (max, min))
  gap = scores[best].value - scores[worst].value
  errors = np.stack([drawn[i] - scores[i].value for i in known])
  errors = errors[:, ~np.isnan(errors).any(0)]
  reach = float(np.quantile(np.ptp(errors, axis=0), level)) if errors.size else math.nan
  low, high = max(gap - reach, -most), min(gap + reach, most)
  return Gap(gap, low, high, names[best], names[worst])


def _shown(
  labels: np.ndarray, said: np.ndarray, num_classes: int, of: Members, patients: Any, policy: Policy
) -> np.ndarray:
  """[G, 3] bool: whether each subgroup's count, accuracy and MCC are told."""
  size = len(of.names)
  if not policy.fewest_patients:
    return np.ones((size, 3), bool)
  who = np.arange(len(labels)) if patients is None else np.unique(patients, return_inverse=True)[1]

  def told(row: np.ndarray, column: np.ndarray, shape: tuple[int, int], known: Any) -> np.ndarray:
    """[R] whether all cells of a row are, in a table of images whose totals may be known."""
    cells = row * shape[1] + column
    count = lambda of: np.bincount(of, minlength=shape[0] * shape[1]).reshape(shape)
    of_patients = count(np.unique(np.stack([cells, who]), axis=1)[0])
    found = policy.table(count(cells), np.where(known[:, None], of_patients, 0))
    return np.array([not any(isinstance(cell, Suppressed) for cell in cells) for cells in found])

  count = told(of.of, np.zeros_like(of.of), (size, 1), np.ones(size, bool))
  every_class = np.ones(num_classes, bool)
  # Accuracies and counts of all subgroups tell how many of all images are right.
  if not told(labels, said, (num_classes, num_classes), every_class).all():
    return np.stack([count, *[np.zeros(size, bool)] * 2], axis=1)
  accuracy = told(of.of, (labels == said).astype(int), (size, 2), count)
  mcc = told(of.of, labels * num_classes + said, (size, num_classes**2), accuracy)
  return np.stack([count, accuracy, mcc], axis=1)


def _text(value: Any) -> str:
  if isinstance(value, bytes):
    value = value.decode("utf-8", "replace")
  if isinstance(value, float):
    return "" if math.isnan(value) else f"{value:g}"
  text = str(value).strip()
  return "" if text.lower() in ("nan", NOT_GIVEN) else text


def _is_number(text: str) -> bool:
  try:
    return math.isfinite(float(text))
  except ValueError:
    return False


def _bin(column: str, text: str, edges: Sequence[float]) -> str:
  if not text:
    return ""
  if not _is_number(text):
    raise ValueError(
      f"column {column} has the value {text!r}, which is not a number, so it has no bin; mend it, "
      "or leave the edges out"
    )
  k = int(np.searchsorted(edges, float(text), side="right"))
  return _bin_name(edges[k - 1], edges[k]) if 0 < k < len(edges) else OUTSIDE


def _bin_name(low: float, high: float) -> str:
  return f"{low:g} to below {high:g}"
