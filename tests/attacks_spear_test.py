"""SPEAR: whole batches come back exactly, and do not where noise fills the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from primia_jax import local, models
from primia_jax.attacks import spear
from primia_jax.types import Batch

SHAPE, CLASSES, KEY = (10, 10, 1), 3, jax.random.key(0)
MODEL = models.build(models.ModelConfig("mlp", CLASSES, SHAPE))
LOSS = local.classification_loss(MODEL.apply, lambda key, x, y: (x, y), CLASSES)


@pytest.fixture(scope="module")
def gradient():
  """(images, labels) -> (parameters, their gradient)."""
  params, _ = MODEL.init(KEY)
  grad = jax.jit(jax.grad(LOSS, has_aux=True))

  def of(images, labels):
    batch = Batch(
      jnp.asarray(images), jnp.asarray(labels, jnp.int32), jnp.ones(len(labels), jnp.float32)
    )
    return params, grad(params, {}, batch, KEY)[0]

  return of


def attack(params, grads, noise=0.0, **kwargs):
  rng = np.random.default_rng(7)
  of = {name: np.asarray(a, np.float64) for name, a in grads["hidden"].items()}
  of = {n: a + noise * np.abs(a).max() * rng.normal(size=a.shape) for n, a in of.items()}
  given = {"seed": 0, **kwargs}
  return spear.invert(
    of["kernel"], of["bias"], params["hidden"]["kernel"], params["hidden"]["bias"], **given
  )


def matched(found, images):
  """Largest error of any pixel, after the found images are brought into the true order."""
  flat = images.reshape(len(images), -1)
  error = np.abs(found[:, None] - flat[None]).max(2)
  return error[linear_sum_assignment(error)].max()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_batch_comes_back_exactly(gradient, size):
  rng = np.random.default_rng(size)
  images = rng.normal(size=(size, *SHAPE)).astype(np.float32)
  params, grads = gradient(images, rng.integers(0, CLASSES, size))
  rate = -0.05  # an update tells as much as a gradient
  found = attack(params, jax.tree.map(lambda g: rate * g, grads))
  assert found.inputs.shape == (size, 100)
  assert matched(found.inputs, images) < 1e-4
  assert found.agreement == 1


def test_noise_and_sums_end_it(gradient):
  rng = np.random.default_rng(8)
  images = rng.normal(size=(40, *SHAPE)).astype(np.float32)
  labels = rng.integers(0, CLASSES, 40)
  params, grads = gradient(images[:2], labels[:2])
  assert matched(attack(params, grads).inputs, images[:2]) < 1e-4  # the control
  found = attack(params, grads, noise=0.01)
  assert found is None or found.agreement < 0.9
  # more images than units: a sum over sites, such as secure aggregation opens
  params, grads = gradient(images, labels)
  assert attack(params, grads) is None


def test_wrong_arguments_are_refused(gradient):
  params, grads = gradient(np.ones((1, *SHAPE), np.float32), [0])
  with pytest.raises(ValueError, match="num_draws=0"):
    attack(params, grads, num_draws=0)
  with pytest.raises(ValueError, match="of one dense layer"):
    spear.invert(np.ones((3, 2)), np.ones(3), np.ones((3, 2)), np.ones(3), seed=0)
