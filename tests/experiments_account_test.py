"""The account binary: its figures are the accountant's, and bad flags end it before any work."""

import json
import subprocess
import sys

import pytest

from primia_jax.privacy import accounting


def account(*flags):
  command = [sys.executable, "-m", "experiments.account", *(f"--{flag}" for flag in flags)]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_figures_are_the_accountant_s_and_files_are_written(tmp_path):
  run = ("num_units=1000", "sampling_rate=1", "rounds=20", "noise_multiplier=10", "count_noise=20")
  done = account(*run, f"output_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert "WARNING" not in done.stderr
  result = json.loads((tmp_path / "account.json").read_text())
  ledger = accounting.from_json(json.dumps(result["ledger"]))
  assert [(r.what, r.times) for r in ledger.releases] == [("class counts", 1), ("gradients", 20)]
  last = result["rows"][-1]
  assert (last["round"], last["pld"], len(result["rows"])) == (20, accounting.epsilon(ledger), 10)
  assert last["pld"] < last["rdp"]
  assert ledger.delta == 1e-3
  assert (tmp_path / "epsilon.png").stat().st_size > 10_000
  for told in ("one example", "released: class counts", "protected from"):
    assert told in done.stdout
    assert told in (tmp_path / "report.md").read_text()


@pytest.mark.slow
def test_sites_are_calibrated_to_the_target(tmp_path):
  done = account("num_units=50", "unit=site", "rounds=3", "target_epsilon=4", f"output_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  result = json.loads((tmp_path / "account.json").read_text())
  assert 3.98 < result["rows"][-1]["pld"] <= 4
  assert [row["round"] for row in result["rows"]] == [1, 2, 3]


def test_an_infinite_epsilon_is_said_and_written(tmp_path):
  done = account("num_units=100", "sampling_rate=1", "rounds=1", "noise_multiplier=0.01", f"output_dir={tmp_path}")
  assert done.returncode == 0, done.stderr
  assert "Warning" not in done.stderr
  assert "infinite" in (tmp_path / "report.md").read_text()
  assert json.loads((tmp_path / "account.json").read_text())["rows"][0]["pld"] is None


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("batch_size=10", "noise_multiplier=0"), "without noise nothing is private"),
    (("noise_multiplier=1",), "needs one of batch_size and sampling_rate"),
    (("batch_size=10", "noise_multiplier=1", "delta=0.5"), "publish somebody whole"),
  ],
)
def test_bad_flags_are_refused(flags, message):
  done = account("num_units=100", "rounds=2", *flags)
  assert done.returncode != 0
  assert message in done.stderr
  assert "Traceback" not in done.stderr
