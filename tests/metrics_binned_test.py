"""Scores in bins: the areas that they give, against those of the scores, and their bounds."""

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
