"""Contrast-limited adaptive histogram equalisation (CLAHE; Zuiderveld 1994), as implemented in
scikit-image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.data.warp import check_images, check_strengths
from primia_jax.types import Array

_LEVELS = 2**14  # grey levels before binning


def limit_counts(counts: Array, limit: int) -> Array:
  """Clips histograms at a limit and redistributes the excess to the bins below it.

  Follows scikit-image step by step, to reproduce its images. First every bin gets an equal share.
  Then passes add one to every k-th bin below the limit, where k = (bins below) // (counts left).
  The last pass may add more than was left, so the sum of a histogram may grow by up to the number
  of its bins.

  Args:
    counts: [..., bins] int32, at least 0.
    limit: the largest count allowed in a bin.

  Returns:
    [..., bins] int32, at most `limit`.
  """
  bins = counts.shape[-1]
  left = jnp.maximum(counts - limit, 0).sum(-1, keepdims=True)
  share = left // bins
  low = counts < limit - share
  left -= low.sum(-1, keepdims=True) * share
  counts = jnp.where(low, counts + share, counts)
  filled = (limit - share <= counts) & (counts < limit)
  left -= jnp.where(filled, limit - counts, 0).sum(-1, keepdims=True)
  counts = jnp.where(filled, limit, jnp.minimum(counts, limit))
  position = jnp.arange(bins, dtype=jnp.int32).reshape([1] * (counts.ndim - 1) + [bins])

  def unfinished(state):
    counts, left, _ = state
    return ((left > 0) & (counts < limit).any(-1, keepdims=True)).any()

  def hand_out(state):
    counts, left, index = state
    below = counts < limit
    stride = jnp.maximum(below.sum(-1, keepdims=True) // jnp.maximum(left, 1), 1).astype(
      jnp.float32
    )
    # Tests position = index modulo stride without a slow integer division. The half keeps the
    # quotient away from integers.
    offset = (position - index).astype(jnp.float32)
    chosen = (
      below
      & (offset >= 0)
      & (offset == stride * jnp.floor((offset + 0.5) * (1 / stride)))
      & (left > 0)
    )
    return (
      counts + chosen.astype(jnp.int32),
      left - chosen.sum(-1, keepdims=True),
      (index + 1) % bins,
    )

  return jax.lax.while_loop(unfinished, hand_out, (counts, left, jnp.int32(0)))[0]


def _stretch(values: Array) -> tuple[Array, Array]:
  """Maps each image [B, H, W] linearly onto [0, 1]. Also returns [B, 1, 1] whether it was flat; a
  flat image is left unchanged.
  """
  low, high = values.min((1, 2), keepdims=True), values.max((1, 2), keepdims=True)
  flat = high <= low
  return jnp.where(flat, values, (values - low) / jnp.where(flat, 1.0, high - low)), flat


def equalize_adapthist(
  images: Array, clip_limit: float = 0.01, tiles: int = 8, num_bins: int = 256
) -> Array:
  """Equalises the contrast of each image within tiles, and interpolates between the tiles.

  Agrees with `skimage.exposure.equalize_adapthist` (whose kernel_size=None means 8 tiles), except
  for pixels on the edge of a bin, which are rounded in float32 here. Images with several channels
  are treated as HSV: their maximum is equalised, and each channel keeps its ratio to it.

  Args:
    images: [B, H, W, C] float32 in [0, 1].
    clip_limit: the largest share of a tile's pixels in one bin; lower is gentler. 0 sets no limit.
    tiles: the number of tiles along each side. A tile has H // tiles by W // tiles pixels.
    num_bins: of each tile's histogram.

  Returns:
    [B, H, W, C] float32, each image stretched to [0, 1]. An image with a single grey level is
    returned unchanged.

  Raises:
    ValueError: the images are not float32 [B, H, W, C], or an argument is out of range.
  """
  check_images(images)
  check_strengths(clip_limit=clip_limit)
  num, height, width, _ = images.shape
  if not 1 <= tiles <= min(height, width):
    raise ValueError(f"{tiles} tiles do not fit into images of {height} x {width} pixels")
  if not 2 <= num_bins <= _LEVELS:
    raise ValueError(f"num_bins is {num_bins}; expected 2 to {_LEVELS}")
  value = images.max(-1)
  gray, flat = _stretch(jnp.round(value * (2**16 - 1)))
  bins = jnp.round(gray * (_LEVELS - 1)).astype(jnp.int32) // (1 + _LEVELS // num_bins)
  bins = jnp.clip(bins, 0, num_bins - 1)

  sizes = (height // tiles, width // tiles)
  counts = tuple(-(-side // size) for side, size in zip((height, width), sizes, strict=True))
  padding = [
    (0, count * size - side)
    for count, size, side in zip(counts, sizes, (height, width), strict=True)
  ]
  padded = jnp.pad(bins, [(0, 0), *padding], mode="reflect")
  image = np.arange(num, dtype=np.int32)[:, None, None]
  row, column = (
    np.arange(count * size, dtype=np.int32) // size
    for count, size in zip(counts, sizes, strict=True)
  )
  histograms = jnp.zeros((num, *counts, num_bins), jnp.int32)
  histograms = histograms.at[image, row[None, :, None], column[None, None, :], padded].add(1)

  pixels = sizes[0] * sizes[1]
  if clip_limit:
    histograms = limit_counts(histograms, max(int(clip_limit * pixels), 1))
  curves = jnp.cumsum(histograms, -1).astype(jnp.float32) * ((_LEVELS - 1) / pixels)
  curves = jnp.floor(jnp.minimum(curves, _LEVELS - 1))

  def neighbours(side: int, size: int, count: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The tiles before and after each pixel along one side, each with its weight."""
    position = np.arange(side, dtype=np.int32) + size // 2
    after, share = position // size, (position % size / size).astype(np.float32)
    return (np.clip(after - 1, 0, count - 1), 1 - share), (np.clip(after, 0, count - 1), share)

  equalized = jnp.zeros(value.shape, jnp.float32)
  for row, row_weight in neighbours(height, sizes[0], counts[0]):
    for column, column_weight in neighbours(width, sizes[1], counts[1]):
      mapped = curves.at[image, row[None, :, None], column[None, None, :], bins].get(
        mode="promise_in_bounds"
      )
      equalized += mapped * (row_weight[:, None] * column_weight[None, :])[None]
  equalized, _ = _stretch(jnp.floor(equalized))

  value, equalized, flat = value[..., None], equalized[..., None], flat[..., None]
  ratio = images / jnp.where(value > 0, value, 1.0)
  return jnp.where(flat, images, equalized * jnp.where(value > 0, ratio, 1.0))
