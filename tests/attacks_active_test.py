"""Servers that choose what they send: exact images out of an honest, masked sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

from primia_jax import algorithms, federated, local, models, secagg, sites, summation
from primia_jax.attacks import active, linear
from primia_jax.types import Site

S, N, SHAPE, CLASSES, RATE = 3, 4, (6, 6, 1), 3, 1.0
SIZE, BINS, GAIN = 36, 64, 0.05
MODEL = models.build(models.ModelConfig("mlp", CLASSES, SHAPE))
PARAMS, _ = MODEL.init(jax.random.key(0))
RNG = np.random.default_rng(0)
# Far enough apart in brightness, so that each is alone in its bin.
LEVELS = RNG.permutation(np.linspace(0.2, 0.8, S * N)).reshape(S, N, 1, 1, 1)
TEXTURE = RNG.normal(size=(S, N, *SHAPE)) * 0.1
IMAGES = (LEVELS + TEXTURE - TEXTURE.mean((2, 3, 4), keepdims=True)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, (S, N)).astype(np.int32)
BRIGHTNESS = jnp.full(SIZE, 1 / SIZE, jnp.float32)
PUBLIC = np.linspace(0.1, 0.9, 200)
SECURE = summation.masked(secagg.secure_sum(S, num_peers=2))


def hospitals(num=N):
  site = Site(np.arange(S, dtype=np.int32), IMAGES, LABELS, np.full(S, num, np.int32))
  return federated.in_memory(site)


@functools.cache
def honest(apply_fn):
  """FedAvg of one step of all images, and a round of it with a model for each site."""
  loss = local.classification_loss(apply_fn, lambda key, x, y: (x, y), CLASSES)
  steps = local.epochs(N, N)
  recipe = local.Recipe(steps, local.gradients(loss), None, optax.sgd, lambda t: RATE)
  algorithm = algorithms.fedavg(recipe)
  return algorithm, active.round(algorithm, SECURE, sites.loop())


def opened(apply_fn, params, num=N):
  """The sum of the updates of one honest round from these parameters, of each site by its row."""
  algorithm, run = honest(apply_fn)
  sent = federated.Global(params, {}, (), jnp.int32(0), jax.random.key(3))
  one = algorithm.init_site(jax.tree.map(lambda a: a[0], params), {})
  state = jax.tree.map(lambda a: np.broadcast_to(a, (S, *np.shape(a))), one)
  return run(sent, hospitals(num), state).update[0]


def same_for_all(params):
  return jax.tree.map(lambda a: jnp.stack([a] * S), params)


def error(found, images):
  """Largest error of any pixel of the images, each compared with its own found one."""
  all_pairs = np.abs(np.asarray(found)[None] - images.reshape(-1, 1, SIZE)).max(2)
  return all_pairs[linear_sum_assignment(all_pairs)].max()


def test_thresholds_are_quantiles():
  assert active.thresholds(np.arange(100.0), 4).tolist() == [0, 24.75, 49.5, 74.25]
  with pytest.raises(ValueError, match="num_bins=0"):
    active.thresholds(np.arange(3.0), 0)


def module(num_bins):
  return active.imprint(BRIGHTNESS, jnp.asarray(active.thresholds(PUBLIC, num_bins)))


APPLY, _ = active.prepend(MODEL.apply, PARAMS, module(S * BINS), GAIN)


def test_the_same_module_everywhere_takes_every_image_out_of_the_masked_sum():
  _, params = active.prepend(MODEL.apply, PARAMS, module(S * BINS), GAIN)
  update = opened(APPLY, same_for_all(params))["module"]
  found = active.read(update["kernel"], update["bias"])
  assert int(found.has.sum()) == S * N
  assert error(found.images[found.has], IMAGES) < 1e-4


def test_units_of_its_own_name_each_image_s_site():
  layers = [active.for_site(module(BINS), i, S) for i in range(S)]
  sent = [active.prepend(MODEL.apply, PARAMS, layer, GAIN)[1] for layer in layers]
  update = opened(APPLY, jax.tree.map(lambda *a: jnp.stack(a), *sent))["module"]
  for i in range(S):
    part = {name: active.block(update[name], i, S) for name in ("kernel", "bias")}
    found = active.read(part["kernel"], part["bias"])
    assert int(found.has.sum()) == N
    assert error(found.images[found.has], IMAGES[i]) < 1e-4


def test_without_the_module_the_masked_sum_holds_no_image():
  """Control: an honest model's first layer, read in the same ways."""
  update = opened(MODEL.apply, same_for_all(PARAMS))["hidden"]
  found = active.read(update["kernel"], update["bias"])
  assert error(found.images, IMAGES) > 0.1
  mean = np.asarray(linear.invert(update["kernel"], update["bias"]))
  assert np.abs(IMAGES.reshape(-1, SIZE) - mean).max(1).min() > 0.1


def test_an_imprint_needs_no_module_where_the_first_layer_is_dense():
  width = PARAMS["hidden"]["bias"].size
  layer = active.imprint(BRIGHTNESS, jnp.asarray(active.thresholds(PUBLIC, width)))
  outputs = jnp.asarray([0.01, 0.0, -0.01], jnp.float32)
  head = {**PARAMS["head"], "kernel": active.alike(width, outputs)}
  update = opened(MODEL.apply, same_for_all({"hidden": layer, "head": head}))["hidden"]
  found = active.read(update["kernel"], update["bias"])
  # fewer bins, some with two images
  all_pairs = np.abs(np.asarray(found.images)[None] - IMAGES.reshape(-1, 1, SIZE)).max(2)
  assert (all_pairs.min(1) < 1e-3).sum() >= S * N // 2


def test_dead_units_elsewhere_leave_the_victim_s_update_alone_in_the_sum():
  num, victim = 1, 1
  sent = [PARAMS if i == victim else active.dead(PARAMS, "hidden") for i in range(S)]
  update = opened(MODEL.apply, jax.tree.map(lambda *a: jnp.stack(a), *sent), num)["hidden"]
  found = linear.invert(update["kernel"], update["bias"])
  np.testing.assert_allclose(found, IMAGES[victim, 0].reshape(-1), atol=1e-4)
  # control: of consistent models the sum is a mixture
  update = opened(MODEL.apply, same_for_all(PARAMS), num)["hidden"]
  mixed = np.asarray(linear.invert(update["kernel"], update["bias"]))
  assert np.abs(IMAGES[:, 0].reshape(S, -1) - mixed).max(1).min() > 0.05


def test_a_sum_that_does_not_fit_its_encoding_is_not_read():
  loud = same_for_all({**PARAMS, "head": jax.tree.map(lambda a: 1e6 * a, PARAMS["head"])})
  with pytest.raises(ValueError, match="do not fit the sum's encoding"):
    opened(MODEL.apply, loud)
