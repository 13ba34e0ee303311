"""Networks that give each pixel a class: `unet` and `monet`."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from primia_jax.models.config import ModelConfig
from primia_jax.models.layers import Conv, Norm, pool, widths
from primia_jax.types import Array

_DILATIONS = (1, 2, 3, 4)


class UNet(nn.Module):
  """U-Net (Ronneberger et al., arXiv 1505.04597) with padded convolutions, half its channels, three
  levels below the first, and nearest-neighbour upsampling.
  """

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config, kept = self.config, list[Array]()
    block = _blocks(config, self.norm, train)
    channels = widths(config, 32, 64, 128, 256)
    for level, features in enumerate(channels):
      if level:
        x = pool(x, config.pool, 2, 2)
      x = block(block(x, features, f"down{level}_0"), features, f"down{level}_1")
      kept.append(x)
    for level in (2, 1, 0):
      x = block(upsample(x), channels[level], f"up{level}")
      x = jnp.concatenate([kept[level], x], axis=-1)
      for i in range(2):
        x = block(x, channels[level], f"up{level}_{i}")
    x = nn.Dropout(config.dropout, deterministic=not train)(x)
    return Conv(config.num_classes, 1, name="head")(x)


class MoNet(nn.Module):
  """A light network of dilated residual blocks after MoNet (Knolle et al., PLoS ONE 2021): two
  levels below the first, 0.4 M parameters, and skips from each level to its mirror.
  """

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config, kept = self.config, list[Array]()
    block = _blocks(config, self.norm, train)

    def dilated(x: Array, features: int, name: str) -> Array:
      """x plus four convolutions that each see further than the one before."""
      for dilation in _DILATIONS:
        x = x + block(x, features, f"{name}_{dilation}", dilation)
      return x

    channels = widths(config, 24, 40, 64)
    for level, features in enumerate(channels):
      if level:
        x = pool(x, config.pool, 2, 2)
      x = dilated(block(x, features, f"down{level}"), features, f"down{level}")
      kept.append(x)
    for level in (1, 0):
      x = block(upsample(x), channels[level], f"up{level}")
      x = block(jnp.concatenate([kept[level], x], axis=-1), channels[level], f"join{level}")
      x = dilated(x, channels[level], f"up{level}")
    x = nn.Dropout(config.dropout, deterministic=not train)(x)
    return Conv(config.num_classes, 1, name="head")(x)


def upsample(x: Array) -> Array:
  """[B, H, W, C] -> [B, 2 H, 2 W, C]: each pixel four times."""
  batch, height, width, channels = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
  return x.reshape(batch, 2 * height, 2 * width, channels)


def _blocks(config: ModelConfig, norm: str, train: bool) -> Callable[..., Array]:
  """(x, features, name, dilation=1) -> convolution 3 x 3, norm and ReLU of x."""

  def block(x: Array, features: int, name: str, dilation: int = 1) -> Array:
    x = Conv(
      features, 3, 1, dilation, norm == "none", config.weight_standardisation, dilation,
      name=f"{name}_conv",
    )(x)  # fmt: skip
    return nn.relu(Norm(norm, name=f"{name}_norm")(x, train))

  return block
