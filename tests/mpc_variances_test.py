"""Normalisations of any contrast and mean, within their stated bound; which variances are found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, planning
from primia_jax.mpc.circuit import Config
from primia_jax.mpc.lowering import variances
from primia_jax.mpc.lowering.program import evaluate, trace

pytestmark = pytest.mark.usefixtures("x64")
UNIT = 2.0**-16


def checked(fn, w, x):
  plan = planning.plan(fn, OWNERS, (w, x), Config(), planning.calibrate(fn, OWNERS, [(w, x)]))
  return [np.asarray(v, np.float64) for v in jax.tree.leaves(clear.check(plan, (w, x)))]


def normalised(x, axes, epsilon):
  """In float64, and the bound of its error that `variances` states."""
  c = x - x.mean(axes, keepdims=True)
  r = (np.square(c).mean(axes, keepdims=True) + epsilon) ** -0.5
  y, centred, inverse = np.abs(c * r), 4 * np.abs(c).max(), 4 * r.max()
  return c * r, UNIT * ((1 + y) * centred * r + y * (inverse / r + 1) + 1)


CASES = [(0.001, 1e-6), (0.001, 1e-5), (0.1, 1e-6), (10.0, 1e-6)]  # deviation, epsilon


@pytest.mark.parametrize("raw", [False, True])
def test_a_layer_norm_of_any_contrast(raw):
  """Flax's default form, whose variance is nothing but rounding error in float32 at mean 5."""
  options = {"use_bias": False, "use_scale": False}
  norm = lambda x, eps: nn.LayerNorm(epsilon=eps, **options).apply({}, x)
  inputs = lambda w, x: [5 + np.float32(std) * x * w for std, _ in CASES]
  fn = lambda w, xs: [norm(x * w, eps) for x, (_, eps) in zip(xs, CASES, strict=True)]
  w, x = np.ones((1, 32), np.float32), normal(0, 8, 32)
  if raw:
    xs = inputs(np.float32(1), x)
    exact = [v.astype(np.float64) for v in xs]
    found = checked(fn, w, xs)
  else:
    exact = [5 + np.float64(np.float32(std)) * x for std, _ in CASES]
    found = checked(lambda w, x: fn(np.float32(1), inputs(w, x)), w, x)
  for got, x, (std, eps) in zip(found, exact, CASES, strict=True):
    want, bound = normalised(x, -1, eps)
    error = np.abs(got - want)
    assert error.max() < 1e-3, (std, eps)
    assert np.all(error <= bound), (std, eps)


def test_group_and_instance_norms_of_low_contrast():
  modules = [nn.GroupNorm(2), nn.InstanceNorm(), nn.GroupNorm(2, use_fast_variance=False)]
  x = normal(1, 2, 4, 4, 4)
  w = normal(2, 2, 4)

  def fn(w, x):
    return [m.apply({"params": {"scale": w[0], "bias": w[1]}}, 5 + 0.01 * x) for m in modules]

  x64 = 5 + np.float64(np.float32(0.01)) * x
  grouped = normalised(x64.reshape(2, 4, 4, 2, 2), (1, 2, 4), 1e-6)[0].reshape(x.shape)
  single = normalised(x64, (1, 2), 1e-6)[0]
  for got, want in zip(checked(fn, w, x), [grouped, single, grouped], strict=True):
    np.testing.assert_allclose(got, want * w[0] + w[1], atol=1e-3)


X = normal(3, 3, 4, 6) + 2
MEAN = lambda x, **options: x.mean(-1, **options)


@pytest.mark.parametrize(
  ("fn", "found"),
  [
    (lambda x: MEAN(x * x) - MEAN(x) ** 2, True),
    (lambda x: MEAN(x**2, keepdims=True) - jnp.square(MEAN(x, keepdims=True)), True),
    (lambda x: jnp.maximum(0, MEAN(x * x) - MEAN(x) ** 2) + MEAN(x), True),
    (lambda x: jax.nn.standardize(x), True),
    (lambda x: nn.GroupNorm(2, use_bias=False, use_scale=False).apply({}, x), True),
    (lambda x: nn.InstanceNorm(use_bias=False, use_scale=False).apply({}, x), True),
    (lambda x: x.var(-1), False),  # is centred already
    (lambda x: MEAN(x * x) - MEAN(x + 1) ** 2, False),
    (lambda x: MEAN(x * x) - x.sum(-1) ** 2, False),
    (lambda x: x.sum(-1) / 5 - (x.sum(-1) / 5) ** 2, False),
    (lambda x: (x * x).sum(-1) / 5 - (x.sum(-1) / 5) ** 2, False),
    (lambda x: (x * x).mean(0) - x.mean(0) ** 2, True),
    (lambda x: (x * x).mean(1)[:2, :1] - MEAN(x)[1:, :1] ** 2, False),
    (lambda x: jnp.maximum(0.5, x[0]) - x[1] ** 2, False),
  ],
)
def test_which_variances_are_found(fn, found):
  before = trace(fn, [X], ["secret"])
  after = variances.centred(before)
  assert (after is not before) == found
  (old,), (new,) = (
    [evaluate(program, [X])[program.outputs[0].number]] for program in (before, after)
  )
  np.testing.assert_allclose(new, old, atol=2e-4)
  numbers = [ref.number for e in after.equations for ref in e.outputs]
  assert numbers == list(range(1, after.num_values))
  if found:
    assert [e.name for e in after.equations].count("square") == 1
    assert "max" not in {e.name for e in after.equations}


class Block(nn.Module):
  """A transformer's block."""

  @nn.compact
  def __call__(self, x):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(2, deterministic=True)(y, y)
    y = nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Transformer(nn.Module):
  """Patches of an image, blocks and a classifier."""

  num_blocks: int
  width: int

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(self.width, (4, 4), (4, 4))(x).reshape(x.shape[0], -1, self.width)
    for _ in range(self.num_blocks):
      x = Block()(x)
    return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


@pytest.mark.slow
def test_a_vision_transformer():
  """Within 1e-3 of float64 at 64 bits."""
  module, x = Transformer(3, 16), normal(4, 2, 8, 8, 3)
  variables = module.init(jax.random.key(0), x)
  fill = lambda v: v + 0.1 * normal(v.size, *v.shape) if v.ndim == 1 else 1.5 * v
  variables = jax.tree.map(lambda v: np.float32(fill(np.asarray(v))), variables)
  (got,) = checked(module.apply, variables, x)
  with jax.numpy_dtype_promotion("standard"):
    want = module.apply(jax.tree.map(np.float64, variables), x.astype(np.float64))
  assert want.dtype == np.float64
  assert np.abs(want).max() > 0.5
  np.testing.assert_allclose(got, want, atol=1e-3)
