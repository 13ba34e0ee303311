"""Flower with idle clients that return the model: plain, or SecAgg+. flower_secagg.py ROUNDS HOW K
PEERS CPUS [LOST]

HOW is plain or secagg; PEERS is how many others each client shares masks with. In each round,
LOST clients fail when they should send the masked model.
"""

import os
import sys
import time

os.environ.update(RAY_USAGE_STATS_ENABLED="0", FLWR_TELEMETRY_ENABLED="0")

import numpy as np
import stepping
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.simulation import run_simulation

num_rounds, how, num_sites, num_peers, cpus, num_lost = (*sys.argv[1:], "0")[:6]
SHAPES = [(32, 1, 3, 3), (32,), (64, 32, 3, 3), (64,), (128, 9216), (128,), (10, 128), (10,)]


class Idle(NumPyClient):
  def __init__(self, is_lost):
    self.is_lost = is_lost

  def fit(self, parameters, config):
    if self.is_lost:
      raise RuntimeError("lost")
    return parameters, 64, {}


class Counting(FedAvg):
  """Federated averaging that notices when a round was given up."""

  num_results = 0

  def aggregate_fit(self, server_round, results, failures):
    self.num_results += len(results)
    return super().aggregate_fit(server_round, results, failures)


def start_client(context):
  return Idle(context.node_config["partition-id"] < int(num_lost)).to_client()


client = ClientApp(start_client, mods=[secaggplus_mod] if how == "secagg" else [])
server = ServerApp()


@server.main()
def main(grid, context):
  started = None

  def between_rounds(index, parameters, config):
    nonlocal started
    survivors = index * (int(num_sites) - int(num_lost))
    if strategy.num_results != survivors:
      raise RuntimeError(f"{strategy.num_results} models in {index} rounds, not {survivors}")
    if index:
      stepping.answer(time.perf_counter() - started[0], stepping.tree_cpu() - started[1])
    else:
      stepping.ready("flwr", "ray")
    if index < int(num_rounds):
      stepping.wait()
    started = time.perf_counter(), stepping.tree_cpu()

  rng = np.random.default_rng(0)
  start = [rng.normal(size=shape).astype(np.float32) * np.float32(0.1) for shape in SHAPES]
  k = int(num_sites)
  strategy = Counting(
    fraction_fit=1.0,
    min_fit_clients=k,
    fraction_evaluate=0.0,
    min_available_clients=k,
    initial_parameters=ndarrays_to_parameters(start),
    evaluate_fn=between_rounds,
  )
  legacy = LegacyContext(
    context=context, config=ServerConfig(num_rounds=int(num_rounds)), strategy=strategy
  )
  shares = int(num_peers) + 1  # a client keeps one itself
  fit = (
    SecAggPlusWorkflow(num_shares=shares, reconstruction_threshold=shares // 2 + 1)
    if how == "secagg"
    else None
  )
  DefaultWorkflow(fit_workflow=fit)(grid, legacy)


if __name__ == "__main__":
  resources = {"num_cpus": 1, "num_gpus": 0.0}
  run_simulation(
    server,
    client,
    num_supernodes=int(num_sites),
    backend_config={"init_args": {"num_cpus": int(cpus)}, "client_resources": resources},
  )
