import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from scipy import stats

from primia_jax import prng
from primia_jax.privacy import discrete, grid, noise

SECRET = jnp.arange(8, dtype=jnp.uint32) + 7
INTEGERS = jax.jit(noise.integers, static_argnums=(1, 2))


def is_normal(x, stddev):
  """Whether numbers pass for normal ones of this scale: variance, distribution, and both tails."""
  x = np.asarray(x, np.float64).ravel() / stddev
  variance = 2 * min(stats.chi2.cdf(np.sum(x**2), len(x)), stats.chi2.sf(np.sum(x**2), len(x)))
  distribution = stats.kstest(x, "norm").pvalue
  tails = stats.binomtest(int(np.sum(np.abs(x) > 3)), len(x), 2 * stats.norm.sf(3)).pvalue
  return min(variance, distribution, tails) > 1e-4


@pytest.mark.parametrize("scale", [2 / 3, 0.97, 1, 1.03, 3 / 2])
def test_the_right_scale_is_accepted_and_wrong_ones_are_rejected(scale):
  x = INTEGERS(SECRET, (200_001,), 14)
  assert x.dtype == jnp.int32
  assert is_normal(x, noise.stddev(14) * scale) == (scale == 1)
  uniform = np.random.default_rng(0).uniform(-1, 1, 200_001)
  assert not is_normal(uniform * noise.stddev(14) * math.sqrt(3), noise.stddev(14))


def test_a_number_is_made_of_its_two_digits():
  tree, level = {"a": jnp.zeros((3, 5)), "b": jnp.zeros(7)}, 9
  high, low = noise.digits_like(SECRET, 3, tree, level)
  whole = noise.integers_like(SECRET, 3, tree, level)
  for name in tree:
    np.testing.assert_array_equal(whole[name], (high[name] << noise.shift(level)) + low[name])
  assert np.abs(np.concatenate([low["a"].ravel(), low["b"]])).max() < 13.6 * 75.9


def test_the_law_is_a_discrete_gaussian_to_the_last_of_120_bits():
  """All probabilities at the least level, from the digits' law and in 60 digits of arithmetic; the
  law of the digits is `discrete`'s, whose table a test of its own reads off.
  """
  base, shift = noise._digits(2)
  assert (base, shift) == (4.75, 1)
  with mpmath.workdps(60):
    digit = {}
    for x, p in enumerate(discrete.probabilities(base)):
      digit[x] = digit[-x] = mpmath.mpf(str(p))
    law = {}
    for x, p in digit.items():
      for y, q in digit.items():
        law[2 * x + y] = law.get(2 * x + y, mpmath.mpf(0)) + p * q
    variance = mpmath.mpf(base) ** 2 * 5
    weight = lambda y: mpmath.exp(-(mpmath.mpf(y) ** 2) / (2 * variance))
    total = mpmath.fsum(weight(y) for y in range(-400, 401))
    for y in range(-30, 31):
      assert abs(law[y] * total / weight(y) - 1) < 2.0**-119


@pytest.mark.parametrize("level", noise.LEVELS)
def test_sums_of_a_lattice_do_not_depend_on_where_it_lies(level):
  """The lemma of the module's text: sum_k exp(-(k - c)^2 / 2 t^2) is t sqrt(2 pi) within e(t) <
  2^-120 / 3, for the t of each level and for r.
  """
  base, shift = noise._digits(level)
  assert base >= noise._SPREAD * 2**shift
  assert noise.stddev(level) ** 2 == pytest.approx(base**2 * (1 + 4**shift) - noise._ROUNDING**2)
  with mpmath.workdps(60):
    for t in (mpmath.mpf(base) / mpmath.sqrt(1 + mpmath.mpf(4) ** shift), mpmath.mpf("2.125")):
      for c in (0, mpmath.mpf("0.25"), mpmath.mpf("0.5"), mpmath.mpf("0.9")):
        total = mpmath.fsum(mpmath.exp(-((k - c) ** 2) / (2 * t**2)) for k in range(-160, 161))
        assert abs(total / (t * mpmath.sqrt(2 * mpmath.pi)) - 1) < noise._FACTORS / 6


def test_the_error_that_is_charged_covers_both_digits_and_every_number():
  for level in noise.LEVELS:
    digits = 2 * discrete.sampler_error(noise._digits(level)[0])
    assert digits < noise.error(level) < 1e-32
  assert noise.error_of_release() >= 2**32 * noise.error(26)
  assert noise.error_of_release() < 1e-22


def low_bits(released, exact_sum, sigma):
  """How far a release is from `exact_sum` plus Box-Muller noise of float32 uniforms: small where
  the guess is right.
  """
  drawn = (np.asarray(released, np.float64) - np.asarray(exact_sum, np.float64)) / sigma
  squared_radius = drawn[: drawn.size // 2] ** 2 + drawn[drawn.size // 2 :] ** 2
  uniform = np.exp(-squared_radius[squared_radius < 0.1] / 2) * 2**24
  return np.abs(uniform - np.round(uniform)).mean() if uniform.size else 0.25


def box_muller(rng, size, sigma):
  """What was once added: float32 normal numbers from uniform numbers of 24 bits."""
  uniform = (rng.integers(0, 2**24, size // 2) + 0.5).astype(np.float32) * np.float32(2**-24)
  radius = np.sqrt(np.float32(-2) * np.log(uniform)) * np.float32(sigma)
  angle = rng.uniform(0, 2 * math.pi, size // 2).astype(np.float32)
  return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


@pytest.mark.parametrize("sigma", [1.0, 1000.0])
def test_low_bits_of_a_release_do_not_tell_a_unit(sigma):
  """Of one release, 1,024 numbers: which of two neighbouring sums was it? The same attack names the
  right one nearly always where the noise is Box and Muller's in float32.
  """
  rng, size, tries = np.random.default_rng(0), 1024, 60
  on = grid.choose(size, sigma)
  unit = rng.normal(size=size)
  unit /= np.linalg.norm(unit)
  sums = {True: unit, False: np.zeros(size)}
  add = jax.jit(lambda total, secret: grid.real(grid.noised(total, on, secret, 0), 1 / on.steps))
  right = {"grid": 0, "float": 0}
  for i in range(tries):
    member = bool(rng.integers(2))
    rounded = {m: np.rint(v * on.steps).astype(np.int32) for m, v in sums.items()}
    ours = add(jnp.asarray(rounded[member]), prng.derive(SECRET, i))
    exact = {m: r / on.steps for m, r in rounded.items()}
    theirs = np.float32(sums[member]) + box_muller(rng, size, sigma)
    for name, released, of in (("grid", ours, exact), ("float", theirs, sums)):
      told = low_bits(released, of[True], sigma) < low_bits(released, of[False], sigma)
      right[name] += told == member
  # a Gaussian mechanism of sigma 1 tells a member with probability 69 %, but not by low bits
  assert stats.binomtest(right["grid"], tries, 0.5).pvalue > 1e-3
  if sigma == 1:
    assert right["float"] > 0.9 * tries


def test_trees_get_fresh_noise_for_every_leaf_step_and_secret(monkeypatch):
  tree = {"a": jnp.zeros((200, 3)), "b": jnp.zeros((200, 3)), "c": jnp.zeros(())}
  make = lambda secret, step: noise.integers_like(secret, step, tree, 12)
  for together in (noise._TOGETHER, 0):
    monkeypatch.setattr(noise, "_TOGETHER", together)
    drawn = [make(SECRET, 0), make(SECRET, 1), make(prng.derive(SECRET, 1), 0)]
    rows = np.stack(
      [np.asarray(leaf).ravel() for one in drawn for leaf in (one["a"], one["b"])]
    ).astype(np.float64)
    assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 0.2
    assert is_normal(rows, noise.stddev(12))
    assert all(one["c"].shape == () for one in drawn)


def test_shapes_and_levels():
  assert noise.integers(SECRET, (5, 7), 3).shape == (5, 7)
  assert noise.integers(SECRET, (0,), 3).shape == (0,)
  for level in (1, 27):
    with pytest.raises(ValueError, match=f"level={level}"):
      noise.integers(SECRET, (2,), level)
  ratios = np.diff(np.log2([noise.stddev(level) for level in noise.LEVELS]))
  assert np.all((ratios > 0.85) & (ratios < 1.1))
