"""PyTorch without a framework: a loop over sites, and the mean of their models.

torch_loop.py ROUNDS DATA MODEL K THREADS
"""

import sys

import numpy as np
import stepping
import torch
import torch_work

num_rounds, path, model, num_sampled, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.manual_seed(0)
images, labels = torch_work.load(path)
server, worker = torch_work.MODELS[model](), torch_work.MODELS[model]()
rng = np.random.default_rng(1)


def one_round(_):
  before = {name: value.clone() for name, value in server.state_dict().items()}
  total = {name: torch.zeros_like(value) for name, value in before.items()}
  for site in rng.choice(len(images), int(num_sampled), replace=False):
    worker.load_state_dict(before)
    torch_work.local_epoch(worker, images[site], labels[site])
    for name, value in worker.state_dict().items():
      total[name] += value
  server.load_state_dict({name: value / int(num_sampled) for name, value in total.items()})


stepping.run(int(num_rounds), one_round, "torch")
