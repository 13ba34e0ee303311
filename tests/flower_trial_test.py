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

from experiments import model_files, processes, running, settings, trial, trial_keys

pytestmark = [pytest.mark.flower, pytest.mark.optimised]

MODULE, TIMEOUT = "experiments.train_federated", 300.0
APART = settings.replace(
  TINY, placement="flower", model="cnn", rounds=4, class_weights=False, sync_epochs=1,
  validation="none", secagg_threshold=2, secagg_colluding=0,
)  # fmt: skip


def params(folder):
  """Of a checkpoint."""
  saved = ocp.StandardCheckpointer().restore((folder / "default").absolute())
  return jax.tree.leaves(saved["state"]["params"])


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def test_three_sites_train_over_flower_as_in_one_process_and_one_that_is_killed_comes_back(
  tmp_path,
):
  """The parameters are bit for bit those of one process as long as all are there. The others go on
  without the one that is killed, and it takes part again when its program is started. A SuperNode
  whose key is not registered gets nothing, and nothing is left running.
  """
  folder, own = tmp_path / "run", tmp_path / "run.sites"
  running.open_run(APART, str(folder))
  sums = folder / trial.COORDINATOR / "sums.jsonl"
  with trial.deployed(3, folder, own) as deployment:
    stranger = processes.own_folder(tmp_path / "stranger", 0)
    (stranger / trial.FLOWER).mkdir()
    trial_keys.make_node_key(stranger / trial.FLOWER / "node_key")
    outside = deployment._replace(sites=[*deployment.sites, stranger])
    trial.start_supernode(outside, 3)
    trial_keys.introduce(folder / trial.COORDINATOR, deployment.sites)
    trial.start_sites(deployment, MODULE, flags_of(APART))
    trial.start_run(deployment, TIMEOUT)
    end = time.monotonic() + 1500
    first = [own / f"site_{i}" / processes.RUN / "federated/checkpoints/1" for i in range(3)]
    while not all(path.is_dir() for path in first):
      assert time.monotonic() < end
      assert not (folder / trial.COORDINATOR / "ending.json").exists()
      time.sleep(0.1)
    found = [params(path) for path in first]
    os.killpg(deployment.processes["site 2"].pid, signal.SIGKILL)
    deployment.processes["site 2"].wait()
    trial.start_site(deployment, 2, MODULE, flags_of(APART))
    unregistered = deployment.processes.pop("supernode 3")
    os.killpg(unregistered.pid, signal.SIGKILL)
    assert trial.watch(deployment) == []
  who = [line["survivors"] for line in lines(sums)]
  assert who[0] == who[-1] == [0, 1, 2]
  assert [0, 1] in who
  assert not list(tmp_path.rglob("identities.json"))  # no key was pinned because it came first
  assert "site 2: is back from round" in (own / "site_2" / trial.LOG).read_text()
  assert all(process.poll() is not None for process in deployment.processes.values())
  text = (deployment.flower / "supernode_3.log").read_text()
  assert "Receiving" not in text
  assert "SuperNode ID" not in text
  assert "Uvicorn running on https://" in (deployment.flower / "superlink.log").read_text()
  simulated = settings.replace(APART, placement="scan", rounds=1)
  (tmp_path / "one").mkdir()
  train(simulated, tmp_path / "one")
  wanted = params(tmp_path / "one" / "checkpoints" / "1")
  models = [model_files.load_model(str(path.parents[2]))[1][0] for path in first]
  for one in found:
    for a, b in zip(one, wanted, strict=True):
      np.testing.assert_array_equal(a, b)
  for a, b, c in zip(*map(jax.tree.leaves, models), strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
