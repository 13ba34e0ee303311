"""Flower itself: SuperLink and SuperNodes on loopback, with TLS and node authentication.

Slow, because Flower starts a process for each message; `.ci/run` runs this file once.
"""

import json
import os
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

pytest.importorskip("flwr")

from experiments_runs import TINY, flags_of, train

from experiments import model_files, processes, running, settings, trial

pytestmark = [pytest.mark.flower, pytest.mark.optimised]

MODULE, TIMEOUT = "experiments.train_federated", 300.0
APART = settings.replace(
  TINY, placement="flower", model="cnn", rounds=2, class_weights=False, sync_epochs=1,
  validation="none", secagg_threshold=2, secagg_colluding=0,
)  # fmt: skip


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_three_sites_train_over_flower_as_in_one_process_and_go_on_without_one_that_is_killed(
  tmp_path, capfd
):
  """The parameters are bit for bit those of one process as long as all are there. A SuperNode whose
  key is not registered gets nothing, and nothing is left running.
  """
  folder, own = tmp_path / "run", tmp_path / "run.sites"
  running.open_run(APART, str(folder))
  sums = folder / trial.COORDINATOR / "sums.jsonl"
  with trial.deployed(3, folder, own) as deployment:
    stranger = processes.own_folder(tmp_path / "stranger", 0)
    (stranger / trial.FLOWER).mkdir()
    trial.make_node_key(stranger / trial.FLOWER / "node_key")
    outside = deployment._replace(sites=[*deployment.sites, stranger])
    trial.start_supernode(outside, 3)
    trial.start_sites(deployment, MODULE, flags_of(APART))
    trial.start_run(deployment, TIMEOUT)
    end = time.monotonic() + 1500
    first = [own / f"site_{i}" / processes.RUN / "federated/checkpoints/1" for i in range(3)]
    while not all(path.is_dir() for path in first):
      assert time.monotonic() < end
      assert not (folder / trial.COORDINATOR / "ending.json").exists()
      time.sleep(0.1)
    os.killpg(deployment.processes["site 2"].pid, signal.SIGKILL)
    unregistered = deployment.processes.pop("supernode 3")
    os.killpg(unregistered.pid, signal.SIGKILL)
    assert trial.watch(deployment) == [2]
  assert "site 2 has ended, code -9" in capfd.readouterr().err
  assert [line["survivors"] for line in lines(sums)] == [[0, 1, 2], [0, 1]]
  assert all(process.poll() is not None for process in deployment.processes.values())
  text = (deployment.flower / "supernode_3.log").read_text()
  assert "Receiving" not in text
  assert "SuperNode ID" not in text
  assert "Uvicorn running on https://" in (deployment.flower / "superlink.log").read_text()
  simulated = settings.replace(APART, placement="scan", rounds=1)
  (tmp_path / "one").mkdir()
  train(simulated, tmp_path / "one")
  params = lambda folder: jax.tree.leaves(
    ocp.StandardCheckpointer().restore((folder / "default").absolute())["state"]["params"]
  )
  wanted = params(tmp_path / "one" / "checkpoints" / "1")
  models = [model_files.load_model(str(path.parents[2]))[1][0] for path in first[:2]]
  for found in map(params, first):
    for a, b in zip(found, wanted, strict=True):
      np.testing.assert_array_equal(a, b)
  for a, b in zip(*map(jax.tree.leaves, models), strict=True):
    np.testing.assert_array_equal(a, b)
