"""The network that is trained, and the form of its images."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import models, pretrained, primia_files
from primia_jax.data import augment as augmenting
from primia_jax.evaluation import batches
from primia_jax.models import normalise
from primia_jax.types import Array, Key, ModelState, Params

from .. import model_files, settings
from ..settings import require, setting
from . import feature_statistics as statistics
from .data import Data

AUGMENTATIONS = {
  "none": augmenting.Augmentation(),
  "light": augmenting.Augmentation(
    rotation_degrees=8, translation=0.05, scale=0.1, contrast=0.2, brightness=0.1
  ),
  "strong": augmenting.Augmentation(
    rotation_degrees=12,
    translation=0.08,
    scale=0.15,
    shear_degrees=5,
    contrast=0.4,
    brightness=0.15,
    gamma=0.4,
    noise=0.03,
    blur=1.0,
    cutout=0.3,
  ),
}
_INITIAL = 7  # what the key of the initial parameters is folded with
_FEATURE_BATCH = 64
IMAGENET = "imagenet"  # weights from an installed package


@dataclasses.dataclass(frozen=True)
class Model:
  """Which network."""

  model: str = setting(
    "cnn",
    "cnn, leaf_cnn, mlp, resnet18, vgg16, scatter_linear, scatter_cnn, or efficientnet_lite0, 1 or "
    "2; or unet or monet, which learn masks",
  )
  norm: str = setting(
    "",
    "normalisation: group, batch, affine (BatchNorm with the fixed statistics of pretrained "
    "weights) or none; empty takes the model's own, that of a run given as pretrained, and affine "
    "for another pretrained efficientnet_lite or resnet18",
  )
  pool: str = setting("max", "pooling: max or mean")
  width: float = setting(1.0, "factor on the number of channels")
  stem: str = setting(
    "", "resnet18: 7x7 (large images), 3x3/2 or 3x3 (small ones); empty chooses by image size"
  )
  head: str = setting(
    "", "vgg16: dense (torchvision's), dense512 (PriMIA's) or mean; empty takes dense"
  )
  features: str = setting(
    "",
    "efficientnet_lite: what the last layer takes: mean (of each map), unit (scaled to norm one "
    "image by image, for private training of that layer), or standardised (by feature_statistics, "
    "then scaled as unit); empty takes mean",
  )
  feature_statistics: str = setting(
    "",
    "features=standardised: the mean and deviation of each feature over public images: a file of "
    "`python -m benchmarks.feature_statistics`, or the name of one that comes with the programs: "
    f"{', '.join(statistics.known())}. They must not be of the images that are trained on, for "
    "which nothing is charged",
  )
  weight_standardisation: bool = setting(False, "standardise convolution kernels")
  dropout: float = setting(0.0, "dropout rate before the last layer")
  stochastic_depth: float = setting(
    0.0,
    "efficientnet_lite: while training, the rate at which an image leaves out the last block that "
    "adds to its input; it grows by block from 0",
  )
  pretrained: str = setting(
    "",
    "weights to start from: a state dict (.pth or .safetensors) of torchvision's resnet18 or vgg16 "
    "or of an efficientnet_lite; a checkpoint of PriMIA (.pt); the folder of a finished run; or "
    "imagenet, from the package of an efficientnet_lite in the extra pretrained. Images are "
    "normalised as the weights expect",
  )
  first_trained: str = setting(
    "",
    "the first part of a pretrained model that is trained; parts before it stay as they are and "
    "are computed once where images do not change. efficientnet_lite: block1, block2, ..., "
    "head_conv or head; resnet18: layer1_0, layer1_1, layer2_0, ..., head; vgg16: block2, ..., "
    "hidden or head. Empty trains all",
  )

  def __post_init__(self):
    require(0 < self.width < math.inf, "width", self.width, "must be positive and finite")
    for name in ("dropout", "stochastic_depth"):
      require(0 <= getattr(self, name) < 1, name, getattr(self, name), "must lie in [0, 1)")
    if self.first_trained and not self.pretrained:
      raise ValueError(
        f"first_trained={self.first_trained!r} keeps the parts before it as they were trained; set "
        "pretrained, too"
      )
    if self.pretrained not in ("", IMAGENET):
      path = pathlib.Path(self.pretrained).expanduser()
      if not path.is_file() and not (path / "model.json").is_file():
        raise FileNotFoundError(
          f"pretrained={self.pretrained}: there is no such file, nor a finished run; check the "
          f"path, or use {IMAGENET}"
        )
    self._check_statistics()

  def _check_statistics(self) -> None:
    name, standardised = self.feature_statistics, self.features == "standardised"
    of_run = self.pretrained not in ("", IMAGENET) and _path(self.pretrained).is_dir()
    if name and (of_run or not (standardised and self.pretrained)):
      raise ValueError(
        f"feature_statistics={name} belongs to features=standardised on published weights; a run "
        "given as pretrained has its own; leave it out"
      )
    if standardised and not name and not of_run:
      raise ValueError(
        "features=standardised needs feature_statistics, and pretrained weights whose features "
        f"they are of; there are statistics {', '.join(statistics.known())}"
      )
    if name:
      statistics.path_of(name)

  def config(self, data: Data, num_classes: int) -> models.ModelConfig:
    """The library's own record of the model.

    Raises:
      ValueError: the model cannot be built so.
    """
    size = data.image_size
    stem = self.stem or ("7x7" if size >= 160 else "3x3/2" if size >= 48 else "3x3")
    norm, mean, std = self._of_weights()
    config = models.ModelConfig(
      name=self.model,
      num_classes=num_classes,
      image_shape=(size, size, data.channels),
      norm=self.norm or norm,
      pool=self.pool,
      weight_standardisation=self.weight_standardisation,
      width=self.width,
      dropout=self.dropout,
      stochastic_depth=self.stochastic_depth,
      stem=stem if self.model == "resnet18" else self.stem or "7x7",
      head=self.head or "dense",
      mean=mean,
      std=std,
      features=self.features or "mean",
    )
    try:
      models.build(config)
    except ValueError as error:
      of_images = f"image_size={size}: " if "images" in str(error) else ""
      raise ValueError(f"{of_images}{error}") from error
    return config

  def initial(self, config: models.ModelConfig, key: Key) -> tuple[Params, ModelState]:
    """The parameters that training starts from: pretrained, or drawn."""
    drawn = models.build(config).init(jax.random.fold_in(key, _INITIAL))
    return self.load(config, *drawn) if self.pretrained else drawn

  def _of_weights(self) -> tuple[str | None, tuple[float, ...], tuple[float, ...]]:
    """The norm of the pretrained weights, and how they expect images: (norm, mean, std)."""
    if not self.pretrained:
      return None, (), ()
    if self.pretrained != IMAGENET and (path := _path(self.pretrained)).is_dir():
      record = model_files.config_of(settings.read_json(path / "model.json")["model"])
      return record.norm, record.mean, record.std
    if self.model in models.LITES:
      return "affine", (), ()
    norm = "affine" if self.model == "resnet18" else None
    if self.model not in ("resnet18", "vgg16") or self.pretrained == IMAGENET:
      return norm, (), ()  # refused when the weights are loaded
    found = primia_files.read_checkpoint(_path(self.pretrained))
    if found.mean:
      return norm, found.mean, found.std
    return norm, models.IMAGENET_MEAN, models.IMAGENET_STD

  def load(
    self, config: models.ModelConfig, params: Params, model_state: ModelState
  ) -> tuple[Params, ModelState]:
    """Parameters, or their shapes, filled with the pretrained weights; the last layer stays.

    Raises:
      ValueError, FileNotFoundError: the weights are not there, or do not fit.
    """
    of_package = self.pretrained == IMAGENET
    path = pretrained.installed_weights(config.name) if of_package else _path(self.pretrained)
    if path.is_dir():
      return self._load_run(config, params, model_state)
    filled, state = pretrained.load_pretrained(
      path, params, model_state, new_head=True, fold_statistics=config.norm == "affine"
    )
    if self.feature_statistics:
      found = statistics.read(self.feature_statistics, config.name, config.image_shape[0])
      filled = models.with_statistics(filled, found)
    return filled, state

  def _load_run(
    self, config: models.ModelConfig, params: Params, model_state: ModelState
  ) -> tuple[Params, ModelState]:
    _, trained, _, of_run = model_files.load_model(self.pretrained)
    if len(trained) > 1:
      raise ValueError(
        f"pretrained={self.pretrained} holds {len(trained)} personal models, one for each site "
        "(FedBN); use a run of another algorithm"
      )
    free = ("num_classes", "dropout", "stochastic_depth")
    alike: dict[str, Any] = {name: getattr(of_run, name) for name in free}
    size, channels = config.image_shape[:2], of_run.image_shape[2]
    alike["image_shape"] = (*size, channels if of_run.mean == () else config.image_shape[2])
    if dataclasses.replace(config, **alike) != dataclasses.replace(of_run, **alike):
      raise ValueError(
        f"pretrained={self.pretrained} holds a model of other settings; set the same: "
        + ", ".join(
          f"{field.name}={getattr(of_run, field.name)!r}, not {getattr(config, field.name)!r}"
          for field in dataclasses.fields(config)
          if field.name not in alike and getattr(config, field.name) != getattr(of_run, field.name)
        )
      )
    known, known_state = jax.tree.map(jnp.asarray, trained[0])
    head = [name for name in params if name in ("head", "linear")]
    keep = lambda old, new: {k: old[k] if k in head else new[k] for k in old}
    filled = keep(params, known), {k: known_state[k] for k in model_state}
    shapes = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    if shapes(filled) != shapes((params, model_state)):
      raise ValueError(
        f"pretrained={self.pretrained} was trained on images of {of_run.image_shape}, and its "
        f"weights do not fit {config.image_shape}; set the same image_size and channels"
      )
    return filled

  def frozen(self, config: models.ModelConfig, key: Key) -> models.Frozen | None:
    """The model as frozen and trained parts, with what they start from; None if all is trained."""
    if not self.first_trained:
      return None
    params, model_state = self.initial(config, key)
    return models.freeze(config, params, model_state, self.first_trained)

  def trained(self, config: models.ModelConfig) -> models.Model:
    """What is trained: the model, or its trained parts.

    Raises:
      ValueError: the model has no such parts.
    """
    model = models.build(config)
    if not self.first_trained:
      return model
    params, model_state = jax.eval_shape(model.init, jax.random.key(0))
    try:
      return models.freeze(config, params, model_state, self.first_trained).model
    except ValueError as error:
      raise ValueError(f"first_trained={self.first_trained}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Augment:
  """Random changes to images at each step."""

  augment: str = setting(
    "none",
    "none, light, strong, or fields of primia_jax.data.augment.Augmentation as NAME=VALUE,..., "
    "such as noise=0.02",
  )
  mixup: float = setting(
    0.0, "MixUp's alpha: an image's part is drawn from Beta(alpha, alpha); 0 mixes nothing"
  )
  mixup_share: float = setting(1.0, "mixup: share of the images that are mixed, in (0, 1]")

  def __post_init__(self):
    require(0 <= self.mixup < math.inf, "mixup", self.mixup, "must be finite and not negative")
    value = self.mixup_share
    require(0 < value <= 1, "mixup_share", value, "must lie in (0, 1]; mixup=0 mixes nothing")
    if value != 1 and not self.mixup:
      raise ValueError(f"mixup_share={value} with mixup=0, which mixes nothing; set mixup, too")

  def build(self) -> Callable[[Key, Array, Array], tuple[Array, Array]]:
    """(key, uint8 images, targets [B, L]) -> augmented, mixed and normalised images, and targets.

    Raises:
      ValueError: an unknown augmentation, or a value that is no number or out of range.
    """
    config = self.augmentation()

    def apply(key: Key, images: Array, targets: Array) -> tuple[Array, Array]:
      augment_key, mixup_key = jax.random.split(key)
      images = augmenting.augment(augment_key, images.astype(jnp.float32) / 255, config)
      if self.mixup:
        mixed = augmenting.mixup(mixup_key, images, targets, self.mixup, share=self.mixup_share)
        images, targets = mixed.images, augmenting.mixed_labels(mixed, targets.shape[-1])
      return normalise(images), targets

    return apply

  def build_with_masks(self) -> Callable[[Key, Array, Array], tuple[Array, Array]]:
    """`build` for targets [B, H, W, L] of each pixel, which move with their images."""
    config = self.augmentation()

    def apply(key: Key, images: Array, masks: Array) -> tuple[Array, Array]:
      images = images.astype(jnp.float32) / 255
      images, masks = augmenting.augment_with_masks(key, images, masks, config)
      return normalise(images), masks

    return apply

  def augmentation(self) -> augmenting.Augmentation:
    """The library's own record; raises as `build`."""
    if self.augment in AUGMENTATIONS:
      return AUGMENTATIONS[self.augment]
    known = [field.name for field in dataclasses.fields(augmenting.Augmentation)]
    values: dict[str, float] = {}
    for part in self.augment.split(","):
      name, _, value = part.partition("=")
      try:
        is_whole = name.strip() == "elastic_grid"
        values[name.strip()] = int(value) if is_whole else float(value)
      except ValueError:
        choices = ", ".join(AUGMENTATIONS)
        raise ValueError(f"augment: {part!r} is not NAME=NUMBER; or use {choices}") from None
    if unknown := sorted(set(values) - set(known)):
      raise ValueError(f"augment: unknown {unknown}; there are {', '.join(known)}")
    for name, number in values.items():
      require(math.isfinite(number), f"augment: {name}", number, "must be finite")
    try:
      return augmenting.Augmentation(**values)  # type: ignore[arg-type]
    except ValueError as error:
      raise ValueError(f"augment={self.augment}: {error}") from error

  @property
  def is_none(self) -> bool:
    """Whether images stay as they are."""
    return self.augment == "none" and not self.mixup


def _path(text: str) -> pathlib.Path:
  return pathlib.Path(text).expanduser()


def of_stored(
  config: models.ModelConfig, frozen: models.Frozen | None = None
) -> Callable[[np.ndarray], np.ndarray] | None:
  """The model's computation on stored images before the first parameter that is trained; None if
  there is none.

  Returns:
    uint8 images [..., H, W, C] -> features [..., h, w, c].
  """
  transform = models.features(config) if frozen is None else frozen.lower
  if transform is None:
    return None
  run = jax.jit(lambda images: transform(normalise(images)))

  def apply(images: np.ndarray) -> np.ndarray:
    flat = images.reshape(math.prod(images.shape[:-3]), *images.shape[-3:])
    one = flat if len(flat) else np.zeros((1, *flat.shape[1:]), flat.dtype)  # for the shape
    out = np.concatenate([np.asarray(run(batch)) for batch in batches(one, _FEATURE_BATCH)])
    out = out[: len(flat)]
    return out.reshape(*images.shape[:-3], *out.shape[1:])

  return apply
