"""Flower: FedAvg in its Ray simulation. flower_rounds.py ROUNDS DATA MODEL K CPUS"""

import os
import sys
import time

os.environ.update(RAY_USAGE_STATS_ENABLED="0", FLWR_TELEMETRY_ENABLED="0")

import stepping
import torch
import torch_work
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

num_rounds, path, model, num_sampled, cpus = sys.argv[1:]
images, labels = torch_work.load(path)
num_sites = len(images)
client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context):
  torch.set_num_threads(1)
  net = torch_work.MODELS[model]()
  net.load_state_dict(message.content["arrays"].to_torch_state_dict())
  site = int(context.node_config["partition-id"])
  torch_work.local_epoch(net, images[site], labels[site])
  metrics = MetricRecord({"num-examples": images.shape[1]})
  return Message(
    content=RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}),
    reply_to=message,
  )


@server.main()
def main(grid: Grid, context: Context):
  started = None

  def between_rounds(index, arrays):
    nonlocal started
    if index:
      stepping.answer(time.perf_counter() - started[0], stepping.tree_cpu() - started[1])
    else:
      stepping.ready("flwr", "ray", "torch")
    if index < int(num_rounds):
      stepping.wait()
    started = time.perf_counter(), stepping.tree_cpu()

  torch.manual_seed(0)
  start = ArrayRecord(torch_work.MODELS[model]().state_dict())
  k = int(num_sampled)
  strategy = FedAvg(
    fraction_train=k / num_sites,
    fraction_evaluate=0.0,
    min_train_nodes=k,
    min_available_nodes=num_sites,
  )
  strategy.start(
    grid=grid, initial_arrays=start, num_rounds=int(num_rounds), evaluate_fn=between_rounds
  )


if __name__ == "__main__":
  resources = {"num_cpus": 1, "num_gpus": 0.0}
  run_simulation(
    server,
    client,
    num_supernodes=num_sites,
    backend_config={"init_args": {"num_cpus": int(cpus)}, "client_resources": resources},
  )
