"""ResNet-18 (He et al., arXiv 1512.03385), in torchvision's layout."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn

from primia_jax.models.config import ModelConfig
from primia_jax.models.layers import Conv, Dense, Norm, pool, renormalised, widths
from primia_jax.types import Array


class BasicBlock(nn.Module):
  """Two 3x3 convolutions plus a shortcut: the identity, or a strided 1x1 convolution where the
  shape changes.
  """

  features: int
  stride: int
  norm: str
  weight_standardisation: bool

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    bias, standardise = self.norm == "none", self.weight_standardisation
    y = Conv(self.features, 3, self.stride, 1, bias, standardise, name="conv1")(x)
    y = nn.relu(Norm(self.norm, name="norm1")(y, train))
    y = Conv(self.features, 3, 1, 1, bias, standardise, name="conv2")(y)
    y = Norm(self.norm, name="norm2")(y, train)
    if x.shape != y.shape:
      x = Conv(self.features, 1, self.stride, 0, bias, standardise, name="downsample_conv")(x)
      x = Norm(self.norm, name="downsample_norm")(x, train)
    return nn.relu(x + y)


class ResNet18(nn.Module):
  """Four stages of two basic blocks. Parameters have torchvision's names.

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
    size, stride = {"7x7": (7, 2), "3x3": (3, 1), "3x3/2": (3, 2)}[config.stem]
    channels = widths(config, 64, 128, 256, 512)
    bias, standardise = self.norm == "none", config.weight_standardisation

    def stem(x: Array) -> Array:
      x = renormalised(config, x)
      x = Conv(channels[0], size, stride, size // 2, bias, standardise, name="conv1")(x)
      x = nn.relu(Norm(self.norm, name="norm1")(x, train))
      return pool(x, config.pool, 3, 2, padding=1) if config.stem == "7x7" else x

    def block(stage: int, i: int, x: Array) -> Array:
      block_stride = 2 if stage > 1 and i == 0 else 1
      shape = channels[stage - 1], block_stride, self.norm, standardise
      return BasicBlock(*shape, name=f"layer{stage}_{i}")(x, train)

    def head(x: Array) -> Array:
      x = nn.Dropout(config.dropout, deterministic=not train)(x.mean((1, 2)))
      return Dense(config.num_classes, name="head")(x)

    blocks = [functools.partial(block, stage, i) for stage in range(1, 5) for i in range(2)]
    made: list[Callable[[Array], Array]] = [stem, *blocks, head]
    for part in made[self.first : self.last]:
      x = part(x)
    return x


PARTS = ("stem", *(f"layer{stage}_{i}" for stage in range(1, 5) for i in range(2)), "head")
