"""The transform against one by FFT in NumPy float64, and what a scattering transform is for: it
forgets position.
"""

import functools
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from scipy import ndimage

from primia_jax.scattering import num_paths, scatter


def images(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run(x, **options):
  return np.asarray(jax.jit(functools.partial(scatter, **options))(jnp.asarray(x)))


def circular(x, kernel):
  """x * kernel for x [H, W], reflected as far as the kernel reaches, as a product of spectra."""
  radius = kernel.shape[0] // 2
  padded = np.pad(x, radius, mode="reflect")
  spectrum = np.fft.fft2(padded) * np.fft.fft2(
    np.roll(embed(kernel, padded.shape), (-radius, -radius), (0, 1))
  )
  return np.fft.ifft2(spectrum)[radius : radius + x.shape[0], radius : radius + x.shape[1]]


def embed(kernel, shape):
  return np.pad(kernel, [(0, n - k) for n, k in zip(shape, kernel.shape, strict=True)])


def morlet(scale, angle):
  """The textbook's wavelet in rotated coordinates u = R r. A cross-correlation mirrors it."""
  sigma, xi, slant = 0.8 * 2**scale, 3 * np.pi / 4 / 2**scale, 0.5
  radius = int(np.ceil(3 * sigma / slant))
  r = np.stack(np.meshgrid(*[np.arange(-radius, radius + 1)] * 2, indexing="ij"), -1)[
    ..., ::-1
  ]  # (x, y)
  rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
  u = r @ rotation.T
  precision = np.diag([1, slant**2]) / sigma**2
  gaussian = (
    np.exp(-0.5 * np.einsum("hwi,ij,hwj->hw", u, precision, u))
    * np.sqrt(np.linalg.det(precision))
    / 2
    / np.pi
  )
  wave = np.exp(1j * xi * u[..., 0])
  beta = (gaussian * wave).sum() / gaussian.sum()
  return (gaussian * (wave - beta))[::-1, ::-1]


def lowpass(scale, num_scales):
  sigma = 0.8 * 2 ** (num_scales - 1 - scale)
  radius = int(np.ceil(3 * sigma))
  y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
  g = np.exp(-(x**2 + y**2) / 2 / sigma**2)
  return g / g.sum()


def oracle(image, num_scales, num_angles):
  """One channel [H, W] -> [H / 2^J, W / 2^J, K]."""
  angles = [i * np.pi / num_angles for i in range(num_angles)]

  def average(u, scale):
    step = 2 ** (num_scales - scale)
    return circular(u, lowpass(scale, num_scales)).real[::step, ::step]

  def strength(u, scale, coarser, angle):
    step = 2 ** (coarser - scale)
    return np.abs(circular(u, morlet(coarser - scale, angle)))[::step, ::step]

  first = {
    (j, a): strength(image, 0, j, a) for j, a in itertools.product(range(num_scales), angles)
  }
  second = [
    average(strength(u, j, k, b), k)
    for (j, _), u in first.items()
    for k in range(j + 1, num_scales)
    for b in angles
  ]
  return np.stack([average(image, 0), *(average(u, j) for (j, _), u in first.items()), *second], -1)


@pytest.mark.parametrize(
  ("shape", "num_scales", "num_angles"),
  [((2, 28, 28, 1), 2, 8), ((1, 16, 24, 2), 3, 4), ((2, 8, 4, 3), 1, 3), ((1, 16, 16, 1), 4, 2)],
)
def test_equals_the_transform_by_fft(shape, num_scales, num_angles):
  x = images(*shape)
  ours = run(x, num_scales=num_scales, num_angles=num_angles)
  count = num_paths(num_scales, num_angles)
  assert ours.shape == (shape[0], shape[1] >> num_scales, shape[2] >> num_scales, shape[3] * count)
  for i, c in itertools.product(range(shape[0]), range(shape[3])):
    wanted = oracle(x[i, ..., c].astype(np.float64), num_scales, num_angles)
    np.testing.assert_allclose(
      ours[i, ..., c * count : (c + 1) * count], wanted, rtol=1e-4, atol=2e-6
    )


def test_paths_are_counted():
  assert [num_paths(j) for j in (1, 2, 3, 4)] == [9, 81, 217, 417]
  assert num_paths(3, 4) == 1 + 3 * 4 + 3 * 16


def test_a_constant_has_no_waves():
  x = images(1, 16, 16, 1)
  y, brighter = run(x), run(x + 5)
  np.testing.assert_allclose(run(np.full((1, 16, 16, 1), 3.0, np.float32))[..., 0], 3, rtol=1e-6)
  np.testing.assert_allclose(brighter[..., 0], y[..., 0] + 5, rtol=1e-5)
  np.testing.assert_allclose(brighter[..., 1:], y[..., 1:], rtol=1e-3, atol=1e-5)


def test_contrast_is_a_factor():
  x = images(1, 16, 16, 1)
  np.testing.assert_allclose(run(3 * x), 3 * run(x), rtol=1e-5, atol=1e-6)


def test_energy_decays_from_order_to_order():
  """Most energy is in the first two orders (arXiv 1203.1513, table 1); the total never grows."""
  smooth = ndimage.gaussian_filter(images(2, 32, 32), (0, 1.5, 1.5))[..., None]
  y = run(smooth, num_scales=3)
  zeroth, first, second = ((part**2).sum() * 4**3 for part in np.split(y, [1, 25], axis=-1))
  assert first > 3 * second > 0
  assert zeroth + first + second < (smooth**2).sum()


def test_waves_answer_to_their_own_angle_and_scale():
  y, x = np.mgrid[:32, :32]
  angles = np.arange(8)[:, None, None] * np.pi / 8
  along = x * np.cos(angles) + y * np.sin(angles)
  waves = np.concatenate([np.cos(0.75 * np.pi / 2**j * along) for j in range(2)]).astype(np.float32)
  first = run(waves[..., None])[:, 2:6, 2:6, 1:17].mean((1, 2))
  assert (first.argmax(1) == np.arange(16)).all()


def test_a_small_shift_changes_little():
  """Relative to the image itself, by far; and the less, the more scales are averaged over."""
  sharp = ndimage.gaussian_filter(images(2, 34, 34), (0, 0.8, 0.8))
  here, there = (sharp[:, k : k + 32, k : k + 32, None] for k in (1, 2))

  def change(f):
    return np.linalg.norm(f(here) - f(there)) / np.linalg.norm(f(here))

  two, three = (change(functools.partial(run, num_scales=j)) for j in (2, 3))
  assert change(lambda x: x) > 0.6
  assert three < two < 0.5 * change(lambda x: x)


def test_gradients_are_finite_where_there_is_no_wave():
  gradient = jax.jit(jax.grad(lambda x: scatter(x).sum()))(jnp.zeros((1, 4, 4, 1)))
  assert np.isfinite(gradient).all()


def test_stays_float32_under_x64():
  with jax.enable_x64(True):
    assert (
      jax.eval_shape(scatter, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)).dtype == jnp.float32
    )


@pytest.mark.parametrize(
  ("shape", "options", "message"),
  [
    (
      (1, 30, 28, 1),
      {},
      "30 x 28 pixels cannot be halved num_scales=2 times; resize them to a multiple of 4",
    ),
    ((28, 28, 1), {}, r"float32 images \[B, H, W, C\], not float32 \[28, 28, 1\]"),
    ((1, 8, 8, 1), {"num_scales": 0}, "num_scales=0 and num_angles=8 must be at least 1"),
    ((1, 8, 8, 1), {"num_angles": 0}, "num_angles=0 must be at least 1"),
  ],
)
def test_bad_input_is_refused(shape, options, message):
  with pytest.raises(ValueError, match=message):
    scatter(jnp.zeros(shape), **options)


def test_bytes_are_refused():
  with pytest.raises(ValueError, match="not uint8"):
    scatter(jnp.zeros((1, 8, 8, 1), jnp.uint8))


def test_agrees_with_kymatio(monkeypatch):
  """Kymatio cuts nothing off and pads only once: a few per cent away from the edges, and paths in
  another order.
  """
  pytest.importorskip("kymatio", reason="kymatio is not installed: features not compared with it")
  monkeypatch.setattr(
    scipy.special, "sph_harm", None, raising=False
  )  # which its 3D part wants of older SciPy
  kymatio = importlib.import_module("kymatio.numpy")
  x = images(1, 32, 32, 1)
  theirs = kymatio.Scattering2D(J=2, shape=(32, 32), L=8)(x[0, ..., 0])[:, 2:6, 2:6]
  ours = run(x)[0, 2:6, 2:6].transpose(2, 0, 1)
  for low, high in ((0, 1), (1, 9), (9, 17), (17, 81)):
    np.testing.assert_allclose(
      np.sort(ours[low:high], 0), np.sort(theirs[low:high], 0), rtol=0.05, atol=0.02
    )
