"""The wavelet scattering transform: fixed, untrained features of an image.

Bruna and Mallat, arXiv 1203.1513. With a linear classifier, these were the strongest handcrafted
features for training under differential privacy (Tramer and Boneh, arXiv 2011.11660). Nothing here
depends on data, so it costs no privacy.

There are three orders of coefficients. S0 = x * phi is the averaged image. S1[j, a] = |x *
psi[j, a]| * phi is the averaged local strength of its oriented waves. S2[j, a, k, b] = ||x *
psi[j, a]| * psi[k, b]| * phi with k > j splits that strength again at coarser scales. psi[j, a] is
a Morlet wavelet of scale 2^j at the angle a pi / A; phi is a Gaussian of scale 2^J. Each map is
sampled as coarsely as its scale allows, and extended beyond its edges by reflection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.conv import maximum
from primia_jax.types import Array

# Of a wavelet's envelope, in units of its scale. _SIGMA and _FREQUENCY are those of arXiv 1203.1513
# and ScatNet.
_SIGMA = 0.8
_FREQUENCY = 0.75 * math.pi
_SLANT = 0.5  # the envelope is twice as long across the wave as along it
_RADIUS = 3.0  # where Gaussians are truncated, in standard deviations


def num_paths(num_scales: int, num_angles: int = 8) -> int:
  """K, the number of scattering coefficients per position: 1 + A J + A^2 J (J - 1) / 2."""
  return 1 + num_angles * num_scales + num_angles**2 * num_scales * (num_scales - 1) // 2


def scatter(images: Array, num_scales: int = 2, num_angles: int = 8) -> Array:
  """Returns the scattering coefficients of order 0, 1 and 2.

  Args:
    images: [B, H, W, C] float32, H and W multiples of 2^J.
    num_scales: J, the number of octaves. A coefficient sees about 2^(J + 1) pixels.
    num_angles: A, the number of wavelet orientations in half a turn.

  Returns:
    [B, H / 2^J, W / 2^J, C K] float32 with K = `num_paths(J, A)`. For each channel of the image
    come S0, then S1 by (j, a), then S2 by (j, a, k, b). Up to rounding, adding a constant to an
    image changes only S0, and scaling an image scales every coefficient.

  Raises:
    ValueError: the images are not [B, H, W, C] float32, their size is not a multiple of 2^J, or J
      or A is below 1.
  """
  if num_scales < 1 or num_angles < 1:
    raise ValueError(f"num_scales={num_scales} and num_angles={num_angles} must be at least 1")
  if images.ndim != 4 or images.dtype != jnp.float32:
    raise ValueError(
      f"scatter takes float32 images [B, H, W, C], not {images.dtype} {list(images.shape)}"
    )
  batch, height, width, channels = images.shape
  if height % 2**num_scales or width % 2**num_scales:
    raise ValueError(
      f"images of {height} x {width} pixels cannot be halved num_scales={num_scales} times; resize "
      f"them to a multiple of {2**num_scales}, or use fewer scales"
    )

  def average(maps: Array, scale: int) -> Array:
    rows, columns = (
      jnp.asarray(_averaging(n >> scale, scale, num_scales)) for n in (height, width)
    )
    return jnp.einsum("ih,jw,nhw->nij", rows, columns, maps)

  def paths(parts: Sequence[Array]) -> Array:
    """[B C p, h, w] of each path p so far -> [B C, all paths, h, w]."""
    return jnp.concatenate(
      [part.reshape(batch * channels, -1, *part.shape[1:]) for part in parts], axis=1
    )

  x = images.transpose(0, 3, 1, 2).reshape(batch * channels, height, width)
  zeroth, first, second = [average(x, 0)], [], []
  for j in range(num_scales):
    waves = _strength(x, 0, j, num_angles)
    first.append(average(waves, j))
    later = [average(_strength(waves, j, k, num_angles), k) for k in range(j + 1, num_scales)]
    if later:  # [B C A, A, h, w] of each k -> [B C A, k b, h, w]
      second.append(
        jnp.concatenate(
          [part.reshape(len(waves), num_angles, *part.shape[1:]) for part in later], axis=1
        )
      )
      second[-1] = second[-1].reshape(-1, *second[-1].shape[2:])
  out = paths([*zeroth, *first, *second])
  size = (height >> num_scales, width >> num_scales)
  return out.reshape(batch, -1, *size).transpose(0, 2, 3, 1)


def _strength(maps: Array, scale: int, coarser: int, num_angles: int) -> Array:
  """|maps * psi[coarser, a]| for all angles: from maps [N, h, w] sampled at 2^scale to [N A, h',
  w'] sampled at 2^coarser.
  """
  kernel = _wavelets(coarser - scale, num_angles)
  radius, stride = kernel.shape[0] // 2, 2 ** (coarser - scale)
  padded = jnp.pad(maps, ((0, 0), (radius, radius), (radius, radius)), mode="reflect")
  last = [n + 2 * radius - (n - stride) % stride for n in maps.shape[1:]]
  # XLA's own convolution: the kernel is a constant, often larger than the map, and needs no
  # gradient.
  waves = lax.conv_general_dilated(
    padded[:, : last[0], : last[1], None],
    jnp.asarray(kernel),
    (stride, stride),
    "VALID",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  real, imaginary = waves[..., :num_angles], waves[..., num_angles:]
  strength = jnp.sqrt(
    maximum(real * real + imaginary * imaginary, float(np.finfo(np.float32).tiny))
  )
  return strength.transpose(0, 3, 1, 2).reshape(-1, *strength.shape[1:3])


@functools.cache
def _wavelets(scale: int, num_angles: int) -> np.ndarray:
  """Morlet wavelets [k, k, 1, 2 A], real parts first, then imaginary ones. Each is an envelope
  times (a wave minus its mean).

  The mean is taken under the truncated envelope, so that the values of each wavelet sum to exactly
  0.
  """
  sigma, frequency = _SIGMA * 2**scale, _FREQUENCY / 2**scale
  radius = math.ceil(_RADIUS * sigma / _SLANT)
  y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1].astype(np.float64)
  kernels = []
  for angle in np.arange(num_angles) * np.pi / num_angles:
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    envelope = (
      np.exp(-(along**2 + (_SLANT * across) ** 2) / (2 * sigma**2))
      * _SLANT
      / (2 * np.pi * sigma**2)
    )
    wave = np.exp(1j * frequency * along)
    kernels.append(envelope * (wave - (envelope * wave).sum() / envelope.sum()))
  stacked = np.stack([k.real for k in kernels] + [k.imag for k in kernels], axis=-1)
  return stacked[:, :, None].astype(np.float32)


@functools.cache
def _averaging(size: int, scale: int, num_scales: int) -> np.ndarray:
  """A matrix [size 2^scale / 2^J, size] that applies the Gaussian phi to `size` samples at 2^scale,
  and subsamples to 2^J.
  """
  sigma, step = _SIGMA * 2 ** (num_scales - 1 - scale), 2 ** (num_scales - scale)
  radius = math.ceil(_RADIUS * sigma)
  weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
  source = np.pad(np.arange(size), radius, mode="reflect")
  matrix = np.zeros((size // step, size))
  for i in range(size // step):
    np.add.at(matrix[i], source[i * step : i * step + 2 * radius + 1], weights / weights.sum())
  return matrix.astype(np.float32)
