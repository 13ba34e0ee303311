import contextlib
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax import ring

ENCODE, DECODE = jax.jit(ring.encode, static_argnums=1), jax.jit(ring.decode, static_argnums=(1, 2))


@st.composite
def encodings(draw, max_bits=64):
  num_bits = draw(st.integers(2, max_bits))
  return ring.FixedPoint(num_bits, draw(st.integers(0, num_bits - 1)))


def width(fixed):
  """Enables x64 only if the ring needs it."""
  return jax.enable_x64(True) if fixed.num_bits > 32 else contextlib.nullcontext()


def exact(v, fixed):
  """The real numbers that ring elements represent, from Python integers."""
  return [
    Fraction(n - 2**fixed.num_bits if n >= 2 ** (fixed.num_bits - 1) else n, 2**fixed.fraction_bits)
    for n in map(int, np.asarray(v).ravel())
  ]


def legal(fractions, fixed, dtype):
  """Numbers of `dtype` across the whole legal range, including both ends."""
  x = np.array(fractions) * fixed.max_abs
  x = np.append(
    x, [fixed.max_abs, -fixed.max_abs, 0.0, fixed.resolution / 2, -1.5 * fixed.resolution]
  )
  x = x.astype(dtype)
  return x[
    [
      abs(Fraction(float(n))) <= Fraction(2 ** (fixed.num_bits - 1) - 1, 2**fixed.fraction_bits)
      for n in x
    ]
  ]


@settings(deadline=None, max_examples=40)
@given(
  encodings(),
  st.lists(st.floats(-1, 1), min_size=8, max_size=8),  # of one length, as each is compiled
  st.sampled_from([np.float32, np.float64]),
)
def test_round_trip_over_the_whole_legal_range(fixed, fractions, dtype):
  with jax.enable_x64(True):
    x = legal(fractions, fixed, dtype)
    v = ring.encode(jnp.asarray(x), fixed)
    assert v.dtype == ring.storage(fixed.num_bits)
    half, relative = (
      Fraction(1, 2 ** (fixed.fraction_bits + 1)),
      Fraction(float(np.finfo(dtype).eps)) / 2,
    )
    back = np.asarray(ring.decode(v, fixed, dtype))
    for number, element, stands_for, decoded in zip(
      x, np.asarray(v), exact(v, fixed), back, strict=True
    ):
      number = Fraction(float(number))
      assert 0 <= int(element) < 2**fixed.num_bits
      assert abs(stands_for - number) <= half
      assert abs(Fraction(float(decoded)) - number) <= half + abs(stands_for) * relative


@pytest.mark.parametrize("num_bits", range(2, 65))
def test_every_width_rounds_to_nearest_and_wraps_around(num_bits):
  fixed = ring.FixedPoint(num_bits, num_bits // 2)
  with width(fixed):
    top = ring.decode(jnp.asarray([2 ** (num_bits - 1) - 1], ring.storage(num_bits)), fixed)
    assert math.isclose(float(top[0]), fixed.max_abs, rel_tol=2**-23)
    one = ring.encode(
      jnp.asarray([0.0, 1.0, -1.0], jnp.float32) * jnp.float32(fixed.resolution), fixed
    )
    assert [int(n) for n in one] == [0, 1, 2**num_bits - 1]
    assert np.array_equal(
      ring.decode(one, fixed), np.array([0, 1, -1], np.float32) * np.float32(fixed.resolution)
    )
    largest = jnp.asarray([2 ** (num_bits - 1) - 1], ring.storage(num_bits))
    beyond = ring.reduce(
      largest + one[1], num_bits
    )  # one step past the largest number is the smallest
    assert exact(beyond, fixed) == [Fraction(-(2 ** (num_bits - 1)), 2**fixed.fraction_bits)]


@settings(deadline=None, max_examples=40)
@given(encodings(), st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=6))
def test_sums_are_those_of_the_integers_modulo_2_to_the_k(fixed, integers):
  integers = [n % 2**fixed.num_bits for n in integers]
  with width(fixed):
    v = jnp.asarray(np.array(integers, np.uint64).astype(ring.storage(fixed.num_bits)))
    total = ring.reduce(jnp.sum(v, dtype=v.dtype), fixed.num_bits)
    assert int(total) == sum(integers) % 2**fixed.num_bits
    decoded = float(ring.decode(total, fixed))
    assert decoded == float(np.float32(float(exact(total, fixed)[0])))


@settings(deadline=None, max_examples=300)
@given(
  st.floats(1e-6, 1e6)
  | st.integers(-8, 20).map(lambda e: math.nextafter(2.0**e, 0))
  | st.just(2.0**31 / 3),
  st.integers(1, 10_000),
  st.integers(2, 64),
)
def test_fit_never_overflows_and_is_the_finest(max_abs, num_terms, num_bits):
  def largest(f):
    return num_terms * (Fraction(max_abs) * 2**f + Fraction(1, 2))

  if largest(0) >= 2 ** (num_bits - 1):
    with pytest.raises(ValueError, match="num_bits >= ") as error:
      ring.fit(max_abs, num_terms, num_bits)
    enough = int(str(error.value).split("num_bits >= ")[1].split(",")[0])
    assert 2 ** (enough - 1) > largest(0) >= 2 ** (enough - 2)
    assert (enough > 64) == ("scale the numbers down" in str(error.value))
    return
  fixed = ring.fit(max_abs, num_terms, num_bits)
  assert fixed.num_bits == num_bits
  assert largest(fixed.fraction_bits) < 2 ** (num_bits - 1)
  assert fixed.fraction_bits == num_bits - 1 or largest(fixed.fraction_bits + 1) >= 2 ** (
    num_bits - 1
  )


def test_the_fullest_sum_that_fit_allows_is_opened_right():
  max_abs = float(np.float32(2.0**31 / 3 / 2**20))  # as close to overflow as float32 can be
  fixed = ring.fit(max_abs, 3)
  for sign in (1.0, -1.0):
    v = ring.encode(jnp.full(4, sign * max_abs, jnp.float32), fixed)
    np.testing.assert_allclose(ring.decode(v + v + v, fixed), sign * 3 * max_abs, rtol=2**-23)


def test_jit_and_vmap_change_nothing():
  fixed, x = ring.FixedPoint(20, 7), jnp.linspace(-60, 60, 24, dtype=jnp.float32).reshape(4, 6)
  v = ring.encode(x, fixed)
  assert np.array_equal(v, ENCODE(x, fixed))
  assert np.array_equal(v, jax.vmap(lambda row: ring.encode(row, fixed))(x))
  assert np.array_equal(ring.decode(v, fixed), DECODE(v, fixed, jnp.float32))
  np.testing.assert_allclose(ring.decode(v, fixed), x, atol=fixed.resolution / 2)


def test_max_abs_is_never_rounded_up():
  for num_bits in range(2, 65):
    for fraction_bits in {0, num_bits // 2, num_bits - 1}:
      exactly = Fraction(2 ** (num_bits - 1) - 1, 2**fraction_bits)
      max_abs = ring.FixedPoint(num_bits, fraction_bits).max_abs
      assert Fraction(max_abs) <= exactly < Fraction(math.nextafter(max_abs, math.inf))


@pytest.mark.parametrize("arguments", [(1, 0), (65, 3), (32, 32), (32, -1)])
def test_impossible_encodings_are_refused(arguments):
  with pytest.raises(ValueError, match="bits"):
    ring.FixedPoint(*arguments)


@pytest.mark.parametrize("max_abs", [0.0, -1.0, math.nan, math.inf])
def test_fit_wants_positive_finite_numbers(max_abs):
  with pytest.raises(ValueError, match="positive and finite"):
    ring.fit(max_abs, 3)
  with pytest.raises(ValueError, match="positive and finite"):
    ring.fit(1.0, 0)


def test_wide_rings_need_x64():
  assert ring.storage(32) == jnp.uint32
  with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
    ring.storage(33)
  with pytest.raises(ValueError, match="JAX_ENABLE_X64"):
    ring.encode(jnp.ones(1), ring.FixedPoint(33, 8))
  with jax.enable_x64(True):
    assert ring.storage(33) == jnp.uint64


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_other_dtypes_are_refused(dtype):
  with pytest.raises(ValueError, match="float32 or float64"):
    ring.encode(jnp.ones(2, dtype), ring.FixedPoint())
