"""The learned prior: it draws images of the public kind, and an attack in its codes finds one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.attacks import inversion, learned, matching, scores, updates

SHAPE = (1, 8, 8, 1)


def blobs(seed, count):
  """Images [count, 8, 8, 1] of one bright blob each: a kind of image with three unknowns."""
  rng = np.random.default_rng(seed)
  y, x, width = rng.uniform([[1.5], [1.5], [1]], [[5.5], [5.5], [2]], (3, count))[:, :, None, None]
  grid = np.arange(8)
  squares = (grid[:, None] - y) ** 2 + (grid - x) ** 2
  return np.exp(-squares / (2 * width**2)).astype(np.float32)[..., None]


@functools.cache
def prior():
  training = learned.Training(code=8, hidden=64, steps=800, batch_size=32, rate=5e-3, noise=0.02)
  return jax.jit(lambda x: learned.train(jax.random.key(0), x, training))(blobs(0, 256))


def test_unseen_images_of_the_kind_survive_and_others_do_not():
  made, unseen = prior(), blobs(1, 64)
  again = learned.decode(made.params, learned.encode(made.params, unseen), SHAPE[1:])
  assert scores.psnr(again, unseen).mean() > 25
  other = np.random.default_rng(2).uniform(size=unseen.shape).astype(np.float32)
  again = learned.decode(made.params, learned.encode(made.params, other), SHAPE[1:])
  assert scores.psnr(again, other).mean() < 12
  assert jnp.abs(made.codes).max() <= 1
  assert made.losses[-1] < made.losses[0] / 10
  with pytest.raises(ValueError, match="16 images are fewer than batch_size=64"):
    learned.train(jax.random.key(0), blobs(0, 16))


def test_it_finds_an_image_from_an_update_that_does_not_determine_the_pixels():
  """Sixteen numbers of 64 pixels were sent: many images fit, few of them of this kind."""
  truth = blobs(3, 1)
  sensed = jnp.asarray(np.random.default_rng(4).normal(size=(64, 16)), jnp.float32)
  simulate = lambda seen, images: images.reshape(1, -1) @ sensed
  settings = inversion.Settings(matching.l2, steps=300, rate=0.02, signed=False)

  @jax.jit
  def both():
    seen = updates.Seen(None, {}, simulate(None, truth), jnp.zeros(1, jnp.int32))
    return [
      inversion.run(inversion.inversion(simulate, made, settings), jax.random.key(1), seen, 4)
      for made in (learned.codes(prior().params, SHAPE), inversion.pixels(SHAPE))
    ]

  by_codes, by_pixels = (scores.psnr(inversion.selected(f), truth).item() for f in both())
  assert by_codes > 20
  assert by_pixels < 15
