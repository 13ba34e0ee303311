"""Scores from counts with noise: what a patient counts, and intervals that know of the noise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from primia_jax import metrics
from primia_jax.metrics import NoisedCounts

BINS, WHOLE = 4, 1000


def drawn(rng, num, size=3):
  """Labels and probabilities of images that a model tells apart, somewhat."""
  labels = rng.integers(0, size, num)
  odds = rng.gamma(1.0, 1.0, (num, size)) + 1.5 * np.eye(size)[labels]
  return labels, odds / odds.sum(1, keepdims=True)


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_one_patient_changes_the_counts_by_no_more_than_its_bound(seed, num):
  """And all of them are those of a loop over images."""
  rng = np.random.default_rng(seed)
  labels, p = drawn(rng, num)
  groups = rng.integers(0, 4, num)
  confusion, table = metrics.shared_counts(labels, p, groups, BINS, WHOLE)
  want, bins = np.zeros_like(confusion), np.zeros_like(table)
  for label, row, who in zip(labels, p, groups, strict=True):
    share = WHOLE // int((groups == who).sum())
    want[label, np.argmax(row)] += share
    for k, x in enumerate(row):
      bins[label, k, min(int(x * BINS), BINS - 1)] += share
  np.testing.assert_array_equal(confusion, want)
  np.testing.assert_array_equal(table, bins)
  others = groups != groups[0]
  if others.any():
    less = metrics.shared_counts(labels[others], p[others], groups[others], BINS, WHOLE)
    changed = sum(((a - b) ** 2).sum() for a, b in zip((confusion, table), less, strict=True))
    assert changed <= WHOLE**2 * (1 + 3)


def counted(labels, p, noise=0.0, rng=None):
  """Counts of images of one patient each, with noise of that deviation."""
  found = metrics.shared_counts(labels, p, np.arange(len(labels)), 16, 1)
  made = [a + (rng.normal(0, noise, a.shape) if noise else 0.0) for a in found]
  return NoisedCounts(*made, noise**2)


@pytest.mark.parametrize("size", [2, 3])
def test_without_noise_they_are_the_scores_in_bins(size):
  labels, p = drawn(np.random.default_rng(0), 300, size)
  counts = counted(labels, p)
  exact = metrics.score_counts(labels, p, None, 16)
  found, cm = metrics.noised_intervals(counts), exact.confusion
  share = metrics.accuracy(cm)
  assert found.value.accuracy == share
  reach = 1.959964 * math.sqrt(share * (1 - share) / 300)
  assert found.high.accuracy - share == pytest.approx(reach, rel=1e-3)
  assert found.value.mcc == pytest.approx(metrics.mcc(cm))
  np.testing.assert_allclose(found.value.sensitivity, metrics.sensitivity(cm))
  np.testing.assert_allclose(found.value.specificity, metrics.specificity(cm))
  assert found.value.macro_roc_auc == pytest.approx(metrics.binned_macro_roc_auc(exact.table).value)
  area, deviation = metrics.noised_area(counts, 1, [0])
  positive, negative = exact.table[1, 1], exact.table[0, 1]
  assert area == metrics.binned_roc_auc(positive, negative)
  assert deviation == pytest.approx(metrics.binned_deviation(positive, negative), rel=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say_and_not_where_noise_is_left_out():
  """Over draws of images and of noise, against the scores of very many images."""
  rng = np.random.default_rng(1)
  population = drawn(rng, 200_000)
  truth = metrics.noised_intervals(counted(*population)).value
  covered = {True: np.zeros(3), False: np.zeros(3)}
  draws, noise = 300, 8.0
  for _ in range(draws):
    rows = rng.integers(0, 200_000, rng.poisson(600))
    counts = counted(population[0][rows], population[1][rows], noise, rng)
    for knows in (True, False):
      found = metrics.noised_intervals(counts if knows else counts._replace(variance=0.0))
      ends = zip(truth[:3], found.low[:3], found.high[:3], strict=True)
      covered[knows] += [low <= value <= high for value, low, high in ends]
  assert (covered[True][:2] / draws > 0.95 - 4 * math.sqrt(0.05 * 0.95 / draws)).all()
  assert (covered[True] / draws > 0.9).all()  # the area's is wider, by its bins
  assert (covered[True][:2] / draws < 0.995).all()
  assert (covered[False][:2] / draws < 0.85).all()


def test_what_noise_has_left_without_a_total_is_undefined():
  counts = NoisedCounts(np.array([[50.0, 3], [4, -6]]), np.full((2, 2, 4), -1.0), 9.0)
  found = metrics.noised_intervals(counts)
  assert math.isnan(found.value.mcc)
  assert math.isnan(found.value.macro_roc_auc)
  assert np.isnan(found.value.sensitivity[1])
  assert 0 <= found.low.accuracy < found.value.accuracy < found.high.accuracy <= 1
