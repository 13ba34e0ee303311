"""How much of an image a reconstruction shows: PSNR, SSIM, and whether it names the right one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from primia_jax.metrics.intervals import clopper_pearson
from primia_jax.types import Array

_WINDOW, _SIGMA = 11, 1.5  # Wang et al. 2004, section III-C
_C1, _C2 = 0.01**2, 0.03**2


class Identification(NamedTuple):
  """How often the candidate nearest to a reconstruction is the image it came from.

  Attributes:
    found: [M] bool.
    rate: the mean of `found`.
    interval: of the rate, at 95 % (Clopper and Pearson 1934).
    chance: the rate of guessing, 1 / N.
  """

  found: np.ndarray
  rate: float
  interval: tuple[float, float]
  chance: float


def psnr(image: Array, reference: Array) -> Array:
  """Peak signal-to-noise ratio in dB, for images [..., H, W, C] in [0, 1] -> [...]; infinite if
  they are equal.
  """
  return -10 * jnp.log10(jnp.square(image - reference).mean((-3, -2, -1)))


def ssim(image: Array, reference: Array) -> Array:
  """Structural similarity (Wang et al. 2004, "Image quality assessment", equation 13), for images
  [..., H, W, C] in [0, 1] -> [...].

  Means, variances and covariance are under a Gaussian window of 11 x 11 pixels and sigma 1.5; the
  result is the mean over channels and all windows within the image. scikit-image computes the same
  by `gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1`.

  Raises:
    ValueError: a side of the images is below 11 pixels.
  """
  height, width = image.shape[-3:-1]
  if min(height, width) < _WINDOW:
    raise ValueError(f"ssim needs images of at least {_WINDOW} x {_WINDOW}, not {height} x {width}")
  rows, columns = jnp.asarray(_windows(height)), jnp.asarray(_windows(width))
  mean = lambda x: jnp.einsum("ih,...hwc,jw->...ijc", rows, x, columns)
  a, b = mean(image), mean(reference)
  # cancellation can leave a small negative variance in float32
  var_a = jnp.maximum(mean(image * image) - a * a, 0)
  var_b = jnp.maximum(mean(reference * reference) - b * b, 0)
  covariance = mean(image * reference) - a * b
  alike = (2 * a * b + _C1) * (2 * covariance + _C2)
  return (alike / ((a * a + b * b + _C1) * (var_a + var_b + _C2))).mean((-3, -2, -1))


def _windows(size: int) -> np.ndarray:
  """[size - 10, size] float32: each row has the window's weights, one pixel further."""
  weights = np.exp(-0.5 * (np.arange(_WINDOW) - _WINDOW // 2) ** 2 / _SIGMA**2)
  rows = np.zeros((size - _WINDOW + 1, size))
  for i, row in enumerate(rows):
    row[i : i + _WINDOW] = weights / weights.sum()
  return rows.astype(np.float32)


def identify(
  reconstructions: Array, candidates: Array, truth: Array, *, measure: str = "correlation"
) -> Identification:
  """Asks of each reconstruction whether its nearest candidate is the image it came from.

  A tie, or a reconstruction with NaN, counts as not found.

  Args:
    reconstructions: [M, ...] images.
    candidates: [N, ...] images of the same shape, all different, with the true ones among them.
    truth: [M] integers, the place of the true image among the candidates.
    measure: "mse"; or "correlation" of the pixels (Pearson's), which sees the picture and not its
      brightness or contrast.

  Raises:
    ValueError: for shapes that do not fit, an unknown measure, equal candidates or a truth out of
      range.
  """
  given = np.asarray(reconstructions, np.float64).reshape(len(reconstructions), -1)
  among = np.asarray(candidates, np.float64).reshape(len(candidates), -1)
  places = np.asarray(truth)
  if given.shape[1:] != among.shape[1:] or places.shape != given.shape[:1] or len(among) < 2:
    raise ValueError(
      f"reconstructions {np.shape(reconstructions)}, candidates {np.shape(candidates)} and truth "
      f"{places.shape} must be [M, ...], [N, ...] with N at least 2, and [M]"
    )
  if len(places) < 1 or not ((places >= 0) & (places < len(among))).all():
    raise ValueError(f"truth={places} must hold places of the {len(among)} candidates")
  if len(np.unique(among, axis=0)) < len(among):
    raise ValueError("candidates holds an image twice, which nobody can tell apart; drop one")
  distance = _distances(given, among, measure)
  own = distance[np.arange(len(places)), places]
  others = distance.copy()
  others[np.arange(len(places)), places] = np.inf
  return _identification(own < others.min(1), len(among))


def identify_any(
  reconstructions: Array | np.ndarray,
  truth: Array | np.ndarray,
  decoys: Array | np.ndarray,
  *,
  measure: str = "correlation",
) -> Identification:
  """Asks of each true image whether any of a batch's reconstructions is nearer to it than all of
  them are to every decoy.

  So a batch in any order, or of several sites, is scored like a single image, and chance is 1 / N.
  Images of one batch are not independent: the interval is exact for a single one.

  Args:
    reconstructions: [B, ...] images.
    truth: [M, ...] images behind the update.
    decoys: [N - 1, ...] images of the same kind that are not behind it.
    measure: as for `identify`.

  Raises:
    ValueError: for shapes that do not fit, an unknown measure, or a true image among the decoys.
  """
  given, real, others = (
    np.asarray(x, np.float64).reshape(len(x), -1) for x in (reconstructions, truth, decoys)
  )
  if not given.shape[1] == real.shape[1] == others.shape[1] or not len(others):
    raise ValueError(
      f"reconstructions {np.shape(reconstructions)}, truth {np.shape(truth)} and decoys "
      f"{np.shape(decoys)} must hold images of one shape, and at least one decoy"
    )
  different = np.unique(real, axis=0)
  together = np.concatenate([different, others])
  if len(np.unique(together, axis=0)) < len(together):
    raise ValueError("decoys holds a true image, or an image twice; drop it")
  nearest = _distances(given, others, measure).min()
  return _identification(_distances(given, real, measure).min(0) < nearest, len(others) + 1)


def join(parts: Sequence[Identification]) -> Identification:
  """Those of several attacks with as many candidates, as one."""
  return _identification(np.concatenate([p.found for p in parts]), round(1 / parts[0].chance))


def _identification(found: np.ndarray, num_candidates: int) -> Identification:
  right = int(found.sum())
  return Identification(
    found, right / len(found), clopper_pearson(right, len(found)), 1 / num_candidates
  )


def _distances(given: np.ndarray, among: np.ndarray, measure: str) -> np.ndarray:
  """[M, N], from rows [M, K] and [N, K]."""
  if measure == "mse":
    return np.stack([np.square(among - x).mean(1) for x in given])
  if measure == "correlation":
    return -_standardised(given) @ _standardised(among).T
  raise ValueError(f"measure={measure!r} is not one of mse, correlation")


def _standardised(rows: np.ndarray) -> np.ndarray:
  """Rows of mean 0 and norm 1; a constant row becomes 0."""
  rows = rows - rows.mean(1, keepdims=True)
  norms = np.linalg.norm(rows, axis=1, keepdims=True)
  return np.divide(rows, norms, out=np.zeros_like(rows), where=norms != 0)
