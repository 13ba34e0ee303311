"""The largest and its position: exact, with ties and over the whole range."""

import functools

import numpy as np
import pytest
from mpc_reference import CONFIGS, check_both_parties, clear

from primia_jax.mpc.functions import extrema


@pytest.mark.parametrize("n", [1, 2, 7, 17, 130])
@pytest.mark.parametrize("axis", [0, 2])
def test_argmax_and_tournament(n, axis):
  config = CONFIGS[1]
  shape = [2, 3]
  shape.insert(axis, n)
  x = np.random.default_rng(n).integers(-3, 3, shape) / 4  # with many ties
  got = clear(functools.partial(extrema.argmax, axis=axis), [x], config)
  np.testing.assert_array_equal(got, x.argmax(axis))
  np.testing.assert_array_equal(
    clear(functools.partial(extrema.tournament, axis=axis), [x], config), x.max(axis)
  )
  wide = np.sort(x, axis) * 2.0 ** (config.num_bits - 2 * config.fraction_bits - 3)
  np.testing.assert_array_equal(
    clear(functools.partial(extrema.argmax, axis=axis), [wide], config), wide.argmax(axis)
  )


def test_argmax_sees_every_bit():
  """Products are finer than activations, and their low bits count."""
  x = np.array([[1.0, 1.0], [1 + 2.0**-16, 1.0], [1.0, 1 + 2.0**-16]])
  square = lambda build, x: extrema.argmax(build, build.scaled(build.multiply(x, x), 2.0**-8), 1)
  np.testing.assert_array_equal(clear(square, [x], CONFIGS[0], 4.0), [0, 0, 1])


def test_both_parties_get_the_same_bits():
  check_both_parties(functools.partial(extrema.argmax, axis=1), comparison="fss")
