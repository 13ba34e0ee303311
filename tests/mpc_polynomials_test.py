"""Products of several values in one message, truncations, and polynomials within their bound."""

import math

import numpy as np
import pytest
from mpc_reference import CONFIGS, build, clear, each_config
from numpy.polynomial import polynomial as reference

from primia_jax.mpc.circuit import Apply, Open
from primia_jax.mpc.functions import polynomials

pytestmark = pytest.mark.usefixtures("x64")


def on_grid(config, shape, seed=0, top=1.0):
  return np.rint(np.random.default_rng(seed).uniform(-top, top, shape) / config.unit) * config.unit


def test_several_values_are_opened_in_one_message():
  def fn(builder, a, b, c):
    a, b, c = polynomials.opened(builder, [a, builder.scaled(b, 1 / 3), c])
    assert (a.shape, b.shape, c.shape) == ((2, 3), (4,), ())
    assert b.scale == builder.config.unit / 3
    return polynomials.product(builder, a, builder.broadcast(c, (2, 3)))

  config = CONFIGS[0]
  circuit = build(fn, [(2, 3), (4,), ()], config)
  assert [op.shape for op in circuit.operations if isinstance(op, Open)] == [(11,)]
  a, b, c = (on_grid(config, shape, i) for i, shape in enumerate([(2, 3), (4,), ()]))
  np.testing.assert_array_equal(
    clear(fn, [a, b, c], config), a * c
  )  # in whole units: nothing is truncated


@each_config
@pytest.mark.parametrize("change", [-2, 0, 3])
def test_a_cut_is_to_the_nearest_and_one_gate(config, change):
  """Products at 2^-2f go to 2^-(f - change); a scale that is coarser already is only multiplied."""
  bits, first, second = (
    config.fraction_bits - change,
    on_grid(config, 50),
    on_grid(config, (3, 4), 1),
  )

  def fn(builder, a, b, which=0):
    values = [polynomials.product(builder, v, v) for v in (a, b)]
    return polynomials.cut(builder, values, bits)[which]

  for which, x in enumerate((first, second)):
    got = clear(lambda *args, i=which: fn(*args, which=i), [first, second], config, 1.0)
    np.testing.assert_array_equal(got, np.floor(x * x * 2.0**bits + 0.5) / 2.0**bits)
  circuit = build(fn, [first.shape, second.shape], config, 1.0)
  assert sum(isinstance(op, Apply) for op in circuit.operations) == 1
  finer = lambda builder, a: polynomials.cut(builder, [a], config.fraction_bits + 2)[0]
  np.testing.assert_array_equal(clear(finer, [first], config, 1.0), first)
  assert not any(isinstance(op, Apply) for op in build(finer, [(3,)], config, 1.0).operations)


@each_config
@pytest.mark.parametrize("degree", [1, 2, 4, 7])
def test_a_polynomial_errs_by_a_unit_for_each_coefficient_at_most(config, degree):
  coefficients = np.random.default_rng(degree).uniform(-1, 1, degree + 1)
  bits, x = polynomials.working_bits(config), on_grid(config, 200, degree)
  fn = lambda builder, x: polynomials.polynomial(builder, x, coefficients, bits)
  error = clear(fn, [x], config, 1.0) - reference.polyval(x, coefficients)
  assert np.abs(error).max() <= (degree + 1) * 2.0**-bits
  circuit = build(fn, [x.shape], config, 1.0)
  levels = math.ceil(math.log2((degree + 2) // 2))
  assert (
    sum(isinstance(op, Apply) for op in circuit.operations) == levels
  )  # x, at 2^-f, is never cut: it is made finer


@pytest.mark.parametrize(("fn", "bits"), [(np.log, 19), (lambda n: 1 / n, 14), (np.sqrt, 20)])
def test_a_fit_has_the_least_degree_that_is_accurate_enough(fn, bits):
  n = np.linspace(0.5, 1, 1001)
  error = lambda c: np.abs(reference.polyval(4 * n - 3, c) - fn(n)).max()
  coefficients = polynomials.fit(fn, bits)
  assert error(coefficients) <= 2.0**-bits * 1.01  # between the points that the fit looked at
  best = np.polynomial.Chebyshev.interpolate(lambda s: fn((s + 3) / 4), len(coefficients) - 2)
  assert np.abs(best(4 * n - 3) - fn(n)).max() > 2.0**-bits
