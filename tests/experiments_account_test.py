"""The account binary: its figures are the accountant's and the run's, and bad flags end it before
any work.
"""

import functools
import json
import subprocess
import sys

import jax
import pytest
from experiments_programs import call
from experiments_runs import FIXED, PRIVATE, SITE, cohort_of, flags_of, ledgers, train, trainer_of

from experiments import settings
from primia_jax import models
from primia_jax.privacy import accounting, ledger
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.privacy.distributed_cost import epsilon

SITES = ("dp=site", "num_sites=50", "noclass_weights", "weighting=uniform")
DISTRIBUTED = settings.replace(
  SITE, rounds=2, num_sites=6, noise_multiplier=0.0, target_epsilon=8.0, dp_noise="distributed",
  secagg_threshold=-1, secagg_bits=16, delta=1e-3,
)  # fmt: skip

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def account(*flags):
  return call("account", *(f"--{flag}" for flag in flags))


def foretold(config, folder):
  """Trains, and has the same run foretold from the sizes that its report makes public.

  Returns:
    (the trained arm, what the account prints, what it writes).
  """
  arm, sizes = train(config, folder / "run"), cohort_of(config).train.sizes
  given = [flag.removeprefix("--") for flag in flags_of(config)]
  if config.privacy.dp != "site":
    given += [f"num_units={max(sizes)}", f"smallest_units={min(sizes)}"]
  done = account(*given, f"output_dir={folder}")
  assert done.returncode == 0, done.stderr
  return arm, done.stdout, json.loads((folder / "account.json").read_text())


def assert_is_charged(config, folder, arm, result):
  spent = ledger.from_json(json.dumps(result["ledger"]))
  assert spent.releases
  assert ledgers(folder / "run") == [spent] * config.hospitals.num_sites
  assert trainer_of(config).privacy.spent(config.training.rounds) == spent
  last = result["rows"][-1]
  assert arm.rows[-1]["epsilon"] == last.get("pld", last["rdp"])
  assert {k: v for k, v in result["statement"].items() if k in arm.privacy} == arm.privacy


@pytest.mark.parametrize(
  "config",
  [
    pytest.param(PRIVATE, id="example"),
    slow(settings.replace(PRIVATE, batch_size=99), id="a batch larger than the site"),
    slow(settings.replace(PRIVATE, noise_multiplier=0.0, target_epsilon=8.0), id="calibrated"),
    slow(FIXED, id="fixed order"),
    slow(settings.replace(DISTRIBUTED, dp_clip_quantile=0.5), id="a clip that moves"),
  ],
)
def test_what_is_foretold_is_what_is_charged(config, tmp_path):
  arm, _, result = foretold(config, tmp_path)
  assert_is_charged(config, tmp_path, arm, result)


@pytest.mark.slow
def test_figures_are_the_accountant_s_and_files_are_written(tmp_path):
  run = ("num_units=1000", "batch_size=1000", "rounds=20", "noise_multiplier=10")
  done = account(*run, f"output_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr
  result = json.loads((tmp_path / "account.json").read_text())
  spent = ledger.from_json(json.dumps(result["ledger"]))
  assert [(r.what, r.times) for r in spent.releases] == [("class counts", 1), ("gradients", 20)]
  last = result["rows"][-1]
  assert (last["round"], last["pld"], len(result["rows"])) == (20, accounting.epsilon(spent), 10)
  assert last["pld"] < last["rdp"]
  assert spent.delta == 1e-4
  assert (tmp_path / "epsilon.png").stat().st_size > 10_000
  for told in ("one example", "released: class counts", "protected from"):
    assert told in done.stdout
    assert told in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_sites_are_calibrated_to_the_target(tmp_path):
  done = account(*SITES, "rounds=3", "target_epsilon=4", f"output_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "account.json").read_text())
  assert 3.98 < result["rows"][-1]["pld"] <= 4
  assert [row["round"] for row in result["rows"]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["banded", "tree"])
def test_a_run_of_correlated_noise_is_one_release(noise, tmp_path):
  sizes = ("num_units=100", "smallest_units=60", "batch_size=10")
  done = account(
    *sizes, f"dp_noise={noise}", "rounds=4", "target_epsilon=4", f"output_dir={tmp_path}"
  )
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "account.json").read_text())
  assert [(r["what"], r["times"]) for r in result["ledger"]["releases"]] == [
    ("class counts", 1),
    ("gradients", 1),
  ]
  assert len({row["pld"] for row in result["rows"]}) == 1
  assert 3.98 < result["rows"][0]["pld"] <= 4
  assert "at least 6 steps between two uses of an image" in done.stdout  # of the smallest site


def test_noise_that_sites_make_together_is_foretold_and_charged(tmp_path):
  arm, printed, result = foretold(DISTRIBUTED, tmp_path)
  assert_is_charged(DISTRIBUTED, tmp_path, arm, result)
  assert [list(row) for row in result["rows"]] == [["round", "steps", "rdp", "named"]] * 2
  assert 7.9 < result["rows"][-1]["rdp"] <= 8
  statement = result["statement"]
  assert statement["noise in a sum"].endswith(
    "from at least 4 sites, besides 1 that may collude and know their own shares"
  )
  assert statement["noise in a sum"] in printed
  model = models.build(DISTRIBUTED.model.config(DISTRIBUTED.data, 3))
  size = models.num_parameters(model.init(jax.random.key(0))[0])
  noise = DistributedNoise(size, 6, 5, 1.0, statement["noise multiplier"], 16, num_colluding=1)
  inflation = round(noise.sensitivity_inflation, 4)
  assert statement["sensitivity multiplied by rounding"] == inflation > 1
  # `distributed_cost.epsilon` searches more orders than whole ones.
  assert epsilon(noise, 2, 1e-3) == pytest.approx(result["rows"][-1]["rdp"], rel=0.01)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_infinite_epsilon_is_said_and_written(tmp_path):
  done = account(
    "num_units=100", "batch_size=100", "rounds=1", "noise_multiplier=0.01", f"output_dir={tmp_path}"
  )
  assert done.returncode == 0, done.stderr
  assert "infinite" in (tmp_path / "report.md").read_text()
  assert json.loads((tmp_path / "account.json").read_text())["rows"][0]["pld"] is None


def test_bad_flags_are_refused():
  """By the program in a process of its own; experiments_refusals_test has all that it refuses."""
  command = [sys.executable, "-m", "experiments.account", "--rounds=2", "--num_units=100"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode != 0
  assert "without noise nothing is private" in done.stderr
  assert "Traceback" not in done.stderr
