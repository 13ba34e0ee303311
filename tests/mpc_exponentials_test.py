"""Exponentials and bounded functions stay within their stated bounds, over the whole legal range
and beyond.
"""

import math

import numpy as np
import pytest
from mpc_reference import check, check_both_parties, check_scales, check_shapes, each_range, spread

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
