"""Networks of medical imaging in Flax, in the form for inference, at any width and size.

Convolutions are NHWC or NDHWC. `variables` draws weights and measures the norms' statistics, so
that activations stay near one and every gate sees both signs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.models import ModelConfig, efficientnet
from primia_jax.types import Array, PyTree

HE = nn.initializers.he_normal()
WIDE = nn.initializers.variance_scaling(4.0, "fan_in", "normal")
NEAR_ZERO = nn.initializers.normal(0.3)
Conv = functools.partial(nn.Conv, use_bias=False, kernel_init=HE)
leaky_relu = functools.partial(nn.leaky_relu, negative_slope=0.01)


def near_one(key: Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> Array:
  return jax.random.uniform(key, shape, dtype, 0.5, 1.5)


class BatchNorm(nn.Module):
  """BatchNorm by its statistics; with `measure`, these become the batch's own."""

  measure: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = nn.BatchNorm(not self.measure, momentum=0.0, scale_init=near_one, bias_init=NEAR_ZERO)
    return norm(x)


class Bottleneck(nn.Module):
  features: int
  stride: int
  measure: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    y = nn.relu(BatchNorm(self.measure)(Conv(self.features, (1, 1))(x)))
    y = Conv(self.features, (3, 3), self.stride)(y)
    y = Conv(4 * self.features, (1, 1))(nn.relu(BatchNorm(self.measure)(y)))
    y = BatchNorm(self.measure)(y)
    if x.shape != y.shape:
      x = BatchNorm(self.measure)(Conv(4 * self.features, (1, 1), self.stride)(x))
    return nn.relu(x + y)


class ResNet50(nn.Module):
  """He et al., arXiv 1512.03385."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = 64 // self.divisor
    x = nn.relu(BatchNorm(self.measure)(Conv(width, (7, 7), 2)(x)))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for stage, blocks in enumerate((3, 4, 6, 3)):
      for block in range(blocks):
        stride = 2 if stage and not block else 1
        x = Bottleneck(width << stage, stride, self.measure)(x)
    return nn.Dense(1000 // self.divisor)(x.mean((1, 2)))


class VGG16(nn.Module):
  """Simonyan and Zisserman, arXiv 1409.1556."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for features, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
      for _ in range(convolutions):
        x = nn.relu(Conv(features // self.divisor, (3, 3), use_bias=True, bias_init=NEAR_ZERO)(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.reshape(x.shape[0], -1)
    for _ in range(2):
      x = nn.relu(nn.Dense(4096 // self.divisor, kernel_init=HE, bias_init=NEAR_ZERO)(x))
    return nn.Dense(1000 // self.divisor)(x)


class DenseNet121(nn.Module):
  """Huang et al., arXiv 1608.06993."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    growth = 32 // self.divisor
    normed = lambda x: nn.relu(BatchNorm(self.measure)(x))
    x = normed(Conv(2 * growth, (7, 7), 2)(x))
    x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    for block, layers in enumerate((6, 12, 24, 16)):
      if block:
        x = nn.avg_pool(Conv(x.shape[-1] // 2, (1, 1))(normed(x)), (2, 2), (2, 2))
      for _ in range(layers):
        y = Conv(growth, (3, 3))(normed(Conv(4 * growth, (1, 1))(normed(x))))
        x = jnp.concatenate([x, y], -1)
    return nn.Dense(1000 // self.divisor)(normed(x).mean((1, 2)))


class UNet2D(nn.Module):
  """Ronneberger et al., arXiv 1505.04597, with BatchNorm and leaky ReLU."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    widths = [(64 << level) // self.divisor for level in range(5)]

    def two(x: Array, features: int) -> Array:
      for _ in range(2):
        x = leaky_relu(BatchNorm(self.measure)(Conv(features, (3, 3))(x)))
      return x

    skips = []
    for features in widths[:-1]:
      skips.append(two(x, features))
      x = nn.max_pool(skips[-1], (2, 2), (2, 2))
    x = two(x, widths[-1])
    for features, skip in zip(widths[-2::-1], skips[::-1], strict=True):
      x = nn.ConvTranspose(features, (2, 2), (2, 2))(x)
      x = two(jnp.concatenate([skip, x], -1), features)
    return nn.Conv(2, (1, 1))(x)


class UNet3D(nn.Module):
  """The 3-D U-Net of nnU-Net (Isensee et al., arXiv 1809.10486): strided convolutions, InstanceNorm
  of each image, leaky ReLU.
  """

  divisor: int = 1
  measure: bool = False
  levels: int = 5

  @nn.compact
  def __call__(self, x: Array) -> Array:
    widths = [min(32 << level, 320) // self.divisor for level in range(self.levels)]

    def two(x: Array, features: int, stride: int) -> Array:
      for each in (stride, 1):
        x = nn.Conv(features, (3, 3, 3), each, kernel_init=HE)(x)
        x = leaky_relu(nn.InstanceNorm(scale_init=near_one, bias_init=NEAR_ZERO)(x))
      return x

    skips = []
    for level, features in enumerate(widths):
      x = two(x, features, 2 if level else 1)
      skips.append(x)
    for features, skip in zip(widths[-2::-1], skips[-2::-1], strict=True):
      x = nn.ConvTranspose(features, (2, 2, 2), (2, 2, 2))(x)
      x = two(jnp.concatenate([skip, x], -1), features, 1)
    return nn.Conv(3, (1, 1, 1))(x)


class ViT(nn.Module):
  """Dosovitskiy et al., arXiv 2010.11929, with patches of 16 pixels: ViT-B."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = 768 // self.divisor
    norm = lambda: nn.LayerNorm(scale_init=near_one, bias_init=NEAR_ZERO)
    x = nn.Conv(width, (16, 16), (16, 16))(x)
    x = x.reshape(x.shape[0], -1, width)
    first = self.param("class", NEAR_ZERO, (1, 1, width), jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, width)), x], 1)
    x = x + self.param("positions", NEAR_ZERO, (1, *x.shape[1:]), jnp.float32)
    for _ in range(12):
      y = norm()(x)
      x = x + nn.MultiHeadDotProductAttention(12)(y, y)
      x = x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(norm()(x))))
    return nn.Dense(1000 // self.divisor)(norm()(x)[:, 0])


class LSTM(nn.Module):
  """Two recurrent layers over a sequence [B, steps, features], and the classes at its end."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    width = 512 // self.divisor
    for _ in range(2):
      start = (jnp.zeros((x.shape[0], width), x.dtype),) * 2
      x = nn.RNN(nn.OptimizedLSTMCell(width, kernel_init=WIDE))(x, initial_carry=start)
    return nn.Dense(10)(x[:, -1])


class EfficientNetLite0(nn.Module):
  """EfficientNet (arXiv 1905.11946) with ReLU6 and without squeeze-and-excitation."""

  divisor: int = 1
  measure: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    norm = lambda y: BatchNorm(self.measure)(y)
    x = nn.relu6(norm(Conv(32 // self.divisor, (3, 3), 2)(x)))
    config = ModelConfig("efficientnet_lite0", width=1 / self.divisor)
    for features, size, stride, expansion in efficientnet.blocks(config):
      wide, y = x.shape[-1] * expansion, x
      if expansion > 1:
        y = nn.relu6(norm(Conv(wide, (1, 1))(y)))
      y = nn.relu6(norm(Conv(wide, (size, size), stride, feature_group_count=wide)(y)))
      y = norm(Conv(features, (1, 1))(y))
      x = x + y if x.shape == y.shape else y
    x = nn.relu6(norm(Conv(1280 // self.divisor, (1, 1))(x))).mean((1, 2))
    return nn.Dense(1000 // self.divisor)(x)


class Network(NamedTuple):
  """A network at full size, and as the slow tests run it.

  Attributes:
    module: (divisor, measure) -> Flax module, whose widths are divided by the divisor.
    full: shape of the input of the published size.
    small: of the input at an eighth of the width.
  """

  module: Callable[..., nn.Module]
  full: tuple[int, ...]
  small: tuple[int, ...]


DIVISOR = 8
NETWORKS = {
  "ResNet-50": Network(ResNet50, (1, 224, 224, 3), (1, 64, 64, 3)),
  "VGG-16": Network(VGG16, (1, 224, 224, 3), (1, 32, 32, 3)),
  "DenseNet-121": Network(DenseNet121, (1, 224, 224, 3), (1, 64, 64, 3)),
  "U-Net, 2-D": Network(UNet2D, (1, 256, 256, 1), (1, 32, 32, 1)),
  "U-Net, 3-D": Network(UNet3D, (1, 128, 128, 128, 1), (1, 32, 32, 32, 1)),
  "ViT-B/16": Network(ViT, (1, 224, 224, 3), (1, 32, 32, 3)),
  "LSTM, two layers": Network(LSTM, (1, 40, 64), (2, 8, 8)),
}
# Whose errors stand elsewhere: the conformance table has the library's own.
OTHERS = {"EfficientNet-Lite0": Network(EfficientNetLite0, (1, 224, 224, 3), (1, 64, 64, 3))}


def shapes(network: Network) -> tuple[PyTree, jax.ShapeDtypeStruct]:
  """Variables and input at full size, without values."""
  x = jax.ShapeDtypeStruct(network.full, jnp.float32)
  return jax.eval_shape(network.module().init, jax.random.key(0), x), x


def small(network: Network) -> tuple[nn.Module, PyTree, np.ndarray]:
  """The network at an eighth of its width, random variables with measured statistics, an image."""
  x = np.random.default_rng(0).standard_normal(network.small).astype(np.float32)
  module = network.module(divisor=DIVISOR)
  drawn = jax.jit(module.init)(jax.random.key(0), x)
  if "batch_stats" not in drawn:
    return module, drawn, x
  measure = network.module(divisor=DIVISOR, measure=True)
  several = np.random.default_rng(1).standard_normal((8, *network.small[1:])).astype(np.float32)
  _, measured = jax.jit(functools.partial(measure.apply, mutable=["batch_stats"]))(drawn, several)
  return module, {**drawn, **measured}, x
