"""Sorting against NumPy: ties, all sizes, both methods, the whole range."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import CONFIGS, check_both_parties, clear

from primia_jax.mpc.functions import sorting


@pytest.mark.parametrize("n", range(2, 40))
def test_the_network_sorts_zeros_and_ones(n):
  """So it sorts everything. All inputs up to 10 numbers, random ones beyond."""
  rng = np.random.default_rng(n)
  x = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 if n <= 10 else rng.integers(0, 2, (500, n))
  want = np.sort(x, 1)
  for i, j in sorting.exchanges(n):
    x[:, i], x[:, j] = np.minimum(x[:, i], x[:, j]), np.maximum(x[:, i], x[:, j])
  np.testing.assert_array_equal(x, want)


def everything(axis, num):
  """Sorted numbers, those sorted in tow, the largest and their positions, one after the other."""

  def fn(build, x, y):
    values, positions = sorting.largest(build, x, num, axis)
    positions = build.align(positions, values)[0]
    parts = [*sorting.sort(build, [x], axis), *sorting.sort(build, [x, y], axis), values, positions]
    return build.local(lambda *vs: jnp.concatenate(vs, axis), *parts)

  return fn


@pytest.mark.parametrize(("n", "axis"), [(1, 0), (7, 2)])
def test_sort_and_largest(n, axis):
  config, rng, num = CONFIGS[1], np.random.default_rng(n), min(n, 3)
  shape = [2, 3]
  shape.insert(axis, n)
  x, y = rng.integers(-3, 3, shape) / 4, rng.integers(-9, 9, shape) / 8
  x.flat[0], x.flat[-1] = 100.0, -100.0
  order, down = np.argsort(x, axis, kind="stable"), np.argsort(-x, axis, kind="stable")
  take, down = functools.partial(np.take_along_axis, axis=axis), down.take(range(num), axis)
  want = np.concatenate([take(x, order), take(x, order), take(y, order), take(x, down), down], axis)
  np.testing.assert_array_equal(clear(everything(axis, num), [x, y], config, 128.0), want)


def test_both_parties_get_the_same_bits():
  check_both_parties(lambda build, x: sorting.sort(build, [x, x], 1)[1])
