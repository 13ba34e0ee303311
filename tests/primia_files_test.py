"""Checkpoints in the form of PriMIA's train.py: read without its code, and answering as its network
does.
"""

import argparse
import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import encrypted, model_files, settings
from experiments.configs.run import rehearse
from primia_jax import models, mpc, primia_files
from primia_jax.models import ModelConfig, layers
from primia_jax.mpc.circuit import SHARING
from primia_jax.service import cards, certificates, folders, publications, sharing
from primia_jax.service.cards import About
from tests.experiments_runs import TINY, write_untrained
from tests.torch_files import saving

MEAN, STD = (0.4, 0.45, 0.5), (0.2, 0.25, 0.3)


@functools.cache
def weights(classes=3, seed=0):
  """The state dict of a ResNet-18 with an eighth of its channels."""
  rng, before = np.random.default_rng(seed), 8
  draw = lambda *shape: np.float32(rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape))
  made = {"conv1.weight": draw(8, 3, 7, 7)}

  def norm(name, features):
    for kind in ("weight", "bias", "running_mean", "running_var"):
      made[f"{name}.{kind}"] = rng.uniform(0.3, 0.9, features).astype(np.float32)
    made[f"{name}.num_batches_tracked"] = np.array(5, np.float32)

  norm("bn1", 8)
  for stage, features in enumerate((8, 16, 32, 64), start=1):
    for i in range(2):
      block = f"layer{stage}.{i}"
      for j, of in ((1, before), (2, features)):
        made[f"{block}.conv{j}.weight"] = draw(features, of, 3, 3)
        norm(f"{block}.bn{j}", features)
      if before != features:
        made[f"{block}.downsample.0.weight"] = draw(features, before, 1, 1)
        norm(f"{block}.downsample.1", features)
      before = features
  return made | {"fc.weight": draw(classes, 64), "fc.bias": np.zeros(classes, np.float32)}


def options(**changes):
  """Those of configs/torch/pneumonia-resnet-pretrained.ini that matter here, as an object of the
  class that PriMIA has for them.
  """
  module = types.ModuleType("torchlib.utils")
  module.Arguments = type("Arguments", (), {"__module__": "torchlib.utils"})
  sys.modules["torchlib"], sys.modules["torchlib.utils"] = types.ModuleType("torchlib"), module
  made = module.Arguments()
  vars(made).update(
    {"model": "resnet-18", "pretrained": True, "inference_resolution": 32, "pooling_type": "max",
     "clahe": False, "lr": 1e-4, "data_dir": "data/train", **changes}
  )  # fmt: skip
  return made


@pytest.fixture
def primia(monkeypatch, tmp_path):
  """Writes a checkpoint as `save_model` of torchlib/utils.py does."""
  save = saving(monkeypatch)

  def write(args=None, legacy=False, name="final_federated.pt", **changes):
    content = {
      "epoch": 12,
      "model_state_dict": weights(),
      "optim_state_dict": {
        "alice": {"state": {0: {"step": 7, "exp_avg": np.ones(3, np.float32)}},
                  "param_groups": [{"lr": 1e-4, "betas": (0.5, 0.99), "params": [0]}]}
      },
      "args": options() if args is None else args,
      "val_mean_std": np.array([MEAN, STD], np.float32),
      **changes,
    }  # fmt: skip
    content = {k: v for k, v in content.items() if v is not None}
    save(content, tmp_path / name, legacy)
    for module in ("torchlib", "torchlib.utils"):
      sys.modules.pop(module, None)
    return tmp_path / name

  return write


@pytest.mark.parametrize("legacy", [False, True])
def test_reads_the_weights_the_normalisation_and_the_options(primia, legacy):
  read = primia_files.read_checkpoint(primia(legacy=legacy))
  assert read.state_dict.keys() == weights().keys()
  np.testing.assert_array_equal(read.state_dict["fc.weight"], weights()["fc.weight"])
  np.testing.assert_allclose((read.mean, read.std), (MEAN, STD), rtol=1e-6)
  assert read.options["lr"] == 1e-4
  two = tuple(np.array(v, np.float32) for v in (MEAN, STD))  # inference.py takes this form, too
  namespace = argparse.Namespace(**vars(options()))
  again = primia_files.read_checkpoint(primia(namespace, val_mean_std=two))
  assert (again.mean, again.std, again.options) == (read.mean, read.std, read.options)


def test_answers_as_its_network_does_to_its_own_normalisation(primia):
  path = str(primia())
  model, (trained,), names, config = model_files.load_model(path)
  assert names == ("normal", "bacterial", "viral")
  assert (config.image_shape, config.norm, config.pool) == ((32, 32, 3), "batch", "max")
  images = np.random.default_rng(1).uniform(size=(4, 32, 32, 3)).astype(np.float32)
  plain = models.build(dataclasses.replace(config, mean=(), std=()))

  def run(ours, theirs):
    return model.apply(*trained, ours)[0], plain.apply(*trained, theirs)[0]

  theirs = ((images - np.float32(MEAN)) / np.float32(STD)).astype(np.float32)
  answer, expected = jax.jit(run)((images - models.MEAN) / models.STD, theirs)
  assert float(np.ptp(expected)) > 0.1
  np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-4)
  assert encrypted.load_model(path, "a,b,c")[2] == ("a", "b", "c")
  assert (model_files.grey_bits(path), model_files.ct_window(path)) == (0, "")


@pytest.mark.slow
def test_it_is_published_and_a_card_encodes_images_as_its_own_normalisation_wants(primia, tmp_path):
  """The normalisation is the model's first layer, so every card has the same encoder."""
  path, (vendor, helper) = str(primia()), (folders.make(tmp_path / name) for name in "vh")
  images = np.random.default_rng(2).integers(0, 256, (4, 32, 32, 3), np.uint8)
  (tmp_path / "images").mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / "images" / f"{i}.png")
  planned = encrypted.Planned(
    checkpoint=path, calibration=f"folder:{tmp_path / 'images'}", ring_bits=64, fraction_bits=16
  )
  encrypted.check_planned(planned)
  model, weights, names, config = encrypted.load_model(path)
  calibration, _ = encrypted.calibration_images(planned, config, names)
  plan = encrypted.make_plan(planned, model, weights, calibration, SHARING)
  about = About("1", 32, 3, names, "probabilities", 1)
  certificates.create(vendor, "vendor")
  (vendor / "helper.pem").write_bytes(certificates.create(helper, "helper").read_bytes())
  outbox = publications.begin(vendor, "chest", about, plan, publications.leaves(weights))
  dealer = mpc.Dealer(plan, (outbox / "tag").read_text())
  mpc.saving.write(publications.model_folder(vendor, "chest") / "blind", dealer.blind())
  publications.finish(vendor, "chest")
  addresses = "vendor.example:1", "helper.example:1"
  issued = cards.read(publications.issue(vendor, "chest", addresses, *encrypted.ENCODER))
  image = issued.encoded(images[:1])
  first, second = (np.frombuffer(v, np.int64) for v in sharing.shares(issued.card, [image]))
  shared = ((first + second) * issued.card.images[0]["unit"]).reshape(image.shape)
  kept = jax.tree.unflatten(jax.tree.structure(weights), publications.copy_of(vendor, "chest")[2])
  found = mpc.check(plan, (kept, shared.astype(np.float32)))
  plain = models.build(dataclasses.replace(config, mean=(), std=()))
  theirs = ((images[:1] / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)
  expected = plain.apply(*weights, theirs)[0]
  assert float(np.ptp(expected)) > 0.1
  np.testing.assert_allclose(found, expected, atol=0.01)
  assert found.argmax() == expected.argmax()


def test_a_grey_image_serves_as_three_equal_channels():
  config = ModelConfig("resnet18", 3, (32, 32, 1), mean=MEAN, std=STD)
  values = np.random.default_rng(0).uniform(size=(2, 4, 4, 1))
  expected = (values - np.array(MEAN)) / np.array(STD)
  grey = ((values - models.MEAN) / models.STD).astype(np.float32)
  for images in (grey, grey.repeat(3, axis=3)):
    np.testing.assert_allclose(layers.renormalised(config, images), expected, atol=1e-5)


def test_training_starts_from_a_checkpoint(primia):
  path = primia()
  config = settings.replace(
    TINY, model="resnet18", image_size=32, stem="7x7", width=0.125, pretrained=str(path),
    first_trained="layer4_1",
  )  # fmt: skip
  rehearse(config)
  model_config = config.model.config(config.data, 3)
  assert model_config.norm == "affine"
  np.testing.assert_allclose((model_config.mean, model_config.std), (MEAN, STD), rtol=1e-6)
  frozen = config.model.frozen(model_config, jax.random.key(0))
  assert set(frozen.params) == {"layer4_1", "head"}
  whole, _ = frozen.whole(frozen.params, frozen.model_state)
  kernel = weights()["conv1.weight"].transpose(2, 3, 1, 0)
  np.testing.assert_array_equal(whole["conv1"]["kernel"], kernel)


def test_a_plain_state_dict_is_taken_for_torchvisions(primia, monkeypatch, tmp_path):
  saving(monkeypatch)(weights(), tmp_path / "resnet18.pth")
  config = settings.replace(TINY, model="resnet18", pretrained=str(tmp_path / "resnet18.pth"))
  made = config.model.config(config.data, 3)
  assert (made.mean, made.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_training_starts_from_a_run(tmp_path):
  write_untrained(tmp_path, ("a", "b"))
  config = settings.replace(TINY, pretrained=str(tmp_path))
  rehearse(config)
  model_config = config.model.config(config.data, 3)
  params, _ = config.model.initial(model_config, jax.random.key(1))
  drawn, _ = models.build(model_config).init(jax.random.key(1))
  (saved, _), *_ = model_files.load_model(str(tmp_path))[1]
  for name in params:
    same_as = drawn if name == "head" else saved  # three classes, not two
    assert jax.tree.map(jnp.shape, params[name]) == jax.tree.map(jnp.shape, same_as[name])
    if name != "head":
      jax.tree.map(np.testing.assert_array_equal, params[name], saved[name])
  for changes, said in (
    ({"model": "leaf_cnn"}, "set the same: name='mlp', not 'leaf_cnn'"),
    ({"image_size": 20}, "was trained on images of .16, 16, 1., .*set the same image_size"),
  ):
    with pytest.raises(ValueError, match=said):
      rehearse(settings.replace(config, **changes))


@pytest.mark.parametrize(
  ("changes", "of_args", "said"),
  [
    ({}, {"model": "simpleconv"}, "is a simpleconv of PriMIA; models that are read: resnet-18"),
    ({}, {"clahe": True}, "after OpenCV's CLAHE.*equalise the images yourself"),
    ({}, {"inference_resolution": 100}, "100 pixels.*multiples of 32"),
    ({}, {"pooling_type": "median"}, "pooling_type='median'; known: avg, max"),
    ({}, {"model": "vgg16"}, "has no features.0.weight, as a vgg16 has"),
    ({"args": 3}, {}, "does not say which model.*--pretrained"),
    ({"val_mean_std": np.zeros((2, 3), np.float32)}, {}, "positive deviation"),
    ({"val_mean_std": "no"}, {}, "val_mean_std is not a mean"),
    ({"val_mean_std": np.ones((2, 2), np.float32)}, {}, "normalises 2 channels.*takes 3"),
  ],
)
def test_what_cannot_be_served_is_refused(primia, changes, of_args, said):
  path = primia(**{"args": options(**of_args), **changes})
  with pytest.raises(ValueError, match=said):
    model_files.load_model(str(path))


def test_wrong_names_and_other_objects_are_refused(primia, tmp_path):
  path = primia()
  with pytest.raises(ValueError, match=r"classes=a,b: .*3 outputs; name each"):
    model_files.load_model(str(path), "a,b")
  with pytest.raises(ValueError, match=r"classes=a: the run .* names its own classes"):
    model_files.load_model(str(tmp_path), "a")
  planned = encrypted.Planned(checkpoint=str(path))
  with pytest.raises(ValueError, match=r"calibration=run: .*--calibration=folder:PATH"):
    encrypted.check_planned(planned)
  other = primia(argparse.ArgumentParser)
  with pytest.raises(ValueError, match=r"argparse.ArgumentParser is not part of a dictionary"):
    primia_files.read_checkpoint(other)
