"""`evaluate_encrypted` on a tiny model: the same counts as `evaluate`, and no label queries."""

import json
import stat

import experiments_programs as programs
import numpy as np
import pytest
from experiments_runs import write_untrained

from experiments import encrypted, inputs, model_files, registers, running, scored, settings
from experiments.configs import Train
from experiments.configs.data import Data
from experiments.configs.model import normalise
from primia_jax import evaluation, metrics

NAMES = ("normal", "bacterial", "viral")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return write_untrained(tmp_path_factory.mktemp("run"), NAMES)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
  """90 labelled images as the hospital has them, 16 x 16."""
  data = inputs.images_to_test(Data(data="phantom", image_size=16), 5)[0]
  path = tmp_path_factory.mktemp("images") / "images.npz"
  images, labels = np.asarray(data.images[:90]), np.asarray(data.labels[:90])
  np.savez(path, test_images=images[..., 0], test_labels=labels)
  return path, images, labels


def expected(checkpoint, images, labels):
  model, trained, _, _ = model_files.load_model(str(checkpoint))
  likely = evaluation.predictor(model.apply, normalise)(trained, images)
  return np.asarray(metrics.confusion_matrix(labels, likely.argmax(1), 3)).astype(int)


def flags_of(checkpoint, archive, folder, **more):
  given = {
    "checkpoint": checkpoint, "data": f"npz:{archive[0]}", "label_names": ",".join(NAMES),
    "vendor_dir": folder / "vendor", "hospital_dir": folder / "hospital", "batch": 25,
    "calibration": "phantom", "calibration_images": 25, "ring_bits": 32, "fraction_bits": 10,
    "margin": 4, "output_dir": folder / "out", **more,
  }  # fmt: skip
  return [f"--{name}={value}" for name, value in given.items()]


def call(*arguments):
  return programs.call("evaluate_encrypted", *arguments)


def test_the_binary_counts_as_evaluate_does_and_refuses_to_count_again(
  checkpoint, archive, tmp_path
):
  done = call(*flags_of(checkpoint, archive, tmp_path), "--check")
  assert done.returncode == 0, done.stderr
  for text in ("simulated", "Who learns what", "90 queries charged", "to the hospital alone",
               "integer model: yes", "to the last count: yes"):  # fmt: skip
    assert text in done.stdout
  found = json.loads((tmp_path / "out" / "score.json").read_text())
  assert found["rows"] == found["columns"] == list(NAMES)
  assert found["runs"] == 4
  np.testing.assert_array_equal(found["counts"], expected(checkpoint, *archive[1:]))
  for folder in ("vendor", "hospital", "out"):
    assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
  for path in (tmp_path / "out").iterdir():
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
  again = call(*flags_of(checkpoint, archive, tmp_path, output_dir=tmp_path / "again"))
  assert again.returncode == 1
  assert "90 of 90 images are in an earlier result of this model" in again.stderr
  assert not (tmp_path / "again").exists()


def test_accuracy_is_one_bit(checkpoint, archive):
  """The parts of the binary without its process."""
  _, images, labels = archive
  s = scored.Score(
    checkpoint=str(checkpoint), opened="accuracy", batch=30, ring_bits=32, fraction_bits=10,
    margin=4.0, vendor_dir="v", hospital_dir="h", threshold=0.5,
  )  # fmt: skip
  scored.check(s)
  model, weights, names, _ = encrypted.load_model(s.checkpoint)
  data = inputs.images_to_test(
    Data(data=f"npz:{archive[0]}", image_size=16, label_names=",".join(NAMES)), 0, names
  )[0]
  work = scored.task(s, model, data, [f"{i}" for i in range(90)])
  plan = scored.make_plan(s, work, model, weights, images)
  right = np.trace(expected(checkpoint, images, labels))
  result = scored.run(plan, s, work, weights, images)
  assert result.counts is None
  assert result.bit is bool(right >= 45)


@pytest.mark.parametrize(
  ("threshold", "num", "least"), [(0.7, 10, 7), (0.701, 10, 8), (1, 624, 624)]
)
def test_the_threshold_in_images(threshold, num, least):
  assert scored.least_right(scored.Score(threshold=threshold), num) == least


# ---- the register


IMAGES = np.arange(12 * 4, dtype=np.uint8).reshape(12, 2, 2, 1)


def test_an_image_is_in_one_result_of_a_model_only(tmp_path):
  marks = registers.marks(tmp_path / "hospital", IMAGES)
  charge = lambda model, images, budget=100: registers.charge(
    tmp_path / "vendor", model, "the confusion matrix", images, budget
  )
  assert charge("a", marks[:6]) == 94
  assert charge("a", marks[6:11]) == 89
  with pytest.raises(ValueError, match="1 of 2 images are in an earlier result"):
    charge("a", marks[10:])
  assert charge("b", marks) == 88  # another model
  with pytest.raises(ValueError, match=r"query_budget=11: 11 of it are spent, and 1 images"):
    charge("a", marks[11:], 11)
  assert charge("a", marks[11:]) == 88


def test_whoever_learns_the_results_of_two_models_gets_no_label_from_them(tmp_path):
  """The sums of a matrix's rows do not depend on the model: those of two sets of images that differ
  by one tell its class.
  """
  charge = lambda model, images, learner: registers.charge(tmp_path, model, "", images, 9, learner)
  charge("a", ["x", "y"], "vendor")
  with pytest.raises(ValueError, match="1 of 1 images are in an earlier result of this vendor"):
    charge("b", ["x"], "vendor")
  assert charge("b", ["x"], "") == 8  # nobody but the hospital learns it
  assert charge("b", ["z"], "vendor") == 7


def test_copies_are_charged_each(tmp_path):
  assert registers.charge(tmp_path, "a", "", ["x", "x", "y"], 3) == 0


def test_marks_are_the_hospitals_alone(tmp_path):
  """The same image has the same mark under one key, and another one under another key."""
  first = registers.marks(tmp_path / "one", IMAGES)
  assert first == registers.marks(tmp_path / "one", IMAGES)
  assert len(set(first)) == 12
  assert not set(first) & set(registers.marks(tmp_path / "two", IMAGES))
  assert stat.S_IMODE((tmp_path / "one" / "key").stat().st_mode) == 0o600
  (tmp_path / "one" / "key").write_bytes(b"short")
  with pytest.raises(ValueError, match="key is damaged"):
    registers.marks(tmp_path / "one", IMAGES)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 2}', '{"format": 1}'])
def test_a_damaged_register_is_no_empty_one(tmp_path, text):
  (tmp_path / "register.json").write_text(text)
  with pytest.raises(ValueError, match=r"register\.json is damaged"):
    registers.charge(tmp_path, "a", "", ["x"], 3)


def test_a_model_is_known_by_its_weights():
  weights = {"a": np.ones(3, np.float32), "b": np.zeros(2)}
  digest = registers.model_digest(weights)
  assert digest == registers.model_digest({"b": np.zeros(2), "a": np.ones(3, np.float32)})
  assert digest != registers.model_digest({**weights, "b": np.array([0.0, 1e-9])})


@pytest.mark.slow
@pytest.mark.real_data
def test_all_624_xrays_are_counted_as_evaluate_counts_them(real_data, tmp_path):
  """After a short training; the ring is chosen by the logits' error, as by default."""
  data = f"folder:{real_data / 'chest_xray_224.tar'}"
  train = settings.replace(
    Train(), data=data, image_size=32, norm="batch", augment="light", rounds=2, sync_epochs=1,
    batch_size=32, optimizer="sgd", learning_rate=0.05, allow_overlap=True,
  )  # fmt: skip
  folder = running.open_run(train, str(tmp_path / "run"))
  running.run(train, folder, federated=False)
  done = call(
    f"--checkpoint={folder}", f"--data={data}", f"--vendor_dir={tmp_path / 'vendor'}", "--check",
    f"--hospital_dir={tmp_path / 'hospital'}", f"--output_dir={tmp_path / 'out'}",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "integer model: yes" in done.stdout
  found = json.loads((tmp_path / "out" / "score.json").read_text())
  arm = json.loads((folder / "metrics.json").read_text())["arms"]["pooled"]
  assert found["images"] == 624
  assert found["counts"] == arm["confusion_matrix"]
