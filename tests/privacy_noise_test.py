import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from primia_jax import prng
from primia_jax.privacy import noise

SECRET = jnp.arange(8, dtype=jnp.uint32) + 7
NONCE = jnp.array([1, 2, 3], jnp.uint32)
GAUSSIAN = jax.jit(noise.gaussian, static_argnums=2)


def is_normal(x, stddev):
  """Whether numbers pass for normal ones of this scale: variance, distribution, and both tails."""
  x = np.asarray(x, np.float64).ravel() / stddev
  variance = 2 * min(stats.chi2.cdf(np.sum(x**2), len(x)), stats.chi2.sf(np.sum(x**2), len(x)))
  distribution = stats.kstest(x, "norm").pvalue
  tails = stats.binomtest(int(np.sum(np.abs(x) > 3)), len(x), 2 * stats.norm.sf(3)).pvalue
  return min(variance, distribution, tails) > 1e-4


@pytest.mark.parametrize("scale", [2 / 3, 0.97, 1, 1.03, 3 / 2])
def test_the_right_scale_is_accepted_and_wrong_ones_are_rejected(scale):
  x = GAUSSIAN(SECRET, NONCE, (200_001,), 2.5)
  assert is_normal(x, 2.5 * scale) == (scale == 1)
  assert not is_normal(np.random.default_rng(0).uniform(-1, 1, 200_001) * 2.5 * math.sqrt(3), 2.5)


def test_numbers_are_those_of_box_and_muller_in_double_precision():
  x = np.asarray(GAUSSIAN(SECRET, NONCE, (2**17,), 1.0), np.float64)
  words = np.asarray(prng.bits(SECRET, NONCE, (2**17,)), np.float64)
  radius, angle = (
    np.sqrt(-2 * np.log((words[: 2**16] + 0.5) / 2**32)),
    2 * np.pi * words[2**16 :] / 2**32,
  )
  exact = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
  assert np.abs(x - exact).max() < 4e-4  # where u is near 1, whose logarithm float32 knows to 2^-24
  assert np.quantile(np.abs(x - exact), 0.99) < 1e-6


def test_extreme_words_give_finite_numbers_and_the_stated_tail(monkeypatch):
  words = jnp.array([0, 0, 2**32 - 1, 2**31, 0, 2**30, 0, 2**32 - 1], jnp.uint32)
  monkeypatch.setattr(prng, "bits", lambda *_: words)
  x = np.asarray(noise.gaussian(SECRET, NONCE, (8,), 1.0))
  radius = math.sqrt(66 * math.log(2))
  np.testing.assert_allclose(
    x, [radius, 0, 0, math.sqrt(2 * math.log(2)), 0, radius, 0, 0], atol=1e-6
  )


@pytest.mark.parametrize("word", range(0, 2**32, 2**27 + 12345))
def test_the_circle_is_exact_enough_everywhere(word):
  sine, cosine = noise._circle(jnp.array([word], jnp.uint32))
  assert abs(float(sine[0]) - math.sin(2 * math.pi * word / 2**32)) < 3e-7
  assert abs(float(cosine[0]) - math.cos(2 * math.pi * word / 2**32)) < 3e-7


@pytest.mark.parametrize("together", [0, 2**18])
def test_all_steps_leaves_halves_and_secrets_are_independent(monkeypatch, together):
  monkeypatch.setattr(noise, "_TOGETHER", together)
  tree = {"a": jnp.zeros(30_000), "b": jnp.zeros((100, 300)), "c": {"d": jnp.zeros((3, 10_000))}}
  make = jax.jit(lambda secret, step: noise.gaussian_like(secret, step, tree, 1.0))
  streams = []
  for secret, step in ((SECRET, 0), (SECRET, 1), (SECRET, 2**32 - 1), (SECRET + 1, 0)):
    out = make(secret, np.uint32(step))
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, tree)
    for leaf in jax.tree.leaves(out):
      streams += list(np.asarray(leaf, np.float64).reshape(2, -1))
  z = np.stack(streams)
  correlation = z @ z.T / z.shape[1] - np.eye(len(z))
  squares = (z**2 - 1) @ (z**2 - 1).T / z.shape[1] / 2 - np.eye(len(z))
  off = ~np.eye(len(z), dtype=bool)
  assert np.abs(correlation[off]).max() * math.sqrt(z.shape[1]) < 5
  assert np.abs(squares[off]).max() * math.sqrt(z.shape[1]) < 6
  assert is_normal(z, 1.0)


def test_jit_and_no_jit_agree_and_the_scale_may_be_traced():
  x = noise.gaussian(SECRET, NONCE, (5, 7), 3.0)
  assert x.shape == (5, 7)
  assert x.dtype == jnp.float32
  np.testing.assert_allclose(
    x, jax.jit(lambda s: noise.gaussian(SECRET, NONCE, (5, 7), s))(jnp.float32(3)), rtol=1e-5
  )
  assert not np.any(noise.gaussian(SECRET, NONCE, (9,), 0.0))
  assert noise.gaussian(SECRET, NONCE, (0,), 1.0).shape == (0,)


@pytest.mark.parametrize("stddev", [-1.0, math.inf, math.nan])
def test_impossible_scales_are_refused(stddev):
  with pytest.raises(ValueError, match="stddev"):
    noise.gaussian(SECRET, NONCE, (2,), stddev)
