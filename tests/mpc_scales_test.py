"""Scales, ranges and outputs of whole functions: what is revealed, what fits, how exact it is."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, inference, planning, pricing
from primia_jax.mpc.circuit import Apply, Config

pytestmark = pytest.mark.usefixtures("x64")
WIDE, NARROW = Config(), Config(32, 8, 12)


def plan_of(fn, args, config=WIDE, calibrated=True, owners=OWNERS):
  ranges = planning.calibrate(fn, owners, [args]) if calibrated else None
  return planning.plan(fn, owners, args, config, ranges)


def checked(fn, args, units, config=WIDE, calibrated=True, owners=OWNERS):
  """The plan, if the integer model is within a number of units u of fn in float64."""
  plan = plan_of(fn, args, config, calibrated, owners)
  wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), args)
  with jax.numpy_dtype_promotion("standard"):
    exact = jax.jit(fn)(*wide)
  pairs = zip(jax.tree.leaves(clear.check(plan, args)), jax.tree.leaves(exact), strict=True)
  for i, (got, want) in enumerate(pairs):
    error = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max()
    assert error <= units * config.unit, (i, error / config.unit)
  return plan


def gates(plan):
  return [op.gate.action for op in plan.circuit.operations if isinstance(op, Apply)]


X, W = (
  normal(0, 4, 6),
  {"k": normal(1, 6, 6), "l": normal(2, 6, 6), "a": np.asarray(0.3, np.float32)},
)

# ---- outputs


def revealed(fn, args):
  """The ring elements of fn's outputs as signed numbers, and their scales."""
  plan = plan_of(fn, args)
  elements = clear.compute(plan.circuit, inference.encode(plan, args))
  return [np.asarray(e).astype(np.int64) for e in elements], [v.scale for v in plan.circuit.outputs]


def test_an_output_cannot_be_factored():
  """The product of two secrets, with all its bits, would tell both."""
  (product,), (scale,) = revealed(lambda w, x: (x @ w["k"]) * jax.nn.relu(x @ w["l"]), (W, X))
  factors, _ = revealed(lambda w, x: (x @ w["k"], jax.nn.relu(x @ w["l"])), (W, X))
  first, second = (np.abs(v).reshape(-1).tolist() for v in factors)
  assert scale == WIDE.unit
  found = 0
  for n, a, b in zip(np.abs(product).reshape(-1).tolist(), first, second, strict=True):
    small = np.arange(1, math.isqrt(n) + 1)
    small = small[n % small == 0]
    found += a * b != 0 and bool(np.any((small == min(a, b)) & (n // small == max(a, b))))
  assert found == 0


def test_every_output_is_truncated_unless_it_is_coarse():
  fn = lambda w, x: (x @ w["k"], (x @ w["k"]) / 7, jax.nn.relu(x @ w["k"]), jnp.argmax(x @ w["k"]))
  _, scales = revealed(fn, (W, X))
  assert all(2**-0.51 < scale / WIDE.unit < 2**0.51 for scale in scales[:3])
  assert scales[3] == 1.0


# ---- ranges


@pytest.mark.parametrize(
  "fn", [lambda w, x: (x * w["a"]) ** 2, lambda w, x: ((x * w["a"]) @ (x * w["a"]).T).sum(0)]
)
def test_an_output_beyond_the_ring_is_refused(fn):
  with pytest.raises(ValueError, match=r"mpc_scales_test\.py:\d+: values up to .* need a ring of"):
    plan_of(fn, (W, 1e5 * X))


def test_an_output_that_fits_is_right():
  """The weight's 18 bits decide: the relative error is 2^-17."""
  fn, args = lambda w, x: (x * w["a"]) ** 2, (W, 1e5 * X)
  want = fn(W, args[1].astype(np.float64))
  got = clear.check(plan_of(fn, args, Config(64, 12)), args)
  np.testing.assert_allclose(got, want, rtol=2**-17, atol=want.max() * 1e-7)


def test_what_leaves_the_ring_between_gates_comes_back():
  """Sums and products are exact modulo 2^k: only what meets a gate, or is revealed, must fit."""
  args = W, 2.0**20 * X

  def fn(w, x):
    y = (x * w["a"]) @ (2.0**10 * np.eye(6, dtype=np.float32))  # 2^32, in units of 2^-33
    return y - (x * w["a"]) @ (1023.0 * np.eye(6, dtype=np.float32))

  plan = plan_of(fn, args)
  np.testing.assert_allclose(clear.check(plan, args), 0.3 * args[1], rtol=1e-3, atol=2**8)


def test_sums_count_what_they_add():
  """Ones are the worst case: every sum is as large as its bound."""
  x, w = np.ones((1, 9, 9, 2), np.float32), np.ones((1, 1, 1, 2), np.float32)
  pool = lambda x, window, stride: (
    lax.reduce_window(x, 0.0, lax.add, (1, window, window, 1), (1, stride, stride, 1), "SAME")
    / window**2
  )

  def fn(w, x):
    y = x * w
    pooled = (pool(y, 5, 2), pool(y, 3, 1), jnp.cumsum(y, 1), jnp.cumsum(y, 2), y.sum((1, 2)))
    return tuple(jax.nn.relu(v) for v in pooled)

  checked(fn, (w, x), 1)
  checked(fn, (w, x), 1, NARROW)
  kernel = np.full((3, 3, 1, 2), 0.5, np.float32)
  grouped = lambda w, x: lax.conv_general_dilated(
    x * w,
    kernel.astype(x.dtype),
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=2,
  )
  fn = lambda w, x: (jax.nn.relu(grouped(w, x)), jax.nn.relu((x * w) @ np.ones((2, 3), np.float32)))
  checked(fn, (w, x), 1)
  plan = plan_of(fn, (w, x), owners=("shared", "shared"), calibrated=False)
  assert max(v.max_abs for v in plan.circuit.outputs) == math.inf


def test_sums_and_maxima_of_a_layer_fit_a_full_ring():
  """A layer that fills the ring leaves room for the sums and differences that follow."""
  w, x = np.abs(normal(0, 64, 32)) * 4, np.abs(normal(1, 8, 64)) * 4

  def fn(w, x):
    y, z = x @ w, (-x) @ w
    return y.sum(0), jnp.maximum(z[:4], z[4:]), z.max(1)

  plan = plan_of(fn, (w, x), Config(32, 10, 18))
  for got, want in zip(clear.check(plan, (w, x)), fn(w.astype(np.float64), x), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-3)


# ---- numbers of one party


@pytest.mark.parametrize("owners", [OWNERS, ("data_owner", "model_owner"), ("shared", "shared")])
def test_a_number_scales_and_shifts_what_it_follows(owners):
  """Folded into the layer before it, or a one-sided product."""

  def fn(w, x):
    k, a = w["k"], w["a"]
    y, z = x @ k, x * k[:1]
    return (
      y * a, a * y + a, (y + a) * a, y / a, y - a, a - y,
      x + a * jax.nn.relu(y), x + a * y, jax.nn.relu(z) * a + z, z * a,
      y.sum() * k, y.sum() + k, (y * a).sum() + a, y[0, 0] * a, a * jax.nn.relu(y[0, 0]) + k,
      y[:, :1] * k[:1], y[:, :1] + k[:1],
    )  # fmt: skip

  checked(fn, (W, X), 60, owners=owners)
  checked(fn, (W, X), 60, owners=owners, calibrated=False)


def test_a_scale_costs_no_product():
  fn = lambda w, x: jax.nn.relu((x @ w["k"]) * w["a"] + w["a"])
  kinds = [row.what for row in pricing.rows(plan_of(fn, (W, X)).circuit)]
  assert kinds == ["open", "linear", "relu", "output"]


# ---- public numbers


def test_bits_and_positions_take_fractions():
  def fn(w, x):
    y = x * w["k"][:1]
    bit = (y > 0).astype(x.dtype)
    return (
      bit - 0.5,
      jnp.argmax(y, -1).astype(x.dtype) + 0.25,
      bit + 0.3 * w["k"][:1],
      jnp.where(y > 0, 1.3, 0.3),
    )

  checked(fn, (W, X), 1)


def test_public_factors_do_not_eat_the_ring():
  def fn(w, x):
    y = x * w["k"][:1]
    joined = jnp.concatenate([y, y / 3, y / 7, np.ones((1, 6), np.float32)])
    return joined, y / 3 + y / 7 + y / 11, y - 0.0371 * y * y

  for config, most in ((WIDE, 50), (NARROW, 30)):
    plan = checked(fn, (W, X), 2, config)
    assert max(op.gate.range_bits for op in plan.circuit.operations if isinstance(op, Apply)) < most


def test_tiny_public_factors_give_nothing():
  fn = lambda w, x: (x * w["a"] * 1e-12, 1 + x * w["a"] * 1e-20, jax.nn.relu(x * w["a"] * 1e-30))
  checked(fn, (W, X), 1)
  checked(fn, (W, X), 1, NARROW, calibrated=False)


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (lambda w, x: x * w["a"] + np.inf, "infinite or NaN"),
    (lambda w, x: x * w["a"] * np.nan, "infinite or NaN"),
    (lambda w, x: x * w["a"] / np.zeros((1, 6), np.float32), "infinite or NaN"),
    (lambda w, x: x * w["a"] - 1e18, "need a ring of 78 bits"),
  ],
)
def test_public_numbers_that_fixed_point_cannot_hold_are_refused(fn, reason):
  with pytest.raises((ValueError, NotImplementedError), match=reason) as refusal:
    plan_of(fn, (W, X), calibrated=False)
  assert "mpc_scales_test.py:" in str(refusal.value)


# ---- layers in a row


def layers(activations):
  """A dense layer before each activation, and inputs that reach well below and above zero."""
  w = tuple(normal(i, 8, 8) / np.float32(2.2) for i in range(len(activations)))

  def fn(w, x):
    for v, activation in zip(w, activations, strict=True):
      x = activation(x @ v)
    return x

  return fn, (w, 3 * normal(99, 16, 8))


ACTIVATIONS = {
  "leaky_relu": jax.nn.leaky_relu,
  "maximum": lambda x: jnp.maximum(x, 0.1 * x),
  "hard_swish": jax.nn.hard_swish,
  "gelu": jax.nn.gelu,
}
OTHERS = (
  jax.nn.relu6,
  lambda x: jax.nn.gelu(x, approximate=False),
  jax.nn.silu,
  jax.nn.selu,
  jax.nn.softplus,
  jax.nn.mish,
)


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["64", "32"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_two_layers_with_an_activation(name, config):
  fn, args = layers([ACTIVATIONS[name]] * 2)
  checked(fn, args, 16, config)


@pytest.mark.parametrize("config", [WIDE, NARROW], ids=["64", "32"])
def test_layers_with_other_activations(config):
  fn, args = layers(OTHERS)
  checked(fn, args, 40, config)


@pytest.mark.parametrize(
  ("config", "calibrated"), [(WIDE, True), (WIDE, False), (Config(32, 10, 14), True)]
)
def test_ten_leaky_layers(config, calibrated):
  fn, args = layers([jax.nn.leaky_relu] * 10)
  checked(fn, args, 40, config, calibrated)


class Segmenter(nn.Module):
  """Blocks as in nnU-Net."""

  @nn.compact
  def __call__(self, x):
    for features in (4, 6):
      x = nn.leaky_relu(nn.InstanceNorm()(nn.Conv(features, (3, 3))(x)), 0.01)
    return nn.Conv(2, (1, 1))(x)


@pytest.mark.parametrize("config", [WIDE, Config(32, 10, 12)], ids=["64", "32"])
def test_convolutions_with_instance_norm_and_leaky_relu(config):
  module, x = Segmenter(), normal(0, 2, 8, 8, 1)
  checked(module.apply, (jax.jit(module.init)(jax.random.key(0), x), x), 16, config)
