"""Labels from the head's gradient, exact for random features and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax.attacks import labels


def head_gradient(features, head, truth):
  """(kernel, bias) gradients of the mean cross-entropy, and the probabilities, in NumPy."""
  logits = features @ head
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  error = (p - np.eye(head.shape[1])[truth]) / len(truth)
  return (features.T @ error).astype(np.float32), error.sum(0).astype(np.float32), p


def draw(seed, batch, classes, signed=True, scale=1.0):
  rng = np.random.default_rng(seed)
  features = rng.normal(size=(batch, 8)) if signed else rng.uniform(size=(batch, 8))
  return features, rng.normal(size=(8, classes)) * scale, rng.integers(classes, size=batch)


def test_the_label_of_a_single_image():
  single = jax.jit(labels.single)
  for seed in range(50):
    features, head, truth = draw(seed, 1, 5)
    kernel, _, _ = head_gradient(features, head, truth)
    assert single(kernel).item() == truth[0]


def test_distinct_labels_of_a_batch():
  features, head, _ = draw(0, 4, 10, signed=False, scale=0.1)
  truth = np.array([7, 1, 4, 9])
  kernel, _, _ = head_gradient(features, head, truth)
  assert labels.distinct(jnp.asarray(kernel), 4).tolist() == [1, 4, 7, 9]
  with pytest.raises(ValueError, match="batch_size=11"):
    labels.distinct(jnp.asarray(kernel), 11)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 64), st.integers(2, 6), st.floats(-0.45, 0.45))
def test_counts_of_a_batch(seed, batch, classes, off):
  features, head, truth = draw(seed, batch, classes)
  _, bias, p = head_gradient(features, head, truth)
  guess = p.mean(0) + off / batch * np.cos(np.arange(classes))  # within 1 / (2 B)
  expected = np.bincount(truth, minlength=classes)
  np.testing.assert_array_equal(labels.counts(bias, guess, batch), expected)
  np.testing.assert_array_equal(labels.of_counts(expected), np.sort(truth))


def test_counts_sum_to_the_batch_even_from_a_bad_guess():
  for seed in range(20):
    features, head, truth = draw(seed, 8, 4)
    _, bias, _ = head_gradient(features, head, truth)
    counts = labels.counts(bias, np.full(4, 0.25), 8)
    assert counts.sum() == 8
    assert counts.min() >= 0
