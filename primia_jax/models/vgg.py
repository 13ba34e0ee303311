"""VGG-16 (Simonyan and Zisserman, arXiv 1409.1556), in torchvision's layout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from primia_jax.models.config import ModelConfig
from primia_jax.models.layers import Conv, Dense, Norm, pool, renormalised, widths
from primia_jax.types import Array


class VGG16(nn.Module):
  """Thirteen 3x3 convolutions in five blocks, then a classifier: configuration D of the paper.

  Attributes:
    config, norm: as for all models.
    first, last: as in `EfficientNetLite`, of `PARTS`.
  """

  config: ModelConfig
  norm: str
  first: int = 0
  last: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    standardise = config.weight_standardisation

    def block(number: int, features: int, x: Array) -> Array:
      x = renormalised(config, x) if number == 1 else x
      for i in range(1, 3 if number <= 2 else 4):
        x = Conv(features, 3, 1, 1, True, standardise, name=f"conv{number}_{i}")(x)
        x = nn.relu(Norm(self.norm, name=f"norm{number}_{i}")(x, train))
      return pool(x, config.pool, 2, 2)

    def drop(x: Array, name: str) -> Array:
      return nn.Dropout(config.dropout, deterministic=not train, name=name)(x)

    def hidden(x: Array) -> Array:
      if config.head == "mean":
        return drop(x.mean((1, 2)), "dropout")
      is_torchvisions = config.head == "dense"
      x = _adaptive_mean_pool(x, 7) if is_torchvisions else x.mean((1, 2), keepdims=True)
      x = x.reshape(x.shape[0], -1)
      for i, features in enumerate(widths(config, *[4096 if is_torchvisions else 512] * 2), 1):
        x = drop(nn.relu(Dense(features, name=f"hidden{i}")(x)), f"dropout{i}")
      return x

    blocks = [
      functools.partial(block, number, features)
      for number, features in enumerate(widths(config, 64, 128, 256, 512, 512), start=1)
    ]
    made: list[Callable[[Array], Array]] = [
      *blocks, hidden, lambda x: Dense(config.num_classes, name="head")(x)
    ]  # fmt: skip
    for part in made[self.first : self.last]:
      x = part(x)
    return x


PARTS = (*(f"block{number}" for number in range(1, 6)), "hidden", "head")


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
