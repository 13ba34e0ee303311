"""Small whole functions in which something once went wrong: who may know what, ranges, whole
numbers, low contrast.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, check_plan, normal

from primia_jax import mpc
from primia_jax.mpc.sharing import DATA_OWNER

pytestmark = pytest.mark.usefixtures("x64")
X, ONES = normal(0, 4, 6), np.ones((1, 6), np.float32)
SEEDED = np.random.default_rng(0)


def pooled(w, x):
  """Attention pooling: the data owner's own image multiplies what is shared."""
  return jax.nn.softmax(x @ w, axis=0).T @ x


def test_attention_pooling():
  plan = check_plan(pooled, (normal(1, 6, 3), X), 1e-3)
  assert plan.circuit.linear_operands(DATA_OWNER)


@pytest.mark.slow
def test_attention_pooling_by_roles():
  """The roles hold all that they need; `prepare` asks for nobody else's key."""
  args = (normal(1, 6, 3), X)
  plan = mpc.plan(pooled, OWNERS, args, mpc.Config(), mpc.calibrate(pooled, OWNERS, [args]))
  np.testing.assert_array_equal(mpc.infer(plan, *args), mpc.check(plan, args))


def test_exp_over_all_that_was_calibrated():
  """exp(20) is 5e8, and exp(-20) is 2e-9."""
  x = np.linspace(-20, 20, 24, dtype=np.float32).reshape(4, 6)
  fn = lambda w, x: jnp.exp(x * w)
  plan = mpc.plan(fn, OWNERS, (ONES, x), mpc.Config(), mpc.calibrate(fn, OWNERS, [(ONES, x)]))
  got = np.asarray(mpc.check(plan, (ONES, x)), np.float64)
  want = np.exp(x.astype(np.float64))
  assert np.all(np.abs(got - want) <= 2e-4 + 2e-5 * want)


def test_a_bit_of_a_position():
  fn = lambda w, x: (jnp.argmax(x * w, -1) & 1, lax.div(jnp.argmax(x * w, -1), 2))
  x = np.stack([SEEDED.permutation(6) for _ in range(12)]).astype(np.float32)
  check_plan(fn, (ONES, x))


@pytest.mark.parametrize("deviation", [0.001, 0.01])
def test_a_layer_norm_by_hand_of_low_contrast(deviation):
  """At 64 bits, of values around 3."""

  def fn(w, x):
    x = 3 + np.float32(deviation) * x * w
    centred = x - x.mean(-1, keepdims=True)
    return centred * lax.rsqrt((centred**2).mean(-1, keepdims=True) + 1e-6)

  plan = mpc.plan(fn, OWNERS, (ONES, X), mpc.Config(), mpc.calibrate(fn, OWNERS, [(ONES, X)]))
  x = np.float64(np.float32(deviation)) * X
  centred = x - x.mean(-1, keepdims=True)
  want = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(mpc.check(plan, (ONES, X)), want, atol=1e-3)
