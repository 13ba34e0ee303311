"""Powers, quotients and logarithms stay within their stated bounds, over the whole legal range and
beyond.
"""

import functools
import math

import jax
import numpy as np
import pytest
from mpc_reference import (
  CONFIGS,
  build,
  check,
  check_both_parties,
  check_scales,
  check_shapes,
  clear,
  each_config,
  each_range,
  result_unit,
  spread,
)

from primia_jax.mpc.circuit import Apply
from primia_jax.mpc.functions import powers


@each_range
@pytest.mark.parametrize("name", ["log", "log1p"])
def test_logarithms(name, config, bounded):
  max_abs = 9.0 if bounded else math.inf
  x = np.abs(spread(config, None if math.isinf(max_abs) else max_abs))
  x = x[x > 0]
  check(getattr(powers, name), [x], getattr(np, name)(x), 2.0, config, max_abs)


@each_range
@pytest.mark.parametrize("name", ["sqrt", "rsqrt", "cbrt", "reciprocal", "power"])
def test_roots_and_reciprocals(name, config, bounded):
  max_abs = 9.0 if bounded else math.inf
  fn, reference, relative = {
    "sqrt": (powers.sqrt, np.sqrt, 0.5),
    "rsqrt": (powers.rsqrt, lambda x: x**-0.5, 0.5),
    "cbrt": (powers.cbrt, np.cbrt, 0.5),
    "reciprocal": (powers.reciprocal, lambda x: 1 / x, 1.0),
    "power": (functools.partial(powers.power, exponent=0.75), lambda x: x**0.75, 1.0),
  }[name]
  x = spread(config, None if math.isinf(max_abs) else max_abs)
  x = x[(x != 0) if name in ("cbrt", "reciprocal") else (x > 0)]
  want = reference(x)
  check(fn, [x], want, 1 + relative * np.abs(want), config, max_abs)


@pytest.mark.parametrize("config", CONFIGS[::3], ids=["64-16", "32-8"])
@pytest.mark.parametrize(
  ("fn", "reference", "relative", "end"),
  [
    (powers.rsqrt, lambda x: x**-0.5, 0.5, 0),
    (powers.reciprocal, lambda x: 1 / x, 1.0, 0),
    (functools.partial(powers.power, exponent=-0.75), lambda x: x**-0.75, 1.0, 0),
    (powers.sqrt, np.sqrt, 0.5, -1),
    (powers.cbrt, np.cbrt, 0.5, -1),
    (powers.log, np.log, 0.0, 0),
  ],
  ids=["rsqrt", "reciprocal", "power", "sqrt", "cbrt", "log"],
)
def test_a_calibrated_result_of_small_numbers(fn, reference, relative, end, config):
  """Numbers in units much finer than u, as after a product, keep them; the result's unit follows
  its range. A result beyond that leaves the range of a gate, which `check` sees.
  """
  shift = config.fraction_bits - 2
  scaled = lambda build, x: build.scaled(x, 2.0**-shift)
  low, top = 2.0 ** (6 - config.fraction_bits), 1.0 - config.unit
  x = np.rint(np.geomspace(low, top, 1536) / config.unit) * config.unit
  want = reference(x * 2.0**-shift)
  bound = 2.0 ** math.ceil(math.log2(np.abs(want).max() * 1.02)) * (1 - 2.0**-6)
  run = lambda x: clear(lambda build, x: fn(build, scaled(build, x), bound=bound), [x], config, 1.0)
  unit = result_unit(config, bound) * (2 if relative == 0 else 1)
  assert np.all(np.abs(run(x) - want) <= unit + relative * config.unit * np.abs(want))
  if end == 0 and relative:
    with pytest.raises(AssertionError, match="truncate"):
      run(np.full(1536, low / 16))


@pytest.mark.parametrize("config", CONFIGS[1:3], ids=["48-12", "40-10"])
def test_outside_of_the_domain(config):
  x = np.array([0.0, -1.0, -(2.0**-config.fraction_bits), -3.7])
  for fn in (powers.sqrt, powers.rsqrt, functools.partial(powers.power, exponent=0.75)):
    assert not np.any(clear(fn, [x], config))
  unit = 2.0**-config.fraction_bits
  np.testing.assert_allclose(clear(powers.log, [x], config), math.log(0.75 * unit), atol=2 * unit)
  zero = np.zeros(1536)
  assert not np.any(clear(powers.reciprocal, [zero], config))
  assert not np.any(clear(powers.divide, [zero + 1, zero], config))


@each_range
def test_divide(config, bounded):
  max_abs = 20.0 if bounded else math.inf
  top = None if math.isinf(max_abs) else max_abs
  a, b = spread(config, top), spread(config, top, seed=1)
  a = np.random.default_rng(2).permutation(a)[: len(b)]
  b = b[: len(a)]
  fits = (b != 0) & (np.abs(a) < 2.0 ** (config.fraction_bits + 1) * np.abs(b))
  a, b = a[fits], b[fits]
  bound = 2 + np.abs(a / b) / 2
  check(powers.divide, [a, b], a / b, bound, config, max_abs)
  positive = functools.partial(powers.divide, positive=True)
  check(positive, [a, np.abs(b)], a / np.abs(b), bound, config, max_abs)


def test_quotients_of_a_calibrated_range():
  """Beyond 2^(f + 1), which is the limit without one; what does not fit the ring is refused."""
  config = CONFIGS[0]
  b = np.rint(np.geomspace(2**-10, 8, 1536) / config.unit) * config.unit
  a = np.full(1536, 1000.0)
  bound = 2.0**20
  fn = functools.partial(powers.divide, bound=bound)
  error = np.abs(clear(fn, [a, b], config, 1023.0) - a / b)
  assert np.all(error <= 2 * result_unit(config, bound) + config.unit * a / b / 2)
  with pytest.raises(
    ValueError, match=r"quotient up to 1.074e\+09 by values up to 1.049e\+06 needs"
  ):
    build(functools.partial(powers.divide, bound=2.0**30), [(2,), (2,)], config, 2.0**20)


@pytest.mark.parametrize("config", CONFIGS[::3], ids=["64-16", "32-8"])
def test_divide_public_numerators_and_shapes(config):
  b = np.random.default_rng(0).uniform(0.5, 5, (3, 1, 2))
  b = np.rint(b * 2**config.fraction_bits) / 2**config.fraction_bits
  unit = 2.0**-config.fraction_bits
  for a in (np.float64(-3.25), np.float64(0.0), np.array([[0.5, -2.0]]), np.full((4, 1), 1.5)):
    got = clear(lambda build, b, a=a: powers.divide(build, a, b), [b], config)
    np.testing.assert_allclose(got, a / b, atol=(2 + 4) * unit)
  a = np.rint(np.random.default_rng(1).normal(size=(3, 5, 2)) / unit) * unit
  np.testing.assert_allclose(clear(powers.divide, [a, b], config), a / b, atol=4 * unit)
  with jax.enable_x64(True):  # the denominator is normalised before it is broadcast
    circuit = build(powers.divide, [a.shape, b.shape], config, 8.0)
  assert (
    max(
      op.gate.num for op in circuit.operations if isinstance(op, Apply) and op.gate.action == "sign"
    )
    <= 6 * 40
  )


@each_config
@pytest.mark.parametrize("exponent", [0, 1, 3, 5, -2])
def test_power(exponent, config):
  x = spread(config, 2.0, low=0.5, num=200)
  tolerance = (
    1 + 2 * np.abs(x) ** max(0, exponent) * abs(exponent) if exponent >= 0 else 1 + 3 * x**-4.0
  )
  fn = functools.partial(powers.power, exponent=exponent)
  check(fn, [x], x**exponent, tolerance, config, 2.0)


def test_shapes():
  check_shapes(powers.log)


@pytest.mark.parametrize(
  ("fn", "reference", "slack"),
  [(powers.log, np.log, 1), (powers.rsqrt, lambda x: x**-0.5, 0)],
  ids=["log", "rsqrt"],
)
def test_scales_that_are_no_powers_of_two(fn, reference, slack):
  check_scales(fn, reference, slack)


@pytest.mark.parametrize(
  "fn", [powers.rsqrt, lambda build, x: powers.divide(build, x, x)], ids=["rsqrt", "divide"]
)
def test_both_parties_get_the_same_bits(fn):
  check_both_parties(fn)
