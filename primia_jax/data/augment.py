"""Augmentation as pure functions of a key and a batch: photometric changes, MixUp, class weights,
and their composition.

Each function takes float32 [B, H, W, C] in [0, 1], draws separately for each image, and returns
images of the same kind. Strength 0 is the identity. Strengths are Python numbers. All functions
work under `jit`, `scan` and `vmap` (over sites).
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.data.clahe import equalize_adapthist
from primia_jax.data.warp import check_images, check_strengths, flip, warp
from primia_jax.types import Array, Key


def _draw(key: Key, images: Array, low: float, high: float) -> Array:
  """One uniform number for each image, [B, 1, 1, 1] float32."""
  return jax.random.uniform(key, (images.shape[0], 1, 1, 1), jnp.float32, low, high)


def clahe(key: Key, images: Array, clahe: float, clip_limit: float = 0.01) -> Array:
  """Equalises each image with probability `clahe`; see `equalize_adapthist` for `clip_limit`."""
  check_images(images)
  check_strengths(clahe=clahe)
  return jnp.where(_draw(key, images, 0, 1) < clahe, equalize_adapthist(images, clip_limit), images)


def gaussian_blur(key: Key, images: Array, blur: float) -> Array:
  """Blurs each image with a Gaussian whose standard deviation is uniform in [0, blur] pixels. At
  the edges the weights are renormalised.

  Each image and axis gets a matrix. A convolution would become a slow grouped one under `vmap`. A
  sum of shifted images is fast alone, but XLA on CPU then recomputes the preceding operation, e.g.
  a warp, for each shift.
  """
  check_images(images)
  check_strengths(blur=blur)
  variance = jnp.square(_draw(key, images, 0, blur))[..., 0]

  def kernel(side: int) -> Array:
    pixel = jnp.arange(side, dtype=jnp.float32)
    distance = jnp.square(pixel[:, None] - pixel[None, :])[None]
    # The floor makes sigma = 0 the identity.
    weights = jnp.exp(-distance / jnp.maximum(2 * variance, 1e-12))
    return weights / weights.sum(-1, keepdims=True)

  exact = jax.lax.Precision.HIGHEST
  images = jnp.einsum("bij,bjwc->biwc", kernel(images.shape[1]), images, precision=exact)
  return jnp.einsum("bij,bhjc->bhic", kernel(images.shape[2]), images, precision=exact)


def gamma(key: Key, images: Array, gamma: float) -> Array:
  """Raises each image to a power that is log-uniform in [1 / (1 + gamma), 1 + gamma]."""
  check_images(images)
  check_strengths(gamma=gamma)
  exponent = jnp.exp(_draw(key, images, -1, 1) * math.log1p(gamma))
  # Takes a third of the time of XLA's power on CPU. log(0) = -inf gives 0.
  return jnp.exp(exponent * jnp.log(images))


def contrast(key: Key, images: Array, contrast: float) -> Array:
  """Scales each image about its mean by a factor uniform in 1 +- `contrast`; clips to [0, 1]."""
  check_images(images)
  check_strengths(contrast=contrast)
  mean = images.mean((1, 2, 3), keepdims=True)
  return jnp.clip(images + (images - mean) * _draw(key, images, -contrast, contrast), 0, 1)


def brightness(key: Key, images: Array, brightness: float) -> Array:
  """Adds a number uniform in +- `brightness` to each image, and clips to [0, 1]."""
  check_images(images)
  check_strengths(brightness=brightness)
  return jnp.clip(images + _draw(key, images, -brightness, brightness), 0, 1)


def gaussian_noise(key: Key, images: Array, noise: float) -> Array:
  """Adds white noise to each image, with a standard deviation uniform in [0, noise], and clips to
  [0, 1].
  """
  check_images(images)
  check_strengths(noise=noise)
  std_key, noise_key = jax.random.split(key)
  draws = jax.random.normal(noise_key, images.shape, jnp.float32)
  return jnp.clip(images + _draw(std_key, images, 0, noise) * draws, 0, 1)


def cutout(key: Key, images: Array, cutout: float, fill: float = 0.0) -> Array:
  """Fills a box around a random pixel of each image; the box may extend beyond the image (DeVries &
  Taylor 2017).

  Args:
    key: a typed key.
    images: [B, H, W, C] float32.
    cutout: the box's height and width as fractions of the image's; at least one pixel unless 0.
    fill: the value inside the box.

  Returns:
    The images, [B, H, W, C] float32.

  Raises:
    ValueError: `cutout` lies outside [0, 1].
  """
  check_images(images)
  check_strengths(cutout=cutout)
  inside = jnp.ones((1, 1, 1, 1), bool)
  for axis, axis_key in zip((1, 2), jax.random.split(key), strict=True):
    side = images.shape[axis]
    length = max(round(cutout * side), 1) if cutout else 0
    center = jax.random.randint(axis_key, (images.shape[0], 1, 1, 1), 0, side, jnp.int32)
    position = jnp.arange(side, dtype=jnp.int32).reshape(
      [side if a == axis else 1 for a in range(4)]
    )
    start = center - length // 2
    inside = inside & (start <= position) & (position < start + length)
  return jnp.where(inside, jnp.float32(fill), images)


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """The strength of each augmentation. Each is off by default; the function of the same name
  defines it.

  Attributes:
    rotation_degrees: largest angle in either direction.
    translation: largest shift in either direction, as a fraction of the image's sides.
    scale: the factor is within 1 +- this.
    shear_degrees: largest angle in either direction.
    horizontal_flip: probability. A flip puts the heart on the right.
    vertical_flip: probability.
    elastic: standard deviation of the displacement, as a fraction of the image's sides.
    elastic_grid: the number of displacement vectors along each side.
    clahe: probability of equalising an image.
    clip_limit: of CLAHE.
    blur: largest standard deviation in pixels.
    gamma: the exponent is within [1 / (1 + gamma), 1 + gamma].
    contrast: the factor is within 1 +- this.
    brightness: largest change in either direction.
    noise: largest standard deviation.
    cutout: height and width of the box, as fractions of the image's.
  """

  rotation_degrees: float = 0.0
  translation: float = 0.0
  scale: float = 0.0
  shear_degrees: float = 0.0
  horizontal_flip: float = 0.0
  vertical_flip: float = 0.0
  elastic: float = 0.0
  elastic_grid: int = 3
  clahe: float = 0.0
  clip_limit: float = 0.01
  blur: float = 0.0
  gamma: float = 0.0
  contrast: float = 0.0
  brightness: float = 0.0
  noise: float = 0.0
  cutout: float = 0.0

  def __post_init__(self):
    strengths = dataclasses.asdict(self)
    if strengths.pop("elastic_grid") < 2:
      raise ValueError(f"elastic_grid is {self.elastic_grid}; expected at least 2")
    check_strengths(**strengths)


def augment(key: Key, images: Array, config: Augmentation) -> Array:
  """Applies the augmentations that are on: geometry in one warp, then intensities, then noise and
  cutout.

  Args:
    key: a typed key. An augmentation gets the same draws from it whichever others are on.
    images: [B, H, W, C] float32 in [0, 1].
    config: the strengths.

  Returns:
    The augmented images, [B, H, W, C] float32 in [0, 1].

  Raises:
    ValueError: the images are not float32 [B, H, W, C].
  """
  check_images(images)
  keys = jax.random.split(key, 8)
  return _intensities(keys, _geometry(keys[0], images, config), config)


def augment_with_masks(
  key: Key, images: Array, masks: Array, config: Augmentation
) -> tuple[Array, Array]:
  """`augment`, whose geometry moves an image and its mask alike.

  Args:
    key: a typed key. The images become what `augment` makes of them.
    images: [B, H, W, C] float32 in [0, 1].
    masks: [B, H, W, L] float32, one-hot.
    config: the strengths.

  Returns:
    The images and the masks, which are soft where a warp interpolates.

  Raises:
    ValueError: as `augment`.
  """
  check_images(images)
  keys, channels = jax.random.split(key, 8), images.shape[-1]
  both = _geometry(keys[0], jnp.concatenate([images, masks], axis=-1), config)
  return _intensities(keys, both[..., :channels], config), both[..., channels:]


def _geometry(key: Key, images: Array, config: Augmentation) -> Array:
  if (
    config.rotation_degrees
    or config.translation
    or config.scale
    or config.shear_degrees
    or config.elastic
  ):
    geometry = (config.rotation_degrees, config.translation, config.scale, config.shear_degrees)
    flips = (config.horizontal_flip, config.vertical_flip)
    return warp(key, images, *geometry, *flips, config.elastic, config.elastic_grid)
  if config.horizontal_flip or config.vertical_flip:
    flip_key = jax.random.split(key, 3)[2]
    return flip(flip_key, images, config.horizontal_flip, config.vertical_flip)
  return images


def _intensities(keys: Key, images: Array, config: Augmentation) -> Array:
  if config.clahe:
    images = clahe(keys[1], images, config.clahe, config.clip_limit)
  for function, function_key, strength in (
    (gaussian_blur, keys[2], config.blur),
    (contrast, keys[3], config.contrast),
    (brightness, keys[4], config.brightness),
    (gamma, keys[5], config.gamma),  # after contrast's mean, or XLA computes the power twice
    (gaussian_noise, keys[6], config.noise),
    (cutout, keys[7], config.cutout),
  ):
    if strength:
      images = function(function_key, images, strength)
  return images


class MixedBatch(NamedTuple):
  """A batch after MixUp. Its loss is lam * loss(labels_a) + (1 - lam) * loss(labels_b), or the loss
  with `mixed_labels`.
  """

  images: Array  # [B, H, W, C] float32
  labels_a: Array  # [B, ...] of the images themselves
  labels_b: Array  # [B, ...] of their partners
  lam: Array  # [B] float32, the share of labels_a


def mixup(
  key: Key,
  images: Array,
  labels: Array,
  alpha: float,
  weights: Array | None = None,
  share: float = 1.0,
) -> MixedBatch:
  """Mixes each image with another of its batch (Zhang et al. 2018, mixup, section 2).

  x~ = lam x_i + (1 - lam) x_j and y~ = lam y_i + (1 - lam) y_j, where each image has its own lam ~
  Beta(alpha, alpha), and j is a random permutation of the batch.

  Do not use this with differentially private training: a mixed image depends on two patients, so
  per-example clipping no longer bounds the influence of one example.

  Args:
    key: a typed key.
    images: [B, H, W, C] float32.
    labels: [B] integers or [B, L] one-hot floats.
    alpha: of the Beta distribution; 0 leaves the images as they are.
    weights: [B] float32, 0 for padding, which is mixed only with padding; None if there is none.
    share: of the images that are mixed, each drawn on its own; the others stay as they are.

  Returns:
    The mixed images, both labels of each, and lam.

  Raises:
    ValueError: `alpha` is negative or not finite, `share` lies outside [0, 1], or images and labels
      differ in number.
  """
  check_images(images)
  num = images.shape[0]
  if not 0 <= alpha < math.inf:
    raise ValueError(f"alpha is {alpha}; expected a finite number, at least 0")
  if not 0 <= share <= 1:
    raise ValueError(f"share is {share}; expected a number in [0, 1]")
  if labels.shape[:1] != (num,):
    raise ValueError(f"labels have shape {labels.shape} for {num} images; give one for each image")
  order_key, lam_key = jax.random.split(key)
  padding = jnp.zeros(num, bool) if weights is None else weights <= 0
  # Both orders list real examples first, so mapping one to the other never pairs a real example
  # with padding.
  shuffled = jnp.argsort(
    jax.random.uniform(order_key, (num,), jnp.float32) + padding.astype(jnp.float32)
  )
  partner = jnp.zeros_like(shuffled).at[jnp.argsort(padding, stable=True)].set(shuffled)
  lam = (
    jax.random.beta(lam_key, alpha, alpha, (num,), jnp.float32)
    if alpha
    else jnp.ones(num, jnp.float32)
  )
  if share < 1:
    is_mixed = jax.random.uniform(jax.random.fold_in(lam_key, 1), (num,), jnp.float32) < share
    lam = jnp.where(is_mixed, lam, 1)
  part = lam[:, None, None, None]
  return MixedBatch(part * images + (1 - part) * images[partner], labels, labels[partner], lam)


def mixed_labels(mixed: MixedBatch, num_classes: int) -> Array:
  """Returns the targets lam y_a + (1 - lam) y_b, [B, L] float32, for integer or one-hot labels."""
  one_hot = mixed.labels_a.ndim == 2
  a, b = (
    y if one_hot else jax.nn.one_hot(y, num_classes, dtype=jnp.float32)
    for y in (mixed.labels_a, mixed.labels_b)
  )
  if a.shape[-1] != num_classes:
    raise ValueError(f"one-hot labels have {a.shape[-1]} classes; expected {num_classes}")
  return mixed.lam[:, None] * a + (1 - mixed.lam[:, None]) * b


def inverse_frequency(counts: Array | np.ndarray) -> Array:
  """Returns class weights N / (L n_l): inverse to the class's frequency, with mean 1 over the
  examples.

  Args:
    counts: [L], the number of examples n_l of each class; N is their sum.

  Returns:
    [L] float32. If `counts` is traced, it cannot be checked: a class without examples then gets
    weight 0 and is left out of L, which keeps the mean at 1.

  Raises:
    ValueError: `counts` is not [L], or (if its values are known) a count is not a positive finite
      number.
  """
  if counts.ndim != 1:
    raise ValueError(f"counts have shape {counts.shape}; expected one number for each class, [L]")
  if not isinstance(counts, jax.core.Tracer):
    bad = [i for i, n in enumerate(np.asarray(counts).tolist()) if not 0 < n < math.inf]
    if bad:
      raise ValueError(
        f"classes {bad} have no usable count in {counts}; every class needs at least one example"
      )
  n = jnp.asarray(counts).astype(jnp.float32)
  present = n > 0
  return jnp.where(
    present, n.sum() / (present.sum().astype(jnp.float32) * jnp.where(present, n, 1.0)), 0.0
  )
