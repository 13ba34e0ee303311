"""Every supported primitive on the integer model against the function itself; every refusal."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, planning, pricing
from primia_jax.mpc.circuit import Config

pytestmark = pytest.mark.usefixtures("x64")
CONFIG = Config(64, 16, 20)


def checked(fn, args, owners=OWNERS, atol=2e-3, config=CONFIG):
  plan = planning.plan(fn, owners, args, config, planning.calibrate(fn, owners, [args]))
  for got, want in zip(
    jax.tree.leaves(clear.check(plan, args)), jax.tree.leaves(jax.jit(fn)(*args)), strict=True
  ):
    assert got.dtype.kind == want.dtype.kind
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), atol=atol)
  return plan


IMAGE, KERNEL = normal(0, 2, 7, 6, 4), normal(1, 3, 3, 4, 6)
NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.mark.parametrize(
  "options",
  [
    {"window_strides": (2, 1), "padding": ((1, 2), (0, 1))},
    {"window_strides": (1, 1), "padding": "SAME", "rhs_dilation": (2, 2)},
    {"window_strides": (1, 1), "padding": ((2, 2), (2, 2)), "lhs_dilation": (2, 2)},
    {"window_strides": (1, 2), "padding": "VALID", "feature_group_count": 2},
  ],
)
def test_convolutions(options):
  kernel = KERNEL[:, :, :2] if "feature_group_count" in options else KERNEL
  conv = lambda w, x: lax.conv_general_dilated(x, w, dimension_numbers=NHWC, **options)
  checked(conv, (kernel, IMAGE))


def test_other_layouts_of_a_convolution():
  conv = lambda w, x: lax.conv(x, w, (1, 1), "SAME")
  checked(conv, (KERNEL.transpose(3, 2, 0, 1), IMAGE.transpose(0, 3, 1, 2)))


A, B = normal(2, 3, 4), normal(3, 5, 4)


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: x @ w.T,
    lambda w, x: w @ x.T,
    lambda w, x: jnp.einsum("ik,jk->ij", w, x),
    lambda w, x: jnp.einsum("k,jk->j", w[0], x),
    lambda w, x: (x @ w.T) * w[:, 0][None] + w[:, 1][None],  # folded
    lambda w, x: (w @ x.T) * w[:, :1] - w[:, 1:2],  # folded, the weight on the left
    lambda w, x: (x @ w.T).reshape(1, 5, 3) * w[:, 0][None, None],
    lambda w, x: (x @ w.T) * x[:, :1] + x[:, :1],  # a product of secrets
    lambda w, x: x @ x.T,
    lambda w, x: jnp.einsum("ik,jk->ij", x * w[:1], x),
    lambda w, x: x @ np.eye(4, 2, dtype=np.float32),
    lambda w, x: x * w[:1] + w[:1] - x / 3 + (x - 1) * np.arange(4, dtype=np.float32)[None],
  ],
)
@pytest.mark.parametrize("owners", [OWNERS, ("data_owner", "model_owner"), ("shared", "shared")])
def test_products(fn, owners):
  checked(fn, (A, B), owners)


X = normal(4, 4, 6)


@pytest.mark.parametrize(
  "fn",
  [
    lambda x: x.reshape(2, 12).T[:, ::-1],
    lambda x: x[1:3, ::2],
    lambda x: x[np.array([0, 2, 2])],
    lambda x: jnp.take(x, np.array([3, 0]), axis=1, mode="clip"),
    lambda x: lax.dynamic_slice(x, (1, 2), (2, 3)),
    lambda x: jnp.concatenate([x, 2 * x[:1], np.ones((1, 6), np.float32)]),
    lambda x: jnp.pad(x, ((0, 1), (2, 0)), constant_values=0.5),
    lambda x: lax.pad(x, np.float32(0), ((0, 0, 1), (-1, 2, 0))),
    lambda x: x.sum(1) + x.mean(0)[:4],
    lambda x: jnp.cumsum(x, 0),
    lambda x: jnp.split(x, 2)[1],
    lambda x: jnp.stack([x, -x]).var((0, 2)),
    lambda x: jnp.where(np.arange(6)[None] % 2 == 0, x, 0.25),
    lambda x: jnp.tile(x, (2, 1)).squeeze(),
    lambda x: lax.reduce_window(x, 0.0, lax.add, (2, 2), (1, 2), "SAME"),
  ],
)
def test_structure(fn):
  checked(fn, (X,), ("data_owner",))
  plan = checked(lambda w, x: fn(x * w), (np.float32(1), X))
  assert all(
    row.what in ("open", "linear", "truncate", "product", "output")
    for row in pricing.rows(plan.circuit)
  )


@pytest.mark.parametrize(
  "fn",
  [
    jax.nn.relu,
    jax.nn.leaky_relu,
    jax.nn.relu6,
    jnp.abs,
    jnp.sign,
    lambda x: jnp.clip(x, -0.5, 1.0),
    lambda x: jnp.maximum(x, x[::-1]),
    lambda x: jnp.minimum(x, 0.3),
    lambda x: jnp.maximum(x[:, :1], x),
    lambda x: jnp.where(x > 0.1, x, -2 * x),
    lambda x: jnp.where(x >= x[:, ::-1], 1.0, -1.0),
    lambda x: (x < 0.5) & (x > -0.5) | ~(x <= 1.5),
    lambda x: x.max(1) - x.min(0)[:4],
    lambda x: jnp.argmax(x, 1),
    lambda x: jnp.argmin(x, 0),
    lambda x: x**3 - x**2,
    jnp.square,
    lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (3, 3), (2, 2), "SAME"),
    lambda x: lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"),
  ],
)
def test_comparisons_and_choices(fn):
  checked(lambda w, x: fn(x * w), (np.float32(1), X))


def test_comparisons_of_equals():
  x = np.array([[0.5, 0.5, 1.0]], np.float32)
  fn = lambda w, x: (
    x * w == 0.5,
    x * w != x * w,
    x * w == x * w,
    jnp.isnan(x * w),
    jnp.isfinite(x * w),
  )
  checked(fn, (np.float32(1), x))


@pytest.mark.parametrize(
  ("fn", "atol"),
  [
    (jax.nn.sigmoid, 1e-3),
    (jnp.tanh, 1e-3),
    (jax.nn.softplus, 2e-3),
    (jax.nn.elu, 2e-3),
    (jax.nn.gelu, 2e-3),
    (lambda x: jax.nn.gelu(x, approximate=False), 2e-3),
    (jax.nn.silu, 2e-3),
    (lambda x: jax.nn.softmax(x, axis=-1), 2e-3),
    (lambda x: jax.nn.log_softmax(x, axis=-1), 3e-3),
    (jnp.exp, 5e-3),
    (lambda x: jnp.log(jnp.abs(x) + 0.1), 3e-3),
    (lambda x: jnp.sqrt(jnp.abs(x)), 5e-3),
    (lambda x: lax.rsqrt(jnp.abs(x) + 0.1), 3e-3),
    (lambda x: 1 / (jnp.abs(x) + 0.5), 2e-3),
    (lambda x: x / (2 + x[::-1] ** 2), 2e-3),
    (jnp.sin, 1e-4),
    (lambda x: jnp.tan(x / 3), 1e-4),
    (jnp.arctan, 1e-4),
    (lambda x: jnp.sinh(x) - jnp.cosh(x) + jnp.arcsinh(x) * jnp.arctanh(x / 4), 1e-3),
    (lambda x: jnp.arccosh(1 + jnp.abs(x)), 1e-4),
    (lambda x: 2.0**x + jnp.power(np.geomspace(0.1, 5, 6).astype(np.float32)[None], x), 1e-3),
  ],
)
def test_smooth_functions(fn, atol):
  checked(lambda w, x: fn(x * w), (np.float32(1), X), atol=atol)


# ---- calls and control flow


def test_calls_and_control_flow_are_walked():
  @jax.jit
  def inner(x):
    return jax.nn.relu(x) * 2

  @jax.custom_vjp
  def custom(x):
    return inner(x) + 1

  custom.defvjp(lambda x: (custom(x), None), lambda _, g: (g,))

  def fn(w, x, public):
    x = jax.checkpoint(custom)(x @ w)
    x, ys = lax.scan(lambda c, y: (c + y, c * 0.5), x[0], x, length=5)
    x = lax.fori_loop(0, 3, lambda i, v: v + i, x)
    return lax.cond(public > 0, lambda v: v + 1, lambda v: v - 1, x), ys

  checked(fn, (normal(0, 4, 3), B, np.float32(1)), (*OWNERS, "public"))


def test_what_depends_on_one_party_is_computed_there_in_floating_point():
  fn = lambda w, x: jnp.sort(jnp.abs(jnp.fft.rfft(w))) @ jnp.sort(x)
  plan = checked(fn, (normal(0, 8), normal(1, 5)))
  assert [row.what for row in pricing.rows(plan.circuit)] == [
    "open",
    "linear",
    "truncate",
    "output",
  ]


def test_a_batch_norm_is_folded():
  def fn(w, x):
    kernel, mean, var, scale = w
    y = lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)
    return jax.nn.relu((y - mean) * (lax.rsqrt(var + 1e-5) * scale) + mean)

  channels = lambda seed: normal(seed, 1, 1, 1, 6)
  plan = checked(fn, ((KERNEL, channels(0), np.abs(channels(1)) + 0.5, channels(2)), IMAGE))
  assert [row.what for row in pricing.rows(plan.circuit)] == ["open", "linear", "relu", "output"]


def test_pooling_comes_before_a_relu():
  pool = lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  fn = lambda w, x: pool(jax.nn.relu(x * w))
  rows = pricing.rows(checked(fn, (normal(5, 1, 1, 1, 4), IMAGE)).circuit)
  assert [(row.what, row.shape) for row in rows if row.rounds > 1] == [
    ("max", (2, 3, 6, 4)),
    ("max", (2, 3, 3, 4)),
    ("relu", (2, 3, 3, 4)),
  ]


def test_a_relu_that_is_needed_as_it_is_is_computed_once():
  def fn(w, x):
    y = jax.nn.relu(x * w)
    return jnp.maximum(y[:, :3], y[:, 3:]), y

  rows = pricing.rows(checked(fn, (np.float32(1), X)).circuit)
  assert [row.what for row in rows].count("relu") == 1


def test_what_repeats_elements_is_opened_before_it_does():
  """Patches repeat an image nine times, but the image is what is sent."""

  def fn(w, x):
    y = jax.nn.relu(x * w[0])
    y = jnp.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = jnp.concatenate([y[:, i : i + 7, j : j + 6] for i in range(3) for j in range(3)], -1)
    return patches @ w[1]

  plan = checked(fn, ((normal(5, 1, 1, 1, 4), normal(6, 36, 2)), IMAGE))
  assert [row.shape for row in pricing.rows(plan.circuit) if row.what == "open"] == [
    IMAGE.shape,
    IMAGE.shape,
  ]


def test_convolutions_whose_kernel_is_no_other_partys():
  """Either operand may be secret; only a public image has no protocol."""
  conv = lambda w, x: lax.conv_general_dilated(w, x, (1, 1), "SAME", dimension_numbers=NHWC)
  checked(conv, (IMAGE, KERNEL))
  checked(lambda w, x: conv(w, jnp.abs(x * w[0, 0, 0, 0])), (IMAGE, KERNEL), atol=1e-2)
  checked(conv, (IMAGE, KERNEL), ("shared", "data_owner"))


def test_truth_is_being_other_than_zero():
  x = np.array([[0.0, 0.25, 3.0], [-0.3, 0.0, 1.0]], np.float32)
  fn = lambda w, x: (
    (w * x).astype(bool),
    jnp.argmax(w * x, 1).astype(bool),
    jnp.where((w * x).astype(bool), x, 7.0),
  )
  checked(fn, (np.float32(1), x))


def test_a_gather_out_of_bounds_fills_with_zeros_only():
  take = lambda w, x, **options: jnp.take(x * w, np.array([1, 9]), axis=0, **options)
  checked(functools.partial(take, mode="fill", fill_value=0), (np.float32(1), X))
  checked(functools.partial(take, mode="clip"), (np.float32(1), X))


def test_a_barrier_has_as_many_results_as_arguments():
  """Shared values, a party's own, and public ones."""

  def fn(w, x):
    y, z, own, public = lax.optimization_barrier((x * w, x + w, x, jnp.ones((1, 3)) * 2))
    return y * z + own, jnp.where(public > 1, y, z), lax.optimization_barrier(y)

  checked(fn, (np.float32(0.5), normal(7, 2, 3)))


# ---- refusals


def pooled(x, **options):
  return lax.reduce_window(x, -np.inf, lax.max, (2, 2), (1, 1), "VALID", **options)


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (
      lambda w, x: jnp.arccos(x @ w),
      r"acos of a secret value has no protocol \(at "
      r"mpc_lowering_test.py:\d+",
    ),
    (lambda w, x: jnp.take(x @ w, np.array([7]), axis=0), "gather out of bounds"),
    (
      lambda w, x: jnp.take(x @ w, np.array([7]), axis=0, mode="fill", fill_value=1),
      "gather out of bounds",
    ),
    (lambda w, x: (x @ w) ** x[:, :3], "a secret power of a secret number"),
    (lambda w, x: (x @ w) ** np.arange(3, dtype=np.float32)[None], "a power by several exponents"),
    (lambda w, x: np.float32(-2) ** (x @ w), "a secret power of a base <= 0"),
    (
      lambda w, x: lax.pad(x @ w, (x @ w)[0, 0], ((1, 1, 0), (0, 0, 0))),
      "padding with a secret value",
    ),
    (lambda w, x: pooled(x @ w, base_dilation=(2, 1)), "reduce_window_max with base dilation"),
    (
      lambda w, x: lax.conv(
        np.ones((1, 3, 9, 9), np.float32), (x @ w)[:, :, None, None], (1, 1), "SAME"
      ),
      "conv_general_dilated of a public image with a secret kernel",
    ),
    (lambda w, x: (jax.debug.print("{}", x @ w), x @ w)[1], "debug_print|debug_callback"),
    (lambda w, x: lax.cond((x @ w).sum() > 0, lambda: 1.0, lambda: 2.0), "cond on a secret value"),
    (
      lambda w, x: lax.while_loop(lambda v: v.sum() > 0, lambda v: v - 1, x @ w),
      "while loop on a secret condition",
    ),
  ],
)
def test_the_rest_is_refused_by_name(fn, reason):
  with pytest.raises(NotImplementedError, match=reason) as refusal:
    planning.plan(fn, OWNERS, (normal(0, 4, 3), B), CONFIG)
  assert re.search(r"at mpc_lowering_test\.py:\d+", str(refusal.value))
