"""Subgroups in reports: of a CSV's columns, of sites, and of classes; with floors, and refused."""

import csv
import dataclasses
import json
import re

import numpy as np
import pytest
from experiments_programs import call
from experiments_runs import TINY
from PIL import Image

from experiments import inputs, report, running, settings, subgroup_tables
from experiments.configs import Train
from experiments.configs.comparison import Comparison
from primia_jax import subgroups
from primia_jax.data.dataset import Dataset
from primia_jax.disclosure import Policy

COLUMNS = "sex,age:0:18:65:200"


def write_table(root, num=120):
  """Bright images are ill, but for every other man, whose label is wrong; two thirds are of men."""
  root.mkdir()
  rng, rows = np.random.default_rng(0), []
  for i in range(num):
    is_bright, sex = rng.random() < 0.5, "FMM"[i % 3]
    label = is_bright ^ (sex == "M" and i % 2 == 0)
    Image.fromarray(rng.integers(0, 80, (16, 16), np.uint8) + 150 * is_bright).save(
      root / f"{i}.png"
    )
    split = "train" if i < num // 2 else "test"
    age = "" if i % 10 == 0 else str(10 * (i % 9))
    rows.append([f"{i}.png", ("well", "ill")[label], split, sex, age, f"clinic {i % 2}"])
  with (root / "t.csv").open("w", newline="") as file:
    csv.writer(file).writerows([["file", "label", "split", "sex", "age", "site"], *rows])
  return root / "t.csv"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run on a table: (its folder, the table, its report)."""
  root = tmp_path_factory.mktemp("run")
  table = write_table(root / "data")
  config = settings.replace(
    TINY, data=f"csv:{table}", num_sites=2, subgroups="sex", learning_rate=0.05
  )
  folder = running.open_run(config, str(root / "run"), "train_pooled")
  return folder, table, running.run(config, folder, federated=False)


def test_a_training_compares_columns_and_sites_of_its_test_images(run):
  folder, _, result = run
  assert list(result["subgroups"]) == ["sex", "site"]
  counts = {k: of["images"] for k, of in result["subgroups"]["site"]["subgroups"].items()}
  assert counts == {"clinic 0": 30, "clinic 1": 30}
  text = (folder / "report.md").read_text()
  assert re.search(r"^\| sex \| images \| accuracy \(%\) \| MCC \|$", text, re.M)
  assert re.search(
    r"^\| gap between classes \(points\) \| .* \(best (well|ill), worst (well|ill)\) \|$",
    text,
    re.M,
  )


def test_evaluate_compares_subgroups_by_columns_of_the_table(run, tmp_path):
  folder, table, _ = run
  done = call(
    "evaluate", f"--run_dir={folder}", f"--output_dir={tmp_path}", f"--subgroups={COLUMNS}"
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "metrics.json").read_text())
  with table.open() as file:
    facts = {row["file"]: row for row in csv.DictReader(file)}
  with (tmp_path / "predictions.csv").open() as file:
    _, *lines = csv.reader(file)
  right = {sex: [] for sex in "FM"}
  for name, true, said, *_ in lines:
    right[facts[name]["sex"]].append(true == said)
  found = result["subgroups"]["sex"]["subgroups"]
  for sex, answers in right.items():
    assert found[sex]["images"] == len(answers)
    assert found[sex]["accuracy"]["value"] == pytest.approx(np.mean(answers))
  gap = result["subgroups"]["sex"]["largest gap"]["accuracy"]
  assert (gap["best"], gap["worst"]) == ("F", "M")
  assert gap["value"] == pytest.approx(np.mean(right["F"]) - np.mean(right["M"]))
  assert gap["value"] > 0.3
  ages = result["subgroups"]["age"]["subgroups"]
  assert list(ages) == ["0 to below 18", "18 to below 65", "65 to below 200", "not given"]
  sensitivities = [x["value"] for x in result["arms"]["trained"]["sensitivity"].values()]
  assert result["arms"]["trained"]["class_gap"]["value"] == pytest.approx(np.ptp(sensitivities))
  text = (tmp_path / "report.md").read_text()
  shown = found["M"]["accuracy"]
  cell = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * shown[k] for k in ("value", "low", "high")))
  assert f"| M | {len(right['M'])} | {cell} |" in text
  assert f"Largest gap in accuracy (points): {100 * gap['value']:.1f} [" in text


def test_floors_hold_for_subgroups_and_gaps(run, tmp_path):
  folder, _, _ = run
  said = f"--subgroups={COLUMNS}", "--fewest_patients=7"
  done = call("evaluate", f"--run_dir={folder}", f"--output_dir={tmp_path}", *said)
  assert done.returncode == 0, done.stderr
  found = json.loads((tmp_path / "metrics.json").read_text())["subgroups"]
  hidden = "suppressed (<7)"
  of_age = {k: of["images"] for k, of in found["age"]["subgroups"].items()}
  assert of_age["not given"] == hidden  # 6, which all others and the total would tell
  assert list(of_age.values()).count(hidden) == 2
  assert (
    "| not given | suppressed (<7) | suppressed (<7) | suppressed (<7) |"
    in (tmp_path / "report.md").read_text()
  )


@pytest.mark.parametrize(
  ("flag", "said"),
  [
    ("sex,ward", "test images of 't.csv' have no column 'ward'; their columns are age, file"),
    ("path", "column path has 60 values, more than 20; take a column with fewer"),
    ("age:0:18:65:200,age", "names 'age' twice"),
    ("site:0:1", "column site has the value 'clinic 0', which is not a number"),
  ],
)
def test_wrong_subgroups_are_refused_before_work(run, tmp_path, flag, said):
  done = call("evaluate", f"--run_dir={run[0]}", f"--output_dir={tmp_path}", f"--subgroups={flag}")
  assert done.returncode == 1
  assert said in done.stderr
  assert "subgroups" in done.stderr
  assert not list(tmp_path.iterdir())


def test_no_subgroups_where_a_report_has_none():
  for changes in ({"model": "unet", "data": "npz:x"}, {"data": "csv:x", "multi_label": True}):
    with pytest.raises(ValueError, match=r"subgroups='sex' with .*leave it out"):
      settings.replace(Train(), subgroups="sex", class_weights=False, **changes)
  assert settings.replace(Train(), subgroups="site").comparison.subgroups == "site"
  for text in ("age:18", "age:18:0", "age:0:inf", "age:0:x", ":0:1"):
    with pytest.raises(ValueError, match="subgroups="):
      Comparison(text)
  assert Comparison(COLUMNS).columns() == {"sex": (), "age": (0, 18, 65, 200)}


def test_sites_with_sources_of_their_own_are_compared(tmp_path):
  tables = [write_table(tmp_path / name, num=24) for name in ("a", "b")]
  for table in tables:
    rows = [row[:-1] for row in csv.reader(table.open())]
    with table.open("w", newline="") as file:
      csv.writer(file).writerows(rows)
  where = ",".join(f"csv:{table}" for table in tables)
  config = settings.replace(TINY, site_data=where, num_sites=2, allow_overlap=True)
  test = inputs.site_images(config).test
  of = subgroup_tables.of_images({}, test)["site"]
  assert of.names == ("site 0", "site 1")
  assert np.bincount(of.of).tolist() == [12, 12]


def test_many_sites_are_not_compared_unasked():
  none = np.zeros(21, np.int32)
  images = Dataset(np.zeros((21, 1, 1, 1), np.uint8), none, ("w",), none, {"site": np.arange(21)})
  assert subgroup_tables.of_images({}, images) == {}
  one = dataclasses.replace(images, columns={"site": none})
  assert subgroup_tables.of_images({}, one) == {}
  assert subgroup_tables.of_images({"site": ()}, one)["site"].names == ("0",)


def test_a_report_of_suppressed_classes_has_no_gap_between_them(tmp_path):
  labels = np.repeat([0, 1], 40)
  said = np.where(np.arange(80) % 40 < 4, 1 - labels, labels)  # 4 errors of each class
  arm = report.Arm(labels, np.where(np.eye(2)[said] == 1, 0.8, 0.2))
  of = {"half": subgroups.Members(("x", "y"), np.arange(80) % 2)}
  for floor, told in ((0, "0.0 ["), (5, "suppressed (<5)")):
    result = report.write_report(
      tmp_path, title="A run", data_name="made", arms={"trained": arm}, label_names=("w", "i"),
      facts=report.Facts({}, policy=Policy(fewest_patients=floor)), main_arm="trained", compared=of,
    )  # fmt: skip
    assert f"| gap between classes (points) | {told}" in (tmp_path / "report.md").read_text()
    assert (result["subgroups"]["half"]["largest gap"]["accuracy"] is None) == (floor == 5)
