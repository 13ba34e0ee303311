"""PyTorch's step of fine-tuning: all layers of EfficientNet-Lite0, BatchNorm fixed, AdamW.
fine_tuning_torch.py ROUNDS BATCH SIZE THREADS
"""

import sys

import stepping
import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

num_rounds, batch, size, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
net = EfficientNet.from_name("efficientnet-lite0", num_classes=3, image_size=size)
net = net.to(memory_format=torch.channels_last).train()
for module in net.modules():
  if isinstance(module, nn.BatchNorm2d):
    module.eval()  # its statistics stay
optimizer = torch.optim.AdamW(net.parameters(), 5e-4)
images = torch.randn(batch, 1, size, size).expand(-1, 3, -1, -1)
images = images.contiguous(memory_format=torch.channels_last)
labels = torch.arange(batch) % 3


def step(_) -> None:
  loss = nn.functional.cross_entropy(net(images), labels)
  optimizer.zero_grad(set_to_none=True)
  loss.backward()
  optimizer.step()


stepping.run(num_rounds, step, "torch", "efficientnet-lite-pytorch", threads=threads)
