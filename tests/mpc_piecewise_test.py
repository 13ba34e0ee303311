"""Piecewise functions: constants exactly, cubics within their bound."""

import math

import numpy as np
import pytest
from mpc_reference import CONFIGS, check, check_shapes, clear, each_config, spread

from primia_jax.mpc.functions import piecewise


@each_config
def test_sign(config):
  x = spread(config)
  check(piecewise.sign, [x], np.sign(x), 1e-9, config)


def test_shapes():
  check_shapes(piecewise.sign)


@each_config
def test_a_step_is_reached_at_its_threshold(config):
  unit = 2.0**-config.fraction_bits
  thresholds = np.array([-300, -1, 0, 1, 77])
  x = np.array([-301, -300, -299, -2, -1, 0, 1, 2, 76, 77, 78]) * unit
  got = clear(lambda build, x: piecewise.steps(build, x, thresholds), [x], config)
  np.testing.assert_array_equal(got, x / unit >= thresholds[:, None])


@pytest.mark.parametrize("seed", range(3))
@each_config
def test_a_table_holds_any_constants(config, seed):
  rng = np.random.default_rng(seed)
  unit = 2.0**-config.fraction_bits
  thresholds = np.sort(rng.choice(np.arange(-500, 500), 9, replace=False))
  values = rng.integers(-200, 200, 10) * unit / 4
  x = np.concatenate([thresholds - 1, thresholds, rng.integers(-600, 600, 50)]) * unit
  pick = lambda build, x: piecewise.table(
    build, piecewise.steps(build, x, thresholds), values, unit / 4
  )
  np.testing.assert_array_equal(
    clear(pick, [x], config), values[np.searchsorted(thresholds, x / unit, side="right")]
  )


@pytest.mark.parametrize("max_abs", [2.0, math.inf])
def test_a_spline_is_near_its_function_and_constant_beyond(max_abs):
  """Within a unit where the function's derivatives are at most 1, as those of a sine."""
  config = CONFIGS[2]
  x = spread(config, min(max_abs, 60.0))
  x = x[np.abs(x) != 3.0]  # where it jumps
  want = np.where(np.abs(x) < 3, np.sin(x), np.where(x < 0, -1.0, 2.0))
  spline = lambda build, x: piecewise.spline(build, x, np.sin, 3.0, -1.0, 2.0)
  got = check(spline, [x], want, 1.0, config, max_abs)
  np.testing.assert_array_equal(got[np.abs(x) > 3], want[np.abs(x) > 3])
