"""Scores in bins: the areas that they give, against those of the scores, and their bounds."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from primia_jax import metrics

BINS = 4
scores = st.lists(st.integers(0, 40).map(lambda n: n / 40), min_size=1, max_size=12)


def counts(values):
  bins = np.minimum((np.array(values) * BINS).astype(int), BINS - 1)
  return np.bincount(bins, minlength=BINS)


@given(scores, scores)
def test_the_area_of_the_scores_lies_within_the_bound(positive, negative):
  labels = np.repeat([1, 0], [len(positive), len(negative)])
  exact = metrics.roc_auc(labels, np.array(positive + negative))
  value, error = metrics.binned_roc_auc(counts(positive), counts(negative))
  assert abs(value - exact) <= error + 1e-12
  false, true = metrics.binned_roc_curve(counts(positive), counts(negative))
  assert np.trapezoid(true, false) == pytest.approx(value)
  assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)


@pytest.mark.parametrize(("positive", "negative", "exact"), [([0.9], [0.8], 1), ([0.8], [0.9], 0)])
def test_the_bound_is_attained(positive, negative, exact):
  value, error = metrics.binned_roc_auc(counts(positive), counts(negative))
  assert (value, error) == (0.5, 0.5)
  assert abs(value - exact) == error


def test_a_class_without_examples_has_no_area():
  assert np.isnan(metrics.binned_roc_auc([0, 0], [1, 2])).all()
  assert np.isnan(metrics.binned_roc_curve([0, 0], [1, 2])[1]).all()


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_macro_area_lies_within_the_mean_bound(num_classes):
  rng = np.random.default_rng(0)
  p = rng.dirichlet(np.ones(num_classes), 60)
  labels = np.arange(60) % num_classes
  bins = np.minimum((p * 64).astype(int), 63)
  table = np.zeros((num_classes, num_classes, 64), int)
  for label, row in zip(labels, bins, strict=True):
    table[label, np.arange(num_classes), row] += 1
  value, error = metrics.binned_macro_roc_auc(table)
  assert 0 < error < 0.02
  assert abs(value - metrics.macro_roc_auc(labels, p)) <= error


def scored(num, size, seed=0):
  rng = np.random.default_rng(seed)
  labels, groups = rng.integers(0, size, num), rng.integers(0, max(num // 2, 1), num)
  probabilities = rng.dirichlet(np.ones(size), num).astype(np.float32)
  return labels, probabilities, groups


@pytest.mark.parametrize("size", [2, 3])
def test_counts_are_those_of_the_images_one_by_one(size):
  labels, p, groups = scored(50, size)
  p[0], labels[0] = np.eye(size)[1], 1  # the last bin holds 1
  found = metrics.score_counts(labels, p, groups, num_bins=8, num_confidences=5)
  confusion, patients, table = np.zeros((size, size)), {}, np.zeros((size, size, 8))
  calibration = np.zeros((3, 5))
  for label, row, group in zip(labels.tolist(), p.astype(float), groups.tolist(), strict=True):
    said, most = int(np.argmax(row)), max(row)
    confusion[label, said] += 1
    patients.setdefault((label, said), set()).add(group)
    for k, value in enumerate(row):
      table[label, k, min(int(value * 8), 7)] += 1
    (place,) = [c for c in range(5) if c / 5 < most <= (c + 1) / 5]
    calibration[:, place] += 1, said == label, most
  np.testing.assert_array_equal(found.confusion, confusion)
  np.testing.assert_array_equal(found.table, table)
  np.testing.assert_array_equal(found.calibration[:2], calibration[:2])
  np.testing.assert_allclose(found.calibration[2], calibration[2], rtol=1e-12)
  for place, who in patients.items():
    assert found.patients[place] == len(who)
  assert found.patients.sum() == sum(map(len, patients.values()))
  assert found.everyone == len(set(groups.tolist()))
  alone = metrics.score_counts(labels, p)
  np.testing.assert_array_equal(alone.patients, alone.confusion)
  with pytest.raises(ValueError, match="num_bins=1"):
    metrics.score_counts(labels, p, num_bins=1)


def test_counts_of_parts_add_up_to_those_of_the_whole():
  labels, p, _ = scored(60, 3)
  parts = [metrics.score_counts(labels[i::3], p[i::3]) for i in range(3)]
  whole = metrics.score_counts(labels, p)
  for name in ("confusion", "patients", "everyone", "table"):
    np.testing.assert_array_equal(sum(getattr(one, name) for one in parts), getattr(whole, name))


def test_the_deviation_is_that_of_delong():
  """Against the covariance over pairs, image by image, of scores that are numbers of bins."""
  rng = np.random.default_rng(1)
  positive, negative = rng.integers(1, 4, 9), rng.integers(0, 3, 7)
  wins = (positive[:, None] > negative) + (positive[:, None] == negative) / 2
  want = wins.mean(1).var(ddof=1) / 9 + wins.mean(0).var(ddof=1) / 7
  of = lambda values: np.bincount(values, minlength=4)
  assert metrics.binned_deviation(of(positive), of(negative)) == pytest.approx(want**0.5)
  assert np.isnan(metrics.binned_deviation([1, 0], [2, 3]))


def test_intervals_from_counts_are_those_of_the_images():
  """The bootstrap of images, up to what draws and bins leave."""
  rng = np.random.default_rng(2)
  labels = rng.integers(0, 3, 400)
  p = rng.dirichlet(np.ones(3), 400) + 1.5 * np.eye(3)[labels] * rng.uniform(size=(400, 1))
  p /= p.sum(1, keepdims=True)
  counts, key = metrics.score_counts(labels, p), jax.random.key(0)
  found, want = metrics.binned_intervals(counts, key), metrics.bootstrap_intervals(labels, p, key)
  for name in ("accuracy", "mcc", "sensitivity", "specificity"):
    np.testing.assert_allclose(getattr(found.value, name), getattr(want.value, name), rtol=1e-9)
    for end in ("low", "high"):
      ends = (np.asarray(getattr(getattr(one, end), name)) for one in (found, want))
      np.testing.assert_allclose(*ends, atol=0.015)
  area, error = metrics.binned_macro_roc_auc(counts.table)
  assert found.value.macro_roc_auc == area
  assert found.low.macro_roc_auc <= want.low.macro_roc_auc + 0.003  # it is at least as wide
  assert found.high.macro_roc_auc >= want.high.macro_roc_auc - 0.003
  width = float(found.high.macro_roc_auc - found.low.macro_roc_auc)
  assert 2 * error < width < 2 * float(want.high.macro_roc_auc - want.low.macro_roc_auc) + 2 * error
  with pytest.raises(ValueError, match="no images were counted"):
    metrics.binned_intervals(counts._replace(confusion=np.zeros((3, 3))), key)


def test_an_interval_covers_as_often_as_it_says():
  """Of a known area: 95 % of 400 draws, give or take four deviations; half as wide covers less."""
  rng = np.random.default_rng(3)
  edges = np.linspace(-4, 5, 65)
  true, hits, narrow = 0.7602499389065233, 0, 0  # Phi(1 / sqrt 2)
  for _ in range(400):
    positive = np.histogram(rng.normal(1, 1, 80), edges)[0]
    negative = np.histogram(rng.normal(0, 1, 60), edges)[0]
    area, deviation = (
      metrics.binned_roc_auc(positive, negative), metrics.binned_deviation(positive, negative)
    )  # fmt: skip
    low, high = metrics.normal_interval(area, deviation)
    hits += low <= true <= high
    low, high = metrics.normal_interval(area._replace(error=0.0), deviation / 2)
    narrow += low <= true <= high
  assert hits / 400 > 0.95 - 4 * (0.95 * 0.05 / 400) ** 0.5
  assert narrow / 400 < 0.8


def test_accuracy_by_patients_is_that_of_patients_one_by_one():
  """Patients whose images are all right or all wrong count once, and a bootstrap of patients finds
  the same interval; taken as independent, images give one that is too narrow.
  """
  rng = np.random.default_rng(4)
  groups = np.repeat(np.arange(120), rng.integers(1, 6, 120))
  labels = rng.integers(0, 2, len(groups))
  is_right = (rng.uniform(size=120) < 0.8)[groups]
  p = np.where((np.arange(2) == labels[:, None]) == is_right[:, None], 0.75, 0.25)
  counts = metrics.score_counts(labels, p, groups)
  n, r = np.bincount(groups), np.bincount(groups, is_right)
  np.testing.assert_array_equal(counts.squares, [(n * n).sum(), (n * r).sum(), (r * r).sum()])
  share = r.sum() / n.sum()
  want = np.sqrt(((r - share * n) ** 2).sum() * 120 / 119) / n.sum()
  assert metrics.clustered_deviation(counts) == pytest.approx(want)
  key = jax.random.key(0)
  found = metrics.binned_intervals(counts, key)
  drawn = metrics.bootstrap_intervals(labels, p, key, groups=groups)
  alone = metrics.bootstrap_intervals(labels, p, key)
  for end in ("low", "high"):
    assert getattr(found, end).accuracy == pytest.approx(getattr(drawn, end).accuracy, abs=0.015)
  width = lambda one: float(one.high.accuracy - one.low.accuracy)
  assert width(found) > 1.4 * width(alone)
  single = metrics.score_counts(labels, p)
  want = share * (1 - share) / len(labels) * len(labels) / (len(labels) - 1)
  assert metrics.clustered_deviation(single) ** 2 == pytest.approx(want)
  assert np.isnan(metrics.clustered_deviation(single._replace(everyone=1)))
