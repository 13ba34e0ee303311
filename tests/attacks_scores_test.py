"""PSNR, SSIM and identification, against NumPy and SciPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from primia_jax.attacks import scores


def images(seed, *shape):
  return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def ssim_by_scipy(a, b):
  """scikit-image's `structural_similarity`, for [H, W] in float64."""
  smooth = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]
  ua, ub = smooth(a), smooth(b)
  va, vb, vab = smooth(a * a) - ua * ua, smooth(b * b) - ub * ub, smooth(a * b) - ua * ub
  top = (2 * ua * ub + 1e-4) * (2 * vab + 9e-4)
  return (top / ((ua**2 + ub**2 + 1e-4) * (va + vb + 9e-4))).mean()


def test_psnr():
  reference = jnp.zeros((2, 4, 4, 1))
  np.testing.assert_allclose(scores.psnr(reference + 0.1, reference), [20, 20], rtol=1e-5)
  assert scores.psnr(reference, reference).tolist() == [np.inf, np.inf]


def test_ssim_is_that_of_scikit_image():
  reference = images(0, 3, 16, 13, 2)
  given = np.clip(0.7 * reference + 0.3 * images(1, 3, 16, 13, 2), 0, 1)
  expected = [
    np.mean([ssim_by_scipy(x[..., c].astype(float), y[..., c].astype(float)) for c in range(2)])
    for x, y in zip(given, reference, strict=True)
  ]
  np.testing.assert_allclose(scores.ssim(given, reference), expected, rtol=1e-5)
  np.testing.assert_allclose(jax.vmap(scores.ssim)(given, reference), expected, rtol=1e-5)
  np.testing.assert_allclose(scores.ssim(reference, reference), 1, rtol=1e-6)
  assert max(scores.ssim(1 - reference, reference)) < 0
  with pytest.raises(ValueError, match="at least 11 x 11, not 10 x 16"):
    scores.ssim(jnp.zeros((1, 10, 16, 1)), jnp.zeros((1, 10, 16, 1)))


def test_identification_by_what_is_told_apart():
  candidates, truth = images(0, 20, 5, 5, 1), np.array([3, 7, 7])
  dark = 0.1 * candidates[truth]
  by_picture = scores.identify(dark, candidates, truth)
  assert (by_picture.rate, by_picture.chance) == (1, 0.05)
  np.testing.assert_allclose(by_picture.interval, (0.025 ** (1 / 3), 1))  # its closed form
  nearest = np.square(dark[:, None] - candidates).mean((2, 3, 4)).argmin(1)
  by_mse = scores.identify(dark, candidates, truth, measure="mse")
  np.testing.assert_array_equal(by_mse.found, nearest == truth)
  assert not by_mse.found.all()
  wrong = scores.identify(candidates[truth], candidates, (truth + 1) % 20)
  assert (wrong.rate, wrong.interval[0]) == (0, 0)


def test_no_credit_without_a_picture():
  candidates = images(0, 4, 3, 3, 1)
  for value in (0.5, np.nan):
    for measure in ("mse", "correlation"):
      flat = np.full((1, 3, 3, 1), value, np.float32)
      found = scores.identify(flat, candidates, np.array([2]), measure=measure).found
      expected = measure == "mse" and np.square(candidates - flat).mean((1, 2, 3)).argmin() == 2
      assert found.tolist() == [expected]


def test_identification_in_a_batch_in_any_order():
  given, decoys = images(1, 3, 5, 5, 1), images(2, 9, 5, 5, 1)
  truth = given[[2, 0]]
  both = scores.identify_any(0.1 * given, truth, decoys)
  assert (both.found.tolist(), both.chance) == ([True, True], 0.1)
  rough = 0.8 * given + 0.2 * images(3, 3, 5, 5, 1)
  assert scores.identify_any(rough, truth, decoys).rate == 1
  one = scores.identify_any(np.concatenate([rough, decoys[:1]]), truth, decoys)
  assert not one.found.any()  # a reconstruction shows a decoy exactly
  assert scores.identify_any(np.full((1, 5, 5, 1), np.nan), truth, decoys).rate == 0
  joined = scores.join([both, one])
  assert (joined.rate, joined.chance, len(joined.found)) == (0.5, 0.1, 4)
  assert joined.interval == scores.clopper_pearson(2, 4)
  with pytest.raises(ValueError, match="decoys holds a true image"):
    scores.identify_any(given, truth, given)
  with pytest.raises(ValueError, match="one shape"):
    scores.identify_any(given, truth, decoys[:, :2])


def test_bad_input_is_refused():
  candidates = images(0, 4, 3, 3, 1)
  for given, among, truth, measure, message in (
    (candidates, candidates, np.arange(3), "mse", r"must be \[M"),
    (candidates, candidates[:, :2], np.arange(4), "mse", r"must be \[M"),
    (candidates, candidates, np.arange(1, 5), "mse", "of the 4 candidates"),
    (candidates[:1], candidates[[0, 1, 1]], np.zeros(1, int), "mse", "twice"),
    (candidates, candidates, np.arange(4), "ssim", "not one of mse"),
  ):
    with pytest.raises(ValueError, match=message):
      scores.identify(given, among, truth, measure=measure)
