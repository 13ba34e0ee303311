"""Reads and writes against JAX's own, at public and at secret positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, check_plan, gates, normal

from primia_jax import mpc
from primia_jax.mpc.gates.elementwise import RELU, SIGN, TRUNCATE

pytestmark = pytest.mark.usefixtures("x64")
ONE, X, TABLE = np.ones((), np.float32), normal(0, 4, 6), normal(1, 7, 3) * 100
SPREAD, TWICE = np.array([1, 3, 5, 7]), np.array([1, 1, 2, 2])


def test_writes_at_public_positions():
  def fn(w, x):
    y, ones = x * w, np.ones((2, 2), np.float32)
    zeros = jnp.zeros((8, 6), np.float32)
    return (
      zeros.at[SPREAD].add(y), zeros.at[TWICE].add(y), (zeros + 1).at[SPREAD].set(y),
      y.at[1].set(x[0] * w), y.at[np.array([0, 2])].set(7.0), y.at[:, 1].add(3.0),
      y.at[1].subtract(x[0] * w), y.at[np.array([0, 9])].add(1.0, mode="drop"),
      y.at[np.array([0, 2])].multiply(x[:2] * w),
      y.at[TWICE].multiply(np.full((4, 6), 3.0, np.float32)),
      jax.ops.segment_sum(y, np.array([0, 1, 1, 2]), 3),
      lax.dynamic_update_slice(y, x[:2, :2] * w, (1, 3)), lax.dynamic_update_slice(y, ones, (1, 3)),
      lax.dynamic_update_slice(np.ones((5, 6), np.float32), y, (1, 0)),
    )  # fmt: skip

  plan = check_plan(fn, (ONE, X), 1e-4)
  assert set(gates(plan)) <= {TRUNCATE}


def test_sums_at_equal_positions_have_room():
  x = np.full((4, 6), 100.0, np.float32)
  fn = lambda w, x: jax.nn.relu(jnp.zeros((1, 6), np.float32).at[np.zeros(4, int)].add(x * w))
  check_plan(fn, (ONE, x), 1e-2)


def test_padding_and_rolling():
  modes = ("edge", "reflect", "symmetric", "wrap", "constant")
  fn = lambda w, x: (
    [jnp.pad(x * w, ((1, 2), (2, 1)), mode=mode) for mode in modes],
    jnp.pad(x * w, 1, constant_values=3.0),
    jnp.roll(x * w, 2, 1),
  )
  check_plan(fn, (ONE, X), 1e-5)


def test_reads_at_secret_positions():
  def fn(w, x):
    y, table = x * w, jnp.asarray(TABLE)
    i = jnp.argmax(y, 1).astype(jnp.int32)
    beyond = (y * 9).astype(jnp.int32)
    zeros = {"mode": "fill", "fill_value": 0}
    return (
      table[i], table[i[0]], jnp.arange(9)[i], jnp.take(table, i, axis=0),
      y[i % 4], y[:, i], jnp.take(y, i[:, None], axis=1, mode="clip"),
      jnp.take(y, i, axis=1, **zeros),
      lax.dynamic_slice(y, (jnp.int32(1), i[1]), (2, 2)),
      lax.dynamic_slice(y, (i[0], jnp.int32(0)), (1, 6)),
      jnp.take(table, beyond, axis=0, mode="clip"), jnp.take(table, abs(beyond), axis=0, **zeros),
    )  # fmt: skip

  check_plan(fn, (ONE, X), 1e-4)


def test_a_private_token_in_the_model_owners_table():
  """The position's one-hot vector is the data owner's alone: one product and no comparison."""
  tokens = np.array([[0, 3, 6], [1, 6, 2]], np.int32)
  plan = check_plan(lambda w, i: (jnp.take(w, i, axis=0), w[i]), (TABLE, tokens), 1e-3)
  assert not {RELU, SIGN} & set(gates(plan))


def test_parties_agree_with_the_integer_model():
  fn = lambda w, x: (x * w).at[1].set(2.0)[jnp.argmax(x[0] * w)]
  args = (ONE, X[:, :3])
  plan = check_plan(fn, args, 3e-5)
  np.testing.assert_array_equal(mpc.infer(plan, *args), mpc.check(plan, args))


def position(w, x):
  return jnp.argmax(x * w, 1).astype(jnp.int32)


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (lambda w, x: (x * w).at[position(w, x)].set(1.0), "scatter at a secret position.*jnp.where"),
    (lambda w, x: jnp.bincount(position(w, x), length=3), "scatter-add at a secret.*one_hot"),
    (
      lambda w, x: lax.dynamic_update_slice_in_dim(x * w, x[:1], position(w, x)[0], 0),
      "dynamic_update_slice at a secret position.*jnp.where",
    ),
    (
      lambda w, x: jnp.take_along_axis(x * w, position(w, x)[:, None], 1),
      "gather at a secret position of several axes.*one_hot",
    ),
    (
      lambda w, x: (x * w)[position(w, x), position(w, x)],
      "gather at a secret position of several axes",
    ),
    (
      lambda w, x: lax.dynamic_slice(x * w, (position(w, x)[0], position(w, x)[1]), (1, 1)),
      "dynamic_slice at a secret position of several axes",
    ),
    (lambda w, x: (x * w).at[TWICE].multiply(x * w), "scatter.mul of secret factors at equal"),
    (lambda w, x: jnp.full((9, 2), np.inf, np.float32)[position(w, x)], "not finite|infinite"),
  ],
)
def test_the_rest_is_refused_by_name(fn, reason):

  with pytest.raises(NotImplementedError, match=reason) as refusal:
    mpc.plan(fn, OWNERS, (ONE, X), mpc.Config(64, 16))
  assert "mpc_indexing_test.py:" in str(refusal.value)
