"""Trigonometric and hyperbolic functions within their bounds over the whole calibrated range."""

import functools

import numpy as np
import pytest
from mpc_reference import CONFIGS, build, check_shapes, clear, result_unit

from primia_jax.mpc.functions import hyperbolic, trigonometry

pytestmark = pytest.mark.usefixtures("x64")
WIDE, NARROW = CONFIGS[0], CONFIGS[3]
TAN, SINH = 31.0, 63.0  # the bounds of results


def grid(config, low, high):
  """1,536 numbers of the configuration's grid between two others that it has."""
  x = np.linspace(low, high, 1536)
  return np.clip(np.rint(x / config.unit) * config.unit, low, high)


@pytest.mark.parametrize(
  ("fn", "reference", "low", "high", "config"),
  [
    (trigonometry.cos, np.cos, -3.125, 3.125, WIDE),
    (trigonometry.cos, np.cos, -15.5, 15.5, NARROW),
    (trigonometry.cos, np.cos, -4000, 4000, WIDE),
    (trigonometry.sin, np.sin, -1.5, 1.5, NARROW),
    (trigonometry.sin, np.sin, -15.5, 15.5, WIDE),
    (functools.partial(trigonometry.tan, bound=TAN), np.tan, -1.5, 1.5, WIDE),
    (trigonometry.atan, np.arctan, -8, 8, WIDE),
    (trigonometry.atan, np.arctan, -60, 60, WIDE),
    (trigonometry.atan, np.arctan, -60, 60, NARROW),
    (functools.partial(hyperbolic.asinh, bound=7.0), np.arcsinh, -60, 60, WIDE),
    (functools.partial(hyperbolic.acosh, bound=7.0), np.arccosh, 1, 60, NARROW),
    (functools.partial(hyperbolic.atanh, bound=3.5), np.arctanh, -0.9375, 0.9375, WIDE),
    (functools.partial(hyperbolic.sinh, bound=SINH), np.sinh, -4.5, 4.5, NARROW),
    (functools.partial(hyperbolic.cosh, bound=SINH), np.cosh, -4.5, 4.5, WIDE),
  ],
)
def test_whole_ranges(fn, reference, low, high, config):
  x = grid(config, low, high)
  error = np.abs(clear(fn, [x], config, float(max(abs(low), high))) - reference(x))
  stated = {np.tan: 2 + 4 * (1 + np.tan(x) ** 2), np.cos: 2, np.sin: 2, np.arctanh: 2}
  bound = config.unit * stated.get(reference, 4)
  if reference in (np.sinh, np.cosh):
    bound = result_unit(config, SINH) + 2 * config.unit * np.cosh(x)
  assert np.all(error <= bound), (error / bound).max()


def test_small_hyperbolic_inverses_keep_their_precision():
  config = WIDE
  x = grid(config, -(2.0**-6), 2.0**-6)
  fn = functools.partial(hyperbolic.atanh, bound=2.0**-5)
  error = np.abs(clear(fn, [x], config, 2.0**-6) - np.arctanh(x))
  assert error.max() <= 2 * result_unit(config, 2.0**-4)


def test_ranges_that_are_refused():
  for fn in (trigonometry.cos, trigonometry.sin, trigonometry.tan):
    with pytest.raises(ValueError, match="whose range is not known; calibrate"):
      build(fn, [(2,)], WIDE)
    with pytest.raises(ValueError, match=r"up to 1e\+06 needs a ring of \d+ bits, but num_bits=64"):
      build(fn, [(2,)], WIDE, 1e6)
  most = 2.0 ** ((64 - 32) // 2 - 4)
  build(trigonometry.cos, [(2,)], WIDE, most)
  build(trigonometry.cos, [(2,)], NARROW, 2.0 ** ((32 - 16) // 2 - 4))


def test_shapes():
  check_shapes(trigonometry.cos)
