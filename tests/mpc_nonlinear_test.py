"""Whole functions plan for the ranges that calibration finds: small results keep their digits, and
large ones do not saturate.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax import mpc

pytestmark = pytest.mark.usefixtures("x64")
ONE = np.ones((), np.float32)
X = np.linspace(1, 2, 7, dtype=np.float32)[None]


def errors(fn, config, x=X):
  """Of each output, relative to its largest."""
  plan = mpc.plan(fn, OWNERS, (ONE, x), config, mpc.calibrate(fn, OWNERS, [(ONE, x)]))
  got, want = mpc.check(plan, (ONE, x)), fn(ONE.astype(np.float64), x.astype(np.float64))
  pairs = [(np.asarray(a, np.float64), np.asarray(b)) for a, b in zip(got, want, strict=True)]
  return [float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in pairs]


def test_small_results_keep_their_digits():
  """In units of activations most would be off by a tenth."""

  def fn(w, x):
    y = x * w
    low, high = y * 2e-6, y * 500
    small = (
      jnp.exp(y - 10), jnp.exp2(y - 13), lax.rsqrt(high * 100), 1 / high,
      high**-0.9, (y * 20) ** -2, jnp.log1p(low * 100), jnp.sqrt(low / 50), jnp.cbrt(low / 2e3),
    )  # fmt: skip
    return [v * 2.0**12 for v in small]  # outputs are truncated to the unit of activations

  found = errors(fn, mpc.Config(64, 10))
  assert max(found) < 2.0**-8, found


def test_large_results_do_not_saturate():
  def fn(w, x):
    y = x * w
    return (
      jnp.exp(y * 5), jnp.exp2(y * 7), jnp.expm1(y * 5), jnp.sinh(y * 5), jnp.cosh(y * 5),
      jnp.power(2.5, y * 5), 2**-4 / (y / 2**12), (y / 2**9) ** -2, lax.rsqrt(y / 2**14),
    )  # fmt: skip

  found = errors(fn, mpc.Config(48, 18))
  assert max(found) < 1e-5, found


def test_the_magnitude_of_complex_numbers():
  """Beyond 2^(k - 2 f - 4), which is 1."""
  fn = lambda w, x: [jnp.abs(jnp.fft.fft(x * w))]
  assert max(errors(fn, mpc.Config(32, 14, 12, margin=1.0), normal(0, 6) / 2)) < 1e-3
