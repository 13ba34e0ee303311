"""Rounding against NumPy and Python's integers, jumps and all scales included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpc_reference import CONFIGS, clear

from primia_jax.mpc.circuit import Config
from primia_jax.mpc.functions import rounding


def joined(*fns):
  """Several functions of one argument in one circuit."""
  return lambda build, x: build.local(
    lambda *vs: jnp.stack(vs),
    *(build.align(f(build, x), build.scaled(x, 0.0)._replace(scale=1.0))[0] for f in fns),
  )


def away(x):
  return np.sign(x) * np.floor(np.abs(x) + 0.5)


FUNCTIONS = {
  "floor": (rounding.floor, np.floor),
  "ceil": (rounding.ceil, np.ceil),
  "trunc": (rounding.trunc, np.trunc),
  "nearest": (rounding.nearest, lambda x: np.floor(x + 0.5)),
  "nearest_even": (rounding.nearest_even, np.rint),
  "nearest_away": (rounding.nearest_away, away),
}


@pytest.mark.parametrize("config", [CONFIGS[0], Config(32, 8, exact=False)])
def test_rounding(config):
  unit = 2.0**-config.fraction_bits
  x = np.concatenate([np.arange(-8, 9) / 2, np.arange(-3, 4) + unit, np.arange(-3, 4) - unit])
  x = np.concatenate([x, np.random.default_rng(0).uniform(-30, 30, 50) // unit * unit])
  fns, references = zip(*FUNCTIONS.values(), strict=True)
  np.testing.assert_array_equal(
    clear(joined(*fns), [x], config, 32.0), np.stack([f(x) for f in references])
  )
  third = lambda build, x: joined(*fns)(build, build.scaled(x, 1 / 3))
  whole = np.arange(-40, 41)[None] / 2
  np.testing.assert_array_equal(
    clear(third, [whole], config, 32.0), np.stack([f(whole / 3) for f in references])
  )


def test_quotients_by_public_steps():
  x = np.arange(-700, 701)[:, None] * np.ones(3)
  step = np.array([3.0, 7.0, 64.0])
  fns = [lambda b, x, f=f: f(b, x, step) for f in (rounding.floor, rounding.ceil, rounding.trunc)]
  np.testing.assert_array_equal(
    clear(joined(*fns), [x], CONFIGS[0], 1000.0),
    np.stack([f(x / step) for f in (np.floor, np.ceil, np.trunc)]),
  )


def test_shifts_of_whole_numbers():
  x = np.array([-1000, -17, -1, 0, 1, 16, 255, 1023])
  fn = lambda build, x: rounding.shifted(build, rounding.nearest(build, x), [0, 3, 10, 12])
  got = clear(fn, [x], CONFIGS[0], 1024.0)
  np.testing.assert_array_equal(got, np.stack([x >> s for s in (0, 3, 10, 12)]))


def test_what_is_refused():
  with jax.enable_x64(True):
    with pytest.raises(ValueError, match="calibrate"):
      clear(lambda b, x: rounding.floor(b, x, 3.0), [np.ones(2)], CONFIGS[0])
    with pytest.raises(ValueError, match="not above 0"):
      clear(lambda b, x: rounding.floor(b, x, 0.0), [np.ones(2)], CONFIGS[0])
