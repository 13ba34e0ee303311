"""A training run of the binaries: its images, its rounds, its folder.

The programs themselves are run whole by `.ci/smoke`.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from experiments_programs import call
from experiments_runs import TINY, assert_equal, cohort_of, make_trainer, train, trainer_of
from PIL import Image

from experiments import (
  folders,
  hospitals,
  inputs,
  markdown,
  model_files,
  processes,
  report,
  running,
  settings,
)
from experiments.configs import Train, rehearse
from experiments.configs.model import normalise
from primia_jax import evaluation, secagg, sites
from primia_jax.data import phantom
from primia_jax.data import sites as data_sites


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run of TINY."""
  return train(TINY, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run with its baselines: (folder, what metrics.json holds, what its bars showed)."""
  config, bars = settings.replace(TINY, rounds=2), io.StringIO()
  folder = running.open_run(config, str(tmp_path_factory.mktemp("finished") / "run"))
  with contextlib.redirect_stderr(bars):
    result = running.run(config, folder, federated=True, baselines=("pooled", "local"))
  return folder, result, bars.getvalue()


def test_sites_differ_and_a_process_sees_the_same_images_of_its_own():
  everything = inputs.site_images(TINY)
  assert len(set(everything.train.sizes)) == 3
  for site in range(3):
    own = inputs.site_images(TINY, only_site=site)
    assert own.train.sizes == everything.train.sizes
    for part, whole in ((own.train, everything.train), (own.validation, everything.validation)):
      np.testing.assert_array_equal(
        part.dataset.images[part.sites[site]], whole.dataset.images[whole.sites[site]]
      )
      assert len(part.dataset) == len(part.sites[site])


def test_train_validation_and_test_share_no_image():
  images = inputs.site_images(TINY)
  parts = (images.train.dataset, images.validation.dataset, images.test)
  seen = [image.tobytes() for part in parts for image in part.images]
  assert len(set(seen)) == len(seen)


def test_patients_whose_images_nothing_ties_together_are_refused(tmp_path):
  """24 patients of three images each: dealt out image by image, most stand at two sites."""
  for i in range(72):
    path = tmp_path / ("a", "b")[i % 2] / f"person{i // 3}_{i}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((4, 4), i, np.uint8)).save(path)
  config = settings.replace(Train(), data=f"folder:{tmp_path}", image_size=4, partition="iid")
  patients_of = lambda images: [
    {path.split("/")[1].split("_")[0] for path in images.train.dataset.columns["path"][index]}
    for index in images.train.sites
  ]
  several = lambda sets: sum(sum(p in one for one in sets) > 1 for p in set.union(*sets))
  assert several(patients_of(inputs.site_images(config))) > 10

  private = settings.replace(config, dp="patient", noise_multiplier=1.0)
  with pytest.raises(
    ValueError, match=r"72 \(a/person.*patient_column.*patient_pattern.*PatientID"
  ):
    inputs.site_images(private)
  named = inputs.site_images(settings.replace(private, patient_pattern=r"(person\d+)_"))
  assert several(patients_of(named)) == 0
  stacked = data_sites.stack(named.train, by_patient=True)
  assert [int(units.max()) + 1 for units in stacked.units] == [
    len(one) for one in patients_of(named)
  ]


@pytest.mark.real_data
def test_real_sites_are_unequal_and_share_no_patient(real_data):
  config = settings.replace(
    Train(),
    data=f"folder:{real_data / 'chest_xray_224.tar'}",
    image_size=32,
    site_fractions="0.5,0.3,0.2",
  )
  images = inputs.site_images(config)
  assert images.train.dataset.label_names == ("normal", "bacterial", "viral")
  assert len(images.test) == 624
  held = [
    set(images.train.dataset.groups[i]) for i in (*images.train.sites, *images.validation.sites)
  ]
  for i, one in enumerate(held):
    for other in held[i + 1 :]:
      assert not one & other
  mixes = [
    np.bincount(images.train.dataset.labels[i], minlength=3) / len(i) for i in images.train.sites
  ]
  assert max(np.abs(a - b).max() for a in mixes for b in mixes) > 0.05
  assert sum(images.train.sizes) + sum(images.validation.sizes) == 4664


@pytest.mark.parametrize("stop_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, stop_after):
  with pytest.raises(KeyboardInterrupt):
    train(TINY, tmp_path, stop_after)
  resumed = train(TINY, tmp_path, trainer=make_trainer(TINY, cohort_of(TINY)))  # a new process
  assert_equal(resumed.models, whole.models)
  without_time = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
  assert without_time(resumed.rows) == without_time(whole.rows)
  lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
  assert [line["round"] for line in lines] == [1, 2, 3, 4]


def test_rounds_that_were_not_saved_are_trained_again_bit_for_bit(tmp_path, whole):
  with pytest.raises(KeyboardInterrupt):
    train(TINY, tmp_path, stop_after=3, save_every=3600.0)
  assert not any((tmp_path / "checkpoints").iterdir())
  assert_equal(train(TINY, tmp_path, save_every=3600.0).models, whole.models)
  assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 4
  assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


_slow = lambda name: pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "algorithm",
  [
    *map(_slow, ("fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad")),
    "scaffold",
    "fednova",
    "fedbn",
  ],
)
def test_every_algorithm_trains_under_secure_aggregation(tmp_path, algorithm):
  optimizer = "sgd" if algorithm in ("scaffold", "fednova") else "adamw"
  own = {"model": "cnn", "norm": "batch", "width": 0.25} if algorithm == "fedbn" else {}
  config = settings.replace(
    TINY, algorithm=algorithm, optimizer=optimizer, rounds=2, keep_optimizer=False, **own
  )
  with jax.numpy_dtype_promotion("standard"):  # optax's Adam and Yogi need it
    arm = train(config, tmp_path)
  assert len(arm.rows) == 2
  assert np.isfinite([row["val_loss"] for row in arm.rows]).all()
  assert len(arm.models) == (3 if algorithm == "fedbn" else 1)


def test_sites_are_drawn_and_loaded_a_few_at_a_time_with_all_others_as_peers(tmp_path):
  """A round's 3 peers are all others; the sums over all six sites, whose 3 would be odd, take 5."""
  config = settings.replace(
    TINY, num_sites=6, sites_per_round=4, secagg_peers=3, rounds=1, keep_optimizer=False
  )
  rehearse(config)
  arm = train(config, tmp_path / "kept")
  assert len(arm.rows[0]["sites"]) == 4
  few = settings.replace(config, sites_in_memory=2)
  loaded = train(few, tmp_path / "loaded", trainer=trainer_of(config))
  assert_equal(loaded.models, arm.models)


def test_early_stopping_is_alike_in_all_processes(tmp_path):
  """The first round is the best, two more are no better."""
  config, scores = settings.replace(TINY, rounds=30, patience=2), evaluation.Scores(np.eye(3), 0.5)
  made = trainer_of(TINY)._replace(validate=lambda *_: scores)
  for number in (0, 1):
    place, folder = processes.Place(sites.scan(), None, number), tmp_path / str(number)
    arm = train(config, folder, trainer=made._replace(place=place))
    assert [row["round"] for row in arm.rows] == [1, 2, 3]
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 3


def test_an_update_out_of_range_stops_the_run_and_names_the_cure(tmp_path):
  config = settings.replace(TINY, secagg_max_abs=1.0, learning_rate=1e4)
  with pytest.raises(RuntimeError, match=r"secagg_max_abs=1\.0"):
    train(config, tmp_path)


def test_a_run_whose_rounds_were_all_aborted_fails_and_reports_no_network(tmp_path, capsys):
  def lost(key, state, sites):
    raise secagg.RoundAborted("round aborted: no site's message came")

  made = trainer_of(TINY)
  made = made._replace(rounds=made.rounds._replace(step=lost))
  match = r"federated: all 4 rounds were aborted, the last because: no site's .* no report"
  with pytest.raises(RuntimeError, match=match):
    train(TINY, tmp_path, trainer=made)
  assert "round 2 aborted: no site's message came" in "".join(capsys.readouterr())


def test_settings_may_be_mended_until_something_is_trained(tmp_path):
  config = settings.replace(TINY, dp="example", noise_multiplier=1.0, delta=0.5)
  run_dir = str(tmp_path / "run")
  folder = running.open_run(config, run_dir)
  with pytest.raises(ValueError, match="delta"):
    running.run(config, folder, federated=True)
  mended = settings.replace(config, delta=0.01)
  assert running.open_run(mended, run_dir) == folder
  assert settings.load(folder / "config.json")["delta"] == 0.01
  (folder / "federated").mkdir(exist_ok=True)
  (folder / "federated" / "ledger.json").touch()
  with pytest.raises(ValueError, match=r"delta was 0\.01, now 0\.5"):
    running.open_run(config, run_dir)


def test_two_processes_do_not_work_on_one_run(tmp_path):
  """They would overwrite each other's checkpoints. One that was killed is in nobody's way."""
  config = settings.replace(TINY, rounds=1)
  folder = running.open_run(config, str(tmp_path / "run"))
  lock = folder / "process.lock"
  code = f"import fcntl, sys; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
  code += "; print(flush=True); sys.stdin.read()"
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as other:
    assert other.stdout is not None
    assert other.stdout.readline() == b"\n"
    with pytest.raises(ValueError, match=f"another process is at work in {folder}"):
      running.run(config, folder, federated=True)
    other.kill()
  assert not (folder / "federated").exists()
  with folders.alone(lock):
    pass


def test_a_run_says_where_it_is_and_what_was_learnt(finished, capsys):
  folder, result, bars = finished
  arms = "federated", "pooled", *(f"local: site {i}" for i in range(3))
  for number, name in enumerate(arms, start=1):
    assert f"arm {number} of 5: {name}: " in bars
  report.print_summary(result, folder)
  *_, learnt, where = capsys.readouterr().out.splitlines()
  assert learnt == markdown.learnt(result)
  assert f"reached {100 * result['arms']['federated']['accuracy']['value']:.1f} %" in learnt
  assert where == f"Report: {folder / 'report.md'}"
  text = (folder / "report.md").read_text()
  assert text.index(learnt) < text.index("## The hospitals") < text.index("## Results")


def test_a_run_whose_output_goes_to_a_file_prints_lines_and_no_bars(finished):
  bars = finished[2]
  assert "\r" not in bars
  lines = [line.split("  ")[0] for line in bars.splitlines() if "federated: round" in line]
  assert lines == [f"arm 1 of 5: federated: round {n} of 2" for n in (1, 2)]


def test_a_report_shows_what_the_phantoms_hospitals_differ_in(finished):
  folder, result, _ = finished
  styles = phantom.site_styles(3, TINY.seed)
  rows = result["hospitals"]
  assert [row["training images"] for row in rows] == [18, 12, 6]
  assert [row["exposure"] for row in rows] == [f"{style.gain:.2f}" for style in styles]
  assert [row["blur (pixels)"] for row in rows] == [f"{16 * style.blur:.2f}" for style in styles]
  assert [row["viral (%)"] for row in rows] == [f"{100 * s.class_mix[2]:.0f}" for s in styles]
  text = (folder / "report.md").read_text()
  for row in rows:
    assert f"| {' | '.join(map(str, row.values()))} |" in text
  assert "](hospitals.png)" in text
  assert (folder / "hospitals.png").stat().st_size > 0

  test = inputs.site_images(TINY).test
  shown = hospitals.of_phantom(TINY, (18, 12, 6), test)
  assert shown.labels.tolist() == [0, 0, 1, 1, 2, 2]
  for site in range(3):
    for label in range(3):
      all_of_it = test.images[(test.columns["site"] == site) & (test.labels == label)][..., 0]
      cells = shown.images[site][shown.labels == label]
      np.testing.assert_array_equal(cells[: len(all_of_it)], all_of_it[:2])
      assert (cells[len(all_of_it) :] == 255).all()
  real = settings.replace(TINY, data="npz:chest.npz")
  assert hospitals.of_phantom(real, (18, 12, 6), test) is None


def test_a_whole_run_and_its_model(finished):
  folder, result, _ = finished
  assert list(result["arms"]) == [
    "local: site 0",
    "local: site 1",
    "local: site 2",
    "pooled",
    "federated",
  ]
  text = (folder / "report.md").read_text()
  assert "synthetic phantom" in text
  assert "secure aggregation" in text.lower()
  model, trained, label_names, _ = model_files.load_model(str(folder))
  assert label_names == ("normal", "bacterial", "viral")
  images = inputs.site_images(TINY).test
  probabilities = evaluation.predictor(model.apply, normalise)(trained, images.images)
  accuracy = float(np.mean(probabilities.argmax(1) == images.labels))
  assert accuracy == pytest.approx(result["arms"]["federated"]["accuracy"]["value"])


def test_a_folder_of_other_settings_or_of_something_else_is_refused(finished, tmp_path):
  folder = finished[0]
  with pytest.raises(ValueError, match="rounds was 2, now 4"):
    running.open_run(TINY, str(folder))
  (tmp_path / "file").touch()
  with pytest.raises(ValueError, match="not empty"):
    running.open_run(TINY, str(tmp_path))
  with pytest.raises(ValueError, match="run_dir is empty"):
    running.open_run(TINY, "")
  with pytest.raises(FileNotFoundError, match=r"model\.json"):
    model_files.load_model(str(tmp_path))


def test_a_run_of_the_former_format_is_refused_and_its_model_is_still_evaluated(finished, tmp_path):
  """Its config.json was one flat record without a format."""
  config, folder = settings.replace(TINY, rounds=2), tmp_path / "old"
  shutil.copytree(finished[0], folder)
  (folder / "config.json").write_text(json.dumps(settings.flat(config)))
  with pytest.raises(ValueError, match=r"has format 1, .* use another --run_dir"):
    running.open_run(config, str(folder))
  out = f"--output_dir={tmp_path / 'out'}"
  done = call("evaluate", f"--run_dir={folder}", "--data=phantom", out)
  assert done.returncode == 0, done.stderr
  assert json.loads((tmp_path / "out" / "metrics.json").read_text())["num_examples"] == 2000


def test_binaries_fail_with_the_reason_and_without_a_traceback(tmp_path):
  """What only the library can tell, before anything is made or read; experiments_refusals_test has
  all that they refuse.
  """
  command = [sys.executable, "-m", "experiments.train_federated", f"--run_dir={tmp_path / 'x'}"]
  done = subprocess.run([*command, "--secagg_peers=5"], capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr.startswith("error: secagg_peers=5")
  assert not (tmp_path / "x").exists()
