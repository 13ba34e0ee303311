"""The parts of `infer_encrypted` on a tiny run, and the binary itself as a clinic calls it."""

import csv
import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from experiments_programs import call
from experiments_runs import TINY, images_of
from PIL import Image

from experiments import encrypted, inputs, model_files, phases, running, settings, unfinished
from experiments.configs import Train
from experiments.configs.data import Data
from experiments.configs.model import normalise
from primia_jax import evaluation
from primia_jax.mpc import multiprocess, pricing

TRAIN = settings.replace(TINY, rounds=1, placement="scan")
NAMES = ("normal", "bacterial", "viral")
IDS = ["a.png", "deep/c.png", "deep/d.jpg"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
  folder = running.open_run(TRAIN, str(tmp_path_factory.mktemp("run") / "run"))
  running.run(TRAIN, folder, federated=True)
  return folder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("images")
  (folder / "deep").mkdir()
  for name, image in zip(IDS, images_of(TRAIN.data, TRAIN.hospitals, 0).test.images, strict=False):
    Image.fromarray(np.kron(image[..., 0], np.ones((2, 2), np.uint8))).save(folder / name)
  return folder


@pytest.fixture(scope="module")
def flags_of(run_folder, image_folder):
  return encrypted.Infer(checkpoint=str(run_folder), images=str(image_folder), calibration_images=4)


@pytest.fixture(scope="module")
def in_the_clear(run_folder, image_folder):
  """The images, and the probabilities of `evaluate`, without x64."""
  assert not jax.config.jax_enable_x64
  model, trained, names, _ = model_files.load_model(str(run_folder))
  data = Data(data=f"folder:{image_folder}", image_size=16)
  dataset = inputs.unlabelled_images(data, names)
  assert list(dataset.columns["path"]) == IDS
  return dataset.images, evaluation.predictor(model.apply, normalise)(trained, dataset.images)


def _softmax(logits):
  e = np.exp(logits - logits.max(1, keepdims=True))
  return e / e.sum(1, keepdims=True)


def _infer(s, images):
  encrypted.check(s)
  model, weights, names, config = encrypted.load_model(s.checkpoint)
  calibration, source = encrypted.calibration_images(s, config, names)
  assert calibration.dtype == np.uint8
  assert source == f"{s.calibration_images} validation images of the run (phantom)"
  plan = encrypted.make_plan(s, model, weights, calibration)
  result = phases.infer(plan, weights, images, s.batch)
  return plan, result, phases.compare(plan, model, weights, images, s.batch, result.outputs)


def test_probabilities_are_those_of_evaluate_within_the_target(flags_of, in_the_clear):
  images, wanted = in_the_clear
  s = dataclasses.replace(flags_of, batch=2, target_error=1e-3)
  with jax.enable_x64(True):
    plan, result, difference = _infer(s, images)
    rows = pricing.rows(plan.circuit)
  assert result.outputs.shape == (3, 3)
  assert result.outputs.dtype == np.float32
  assert difference == phases.Difference(difference.largest, 3, True)
  assert difference.largest <= 1e-3
  np.testing.assert_allclose(_softmax(result.outputs), wanted, atol=1e-3)
  assert result.runs == 2
  assert {
    "encode weights",
    "blind",
    "publish",
    "encode images",
    "deal",
    "prepare",
    "online",
    "compile",
  } == set(result.seconds)
  layers = phases.layers(plan, rows, result)
  for name in ("dealt", "sent", "rounds"):  # each layer's own rounds; together they take fewer
    assert sum(getattr(layer, name) for layer in layers) == sum(getattr(row, name) for row in rows)
  assert sum(layer.seconds for layer in layers) == pytest.approx(result.seconds["online"] / 2)
  assert [step for layer in layers for step in layer.steps] == [row.what for row in rows]

  kept, took = unfinished.Kept(None), {("online", phases.WHOLE): 100.0, ("online", -1): 100.0}
  kept.add(unfinished.Run(np.full((2, 3), 7.0, np.float32), took))  # of an earlier process
  with jax.enable_x64(True):
    again = phases.infer(plan, encrypted.load_model(s.checkpoint)[1], images, s.batch, kept)
  np.testing.assert_array_equal(again.outputs, [*np.full((2, 3), 7.0), result.outputs[2]])
  assert again.runs == 2
  assert again.seconds["online"] > 100 > result.seconds["online"]


def test_unused_validation_images_of_a_private_run_do_not_make_a_plan(flags_of, tmp_path):
  """A plan tells the data owner the range of every layer on them."""
  s = dataclasses.replace(flags_of, checkpoint=str(tmp_path))
  _, _, names, config = encrypted.load_model(flags_of.checkpoint)
  for validation in ("auto", "exact"):
    run = settings.replace(TRAIN, dp="example", noise_multiplier=1.0, validation=validation)
    settings.save(run, tmp_path / "config.json")
    if validation == "auto":
      with pytest.raises(ValueError, match=r"dp=example .* images are unused.* --calibration"):
        encrypted.calibration_images(s, config, names)
    else:
      assert len(encrypted.calibration_images(s, config, names)[0]) == 4


def test_a_run_that_held_nothing_out_makes_a_plan_of_what_it_trained_on(flags_of, tmp_path):
  run = settings.replace(TRAIN, validation="none", validation_fraction=0.0)
  settings.save(run, tmp_path / "config.json")
  _, _, names, config = encrypted.load_model(flags_of.checkpoint)
  s = dataclasses.replace(flags_of, checkpoint=str(tmp_path))
  images, source = encrypted.calibration_images(s, config, names)
  assert source == "4 training images of the run (phantom)"
  trained_on = {
    image.tobytes() for image in np.asarray(inputs.site_images(run).train.dataset.images)
  }
  assert {image.tobytes() for image in images} <= trained_on


@pytest.mark.parametrize("exact", [True, False])
def test_a_label_is_the_argmax_and_all_that_is_revealed(flags_of, in_the_clear, exact):
  images, wanted = in_the_clear
  s = dataclasses.replace(
    flags_of, output="label", batch=3, ring_bits=48, fraction_bits=14, exact=exact
  )
  with jax.enable_x64(True):
    plan, result, difference = _infer(s, images)
  assert (plan.config.num_bits, plan.config.fraction_bits, plan.config.exact) == (48, 14, exact)
  assert [v.shape for v in plan.circuit.outputs] == [(3,)]
  np.testing.assert_array_equal(result.outputs, wanted.argmax(1))
  assert difference == phases.Difference(None, 3, True if exact else None)


def test_an_open_choice_reaches_the_target(flags_of):
  model, weights, names, config = encrypted.load_model(flags_of.checkpoint)
  with jax.enable_x64(True):
    calibration, _ = encrypted.calibration_images(flags_of, config, names)
    plan = lambda **change: encrypted.make_plan(
      dataclasses.replace(flags_of, **change), model, weights, calibration
    )
    assert plan(ring_bits=32, target_error=0.1).config.num_bits == 32
    assert plan(fraction_bits=18).config.num_bits == 64
    with pytest.raises(ValueError, match="no ring reaches target_error=1e-05"):
      plan(ring_bits=24, target_error=1e-5)
    with pytest.raises(ValueError, match="use a wider ring"):
      plan(ring_bits=16, fraction_bits=7)


@pytest.mark.parametrize("calibration", ["phantom", "folder"])
def test_calibrates_on_other_images(flags_of, image_folder, calibration):
  _, _, names, config = encrypted.load_model(flags_of.checkpoint)
  where = f"folder:{image_folder}" if calibration == "folder" else calibration
  s = dataclasses.replace(flags_of, calibration=where)
  images, source = encrypted.calibration_images(s, config, names)
  assert images.shape == (min(4, 3 if calibration == "folder" else 600), 16, 16, 1)
  assert source == f"{len(images)} images of {where}"


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("lan", (0.0005, 1e9)),
    ("wan", (0.04, 1e8)),
    ("40,100", (0.04, 1e8)),
    ("0.5, 1000", (5e-4, 1e9)),
  ],
)
def test_networks(text, expected):
  assert encrypted.parse_network(text) == pytest.approx(expected)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"checkpoint": ""}, "checkpoint is empty"),
    ({"checkpoint": "nowhere"}, r"checkpoint=nowhere holds no model\.json"),
    ({"images": ""}, "images is empty"),
    ({"images": "run", "checkpoint": __file__}, "is a checkpoint without images"),
    ({"images": "nowhere.png"}, r"images=nowhere\.png: there is no such file"),
    ({"output": "logits"}, "output='logits'; use probabilities or label"),
    ({"comparison": "garbled"}, "comparison='garbled'; use tables or fss"),
    ({"ring_bits": 7}, "ring_bits=7; use 8 to 64"),
    ({"ring_bits": 65}, "ring_bits=65"),
    ({"ring_bits": 32, "fraction_bits": 16}, "fraction_bits=16; use 1 to 15"),
    ({"target_error": 0.0}, "target_error=0.0; use a positive number"),
    ({"batch": 0}, "batch=0; use a positive number"),
    ({"calibration_images": -1}, "calibration_images=-1"),
    ({"margin": 0.5}, "margin=0.5; use at least 1"),
    ({"calibration": "train"}, "calibration='train'; use run, phantom"),
    ({"calibration": "folder:"}, "calibration='folder:'"),
    ({"network": "5g"}, "network='5g'; use lan, wan"),
    ({"network": "40"}, "network='40'"),
    ({"network": "40,0"}, "network='40,0'"),
    ({"network": "nan,1"}, "network='nan,1'"),
    ({"output_dir": __file__}, "is a file"),
  ],
)
def test_wrong_flags_are_refused_before_work(flags_of, change, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    encrypted.check(dataclasses.replace(flags_of, **change))


def test_a_folder_of_the_name_that_means_the_test_images_is_refused(
  flags_of, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  s = dataclasses.replace(flags_of, images="run")
  encrypted.check(s)
  (tmp_path / "run").mkdir()
  with pytest.raises(ValueError, match=r"write --images=\./run"):
    encrypted.check(s)


def test_the_data_of_a_run_may_be_gone(flags_of, tmp_path):
  _, _, names, config = encrypted.load_model(flags_of.checkpoint)
  settings.save(settings.replace(TRAIN, data="folder:/nowhere"), tmp_path / "config.json")
  s = dataclasses.replace(flags_of, checkpoint=str(tmp_path))
  with pytest.raises(ValueError, match="name other images with --calibration"):
    encrypted.calibration_images(s, config, names)


def test_the_model_of_a_run_of_the_former_format_is_still_taken(flags_of, tmp_path):
  """Its config.json was one flat record without a format; only its images must be named anew."""
  shutil.copytree(flags_of.checkpoint, tmp_path / "old")
  (tmp_path / "old" / "config.json").write_text(json.dumps(settings.flat(TRAIN)))
  s = dataclasses.replace(flags_of, checkpoint=str(tmp_path / "old"), calibration="phantom")
  encrypted.check(s)
  _, _, names, config = encrypted.load_model(s.checkpoint)
  assert len(encrypted.calibration_images(s, config, names)[0]) == 4
  with pytest.raises(ValueError, match=r"format 1.*name other images with --calibration"):
    encrypted.calibration_images(dataclasses.replace(s, calibration="run"), config, names)


def test_personal_models_are_refused(flags_of, tmp_path):
  _, trained, _, _ = model_files.load_model(flags_of.checkpoint)
  model_files.save_model(tmp_path / "model", trained * 2)
  (tmp_path / "model.json").write_text(
    (pathlib.Path(flags_of.checkpoint) / "model.json").read_text()
  )
  with pytest.raises(ValueError, match="holds 2 personal models"):
    encrypted.load_model(str(tmp_path))


def _binary(*arguments):
  return call("infer_encrypted", *arguments)


def test_the_binary_as_a_clinic_calls_it(flags_of, in_the_clear, tmp_path):
  out = tmp_path / "out"
  done = _binary(
    f"--checkpoint={flags_of.checkpoint}",
    f"--images={flags_of.images}",
    "--check",
    f"--output_dir={out}",
    "--calibration_images=4",
    "--ring_bits=32",
    "--fraction_bits=10",
    "--network=10,50",
  )
  assert done.returncode == 0, done.stderr
  for text in (
    "simulated",
    "Who learns what",
    "once per",
    "10 ms and 50 Mbit/s",
    "3 of 3 images",
    "model gives: yes",
  ):
    assert text in done.stdout
  plan_text = (out / "plan.txt").read_text()
  assert plan_text in done.stdout
  _, wanted = in_the_clear
  with (out / "predictions.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [row["image"] for row in rows] == IDS
  assert [row["predicted"] for row in rows] == [NAMES[i] for i in wanted.argmax(1)]
  got = [[float(row[f"probability {name}"]) for name in NAMES] for row in rows]
  np.testing.assert_allclose(got, wanted, atol=0.02)

  costs = json.loads((out / "costs.json").read_text())
  model, weights, names, config = encrypted.load_model(flags_of.checkpoint)
  calibration, _ = encrypted.calibration_images(flags_of, config, names)
  with jax.enable_x64(True):
    plan = encrypted.make_plan(
      dataclasses.replace(flags_of, ring_bits=32, fraction_bits=10), model, weights, calibration
    )
  planned = [json.loads(json.dumps(row._asdict())) for row in pricing.rows(plan.circuit)]
  assert costs["steps"] == planned
  phases = {phase["phase"]: phase for phase in costs["phases"]}
  assert phases["online"]["bytes"] == sum(row["sent"] for row in planned)
  assert phases["online"]["rounds"] == len(multiprocess.sizes(plan))
  assert phases["online"]["rounds"] == pricing.total(plan.circuit).rounds
  assert phases["deal"]["bytes"] == sum(row["dealt"] for row in planned)
  assert costs["network"]["online_seconds"] == pytest.approx(
    0.01 * phases["online"]["rounds"] + 8 * phases["online"]["bytes"] / 50e6
  )


def test_the_binary_fails_with_the_reason_alone(flags_of, tmp_path):
  (tmp_path / "notes.txt").touch()
  done = _binary(f"--checkpoint={flags_of.checkpoint}", f"--images={tmp_path / 'notes.txt'}")
  assert done.returncode == 1
  assert done.stderr.startswith("error:")
  assert "notes.txt is not an image" in done.stderr


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("output", encrypted.OUTPUTS)
def test_every_real_test_image_gets_the_class_of_float32(real_data, tmp_path, output):
  """All 624 test X-rays through the protocol, after a short training."""
  data = f"folder:{real_data / 'chest_xray_224.tar'}"
  train = settings.replace(
    Train(),
    data=data,
    image_size=32,
    norm="batch",
    augment="light",
    rounds=2,
    sync_epochs=1,
    batch_size=32,
    optimizer="sgd",
    learning_rate=0.05,
  )
  folder = running.open_run(train, str(tmp_path / "run"))
  running.run(train, folder, federated=False)
  s = encrypted.Infer(
    checkpoint=str(folder), images=str(folder), output=output, batch=48, calibration_images=96
  )
  encrypted.check(s)
  model, weights, names, config = encrypted.load_model(s.checkpoint)
  calibration, _ = encrypted.calibration_images(s, config, names)
  images = inputs.images_to_test(Data(data=data, image_size=32), 0, names)[0].images
  assert len(images) == 624
  with jax.enable_x64(True):
    plan = encrypted.make_plan(s, model, weights, calibration)
    result = phases.infer(plan, weights, images, s.batch)
    found = phases.compare(plan, model, weights, images, s.batch, result.outputs)
  assert found.same == 624
  assert found.bitwise
