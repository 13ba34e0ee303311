"""The small models: `cnn`, `leaf_cnn` and `mlp`."""

from __future__ import annotations

import flax.linen as nn

from primia_jax.models.config import ModelConfig
from primia_jax.models.layers import Conv, Dense, Norm, pool, widths
from primia_jax.types import Array


class CNN(nn.Module):
  """Four blocks of convolution, norm and ReLU with pools between them, a global mean pool and a
  dense layer.
  """

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    for i, features in enumerate(widths(config, 16, 32, 64, 128), start=1):
      if i > 1:
        x = pool(x, config.pool, 2, 2)
      x = Conv(
        features, 3, 1, 1, self.norm == "none", config.weight_standardisation, name=f"conv{i}"
      )(x)
      x = nn.relu(Norm(self.norm, name=f"norm{i}")(x, train))
    x = nn.Dropout(config.dropout, deterministic=not train)(x.mean((1, 2)))
    return Dense(config.num_classes, name="head")(x)


class LeafCNN(nn.Module):
  num_classes: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = nn.relu(Conv(32, 3, name="conv1")(x))
    x = nn.relu(Conv(64, 3, name="conv2")(x))
    x = pool(x, "max", 2, 2)
    x = nn.relu(Dense(128, name="hidden")(x.reshape(x.shape[0], -1)))
    return Dense(self.num_classes, name="head")(x)


class MLP(nn.Module):
  num_classes: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = nn.relu(Dense(32, name="hidden")(x.reshape(x.shape[0], -1)))
    return Dense(self.num_classes, name="head")(x)
