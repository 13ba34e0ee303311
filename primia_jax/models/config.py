"""The configuration of a model, and which options each model has."""

from __future__ import annotations

import dataclasses

NORMS = ("group", "batch", "affine", "none")
POOLS = ("max", "mean")
STEMS = ("7x7", "3x3", "3x3/2")
HEADS = ("dense", "dense512", "mean")
FEATURES = ("mean", "unit", "standardised")
FEATURE_NORM = "feature_norm"  # the layer that standardises features
# EfficientNet-Lite: factors on its features and on the repeats of its blocks
LITES = {
  "efficientnet_lite0": (1.0, 1.0),
  "efficientnet_lite1": (1.0, 1.1),
  "efficientnet_lite2": (1.1, 1.2),
}
# How images are normalised that a model with published weights is given: (v - MEAN) / STD for
# values in [0, 1]. Of a typical radiograph; fixed, so that no statistics of any site are needed.
MEAN, STD = 0.5, 0.25
# By channel, as torchvision's weights expect them (`ModelConfig.mean`).
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# The options of each model besides name, num_classes and image_shape. Setting any other is an
# error.
OPTIONS = {
  "cnn": ("norm", "pool", "weight_standardisation", "width", "dropout"),
  "leaf_cnn": (),
  "mlp": (),
  "resnet18": (
    *("norm", "pool", "weight_standardisation", "width", "dropout", "stem", "mean", "std"),
  ),
  "vgg16": (
    *("norm", "weight_standardisation", "pool", "width", "dropout", "head", "mean", "std"),
  ),
  "scatter_linear": ("norm", "dropout", "scales"),
  "scatter_cnn": ("norm", "pool", "weight_standardisation", "width", "dropout", "scales"),
  "unet": ("norm", "pool", "weight_standardisation", "width", "dropout"),
  "monet": ("norm", "pool", "weight_standardisation", "width", "dropout"),
  **dict.fromkeys(LITES, ("norm", "width", "dropout", "stochastic_depth", "features")),
}
# Those that give each pixel a class, and of what the sides of their images are multiples.
SEGMENTERS = {"unet": 8, "monet": 4}
MIN_SIZE = {
  "cnn": 8,
  "leaf_cnn": 6,
  "mlp": 1,
  "resnet18": 16,
  "vgg16": 32,
  "scatter_linear": 2,
  "scatter_cnn": 4,
  "unet": 8,
  "monet": 4,
  **dict.fromkeys(LITES, 32),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The configuration that `build` turns into a model.

  Attributes:
    name: cnn, leaf_cnn, mlp, resnet18, vgg16, scatter_linear, scatter_cnn, or efficientnet_lite0,
      1 or 2; or unet or monet, which give each pixel a class.
    num_classes: the number of logits.
    image_shape: (height, width, channels) of one image.
    norm: "group", "batch", "affine" (BatchNorm whose statistics stay fixed, for pretrained weights)
      or "none". None takes the model's default: "group" for cnn, resnet18, EfficientNet-Lite, unet
      and monet; "group" for the scattering models, which then standardise their features image by
      image and without parameters; "none" for the others.
    pool: "max" or "mean" pooling between blocks. Mean pooling is free in encrypted inference.
    weight_standardisation: standardise each convolution kernel (Qiao et al., arXiv 1903.10520).
      Use it with group norm.
    width: factor on the number of channels.
    dropout: rate before the last dense layer (vgg16: in both hidden dense layers).
    stem: resnet18's first layers. "7x7" is torchvision's, for 224 px: stride 2, then a 3x3/2 pool.
      For small images: "3x3/2" (stride 2, no pool) or "3x3" (stride 1, no pool).
    head: vgg16's classifier. "dense" is torchvision's: 7x7 mean pool, two dense layers of 4096.
      "dense512" is PriMIA's: a global mean pool, two dense layers of 512. "mean" is a global mean
      pool alone, for small images.
    scales: octaves J of the scattering models' wavelets. The features have 1 / 2^J of the image's
      height and width.
    mean, std: of each channel, for weights that expect images normalised by them; the model takes
      images normalised by MEAN and STD as all do, and begins with the difference. Images of one
      channel serve as several equal ones where several are named. Empty changes nothing.
    features: what EfficientNet-Lite's last layer takes: "mean", the mean of each map, or "unit",
      these scaled to norm one image by image. An image's effect on a linear layer's gradient is
      then bounded by a public rule, as private training of that layer wants it. "standardised"
      first subtracts a mean and divides by a deviation of each map (`with_statistics`).
    stochastic_depth: EfficientNet-Lite: while training, the rate at which an image leaves out what
      a block adds to its input (Huang et al., arXiv 1603.09382). It grows by block from 0.
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
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  features: str = "mean"
  stochastic_depth: float = 0.0


def check(config: ModelConfig) -> None:
  name = config.name
  if name not in OPTIONS:
    raise ValueError(f"unknown model {name!r}; known models: {', '.join(OPTIONS)}")
  for option, allowed in (
    ("norm", (None, *NORMS)),
    ("pool", POOLS),
    ("stem", STEMS),
    ("head", HEADS),
    ("features", FEATURES),
    ("weight_standardisation", (False, True)),
  ):
    if getattr(config, option) not in allowed:
      known = ", ".join(str(value) for value in allowed if value is not None)
      raise ValueError(f"{option}={getattr(config, option)!r} is not one of {known}")
  for field in dataclasses.fields(config)[3:]:
    if field.name not in OPTIONS[name] and getattr(config, field.name) != field.default:
      raise ValueError(
        f"{field.name}={getattr(config, field.name)!r}: {name} has no option {field.name!r}; "
        f"it has: {', '.join(OPTIONS[name]) or 'none'}"
      )
  if config.num_classes < 1:
    raise ValueError(f"num_classes={config.num_classes} must be at least 1")
  for option in ("dropout", "stochastic_depth"):
    if not 0 <= getattr(config, option) < 1:
      raise ValueError(f"{option}={getattr(config, option)} must lie in [0, 1)")
  if not config.width > 0:
    raise ValueError(f"width={config.width} must be positive")
  if len(config.image_shape) != 3 or config.image_shape[2] < 1:
    raise ValueError(f"image_shape={config.image_shape} must be (height, width, channels)")
  channels = config.image_shape[2]
  if config.mean or config.std:
    fits = len(config.mean) == len(config.std) and (channels == 1 or len(config.mean) == channels)
    if not fits or not all(s > 0 for s in config.std):
      raise ValueError(
        f"mean={config.mean} and std={config.std} must have a number for each of {channels} "
        "channels, std positive ones"
      )
  if min(config.image_shape[:2]) < MIN_SIZE[name]:
    raise ValueError(
      f"{name} needs images of at least {MIN_SIZE[name]} x {MIN_SIZE[name]} pixels, not "
      f"{config.image_shape[:2]}; resize the images or choose cnn"
    )
  multiple = SEGMENTERS.get(name, 1)
  if any(n % multiple for n in config.image_shape[:2]):
    raise ValueError(
      f"{name} needs images whose sides are multiples of {multiple} pixels, not "
      f"{config.image_shape[:2]}; resize the images"
    )
  if "scales" in OPTIONS[name]:
    multiple = 2**config.scales if config.scales > 0 else 0
    smallest = multiple * MIN_SIZE[name] // 2
    if not multiple or any(n % multiple or n < smallest for n in config.image_shape[:2]):
      raise ValueError(
        f"scales={config.scales} must be at least 1, and {name} then needs images whose sides are "
        f"multiples of {multiple} pixels and at least {smallest}, not {config.image_shape[:2]}; "
        "resize them, or use fewer scales"
      )
    if config.norm in ("batch", "affine"):
      raise ValueError(
        f"{name} has no norm={config.norm!r}: use 'group', which standardises its features image "
        "by image, or 'none'"
      )
