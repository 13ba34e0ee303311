"""Simulated clients: the update is the one that local training makes, and it can be inverted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from primia_jax import local
from primia_jax.attacks import inversion, matching, scores, updates
from primia_jax.types import Site

ORDER = jnp.array([[0, 1], [2, 3], [0, 1], [2, 3]], jnp.int32)  # two epochs of four images


def apply(params, model_state, images, *, train=True, key=None):
  del train, key
  first, second = params
  return jax.nn.sigmoid(images.reshape(len(images), -1) @ first) @ second, model_state


def world():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  loss_fn = local.classification_loss(apply, lambda key, images, targets: (images, targets), 4)
  images = jnp.asarray(rng.uniform(size=(4, 3, 3, 1)), jnp.float32)
  return [draw(9, 48), draw(48, 4)], loss_fn, images, jnp.arange(4, dtype=jnp.int32)


@pytest.mark.parametrize("optimizer", [optax.sgd, functools.partial(optax.sgd, momentum=0.9)])
def test_the_simulated_update_is_that_of_local_training(optimizer):
  """With class weights, rates that change, and a batch that is not full."""
  params, loss_fn, images, labels = world()
  order = ORDER.at[3, 1].set(-1)
  steps = local.Steps(4, 2, 4, lambda site, now: (4, lambda t, state: order[t]))
  schedule = lambda time: 0.5 - 0.4 * time
  recipe = local.Recipe(steps, local.gradients(loss_fn), None, optimizer, schedule)
  site = Site(jnp.int32(0), images, labels, jnp.int32(4))
  weights = jnp.array([0.5, 1.0, 1.5, 1.0])
  now = local.Round(jnp.int32(0), jax.random.key(0), jax.random.key(1), weights)
  start = optimizer(0.5).init(params)
  trained = jax.jit(local.train(recipe))(params, {}, start, (), site, now)
  expected = jax.tree.map(jnp.subtract, trained.params, params)
  rates = jnp.asarray([schedule(t / 4) for t in range(4)])
  simulate = updates.local_training(loss_fn, rates, order, optimizer)
  seen = updates.Seen(params, {}, None, labels, class_weights=weights)
  update = jax.jit(simulate)(seen, images)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), update, expected)


def test_four_images_are_recovered_from_four_steps():
  params, loss_fn, images, labels = world()
  simulate = updates.local_training(loss_fn, 0.5, ORDER)
  settings = inversion.Settings(matching.l2, steps=600, rate=0.05, signed=False)
  attack = inversion.inversion(simulate, inversion.pixels(images.shape), settings)

  @jax.jit
  def run():
    seen = updates.Seen(params, {}, None, labels)
    seen = seen._replace(update=simulate(seen, images))
    return inversion.run(attack, jax.random.key(1), seen, 2)

  assert scores.psnr(inversion.selected(run()), images).min() > 30
