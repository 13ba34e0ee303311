"""Which images a trained model is tested on, and where results go: one program never writes over
another's.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from experiments_programs import call
from experiments_runs import NAMES, TINY, write_folder, write_npz

from experiments import folders, inputs, running, settings
from experiments.configs.data import Data

SMALL = settings.replace(TINY, rounds=1, keep_optimizer=False, num_sites=2, secagg_colluding=0)


def test_classes_are_matched_by_name_whatever_their_order(tmp_path):
  """An npz file whose numbers mean owl, cat, dog has the labels of the model's cat, dog, owl."""
  as_model = Data(data=f"npz:{write_npz(tmp_path / 'a.npz')}", image_size=16)
  wanted, _ = inputs.images_to_test(as_model, label_names=NAMES)
  other = write_npz(tmp_path / "b.npz", order=(1, 2, 0))
  given = Data(data=f"npz:{other}", image_size=16, label_names="owl,Cat,dog")
  got, _ = inputs.images_to_test(given, label_names=NAMES)
  np.testing.assert_array_equal(got.labels, wanted.labels)
  assert got.label_names == NAMES
  folder = dataclasses.replace(given, data=f"folder:{write_folder(tmp_path / 'c')}")
  got, _ = inputs.images_to_test(folder, label_names=NAMES)
  assert sorted(zip(got.columns["folder"], got.labels.tolist(), strict=True)) == sorted(
    ("", k) for k in range(3) for _ in range(6)
  )
  unknown = dataclasses.replace(given, label_names="owl,cat,fox")
  with pytest.raises(ValueError, match=r"'fox' of npz:.* known classes \('cat', 'dog', 'owl'\)"):
    inputs.images_to_test(unknown, label_names=NAMES)
  with pytest.raises(ValueError, match=r"'normal' of phantom, .*'viral' of .* are none of .*'cat'"):
    inputs.images_to_test(Data(image_size=16), label_names=NAMES)


@pytest.mark.parametrize(
  ("splits", "count", "has_test"),
  [(("train",), 18, False), (("train", "val"), 36, False), (("train", "test"), 18, True)],
)
def test_all_images_are_scored_where_there_is_no_test_split(tmp_path, splits, count, has_test):
  data = Data(data=f"folder:{write_folder(tmp_path, splits)}", image_size=16)
  dataset, found = inputs.images_to_test(data, label_names=NAMES)
  assert (len(dataset), found) == (count, has_test)
  assert len(set(dataset.columns["path"])) == count
  npz = Data(data=f"npz:{write_npz(tmp_path / 'a.npz')}", image_size=16)
  assert len(inputs.images_to_test(npz)[0]) == 18


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run on a folder without splits: (its folder, its data, its report)."""
  root = tmp_path_factory.mktemp("run")
  data = write_folder(root / "data")
  config = settings.replace(SMALL, data=f"folder:{data}", image_size=16, partition="iid")
  folder = running.open_run(config, str(root / "run"), "train_pooled")
  return folder, data, running.run(config, folder, federated=False)


def program(name, *flags):
  return call(name, *(f"--{flag}" for flag in flags))


def test_without_data_a_model_is_tested_on_the_images_that_its_run_held_out(run, tmp_path):
  folder, _, trained = run
  done = program("evaluate", f"run_dir={folder}", f"output_dir={tmp_path / 'out'}")
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert (result["data"], result["num_examples"]) == ("data", trained["num_examples"])
  assert result["arms"]["trained"]["log_loss"] == pytest.approx(
    trained["arms"]["pooled"]["log_loss"]
  )
  text = (tmp_path / "out" / "report.md").read_text()
  assert "the trained model is correct" in text
  assert "model model" not in text
  assert "TRAINED ON" not in text

  moved = shutil.copytree(folder, tmp_path / "moved")
  saved = json.loads((moved / "config.json").read_text())
  saved["settings"]["data"]["data"] = f"folder:{tmp_path / 'gone'}"
  (moved / "config.json").write_text(json.dumps(saved))
  with pytest.raises(FileNotFoundError, match="gone"):
    inputs.tested_images(folders.settings_of(str(moved)))


@pytest.mark.slow
def test_images_that_the_model_was_trained_on_are_named_before_the_scores(run, tmp_path):
  folder, data, _ = run
  out = f"output_dir={tmp_path / 'out'}"
  done = program(
    "evaluate", f"run_dir={folder}", f"data=folder:{data}/", "label_names=owl,dog,cat", out
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "out" / "metrics.json").read_text())
  assert result["num_examples"] == 18
  assert result["label_names"] == list(NAMES)
  assert (
    "**TRAINED ON**: the source has no test split" in (tmp_path / "out" / "report.md").read_text()
  )
  assert "TRAINED ON: the source" in done.stdout


@pytest.mark.slow
def test_a_floor_of_patients_leaves_no_small_count_and_no_line_of_an_image(run, tmp_path):
  done = program("evaluate", f"run_dir={run[0]}", "fewest_patients=1000", f"output_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  hidden = "suppressed (<1000)"
  assert f"on data: {hidden} test images" in done.stdout
  result = json.loads((tmp_path / "metrics.json").read_text())
  scores = result["arms"]["trained"]
  assert result["num_examples"] == scores["accuracy"] == scores["log_loss"] == hidden
  assert scores["confusion_matrix"] == [[hidden] * 3] * 3
  assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "report.md"}


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (("output_dir={run}",), "output_dir={run} is the folder of a training run"),
    (("output_dir={used}",), "output_dir={used} already holds predictions.csv, report.md of an"),
    (("output_dir={new}", "unlabelled"), "unlabelled without data"),
    (("output_dir={new}", "patient_pattern=(p)"), "patient_pattern=(p) without data"),
    (("output_dir={new}", "site_data=npz:a,npz:b"), "site_data=npz:a,npz:b: one source"),
    (
      ("output_dir={new}", "unlabelled", "data=folder:{data}", "label_names=a,b"),
      "label_names=a,b says what unlabelled images lack",
    ),
  ],
)
@pytest.mark.slow
def test_evaluate_refuses_before_work(run, tmp_path, flags, told):
  used = tmp_path / "used"
  used.mkdir()
  for name in ("report.md", "predictions.csv"):
    (used / name).write_text("of another program")
  paths = {"run": run[0], "data": run[1], "used": used, "new": tmp_path / "new"}
  done = program("evaluate", f"run_dir={run[0]}", *(flag.format(**paths) for flag in flags))
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {told.format(**paths)}")
  assert not paths["new"].exists()
  assert (used / "report.md").read_text() == "of another program"


def test_results_are_never_written_over_others(run, tmp_path):
  before = (run[0] / "report.md").read_bytes()
  assert folders.to_write(str(tmp_path / "new"), ("report.md",)) == tmp_path / "new"
  assert not (tmp_path / "new").exists()
  with pytest.raises(ValueError, match=f"output_dir={run[0]} is the folder of a training run"):
    folders.to_write(str(run[0]), ("other.csv",))
  (tmp_path / "plan.txt").touch()
  assert folders.to_write(str(tmp_path), ("report.md",)) == tmp_path
  with pytest.raises(ValueError, match=r"already holds plan\.txt of an earlier result"):
    folders.to_write(str(tmp_path), ("report.md", "plan.txt"))
  config = folders.settings_of(str(run[0]))
  with pytest.raises(ValueError, match=r"a run of train_pooled, whose report .* train_federated"):
    running.open_run(config, str(run[0]))
  assert running.open_run(config, str(run[0]), "train_pooled") == run[0]
  assert (run[0] / "report.md").read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "flags"),
  [
    ("account", ("num_units=100", "noise_multiplier=1", "rounds=2")),
    ("infer_encrypted", ("checkpoint={run}", "images={data}")),
    ("plot", ("run_dir={run}",)),
  ],
)
def test_other_programs_refuse_the_folder_of_a_run(name, flags, run, tmp_path):
  """To plot, that of another run."""
  other = shutil.copytree(run[0], tmp_path / "other")
  held = sorted(path.name for path in other.iterdir())
  flags = [flag.format(run=run[0], data=run[1]) for flag in flags]
  done = program(name, *flags, f"output_dir={other}")
  assert done.returncode == 1
  assert f"output_dir={other} is the folder of a training run" in done.stderr
  assert sorted(path.name for path in other.iterdir()) == held


@pytest.mark.slow
def test_plot_draws_anew_in_the_run_s_own_folder_only(run, tmp_path):
  for folder in (run[0], tmp_path):
    (folder / "curves_pooled.png").touch()
  apart = program("plot", f"run_dir={run[0]}", f"output_dir={tmp_path}")
  assert "already holds curves_pooled.png of an earlier result" in apart.stderr
  assert program("plot", f"run_dir={run[0]}").returncode == 0
  assert (run[0] / "curves_pooled.png").stat().st_size > 1000
  (run[0] / "curves_pooled.png").unlink()
