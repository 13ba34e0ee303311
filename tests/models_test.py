"""Shapes, parameter counts, modes, normalisation against textbook formulas, and that every model
learns.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from primia_jax.models import (
  ModelConfig,
  Norm,
  build,
  efficientnet,
  features,
  is_norm_parameter,
  num_parameters,
)  # fmt: skip

SMALL = [
  ModelConfig("cnn", 3, (16, 20, 1)),
  ModelConfig("cnn", 3, (16, 16, 3), norm="batch", pool="mean", dropout=0.5),
  ModelConfig("cnn", 2, (8, 8, 1), norm="none", weight_standardisation=True, width=0.5),
  ModelConfig("leaf_cnn", 10, (12, 12, 1)),
  ModelConfig("mlp", 4, (5, 6, 1)),
  ModelConfig("resnet18", 3, (32, 32, 1), width=0.125),
  ModelConfig("resnet18", 3, (16, 16, 3), norm="batch", stem="3x3", width=0.125),
  ModelConfig(
    "resnet18", 3, (32, 32, 1), stem="3x3/2", pool="mean", weight_standardisation=True, width=0.125
  ),
  ModelConfig("vgg16", 3, (32, 32, 1), norm="group", head="mean", width=0.125, dropout=0.1),
  ModelConfig("vgg16", 3, (32, 40, 3), norm="batch", width=0.02),
  ModelConfig("efficientnet_lite0", 3, (32, 36, 1), width=0.125, dropout=0.1),
  ModelConfig("efficientnet_lite1", 3, (32, 32, 1), norm="batch", width=0.125),
  ModelConfig("efficientnet_lite2", 3, (32, 32, 3), norm="affine", width=0.125),
  ModelConfig("scatter_linear", 3, (8, 12, 2), norm="none"),
  ModelConfig("scatter_cnn", 3, (8, 12, 1), scales=1, width=0.125, dropout=0.2),
]


def name_of(config):
  return "-".join(str(v) for v in dataclasses.astuple(config))


def images(config, batch=4, seed=0):
  return jnp.asarray(
    np.random.default_rng(seed).normal(size=(batch, *config.image_shape)), jnp.float32
  )


@pytest.mark.parametrize(
  ("config", "count"),
  [
    (ModelConfig("leaf_cnn", 10, (28, 28, 1)), 1_199_882),
    (ModelConfig("mlp", 10, (28, 28, 1)), 784 * 32 + 32 + 320 + 10),
    (ModelConfig("resnet18", 1000, (224, 224, 3), norm="batch"), 11_689_512),
    (ModelConfig("vgg16", 1000, (224, 224, 3)), 138_357_544),
    (ModelConfig("vgg16", 1000, (224, 224, 3), norm="batch"), 138_365_992),
    (ModelConfig("efficientnet_lite0", 1000, (224, 224, 3), norm="batch"), 4_652_008),
    (ModelConfig("efficientnet_lite1", 1000, (240, 240, 3), norm="batch"), 5_416_680),
    (ModelConfig("efficientnet_lite2", 1000, (260, 260, 3), norm="affine"), 6_092_072),
    (ModelConfig("scatter_linear", 10, (28, 28, 1)), 39_700),  # arXiv 2011.11660: 39,700
    (ModelConfig("scatter_cnn", 10, (32, 32, 3)), 187_210),  # and 187,000
  ],
)
def test_published_parameter_counts(config, count):
  params, _ = jax.eval_shape(build(config).init, jax.random.key(0))
  assert num_parameters(params) == count


@pytest.mark.parametrize("config", SMALL, ids=name_of)
def test_shapes(config):
  model = build(config)
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  assert bool(state) == (config.norm == "batch")
  for train in (False, True):
    apply = functools.partial(model.apply, train=train)
    logits, new_state = jax.eval_shape(apply, params, state, images(config), key=jax.random.key(1))
    assert (logits.shape, logits.dtype) == ((4, config.num_classes), jnp.float32)
    assert new_state == state


@pytest.mark.parametrize("config", [SMALL[i] for i in (0, 1, 3, 4, 7, 14)], ids=name_of)
def test_one_batch_can_be_learnt(config):
  config = dataclasses.replace(config, dropout=0.0)
  model = build(config)
  x, labels = images(config, 6), jnp.arange(6) % config.num_classes

  def loss(params, state):
    logits, state = model.apply(params, state, x, train=True)
    return -(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, config.num_classes)).sum(
      -1
    ).mean(), state

  def step(carry, _):
    params, state, velocity = carry
    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params, state)
    velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
    return (jax.tree.map(lambda p, v: p - 0.01 * v, params, velocity), state, velocity), value

  def train(key):
    params, state = model.init(key)
    carry = (params, state, jax.tree.map(jnp.zeros_like, params))
    (_, new_state, _), losses = lax.scan(step, carry, None, length=40)
    return state, new_state, losses

  state, new_state, losses = jax.jit(train)(jax.random.key(2))
  assert losses[-1] < 0.5 * losses[0]
  assert all(
    bool((a != b).any())
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True)
  )


def test_kernels_start_as_he_has_them():
  params, _ = build(ModelConfig("leaf_cnn", 10, (28, 28, 1))).init(jax.random.key(6))
  for layer, fan_in, gain in (("conv2", 288, 2), ("hidden", 9216, 2), ("head", 128, 1)):
    kernel = np.asarray(params[layer]["kernel"])
    assert abs(kernel.mean()) < 5 * np.sqrt(gain / fan_in / kernel.size)
    np.testing.assert_allclose(kernel.var(), gain / fan_in, rtol=5 * np.sqrt(2 / kernel.size))
  assert (
    len(np.unique(params["hidden"]["kernel"])) > 1_000_000
  )  # one draw, cut into pieces that do not overlap


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_everything_stays_float32_under_x64(norm):
  config = ModelConfig("resnet18", 3, (16, 16, 1), norm=norm, width=0.125)
  with jax.enable_x64(True):
    model = build(config)
    params, state = jax.eval_shape(model.init, jax.random.key(0))
    x = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    logits, new_state = jax.eval_shape(functools.partial(model.apply, train=True), params, state, x)
  assert {leaf.dtype for leaf in jax.tree.leaves((params, state, logits, new_state))} == {
    jnp.dtype(jnp.float32)
  }


def test_evaluation_leaves_the_state_alone():
  model = build(SMALL[1])
  params, state = model.init(jax.random.key(0))
  apply = jax.jit(model.apply)
  logits, same = apply(params, state, images(SMALL[1]))
  assert all(
    bool((a == b).all()) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(same), strict=True)
  )
  one_by_one = [apply(params, state, image[None])[0] for image in images(SMALL[1])]
  np.testing.assert_allclose(logits, jnp.concatenate(one_by_one), rtol=1e-4, atol=1e-5)


def test_sites_agree_between_vmap_and_loop():
  # 16 pixels: at 8 the last norm sees two values a group, and a gradient is all rounding.
  config = ModelConfig("cnn", 3, (16, 16, 1), width=0.5)
  model = build(config)
  x = jnp.stack([images(config, 2, seed) for seed in range(3)])
  params, _ = jax.jit(jax.vmap(model.init))(jax.random.split(jax.random.key(3), 3))
  gradient = jax.grad(lambda params, x: (model.apply(params, {}, x, train=True)[0] ** 2).sum())
  together = jax.jit(jax.vmap(gradient))(params, x)
  for i in range(3):
    alone = jax.jit(gradient)(jax.tree.map(lambda p, i=i: p[i], params), x[i])
    for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("features", [4, 48, 64])
def test_group_norm_equals_flax(features):
  x = jnp.asarray(np.random.default_rng(1).normal(2, 3, (3, 5, 4, features)), jnp.float32)
  ours, theirs = Norm("group"), nn.GroupNorm(num_groups=int(np.gcd(32, features)), epsilon=1e-5)
  rng = np.random.default_rng(2)
  params = {k: jnp.asarray(rng.normal(size=features), jnp.float32) for k in ("scale", "bias")}

  def run(module, *args):
    loss = lambda x, p: (module.apply({"params": p}, x, *args) ** 3).sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, params)

  for a, b in zip(jax.tree.leaves(run(ours, True)), jax.tree.leaves(run(theirs)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_batch_norm_tracks_and_uses_statistics():
  x = np.random.default_rng(3).normal(2, 3, (4, 5, 6, 8)).astype(np.float32)
  norm = Norm("batch")
  variables = jax.jit(norm.init, static_argnums=2)(jax.random.key(0), x, True)
  y, updates = jax.jit(lambda v, x: norm.apply(v, x, True, mutable=["batch_stats"]))(variables, x)
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * mean, rtol=1e-4)
  np.testing.assert_allclose(updates["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-4)
  known = {"mean": np.ones(8, np.float32), "var": np.full(8, 4, np.float32)}
  evaluated = jax.jit(norm.apply, static_argnums=2)({**variables, "batch_stats": known}, x, False)
  np.testing.assert_allclose(evaluated, (x - 1) / np.sqrt(4 + 1e-5), rtol=1e-4, atol=1e-5)


def test_standardised_kernels_ignore_scale_and_offset():
  config = ModelConfig("cnn", 3, (8, 8, 1), norm="none", weight_standardisation=True)
  model = build(config)
  params, state = model.init(jax.random.key(4))
  moved = jax.tree_util.tree_map_with_path(
    lambda path, p: (
      3 * p + 0.5 if path[-1].key == "kernel" and path[0].key.startswith("conv") else p
    ),
    params,
  )
  x = images(config)
  apply = jax.jit(model.apply)
  np.testing.assert_allclose(
    apply(params, state, x)[0], apply(moved, state, x)[0], rtol=1e-3, atol=1e-3
  )


def test_dropout_draws_from_the_key_only_while_training():
  config = ModelConfig("cnn", 3, (8, 8, 1), dropout=0.5)
  model = build(config)
  params, state = model.init(jax.random.key(5))
  x = images(config)
  # A batch of keys, because a compiled function costs more than what it computes here.
  apply = lambda key, train: model.apply(params, state, x, train=train, key=key)[0]
  run = jax.vmap(lambda key: (apply(key, True), apply(key, False), apply(None, False)))
  keys = jax.vmap(jax.random.key)(np.array([1, 1, 2]))
  trained, evaluated, without_key = jax.jit(run)(keys)
  np.testing.assert_array_equal(trained[0], trained[1])
  assert (trained[0] != trained[2]).any()
  np.testing.assert_array_equal(evaluated, without_key)
  with pytest.raises(ValueError, match=r"dropout=0\.5 and stochastic_depth=0\.0 need a key"):
    apply(None, True)


def test_an_image_leaves_out_what_a_block_adds_or_takes_it_twice_at_a_half():
  block = efficientnet.Block(8, 3, 1, 1, "none", left_out=0.5)
  x = jax.random.normal(jax.random.key(0), (64, 4, 4, 8))
  params = jax.tree.map(lambda p: jnp.full_like(p, 0.1), block.init(jax.random.key(1), x, False))
  apply = jax.jit(block.apply, static_argnums=2)
  added = apply(params, x, False) - x
  trained = apply(params, x, True, rngs={"dropout": jax.random.key(2)}) - x
  taken = np.abs(trained).max((1, 2, 3)) > 0
  assert 16 < taken.sum() < 48  # a binomial count leaves these bounds with a chance of 8e-5
  want = np.where(taken[:, None, None, None], 2 * np.asarray(added), np.float32(0))
  np.testing.assert_allclose(trained, want, atol=1e-5)


def test_stochastic_depth_grows_by_block_and_needs_a_key():
  config = ModelConfig("efficientnet_lite0", 3, (32, 32, 1), width=0.125, stochastic_depth=0.2)
  model = build(config)
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  rates = []

  def record(call, args, kwargs, context):
    if isinstance(context.module, efficientnet.Block):
      rates.append(context.module.left_out)
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    train = functools.partial(model.apply, train=True)
    jax.eval_shape(train, params, state, images(config), key=jax.random.key(1))
  np.testing.assert_allclose(rates, [0.2 * i / 16 for i in range(16)])
  with pytest.raises(ValueError, match=r"stochastic_depth=0\.2 need a key"):
    model.apply(params, state, images(config), train=True)


def test_norm_parameters_are_told_apart():
  config = ModelConfig("resnet18", 3, (16, 16, 1), width=0.125)
  params, _ = jax.eval_shape(build(config).init, jax.random.key(0))
  chosen = [p for p, _ in jax.tree_util.tree_leaves_with_path(params) if is_norm_parameter(p)]
  assert len(chosen) == 2 * 20  # scale and offset of torchvision's twenty norms
  assert {path[-1].key for path in chosen} == {"scale", "bias"}
  assert is_norm_parameter(("layer1_0", "norm1", "scale"))
  assert not is_norm_parameter(("layer1_0", "conv1", "kernel"))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"name": "resnet50"},
      "unknown model 'resnet50'; known models: cnn, leaf_cnn, mlp, resnet18, vgg16, ",
    ),
    ({"norm": "layer"}, "norm='layer' is not one of"),
    ({"name": "leaf_cnn", "norm": "batch"}, "leaf_cnn has no option 'norm'"),
    ({"name": "cnn", "stem": "3x3"}, "cnn has no option 'stem'"),
    ({"name": "vgg16", "image_shape": (16, 16, 1)}, "vgg16 needs images of at least 32 x 32"),
    ({"image_shape": (64, 64)}, r"must be \(height, width, channels\)"),
    ({"num_classes": 0}, "num_classes=0"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"stochastic_depth": 0.2}, "cnn has no option 'stochastic_depth'"),
    ({"name": "efficientnet_lite0", "stochastic_depth": 1.0}, "stochastic_depth=1.0"),
    ({"width": 0.0}, "width=0.0"),
    ({"name": "cnn", "scales": 3}, "cnn has no option 'scales'"),
    ({"name": "scatter_linear", "scales": 0}, "scales=0 must be at least 1"),
    (
      {"name": "scatter_linear", "image_shape": (28, 30, 1)},
      r"multiples of 4 pixels and at least 4, not \(28, 30\)",
    ),
    (
      {"name": "scatter_cnn", "image_shape": (8, 8, 1), "scales": 3},
      "multiples of 8 pixels and at least 16",
    ),
    ({"name": "scatter_linear", "norm": "batch"}, "scatter_linear has no norm='batch'"),
  ],
)
def test_bad_configurations_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    build(ModelConfig(**changes))


@pytest.mark.parametrize("config", SMALL[13:], ids=name_of)
def test_features_computed_once_serve_in_place_of_images(config):
  model = build(config)
  params, state = jax.tree.map(
    lambda p: jnp.asarray(np.random.default_rng(7).normal(size=p.shape), jnp.float32),
    model.init(jax.random.key(7)),
  )
  x = jax.jit(features(config))(images(config))
  apply = jax.jit(model.apply)
  np.testing.assert_allclose(
    apply(params, state, x)[0], apply(params, state, images(config))[0], rtol=1e-3, atol=1e-3
  )
  assert features(SMALL[0]) is None


def test_scattered_features_are_standardised_path_by_path():
  config = ModelConfig("scatter_linear", 3, (16, 16, 2))
  x = 30 * images(config) + 2
  y = np.asarray(jax.jit(features(config))(x)).reshape(4, 4, 4, 2, 81)
  groups = np.split(y, [1, *range(9, 81, 8)], axis=-1)
  assert len(groups) == 11
  for group in groups:
    np.testing.assert_allclose(group.mean((1, 2, 4)), 0, atol=1e-4)
    np.testing.assert_allclose(group.std((1, 2, 4)), 1, rtol=0.02)
  np.testing.assert_allclose(
    jax.jit(features(config))(300 * images(config)), y.reshape(4, 4, 4, 162), rtol=0.05, atol=0.05
  )


def test_a_linear_model_starts_from_nothing():
  params, _ = build(SMALL[13]).init(jax.random.key(0))
  assert not any(p.any() for p in jax.tree.leaves(params))


def test_bad_images_are_refused():
  model = build(ModelConfig("mlp", 3, (8, 8, 1)))
  params, state = model.init(jax.random.key(0))
  with pytest.raises(ValueError, match=r"images \[B, 8, 8, 1\] but got \[2, 8, 8, 3\]"):
    model.apply(params, state, jnp.zeros((2, 8, 8, 3)))
  with pytest.raises(ValueError, match="must be float32, not uint8"):
    model.apply(params, state, jnp.zeros((2, 8, 8, 1), jnp.uint8))


@pytest.mark.parametrize(("name", "count"), [("unet", 2_141_730), ("monet", 408_970)])
def test_segmenters_give_each_pixel_a_class(name, count):
  model = build(ModelConfig(name, 2, (16, 24, 1)))
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  assert num_parameters(params) == count
  x = jax.ShapeDtypeStruct((3, 16, 24, 1), jnp.float32)
  logits, _ = jax.eval_shape(model.apply, params, state, x)
  assert (logits.shape, logits.dtype) == ((3, 16, 24, 2), jnp.float32)


@pytest.mark.parametrize(
  ("name", "skips"), [("unet", ("up0_0", "up1_0", "up2_0")), ("monet", ("join0", "join1"))]
)
def test_each_skip_of_a_segmenter_is_used(name, skips):
  """Where the kernel takes nothing from a skip, the output is another."""
  config = ModelConfig(name, 2, (8, 8, 1), width=0.25, norm="none")
  model = build(config)
  params, _ = model.init(jax.random.key(1))
  apply = jax.jit(lambda params: model.apply(params, {}, images(config))[0])
  whole = apply(params)
  for skip in skips:
    kernel = params[f"{skip}_conv"]["kernel"]
    without = kernel.at[:, :, : kernel.shape[2] // 2].set(0)  # the skip's channels come first
    changed = apply(params | {f"{skip}_conv": params[f"{skip}_conv"] | {"kernel": without}})
    assert float(jnp.abs(changed - whole).max()) > 1e-3 * float(jnp.abs(whole).max())


def test_segmenters_refuse_sides_that_their_pools_do_not_divide():
  with pytest.raises(ValueError, match="multiples of 8"):
    build(ModelConfig("unet", 2, (16, 20, 1)))
  build(ModelConfig("monet", 2, (16, 20, 1)))
