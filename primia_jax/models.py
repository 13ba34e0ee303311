"""The shipped image classifiers, and the only module that imports flax.

A model is a pair of pure functions. `init` makes parameters (trained) and model state (BatchNorm
statistics, `{}` without BatchNorm); `apply` turns images into logits. `build` makes the pair from a
`ModelConfig`:

  cnn       four convolution blocks and a global mean pool; any image size; fast on two cores
  leaf_cnn  conv 32, conv 64, max-pool, dense 128: the small CNN that federated-learning frameworks
  are timed with
            (LEAF, arXiv 1812.01097)
  mlp       one hidden layer of 32 units
  resnet18  He et al., arXiv 1512.03385, in torchvision's layout
  vgg16     Simonyan and Zisserman, arXiv 1409.1556, in torchvision's layout

and two of Tramer and Boneh, arXiv 2011.11660, for training under differential privacy, on wavelet
features that nobody trains and no noise touches (`primia_jax.scattering`; see `features`):

  scatter_linear  one dense layer: a convex problem, in which many noisy steps average out
  scatter_cnn     two convolutions with tanh, a pool between them, and a dense layer
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.conv import conv, max_pool, mean_pool
from primia_jax.scattering import num_paths, scatter
from primia_jax.tapped import dense
from primia_jax.types import Array, Key, ModelState, Params, PyTree

NORMS = ("group", "batch", "none")
POOLS = ("max", "mean")
STEMS = ("7x7", "3x3", "3x3/2")
HEADS = ("dense", "mean")

# The options each model reads beside name, num_classes and image_shape; setting another one is an
# error.
OPTIONS = {
  "cnn": ("norm", "pool", "weight_standardisation", "width", "dropout"),
  "leaf_cnn": (),
  "mlp": (),
  "resnet18": ("norm", "pool", "weight_standardisation", "width", "dropout", "stem"),
  "vgg16": ("norm", "weight_standardisation", "pool", "width", "dropout", "head"),
  "scatter_linear": ("norm", "dropout", "scales"),
  "scatter_cnn": ("norm", "pool", "weight_standardisation", "width", "dropout", "scales"),
}
MIN_SIZE = {
  "cnn": 8,
  "leaf_cnn": 6,
  "mlp": 1,
  "resnet18": 16,
  "vgg16": 32,
  "scatter_linear": 2,
  "scatter_cnn": 4,
}
ANGLES = 8  # of the wavelets


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What `build` needs to know.

  Attributes:
    name: cnn, leaf_cnn, mlp, resnet18, vgg16, scatter_linear or scatter_cnn.
    num_classes: the number of logits.
    image_shape: (height, width, channels) of one image.
    norm: "group", "batch" or "none"; None means the model's own: group for cnn, resnet18 and the
      scattering models, which standardise their features so, image by image and without parameters;
      none for the others.
    pool: "max" or "mean" pooling between blocks; mean is the one that costs nothing in encrypted
      inference.
    weight_standardisation: standardise each convolution kernel (Qiao et al., arXiv 1903.10520);
      goes with group norm.
    width: factor on the number of channels.
    dropout: rate before the last dense layer (vgg16: in both hidden dense layers).
    stem: resnet18's first layers: "7x7" (torchvision: stride 2, then a 3x3/2 pool; for 224 px), or
      for small images "3x3/2" (stride 2, no pool) or "3x3" (stride 1, no pool).
    head: vgg16's classifier: "dense" (torchvision: 7x7 mean pool, two dense layers of 4096) or, for
      small images, "mean" (global mean pool).
    scales: octaves of the scattering models' wavelets; the features have 1 / 2^scales of the
      image's size.
  """

  name: str = "cnn"
  num_classes: int = 3
  image_shape: tuple[int, int, int] = (64, 64, 1)
  norm: str | None = None
  pool: str = "max"
  weight_standardisation: bool = False
  width: float = 1.0
  dropout: float = 0.0
  stem: str = "7x7"
  head: str = "dense"
  scales: int = 2


class Model(NamedTuple):
  """A classifier as two pure functions.

  Attributes:
    init: key -> (params, model_state).
    apply: (params, model_state, images, *, train=False, key=None) -> (logits, new model_state);
      images float32 [B, H, W, C], logits float32 [B, L]. `train` makes BatchNorm use and track the
      batch's statistics and turns dropout on, for which it needs a key.
  """

  init: Callable[[Key], tuple[Params, ModelState]]
  apply: Callable[..., tuple[Array, ModelState]]


def build(config: ModelConfig) -> Model:
  """Returns the model that `config` describes.

  Raises:
    ValueError: for an unknown name or option, an option the model does not have, or an image too
      small for it.
  """
  _check(config)
  module = _module(config)

  def init(key: Key) -> tuple[Params, ModelState]:
    variables = jax.jit(module.init)(key, jnp.zeros((1, *config.image_shape), jnp.float32))
    return jax.jit(_draw_kernels)(key, variables["params"]), variables.get("batch_stats", {})

  def apply(
    params: Params,
    model_state: ModelState,
    images: Array,
    *,
    train: bool = False,
    key: Key | None = None,
  ) -> tuple[Array, ModelState]:
    if images.ndim != 4 or images.shape[1:] not in (config.image_shape, _features_shape(config)):
      raise ValueError(
        f"{config.name} was built for images [B, {', '.join(map(str, config.image_shape))}] but "
        f"got "
        f"{list(images.shape)}; resize the images or set ModelConfig.image_shape"
      )
    if images.dtype != jnp.float32:
      raise ValueError(
        f"images must be float32, not {images.dtype}; convert uint8 with images.astype(float32) / "
        f"255"
      )
    if train and config.dropout > 0 and key is None:
      raise ValueError(
        f"dropout={config.dropout} needs a key while training; pass apply(..., train=True, key=key)"
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


def features(config: ModelConfig) -> Callable[[Array], Array] | None:
  """Returns what the model computes before its first parameter, or None where that is the image
  itself.

  The features of the scattering models depend on neither parameters nor other images. A caller
  whose images stay the same (no augmentation) computes them once and passes them to `Model.apply`
  in place of the images, which spares nearly all the work of a step.

  Returns:
    float32 images [B, H, W, C], as `apply` takes them -> float32 [B, H / 2^J, W / 2^J, F], or None.

  Raises:
    ValueError: as `build`.
  """
  _check(config)
  if _features_shape(config) == config.image_shape:
    return None

  def apply(images: Array) -> Array:
    x = scatter(images, config.scales, ANGLES)
    return x if config.norm == "none" else _standardise(x, config.image_shape[2])

  return apply


def is_norm_parameter(path: Sequence[Any]) -> bool:
  """Whether a path, as `jax.tree_util.tree_map_with_path` gives it, leads to a normalisation
  layer's parameter.

  FedBN (Li et al., arXiv 2102.07623) keeps these at their site. True for scales and offsets of
  BatchNorm and GroupNorm alike; everything in a model state is a statistic and is never asked
  about.
  """
  return any("norm" in str(getattr(entry, "key", entry)) for entry in path)


def has_taps(config: ModelConfig) -> Callable[[Params], PyTree] | None:
  """Says which parameters may be given with taps (`primia_jax.tapped`): every kernel, used once
  each as it is.

  Returns:
    parameters -> bools in their structure; None where kernels are standardised before they are
    used.
  """
  if config.weight_standardisation:
    return None
  return functools.partial(
    jax.tree_util.tree_map_with_path, lambda path, _: path[-1].key == "kernel"
  )


def num_parameters(params: Params) -> int:
  """The number of scalars in `params`; also takes the shapes that `jax.eval_shape` returns."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _check(config: ModelConfig) -> None:
  name = config.name
  if name not in OPTIONS:
    raise ValueError(f"unknown model {name!r}; known models: {', '.join(OPTIONS)}")
  for option, allowed in (
    ("norm", (None, *NORMS)),
    ("pool", POOLS),
    ("stem", STEMS),
    ("head", HEADS),
    ("weight_standardisation", (False, True)),
  ):
    if getattr(config, option) not in allowed:
      raise ValueError(f"{option}={getattr(config, option)!r} is not one of {allowed}")
  for field in dataclasses.fields(config)[3:]:
    if field.name not in OPTIONS[name] and getattr(config, field.name) != field.default:
      raise ValueError(
        f"{name} has no option {field.name!r}; it has: {', '.join(OPTIONS[name]) or 'none'}"
      )
  if config.num_classes < 1:
    raise ValueError(f"num_classes={config.num_classes} must be at least 1")
  if not 0 <= config.dropout < 1:
    raise ValueError(f"dropout={config.dropout} must lie in [0, 1)")
  if not config.width > 0:
    raise ValueError(f"width={config.width} must be positive")
  if len(config.image_shape) != 3 or config.image_shape[2] < 1:
    raise ValueError(f"image_shape={config.image_shape} must be (height, width, channels)")
  if min(config.image_shape[:2]) < MIN_SIZE[name]:
    raise ValueError(
      f"{name} needs images of at least {MIN_SIZE[name]} x {MIN_SIZE[name]} pixels, not "
      f"{config.image_shape[:2]}; "
      "resize the images or choose cnn"
    )
  if "scales" in OPTIONS[name]:
    multiple = 2**config.scales if config.scales > 0 else 0
    smallest = multiple * MIN_SIZE[name] // 2
    if not multiple or any(n % multiple or n < smallest for n in config.image_shape[:2]):
      raise ValueError(
        f"scales={config.scales} must be at least 1, and {name} then needs images whose sides are "
        f"multiples of "
        f"{multiple} pixels and at least {smallest}, not {config.image_shape[:2]}; resize them, or "
        f"take fewer scales"
      )
    if config.norm == "batch":
      raise ValueError(
        f"{name} has no norm 'batch': its features are standardised image by image (group), or not"
      )


def _module(config: ModelConfig) -> nn.Module:
  norm = config.norm or ("group" if config.name in ("cnn", "resnet18") else "none")
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
    case _:
      return VGG16(config, norm)


def _draw_kernels(key: Key, params: Params) -> Params:
  """Draws kernels from N(0, 2 / fan-in), arXiv 1502.01852; the last layer's, before no ReLU, from
  N(0, 1 / fan-in).

  The one layer of a linear model stays at nothing: it has no symmetry to break, and what is drawn
  would be noise. One draw serves them all: XLA takes several times longer to compile a random
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


def _pool(x: Array, kind: str, window: int, stride: int, padding: int = 0) -> Array:
  return (max_pool if kind == "max" else mean_pool)(x, window, stride, padding)


def _widths(config: ModelConfig, *features: int) -> list[int]:
  """Channels scaled by the width, in multiples of 8 so that groups and vector units divide them."""
  return [max(8, 8 * round(n * config.width / 8)) for n in features]


# Layers start from kernels of zeros, and `_draw_kernels` fills them.


class Dense(nn.Module):
  """A dense layer through `primia_jax.tapped`, so that its kernel may have taps."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
    return dense(x, kernel) + _last(bias, x.ndim)


class Conv(nn.Module):
  """A square convolution through `primia_jax.conv`; `padding` pixels of zeros on every side."""

  features: int
  size: int
  stride: int = 1
  padding: int = 0
  use_bias: bool = True
  weight_standardisation: bool = False

  @nn.compact
  def __call__(self, x: Array) -> Array:
    shape = (self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", nn.initializers.zeros, shape, jnp.float32)
    if self.weight_standardisation:
      mean, var = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
      kernel = (kernel - _last(mean, 4)) * _last(
        jax.lax.rsqrt(var * math.prod(shape[:3]) + 1e-5), 4
      )
    x = conv(x, kernel, strides=(self.stride,) * 2, padding=((self.padding,) * 2,) * 2)
    if self.use_bias:
      x = x + _last(self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32), 4)
    return x


def _last(v: Array, ndim: int) -> Array:
  return v.reshape((1,) * (ndim - 1) + (-1,))


class Norm(nn.Module):
  """BatchNorm (arXiv 1502.03167), GroupNorm (arXiv 1803.08494; 32 groups at most) or, for "none",
  nothing.

  Both normalise by sums over pixels alone and then scale and shift once, in one pass over the
  images.
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
    if self.kind == "group":
      groups = math.gcd(32, features)
      mean, square = (
        v.mean((1, 2)).reshape(batch, groups, -1).mean(-1).repeat(features // groups, axis=1)
        for v in (x, x * x)
      )
      var = jnp.maximum(square - mean * mean, 0)
    else:
      running_mean = self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32)
      running_var = self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32)
      if train:
        mean, square = x.mean((0, 1, 2)), (x * x).mean((0, 1, 2))
        var = jnp.maximum(square - mean * mean, 0)
        if not self.is_initializing():
          running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
          running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
      else:
        mean, var = running_mean.value, running_var.value
      mean, var = mean[None], var[None]
    factor = jax.lax.rsqrt(var + self.epsilon) * scale[None]
    return x * factor[:, None, None] + (bias[None] - mean * factor)[:, None, None]


class CNN(nn.Module):
  """Four blocks of convolution, norm, ReLU with pools between them, a global mean pool and a dense
  layer.
  """

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    for i, features in enumerate(_widths(config, 16, 32, 64, 128), start=1):
      if i > 1:
        x = _pool(x, config.pool, 2, 2)
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
    x = _pool(x, "max", 2, 2)
    x = nn.relu(Dense(128, name="hidden")(x.reshape(x.shape[0], -1)))
    return Dense(self.num_classes, name="head")(x)


class MLP(nn.Module):
  num_classes: int

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    x = nn.relu(Dense(32, name="hidden")(x.reshape(x.shape[0], -1)))
    return Dense(self.num_classes, name="head")(x)


class BasicBlock(nn.Module):
  """Two 3x3 convolutions beside an identity, or beside a strided 1x1 convolution where the shape
  changes.
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
  """Four stages of two basic blocks; parameters are named after torchvision's."""

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    size, stride = {"7x7": (7, 2), "3x3": (3, 1), "3x3/2": (3, 2)}[config.stem]
    widths = _widths(config, 64, 128, 256, 512)
    bias, standardise = self.norm == "none", config.weight_standardisation
    x = Conv(widths[0], size, stride, size // 2, bias, standardise, name="conv1")(x)
    x = nn.relu(Norm(self.norm, name="norm1")(x, train))
    if config.stem == "7x7":
      x = _pool(x, config.pool, 3, 2, padding=1)
    for stage, features in enumerate(widths, start=1):
      for i in range(2):
        block_stride = 2 if stage > 1 and i == 0 else 1
        x = BasicBlock(features, block_stride, self.norm, standardise, name=f"layer{stage}_{i}")(
          x, train
        )
    x = nn.Dropout(config.dropout, deterministic=not train)(x.mean((1, 2)))
    return Dense(config.num_classes, name="head")(x)


class VGG16(nn.Module):
  """Thirteen 3x3 convolutions in five blocks and a classifier; configuration D of the paper."""

  config: ModelConfig
  norm: str

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    for block, features in enumerate(_widths(config, 64, 128, 256, 512, 512), start=1):
      for i in range(1, 3 if block <= 2 else 4):
        x = Conv(features, 3, 1, 1, True, config.weight_standardisation, name=f"conv{block}_{i}")(x)
        x = nn.relu(Norm(self.norm, name=f"norm{block}_{i}")(x, train))
      x = _pool(x, config.pool, 2, 2)
    if config.head == "mean":
      x = nn.Dropout(config.dropout, deterministic=not train)(x.mean((1, 2)))
    else:
      x = _adaptive_mean_pool(x, 7).reshape(x.shape[0], -1)
      for i, features in enumerate(_widths(config, 4096, 4096), start=1):
        x = nn.relu(Dense(features, name=f"hidden{i}")(x))
        x = nn.Dropout(config.dropout, deterministic=not train)(x)
    return Dense(config.num_classes, name="head")(x)


def _features_shape(config: ModelConfig) -> tuple[int, int, int]:
  height, width, channels = config.image_shape
  if "scales" not in OPTIONS[config.name]:
    return config.image_shape
  return (
    height >> config.scales,
    width >> config.scales,
    channels * num_paths(config.scales, ANGLES),
  )


def _standardise(x: Array, channels: int) -> Array:
  """Gives each path of each image, its last wavelet's angles together, mean 0 and variance 1 over
  pixels and angles.
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
  """The network that the paper gives for CIFAR-10; tanh bounds what one image does to a
  gradient.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Array, train: bool = False) -> Array:
    config = self.config
    x = _features(config, x)
    first, second = _widths(config, 64, 64)
    x = jnp.tanh(Conv(first, 3, 1, 1, True, config.weight_standardisation, name="conv1")(x))
    x = _pool(x, config.pool, 2, 2)
    x = jnp.tanh(Conv(second, 3, 1, 1, True, config.weight_standardisation, name="conv2")(x))
    x = nn.Dropout(config.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
    return Dense(config.num_classes, name="head")(x)


def _features(config: ModelConfig, x: Array) -> Array:
  """The features of images; features are passed on."""
  compute = features(config)
  return x if compute is None or x.shape[1:] != config.image_shape else compute(x)


def _adaptive_mean_pool(x: Array, size: int) -> Array:
  """Means over a size x size grid of bins from floor(i n / size) to ceil((i + 1) n / size), as
  PyTorch has it.
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
