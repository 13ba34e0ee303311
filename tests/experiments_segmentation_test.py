"""Runs on images with masks, by the same programs."""

import csv
import json

import jax
import numpy as np
import pytest
from experiments_programs import call
from experiments_runs import TINY
from PIL import Image
from segmentation_test import scenes

from experiments import encrypted, found_masks, model_files, running, settings, simulated
from experiments.audits import auditing, parts
from experiments.audits.context import Context, Effort
from experiments.configs.model import normalise
from experiments.planned import Infer
from primia_jax.data import decode
from primia_jax.data.dataset import Dataset
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
  config = settings.replace(
    SMALL, data=f"npz:{write(root / 'a.npz', size=16)}", image_size=16, record_transcript=True
  )
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
  done = call("evaluate", *given)
  assert done.returncode == 0, done.stderr
  assert "mean Dice (images)" in done.stdout
  found = np.load(tmp_path / "out" / "masks.npz")["masks"]
  assert found.shape == (16, 16, 16)
  scored = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert scored["arms"]["trained"]["dice"] == result["arms"]["federated"]["dice"]
  assert "IMAGES OF PATIENTS" in (tmp_path / "out" / "report.md").read_text()
  assert (tmp_path / "out" / "overlays.png").is_file()


def test_a_run_of_masks_is_audited_by_what_applies_to_it(run, tmp_path):
  folder, out = run[0], tmp_path / "audit"
  effort = Effort(candidates=8, attacked_rounds=1, victims=3, iterations=2)
  auditing.audit(folder, out, effort, ["auto"])
  made = {path.stem: json.loads(path.read_text())["part"] for path in (out / "parts").iterdir()}
  assert set(made) == {"threats", "ledger", "bounds", "recognition", "numbers", "inversion"}
  of = {name: [parts._evidence(one) for one in part["evidence"]] for name, part in made.items()}
  assert all(one.control.value > 0.5 for one in of["recognition"])
  assert of["numbers"]
  assert all(one.value == 1 for one in of["numbers"])  # exact losses, to whoever knows all others
  assert "knows the mask" in made["inversion"]["text"][0]
  assert of["inversion"][0].protection == "none"
  assert all(one.control is not None for one in of["inversion"][1:])
  report = (out / auditing.REPORT).read_text()
  assert (
    "Left out: membership, which does not apply: this part needs a class for each image" in report
  )
  with pytest.raises(ValueError, match=r"parts=\['classes'\] do not apply to this run"):
    auditing.chosen(["classes"], Context(folder, out, effort))


def test_other_programs_refuse_a_model_of_masks(run):
  folder, _ = run
  config = model_files.load_model(str(folder))[3]
  with pytest.raises(ValueError, match=r"primia-publish takes models that classify"):
    model_files.require_classes(config, "primia-publish")
  with pytest.raises(ValueError, match="this program takes models that classify"):
    encrypted.load_model(str(folder))


@pytest.mark.parametrize(
  ("change", "told"),
  [
    ({"class_weights": True}, "--noclass_weights"),
    ({"mixup": 0.2}, "mixup=0.2"),
    ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
    ({"data": "npz:a.npz", "slices": "labelled"}, "slices='labelled' belongs to msd"),
    ({"data": "msd:a", "slices": "some"}, "slices='some'"),
    ({"data": "msd:a", "patient_column": "x"}, "one patient"),
    ({"data": "phantom"}, "model=unet learns masks, and data=phantom has none"),
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


def write_images(folder, num=2, size=8):
  """PNGs of 3 size x 2 size pixels, and the images [num, size, size, 1] that a model takes."""
  folder.mkdir()
  images, _ = scenes(num, seed=2, size=size)
  for i, image in enumerate(images):
    whole = np.kron(image[..., 0], np.ones((3, 2), np.uint8))
    Image.fromarray(whole).save(folder / f"{i}.png")
  return np.stack([decode.decode((folder / f"{i}.png").read_bytes(), "a", size=size, channels=1)
                   for i in range(num)])  # fmt: skip


@pytest.mark.slow
def test_masks_found_under_encryption_are_the_plain_ones(run, tmp_path, capsys):
  folder, _ = run
  images = write_images(tmp_path / "images", size=16)
  s = Infer(
    checkpoint=str(folder), images=str(tmp_path / "images"), output_dir=str(tmp_path / "out"),
    calibration_images=2, batch=2, ring_bits=64, fraction_bits=16, check=True,
  )  # fmt: skip
  with jax.enable_x64(True):
    simulated.infer(s)
  said = capsys.readouterr().out
  assert "model gives: yes" in said
  assert "the class of each pixel" not in said  # it is probabilities that are opened
  assert "IMAGES OF PATIENTS" in said
  model, trained, names, _ = model_files.load_model(str(folder))
  logits = np.asarray(model.apply(*trained[0], normalise(images), train=False)[0])
  plain, best = logits.argmax(-1), np.sort(logits, axis=-1)
  sure = best[..., -1] - best[..., -2] > 2e-3
  assert sure.mean() > 0.9
  for i in range(2):
    found = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{i}.png.mask.png"))
    assert found.shape == (48, 32)
    np.testing.assert_array_equal(found[1::3, 1::2][sure[i]], plain[i][sure[i]])
  with (tmp_path / "out" / "areas.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["image"] for row in rows] == ["0.png", "1.png"]
  shares = [float(row[f"share of {names[1]}"]) for row in rows]
  np.testing.assert_allclose(shares, (plain == 1).mean((1, 2)), atol=0.05)
  assert Image.open(tmp_path / "out" / "overlays.png").size[0] > 300
  assert not (tmp_path / "out" / "predictions.csv").exists()


def test_masks_of_images_are_pictures_of_their_own_size(tmp_path, capsys):
  pixels = write_images(tmp_path / "images")
  names = ("none", "bright", "dark")
  columns = {"path": np.array(["0.png", "1.png"])}
  images = Dataset(pixels, np.zeros(2, np.int32), names, np.arange(2), columns)
  s, out = Infer(images=str(tmp_path / "images")), tmp_path / "out"
  out.mkdir()
  logits = np.random.default_rng(0).normal(size=(2, 8, 8, 3))
  masks = found_masks.of(logits)
  np.testing.assert_array_equal(found_masks.of(masks.astype(float)), logits.argmax(-1))
  found_masks.show(["0.png", "1.png"], masks, names)
  assert f"{100 * (masks[0] == 2).mean():.2f} %" in capsys.readouterr().out
  said = found_masks.write(out, s, images, masks, 1)
  assert "0 is none, 1 is bright, 2 is dark" in said[0]
  assert "IMAGES OF PATIENTS" in said[1]
  for i in range(2):
    found = np.asarray(Image.open(out / "masks" / f"{i}.png.mask.png"))
    np.testing.assert_array_equal(found, masks[i].repeat(3, 0).repeat(2, 1))
  with (out / "areas.csv").open() as file:
    shares = [float(row["share of dark"]) for row in csv.DictReader(file)]
  np.testing.assert_allclose(shares, (masks == 2).mean((1, 2)), atol=1e-6)
  assert Image.open(out / "overlays.png").size[0] > 300


def test_a_wrong_pixel_shows_in_the_comparison(run, monkeypatch):
  """Of a class that differs where the float32 logits are far apart."""
  folder, _ = run
  model, weights, _, _ = encrypted.load_any(str(folder))
  images, _ = scenes(2, seed=3, size=16)
  from experiments import phases

  logits = np.asarray(model.apply(*weights, normalise(images), train=False)[0])
  monkeypatch.setattr(phases.clear, "checker", lambda plan: lambda args: logits)

  class Plan:
    class config:
      exact = True

  wrong = logits.copy()
  at = np.unravel_index((np.sort(logits, -1)[..., -1] - np.sort(logits, -1)[..., -2]).argmax(),
                        logits.shape[:-1])  # fmt: skip
  wrong[at] = -wrong[at]
  margin = np.sort(logits[at])[-1] - np.sort(logits[at])[-2]
  same = phases.compare(Plan, model, weights, images, 2, logits)
  assert (same.same, same.margin) == (512, 0.0)
  told = phases.compare(Plan, model, weights, images, 2, wrong)
  assert told.same == 511
  assert told.margin == pytest.approx(margin, rel=1e-4)
  classes = phases.compare(Plan, model, weights, images, 2, wrong.argmax(-1))
  assert classes == phases.Difference(None, 511, False, told.margin)


def test_masks_of_a_volume_are_one_file_on_its_voxels(tmp_path):
  nibabel = pytest.importorskip("nibabel")
  values = np.random.default_rng(0).normal(size=(10, 6, 5)).astype(np.float32)
  affine = np.diag([-2.0, 1.0, 5.0, 1.0])  # its first axis points to the left
  nibabel.save(nibabel.Nifti1Image(values, affine), tmp_path / "ct.nii.gz")
  s = Infer(images=str(tmp_path / "ct.nii.gz"), slices="1-3", overlays=2)
  form = ("none", "bright", "dark"), 8, 1, None
  found_masks.check(s)
  images = found_masks.volume(s, True, *form)
  assert isinstance(images, Dataset)
  assert images.columns["path"].tolist() == [f"ct.nii.gz, slice {k}" for k in (1, 2, 3)]
  masks = np.zeros((3, 8, 8), np.uint8)
  masks[1, :4, :4] = 2  # slice 2: in front, and to the patient's right
  said = found_masks.write(tmp_path, s, images, masks, 2)
  made = nibabel.load(tmp_path / "masks.nii.gz")
  assert nibabel.aff2axcodes(made.affine) == nibabel.aff2axcodes(affine)
  np.testing.assert_allclose(made.affine[2, 3], 5.0)  # of slice 1
  voxels = np.asarray(made.dataobj)
  assert voxels.shape == (10, 6, 3)
  expected = np.zeros((10, 6, 3))
  expected[:5, 3:, 1] = 2
  np.testing.assert_array_equal(voxels, expected)
  assert "bright 0.00 ml, dark 0.15 ml" in said[0]  # 15 voxels of 10 cubic millimetres
  assert (tmp_path / "overlays.png").is_file()
  with pytest.raises(ValueError, match="has the slices 0 to 4"):
    found_masks.volume(Infer(images=s.images, slices="9"), True, *form)
  with pytest.raises(ValueError, match="the model classifies images"):
    found_masks.volume(s, False, *form)


@pytest.mark.parametrize("text", ["x", "3-1", "1-2-3", "-4"])
def test_wrong_slices(text):
  with pytest.raises(ValueError, match=f"slices='{text}'; use the number of a slice"):
    found_masks.slices(text)


@pytest.mark.slow
def test_masks_are_learned_privately_and_charged(tmp_path):
  """Each image's gradient is clipped, noise is added, and the budget ends the run."""
  config = settings.replace(
    SMALL, data=f"npz:{write(tmp_path / 'a.npz')}", rounds=3, dp="example", target_epsilon=8.0,
    model="monet", width=0.1, augment="none", keep_optimizer=False, optimizer="sgd",
  )  # fmt: skip
  folder = running.open_run(config, str(tmp_path / "run"))
  result = running.run(config, folder, federated=True)
  assert "not the site itself" in result["privacy"]["protected from"]
  rows = [json.loads(line) for line in (folder / "federated" / "rounds.jsonl").open()]
  spent = [row["epsilon"] for row in rows]
  assert spent == sorted(spent)
  assert 0 < spent[0] <= spent[-1] <= 8
  assert rows[0]["train_loss"] is None  # it is not private
  assert "## Differential privacy" in (folder / "report.md").read_text()
  assert (tmp_path / "a.npz.ledger").is_dir()
