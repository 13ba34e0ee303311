import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax.secagg import shamir


def secrets(num, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (num, 32), dtype=np.uint8)


def times(a, b):
  """The product in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1, by the definition."""
  product = 0
  for bit in range(8):
    if b >> bit & 1:
      product ^= a << bit
  for bit in range(15, 7, -1):
    if product >> bit & 1:
      product ^= 0x11B << (bit - 8)
  return product


def test_shares_lie_on_polynomials_of_degree_t_minus_1_whose_constant_is_the_secret():
  """All of one byte's polynomials, t = 2: share(x) - secret = slope * x, each slope by one
  secret.
  """
  secret = secrets(300)
  points = np.array([1, 2, 7, 255])
  shares = shamir.share(secret, 2, points)
  for byte in (0, 31):
    slopes = shares[:, 0, byte] ^ secret[:, byte]  # at point 1
    for j, x in enumerate(points.tolist()):
      want = [times(int(s), x) ^ int(c) for s, c in zip(slopes, secret[:, byte], strict=True)]
      assert shares[:, j, byte].tolist() == want
    assert len(set(slopes.tolist())) > 128


@pytest.mark.parametrize(("threshold", "num"), [(1, 1), (1, 3), (2, 2), (3, 5), (5, 5), (4, 7)])
def test_every_t_shares_give_the_secret(threshold, num):
  secret, points = secrets(4), np.random.default_rng(1).permutation(255)[:num] + 1
  shares = shamir.share(secret, threshold, points)
  assert shares.shape == (4, num, 32)
  assert shares.dtype == np.uint8
  for size in range(threshold, num + 1):
    for some in (
      itertools.permutations(range(num), size)
      if num < 5
      else itertools.combinations(range(num), size)
    ):
      got = shamir.combine(points[list(some)], shares[:, list(some)], threshold)
      assert np.array_equal(got, secret)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 255), st.integers(0, 2**32 - 1), st.data())
def test_any_threshold_any_points(num, seed, data):
  threshold = data.draw(st.integers(1, num))
  rng = np.random.default_rng(seed)
  secret, points = secrets(2, seed), rng.permutation(255)[:num] + 1
  shares = shamir.share(secret, threshold, points)
  some = rng.permutation(num)[:threshold]
  assert np.array_equal(shamir.combine(points[some], shares[:, some], threshold), secret)


def test_each_secret_may_have_its_own_holders():
  secret, points = secrets(3), np.arange(1, 6)
  shares = shamir.share(secret, 3, points)
  held = np.array([[0, 1, 2], [4, 2, 0], [3, 1, 4]])
  got = shamir.combine(points[held], np.take_along_axis(shares, held[:, :, None], axis=1), 3)
  assert np.array_equal(got, secret)


@pytest.mark.parametrize("threshold", [2, 3])
def test_fewer_than_t_shares_are_uniform_whatever_the_secret(threshold):
  """Chi-square of all t - 1 shares together, at a fixed secret; t shares are not: they give the
  secret away.
  """
  num = 2**18
  secret = np.full((num // 32, 32), 0x5A, np.uint8)
  shares = shamir.share(secret, threshold, np.arange(1, threshold + 1))
  joint = np.zeros(num, np.int64)
  for j in range(threshold - 1):  # the low 8 / (t - 1) bits of each, so that every cell has enough
    joint = joint << (8 // (threshold - 1)) | (
      shares[:, j].ravel() & (2 ** (8 // (threshold - 1)) - 1)
    )
  counts = np.bincount(joint, minlength=256)
  assert 181 < np.sum((counts - num / 256) ** 2 / (num / 256)) < 347  # beyond the 1e-4 quantiles
  assert np.array_equal(shamir.combine(np.arange(1, threshold + 1), shares, threshold), secret)


def test_with_threshold_one_the_share_is_the_secret_and_the_check_of_uniformity_would_see_it():
  secret = secrets(1)
  assert np.array_equal(
    shamir.share(secret, 1, np.arange(1, 4)), np.broadcast_to(secret[:, None], (1, 3, 32))
  )


def test_coefficients_are_fresh_at_each_call_and_for_each_secret():
  secret, points = secrets(2), np.arange(1, 4)
  assert not np.array_equal(shamir.share(secret, 2, points), shamir.share(secret, 2, points))
  same = np.repeat(secret[:1], 2, axis=0)
  a, b = shamir.share(same, 2, points)
  assert not np.any(np.all(a == b, axis=1))


@pytest.mark.parametrize("extra", [1, 2, 3])
def test_a_forged_share_among_more_than_t_is_noticed(extra):
  secret, points = secrets(3), np.arange(1, 4 + extra)
  shares = shamir.share(secret, 3, points)
  for holder in range(3 + extra):
    forged = shares.copy()
    forged[1, holder, 5] ^= 1
    with pytest.raises(ValueError, match=r"rows \[1\]"):
      shamir.combine(points, forged, 3)
    got = shamir.combine(points[:3], forged[:, :3], 3)
    assert np.array_equal(got[1], secret[1]) == (holder >= 3)
  assert np.array_equal(shamir.extend(points[:3], shares[:, :3], points), shares)
  assert np.array_equal(shamir.extend(points[:3], shares[:, :3], np.zeros(1, int))[:, 0], secret)


@pytest.mark.parametrize(
  ("points", "threshold", "told"),
  [
    ([1, 2], 3, "threshold=3 with 2 shares"),
    ([1, 2], 0, "threshold=0"),
    ([1, 0, 2], 2, "from 0 to 2"),
    ([1, 256], 2, "from 1 to 256"),
    ([-1, 3], 2, "from -1 to 3"),
    ([3, 1, 3], 2, r"repeated points \[3\]"),
    (list(range(1, 257)), 2, "256"),
    ([], 1, "0 shares"),
  ],
)
def test_bad_points_and_thresholds_are_refused(points, threshold, told):
  with pytest.raises(ValueError, match=told):
    shamir.share(secrets(1), threshold, np.array(points, int))
  with pytest.raises(ValueError, match=told):
    shamir.combine(np.array(points, int), np.zeros((1, len(points), 32), np.uint8), threshold)


def test_shares_of_another_type_are_refused():
  with pytest.raises(ValueError, match="uint8"):
    shamir.share(secrets(1).astype(np.int32), 1, np.array([1]))
  with pytest.raises(ValueError, match="uint8"):
    shamir.combine(np.array([1]), np.zeros((1, 1, 32), np.int32), 1)
