"""Confusion matrices, their metrics and masks, against scikit-learn and closed forms."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax import metrics

# PriMIA's radiologist on the 624 test images: normal, bacterial, viral; rows true.
RADIOLOGIST = np.array([[189, 3, 42], [67, 85, 90], [13, 11, 124]])
PER_CLASS = (metrics.sensitivity, metrics.specificity, metrics.precision, metrics.f1)
FUNCTIONS = (metrics.accuracy, metrics.mcc, *PER_CLASS)

# Few shapes, for each is compiled anew.
predictions_of_labels = st.tuples(st.integers(2, 5), st.sampled_from([1, 6, 30])).flatmap(
  lambda shape: st.tuples(
    st.just(shape[0]),
    st.lists(
      st.tuples(*[st.integers(0, shape[0] - 1)] * 2), min_size=shape[1], max_size=shape[1]
    ).map(np.array),
  )
)


# Confusion matrices.


@settings(deadline=None, max_examples=50)
@given(predictions_of_labels)
def test_confusion_matrix_and_its_metrics_equal_scikit_learn(case):
  num_classes, pairs = case
  labels, predictions = pairs.T
  classes = range(num_classes)
  cm = metrics.confusion_matrix(labels, predictions, num_classes)
  assert cm.dtype == jnp.int32
  np.testing.assert_array_equal(cm, sk.confusion_matrix(labels, predictions, labels=classes))

  cm = np.asarray(cm)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of labels that do not occur
    close(metrics.accuracy(cm), sk.accuracy_score(labels, predictions))
    close(metrics.mcc(cm), sk.matthews_corrcoef(labels, predictions))
    options = {"labels": classes, "average": None, "zero_division": np.nan}
    close(metrics.sensitivity(cm), sk.recall_score(labels, predictions, **options))
    close(metrics.precision(cm), sk.precision_score(labels, predictions, **options))
    close(metrics.f1(cm), sk.f1_score(labels, predictions, **options))
    rest = [sk.recall_score(labels != k, predictions != k, zero_division=np.nan) for k in classes]
    close(metrics.specificity(cm), rest)


def test_radiologist_of_primia():
  assert metrics.accuracy(RADIOLOGIST) == pytest.approx(398 / 624)
  assert round(100 * float(metrics.accuracy(RADIOLOGIST)), 1) == 63.8
  assert round(float(metrics.mcc(RADIOLOGIST)), 3) == 0.499
  np.testing.assert_allclose(metrics.sensitivity(RADIOLOGIST), [189 / 234, 85 / 242, 124 / 148])
  np.testing.assert_allclose(metrics.specificity(RADIOLOGIST), [310 / 390, 368 / 382, 344 / 476])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_jax_and_numpy_matrices_agree_under_jit_and_batched(function):
  cms = np.random.default_rng(0).integers(0, 50, size=(2, 3, 4, 4)).astype(np.int32)
  cms[0, 0, 1] = 0  # a class without examples
  expected = function(cms)
  assert expected.dtype == np.float64
  for f in (function, jax.jit(function)):
    got = f(jnp.asarray(cms))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)
  for i, j in np.ndindex(2, 3):
    np.testing.assert_array_equal(function(cms[i, j]), expected[i, j])


@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_mcc_of_degenerate_and_large_matrices(convert):
  mcc = lambda cm: float(metrics.mcc(convert(np.array(cm, np.int32))))
  assert mcc([[0, 7], [0, 13]]) == 0  # one class predicted
  assert mcc([[3, 4], [0, 0]]) == 0  # one class present
  assert mcc([[0, 0], [0, 0]]) == 0
  assert mcc([[9, 0, 0], [0, 2, 0], [0, 0, 4]]) == pytest.approx(1, abs=1e-6)
  assert mcc([[0, 5], [5, 0]]) == pytest.approx(-1, abs=1e-6)
  # Products of these counts overflow int32, and the small class is lost where float32 computes 1 -
  # the large one.
  tp, fn, fp, tn = 400_000_000, 1_000, 1_000, 400
  expected = (tp * tn - fn * fp) / ((tp + fn) * (tp + fp) * (tn + fn) * (tn + fp)) ** 0.5
  assert mcc([[tp, fn], [fp, tn]]) == pytest.approx(expected, rel=1e-6)


def test_mcc_does_not_depend_on_the_order_of_classes():
  for order in itertools.permutations(range(3)):
    assert metrics.mcc(RADIOLOGIST[np.ix_(order, order)]) == pytest.approx(
      metrics.mcc(RADIOLOGIST), abs=1e-14
    )
  assert metrics.mcc(RADIOLOGIST.T) == pytest.approx(metrics.mcc(RADIOLOGIST), abs=1e-14)


def test_confusion_matrices_add_up_and_padding_counts_for_nothing():
  rng = np.random.default_rng(0)
  labels, predictions = rng.integers(4, size=(2, 5, 16))
  whole = metrics.confusion_matrix(labels, predictions, 4)
  parts = [metrics.confusion_matrix(y, p, 4) for y, p in zip(labels, predictions, strict=True)]
  np.testing.assert_array_equal(sum(parts), whole)

  weights = (np.arange(80).reshape(5, 16) < 50).astype(np.float32)
  padded = np.where(weights == 0, -7, labels)  # what padding holds must not matter
  expected = sk.confusion_matrix(labels.ravel()[:50], predictions.ravel()[:50])
  for f in (metrics.confusion_matrix, jax.jit(metrics.confusion_matrix, static_argnums=2)):
    np.testing.assert_array_equal(
      f(jnp.asarray(padded), jnp.asarray(predictions), 4, weights), expected
    )


def test_inside_jit_a_class_that_is_none_counts_for_nothing():
  f = jax.jit(metrics.confusion_matrix, static_argnums=2)
  got = f(jnp.array([0, 0, 1, 3, -1]), jnp.array([0, 3, 1, 0, 1]), 3)
  np.testing.assert_array_equal(got, np.diag([1, 1, 0]))


@pytest.mark.parametrize(
  ("labels", "predictions", "weights", "message"),
  [
    ([0, 3], [0, 1], None, "labels hold class 3, outside 0..2"),
    ([0, 1], [0, -1], None, "predictions hold class -1"),
    ([0, 1], [0, 1], [1.0, 0.5], "whole numbers"),
    ([0.0, 1.0], [0, 1], None, "labels must be integers"),
    ([0, 1, 2], [0, 1], None, "differ in shape"),
  ],
)
def test_bad_input_of_a_confusion_matrix(labels, predictions, weights, message):
  weights = None if weights is None else np.array(weights)
  with pytest.raises(ValueError, match=message):
    metrics.confusion_matrix(np.array(labels), np.array(predictions), 3, weights)


def test_metrics_refuse_what_is_no_matrix():
  with pytest.raises(ValueError, match=r"\(2, 3\)"):
    metrics.accuracy(np.ones((2, 3), int))


# Segmentation.


def test_dice_and_iou():
  a = np.zeros((3, 8, 8), bool)
  b = np.zeros((3, 8, 8), bool)
  a[0, :4], b[0, 2:6] = True, True  # 32 and 32 pixels, 16 in common
  a[1, 0, 0] = True  # disjoint: one is empty
  for f in (lambda g: g, jax.jit):
    np.testing.assert_allclose(f(metrics.dice)(a, b), [0.5, 0, 1])
    np.testing.assert_allclose(f(metrics.iou)(a, b.astype(np.int32)), [1 / 3, 0, 1])
  assert float(metrics.dice(a, b, axes=(0, 1, 2))) == pytest.approx(32 / 65)


def test_dice_is_the_f1_score_of_pixels():
  a, b = np.random.default_rng(0).integers(2, size=(2, 16, 16))
  assert float(metrics.dice(a, b)) == pytest.approx(sk.f1_score(a.ravel(), b.ravel()), abs=1e-6)
  assert float(metrics.iou(a, b)) == pytest.approx(sk.jaccard_score(a.ravel(), b.ravel()), abs=1e-6)


def test_masks_must_be_masks():
  with pytest.raises(ValueError, match="threshold them first"):
    metrics.dice(np.ones((4, 4), bool), np.full((4, 4), 0.7))
  with pytest.raises(ValueError, match="differ in shape"):
    metrics.iou(np.ones((4, 4), bool), np.ones((4, 5), bool))
