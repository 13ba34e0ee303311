"""Gradients of all models: none hangs on two floats being equal, since compilers choose bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.attacks import matching
from primia_jax.conv import maximum
from primia_jax.models import ModelConfig, build

MODELS = [
  ModelConfig("cnn", 3, (16, 20, 1)),
  ModelConfig("cnn", 3, (16, 16, 3), norm="batch", dropout=0.5),
  ModelConfig("leaf_cnn", 10, (12, 12, 1)),
  ModelConfig("mlp", 4, (5, 6, 1)),
  ModelConfig("resnet18", 3, (32, 32, 1), width=0.125),
  ModelConfig("resnet18", 3, (32, 32, 1), weight_standardisation=True, width=0.125),
  ModelConfig("vgg16", 3, (32, 32, 1), norm="batch", head="mean", width=0.125),
  ModelConfig("efficientnet_lite0", 3, (32, 36, 1), width=0.125, dropout=0.1),
  ModelConfig("scatter_linear", 3, (8, 12, 2), norm="none"),
  ModelConfig("unet", 3, (32, 32, 1), width=0.125),
  ModelConfig("monet", 3, (32, 32, 1), width=0.125),
]


def compared(jaxpr):
  """Equations of a jaxpr, and of those within it, that ask whether two floats are equal."""
  for eqn in jaxpr.eqns:
    floats = jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating) if eqn.invars else False
    if eqn.primitive.name in ("eq", "ne") and floats:
      yield eqn
    for inner in jax.tree.leaves([*eqn.params.values()], is_leaf=lambda p: hasattr(p, "eqns")):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield from compared(inner)


@pytest.mark.parametrize("config", MODELS, ids=lambda config: f"{config.name}-{config.norm}")
def test_no_gradient_hangs_on_two_floats_that_are_equal(config):
  model = build(config)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *config.image_shape)), jnp.float32)
  params, state = jax.eval_shape(model.init, jax.random.key(0))

  def loss(params, x):
    out, _ = model.apply(params, state, x, train=True, key=jax.random.key(1))
    return (out**2).sum()

  state = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state)
  traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
  assert not [*compared(traced.jaxpr)]


def test_the_usual_maximum_hangs_on_it():
  x, y = jnp.ones(3), jnp.zeros(3)
  found = {}
  for fn in (jnp.maximum, maximum, matching.cosine):
    traced = jax.make_jaxpr(jax.grad(lambda x, y, fn=fn: fn(x, y).sum(), argnums=(0, 1)))(x, y)
    found[fn] = len([*compared(traced.jaxpr)])
  assert found[jnp.maximum] > 0
  assert found[maximum] == found[matching.cosine] == 0


def test_the_larger_one_has_the_gradient_and_equal_ones_share_it():
  x, y = jnp.array([1.0, 2.0, 0.0, jnp.nan]), jnp.array([2.0, 1.0, 0.0, 1.0])
  for a, b in ((x, y), (y, x), (x, 0.5)):
    np.testing.assert_array_equal(maximum(a, b), jnp.maximum(a, b))
  gradient = lambda fn: jax.grad(lambda x, y: fn(x, y).sum(), argnums=(0, 1))(x[:3], y[:3])
  for ours, theirs in zip(gradient(maximum), gradient(jnp.maximum), strict=True):
    np.testing.assert_array_equal(ours, theirs)
