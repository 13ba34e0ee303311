"""Flower itself: SuperLink and SuperNodes on loopback, with TLS and node authentication.

Slow, because Flower starts a process for each message; `.ci/run` runs this file once.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("flwr")

from experiments_runs import TINY, flags_of, train

from experiments import model_files, processes, running, settings, trial

pytestmark = [pytest.mark.flower, pytest.mark.optimised]

MODULE, TIMEOUT = "experiments.train_federated", 300.0
APART = settings.replace(
  TINY, placement="flower", model="cnn", rounds=3, class_weights=False, sync_epochs=1
)


def wait_for(condition, trial_, seconds=900):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    assert trial_.processes["superlink"].poll() is None
    time.sleep(0.2)


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_three_sites_and_a_stranger_over_flower(tmp_path, capfd):
  """The sums and the parameters are those of one process; then one site is killed in the middle,
  and the others go on. A SuperNode whose key is not registered gets nothing.
  """
  folder, own = tmp_path / "run", tmp_path / "run.sites"
  running.open_run(APART, str(folder))
  with trial.deployed(3, folder, own) as deployment:
    stranger = processes.own_folder(tmp_path / "stranger", 0)
    (stranger / trial.FLOWER).mkdir()
    trial.make_node_key(stranger / trial.FLOWER / "node_key")
    outside = deployment._replace(sites=[*deployment.sites, stranger])
    trial.start_supernode(outside, 3)
    trial.start_sites(deployment, MODULE, flags_of(APART))
    trial.start_run(deployment, TIMEOUT)
    sums = folder / trial.COORDINATOR / "sums.jsonl"
    wait_for(lambda: len(lines(sums)) >= 2, deployment)
    killed = deployment.processes["site 2"]
    os.killpg(killed.pid, signal.SIGKILL)
    begun = len(lines(sums))
    deployment.processes.pop("supernode 3").kill()
    lost = trial.watch(deployment)
  assert lost == [2]
  assert "site 2 has ended, code -9" in capfd.readouterr().err
  text = (deployment.flower / "supernode_3.log").read_text()
  assert "Receiving" not in text
  assert "SuperNode ID" not in text
  got = [line["survivors"] for line in lines(sums)]
  assert got[:begun] == [[0, 1, 2]] * begun
  assert got[-1] == [0, 1]
  links = (deployment.flower / "superlink.log").read_text()
  assert "Uvicorn running on https://" in links
  # the first rounds are those of one process
  simulated = train(settings.replace(APART, placement="scan", secagg_threshold=3), tmp_path / "one")
  for i in (0, 1):
    rows = lines(own / f"site_{i}" / processes.RUN / "federated" / "rounds.jsonl")
    assert [row["survivors"] for row in rows[:1]] == [3]
    wanted = simulated.rows[0]
    assert rows[0]["val_loss"] == pytest.approx(wanted["val_loss"], abs=1e-5)
  models = [model_files.load_model(str(own / f"site_{i}" / processes.RUN))[1][0] for i in (0, 1)]
  for a, b in zip(*map(jax.tree.leaves, models), strict=True):
    np.testing.assert_array_equal(a, b)
  # nothing is left behind
  assert all(process.poll() is not None for process in deployment.processes.values())


def test_a_trial_s_parameters_are_bit_for_bit_those_of_one_process(tmp_path):
  config = settings.replace(APART, rounds=1)
  root = str(pathlib.Path(__file__).parents[1])
  path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  command = [sys.executable, "-m", MODULE, *flags_of(config), f"--run_dir={tmp_path / 'run'}"]
  subprocess.run(command, check=True, timeout=1500, env=os.environ | {"PYTHONPATH": path})
  simulated = train(
    settings.replace(config, placement="scan", secagg_threshold=3), tmp_path / "one"
  )
  for i in range(3):
    run = tmp_path / "run.sites" / f"site_{i}" / processes.RUN
    trained = model_files.load_model(str(run))[1][0]
    for a, b in zip(*map(jax.tree.leaves, (trained, simulated.models[0])), strict=True):
      np.testing.assert_array_equal(a, b)
