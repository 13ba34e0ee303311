"""The builder: scales, ranges and openings of a circuit, against the numbers that it stands for."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpc_reference import build, encoded

from primia_jax import ring
from primia_jax.mpc import clear
from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Apply, Config, Local, Open
from primia_jax.mpc.maps import MULTIPLY

CONFIG = Config(32, 8, 12)
SCALES = st.one_of(
  st.integers(-6, 6).map(lambda e: 2.0**e), st.sampled_from([3.0, 1 / 3, 1 / 49, 0.7, 100.0])
)


def made(fn, *arrays, config=CONFIG, max_abs=math.inf):
  """The real numbers of fn(builder, *values)'s Value, in float64, and the circuit."""
  circuit = build(fn, [np.shape(x) for x in arrays], config, max_abs)
  (out,) = clear.compute(circuit, encoded(arrays, config))
  (value,) = circuit.outputs
  assert out.shape == value.shape
  return np.asarray(ring.signed(out, config.num_bits)).astype(np.float64) * value.scale, circuit


def kinds(circuit, kind):
  return [op for op in circuit.operations if isinstance(op, kind)]


def on_grid(seed, *shape):
  return np.random.default_rng(seed).integers(-300, 300, shape) * CONFIG.unit


@pytest.mark.parametrize(
  ("change", "reason"),
  [
    ({"num_bits": 65}, "num_bits=65"),
    ({"num_bits": 7}, "num_bits=7"),
    ({"fraction_bits": 40}, "fraction_bits=40"),
    ({"weight_bits": 30}, "weight_bits=30"),
    ({"comparison": "magic"}, "magic"),
    ({"margin": 0.5}, "margin=0.5"),
  ],
)
def test_a_wrong_configuration_is_refused(change, reason):
  with pytest.raises(ValueError, match=reason):
    Config(**change)


# ---- scales


@given(SCALES, SCALES)
@example(1.0, 1 / 3)
@example(1 / 49, 0.7)
@settings(max_examples=60, deadline=None)
def test_aligned_values_have_one_scale_and_stand_for_the_same(first, second):
  """Exact if their ratio is whole; else off by 2^-(f + 4), and half as many bits finer."""
  builder = Builder(CONFIG)
  a, b = (
    builder.scaled(builder.input(None, lambda env: env, (3,)), factor) for factor in (first, second)
  )
  x, y = builder.align(a, b)
  assert x.scale == y.scale <= min(a.scale, b.scale)
  assert min(a.scale, b.scale) / x.scale <= 2 ** (CONFIG.fraction_bits / 2 + 2)
  factors = []
  for before, after in ((a, x), (b, y)):
    ones = dict.fromkeys((0, 1), jnp.ones(3, jnp.uint32))
    (out,) = clear.compute(builder.circuit([after]), ones)
    factors.append(int(out[0]) * after.scale / before.scale)
    if after.number != before.number:
      assert isinstance(builder.operations[after.number], Local)
  ratio = max(first, second) / min(first, second)
  np.testing.assert_allclose(
    factors, 1, rtol=1e-12 if ratio == round(ratio) else 2.0 ** -(CONFIG.fraction_bits + 4)
  )


def test_any_number_of_values_is_aligned():
  x = on_grid(0, 5)
  factors = (1.0, 1 / 3, -2 / 7, 0.01, 49.0)

  def fn(builder, x):
    values = builder.align(*(builder.scaled(x, factor) for factor in factors))
    assert len({v.scale for v in values}) == 1
    return builder.local(lambda *vs: jnp.stack(vs), *values)

  got, circuit = made(fn, x, max_abs=2.0)
  assert not kinds(circuit, Apply)
  np.testing.assert_allclose(got, np.outer(factors, x), rtol=2.0**-12)


def test_what_leaves_no_room_is_truncated_before_it_is_aligned():
  """The square of x is finer than x by 8 bits and the factor's 17, for which 32 bits do not do."""
  x = on_grid(0, 5)
  fn = lambda builder, x: builder.add(builder.scaled(builder.multiply(x, x), 1e-5), x)
  for max_abs in (2.0, math.inf):
    got, circuit = made(fn, x, max_abs=max_abs)
    assert np.abs(got - (x + 1e-5 * x * x)).max() <= CONFIG.unit
    assert len(kinds(circuit, Apply)) == 1


@given(st.floats(-50, 50, allow_subnormal=False), st.integers(0, 2**31))
@example(0.0, 0)
@example(-1.0, 0)
@example(3.235049161561391e-308, 0)
@settings(max_examples=30, deadline=None)
def test_a_public_factor_is_another_scale_and_costs_nothing(factor, seed):
  x = on_grid(seed, 5)
  got, circuit = made(lambda builder, x: builder.scaled(x, factor), x, max_abs=2.0)
  np.testing.assert_allclose(
    got, x * factor, rtol=1e-15, atol=np.finfo(np.float64).tiny
  )  # subnormals lose digits
  assert len(circuit.operations) == 1 + (factor <= 0)  # a negation, or zeros
  assert circuit.outputs[0].max_abs == 2 * abs(factor)


@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (2, 3, 4)])
def test_a_public_offset_is_off_by_half_a_unit_at_most(shape):
  x, offset = on_grid(0, 3, 4), np.random.default_rng(1).normal(size=shape)
  got, _ = made(lambda builder, x: builder.add_public(x, offset), x)
  assert got.shape == np.broadcast_shapes(x.shape, shape)
  assert np.abs(got - (x + offset)).max() <= CONFIG.unit / 2


def test_a_fraction_is_added_to_whole_numbers():
  x, offset = on_grid(0, 4), np.array([0.3, -0.5, 1.25, 2.0])
  for shift in (0.0, *offset, offset):
    got, _ = made(lambda builder, x, shift=shift: builder.add_public(builder.sign(x), shift), x)
    assert np.abs(got - ((x >= 0) + shift)).max() <= CONFIG.unit / 2


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
def test_public_numbers_are_finite(number):
  builder = Builder(CONFIG)
  x = builder.input(None, lambda env: env, (2,))
  for fn in (builder.add_public, builder.multiply_public):
    for array in (number, np.array([1.0, number])):
      with pytest.raises(ValueError, match="is infinite or NaN"):
        fn(x, array)
  with pytest.raises(ValueError, match=r"values up to 1e\+08 .* need a ring of"):
    builder.add_public(x, 1e8)


@pytest.mark.parametrize("largest", [0.3, 1.0, 5.0])
def test_a_public_array_is_rounded_to_its_largest_element(largest):
  x = on_grid(0, 3, 4)
  array = np.random.default_rng(1).uniform(-1, 1, (3, 4))
  array *= largest / np.abs(array).max()
  got, _ = made(lambda builder, x: builder.multiply_public(x, array), x)
  unit = 2.0 ** (math.ceil(math.log2(largest)) - CONFIG.fraction_bits)
  assert np.all(np.abs(got - x * array) <= np.abs(x) * unit / 2 * (1 + 1e-9))


def test_sums_of_different_scales():
  x, y = on_grid(0, 4), on_grid(1, 4)
  third = lambda builder, x, y: builder.subtract(
    builder.add(builder.scaled(x, 0.5), y), builder.scaled(x, 4.0)
  )
  np.testing.assert_array_equal(made(third, x, y)[0], x / 2 + y - 4 * x)
  with pytest.raises(ValueError, match="align them first"):
    made(lambda builder, x, y: builder.local(lambda a, b: a + b, x, builder.scaled(y, 2.0)), x, y)


def test_what_is_bounded_stays_bounded():
  x, y = on_grid(0, 6), on_grid(1, 6)
  for fn in (
    lambda builder, x, y: builder.add(x, builder.scaled(y, -0.5)),
    lambda builder, x, y: builder.multiply(x, y),
    lambda builder, x, y: builder.maximum(x, builder.negate(y)),
    lambda builder, x, y: builder.relu(builder.multiply(x, y)),
    lambda builder, x, y: builder.sign(builder.subtract(x, y)),
  ):
    got, circuit = made(fn, x, y, max_abs=300 * CONFIG.unit)
    assert np.abs(got).max() <= circuit.outputs[0].max_abs < math.inf


# ---- ranges


@given(st.floats(1e-3, 1e5), st.integers(-20, 8), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_range_bits_hold_the_magnitude_and_no_more(max_abs, exponent, shift):
  builder = Builder(CONFIG)
  value = builder.input(None, lambda env: env, (2,))._replace(scale=2.0**exponent, max_abs=max_abs)
  needed = math.ceil(max_abs / value.scale) + 2**shift
  if needed >= 2**30:
    with pytest.raises(ValueError, match=r"\(top\): .*: values up to .* need a ring of"):
      builder.range_bits(value, shift)
  else:
    bits = builder.range_bits(value, shift)
    assert needed < 2**bits
    assert bits == shift + 1 or needed >= 2 ** (bits - 1)


def test_an_unknown_range_is_the_rings():
  builder = Builder(CONFIG)
  assert builder.range_bits(builder.input(None, lambda env: env, ())) == CONFIG.num_bits - 2


def test_a_range_that_does_not_fit_names_its_layer_and_the_cure():
  builder = Builder(CONFIG)
  builder.layer = "block/dense"
  value = builder.input(None, lambda env: env, (2,), max_abs=2.0**24)
  with pytest.raises(
    ValueError, match=r"block/dense: .* ring of 35 bits, but num_bits=32; use a wider ring"
  ):
    builder.relu(value)


def test_a_value_is_truncated_once_and_only_where_it_is_finer():
  def fn(builder, x):
    product = builder.multiply(x, x)
    assert builder.narrow(x) is x
    first, second = builder.narrow(product), builder.narrow(product)
    assert first is second
    assert first.scale == CONFIG.unit
    assert builder.narrow(product, 3).scale == product.scale * 8
    return first

  x = on_grid(0, 5)
  got, circuit = made(fn, x)
  np.testing.assert_array_equal(got, np.floor(x * x / CONFIG.unit + 0.5) * CONFIG.unit)
  assert [op.gate.shift for op in kinds(circuit, Apply)] == [8, 3]


def test_an_output_is_truncated_and_within_the_ring():
  x = on_grid(0, 5)
  got, circuit = made(lambda builder, x: builder.output(builder.multiply(x, x)), x, max_abs=2.0)
  np.testing.assert_array_equal(got, np.floor(x * x / CONFIG.unit + 0.5) * CONFIG.unit)
  assert circuit.outputs[0].scale == CONFIG.unit
  assert made(lambda builder, x: builder.output(builder.sign(x)), x)[1].outputs[0].scale == 1.0
  builder = Builder(CONFIG)
  value = builder.input(None, lambda env: env, (2,), max_abs=2.0**22)
  with pytest.raises(ValueError, match="need a ring of 33 bits"):
    builder.output(value)


def test_what_is_finer_than_the_ring_is_nothing():
  x = on_grid(0, 5)
  for fn in (Builder.narrow, Builder.relu, Builder.output):
    got, circuit = made(lambda builder, x, fn=fn: fn(builder, builder.scaled(x, 1e-12)), x)
    np.testing.assert_array_equal(got, 0)
    assert not kinds(circuit, Apply)


# ---- openings


def test_what_repeats_elements_is_opened_before_it_does():
  def fn(builder, x, y):
    wide = builder.broadcast(builder.local(lambda v: v[:, None], x), (4, 6))
    return builder.product(wide, builder.broadcast(y, (4, 6)), MULTIPLY)

  x, y = on_grid(0, 4), on_grid(1, 1, 6)
  got, circuit = made(fn, x, y)
  np.testing.assert_array_equal(got, x[:, None] * y)
  assert [op.shape for op in kinds(circuit, Open)] == [(4,), (1, 6)]


def test_what_sums_or_drops_elements_is_opened_afterwards():
  fn = lambda builder, x: builder.multiply(
    *[builder.local(lambda v: v.sum(0, dtype=v.dtype), x)] * 2
  )
  x = on_grid(0, 4, 6)
  got, circuit = made(fn, x)
  np.testing.assert_array_equal(got, x.sum(0) ** 2)
  assert [op.shape for op in kinds(circuit, Open)] == [
    (6,)
  ]  # and once, though it is a factor twice


def test_what_follows_from_masked_values_is_not_opened_again():
  def fn(builder, x):
    square = builder.multiply(x, x)
    mirrored = builder.local(lambda v: v[::-1], x)
    return builder.add(
      square, builder.multiply(mirrored, builder.local(lambda a, b: a + b, x, mirrored))
    )

  x = on_grid(0, 5)
  got, circuit = made(fn, x)
  np.testing.assert_array_equal(got, x * x + x[::-1] * (x + x[::-1]))
  assert len(kinds(circuit, Open)) == 1
