"""Simulated clients: the update is the one that local training makes, and it can be inverted."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

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


def test_the_simulated_update_is_that_of_local_training():
  params, loss_fn, images, labels = world()
  steps = local.Steps(4, 2, 4, lambda site, now: (4, lambda t, state: ORDER[t]))
  recipe = local.Recipe(steps, local.gradients(loss_fn), None, optax.sgd, lambda _: 0.5)
  site = Site(jnp.int32(0), images, labels, jnp.int32(4))
  now = local.Round(jnp.int32(0), jax.random.key(0), jax.random.key(1))
  trained = jax.jit(local.train(recipe))(params, {}, optax.sgd(0.5).init(params), (), site, now)
  expected = jax.tree.map(jnp.subtract, trained.params, params)
  simulate = updates.local_training(loss_fn, 0.5, ORDER)
  update = jax.jit(simulate)(updates.Seen(params, {}, None, labels), images)
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
