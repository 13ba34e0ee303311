"""Images with several labels: read, trained on through the federated path, scored and refused."""

import csv
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.metrics
from experiments_runs import TINY
from PIL import Image

from experiments import encrypted, inputs, model_files, multilabel_report, running, settings
from experiments.configs import tasks
from experiments.configs.run import rehearse
from experiments.report import Facts
from primia_jax import metrics, multilabel
from primia_jax.data import labels_csv
from primia_jax.data.dataset import Dataset
from primia_jax.data.partition import iid
from primia_jax.types import Batch

NAMES = ("Effusion", "Mass", "Nodule")


def write_table(root, num=48, apart=False):
  """A quarter of each image is bright for each finding; in NIH's form, or a column for each."""
  rng, rows = np.random.default_rng(0), []
  for i in range(num):
    there = rng.random(3) < 0.4
    image = rng.integers(0, 60, (16, 16))
    for k in np.flatnonzero(there):
      image[8 * (k // 2) : 8 * (k // 2) + 8, 8 * (k % 2) : 8 * (k % 2) + 8] += 150
    Image.fromarray(image.astype(np.uint8)).save(root / f"{i:03}.png")
    found = [name for name, yes in zip(NAMES, there, strict=True) if yes]
    labels = [int(yes) for yes in there] if apart else ["|".join(found) or "No Finding"]
    rows.append([f"{i:03}.png", *labels, i // 2])
  head = ["Image Index", *(NAMES if apart else ["Finding Labels"]), "Patient ID"]
  with (root / "Data_Entry_2017.csv").open("w", newline="") as file:
    csv.writer(file).writerows([head, *rows])
  return root / "Data_Entry_2017.csv"


@functools.cache
def config_of(path, **changes):
  return settings.replace(
    TINY, data=f"csv:{path}", csv_columns="file=Image Index,label=Finding Labels",
    patient_column="Patient ID", multi_label=True, class_weights=False, partition="iid",
    rounds=12, learning_rate=0.1, **changes,
  )  # fmt: skip


def test_both_forms_of_tables_give_the_same_labels(tmp_path):
  read = {}
  for apart in (False, True):
    root = tmp_path / str(apart)
    root.mkdir()
    columns = {"file": "Image Index"} | ({} if apart else {"label": "Finding Labels"})
    read[apart] = labels_csv.read_csv(
      write_table(root, 12, apart), size=16, channels=1, columns=columns, is_multi=not apart,
      label_columns=NAMES if apart else (),
    )["all"]  # fmt: skip
  assert read[False].label_names == read[True].label_names == NAMES
  np.testing.assert_array_equal(read[False].labels, read[True].labels)
  there = multilabel.findings(read[False].labels, 3)
  means = read[False].images.reshape(12, 2, 8, 2, 8).mean((2, 4)).reshape(12, 4)[:, :3]
  np.testing.assert_array_equal(there, means > 100)
  assert read[False].is_multi
  parts = iid(read[False], 3, 0)
  assert sorted(np.concatenate(parts).tolist()) == list(range(12))


def test_findings_are_renumbered_by_name_and_one_written_twice_counts_once(tmp_path):
  labels = np.array([0, 1, 2, 3, 4], np.int32)
  moved = multilabel.renumbered(labels, np.array([2, 0, 1]))
  np.testing.assert_array_equal(
    multilabel.findings(moved, 3), multilabel.findings(labels, 3)[:, [1, 2, 0]]
  )
  Image.new("L", (16, 16)).save(tmp_path / "a.png")
  (tmp_path / "t.csv").write_text("file,label\na.png,Mass|mass\n")
  options = {"size": 16, "channels": 1, "is_multi": True, "label_names": ("Mass", "Nodule")}
  assert labels_csv.read_csv(tmp_path / "t.csv", **options)["all"].labels.tolist() == [1]


@pytest.mark.parametrize(
  ("row", "options", "said"),
  [
    ("a.png,A|C", {"is_multi": True, "label_names": ("A", "B")}, "line 2 has the label 'C'"),
    ("a.png,2", {"label_columns": ("label",)}, "line 2 of .* has label='2'; write 1"),
    ("a.png,1", {"label_columns": ("A",)}, r"has no columns \['A'\].*mend label_columns"),
    ("a.png,A|B", {"is_multi": True, "label_names": ["x"] * 31}, "31 labels|none of x"),
    ("a.png,1", {"label_columns": ("label", "No Finding")}, "No Finding is an image with none"),
  ],
)
def test_wrong_labels_are_refused(tmp_path, row, options, said):
  Image.new("L", (16, 16)).save(tmp_path / "a.png")
  (tmp_path / "t.csv").write_text(f"file,label\n{row}\n")
  with pytest.raises(ValueError, match=said):
    labels_csv.read_csv(tmp_path / "t.csv", size=16, channels=1, **options)


def test_the_loss_and_the_errors_are_those_of_the_formula():
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(5, 3)).astype(np.float32)
  labels = np.array([0, 5, 7, 2, 1], np.int32)
  there = (labels[:, None] >> np.arange(3)) & 1
  apply = lambda params, state, images, **_: (images, state)
  weights = np.array([1, 1, 2, 1, 0], np.float32)
  batch = Batch(*map(jnp.asarray, (logits, labels, weights)))
  loss_fn = multilabel.multilabel_loss(apply, lambda key, x, y: (x, y), 3, 0.2)
  loss, (_, found) = loss_fn({}, {}, batch, jax.random.key(0))
  t, p = there * 0.8 + 0.1, 1 / (1 + np.exp(-logits.astype(np.float64)))
  of_image = -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean(1)
  assert float(loss) == pytest.approx((weights * of_image).sum() / 4, rel=1e-5)
  assert float(found.correct) == pytest.approx(((p > 0.5) == there)[:4].mean(1).sum(), rel=1e-5)
  count = multilabel.count_errors(apply, lambda x: x, 3, 2)
  sums = count({}, {}, jnp.asarray(logits), jnp.asarray(labels), 4)
  for k in range(3):
    expected = sklearn.metrics.confusion_matrix(there[:4, k], p[:4, k] > 0.5, labels=[0, 1])
    np.testing.assert_array_equal(sums["confusion"][k], expected)
  plain = -(there * np.log(p) + (1 - there) * np.log(1 - p)).mean(1)
  assert float(sums["loss"]) == pytest.approx(plain[:4].sum(), rel=1e-5)
  with pytest.raises(ValueError, match="label_smoothing=1"):
    multilabel.multilabel_loss(apply, lambda key, x, y: (x, y), 3, 1.0)


def test_average_precision_and_calibration_have_their_definitions():
  rng = np.random.default_rng(2)
  labels = rng.random(200) < 0.3
  scores = np.round(rng.random(200), 1)  # with ties
  expected = sklearn.metrics.average_precision_score(labels, scores)
  assert metrics.average_precision(labels, scores) == pytest.approx(expected, abs=1e-12)
  assert np.isnan(metrics.average_precision(np.zeros(3, bool), np.arange(3.0)))
  said = np.repeat([0.1, 0.9], 100)
  true = np.concatenate([np.arange(100) < 30, np.arange(100) < 80])
  assert metrics.binary_calibration_error(true, said) == pytest.approx(0.5 * 0.2 + 0.5 * 0.1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A federated run on a table in NIH's form."""
  root = tmp_path_factory.mktemp("nih")
  config = config_of(write_table(root))
  rehearse(config)
  folder = running.open_run(config, str(root / "run"))
  return config, folder, running.run(config, folder, federated=True)


def test_a_federation_learns_each_finding(run):
  config, folder, result = run
  of = result["arms"]["federated"]
  assert result["label_names"] == list(NAMES)
  assert all(of["of"][name]["auroc"]["value"] > 0.9 for name in NAMES)
  assert result["resampled"] == "patients"
  test = inputs.tested_images(config)
  model, trained, _, _ = model_files.load_model(str(folder))
  predict = tasks.of("mlp", True).predictor(model.apply)
  again = multilabel_report.scores(
    multilabel.findings(test.labels, 3), predict(trained, test.images)
  )
  assert again["auroc"].mean() == pytest.approx(of["mean"]["auroc"]["value"], abs=1e-6)
  rows = [json.loads(line) for line in (folder / "federated/rounds.jsonl").open()]
  assert {"val_mcc", "val_loss"} <= set(rows[-1])
  assert rows[-1]["val_loss"] < 0.7
  text = (folder / "report.md").read_text()
  assert "| Mass |" in text
  for name in multilabel_report.PICTURES:
    assert (folder / name).stat().st_size > 5_000
  with (folder / "predictions.csv").open() as file:
    assert next(csv.reader(file)) == ["image", *NAMES, *(f"true: {name}" for name in NAMES)]


def test_paths_for_one_class_an_image_refuse_it(run, tmp_path):
  config, folder, _ = run
  with pytest.raises(ValueError, match="encrypted programs take models of one class"):
    encrypted.load_model(str(folder))
  for changes, said in (
    ({"class_weights": True}, "use --noclass_weights"),
    ({"record_transcript": True}, "audits attack images of one class"),
    ({"model": "unet"}, "model=unet"),
  ):
    with pytest.raises(ValueError, match=said):
      settings.replace(config, **changes)
  dataset = inputs.tested_images(config)
  with pytest.raises(ValueError, match="set multi_label or label_columns in both or in neither"):
    tasks.check("mlp", dataset)
  with pytest.raises(ValueError, match="31 findings; 30 fit"):
    dataclasses.replace(dataset, label_names=tuple(map(str, range(31))))


def test_an_absent_finding_is_undefined_and_left_out_of_means(tmp_path):
  rng = np.random.default_rng(3)
  labels = rng.integers(0, 2, 30).astype(np.int32)  # never the second finding
  test = Dataset(
    np.zeros((30, 2, 2, 1), np.uint8), labels, ("a", "b"), np.arange(30), is_multi=True, name="t"
  )
  p = rng.random((30, 2))
  result = multilabel_report.write(tmp_path, "T", test, {"x": p}, "x", 0, Facts({}, {}))
  of = result["arms"]["x"]
  assert of["mean"]["auroc"]["value"] == pytest.approx(metrics.roc_auc(labels == 1, p[:, 0]))
  assert (
    json.loads((tmp_path / "metrics.json").read_text())["arms"]["x"]["of"]["b"]["auroc"]["value"]
    is None
  )
  assert "undefined" in (tmp_path / "report.md").read_text()
