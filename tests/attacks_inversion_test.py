"""Gradient inversion: it recovers the image of a tiny model, and not from a sum of ten sites."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import local
from primia_jax.attacks import inversion, matching, priors, scores, updates

SHAPE = (1, 6, 6, 1)


def apply(params, model_state, images, *, train=True, key=None):
  """A sigmoid MLP 36-64-3."""
  del train, key
  first, second = params
  x = jax.nn.sigmoid(images.reshape(len(images), -1) @ first["kernel"] + first["bias"][None])
  return x @ second["kernel"] + second["bias"][None], model_state


@functools.cache
def world():
  """Parameters, loss and ten sites' images [10, 1, 6, 6, 1] and labels [10, 1]."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = [
    {"kernel": draw(36, 64) / 3, "bias": draw(64) / 3},
    {"kernel": draw(64, 3), "bias": draw(3)},
  ]
  loss_fn = local.classification_loss(apply, lambda key, images, targets: (images, targets), 3)
  images = jnp.asarray(rng.uniform(size=(10, *SHAPE)), jnp.float32)
  return params, loss_fn, images, jnp.arange(10, dtype=jnp.int32)[:, None] % 3


@functools.cache
def attacked():
  """Two restarts on site 0's own update, and on the mean of all sites'."""
  params, loss_fn, images, labels = world()
  simulate = updates.gradient(loss_fn)
  settings = inversion.Settings(steps=400, rate=0.05)
  attack = inversion.inversion(
    simulate, inversion.pixels(SHAPE), settings, lambda _, x: 1e-6 * priors.total_variation(x)
  )

  @jax.jit
  def both():
    sent = jax.vmap(lambda x, y: simulate(updates.Seen(params, {}, None, y), x))(images, labels)
    shown = jax.tree.map(lambda a: jnp.stack([a[0], a.mean(0)]), sent)
    run = lambda update: inversion.run(
      attack, jax.random.key(1), updates.Seen(params, {}, update, labels[0]), 2
    )
    return jax.vmap(run)(shown)

  return jax.block_until_ready(both())


def test_an_image_is_recovered_from_its_update_and_not_from_a_sum():
  found, truth = attacked(), world()[2][0]
  alone, of_ten = (inversion.selected(jax.tree.map(lambda a, i=i: a[i], found)) for i in range(2))
  assert scores.psnr(alone, truth).item() > 35
  assert scores.psnr(of_ten, truth).item() < 15
  candidates = np.asarray(world()[2])[:, 0]
  assert scores.identify(alone, candidates, np.zeros(1, int)).found.all()


def test_the_least_objective_of_all_steps_is_kept():
  found = attacked()
  assert found.images.shape == (2, 2, *SHAPE)
  assert found.trace.objective.shape == (2, 2, 400)
  np.testing.assert_array_equal(found.objective, found.trace.objective.min(-1))
  assert (found.trace.objective > found.trace.distance).all()
  assert found.images.min() >= 0
  assert found.images.max() <= 1
  best = jax.tree.map(lambda a: a[0], found)
  np.testing.assert_array_equal(inversion.selected(best), best.images[int(best.objective.argmin())])


def test_distances():
  a, b = (
    {"w": jnp.array([3.0, 4.0]), "b": jnp.zeros(1)},
    {"w": jnp.array([4.0, -3.0]), "b": jnp.ones(1)},
  )
  assert matching.l2(a, b).item() == 0.5 * (1 + 49 + 1)
  np.testing.assert_allclose(matching.cosine(a, {"w": 2 * a["w"], "b": a["b"]}), 0, atol=1e-6)
  np.testing.assert_allclose(matching.cosine(a, b), 1, atol=1e-6)


def test_bad_settings_are_refused():
  with pytest.raises(ValueError, match="steps=0 must be positive"):
    inversion.Settings(steps=0)
  attack = inversion.inversion(updates.gradient(world()[1]), inversion.pixels(SHAPE))
  with pytest.raises(ValueError, match="num_restarts=0"):
    inversion.run(attack, jax.random.key(0), None, 0)
