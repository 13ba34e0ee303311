"""What is taken or refused is so in every program and every source, before work."""

import pathlib

import numpy as np
import pytest
from absl import flags
from experiments_programs import loader
from experiments_runs import NAMES, TINY, write_folder, write_npz

from experiments import encrypted, folders, inputs, settings
from experiments.configs import Train
from experiments.configs.data import Data
from primia_jax.data.dataset import Dataset
from primia_jax.data.load import load

FORM = {"size": 16, "channels": 1}


@pytest.fixture
def no_decoding(monkeypatch):
  def decode(*args, **options):
    raise AssertionError("an image was decoded")

  monkeypatch.setattr("primia_jax.data.decode.decode", decode)


def folder_of(root, names):
  for name in names:
    (root / name).mkdir(parents=True)
    (root / name / "a.png").write_bytes(b"not decoded")
  return f"folder:{root}"


@pytest.mark.parametrize("kind", ["folder", "npz", "tfds"])
def test_a_single_class_is_refused_by_every_source(kind, tmp_path, monkeypatch, no_decoding):
  if kind == "tfds":
    one = Dataset(np.zeros((2, 16, 16, 1), np.uint8), np.zeros(2, np.int32), ("a",), np.arange(2))
    monkeypatch.setattr("primia_jax.data.tfds.read_tfds", lambda *_, **__: {"train": one})
  where = {
    "folder": lambda: folder_of(tmp_path, ["a"]),
    "npz": lambda: f"npz:{write_npz(tmp_path / 'a.npz', order=(0, 0, 0))}",
    "tfds": lambda: "tfds:one",
  }[kind]()
  with pytest.raises(ValueError, match=rf"data={where} has the single class \['.'\]"):
    load(where, lazy=True, **FORM)
  config = settings.replace(TINY, data=where, image_size=16)
  with pytest.raises(ValueError, match="the single class"):
    inputs.site_images(config)
  with pytest.raises(ValueError, match="the single class"):
    inputs.images_to_test(config.data)


def test_images_of_one_of_several_classes_are_no_training_images(tmp_path, no_decoding):
  one = folder_of(tmp_path / "one", ["cat"])
  names = {"label_names": "cat,dog", "image_size": 16}
  with pytest.raises(ValueError, match=rf"{one} are of one class, \['cat'\]"):
    inputs.site_images(settings.replace(TINY, data=one, **names))
  with pytest.raises(ValueError, match=r"phantom are of one class, \['.*'\]"):
    inputs.site_images(settings.replace(TINY, num_sites=1, phantom_images=1))


def test_a_name_of_two_classes_is_refused_by_every_source(tmp_path):
  where = f"npz:{write_npz(tmp_path / 'a.npz')}"
  with pytest.raises(ValueError, match=rf"data={where}: \['cat'\] each name several classes"):
    load(where, label_names=("cat", "dog", "cat"), **FORM)


def test_presets_of_train_federated_are_known_to_train_pooled():
  presets = sorted((pathlib.Path(inputs.__file__).parent / "flags").glob("*.flags"))
  assert presets
  with loader() as program:
    program("train_pooled")
    for path in presets:
      flags.FLAGS(["program", "--run_dir=x", f"--flagfile={path}"])
    flags.FLAGS(["program", "--run_dir=x", "--baselines=pooled,local"])
    with pytest.raises(flags.UnrecognizedFlagError):
      flags.FLAGS(["program", "--run_dir=x", "--no_such_flag=1"])


def test_a_run_whose_sites_keep_state_gives_its_validation_images_to_encrypted_inference(tmp_path):
  """Loaded one site at a time, which training with such sites would refuse."""
  data = f"folder:{write_folder(tmp_path / 'data', each=12)}"
  config = settings.replace(
    TINY, data=data, image_size=16, sites_per_round=2, partition="iid", validation_fraction=0.3
  )
  (tmp_path / "run").mkdir()
  settings.save(config, tmp_path / "run" / folders.RUN)
  model_config = config.model.config(config.data, 3)
  s = encrypted.Infer(checkpoint=str(tmp_path / "run"), calibration_images=4)
  images, source = encrypted.calibration_images(s, model_config, NAMES)
  assert (len(images), source) == (4, f"4 validation images of the run ({data})")


def test_a_model_of_colours_is_neither_tested_nor_calibrated_on_the_grey_phantom():
  with pytest.raises(ValueError, match=r"channels=3: the phantom is grey.* --data"):
    Data(channels=3)
  model_config = settings.replace(TINY, data="npz:x", channels=3)
  model_config = model_config.model.config(model_config.data, 3)
  s = encrypted.Infer(calibration="phantom")
  with pytest.raises(ValueError, match=r"calibration=phantom: .* takes 3 channels.* --calibration"):
    encrypted.calibration_images(s, model_config, NAMES)


def test_a_setting_that_this_version_lacks_is_refused_by_name(tmp_path):
  settings.save(Train(), tmp_path / folders.RUN)
  text = (tmp_path / folders.RUN).read_text()
  (tmp_path / folders.RUN).write_text(text.replace('"seed"', '"old_seed"'))
  with pytest.raises(ValueError, match=r"config\.json holds \['old_seed'\]"):
    folders.settings_of(str(tmp_path))
