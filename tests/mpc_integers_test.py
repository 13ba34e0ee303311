"""Whole numbers under encryption are those of their dtype, bit for bit; or they are refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, check_plan

from primia_jax import mpc

pytestmark = pytest.mark.usefixtures("x64")
ONE = np.ones((), np.float32)
NUMBERS = np.arange(-42, 42).reshape(6, 14)
X = (NUMBERS + np.sign(NUMBERS) * 0.25).astype(np.float32)
i32 = jnp.int32


def whole(w, x):
  return (x * w).astype(i32)


def test_quotients():
  by = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 50, 64, -3, -8], np.int32)[None] * np.ones(
    (6, 1), np.int32
  )

  def fn(w, x):
    n = whole(w, x)
    scalars = [f(n, i32(d)) for f in (lax.div, lax.rem, jnp.floor_divide, jnp.mod) for d in (4, -3)]
    return *scalars, lax.div(n, by), lax.rem(n, by), jnp.sign(n), n**2, abs(n), -n

  check_plan(fn, (ONE, X))


def test_bits():
  masks = np.array([0, 1, 2, 3, 5, 6, 12, 13, 31, 64, -1, -2, -32, -37], np.int32)[None]

  def fn(w, x):
    n, other = whole(w, x), whole(w, x[::-1, ::-1]) + 3
    public = [f(n, m) for f in (jnp.bitwise_and, jnp.bitwise_or, jnp.bitwise_xor) for m in (1, -4)]
    return *public, n & masks, n & other, n | other, n ^ other, ~n

  check_plan(fn, (ONE, X))


def test_shifts():
  by = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 30, 31, 32, 33]], np.int32) * np.ones(
    (6, 1), np.int32
  )

  def fn(w, x):
    n = whole(w, x)
    logical = lax.shift_right_logical(n, i32(4)) & 255
    positive = lax.shift_right_logical(abs(n), by)
    return n << 3, n >> 2, n >> by, logical, positive, lax.shift_left(n, by % 5)

  check_plan(fn, (ONE, X))


def test_narrow_dtypes_wrap_around():
  def fn(w, x):
    n = whole(w, x * 3)
    a, b = n.astype(jnp.uint8), jnp.abs(x * w * 6).astype(jnp.uint8)
    small = n.astype(jnp.int8)
    return (
      a, b, a + b, a - b, a * b, -a, ~a, a * jnp.uint8(7), a << 3, a >> 3, a & 15, b // 7, b % 7,
      a.sum(1, dtype=jnp.uint8), a.astype(i32) - b.astype(i32),
      small, small + small, small * small, a.astype(jnp.int8), small.astype(jnp.uint16),
    )  # fmt: skip

  check_plan(fn, (ONE, X))


def test_products_are_exact():
  large = np.arange(14, dtype=np.int32)[None] * 12345 + 100001

  def fn(w, x):
    n = whole(w, x)
    return n * large, n @ n.T, n @ (large % 17).T, n * n - 3 * n + 2

  weights = np.ones((14, 3), np.float32)
  check_plan(lambda w, x: fn(w, x)[:-1], (ONE, X))
  check_plan(
    lambda w, x: whole(w["a"], x) @ w["b"], ({"a": ONE, "b": weights.astype(np.int32) * 99}, X)
  )


def test_whole_numbers_that_a_secret_bit_chooses():
  """They are not rounded as real numbers are, to 2^-f of the largest."""
  first, second = (
    np.arange(14, dtype=np.int32)[None] * 16001 + 100001,
    np.full((1, 14), 7, np.int32),
  )

  def fn(w, x):
    bit = x * w > 0
    chosen = jnp.where(bit, first, 0), jnp.where(bit, second, first), jnp.where(bit, first, -first)
    which = bit.astype(i32) + (x * w > 1).astype(i32)
    cases = lax.select_n(which, *(jnp.broadcast_to(v, x.shape) for v in (second, first, -first)))
    return *chosen, cases, jnp.where(bit, first.astype(np.uint32), 5)

  check_plan(fn, (ONE, X), config=mpc.Config(64, 8))
  large = lambda w, x: jnp.where(x * w > 0, np.arange(14, dtype=np.int32)[None] + 2**30, 0)
  with pytest.raises(ValueError, match=r"select_n at mpc_integers_test.py:\d+.*wider ring"):
    mpc.plan(large, OWNERS, (ONE, X), mpc.Config(31, 8), mpc.calibrate(large, OWNERS, [(ONE, X)]))


def test_an_owners_integers():
  """They enter as whole numbers, however large."""
  x = np.array([[2**23 - 1, -5], [7, 0]], np.int32)
  fn = lambda w, x: (x & 0xFF, x + w, (x * w) // 2, x > w, jnp.where(w > 1, x, 0))
  check_plan(fn, (np.array([3, 1], np.int32)[None], x))


def test_rounding_and_remainders_of_reals():
  x = np.concatenate([X / 8, np.arange(-21, 21).reshape(3, 14) / 2]).astype(np.float32)

  def exact(w, x):
    y = x * w
    return jnp.round(y), lax.round(y), jnp.floor(y), jnp.ceil(y), jnp.trunc(y), y.astype(i32)

  check_plan(exact, (ONE, x))
  check_plan(
    lambda w, x: ((x * w) % 1.0, lax.rem(x * w, np.float32(-0.75)), jnp.round(x * w, 1)),
    (ONE, x),
    1e-6,
  )
  check_plan(lambda w, x: (x * w) % 0.3, (ONE, x + 0.01), 2e-4)


def test_fractions_beside_truth_values_and_counts():
  """A value that counts in whole units is refined before a fraction is added."""

  def fn(w, x):
    bit, count = (x * w > 0).astype(jnp.float32), jnp.argmax(x * w, 1).astype(jnp.float32)
    return (
      bit + 0.25, bit * 0.5 + 0.1, jnp.maximum(bit, 0.4), count > 1.6, count - w / 4,
      bit.mean() + 0.01, jnp.where(count[0] > 0, 1.3, -0.9),
    )  # fmt: skip

  check_plan(fn, (ONE, X), 2e-5)


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (lambda w, x: lax.div(whole(w, x), whole(w, x)), "div by a secret number.*divide reals"),
    (lambda w, x: lax.div(whole(w, x), i32(0)), "div by zero"),
    (lambda w, x: whole(w, x) << whole(w, x), "shift_left by a secret number"),
    (lambda w, x: lax.population_count(whole(w, x)), "population_count.*add up"),
    (lambda w, x: lax.clz(whole(w, x)), "clz.*powers of two"),
    (lambda w, x: jnp.nextafter(x * w, 1.0), "nextafter.*smallest step"),
    (
      lambda w, x: whole(w, x) @ (w * np.full((14, 2), 2.0**20, np.float32)).astype(i32),
      "more than weight_bits=18",
    ),
  ],
)
def test_the_rest_is_refused_by_name(fn, reason):
  with pytest.raises(NotImplementedError, match=reason) as refusal:
    mpc.plan(fn, OWNERS, (ONE, X), mpc.Config(64, 16), mpc.calibrate(fn, OWNERS, [(ONE, X)]))
  assert "mpc_integers_test.py:" in str(refusal.value)


def test_parties_agree_with_the_integer_model():
  args = (ONE, X[:2, :3])
  plan = check_plan(lambda w, x: whole(w, x) & ~whole(w, x[::-1]), args)
  np.testing.assert_array_equal(mpc.infer(plan, *args), mpc.check(plan, args))
