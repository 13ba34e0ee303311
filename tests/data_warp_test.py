"""The warp against SciPy, its draws against their stated ranges, and one warp against several."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from data_textures import jitted, some_images

from primia_jax.data import warp

KEY = jax.random.key(7)


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_bilinear_equals_scipy(height, width, seed):
  rng = np.random.default_rng(seed)
  images = rng.random((2, height, width, 1), np.float32)
  rows = rng.uniform(-3, height + 3, (2, 5, 6)).astype(np.float32)
  columns = rng.uniform(-3, width + 3, (2, 5, 6)).astype(np.float32)
  out = jax.jit(warp.bilinear)(images, rows, columns)[..., 0]
  for i in range(2):
    expected = scipy.ndimage.map_coordinates(
      images[i, ..., 0], [rows[i], columns[i]], order=1, mode="nearest"
    )
    np.testing.assert_allclose(out[i], expected, atol=2e-6)


def test_affine_equals_scipy_with_the_documented_matrix():
  images, strengths = some_images(num=5, channels=2), (25.0, 0.15, 0.3, 15.0)
  out = jax.jit(lambda key, x: warp.affine(key, x, *strengths))(KEY, images)
  draws = np.asarray(jax.random.uniform(KEY, (5, 5, 1, 1), jnp.float32, -1, 1), np.float64)[
    ..., 0, 0
  ]
  center = (np.array(images.shape[2:0:-1]) - 1) / 2  # (x, y)
  for i in range(5):
    theta, phi = np.radians(strengths[0] * draws[0, i]), np.radians(strengths[3] * draws[1, i])
    matrix = (1 + strengths[2] * draws[2, i]) * np.array(
      [[np.cos(theta), -np.sin(theta)], [np.sin(theta), np.cos(theta)]]
    ) @ np.array([[1, np.tan(phi)], [0, 1]])  # fmt: skip
    shift = strengths[1] * draws[3:, i] * np.array(images.shape[2:0:-1])
    inverse = np.linalg.inv(matrix)[::-1, ::-1]  # from (x, y) to (row, column)
    offset = center[::-1] - inverse @ (center + shift)[::-1]
    for c in range(2):
      expected = scipy.ndimage.affine_transform(
        images[i, ..., c], inverse, offset, order=1, mode="nearest"
      )
      np.testing.assert_allclose(out[i, ..., c], expected, atol=2e-5)


def test_affine_strengths_bound_the_motion():
  shape, strengths = (2000, 3, 3, 1), {"rotation_degrees": 30.0, "scale": 0.2}
  rows, columns = (
    np.asarray(p, np.float64) - 1
    for p in jitted(warp.affine_positions, shape=shape, **strengths)(KEY)
  )
  # The pixel right of the centre comes from (cos, -sin) / s.
  angle = np.degrees(np.arctan2(-rows[:, 1, 2], columns[:, 1, 2]))
  zoom = 1 / np.hypot(rows[:, 1, 2], columns[:, 1, 2])
  for values, low, high in ((angle, -30, 30), (zoom, 0.8, 1.2)):
    assert low - 1e-4 <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high + 1e-4
    assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)
  assert abs(np.corrcoef(angle, zoom)[0, 1]) < 0.1


def test_elastic_displacement_is_smooth_and_as_large_as_asked():
  rows, columns = (
    np.asarray(d)
    for d in jitted(warp.elastic_displacement, shape=(2000, 30, 60, 1), elastic=0.05)(KEY)
  )
  # Output pixels at the grid's own points (cell centres of 30 / 3 = 10 pixels lie between pixels 4
  # and 5) are near it.
  assert rows[:, 14:16, 29:31].std() == pytest.approx(0.05 * 30, rel=0.05)
  assert columns[:, 14:16, 29:31].std() == pytest.approx(0.05 * 60, rel=0.05)
  assert np.abs(np.diff(rows, axis=1)).max() < 0.3 * np.abs(rows).max()
  assert abs(np.corrcoef(rows[:, 15, 30], columns[:, 15, 30])[0, 1]) < 0.1
  images = some_images(num=3)
  along = jitted(warp.elastic_displacement, shape=images.shape, elastic=0.05)(
    jax.random.split(KEY, 3)[1]
  )
  out = jitted(warp.elastic, elastic=0.05)(KEY, images)
  for i in range(3):
    grid = np.mgrid[:24, :20] + np.stack([np.asarray(d[i]) for d in along])
    expected = scipy.ndimage.map_coordinates(images[i, ..., 0], grid, order=1, mode="nearest")
    np.testing.assert_allclose(out[i, ..., 0], expected, atol=2e-5)


def test_flip_mirrors_the_share_asked_for():
  images = jnp.tile(some_images(num=1), (400, 1, 1, 1))
  image = np.asarray(images[0])
  for strengths, mirrored in (((0.3, 0.0), image[:, ::-1]), ((0.0, 0.3), image[::-1])):
    flipped = np.asarray(warp.flip(KEY, images, *strengths))
    hit = (flipped == mirrored).all((1, 2, 3))
    assert (hit | (flipped == image).all((1, 2, 3))).all()
    assert 0.2 < hit.mean() < 0.4
  np.testing.assert_array_equal(warp.flip(KEY, images, 1.0, 1.0)[0], image[::-1, ::-1])


@pytest.mark.optimised
def test_one_warp_equals_flip_then_affine():
  images, geometry, flips = some_images(num=16), (15.0, 0.1, 0.2, 10.0), (0.5, 0.5)

  @jax.jit
  def one_after_the_other(key, images):
    affine_key, _, flip_key = jax.random.split(key, 3)
    flipped = warp.flip(flip_key, images, *flips)
    return flipped, warp.bilinear(
      flipped, *warp.affine_positions(affine_key, images.shape, *geometry)
    )

  flipped, expected = one_after_the_other(KEY, images)
  np.testing.assert_allclose(
    jax.jit(lambda k, x: warp.warp(k, x, *geometry, *flips))(KEY, images), expected, atol=2e-5
  )
  alone = jitted(warp.warp, horizontal_flip=0.5, vertical_flip=0.5)(KEY, images)
  np.testing.assert_array_equal(alone, flipped)
