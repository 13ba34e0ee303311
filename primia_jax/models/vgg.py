"""VGG-16 (Simonyan and Zisserman, arXiv 1409.1556), in torchvision's layout."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from primia_jax.models.config import ModelConfig
from primia_jax.models.layers import Conv, Dense, Norm, pool, widths
from primia_jax.types import Array


class VGG16(nn.Module):
  """Thirteen 3x3 convolutions in five blocks, then a classifier: configuration D of the paper."""

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    for block, features in enumerate(widths(config, 64, 128, 256, 512, 512), start=1):
      for i in range(1, 3 if block <= 2 else 4):
        x = Conv(features, 3, 1, 1, True, config.weight_standardisation, name=f"conv{block}_{i}")(x)
        x = nn.relu(Norm(self.norm, name=f"norm{block}_{i}")(x, train))
      x = pool(x, config.pool, 2, 2)
    if config.head == "mean":
      x = nn.Dropout(config.dropout, deterministic=not train)(x.mean((1, 2)))
    else:
      x = _adaptive_mean_pool(x, 7).reshape(x.shape[0], -1)
      for i, features in enumerate(widths(config, 4096, 4096), start=1):
        x = nn.relu(Dense(features, name=f"hidden{i}")(x))
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
    return Dense(config.num_classes, name="head")(x)


def _adaptive_mean_pool(x: Array, size: int) -> Array:
  """Means over a size x size grid of bins, as in PyTorch: bin i spans floor(i n / size) to
  ceil((i + 1) n / size).
  """

  def bins(n: int) -> Array:
    rows = np.zeros((size, n), np.float32)
    for i in range(size):
      start, stop = i * n // size, -(-(i + 1) * n // size)
      rows[i, start:stop] = 1 / (stop - start)
    return jnp.asarray(rows)

  if x.shape[1:3] == (size, size):
    return x
  return jnp.einsum("ih,jw,bhwc->bijc", bins(x.shape[1]), bins(x.shape[2]), x)
