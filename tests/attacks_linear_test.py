"""Inversion of dense layers: exact for one image, rank two and no image for many."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import local, models
from primia_jax.attacks import linear
from primia_jax.types import Batch

KEY, CLASSES = jax.random.key(0), 3
AS_THEY_ARE = lambda key, images, targets: (images, targets)


def batch_of(rng, labels, shape=(8, 8, 1)):
  images = rng.random((len(labels), *shape)).astype(np.float32)
  return Batch(
    jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.ones(len(labels), jnp.float32)
  )


def gradient(model, params, batch):
  loss = local.classification_loss(model.apply, AS_THEY_ARE, CLASSES)
  return jax.jit(jax.grad(loss, has_aux=True))(params, {}, batch, KEY)[0]


@pytest.mark.parametrize(("name", "layer"), [("mlp", "hidden"), ("scatter_linear", "linear")])
def test_one_image_and_one_step_give_the_layer_s_input_exactly(name, layer):
  config = models.ModelConfig(name, CLASSES, (8, 8, 1))
  model = models.build(config)
  params, _ = model.init(KEY)
  batch = batch_of(np.random.default_rng(1), [2])
  grads = gradient(model, params, batch)
  rate = 0.03
  found = linear.invert(-rate * grads[layer]["kernel"], -rate * grads[layer]["bias"])
  features = models.features(config)
  features = (lambda images: images) if features is None else jax.jit(features)
  expected = features(batch.images)
  np.testing.assert_allclose(found, np.ravel(expected), atol=1e-5)
  # control: of two images it is neither
  two = batch_of(np.random.default_rng(1), [2, 0])
  grads = gradient(model, params, two)
  found = np.asarray(linear.invert(grads[layer]["kernel"], grads[layer]["bias"]))
  assert np.abs(np.asarray(features(two.images)).reshape(2, -1) - found).max(1).min() > 0.05


def softmax_gradients(kernel, bias, inputs, labels):
  logits = inputs @ kernel + bias
  shares = np.exp(logits - logits.max(1, keepdims=True))
  return shares / shares.sum(1, keepdims=True) - np.eye(CLASSES)[labels]


def test_a_head_s_update_of_many_images_and_steps_has_rank_two():
  rng = np.random.default_rng(2)
  inputs, others = rng.normal(size=(2, 60, 200))
  public, labels = rng.normal(size=(100, 200)), rng.integers(0, CLASSES, 60)
  kernel, bias = np.zeros((200, CLASSES)), np.zeros(CLASSES)
  for part in np.split(np.arange(60), 6):
    g = softmax_gradients(kernel, bias, inputs[part], labels[part])
    kernel, bias = kernel - 0.1 * inputs[part].T @ g, bias - 0.1 * g.sum(0)
  of = lambda *arrays: [jnp.asarray(a, jnp.float32) for a in arrays]
  rank = jax.jit(linear.rank)
  assert int(rank(*of(kernel))) == 2
  assert int(rank(*of(kernel + 0.01 * rng.normal(size=kernel.shape)))) == 3
  reach = linear.reach(*of(kernel, inputs, np.zeros(200)), 2)
  assert reach.max() < 0.6  # no image
  # who took part is told all the same, since 200 numbers are more than 60 images
  candidates, twice = np.concatenate([inputs, others]), np.tile(labels, 2)
  zeros = of(np.zeros((200, CLASSES)), np.zeros(CLASSES))
  gradients = jax.jit(linear.output_gradients)(*zeros, *of(candidates), jnp.asarray(twice))
  expected = softmax_gradients(np.zeros((200, CLASSES)), 0.0, candidates, twice)
  np.testing.assert_allclose(gradients, expected, atol=1e-6)
  alignment = jax.jit(linear.alignment)

  def auc(update):
    score = np.asarray(alignment(*of(update, candidates, gradients, public), 10.0))
    return (score[:60, None] > score[None, 60:]).mean()

  assert auc(kernel) > 0.85
  # controls: of the others' update it is the reverse, and of strangers' it tells nothing
  assert auc(-others.T @ expected[60:]) < 0.15
  assert 0.3 < auc(-rng.normal(size=(60, 200)).T @ expected[60:]) < 0.7


def test_reach_is_one_within_the_span_and_small_beyond():
  rng = np.random.default_rng(3)
  kernel = jnp.asarray(rng.normal(size=(400, 3)), jnp.float32)
  inputs = jnp.concatenate([kernel.T, jnp.asarray(rng.normal(size=(3, 400)), jnp.float32)])
  found = linear.reach(kernel, inputs, jnp.zeros(400, jnp.float32), 3)
  np.testing.assert_allclose(found[:3], 1, atol=1e-5)
  assert found[3:].max() < 0.25  # sqrt(3 / 400) is 0.09


def test_alignment_is_the_likelihood_ratio_of_gaussian_inputs():
  rng = np.random.default_rng(4)
  public = rng.normal(size=(9, 5)) @ rng.normal(size=(5, 5)) + 1
  inputs, g, update = rng.normal(size=(4, 5)), rng.normal(size=(4, 3)), rng.normal(size=(5, 3))
  centred = public - public.mean(0)
  covariance = centred.T @ centred / 9
  covariance += 0.3 * np.trace(covariance) / 5 * np.eye(5)
  inverse, x = np.linalg.inv(covariance), inputs - public.mean(0)
  expected = -np.einsum("nd,de,el,nl->n", x, inverse, update, g)
  expected /= np.sqrt(np.einsum("nd,de,ne->n", x, inverse, x)) * np.linalg.norm(g, axis=1)
  found = jax.jit(linear.alignment)(
    *(jnp.asarray(a, jnp.float32) for a in (update, inputs, g, public)), 0.3
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_class_contrasts_come_out_of_a_step_from_zero():
  rng = np.random.default_rng(5)
  inputs = jnp.asarray(rng.normal(size=(30, 12)), jnp.float32)
  labels = jnp.asarray(np.repeat([0, 1, 2], [5, 10, 15]), jnp.int32)
  zeros = jnp.zeros((12, 3), jnp.float32), jnp.zeros(3, jnp.float32)
  g = linear.output_gradients(*zeros, inputs, labels)
  counts = jnp.asarray([5, 10, 15], jnp.float32)
  found = jax.jit(linear.class_contrasts)(-0.02 * inputs.T @ g, -0.02 * g.sum(0), counts)
  sums = np.stack([inputs[labels == c].sum(0) for c in range(3)], 1)
  expected = (sums - np.asarray(inputs).sum(0)[:, None] / 3) / np.asarray(counts)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.optimised  # 150 steps take longer than to compile one
@jax.numpy_dtype_promotion("standard")  # optax's Adam raises a float to an int32 power
def test_an_image_comes_back_from_its_scattering_features():
  config = models.ModelConfig("scatter_linear", CLASSES, (16, 16, 1))
  features_fn, n = jax.jit(models.features(config)), 16
  y, x = np.mgrid[:n, :n].astype(np.float32) / n
  image = jnp.asarray((np.sin(5 * x) * np.cos(3 * y) + (x > 0.6))[..., None], jnp.float32)
  init, step = linear.from_features(features_fn, features_fn(image[None])[0], optax.adam(0.05))
  step = jax.jit(step)
  # begins with the lowest path, which is the blurred image
  start = jax.image.resize(features_fn(image[None])[0, ..., :1], image.shape, "cubic")
  state = init(start)
  for _ in range(150):
    state, distance = step(state)
  correlation = lambda a: np.corrcoef(np.ravel(a), np.ravel(image))[0, 1]
  assert distance < 0.02
  assert correlation(state.image) > 0.98 > correlation(start)
