import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import (
  algorithms,
  evaluation,
  federated,
  local,
  metrics,
  models,
  mpc,
  segmentation,
  sites,
  summation,
)  # fmt: skip
from primia_jax.conv import conv, mean_pool
from primia_jax.data import augment
from primia_jax.data import sites as data_sites
from primia_jax.data.dataset import Dataset, largest_class
from primia_jax.models import segmenters
from primia_jax.models.config import ModelConfig
from primia_jax.privacy import plan
from primia_jax.secagg import secure_sum
from primia_jax.types import Batch

CONFIG = ModelConfig("unet", 3, (8, 8, 1), norm="none", width=0.25)
MODEL = models.build(CONFIG)
as_is = lambda key, images, targets: (images, targets)
APPLY = jax.jit(lambda params, images: MODEL.apply(params, {}, images)[0])
LOSS = segmentation.segmentation_loss(MODEL.apply, as_is, 3)


@pytest.fixture(scope="module")
def params():
  return MODEL.init(jax.random.key(0))[0]


def scenes(num, seed=0, size=8):
  """Images whose bright disc is class 1 and whose dark one is class 2."""
  rng = np.random.default_rng(seed)
  rows, columns = np.mgrid[:size, :size]
  masks = np.zeros((num, size, size), np.uint8)
  for mask in masks:
    for k in (1, 2):
      y, x = rng.integers(1, size - 1, 2)
      mask[(rows - y) ** 2 + (columns - x) ** 2 <= 3] = k
  grey = np.choose(masks, [128, 230, 20]) + rng.normal(0, 8, masks.shape)
  return np.clip(grey, 0, 255).astype(np.uint8)[..., None], masks


def dataset(num, seed=0):
  images, masks = scenes(num, seed)
  return Dataset(
    images, largest_class(masks, 3), ("background", "bright", "dark"), np.arange(num), masks=masks
  )


def batch_of(num, seed=0):
  images, masks = scenes(num, seed)
  weights = np.ones(num, np.float32)
  return Batch(
    *map(jnp.asarray, (images.astype(np.float32) / 255, masks.astype(np.int32), weights))
  )


def oracle(logits, masks):
  """Each image's loss in float64."""
  logits = np.asarray(logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  truth = np.eye(3)[masks]
  entropy = -(truth * log_p).sum(-1).mean((1, 2))
  p = np.exp(log_p)
  dice = [
    [(2 * (p[i, ..., k] * truth[i, ..., k]).sum() + 1)
     / (p[i, ..., k].sum() + truth[i, ..., k].sum() + 1) for k in (1, 2)]
    for i in range(len(masks))
  ]  # fmt: skip
  return entropy + 1 - np.mean(dice, 1)


def test_the_loss_is_cross_entropy_plus_dice_of_each_image(params):
  batch = batch_of(3)._replace(weights=jnp.asarray([1.0, 0.0, 2.0]))
  loss, (_, found) = jax.jit(LOSS)(params, {}, batch, jax.random.key(0))
  logits = APPLY(params, batch.images)
  each = oracle(logits, np.asarray(batch.labels))
  np.testing.assert_allclose(loss, (each[0] + 2 * each[2]) / 2, rtol=1e-5)
  right = (np.asarray(logits).argmax(-1) == np.asarray(batch.labels)).mean((1, 2))
  np.testing.assert_allclose(found.correct, right[0] + right[2], rtol=1e-6)
  assert float(found.num_examples) == 2


def test_an_empty_mask_that_is_found_empty_costs_nothing():
  logits = jnp.zeros((1, 4, 4, 3)).at[..., 0].set(50.0)
  apply = lambda params, state, images, **_: (logits, state)
  batch = Batch(jnp.zeros((1, 4, 4, 1)), jnp.zeros((1, 4, 4), jnp.int32), jnp.ones(1))
  loss, _ = segmentation.segmentation_loss(apply, as_is, 3)({}, {}, batch, jax.random.key(0))
  assert float(loss) < 1e-6


@pytest.mark.parametrize(("classes", "weight"), [(1, 1.0), (2, -1.0)])
def test_bad_arguments_of_the_loss(classes, weight):
  with pytest.raises(ValueError, match=r"num_classes|dice_weight"):
    segmentation.segmentation_loss(MODEL.apply, as_is, classes, weight)


def test_a_warp_moves_image_and_mask_alike():
  images, masks = scenes(4)
  grey = jnp.asarray(images / 255, jnp.float32)
  # a mask that is the image itself must stay the image itself
  config = augment.Augmentation(
    rotation_degrees=20, translation=0.1, scale=0.2, horizontal_flip=0.5, elastic=0.05
  )
  key = jax.random.key(1)
  both = jax.jit(augment.augment_with_masks, static_argnums=3)
  moved, mask = both(key, grey, grey, config)
  np.testing.assert_array_equal(moved, mask)
  np.testing.assert_allclose(
    moved, jax.jit(augment.augment, static_argnums=2)(key, grey, config), atol=1e-6
  )
  assert float(jnp.abs(moved - grey).max()) > 0.1
  one_hot = jax.nn.one_hot(masks, 3, dtype=jnp.float32)
  _, soft = both(key, grey, one_hot, config)
  np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-5)
  bright = augment.Augmentation(brightness=0.2)
  changed, same = both(key, grey, one_hot, bright)
  np.testing.assert_array_equal(same, one_hot)
  assert float(jnp.abs(changed - grey).max()) > 0.01


def test_dice_of_cases_equals_the_metric():
  _, masks = scenes(5)
  _, found = scenes(5, seed=1)
  masks[0], found[0] = 0, 0
  got = segmentation.case_dice(masks, found, 3)
  for k in (1, 2):
    np.testing.assert_allclose(got[:, k - 1], metrics.dice(masks == k, found == k), rtol=1e-6)
  cases = np.array(["b", "a", "b", "a", "a"])
  by_case = segmentation.case_dice(masks, found, 3, cases)
  for i, case in enumerate("ab"):
    of = cases == case
    whole = metrics.dice(masks[of] == 1, found[of] == 1, axes=(0, 1, 2))
    np.testing.assert_allclose(by_case[i, 0], whole, rtol=1e-6)
  with pytest.raises(ValueError, match="alike"):
    segmentation.case_dice(masks, found[:4], 3)


def test_bootstrap_covers_the_mean():
  rng = np.random.default_rng(3)
  hits = []
  for seed in range(200):
    found = segmentation.bootstrap_mean(rng.beta(2, 1, 40), seed, 400)
    assert found.low <= found.value <= found.high
    hits.append(found.low <= 2 / 3 <= found.high)
  assert 0.88 <= np.mean(hits) <= 0.99
  narrow = [segmentation.bootstrap_mean(rng.beta(2, 1, 40), s, 400, 0.5) for s in range(100)]
  assert np.mean([n.low <= 2 / 3 <= n.high for n in narrow]) < 0.7


def test_the_best_threshold_is_found():
  images, masks = scenes(6)
  threshold, is_bright = segmentation.best_threshold(images, (masks == 1).astype(np.uint8))
  assert is_bright
  assert 150 < threshold < 215
  threshold, is_bright = segmentation.best_threshold(images, (masks == 2).astype(np.uint8))
  assert not is_bright
  assert 20 < threshold < 120


def test_predictions_are_the_most_probable_classes(params):
  images, _ = scenes(5)
  prepare = lambda x: x.astype(jnp.float32) / 255
  predict = segmentation.predictor(MODEL.apply, prepare, batch_size=2)
  logits = APPLY(params, prepare(jnp.asarray(images)))
  got = predict([(params, {})], images)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, np.asarray(logits).argmax(-1))


def recipe():
  steps = local.epochs(4, 8, min_examples=8)
  prepare = lambda key, images, targets: (images.astype(jnp.float32) / 255, targets)
  loss = segmentation.segmentation_loss(MODEL.apply, prepare, 3)
  return local.Recipe(
    steps, local.gradients(loss), None, functools.partial(optax.sgd, momentum=0.9), lambda t: 0.05
  ), loss


def federation(summed, placement, size=8):
  part = data_sites.Part(dataset(3 * size), tuple(np.arange(3 * size).reshape(3, size)))
  stacked = data_sites.stack(part)
  assert stacked.labels.shape == (3, size, 8, 8)
  run = federated.federate(algorithms.fedavg(recipe()[0]), summed, placement, 3)
  return run, federated.in_memory(stacked), stacked


def test_masked_rounds_learn_and_validation_counts_pixels(params):
  secure = summation.masked(secure_sum(3, 2**14, num_bits=32))
  run, everybody, stacked = federation(secure, sites.scan())
  state = run.init(params, {})
  losses = []
  for _ in range(6):
    state, info = run.step(jax.random.key(4), state, everybody)
    losses.append(float(info.loss))
  assert losses[-1] < 0.9 * losses[0]

  prepare = lambda x: x.astype(jnp.float32) / 255
  validate = evaluation.validation(
    algorithms.fedavg(recipe()[0]), MODEL.apply, prepare, 3, secure, sites.scan(), batch_size=5,
    of_pixels=True,
  )  # fmt: skip
  scores = validate(jax.random.key(4), state, everybody)
  images, masks = stacked.images.reshape(-1, 8, 8, 1), np.asarray(stacked.labels).reshape(-1, 8, 8)
  logits = APPLY(state.params, prepare(jnp.asarray(images)))
  expected = np.zeros((3, 3))
  np.add.at(expected, (masks.ravel(), np.asarray(logits).argmax(-1).ravel()), 1 / 64)
  np.testing.assert_allclose(scores.confusion, expected, atol=1e-3)
  log_p = jax.nn.log_softmax(logits).reshape(-1, 3)
  mean = -np.take_along_axis(np.asarray(log_p), masks.reshape(-1, 1), 1).mean()
  np.testing.assert_allclose(scores.loss, mean, rtol=1e-3)


def test_private_gradients_are_clipped_image_by_image(params):
  """One image with any mask changes the clipped sum by at most the clip."""
  _, loss = recipe()
  made = plan.dp_sgd(
    loss, num_units=8, sampling_rate=0.5, steps=2, rounds=1, noise_multiplier=1.0, delta=1e-3,
    l2_clip_norm=0.1, has_taps=models.has_taps(CONFIG),
  )  # fmt: skip
  grad_fn = made.recipe(lambda rate: None, lambda t: 1.0).grad_fn
  images, masks = scenes(8)

  @jax.jit
  def total(count):
    number = jnp.arange(8, dtype=jnp.int32)
    real = number < count
    images_, masks_ = (local.blank(real, jnp.asarray(a)) for a in (images, masks.astype(np.int32)))
    batch = Batch(images_, masks_, real.astype(jnp.float32), jnp.where(real, number, -1))
    return grad_fn(params, {}, batch, jax.random.key(0))[0]

  flat = lambda tree: np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])
  norm = lambda tree: float(np.linalg.norm(flat(tree)))
  sums = [jax.tree.map(np.asarray, total(count)) for count in range(5)]
  changes = [norm(jax.tree.map(np.subtract, b, a)) for a, b in itertools.pairwise(sums)]
  np.testing.assert_allclose(changes, changes[0], rtol=1e-2)  # each is as long as the clip


def test_upsampling_and_skips_are_exact_under_encryption():
  def apply(weights, x):
    y = segmenters.upsample(mean_pool(x, 2, 2))
    return conv(jnp.concatenate([x, y], axis=-1), weights)

  images, _ = scenes(2)
  x = jnp.asarray(images[:, :4, :4], jnp.float32) / 255
  weights = jax.random.normal(jax.random.key(5), (1, 1, 2, 2)) / 2
  private = mpc.secret(apply, weights, examples=x[:, None], target_error=1e-2)
  np.testing.assert_allclose(private(x[:1]), apply(weights, x[:1]), atol=1e-2)


@pytest.mark.slow
def test_masks_are_found_under_encryption(params):
  images, _ = scenes(2)
  x = jnp.asarray(images, jnp.float32) / 255
  apply = lambda weights, image: MODEL.apply(weights, {}, image)[0]
  private = mpc.secret(apply, params, examples=x[:, None], target_error=2e-2)
  plain = APPLY(params, x[:1])
  np.testing.assert_allclose(private(x[:1]), plain, atol=2e-2)
