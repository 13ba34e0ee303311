"""An evaluation over Flower itself: SuperLink and SuperNodes on loopback."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("flwr")

import scoring_world
from experiments_runs import NAMES
from scoring_world import BINS, SITES

from experiments import trial
from primia_jax import metrics

pytestmark = [pytest.mark.flower, pytest.mark.optimised]

TIMEOUT = 300.0
ROOT = str(pathlib.Path(__file__).parents[1])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return scoring_world.make(tmp_path_factory.mktemp("hospitals"))


def check(root, folders):
  """The reports have the counts of one process on all images."""
  labels, probabilities, patients = scoring_world.pooled(root)
  want = metrics.score_counts(labels, probabilities, patients, BINS)
  for folder in folders:
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sites"] == [*SITES]
    np.testing.assert_array_equal(found["scores in bins"], want.table)
    np.testing.assert_array_equal(found["confusion_matrix"], want.confusion)
    np.testing.assert_array_equal(found["calibration in bins"][:2], want.calibration[:2])
    assert (folder / "own" / "report.md").is_file()


def test_hospitals_apart_score_what_they_approved_as_one_process_does(root):
  """With rosters, approvals and identities; and no program opens a file of another hospital, or of
  the coordinator.
  """
  hooked = str(pathlib.Path(__file__).with_name("experiments_hooked.py"))
  with trial.deployed(3, root, root) as deployment:
    for i in SITES:
      command = [sys.executable, hooked, str(root / f"opened_{i}"), "experiments.evaluate"]
      deployment.processes[f"site {i}"] = subprocess.Popen(
        [*command, f"--run_dir={root}/site_{i}", "--same_user"],
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": ROOT},
      )
    trial.start_run(deployment, TIMEOUT)
    assert trial.watch(deployment) == []
  check(root, [path.parent for path in root.glob("site_*/runs/*/report.md")])
  assert len(list(root.glob("site_*/runs/*/report.md"))) == 3
  for i in SITES:
    lines = (root / f"opened_{i}").read_text().splitlines()
    opened = {path for path in lines if str(root) in path}
    own = str(root / f"site_{i}"), str(root / f"images_{i}.npz")
    assert opened
    assert [path for path in opened if not path.startswith(own)] == []
  logs = [(root / f"site_{i}" / "log").read_text().splitlines() for i in SITES]
  assert all("started: " in log[0] and "Report" in log[-1] for log in logs), logs
  ending = json.loads((root / "coordinator" / "ending.json").read_text())
  assert ending["failed"] == ""


@pytest.mark.parametrize("engine", ["SuperNodes", "simulation"])
def test_a_trial_scores_as_one_process_does(root, tmp_path, engine):
  """With Flower's simulation engine, too, which runs the same apps."""
  if engine == "simulation":
    pytest.importorskip("ray")
  sources = ",".join(f"npz:{root / f'images_{i}.npz'}" for i in SITES)
  done = subprocess.run(
    [
      *(sys.executable, "-m", "experiments.evaluate", "--placement=flower"),
      *(
        f"--run_dir={root / 'model'}",
        f"--site_data={sources}",
        f"--output_dir={tmp_path / 'out'}",
      ),
      *(f"--score_bins={BINS}", f"--label_names={','.join(NAMES)}"),
      f"--flower_simulation={engine == 'simulation'}",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert "Evaluation by 3 sites" in done.stdout
  check(root, [tmp_path / "out.sites" / f"site_{i}" / "run" for i in SITES])
  log = (tmp_path / "out" / "flower" / "superlink.log").read_text()
  assert ("/v1/fleet/" in log) == (engine == "SuperNodes")
