"""The same work in PyTorch: data, the two models, and one local epoch."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

BATCH, RATE = 16, 0.1


class CNN(nn.Module):
  """conv 32, conv 64, max-pool, dense 128, dense 10: 1,199,882 parameters."""

  def __init__(self):
    super().__init__()
    self.conv1, self.conv2 = nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3)
    self.dense1, self.dense2 = nn.Linear(9216, 128), nn.Linear(128, 10)

  def forward(self, x):
    x = functional.max_pool2d(functional.relu(self.conv2(functional.relu(self.conv1(x)))), 2)
    return self.dense2(functional.relu(self.dense1(x.flatten(1))))


class MLP(nn.Module):
  """784-32-10."""

  def __init__(self):
    super().__init__()
    self.dense1, self.dense2 = nn.Linear(784, 32), nn.Linear(32, 10)

  def forward(self, x):
    return self.dense2(functional.relu(self.dense1(x.flatten(1))))


MODELS = {"leaf_cnn": CNN, "mlp": MLP}


def load(path):
  """Images [S, N, 1, H, W] and labels [S, N]."""
  with np.load(path) as data:
    images, labels = data["x"], data["y"]
  return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 1, 4, 2, 3))), torch.from_numpy(
    labels
  ).long()


def local_epoch(net, images, labels):
  """One epoch of SGD in random order."""
  optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
  net.train()
  for index in torch.randperm(len(images)).split(BATCH):
    optimizer.zero_grad()
    functional.cross_entropy(net(images[index]), labels[index]).backward()
    optimizer.step()
