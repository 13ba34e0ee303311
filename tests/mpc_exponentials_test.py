"""Exponentials and bounded functions stay within their stated bounds, over the whole legal range
and beyond.
"""

import functools
import math

import numpy as np
import pytest
from mpc_reference import (
  CONFIGS,
  check,
  check_both_parties,
  check_scales,
  check_shapes,
  clear,
  each_range,
  result_unit,
  spread,
)

from primia_jax.mpc.functions import exponentials


@each_range
@pytest.mark.parametrize("name", ["logistic", "tanh", "erf", "erfc"])
def test_bounded(name, config, bounded):
  max_abs = 3.0 if bounded else math.inf
  reference = {
    "logistic": lambda x: 1 / (1 + np.exp(-np.clip(x, -700, 700))),
    "tanh": np.tanh,
    "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc),
  }[name]
  x = spread(config, min(max_abs, 2.0 ** (config.num_bits - 2 * config.fraction_bits - 4)))
  check(getattr(exponentials, name), [x], reference(x), 1.0, config, max_abs)


@each_range
@pytest.mark.parametrize("name", ["exp", "exp2", "expm1"])
def test_exponentials(name, config, bounded):
  max_abs = 4.0 if bounded else math.inf
  most = 2.0 ** (config.num_bits - 2 * config.fraction_bits - 6)
  x = spread(config, None if math.isinf(max_abs) else max_abs)
  want = np.minimum(
    np.exp2(np.minimum(x, 50) if name == "exp2" else np.minimum(x, 50) / math.log(2)), most
  )
  got = check(
    getattr(exponentials, name), [x], want - (name == "expm1"), 1 + 2 * want, config, max_abs
  )
  if name != "expm1":
    assert not np.any(got[x < -2.0 * config.fraction_bits])


@pytest.mark.parametrize("config", CONFIGS[::3], ids=["64-16", "32-8"])
@pytest.mark.parametrize("octave", [30, 3, -4])
def test_a_calibrated_result_of_any_size(octave, config):
  """Its unit follows its range; a result beyond leaves the range of a gate, which `check` sees."""
  bound = 2.0**octave * (1 - 2.0**-6)
  unit = result_unit(config, bound)
  lowest = math.log2(unit) - 4
  x = np.linspace(lowest, math.log2(bound), 1536)
  x = np.floor(x / config.unit) * config.unit
  max_abs, fn = float(np.abs(x).max()), functools.partial(exponentials.exp2, bound=bound)
  error = np.abs(clear(fn, [x], config, max_abs) - np.exp2(x))
  assert np.all(error <= unit + 2 * config.unit * np.exp2(x))
  with pytest.raises(AssertionError, match="truncate"):
    clear(fn, [np.full(1536, math.log2(bound) + 2)], config, 2 * max_abs + 4)


@pytest.mark.parametrize("config", CONFIGS[::3], ids=["64-16", "32-8"])
@pytest.mark.parametrize("base", [10.0, 0.3, np.geomspace(0.2, 5, 1536)], ids=["10", "0.3", "many"])
def test_powers_of_public_numbers(base, config):
  x = np.rint(np.linspace(-3, 3, 1536) / config.unit) * config.unit
  want, bound = np.asarray(base) ** x, 1023.0 if np.ndim(base) == 0 else 127.0
  fn = lambda build, x: exponentials.power_of(build, base, x, bound)
  error = np.abs(clear(fn, [x], config, 3.0) - want)
  assert np.all(error <= result_unit(config, bound) + 3 * config.unit * want)


@pytest.mark.parametrize("fn", [exponentials.exp, exponentials.tanh])
def test_shapes(fn):
  check_shapes(fn)


@pytest.mark.parametrize(
  ("fn", "reference"), [(exponentials.exp, np.exp), (exponentials.tanh, np.tanh)]
)
def test_scales_that_are_no_powers_of_two(fn, reference):
  check_scales(fn, reference)


def test_both_parties_get_the_same_bits():
  check_both_parties(exponentials.logistic)
