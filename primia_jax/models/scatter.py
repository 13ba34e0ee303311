"""Models on fixed wavelet features, which need no training and no noise (arXiv 2011.11660)."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from primia_jax.models.config import OPTIONS, ModelConfig, check
from primia_jax.models.layers import Conv, Dense, pool, widths
from primia_jax.scattering import num_paths, scatter
from primia_jax.types import Array

ANGLES = 8  # of the wavelets


def features(config: ModelConfig) -> Callable[[Array], Array] | None:
  """Returns the function that computes a model's fixed features, or None where it has none.

  The features of the scattering models depend on the image alone: not on parameters, not on other
  images. If the images never change (no augmentation), compute the features once and pass them to
  `Model.apply` in place of the images. That saves nearly all the work of a step.

  Returns:
    float32 images [B, H, W, C], as `apply` takes them -> float32 [B, H / 2^J, W / 2^J, F], or None.

  Raises:
    ValueError: as `build`.
  """
  check(config)
  if features_shape(config) == config.image_shape:
    return None

  def apply(images: Array) -> Array:
    x = scatter(images, config.scales, ANGLES)
    return x if config.norm == "none" else _standardise(x, config.image_shape[2])

  return apply


def features_shape(config: ModelConfig) -> tuple[int, int, int]:
  height, width, channels = config.image_shape
  if "scales" not in OPTIONS[config.name]:
    return config.image_shape
  return (
    height >> config.scales,
    width >> config.scales,
    channels * num_paths(config.scales, ANGLES),
  )


def _standardise(x: Array, channels: int) -> Array:
  """Gives each path of each image mean 0 and variance 1 over pixels. Paths that differ only in
  their last wavelet's angle are standardised together.
  """

  def group(x: Array, angles: int) -> Array:
    grouped = x.reshape(*x.shape[:-1], -1, angles)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    centred = grouped - mean
    return (
      centred * jax.lax.rsqrt((centred * centred).mean((1, 2, 4), keepdims=True) + 1e-5)
    ).reshape(x.shape)

  parts = jnp.split(x, channels, axis=-1)
  return jnp.concatenate(
    [group(p, n) for part in parts for p, n in ((part[..., :1], 1), (part[..., 1:], ANGLES))], -1
  )


class ScatterLinear(nn.Module):
  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = _features(self.config, x).reshape(x.shape[0], -1)
    x = nn.Dropout(self.config.dropout, deterministic=not train)(x)
    return Dense(self.config.num_classes, name="linear")(x)


class ScatterCNN(nn.Module):
  """The paper's network for CIFAR-10. tanh bounds the effect of one image on a gradient."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    x = _features(config, x)
    first, second = widths(config, 64, 64)
    x = jnp.tanh(Conv(first, 3, 1, 1, True, config.weight_standardisation, name="conv1")(x))
    x = pool(x, config.pool, 2, 2)
    x = jnp.tanh(Conv(second, 3, 1, 1, True, config.weight_standardisation, name="conv2")(x))
    x = nn.Dropout(config.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
    return Dense(config.num_classes, name="head")(x)


def _features(config: ModelConfig, x: Array) -> Array:
  """The features of images. Input that already is features is returned as it is."""
  compute = features(config)
  return x if compute is None or x.shape[1:] != config.image_shape else compute(x)
