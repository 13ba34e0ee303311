"""Models with frozen parts answer as the whole, train only what is above, and leave the rest in the
model that a run saves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from experiments import settings
from experiments.configs import feature_statistics
from experiments.configs.run import rehearse
from primia_jax import models
from primia_jax.models import ModelConfig
from primia_jax.models.standardising import FLOOR
from tests.experiments_runs import PRIVATE, SITE, TINY, cohort_of, make_trainer, train

CONFIG = ModelConfig("efficientnet_lite0", 3, (32, 32, 1), norm="batch", width=0.125)


def drawn(config=CONFIG):
  """A model with statistics as after training."""
  model = models.build(config)
  rng = np.random.default_rng(0)
  params, state = jax.eval_shape(model.init, jax.random.key(0))
  draw = lambda low, leaf: jnp.asarray(rng.uniform(low, 0.7, leaf.shape), jnp.float32)
  params, state = (
    jax.tree.map(functools.partial(draw, low), t) for low, t in ((-0.5, params), (0.3, state))
  )
  return model, params, state


RESNET = ModelConfig(
  "resnet18", 3, (32, 32, 1), norm="batch", width=0.125, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
)
VGG = ModelConfig("vgg16", 3, (32, 32, 1), width=0.125, head="dense512")


@pytest.mark.parametrize(
  ("config", "first_trained", "passed"),
  [
    (CONFIG, "block2", (3, 8, 8, 8)),
    (CONFIG, "head", (3, 160)),
    (RESNET, "layer3_0", (3, 4, 4, 16)),
    (VGG, "hidden", (3, 1, 1, 64)),
  ],
)
def test_the_parts_answer_as_the_whole(config, first_trained, passed):
  model, params, state = drawn(config)
  frozen = models.freeze(config, params, state, first_trained)
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, *config.image_shape)), jnp.float32)

  def run(x):
    passed = frozen.lower(x)
    answer, _ = frozen.model.apply(frozen.params, frozen.model_state, passed)
    return answer, model.apply(params, state, x)[0], passed.shape

  answer, expected, shape = jax.jit(run)(x)
  assert float(jnp.abs(expected).max()) > 0.1
  np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)
  assert tuple(map(int, shape)) == passed


@pytest.mark.parametrize("kind", ["unit", "standardised"])
def test_features_of_norm_one_reach_the_last_layer(kind):
  config = dataclasses.replace(CONFIG, features=kind)
  model, _, state = drawn(config)
  params = drawn()[1]
  mean, std = np.zeros(160), np.zeros(160)
  if kind == "standardised":
    mean, std = np.random.default_rng(2).uniform(0, 1, (2, 160))
    std[3] = 0  # a feature that is the same in all public images
    shapes = jax.eval_shape(model.init, jax.random.key(0))[0]
    assert shapes["feature_norm"]["scale"].shape == (160,)
    params = models.with_statistics({**shapes, **params}, models.FeatureStatistics(mean, std))
  frozen = models.freeze(config, params, state, "head")
  plain = models.freeze(CONFIG, drawn()[1], state, "head")
  x = jnp.asarray(np.random.default_rng(1).normal(size=(3, *CONFIG.image_shape)), jnp.float32)

  def run(x):
    answer, _ = frozen.model.apply(frozen.params, frozen.model_state, frozen.lower(x))
    return frozen.lower(x), plain.lower(x), answer, model.apply(params, state, x)[0]

  passed, raw, answer, expected = jax.jit(run)(x)
  raw = np.asarray(raw, np.float64)
  if kind == "standardised":
    raw = (raw - mean) / (std + FLOOR * std.mean())
  scaled = raw / np.linalg.norm(raw, axis=1, keepdims=True)
  np.testing.assert_allclose(passed, scaled, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


def test_unknown_features_are_refused():
  with pytest.raises(ValueError, match="features='median' is not one of mean, unit, standardised"):
    models.build(dataclasses.replace(CONFIG, features="median"))


def test_only_what_is_above_is_a_parameter():
  _, params, state = drawn()
  frozen = models.freeze(CONFIG, params, state, "block14")
  assert set(frozen.params) == {"block14", "block15", "head_conv", "head_norm", "head"}
  assert set(frozen.model_state) == set(frozen.params) - {"head_conv", "head"}
  moved = jax.tree.map(lambda p: p + 1, (frozen.params, frozen.model_state))
  whole_params, whole_state = frozen.whole(*moved)
  assert jax.tree.structure((whole_params, whole_state)) == jax.tree.structure((params, state))
  for whole, before in ((whole_params, params), (whole_state, state)):
    for name in whole:
      shift = 1 if name in frozen.params else 0
      jax.tree.map(
        lambda a, b, shift=shift: np.testing.assert_array_equal(a, b + shift),
        whole[name],
        before[name],
      )


@pytest.mark.parametrize(
  ("config", "first_trained", "said"),
  [
    (CONFIG, "stem", "first_trained='stem' is not a part of efficientnet_lite0 with parts before"),
    (CONFIG, "block16", "use one of block0, block1, .*, block15, head_conv, head"),
    (ModelConfig("resnet18"), "stem", "not a part of resnet18.*use one of layer1_0, .*, head"),
    (ModelConfig("cnn"), "head", "cnn cannot be frozen in parts"),
  ],
)
def test_other_cuts_are_refused(config, first_trained, said):
  with pytest.raises(ValueError, match=said):
    models.freeze(config, {}, {}, first_trained)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """A file as PyTorch writes it, for a narrow network."""
  path = tmp_path_factory.mktemp("weights") / "narrow.safetensors"
  _, params, state = drawn()
  saved = {}
  kinds = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
  for keys, leaf in jax.tree_util.tree_leaves_with_path((params, state)):
    *layers, kind = (key.key for key in keys[1:])
    name = {
      "stem": "_conv_stem", "stem_norm": "_bn0", "head_conv": "_conv_head", "head_norm": "_bn1",
      "head": "_fc", "expand": "_expand_conv", "expand_norm": "_bn0", "project": "_project_conv",
      "depthwise": "_depthwise_conv", "depthwise_norm": "_bn1", "project_norm": "_bn2",
    }[layers[-1]]  # fmt: skip
    block = f"_blocks.{layers[0].removeprefix('block')}." if len(layers) > 1 else ""
    value = np.asarray(leaf)
    if kind == "kernel":
      value = value[:, :, None] if value.ndim == 3 else value
      value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    saved[f"{block}{name}.{kinds.get(kind, 'weight')}"] = np.ascontiguousarray(value)
  safetensors.numpy.save_file(saved, path)
  return path


def config_of(weights, base=TINY, **changes):
  return settings.replace(
    base, model="efficientnet_lite0", width=0.125, image_size=32, pretrained=str(weights),
    first_trained="head", **{"rounds": 2, **changes},
  )  # fmt: skip


@pytest.mark.parametrize(
  "base",
  [
    pytest.param(TINY, marks=pytest.mark.slow, id="plain"),
    pytest.param(PRIVATE, id="example"),
    pytest.param(SITE, marks=pytest.mark.slow, id="site"),
  ],
)
def test_a_federation_trains_the_head_on_features_computed_once(weights, base, tmp_path):
  config = config_of(weights, base)
  if base is PRIVATE:
    file = tmp_path / "public.json"
    public = models.statistics_of(np.random.default_rng(3).uniform(0, 1, (9, 160)))
    feature_statistics.write(file, public, "drawn images", "efficientnet_lite0", 32)
    config = settings.replace(config, features="standardised", feature_statistics=str(file))
  model_config = config.model.config(config.data, 3)
  assert model_config.norm == "affine"
  trainer = make_trainer(config, cohort_of(config))
  images = cohort_of(config).train.dataset.images[:5]
  assert trainer.features(images).shape == (5, 160)
  arm = train(config, tmp_path / "run", trainer=trainer)
  (params, state), start = arm.models[0], config.model.initial(model_config, jax.random.key(0))[0]
  assert state == {}
  assert set(arm.sent[0]) == {"head"}
  if base is PRIVATE:
    features = trainer.features(images)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    wanted = 1 / (public.std + FLOOR * public.std.mean())
    np.testing.assert_allclose(params["feature_norm"]["scale"], wanted, rtol=1e-5)
    np.testing.assert_allclose(params["feature_norm"]["bias"], -public.mean * wanted, rtol=1e-5)
    assert arm.privacy["features"].endswith("nothing is charged: drawn images")
  assert bool((params["head"]["kernel"] != start["head"]["kernel"]).any())
  assert jax.tree.structure(params) == jax.tree.structure(start)
  for name in start:
    if name != "head":
      jax.tree.map(np.testing.assert_array_equal, params[name], start[name])


@pytest.mark.slow
def test_augmented_images_pass_through_the_frozen_parts(weights, tmp_path):
  config = config_of(weights, augment="light", rounds=1)
  trainer = make_trainer(config, cohort_of(config))
  assert trainer.features is None
  arm = train(config, tmp_path / "run", trainer=trainer)
  assert np.isfinite(arm.rows[-1]["train_loss"])
  assert arm.models[0][0]["stem"]["kernel"].shape == (3, 3, 1, 8)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"pretrained": ""}, "first_trained='head' keeps the parts before it.*set pretrained"),
    ({"record_transcript": True}, "record_transcript=True: audits attack whole models"),
    ({"first_trained": "layer4"}, "first_trained=layer4.*use one of block0"),
    ({"model": "mlp", "pretrained": "imagenet", "width": 1.0}, "mlp cannot be frozen"),
    ({"model": "resnet18", "pretrained": "imagenet", "first_trained": ""}, "no package has"),
  ],
)
def test_what_cannot_be_frozen_is_refused(weights, changes, said):
  with pytest.raises(ValueError, match=said):
    rehearse(settings.replace(config_of(weights), **changes))
