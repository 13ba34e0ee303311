"""EfficientNet-Lite 0, 1 and 2: EfficientNet (Tan and Le, arXiv 1905.11946) with ReLU6 and without
squeeze-and-excitation, as its authors published it for small devices.

Only convolutions, clips and sums: every operation is cheap under encryption. Layers are those of
`efficientnet-lite-pytorch`, whose weights `pretrained` reads; SAME padding puts the odd zero below
and to the right, as in TensorFlow.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from primia_jax.conv import maximum
from primia_jax.models.config import FEATURE_NORM, LITES, MEAN, STD, ModelConfig
from primia_jax.models.layers import Conv, Dense, Depthwise, Norm, widths
from primia_jax.types import Array

# Repeats, kernel size, stride of the first, expansion, and features of each stage; the first and
# the last stage are not repeated more often in larger networks.
_STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
# The published weights take (255 v - 127) / 128 for a value v in [0, 1].
_SCALE, _OFFSET = 255 / 128 * STD, (255 * MEAN - 127) / 128
_EPSILON = 1e-3  # of all norms
_TINY = 1e-12  # least squared norm of features


class Block(nn.Module):
  """A 1x1 convolution to more features, a depthwise one, and a 1x1 one to fewer; plus the input
  where the shape stays. While training, an image leaves out what is added at the rate `left_out`.
  """

  features: int
  size: int
  stride: int
  expansion: int
  norm: str
  left_out: float = 0.0

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    bias, y = self.norm == "none", x
    if self.expansion > 1:
      y = Conv(x.shape[-1] * self.expansion, 1, use_bias=bias, name="expand")(y)
      y = relu6(Norm(self.norm, _EPSILON, name="expand_norm")(y, train))
    y = Depthwise(self.size, self.stride, bias, name="depthwise")(y)
    y = relu6(Norm(self.norm, _EPSILON, name="depthwise_norm")(y, train))
    y = Conv(self.features, 1, use_bias=bias, name="project")(y)
    y = Norm(self.norm, _EPSILON, name="project_norm")(y, train)
    if x.shape != y.shape:
      return y
    drop = nn.Dropout(self.left_out, broadcast_dims=(1, 2, 3), deterministic=not train)
    return x + drop(y)


class EfficientNetLite(nn.Module):
  """Stem, blocks, a 1x1 convolution, a global mean and a dense layer.

  Attributes:
    config, norm: as for all models.
    first: the parts, in the order of `parts`, that come before x; x is what they make of images.
    last: the first part that is left out; None takes all.
  """

  config: ModelConfig
  norm: str
  first: int = 0
  last: int | None = None

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config, bias = self.config, self.norm == "none"
    stem, last = widths(config, 32, 1280)

    def begin(x: Array) -> Array:
      x = Conv(stem, 3, 2, "SAME", bias, name="stem")(x * _SCALE + _OFFSET)
      return relu6(Norm(self.norm, _EPSILON, name="stem_norm")(x, train))

    def pooled(x: Array) -> Array:
      x = Conv(last, 1, use_bias=bias, name="head_conv")(x)
      x = relu6(Norm(self.norm, _EPSILON, name="head_norm")(x, train)).mean((1, 2))
      if config.features == "standardised":
        x = Norm("affine", name=FEATURE_NORM)(x, train)
      return x if config.features == "mean" else unit(x)

    def head(x: Array) -> Array:
      x = nn.Dropout(config.dropout, deterministic=not train)(x)
      return Dense(config.num_classes, name="head")(x)

    shapes = blocks(config)
    rate = config.stochastic_depth / len(shapes)
    made: list[Callable[[Array], Array]] = [
      functools.partial(Block(*shape, self.norm, rate * i, name=f"block{i}"), train=train)
      for i, shape in enumerate(shapes)
    ]
    for part in [begin, *made, pooled, head][self.first : self.last]:
      x = part(x)
    return x


def blocks(config: ModelConfig) -> list[tuple[int, int, int, int]]:
  """(features, kernel size, stride, expansion) of each block."""
  width, depth = LITES[config.name]
  made = []
  for i, (repeats, size, stride, expansion, features) in enumerate(_STAGES):
    if 0 < i < len(_STAGES) - 1:
      repeats = -int(-depth * repeats // 1)
    for j in range(repeats):
      made.append((_rounded(features * width * config.width), size, 1 if j else stride, expansion))
  return made


def parts(config: ModelConfig) -> list[str]:
  """The names of the parts in order, as `EfficientNetLite` has them."""
  return ["stem", *(f"block{i}" for i in range(len(blocks(config)))), "head_conv", "head"]


def unit(x: Array) -> Array:
  """Rows of norm one; a row of zeros stays."""
  return x * lax.rsqrt(maximum(jnp.sum(x * x, axis=-1, keepdims=True), _TINY))


def relu6(x: Array) -> Array:
  return lax.clamp(x.dtype.type(0), x, x.dtype.type(6))


def _rounded(features: float) -> int:
  """To a multiple of eight, and by no more than a tenth downwards."""
  nearest = max(8, int(features + 4) // 8 * 8)
  return nearest + 8 if nearest < 0.9 * features else nearest
