"""From a `ModelConfig` to the pure functions of a model, and what its parameters are."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.models.cnn import CNN, MLP, LeafCNN
from primia_jax.models.config import LITES, ModelConfig, check
from primia_jax.models.efficientnet import EfficientNetLite
from primia_jax.models.resnet import ResNet18
from primia_jax.models.scatter import ScatterCNN, ScatterLinear, features_shape
from primia_jax.models.segmenters import MoNet, UNet
from primia_jax.models.vgg import VGG16
from primia_jax.types import Array, Key, ModelState, Params, PyTree


class Model(NamedTuple):
  """A classifier of images, or of their pixels, as two pure functions.

  Attributes:
    init: key -> (params, model_state).
    apply: (params, model_state, images, *, train=False, key=None) -> (logits, new model_state);
      images float32 [B, H, W, C], logits float32 [B, L], or [B, H, W, L] for each pixel. With
      `train`, BatchNorm uses and tracks the batch's statistics, and dropout is on and needs a key.
  """

  init: Callable[[Key], tuple[Params, ModelState]]
  apply: Callable[..., tuple[Array, ModelState]]


def build(config: ModelConfig) -> Model:
  """Returns the model that `config` describes.

  Raises:
    ValueError: for an unknown name or option, an option the model does not have, or an image too
      small for it.
  """
  check(config)
  return _pure(config, _module(config), config.image_shape)


def of_parts(config: ModelConfig, first: int, last: int | None, shape: Sequence[int]) -> Model:
  """Some parts of a model that has parts, which take [B, *shape]; see `EfficientNetLite`."""
  check(config)
  module = _module(config)
  assert isinstance(module, EfficientNetLite | ResNet18 | VGG16)
  return _pure(config, module.clone(first=first, last=last), tuple(shape))


def _pure(config: ModelConfig, module: nn.Module, shape: tuple[int, ...]) -> Model:
  """A module that takes [B, *shape] as pure functions."""
  shapes = (shape, features_shape(config)) if shape == config.image_shape else (shape,)

  @jax.jit
  def init(key: Key) -> tuple[Params, ModelState]:
    variables = module.init(key, jnp.zeros((1, *shape), jnp.float32))
    return _draw_kernels(key, variables["params"]), variables.get("batch_stats", {})

  def apply(
    params: Params,
    model_state: ModelState,
    images: Array,
    *,
    train: bool = False,
    key: Key | None = None,
  ) -> tuple[Array, ModelState]:
    if images.shape[1:] not in shapes:
      raise ValueError(
        f"{config.name} was built for images [B, {', '.join(map(str, shape))}] but got "
        f"{list(images.shape)}; resize the images or set ModelConfig.image_shape"
      )
    if images.dtype != jnp.float32:
      raise ValueError(
        f"images must be float32, not {images.dtype}; convert uint8 with images.astype(float32) / "
        f"255"
      )
    if train and key is None and max(config.dropout, config.stochastic_depth) > 0:
      raise ValueError(
        f"dropout={config.dropout} and stochastic_depth={config.stochastic_depth} need a key while "
        "training; pass apply(..., train=True, key=key)"
      )
    variables = (
      {"params": params, "batch_stats": model_state} if model_state else {"params": params}
    )
    rngs = {} if key is None else {"dropout": key}
    if not (train and model_state):
      return cast(Array, module.apply(variables, images, train=train, rngs=rngs)), model_state
    logits, updates = module.apply(
      variables, images, train=True, rngs=rngs, mutable=["batch_stats"]
    )
    return logits, updates["batch_stats"]

  return Model(init, apply)


def is_norm_parameter(path: Sequence[Any]) -> bool:
  """Tells whether a parameter belongs to a normalisation layer.

  FedBN (Li et al., arXiv 2102.07623) keeps these at their site. True for scales and offsets of
  BatchNorm and GroupNorm alike. Apply it to parameters only: a model state holds only statistics.

  Args:
    path: of the parameter, as `jax.tree_util.tree_map_with_path` gives it.
  """
  return any("norm" in str(getattr(entry, "key", entry)) for entry in path)


def has_taps(config: ModelConfig) -> Callable[[Params], PyTree] | None:
  """Tells which parameters may be tapped (`primia_jax.tapped`): all kernels but depthwise ones,
  since the model uses each once and unchanged.

  Returns:
    parameters -> bools in their structure; None with weight standardisation, which changes kernels
    before they are used.
  """
  if config.weight_standardisation:
    return None
  return functools.partial(
    jax.tree_util.tree_map_with_path,
    lambda path, leaf: path[-1].key == "kernel" and path[-2].key != "depthwise",
  )


def num_parameters(params: Params) -> int:
  """The number of scalars in `params`, which may also be shapes from `jax.eval_shape`."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _module(config: ModelConfig) -> nn.Module:
  grouped = "cnn", "resnet18", "unet", "monet", *LITES
  norm = config.norm or ("group" if config.name in grouped else "none")
  match config.name:
    case "cnn":
      return CNN(config, norm)
    case "leaf_cnn":
      return LeafCNN(config.num_classes)
    case "mlp":
      return MLP(config.num_classes)
    case "resnet18":
      return ResNet18(config, norm)
    case "scatter_linear":
      return ScatterLinear(config)
    case "scatter_cnn":
      return ScatterCNN(config)
    case "unet":
      return UNet(config, norm)
    case "monet":
      return MoNet(config, norm)
    case "vgg16":
      return VGG16(config, norm)
    case _:
      return EfficientNetLite(config, norm)


def _draw_kernels(key: Key, params: Params) -> Params:
  """Draws kernels from N(0, 2 / fan-in) (arXiv 1502.01852), and the last layer's, which no ReLU
  follows, from N(0, 1 / fan-in).

  The only layer of a linear model stays 0: it has no symmetry to break, so a draw would just add
  noise. All kernels come from one draw, since XLA takes several times longer to compile a random
  generator for each shape.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(params)
  sizes = [
    leaf.size for path, leaf in leaves if path[-1].key == "kernel" and path[0].key != "linear"
  ]
  if not sizes:
    return params
  noise = iter(jnp.split(jax.random.normal(key, (sum(sizes),), jnp.float32), np.cumsum(sizes)[:-1]))

  def draw(path: Sequence[Any], leaf: Array) -> Array:
    if path[-1].key != "kernel" or path[0].key == "linear":
      return leaf
    gain = 1 if path[0].key == "head" else 2
    return next(noise).reshape(leaf.shape) * math.sqrt(gain / math.prod(leaf.shape[:-1]))

  return jax.tree.unflatten(structure, [draw(path, leaf) for path, leaf in leaves])
