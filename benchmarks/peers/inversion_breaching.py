"""Gradient inversion by breaching (Geiping et al.), its `invertinggradients`.

inversion_breaching.py ROUNDS CASE IMAGES OUT STEPS TV THREADS

IMAGES is an npz of `images` [N, 3, H, W] in [0, 1] and `labels` [N]; round i attacks image i of
them and writes the reconstruction [3, H, W] to OUT/i.npy. TV is the weight of total variation.
"""

import sys

import attacked
import numpy as np
import stepping
import torch

if not torch.cuda.is_available():
  # torchvision's wheel has operators for CUDA, which a torch for CPU does not load; declare them
  _library = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  for _name in ("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d"):
    _library.define(_name + "(Tensor a) -> Tensor")
    _library.define(f"_{_name}_backward(Tensor a) -> Tensor")
import breaching
from torch import nn
from torch.nn import functional

num_rounds, case, source, out, steps, weight, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
MEAN, STD = 0.5, 0.25


class Ops:
  conv = staticmethod(lambda x, w, stride, padding: functional.conv2d(x, w, None, stride, padding))
  bias = staticmethod(lambda x, b: x + b[:, None, None])
  dense = staticmethod(functional.linear)
  norm = staticmethod(lambda x, scale, bias: functional.group_norm(x, 32, scale, bias))
  relu, sigmoid, add = map(staticmethod, (functional.relu, torch.sigmoid, torch.add))
  flat = staticmethod(lambda x: x.flatten(1))
  mean = staticmethod(lambda x: x.mean((2, 3)))


class Network(nn.Module):
  def __init__(self):
    super().__init__()
    self.params = nn.ParameterList(
      [nn.Parameter(torch.from_numpy(w)) for w in attacked.weights(case)]
    )

  def forward(self, x):
    return attacked.apply(case, Ops, list(self.params), x)


class Metadata:
  modality, normalize, mean, std = "vision", True, (MEAN,) * 3, (STD,) * 3
  shape, classes = (3, 32, 32), attacked.CLASSES


model, loss_fn = Network().eval(), nn.CrossEntropyLoss()
data = np.load(source)
config = breaching.get_attack_config("invertinggradients")
config.optim.max_iterations, config.optim.callback = int(steps), 10**9
config.regularization.total_variation.scale = float(weight)
setup = {"device": torch.device("cpu"), "dtype": torch.float}
attacker = breaching.attacks.prepare_attack(model, loss_fn, config, setup)


def one_round(i):
  torch.manual_seed(i)
  image = torch.from_numpy(data["images"][i])[None]
  label = torch.from_numpy(data["labels"][i : i + 1]).long()
  gradients = torch.autograd.grad(loss_fn(model((image - MEAN) / STD), label), model.parameters())
  server = {"parameters": list(model.parameters()), "buffers": [], "metadata": Metadata}
  known = {"num_data_points": 1, "labels": label, "local_hyperparams": None}
  client = {"gradients": gradients, "buffers": None, "metadata": known}
  found, _ = attacker.reconstruct([server], [client], {}, dryrun=False)
  np.save(f"{out}/{i}.npy", (found["data"][0] * STD + MEAN).clamp(0, 1).numpy())


stepping.run(int(num_rounds), one_round, "torch", "breaching")
