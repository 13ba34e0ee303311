"""Runs on images with masks, by the same programs."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from experiments_runs import TINY
from PIL import Image
from segmentation_test import scenes

from experiments import model_files, running, settings
from experiments.audits import auditing
from primia_jax.data.load import load

SMALL = settings.replace(
  TINY,
  data="npz:a.npz", rounds=2, num_sites=2, secagg_colluding=0, model="unet", width=0.25,
  norm="none", image_size=8, class_weights=False, augment="light",
)  # fmt: skip


def write(path, num=16, size=8, kind="masks"):
  arrays = {}
  for split, seed in (("train", 0), ("test", 1)):
    images, masks = scenes(num, seed, size)
    arrays |= {f"{split}_images": images, f"{split}_{kind}": masks}
  np.savez(path, **arrays)
  return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp("masks")
  config = settings.replace(SMALL, data=f"npz:{write(root / 'a.npz')}")
  folder = running.open_run(config, str(root / "run"))
  result = running.run(config, folder, federated=True, baselines=("pooled",))
  return folder, result


def test_a_run_learns_masks_and_reports_dice_of_each_case(run):
  folder, result = run
  assert result["case"] == "image"
  assert set(result["arms"]) == {"pooled", "federated"}
  with (folder / "dice.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 16
  of = [[float(row[f"federated: {k}"]) for k in "12"] for row in rows]
  assert result["arms"]["federated"]["dice"]["value"] == pytest.approx(np.mean(of), abs=1e-6)
  assert result["difference"]["minus"] == "pooled"
  text = (folder / "report.md").read_text()
  assert "mean Dice coefficient" in text
  assert "## Secure aggregation" in text
  assert "overlays" not in text
  assert not (folder / "overlays.png").exists()
  assert Image.open(folder / "dice.png").size[0] > 300
  lines = [json.loads(line) for line in (folder / "federated" / "rounds.jsonl").open()]
  assert {"val_mcc", "val_loss"} <= set(lines[0])


def test_evaluate_saves_masks_and_draws_patients_only_when_asked(run, tmp_path):
  folder, result = run
  given = (f"--run_dir={folder}", f"--output_dir={tmp_path / 'out'}", "--overlays=3")
  command = [sys.executable, "-m", "experiments.evaluate", *given]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "mean Dice (images)" in done.stdout
  found = np.load(tmp_path / "out" / "masks.npz")["masks"]
  assert found.shape == (16, 8, 8)
  scored = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert scored["arms"]["trained"]["dice"] == result["arms"]["federated"]["dice"]
  assert "IMAGES OF PATIENTS" in (tmp_path / "out" / "report.md").read_text()
  assert (tmp_path / "out" / "overlays.png").is_file()


def test_other_programs_refuse_a_model_of_masks(run, tmp_path):
  folder, _ = run
  with pytest.raises(ValueError, match=r"unet, which learns masks; the attacks"):
    auditing.audit(folder, tmp_path / "audit", auditing.Effort(), ["auto"])
  config = model_files.load_model(str(folder))[3]
  with pytest.raises(ValueError, match=r"primia-infer takes models that classify"):
    model_files.require_classes(config, "primia-infer")


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"class_weights": True}, "--noclass_weights"),
    ({"mixup": 0.2}, "mixup=0.2"),
    ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
    ({"data": "npz:a.npz", "slices": "labelled"}, "slices='labelled' belongs to msd"),
    ({"data": "msd:a", "slices": "some"}, "slices='some'"),
    ({"data": "msd:a", "patient_column": "x"}, "one patient"),
    ({"data": "phantom"}, "model=unet learns masks, which data=phantom has not"),
    ({"data": "msd:a", "model": "cnn", "norm": ""}, "model=cnn classifies images"),
  ],
)
def test_settings_that_do_not_go_with_masks(change, told):
  with pytest.raises(ValueError, match=told):
    settings.replace(SMALL, **change)


def test_model_and_images_must_have_one_task(tmp_path):
  masks = settings.replace(
    SMALL, model="cnn", norm="", width=1.0, data=f"npz:{write(tmp_path / 'a.npz')}"
  )
  with pytest.raises(ValueError, match=r"model=cnn classifies images, and a.npz has masks; use"):
    running.run(masks, running.open_run(masks, str(tmp_path / "a")), federated=True)
  classes = write(tmp_path / "b.npz", kind="labels")
  arrays = dict(np.load(classes))
  np.savez(classes, **{k: v[:, 0, 0] if "labels" in k else v for k, v in arrays.items()})
  plain = settings.replace(SMALL, data=f"npz:{classes}")
  with pytest.raises(ValueError, match=r"model=unet gives each pixel a class, and .* no masks"):
    running.run(plain, running.open_run(plain, str(tmp_path / "b")), federated=True)


def test_npz_masks_are_resized_to_the_nearest_class_and_checked(tmp_path):
  path = write(tmp_path / "a.npz")
  found = load(f"npz:{path}", size=16, channels=1, label_names=("none", "bright", "dark"))
  original = np.load(path)["train_masks"]
  np.testing.assert_array_equal(found["train"].masks, original.repeat(2, 1).repeat(2, 2))
  assert found["train"].labels.max() <= 2
  two = dict(np.load(path)) | {"train_labels": np.zeros(16, int)}
  np.savez(tmp_path / "b.npz", **two)
  with pytest.raises(ValueError, match="labels and masks"):
    load(f"npz:{tmp_path / 'b.npz'}", size=8, channels=1)
  some = {k: v for k, v in np.load(path).items() if k != "test_masks"}
  np.savez(tmp_path / "c.npz", **some, test_labels=np.zeros(16, int))
  with pytest.raises(ValueError, match="some splits only"):
    load(f"npz:{tmp_path / 'c.npz'}", size=8, channels=1)
  wrong = dict(np.load(path)) | {"train_masks": np.zeros((16, 4, 4), np.uint8)}
  np.savez(tmp_path / "d.npz", **wrong)
  with pytest.raises(ValueError, match="one integer for each pixel"):
    load(f"npz:{tmp_path / 'd.npz'}", size=8, channels=1)
