"""Our side of the inversion benchmarks: the attacked networks in JAX, and images to attack."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers import attacked
from primia_jax import local
from primia_jax.conv import conv
from primia_jax.data.load import load
from primia_jax.types import Array, LossFn, Params

MEAN, STD = 0.5, 0.25  # by which clients standardise images in [0, 1]


class Ops:
  """`attacked.apply` on NHWC, with kernels as HWIO and dense ones as [in, out], in the order of
  HWC.
  """

  @staticmethod
  def conv(x, w, stride, padding):
    return conv(x, w, strides=(stride, stride), padding=((padding, padding),) * 2)

  @staticmethod
  def norm(x, scale, bias):
    grouped = x.reshape(*x.shape[:3], 32, -1)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    var = jnp.square(grouped - mean).mean((1, 2, 4), keepdims=True)
    x = ((grouped - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(x.shape)
    return x * scale + bias

  bias = staticmethod(jnp.add)
  dense = staticmethod(lambda x, w, b: x @ w + b)
  relu, sigmoid, add = map(staticmethod, (jax.nn.relu, jax.nn.sigmoid, jnp.add))
  flat = staticmethod(lambda x: x.reshape(len(x), -1))
  mean = staticmethod(lambda x: x.mean((1, 2)))


def network(
  case: str, size: int = 32, channels: int = 3, classes: int = attacked.CLASSES
) -> tuple[Params, Callable[..., tuple[Array, dict]], LossFn]:
  """Parameters, apply function and loss of an untrained network of `peers.attacked`."""

  def ours(w):
    if w.ndim == 4:
      return w.transpose(2, 3, 1, 0)
    if w.ndim == 2 and case == "lenet":  # its features are a map of 12 channels
      return w.reshape(len(w), 12, -1).transpose(2, 1, 0).reshape(-1, len(w))
    return w.T

  params = [jnp.asarray(ours(w)) for w in attacked.weights(case, size, channels, classes)]

  def apply(params, model_state, images, *, train=True, key=None):
    del train, key
    return attacked.apply(case, Ops, params, (images - MEAN) / STD), model_state

  prepare = lambda key, images, targets: (images, targets)
  return params, apply, local.classification_loss(apply, prepare, classes)


def images(path: str, split: str, size: int, channels: int, seed: int = 0) -> tuple:
  """All different images of a folder or tar in random order: float32 [N, H, W, C] in [0, 1], and
  int32 labels.
  """
  data = load(f"folder:{path}", size=size, channels=channels)[split]
  pixels = np.asarray(data.images[np.arange(len(data))])
  _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
  order = np.random.default_rng(seed).permutation(np.sort(first))
  return (pixels[order] / 255).astype(np.float32), np.asarray(data.labels)[order].astype(np.int32)
