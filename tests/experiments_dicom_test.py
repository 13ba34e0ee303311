"""CT windows of the programs, and what they print of DICOM files."""

import json
import logging
import warnings

import numpy as np
import pytest
from dicom_maker import RAMP, make

from experiments import inputs, model_files, starting
from experiments.configs.data import Data
from primia_jax.data import dicom, folder
from primia_jax.data.load import load

CT = dict(Modality="CT", RescaleSlope=1, RescaleIntercept=-1024)


@pytest.fixture
def hospital(tmp_path):
  for label in "ab":
    (tmp_path / "ct" / label).mkdir(parents=True)
    (tmp_path / "ct" / label / "1.dcm").write_bytes(make(**CT))
  return tmp_path / "ct"


@pytest.mark.parametrize(("window", "low", "high"), [("40,400", -160, 240), ("lung", -1350, 150)])
def test_a_window_reaches_every_way_of_reading_a_folder(window, low, high, hospital):
  config = Data(data=f"folder:{hospital}", image_size=16, ct_window=window)
  expected = 255 * np.clip((RAMP - 1024.0 - low) / (high - low), 0, 1)
  labelled = inputs.images_to_test(config)[0].images
  unlabelled = inputs.unlabelled_images(config, ("a", "b")).images
  form = {"size": 16, "channels": 1, "ct_window": config.hounsfield}
  lazy = load(config.data, lazy=True, **form)["all"].images[np.arange(2)]
  for images in (labelled, unlabelled, lazy, folder.read_images(hospital, **form)[1]):
    np.testing.assert_allclose(images[..., 0], np.stack([expected] * 2), atol=0.501)


@pytest.mark.parametrize("window", ["40", "40,0", "40,-1", "nan,400", "40,inf", "liver", "1,2,3"])
def test_a_wrong_window_is_refused_with_those_that_are_known(window):
  known = ", ".join(dicom.CT_WINDOWS)
  with pytest.raises(
    ValueError, match=f"ct_window={window} is not a window; use .* one of {known}"
  ):
    Data(data="folder:x", ct_window=window)


@pytest.mark.parametrize("data", ["phantom", "npz:x.npz", "tfds:mnist"])
def test_a_window_needs_a_folder(data):
  with pytest.raises(ValueError, match=f"ct_window='lung': data={data} holds no DICOM files"):
    Data(data=data, ct_window="lung")
  with pytest.raises(ValueError, match="ct_window='lung'"):
    Data(site_data=f"folder:x,{data}", ct_window="lung")
  if data != "phantom":
    with pytest.raises(ValueError, match=r"ct_window=\(40, 400\): .* holds no DICOM files"):
      load(data, size=8, channels=1, ct_window=(40, 400))


def test_the_window_is_kept_with_the_model(tmp_path):
  (tmp_path / "model.json").write_text(json.dumps({"ct_window": "lung"}))
  assert model_files.ct_window(str(tmp_path)) == "lung"
  (tmp_path / "model.json").write_text("{}")  # of a former version
  assert model_files.ct_window(str(tmp_path)) == ""


def test_the_log_of_pydicom_stays_off_the_terminal(monkeypatch, hospital):
  records, handler = [], logging.Handler()
  handler.emit = records.append
  monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
  monkeypatch.setattr(logging.getLogger("pydicom"), "propagate", True)
  longer = make(**CT, PixelData=RAMP.tobytes() + bytes(64))
  with warnings.catch_warnings(record=True) as seen:
    starting.silence_pydicom()
    dicom.read(longer, "x")
  assert not seen
  assert not records
