"""CLAHE against a plain NumPy transcription of scikit-image's conventions."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_textures import some_images

from primia_jax.data.clahe import equalize_adapthist, limit_counts

CLAHE = jax.jit(equalize_adapthist, static_argnums=(1, 2, 3))


def clip_histogram(hist, limit):
  """The redistribution of scikit-image 0.26 (`_adapthist.clip_histogram`), for one histogram."""
  hist = hist.copy()
  excess = int(np.maximum(hist - limit, 0).sum())
  hist = np.minimum(hist, limit)
  share = excess // hist.size
  low = hist < limit - share
  excess -= int(low.sum()) * share
  hist[low] += share
  mid = (hist >= limit - share) & (hist < limit)
  excess -= int((limit - hist[mid]).sum())
  hist[mid] = limit
  while excess > 0 and (hist < limit).any():
    for index in range(hist.size):
      below = np.flatnonzero(hist < limit)
      stride = max(1, below.size // excess)
      chosen = below[(below >= index) & ((below - index) % stride == 0)]
      hist[chosen] += 1
      excess -= chosen.size
      if excess <= 0:
        break
  return hist


def clahe_oracle(image, clip_limit, bins=256):
  """CLAHE of one image [H, W] in float64, pixel by pixel, with scikit-image's conventions."""
  gray = np.round(image * 65535)
  gray = np.round((gray - gray.min()) / np.ptp(gray) * 16383).astype(int) // (1 + 16384 // bins)
  height, width = image.shape
  kh, kw = height // 8, width // 8
  padded = np.pad(gray, ((0, -height % kh), (0, -width % kw)), mode="reflect")
  ny, nx = padded.shape[0] // kh, padded.shape[1] // kw
  curves = np.empty((ny, nx, bins))
  for ty in range(ny):
    for tx in range(nx):
      hist = np.bincount(
        padded[ty * kh : (ty + 1) * kh, tx * kw : (tx + 1) * kw].ravel(), minlength=bins
      )
      hist = clip_histogram(hist, max(int(clip_limit * kh * kw), 1)) if clip_limit else hist
      curves[ty, tx] = np.floor(np.minimum(np.cumsum(hist) * 16383 / (kh * kw), 16383))
  out = np.zeros(image.shape)
  for y in range(height):
    for x in range(width):
      (qy, ry), (qx, rx) = divmod(y + kh // 2, kh), divmod(x + kw // 2, kw)
      for dy, wy in ((-1, 1 - ry / kh), (0, ry / kh)):
        for dx, wx in ((-1, 1 - rx / kw), (0, rx / kw)):
          ty, tx = np.clip(qy + dy, 0, ny - 1), np.clip(qx + dx, 0, nx - 1)
          out[y, x] += wy * wx * curves[ty, tx, gray[y, x]]
  out = np.floor(out + 1e-9)
  return (out - out.min()) / np.ptp(out)


@pytest.mark.parametrize(
  ("height", "width", "clip_limit"), [(48, 48, 0.01), (53, 70, 0.0), (53, 70, 0.1)]
)
def test_clahe_equals_the_oracle(height, width, clip_limit):
  images = some_images(num=2, height=height, width=width) ** 2
  out = CLAHE(images, clip_limit)[..., 0]
  for i in range(2):
    # One of 16384 grey levels may round the other way.
    np.testing.assert_allclose(
      out[i], clahe_oracle(np.asarray(images[i, ..., 0], np.float64), clip_limit), atol=2e-4
    )


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
  st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 40), st.integers(20, 400)
)
def test_limit_counts_equals_the_oracle(seed, limit, occupied, pixels):
  rng = np.random.default_rng(seed)
  counts = np.stack(
    [np.bincount(rng.integers(0, occupied, pixels), minlength=64) for _ in range(3)]
  )
  out = np.asarray(jax.jit(limit_counts)(jnp.asarray(counts, jnp.int32), jnp.int32(limit)))
  np.testing.assert_array_equal(out, [clip_histogram(hist, limit) for hist in counts])


def test_clahe_of_colour_keeps_the_ratios_and_flat_images_stay():
  images = some_images(channels=3, height=16, width=16)
  out = np.asarray(CLAHE(images))
  np.testing.assert_allclose(out.max(-1), CLAHE(images.max(-1, keepdims=True))[..., 0], atol=1e-6)
  np.testing.assert_allclose(
    out * images.max(-1, keepdims=True), images * out.max(-1, keepdims=True), atol=1e-5
  )
  flat = jnp.full((4, 16, 16, 1), 0.3, jnp.float32)
  np.testing.assert_array_equal(CLAHE(flat), flat)
