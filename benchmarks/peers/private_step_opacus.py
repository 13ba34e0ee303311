"""PyTorch's step, or Opacus's private one, on a full batch of 32. private_step_opacus.py ROUNDS
CASE HOW STEPS THREADS

HOW is plain (no privacy), hooks or ghost. Noise comes from PyTorch's own generator
(`secure_mode` would take longer).
"""

import sys
import warnings

import stepping
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional

num_rounds, case, how, num_steps, threads = sys.argv[1:]
BATCH, RATE, CLIP_NORM, NOISE = 32, 0.1, 1.0, 1.0
warnings.filterwarnings("ignore")  # of noise that is not cryptographic, and of hooks
torch.set_num_threads(int(threads))
torch.manual_seed(0)


def cnn() -> nn.Module:
  """The tutorials' CNN: 26,010 parameters."""
  return nn.Sequential(
    *(nn.Conv2d(1, 16, 8, 2, padding=3), nn.ReLU(), nn.MaxPool2d(2, 1)),
    *(nn.Conv2d(16, 32, 4, 2), nn.ReLU(), nn.MaxPool2d(2, 1)),
    *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
  )


class Block(nn.Module):
  """A basic block of a ResNet with GroupNorm."""

  def __init__(self, before: int, features: int, stride: int):
    super().__init__()
    self.conv1, self.norm1 = (
      nn.Conv2d(before, features, 3, stride, 1, bias=False),
      nn.GroupNorm(32, features),
    )
    self.conv2, self.norm2 = (
      nn.Conv2d(features, features, 3, 1, 1, bias=False),
      nn.GroupNorm(32, features),
    )
    self.shortcut = nn.Identity()
    if before != features:
      self.shortcut = nn.Sequential(
        nn.Conv2d(before, features, 1, stride, bias=False), nn.GroupNorm(32, features)
      )

  def forward(self, x):
    y = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
    return functional.relu(y + self.shortcut(x))


def resnet18() -> nn.Module:
  """ResNet-18 with GroupNorm and torchvision's stem: 11,178,051 parameters."""
  stem = [
    nn.Conv2d(3, 64, 7, 2, 3, bias=False),
    nn.GroupNorm(32, 64),
    nn.ReLU(),
    nn.MaxPool2d(3, 2, 1),
  ]
  widths = (64, 64, 128, 256, 512)
  blocks = [
    Block(widths[i] if first else widths[i + 1], widths[i + 1], 2 if i and first else 1)
    for i in range(4)
    for first in (True, False)
  ]
  return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 3))


model, shape, num_classes = {
  "cnn28": (cnn, (1, 28, 28), 10),
  "resnet18_64": (resnet18, (3, 64, 64), 3),
}[case]
model = model()
images, labels = torch.randn(BATCH, *shape), torch.randint(num_classes, (BATCH,))
optimizer, criterion = torch.optim.SGD(model.parameters(), RATE), nn.CrossEntropyLoss()
if how != "plain":
  made = PrivacyEngine().make_private(
    module=model,
    optimizer=optimizer,
    criterion=criterion,
    data_loader=torch.utils.data.DataLoader(
      torch.utils.data.TensorDataset(images, labels), batch_size=BATCH
    ),
    noise_multiplier=NOISE,
    max_grad_norm=CLIP_NORM,
    poisson_sampling=False,
    grad_sample_mode=how,
  )
  model, optimizer, criterion = made[:3] if how == "ghost" else (*made[:2], criterion)


def one_round(_):
  for _ in range(int(num_steps)):
    optimizer.zero_grad()
    criterion(model(images), labels).backward()
    optimizer.step()


parameters = sum(p.numel() for p in model.parameters())
stepping.run(int(num_rounds), one_round, "torch", "opacus", parameters=parameters, threads=threads)
