"""Labels from the head's gradient, exact for random features and heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax import local
from primia_jax.attacks import inversion, labels, matching, scores, updates
from primia_jax.types import Batch


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


def test_shares_of_a_step_whatever_its_rate():
  rng = np.random.default_rng(0)
  of_kernel, of_bias = rng.normal(size=(3, 8, 3)), rng.normal(size=(3, 3))
  true = np.array([0.5, 0.0, 0.5])
  change = [-0.07 * np.tensordot(true, g, 1) for g in (of_kernel, of_bias)]
  np.testing.assert_allclose(labels.shares(*change, of_kernel, of_bias), true, atol=1e-9)
  away = [-c for c in change]
  np.testing.assert_allclose(labels.shares(*away, of_kernel, of_bias).sum(), 1)


def dense(params, model_state, images, *, train=True, key=None):
  """A sigmoid MLP without biases."""
  del train, key
  hidden = jax.nn.sigmoid(images.reshape(len(images), -1) @ params[0])
  return hidden @ params[1], model_state


def test_labels_and_images_are_found_together():
  """DLG, Zhu et al. 2019: the label of a soft search is the true one, and so is the image."""
  rng = np.random.default_rng(0)
  params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((9, 32), (32, 4))]
  image = jnp.asarray(rng.uniform(size=(1, 3, 3, 1)), jnp.float32)
  soft = labels.soft_loss(dense, lambda images: images)
  hard = local.classification_loss(dense, lambda key, images, targets: (images, targets), 4)
  simulate = updates.gradient(soft)
  settings = inversion.Settings(matching.l2, steps=500, rate=0.05, signed=False)
  variables = inversion.with_labels(inversion.pixels(image.shape), 1, 4)
  attack = inversion.inversion(simulate, variables, settings)

  @jax.jit
  def run(label):
    batch = Batch(image, label[None], jnp.ones(1, jnp.float32))
    update = jax.grad(hard, has_aux=True)(params, {}, batch, jax.random.key(0))[0]
    one_hot = jax.nn.one_hot(label[None], 4, dtype=jnp.float32)
    same = simulate(updates.Seen(params, {}, None, one_hot), image)
    seen = updates.Seen(params, {}, update, jnp.full((1, 4), 0.25))
    return update, same, inversion.run(attack, jax.random.key(1), seen, 2)

  update, same, found = run(jnp.int32(2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), update, same)
  best = int(found.objective.argmin())
  assert found.labels[best, 0].argmax() == 2
  assert scores.psnr(inversion.selected(found), image).item() > 25
