"""Inputs within the margin that decide otherwise than the examples did are answered right, and
networks whose pieces the examples took keep their calibrated ranges.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.mpc.lowering import program

pytestmark = pytest.mark.usefixtures("x64")
W = normal(0, 6, 3)
SEEN = np.linspace(-4, 4, 6, dtype=np.float32)[None]
TABLE = np.array([0, 1, 5, 100], np.float32)


def decided(fn, seen, x, w=W):
  """Asserts that what fn makes of x is planned for, where `seen` is the example."""
  plan = mpc.plan(fn, OWNERS, (w, seen), mpc.Config(), mpc.calibrate(fn, OWNERS, [(w, seen)]))
  largest = program.measurer(plan.program)([w, x])
  for e in plan.program.equations:
    for ref in e.outputs:
      assert largest[ref.number] <= plan.bounds[ref.number], (e.name, largest[ref.number])
  return plan


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: jnp.where(x * w[0, 0] / W[0, 0] > 5, 20.0, 0.0) + 0.1 > 1.0,
    lambda w, x: jnp.maximum(x * w[0, 0] / W[0, 0] - 5, 0).sum(-1) > 1,
    lambda w, x: jax.nn.relu((x > 5).astype(jnp.float32) @ jnp.abs(w)) + 0.5 > 2,
    lambda w, x: (jax.nn.relu((x * w[0, 0] > 5).astype(jnp.float32).sum(-1) - 0.5) + 0.1) * 3 > 9,
    lambda w, x: jnp.where(x > 5, x * w[0, 0], 0.0) * 4 + 0.25,
    lambda w, x: jnp.clip(x * w[0, 0] / W[0, 0] - 5, 0, 3).sum(-1) + 0.1,
    lambda w, x: lax.max(x * w[0, 0], x * w[0, 0] * 3 - 40 * jnp.sign(w[0, 0])) + 0.1 > 1,
    lambda w, x: jnp.argmin(x * w[0, 0], -1).astype(jnp.float32) * 2 + 0.1,
    lambda w, x: jnp.floor(x * w[0, 0] / W[0, 0] / 4.5) + 1.1,
    lambda w, x: jnp.asarray(TABLE)[jnp.sum(x * w[0, 0] / W[0, 0] > 5, -1) // 2] + 0.1 > 1,
    lambda w, x: jnp.digitize(x * w[0, 0] / W[0, 0], np.array([5, 6], np.float32)) * 2 - 1 > 0,
    lambda w, x: jnp.log1p(jnp.sum(x * w[0, 0] / W[0, 0] > 5, -1).astype(jnp.float32)) + 0.1,
    lambda w, x: jax.nn.sigmoid(jnp.where(x * w[0, 0] / W[0, 0] > 5, 20.0, -20.0)) * 10 > 3,
    lambda w, x: jnp.exp(jnp.where(x * w[0, 0] / W[0, 0] > 5, 3.0, 0.0)) + x,
  ],
)
def test_what_no_example_decided_so(fn):
  for x in (np.full_like(SEEN, 7), np.float32(-1.8) * SEEN):
    decided(fn, SEEN, x)


def test_a_decision_that_no_example_took_is_answered_right():
  def fn(w, x):
    y = x * w[0, 0] / W[0, 0]
    risk = jnp.where(y > 5, 20.0, 0.0)
    positive = jnp.maximum(y - 5, 0).sum(-1)
    flags = jax.nn.relu((x > 5).astype(jnp.float32) @ jnp.abs(w))
    bounded = jnp.tanh(jnp.where(y > 5, 2.9, 0.5)) + jax.nn.sigmoid(risk / 8)
    return risk + 0.1 > 1, positive > 1, flags > 2, jnp.exp(risk / 7), bounded

  x = np.full_like(SEEN, 7)
  got = mpc.check(decided(fn, SEEN, x), (W, x))
  for a, b in zip(got, fn(W, x), strict=True):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-4)


def test_a_layer_of_truth_values_that_the_examples_took_one_by_one():
  """Together they are beyond twice what each gives."""
  w, eye = np.ones((6, 1), np.float32), 7 * np.eye(6, dtype=np.float32)
  fn = lambda w, x: jax.nn.relu((x > 5).astype(jnp.float32) @ w - 0.9) * 3 > 10
  decided(fn, eye, np.full_like(eye, 7), w)


def test_networks_keep_the_ranges_of_the_examples():
  kernel, dense = normal(1, 3, 3, 1, 4) / 2, normal(2, 36, 8) / 3

  def fn(w, x):
    conv = lambda x, k: lax.conv_general_dilated(
      x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = jax.nn.relu6(conv(x, w[0]))
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
    y = jax.nn.leaky_relu(y - y.mean((1, 2), keepdims=True)).reshape(2, -1) @ w[1]
    y = jnp.nan_to_num(jnp.where(jnp.isnan(y), 0, jax.nn.gelu(y))) + jax.nn.elu(
      y
    ) * jax.nn.softplus(y)
    return jax.nn.softmax(jnp.where(np.arange(8) < 6, y, -jnp.inf)) @ y.T

  images = normal(3, 2, 6, 6, 1)
  examples, room = mpc.calibrate(fn, OWNERS, [((kernel, dense), images)])
  np.testing.assert_array_equal(room, examples)


def test_where_the_ring_has_no_room_a_warning_names_the_line():
  fn = lambda w, x: jnp.where(x * w[0, 0] > 50, 1e6, 0.0) + x
  ranges = mpc.calibrate(fn, OWNERS, [(W, SEEN)])
  with pytest.warns(UserWarning, match=r"no room.* select_n at mpc_truths_test.py:\d+.*examples"):
    plan = mpc.plan(fn, OWNERS, (W, SEEN), mpc.Config(32, 12), ranges)
  np.testing.assert_allclose(mpc.check(plan, (W, SEEN)), SEEN, atol=1e-3)
  with warnings.catch_warnings(action="error"):
    mpc.plan(fn, OWNERS, (W, SEEN), mpc.Config(64, 16), ranges)


def test_only_what_is_below_its_own_maximum_has_an_exponential_below_one():
  """As in a softmax, and neither below a public value's nor below less than its own."""
  far = np.float32([[3.0, -1.0, 0.5, 2.0, -4.0, 1.0]])
  truth = lambda w, x: (x * w[0, 0] / W[0, 0] > 5).astype(jnp.float32)
  decided(lambda w, x: jnp.exp(far - truth(w, x).max()) + 0.1, SEEN, SEEN * 2)

  def least(w, x):
    v = truth(w, x) * 3
    return jnp.exp(v - jnp.minimum(v.max(), 0.0)) + 0.1

  decided(least, SEEN, SEEN * 2)
