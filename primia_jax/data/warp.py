"""Random geometry: affine maps, flips and elastic deformation of a batch of images, in one bilinear
warp.

Images are float32 [B, H, W, C]. Positions are in pixels: row y points down, column x right. c =
((W-1)/2, (H-1)/2) is the image's centre. Beyond its edge, an image continues with the edge's
pixels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from primia_jax.types import Array, Key

# Sensible strengths. Far outside these bounds an image no longer shows what its label says.
BOUNDS = {
  "rotation_degrees": (0.0, 180.0),
  "translation": (0.0, 1.0),
  "scale": (0.0, 0.9),
  "shear_degrees": (0.0, 80.0),
  "horizontal_flip": (0.0, 1.0),
  "vertical_flip": (0.0, 1.0),
  "elastic": (0.0, 0.5),
  "clahe": (0.0, 1.0),
  "clip_limit": (0.0, 1.0),
  "blur": (0.0, 16.0),
  "gamma": (0.0, 10.0),
  "contrast": (0.0, 1.0),
  "brightness": (0.0, 1.0),
  "noise": (0.0, 1.0),
  "cutout": (0.0, 1.0),
}


def check_strengths(**strengths: float) -> None:
  """Raises ValueError unless every strength lies within its bounds in `BOUNDS`."""
  for name, value in strengths.items():
    low, high = BOUNDS[name]
    if not low <= value <= high:
      raise ValueError(f"{name} is {value}; expected a number from {low} to {high}")


def check_images(images: Array) -> None:
  """Raises ValueError unless `images` is float32 [B, H, W, C]."""
  if images.ndim != 4 or images.dtype != jnp.float32:
    raise ValueError(
      f"images have shape {images.shape} and type {images.dtype}; expected float32 [B, H, W, C] in "
      "[0, 1] (divide uint8 images by 255 first; vmap over further leading axes)"
    )


def bilinear(images: Array, rows: Array, columns: Array) -> Array:
  """Samples each image at its own positions.

  Uses four gathers of single pixels, which XLA fuses with the arithmetic on the positions. On a CPU
  this was at least twice as fast as packed taps, shears and interpolation matrices.

  Args:
    images: [B, H, W, C] float32.
    rows: [B, H', W'] float32, in pixels. Positions outside the image move to the nearest edge.
    columns: [B, H', W'] float32, as `rows`.

  Returns:
    [B, H', W', C] float32.
  """
  num, height, width, _ = images.shape
  rows, columns = jnp.clip(rows, 0, height - 1), jnp.clip(columns, 0, width - 1)
  # The last pair of taps starts one pixel early, so that the second tap stays inside. Its weight is
  # then 1 on the last pixel.
  top = jnp.minimum(rows.astype(jnp.int32), max(height - 2, 0))
  left = jnp.minimum(columns.astype(jnp.int32), max(width - 2, 0))
  down = (rows - top.astype(jnp.float32))[..., None]
  right = (columns - left.astype(jnp.float32))[..., None]
  bottom, end = top + min(height - 1, 1), left + min(width - 1, 1)
  image = jnp.arange(num, dtype=jnp.int32)[:, None, None]

  def tap(row, column):
    return images.at[image, row, column].get(mode="promise_in_bounds")

  above = tap(top, left) * (1 - right) + tap(top, end) * right
  below = tap(bottom, left) * (1 - right) + tap(bottom, end) * right
  return above * (1 - down) + below * down


def affine_positions(
  key: Key,
  shape: tuple[int, ...],
  rotation_degrees: float = 0.0,
  translation: float = 0.0,
  scale: float = 0.0,
  shear_degrees: float = 0.0,
) -> tuple[Array, Array]:
  """Draws an affine map for each image and returns where each output pixel comes from.

  The pixel at p moves to c + s R(theta) K(phi) (p - c) + t, with R = [[cos, -sin], [sin, cos]]
  (clockwise as displayed) and K = [[1, tan phi], [0, 1]] on (x, y).

  Args:
    key: a typed key.
    shape: (B, H, W, C).
    rotation_degrees: theta is uniform in +- this.
    translation: t is uniform in +- this fraction of the width and of the height.
    scale: s is uniform in [1 - scale, 1 + scale].
    shear_degrees: phi is uniform in +- this.

  Returns:
    Rows and columns, each [B, H, W] float32. If all strengths are 0, they are exactly the pixels'
    own.

  Raises:
    ValueError: a strength lies outside `BOUNDS`.
  """
  check_strengths(
    rotation_degrees=rotation_degrees,
    translation=translation,
    scale=scale,
    shear_degrees=shear_degrees,
  )
  num, height, width, _ = shape
  draws = jax.random.uniform(key, (5, num, 1, 1), jnp.float32, -1, 1)
  angle, shear = jnp.radians(rotation_degrees * draws[0]), jnp.radians(shear_degrees * draws[1])
  zoom = 1 + scale * draws[2]
  center_x, center_y = (width - 1) / 2, (height - 1) / 2
  x = (
    jnp.arange(width, dtype=jnp.float32)[None, None, :] - center_x - translation * width * draws[3]
  )
  y = (
    jnp.arange(height, dtype=jnp.float32)[None, :, None]
    - center_y
    - translation * height * draws[4]
  )
  # The inverse map, K^-1 R^-1 / s, applied to p - c - t.
  cos, sin, tan = jnp.cos(angle) / zoom, jnp.sin(angle) / zoom, jnp.tan(shear)
  rows = cos * y - sin * x
  columns = (cos + tan * sin) * x + (sin - tan * cos) * y
  return rows + center_y, columns + center_x


def elastic_displacement(
  key: Key, shape: tuple[int, ...], elastic: float, grid: int = 3
) -> tuple[Array, Array]:
  """Draws a smooth displacement field for each image.

  Gaussian vectors on a coarse grid are interpolated bicubically (Ronneberger et al. 2015, U-Net,
  section 3.1, with a grid of 3 and 10 pixels in 512).

  Args:
    key: a typed key.
    shape: (B, H, W, C).
    elastic: standard deviation of the grid's vectors, as a fraction of the height and of the width.
      From about a tenth of the grid's spacing (0.03 for a grid of 3) the deformation is clearly
      visible; at several times that, the image folds.
    grid: the number of vectors along each side.

  Returns:
    Displacements along rows and columns in pixels, each [B, H, W] float32.

  Raises:
    ValueError: `elastic` lies outside `BOUNDS`, or `grid` is below 2.
  """
  check_strengths(elastic=elastic)
  if grid < 2:
    raise ValueError(f"an elastic grid of {grid} has no inner point to move; expected at least 2")
  num, height, width, _ = shape
  vectors = elastic * jax.random.normal(key, (2, num, grid, grid), jnp.float32)
  rows, columns = jax.image.resize(vectors, (2, num, height, width), "cubic")
  return height * rows, width * columns


def flip_signs(
  key: Key, num: int, horizontal_flip: float, vertical_flip: float
) -> tuple[Array, Array]:
  """Draws signs for rows and for columns, each [B] float32: -1 if the image is flipped, else 1."""
  check_strengths(horizontal_flip=horizontal_flip, vertical_flip=vertical_flip)
  draws = jax.random.uniform(key, (2, num), jnp.float32)
  return jnp.where(draws[0] < vertical_flip, -1.0, 1.0), jnp.where(
    draws[1] < horizontal_flip, -1.0, 1.0
  )


def affine(
  key: Key,
  images: Array,
  rotation_degrees: float = 0.0,
  translation: float = 0.0,
  scale: float = 0.0,
  shear_degrees: float = 0.0,
) -> Array:
  """Rotates, shifts, scales and shears each image at random. `affine_positions` defines the map and
  its arguments.
  """
  check_images(images)
  positions = affine_positions(
    key, images.shape, rotation_degrees, translation, scale, shear_degrees
  )
  return bilinear(images, *positions)


def elastic(key: Key, images: Array, elastic: float, grid: int = 3) -> Array:
  """Deforms each image smoothly at random. `elastic_displacement` defines the field and its
  arguments.
  """
  return warp(key, images, elastic=elastic, grid=grid)


def flip(
  key: Key, images: Array, horizontal_flip: float = 0.5, vertical_flip: float = 0.0
) -> Array:
  """Mirrors each image left to right and top to bottom at random.

  Args:
    key: a typed key.
    images: [B, H, W, C] float32.
    horizontal_flip: the probability of exchanging left and right.
    vertical_flip: the probability of exchanging top and bottom.

  Returns:
    The images, [B, H, W, C] float32.

  Raises:
    ValueError: a probability lies outside [0, 1].
  """
  check_images(images)
  row_sign, column_sign = (
    sign[:, None, None, None]
    for sign in flip_signs(key, images.shape[0], horizontal_flip, vertical_flip)
  )
  images = jnp.where(row_sign < 0, images[:, ::-1], images)
  return jnp.where(column_sign < 0, images[:, :, ::-1], images)


def warp(
  key: Key,
  images: Array,
  rotation_degrees: float = 0.0,
  translation: float = 0.0,
  scale: float = 0.0,
  shear_degrees: float = 0.0,
  horizontal_flip: float = 0.0,
  vertical_flip: float = 0.0,
  elastic: float = 0.0,
  grid: int = 3,
) -> Array:
  """Flips, then maps affinely, then deforms each image, all in one bilinear interpolation.

  Args:
    key: a typed key.
    images: [B, H, W, C] float32.
    rotation_degrees: largest angle; see `affine_positions`, also for the next three.
    translation: largest shift, as a fraction of the image's sides.
    scale: the factor is within 1 +- this.
    shear_degrees: largest angle, along x.
    horizontal_flip: the probability of exchanging left and right.
    vertical_flip: the probability of exchanging top and bottom.
    elastic: standard deviation of the displacement; see `elastic_displacement`.
    grid: the number of displacement vectors along each side.

  Returns:
    The warped images, [B, H, W, C] float32.

  Raises:
    ValueError: the images are not float32 [B, H, W, C], or a strength lies outside `BOUNDS`.
  """
  check_images(images)
  num, height, width, _ = images.shape
  affine_key, elastic_key, flip_key = jax.random.split(key, 3)
  rows, columns = affine_positions(
    affine_key, images.shape, rotation_degrees, translation, scale, shear_degrees
  )
  if elastic:
    along_rows, along_columns = elastic_displacement(elastic_key, images.shape, elastic, grid)
    rows, columns = rows + along_rows, columns + along_columns
  if horizontal_flip or vertical_flip:
    row_sign, column_sign = flip_signs(flip_key, num, horizontal_flip, vertical_flip)
    center_y, center_x = (height - 1) / 2, (width - 1) / 2
    rows = row_sign[:, None, None] * (rows - center_y) + center_y
    columns = column_sign[:, None, None] * (columns - center_x) + center_x
  return bilinear(images, rows, columns)
