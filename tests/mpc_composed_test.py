"""Operations that rules compose of others: products, any, all, cumulative operations, sorting,
choices among several, look-ups among public knots.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, check_plan, gates, normal

from primia_jax import mpc
from primia_jax.mpc.gates.elementwise import SIGN

pytestmark = pytest.mark.usefixtures("x64")
ONE, X = np.ones((), np.float32), normal(0, 4, 6)
KNOTS, HEIGHTS = np.array([[-1.0, 0, 0.5, 1], [1, -2, 4, 3]], np.float32)
GRID = (np.arange(-8, 16, dtype=np.float32) / 4).reshape(4, 6)  # meets every knot


def test_reductions_and_cumulative_operations():
  def fn(w, x):
    y = x * w
    n = (y * 10).astype(jnp.int32)
    return (
      jnp.prod(y, 1), jnp.prod(y[:2]), jnp.prod(n, 0), jnp.cumprod(y, 1), lax.cummax(y, 1),
      lax.cummin(y, 0, reverse=True),
      jnp.any(y > 1, 1), jnp.all(y > -1, 1), jnp.any(y > 1), jnp.all(y > -9),
      lax.reduce_xor(y > 0, (1,)),
      lax.reduce_and(n, (1,)), lax.reduce_or(n, (0,)), lax.reduce_xor(n, (0, 1)),
      lax.reduce_window(y, np.float32(np.inf), lax.min, (2, 2), (1, 2), "SAME"),
    )  # fmt: skip

  check_plan(fn, (ONE, X), 1e-4)


def test_calibration_sees_the_parts_of_a_product():
  """Bounds of the factors alone would ask for hundreds of bits."""
  x = 2 ** np.random.default_rng(0).uniform(-3, 3, (2, 20)).astype(np.float32)
  check_plan(lambda w, x: jnp.prod(x * w, 1), (ONE, np.concatenate([x, 1 / x], 1)), 1e-3)


def test_sorting():
  """Six numbers by all pairs, 24 by the network, with many ties."""
  other = normal(1, 24)

  def fn(w, x):
    y = x * w
    row = y.reshape(-1)
    return (
      jnp.sort(y, 1), jnp.sort(y, 0, descending=True), jnp.argsort(y, 1),
      jnp.argsort(y, 1, descending=True),
      *lax.top_k(y, 2), jnp.median(y, 1), jnp.quantile(row, 0.3),
      lax.sort((row, jnp.asarray(other), x.reshape(-1) * w), num_keys=1),
      lax.sort((jnp.asarray(X), y), num_keys=1),
      lax.sort((y[0], x[1] * w)),
    )  # fmt: skip

  check_plan(fn, (ONE, np.round(X * 2) / 2), 1e-5)


def test_choices_among_several():
  which = np.arange(24).reshape(4, 6) % 3

  def fn(w, x):
    y, ones = x * w, np.ones((4, 6), np.float32)
    count = (jnp.abs(y) * 2).astype(jnp.int32)
    return (
      lax.select_n(count % 3, y, 2 * y, ones), lax.select_n(which, y, ones, 3 * y),
      lax.select_n(count % 2, ones, y), jnp.select([y > 1, y > 0], [y, ones], -y),
      jnp.where(np.ones((4, 6), bool), y, np.float32(np.nan)),
      lax.select_n(which, ones, 2 * ones, y),
    )  # fmt: skip

  check_plan(fn, (ONE, X), 3e-5)


def test_look_ups_among_public_knots():
  def exact(w, x):
    y = x * w
    sides = [jnp.searchsorted(KNOTS, y, side=side) for side in ("left", "right")]
    return (
      *sides,
      jnp.digitize(y, KNOTS),
      jnp.digitize(y, KNOTS[::-1]),
      jnp.searchsorted(KNOTS, y[0, 0]),
      jnp.searchsorted(KNOTS[[1, 0, 3, 2]], y),  # not in order, as JAX searches it
    )

  assert set(gates(check_plan(exact, (ONE, GRID)))) == {SIGN}
  lines = lambda w, x: (
    jnp.interp(x * w, KNOTS, HEIGHTS),
    jnp.interp(x * w, KNOTS, HEIGHTS, left=7.0, right=9.0),
    jnp.interp(x * w, KNOTS, HEIGHTS, left="extrapolate", right="extrapolate"),
  )
  check_plan(lines, (ONE, GRID), 3e-5)
  window = lambda w, x: jnp.interp(x * w, np.float32([-160, 240]), np.float32([0, 1]))
  check_plan(window, (ONE, GRID * 500), 2e-5)


def test_comparisons_with_infinity():
  bound = np.array([[-np.inf, np.inf, 0.5, np.nan, 0, -1]], np.float32)

  def fn(w, x):
    y = x * w
    each = [f(y, bound) for f in (lax.lt, lax.le, lax.gt, lax.ge, lax.eq, lax.ne)]
    low = np.where(np.isfinite(bound), bound, -np.float32(np.inf))
    return each, bound < y, y > -jnp.inf, y == jnp.inf, jnp.maximum(y, low)

  check_plan(fn, (ONE, X[:1]), 1e-5)


@pytest.mark.parametrize(
  ("fn", "error", "reason"),
  [
    (lambda w, x: jnp.lexsort((x[0] * w, x[1] * w)), NotImplementedError, "sort by 2 keys"),
    (
      lambda w, x: lax.cumlogsumexp(x * w),
      NotImplementedError,
      "cumlogsumexp of a secret value.*exp",
    ),
    (
      lambda w, x: jnp.maximum(x * w, np.inf),
      NotImplementedError,
      r"max of a secret value and an inf",
    ),
    (lambda w, x: lax.erf_inv(x * w), NotImplementedError, "erf_inv of a secret.*knots"),
    (
      lambda w, x: jax.nn.relu((x * w) + np.float32(1e15)),
      ValueError,
      r"(add|mul) at mpc_composed_test.py:\d+: values up to",
    ),
  ],
)
def test_the_rest_is_refused_by_name(fn, error, reason):
  ranges = mpc.calibrate(fn, OWNERS, [(ONE, X)]) if error is ValueError else None
  with pytest.raises(error, match=reason) as refusal:
    mpc.plan(fn, OWNERS, (ONE, X), mpc.Config(64, 16), ranges)
  assert "mpc_composed_test.py:" in str(refusal.value)
