"""The layers of all models: convolution, dense, normalisation and pooling."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.conv import conv, max_pool, maximum, mean_pool
from primia_jax.depthwise import depthwise
from primia_jax.models.config import MEAN, STD, ModelConfig
from primia_jax.tapped import dense
from primia_jax.types import Array


def pool(x: Array, kind: str, window: int, stride: int, padding: int = 0) -> Array:
  return (max_pool if kind == "max" else mean_pool)(x, window, stride, padding)


def widths(config: ModelConfig, *features: int) -> list[int]:
  """Numbers of channels times the width, rounded to multiples of 8 for groups and vector units."""
  return [max(8, 8 * round(n * config.width / 8)) for n in features]


def normalise(images: Array) -> Array:
  """uint8 images, or float32 ones in [0, 1], as every model takes them."""
  if images.dtype == jnp.uint8:
    images = images.astype(jnp.float32) / 255
  return (images - MEAN) / STD


def renormalised(config: ModelConfig, x: Array) -> Array:
  """Images normalised by MEAN and STD, as the weights expect them: by `config.mean` and `std`, one
  channel as several equal ones where these are several.

  It comes before the zero padding of the first convolution, so it cannot be a part of the kernel.
  """
  if not config.mean:
    return x
  mean, std = (np.asarray(v, np.float64) for v in (config.mean, config.std))
  scale, offset = (STD / std).astype(np.float32), ((MEAN - mean) / std).astype(np.float32)
  return x * last(scale, 4) + last(offset, 4)


# Layers create kernels of zeros; `classifier` fills them, all from one draw.


class Dense(nn.Module):
  """A dense layer through `primia_jax.tapped`, so that its kernel may have taps."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    return dense(x, kernel) + last(bias, x.ndim)


class Conv(nn.Module):
  """A square convolution through `primia_jax.conv`, with `padding` pixels of zeros on each side."""

  features: int
  size: int
  stride: int = 1
  padding: int | str = 0
  use_bias: bool = True
  weight_standardisation: bool = False
  dilation: int = 1

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
    if self.weight_standardisation:
      mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
      kernel = (kernel - last(mean, 4)) * last(jax.lax.rsqrt(var * math.prod(shape[:3]) + 1e-5), 4)
    padding = self.padding if isinstance(self.padding, str) else ((self.padding,) * 2,) * 2
    x = conv(x, kernel, strides=(self.stride,) * 2, padding=padding, dilation=(self.dilation,) * 2)
    if self.use_bias:
      x = x + last(self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32), 4)
    return x


class Depthwise(nn.Module):
  """A square convolution of each channel for itself, with "SAME" padding."""

  size: int
  stride: int = 1
  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.size, self.size, x.shape[-1])
    kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
    x = depthwise(x, kernel, strides=(self.stride,) * 2)
    if self.use_bias:
      x = x + last(self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32), 4)
    return x


def last(v: Any, ndim: int) -> Any:
  return v.reshape((1,) * (ndim - 1) + (-1,))


class Norm(nn.Module):
  """BatchNorm (arXiv 1502.03167), GroupNorm (arXiv 1803.08494; at most 32 groups), a scale and an
  offset alone for "affine", or the identity for "none".

  "affine" is BatchNorm whose statistics stay as they are: they are part of scale and offset, so it
  has no state and never mixes images. The others need only sums over pixels, and scale and shift
  once, in one pass over the images.
  """

  kind: str
  epsilon: float = 1e-5
  momentum: float = 0.9

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    if self.kind == "none":
      return x
    batch, features = x.shape[0], x.shape[-1]
    scale = self.param("scale", nn.initializers.ones, (features,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
    if self.kind == "affine":
      return x * last(scale, x.ndim) + last(bias, x.ndim)
    if self.kind == "group":
      groups = math.gcd(32, features)
      mean, square = (
        v.mean((1, 2)).reshape(batch, groups, -1).mean(-1).repeat(features // groups, axis=1)
        for v in (x, x * x)
      )
      var = maximum(square - mean * mean, 0.0)
    else:
      running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
      running_var = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
      if train:
        mean, square = x.mean((0, 1, 2)), (x * x).mean((0, 1, 2))
        var = maximum(square - mean * mean, 0.0)
        if not self.is_initializing():
          running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
          running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
      else:
        mean, var = running_mean.value, running_var.value
      mean, var = mean[None], var[None]
    factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
    return x * factor[:, None, None] + (bias[None] - mean * factor)[:, None, None]
