"""Leaky ReLUs as one comparison, in all their spellings; clamps as two at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, planning, pricing
from primia_jax.mpc.circuit import Apply, Config, Linear, Product

pytestmark = pytest.mark.usefixtures("x64")
X, K = normal(0, 4, 6), normal(1, 6, 6)
SLOPES = (0.01, 0.1, 0.2, 0.3, 1 / 5.5, 0.237, 0.0, 1.0, -0.5, 1.7, 2.0, 3.0)


def planned(fn, args, config=Config()):  # noqa: B008
  return planning.plan(fn, OWNERS, args, config, planning.calibrate(fn, OWNERS, [args]))


def costs(plan):
  """The elements of each kind of gate, and the number of products of secrets."""
  elements: dict[str, int] = {}
  for op in plan.circuit.operations:
    if isinstance(op, Apply):
      elements[op.gate.action] = elements.get(op.gate.action, 0) + op.gate.num
  return elements, sum(isinstance(op, Product) for op in plan.circuit.operations)


def above(w, y, a):
  return jnp.where(y >= 0, y, a * y)


SPELLINGS = [
  above,
  lambda w, y, a: jnp.where(y > 0, y, y * a),
  lambda w, y, a: jnp.where(y < 0, a * y, y),
  lambda w, y, a: jnp.where(jnp.greater_equal(0, y), y * a, y),
  lambda w, y, a: jnp.where(jnp.less_equal(0, y), y, a * y),
]


@pytest.mark.parametrize("config", [Config(), Config(32, 8, 12)], ids=["64", "32"])
def test_every_slope_and_spelling(config):
  """|error| <= u max(1, |a|) / 2 for the layer and as much as u / 2 for the output; |y| u / 16 for
  a's rounding.
  """
  slopes = (*SLOPES, *[0.3] * len(SPELLINGS))

  def fn(w, x):
    y = x @ w
    return [above(w, y, a) for a in SLOPES] + [spelling(w, y, 0.3) for spelling in SPELLINGS]

  x = (np.rint(X / config.unit) * config.unit).astype(np.float32)
  k = (np.rint(K * 2**8) / 2**8).astype(np.float32)  # exact in 12 bits
  y = x.astype(np.float64) @ k.astype(np.float64)
  for got, a in zip(clear.check(planned(fn, (k, x), config), (k, x)), slopes, strict=True):
    error = np.abs(np.asarray(got, np.float64) - np.where(y >= 0, y, np.float32(a) * y))
    units = max(1, abs(a)) / 2 + 0.71 + np.abs(y) / 16
    assert np.all(error <= config.unit * units + 2e-7 * np.abs(y)), a


def test_each_is_one_comparison():

  def fn(w, x):
    y = x @ w
    return [spelling(w, y, 0.3) for spelling in SPELLINGS]

  plan = planning.plan(fn, OWNERS, (K, X))
  assert costs(plan) == ({"relu": 5 * X.size, "truncate": (1 + 5) * X.size}, 0)  # y, and outputs
  assert sum(isinstance(op, Linear) for op in plan.circuit.operations) == 1


def test_other_choices_stay_choices():
  others = [
    lambda w, y: jnp.where(y >= 0, 0.3 * y, y),
    lambda w, y: jnp.where(y >= 0.1, y, 0.3 * y),
    lambda w, y: jnp.where(y >= 0, y, 0.3 * w[:1]),
    lambda w, y: jnp.where(y[:, ::-1] >= 0, y, 0.3 * y),
    lambda w, y: (above(w, y, 0.3), y >= 0, 0.3 * y),
  ]
  whole = lambda w, x: [fn(w, x @ w) for fn in others]
  plan = planned(whole, (K, X))
  assert costs(plan)[0]["sign"] >= 3 * X.size  # of y, y - 0.1 and y reversed
  got, want = jax.tree.leaves(clear.check(plan, (K, X))), jax.tree.leaves(whole(K, X))
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=1e-3)


@pytest.mark.parametrize("owners", [OWNERS, ("data_owner", "model_owner"), ("shared", "shared")])
def test_a_secret_slope(owners):
  """One number, or one for each channel; of either party or shared."""
  args = {"k": K, "a": np.asarray(0.25, np.float32), "b": normal(2, 1, 6)}, X

  def fn(w, x):
    y = x @ w["k"]
    return above(w, y, w["a"]), above(w, y, w["b"]), above(w, above(w, y, w["a"]), y)

  for ranges in (planning.calibrate(fn, owners, [args]), None):
    plan = planning.plan(fn, owners, args, Config(), ranges)
    want = jax.jit(fn)(*jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), args))
    for got, expected in zip(clear.check(plan, args), want, strict=True):
      np.testing.assert_allclose(got, expected, atol=3e-4)
    assert "sign" not in costs(plan)[0]


def test_a_slope_and_an_input_of_one_party_cost_nothing():
  fn = lambda w, x: above(w, w, 0.3) * x
  plan = planned(fn, (K[:4], X))
  np.testing.assert_allclose(clear.check(plan, (K[:4], X)), fn(K[:4], X), atol=1e-4)
  assert costs(plan) == ({"truncate": X.size}, 0)


def clamped(w, x):
  return lax.clamp(jnp.float32(0), x @ w, jnp.float32(1.5))


@pytest.mark.parametrize("config", [Config(), Config(32, 8, 12)], ids=["64", "32"])
def test_a_clamp_takes_the_rounds_of_one_comparison(config):
  plan, one = (planned(fn, (K, X), config) for fn in (clamped, lambda w, x: jax.nn.relu(x @ w)))
  rounds = [sum(row.rounds for row in pricing.rows(p.circuit)) for p in (plan, one)]
  assert rounds[0] == rounds[1]
  assert costs(plan)[0]["relu"] == 2 * X.size
  got = np.asarray(clear.check(plan, (K, X)))
  assert (got >= 0).all()
  assert (got == 1.5).any()
  np.testing.assert_allclose(got, clamped(K, X), atol=8 * config.unit)


def test_a_clamp_between_any_public_numbers():
  low, high = np.float32(-0.5), np.linspace(0.25, 2, 24, dtype=np.float32).reshape(4, 6)
  fn = lambda w, x: lax.clamp(jnp.full((4, 6), low), x @ w, jnp.asarray(high))
  got = clear.check(planned(fn, (K, X)), (K, X))
  np.testing.assert_allclose(got, fn(K, X), atol=1e-3)
