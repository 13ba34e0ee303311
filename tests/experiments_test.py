"""The binaries' settings, inputs and training loop; the programs themselves are run whole by
`.ci/smoke`.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags

from experiments import inputs, learning, running, settings, training
from primia_jax import models, sites

TINY = settings.Train(
  phantom_images=36,
  image_size=16,
  model="mlp",
  rounds=4,
  batch_size=4,
  augment="none",
  optimizer="momentum",
  learning_rate=0.01,
  keep_optimizer=True,
)


def test_every_setting_is_a_flag_and_comes_back():
  values = flags.FlagValues()
  settings.define_flags(settings.Train, values)
  values(["program", "--rounds=7", "--noclass_weights", "--learning_rate=0.5", "--model=mlp"])
  expected = settings.Train(rounds=7, class_weights=False, learning_rate=0.5, model="mlp")
  assert settings.from_flags(settings.Train, values) == expected


def test_presets_parse_and_are_sound(tmp_path):
  root = pathlib.Path(__file__).parents[1]
  presets = sorted((root / "experiments" / "flags").glob("*.flags"))
  assert presets
  for preset in presets:
    values = flags.FlagValues()
    settings.define_flags(settings.Train, values)
    flags.DEFINE_list("baselines", [], "", flag_values=values)
    values(["program", f"--flagfile={preset}"])
    config = settings.from_flags(settings.Train, values)
    learning.check(config, federated=config.num_sites > 1)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"algorithm": "fedsgd"}, "algorithm='fedsgd'"),
    ({"rounds": 0}, "rounds=0"),
    ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ({"sites_per_round": 4}, "sites_per_round=4 of num_sites=3"),
    ({"algorithm": "scaffold", "optimizer": "adam"}, "scaffold is sound with optimizer=sgd"),
    ({"algorithm": "fednova", "optimizer": "adam"}, "fednova needs optimizer=sgd or momentum"),
    ({"augment": "rotate=3"}, "unknown"),
    ({"augment": "noise=high"}, "is not NAME=NUMBER"),
    ({"aggregation": "average"}, "aggregation='average'"),
    ({"aggregation": "trimmed_mean=0.7"}, "fraction=0.7"),
    ({"secagg_bits": 8}, "leave 0 fraction bits"),
    ({"secagg_bits": 48}, "JAX_ENABLE_X64"),
    ({"secagg_peers": 5}, "num_peers=5"),
    ({"aggregation": "median"}, "weighting=uniform"),
    (
      {"aggregation": "median", "weighting": "uniform", "algorithm": "fednova", "optimizer": "sgd"},
      "fednova",
    ),
    ({"aggregation": "krum=1", "weighting": "uniform"}, "needs more than 4 sites"),
    ({"aggregation": "clear", "norm": "batch"}, "BatchNorm statistics"),
    ({"model": "resnet50"}, "resnet50"),
    ({"model": "vgg16", "image_size": 16}, "vgg16"),
    ({"validation_fraction": 0.0}, "validation_fraction=0.0"),
    ({"placement": "chunk"}, "chunk=C"),
    ({"partition": "random"}, "partition='random'"),
    ({"site_fractions": "0.5,x"}, "site_fractions="),
    ({"pretrained": "nowhere.pth", "model": "resnet18"}, "nowhere.pth"),
  ],
)
def test_wrong_settings_are_refused_before_work(change, message):
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    learning.check(dataclasses.replace(settings.Train(), **change))


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


@pytest.mark.real_data
def test_real_sites_are_unequal_and_share_no_patient(real_data):
  config = settings.Train(
    data=f"folder:{real_data / 'chest_xray_224.tar'}", image_size=32, site_fractions="0.5,0.3,0.2"
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


def _train(config, folder, stop_after=None, name="federated"):
  images = inputs.site_images(config)
  model_config = learning.model_config(config, 3)
  cohort = training.Cohort(name, images.train, images.validation, np.arange(config.num_sites))
  trainer = training.make_trainer(
    config, models.build(model_config), model_config, [cohort], sites.Placement("scan")
  )

  def log(row):
    if row["round"] == stop_after:
      raise KeyboardInterrupt

  return training.train(config, cohort, trainer, model_config, folder, log)


@pytest.mark.parametrize("stop_after", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, stop_after):
  whole = tmp_path / "whole"
  parts = tmp_path / "parts"
  whole.mkdir()
  parts.mkdir()
  expected = _train(TINY, whole)
  with pytest.raises(KeyboardInterrupt):
    _train(TINY, parts, stop_after)  # after the line was written and before the checkpoint was
  resumed = _train(TINY, parts)
  for a, b in zip(jax.tree.leaves(resumed.models), jax.tree.leaves(expected.models), strict=True):
    np.testing.assert_array_equal(a, b)
  without_time = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
  assert without_time(resumed.rows) == without_time(expected.rows)
  lines = [json.loads(line) for line in (parts / "rounds.jsonl").read_text().splitlines()]
  assert [line["round"] for line in lines] == [1, 2, 3, 4]


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
  model, norm = ("cnn", "batch") if algorithm == "fedbn" else ("mlp", "")
  config = dataclasses.replace(
    TINY,
    algorithm=algorithm,
    optimizer=optimizer,
    model=model,
    norm=norm,
    rounds=2,
    keep_optimizer=False,
  )
  with jax.numpy_dtype_promotion("standard"):  # optax's Adam and Yogi need it
    arm = _train(config, tmp_path)
  assert len(arm.rows) == 2
  assert np.isfinite([row["val_loss"] for row in arm.rows]).all()
  assert len(arm.models) == (3 if algorithm == "fedbn" else 1)


def test_all_peers_of_a_round_are_an_odd_number_of_all_sites(tmp_path):
  config = dataclasses.replace(TINY, num_sites=6, sites_per_round=4, secagg_peers=3, rounds=1)
  learning.check(config)
  assert len(_train(config, tmp_path).rows[0]["sites"]) == 4


def test_early_stopping(tmp_path):
  config = dataclasses.replace(TINY, rounds=30, learning_rate=1e-12, momentum=0.0, patience=2)
  assert len(_train(config, tmp_path).rows) == 3  # the first is the best, two more are no better


def test_an_update_out_of_range_stops_the_run_and_names_the_cure(tmp_path):
  config = dataclasses.replace(TINY, secagg_max_abs=1.0, learning_rate=1e4)
  with pytest.raises(RuntimeError, match=r"secagg_max_abs=1\.0"):
    _train(config, tmp_path)


def test_settings_may_be_mended_until_something_is_trained(tmp_path):
  config, run_dir = (
    dataclasses.replace(TINY, dp="example", noise_multiplier=1.0, delta=0.5),
    str(tmp_path / "run"),
  )
  folder = running.open_run(config, run_dir)
  with pytest.raises(ValueError, match="delta"):
    running.run(config, folder, federated=True)
  mended = dataclasses.replace(config, delta=0.01)
  assert running.open_run(mended, run_dir) == folder
  assert settings.load(folder / "config.json")["delta"] == 0.01
  (folder / "federated").mkdir(exist_ok=True)
  (folder / "federated" / "ledger.json").touch()
  with pytest.raises(ValueError, match=r"delta was 0\.01, now 0\.5"):
    running.open_run(config, run_dir)


def test_two_processes_do_not_work_on_one_run(tmp_path):
  """They would overwrite what the other has booked in one ledger. One that was killed is in
  nobody's way.
  """
  folder = running.open_run(dataclasses.replace(TINY, rounds=1), str(tmp_path / "run"))
  lock = folder / "process_0.lock"
  code = f"import fcntl, sys; file = open({str(lock)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX)"
  code += "; print(flush=True); sys.stdin.read()"
  with subprocess.Popen(
    [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
  ) as other:
    assert other.stdout is not None
    assert other.stdout.readline() == b"\n"
    with pytest.raises(ValueError, match=f"another process is at work in {folder}"):
      running.run(dataclasses.replace(TINY, rounds=1), folder, federated=True)
    other.kill()
  assert not (folder / "federated").exists()
  with running.alone(lock):
    pass


def test_a_whole_run_and_its_evaluation(tmp_path, monkeypatch):
  config = dataclasses.replace(TINY, rounds=2)
  folder = running.open_run(config, str(tmp_path / "run"))
  result = running.run(config, folder, federated=True, baselines=("pooled", "local"))
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
  model, trained, label_names, _ = running.load_model(str(folder))
  assert label_names == ("normal", "bacterial", "viral")
  images = inputs.site_images(config).test
  probabilities = training.predictor(model)(trained, images)
  accuracy = float(np.mean(probabilities.argmax(1) == images.labels))
  assert accuracy == pytest.approx(result["arms"]["federated"]["accuracy"]["value"])

  with pytest.raises(ValueError, match="rounds was 2, now 3"):
    running.open_run(dataclasses.replace(config, rounds=3), str(folder))
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "file").touch()
  with pytest.raises(ValueError, match="not empty"):
    running.open_run(config, str(tmp_path / "other"))
  with pytest.raises(FileNotFoundError, match=r"model\.json"):
    running.load_model(str(tmp_path))


def test_binaries_fail_with_the_reason_and_without_a_traceback(tmp_path):

  command = [
    sys.executable,
    "-m",
    "experiments.train_federated",
    f"--run_dir={tmp_path / 'x'}",
    "--algorithm=fedsgd",
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 1
  assert done.stderr.startswith("error: algorithm='fedsgd'")
  assert not (tmp_path / "x").exists()
