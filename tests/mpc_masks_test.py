"""Masks on the integer model against the function itself in float64; masked entries count for
exactly 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax
from mpc_reference import OWNERS, normal

from primia_jax.mpc import clear, planning
from primia_jax.mpc.circuit import Config

pytestmark = pytest.mark.usefixtures("x64")
WITH_MASK = ("model_owner", "data_owner", "data_owner")
LEAST = float(np.finfo(np.float32).min)
VALID = np.arange(6) < 4
CAUSAL = np.tril(np.ones((5, 5), bool))
X, UNIT = 2 * normal(0, 2, 5, 6), np.float32(1)


@pytest.fixture(autouse=True)
def promotion():
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


def checked(fn, args, owners=OWNERS, atol=2e-4, config=Config()):  # noqa: B008
  """The integer model's outputs, after comparing them with fn in float64."""
  plan = planning.plan(fn, owners, args, config, planning.calibrate(fn, owners, [args]))
  got = clear.check(plan, args)
  wide = lambda v: np.asarray(v, np.float64) if jnp.issubdtype(v.dtype, jnp.floating) else v
  want = jax.jit(fn)(*jax.tree.map(wide, args))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), atol=atol)
  return got


def biases(mask, value):
  return np.where(mask, 0, value).astype(np.float32)


def test_public_masks():
  """In every form: the weights of what is masked are exactly 0, the others right."""
  partly = np.broadcast_to(VALID, (2, 5, 6)).copy()
  partly[1, 2] = False  # a row that is masked wholly is uniform
  first = np.broadcast_to(np.arange(6) < 3, (2, 5, 6))

  def fn(w, x):
    x = x * w
    low = jnp.concatenate([x[..., :4], np.full((2, 5, 2), -1e9, np.float32)], -1)
    scores = [
      jnp.where(VALID, x, -jnp.inf),
      jnp.where(VALID, x, -1e4),
      jnp.where(partly, x, LEAST),
      jnp.where(first, jnp.where(VALID, x, -1e9), -jnp.inf),
      x + biases(VALID, -1e9),
      (x.reshape(10, 6) + biases(VALID, -np.inf)).reshape(2, 5, 6),
      (jnp.where(VALID, x, -1e9) + 0.5) / 2,
      low - x[..., :1],
      jnp.pad(x[..., :4], ((0, 0), (0, 0), (0, 2)), constant_values=-jnp.inf),
      jnp.where(VALID[:, None], x.transpose(0, 2, 1), -jnp.inf).transpose(0, 2, 1),
    ]
    return jax.nn.softmax(jnp.stack(scores))

  weights = np.asarray(checked(fn, (UNIT, X)))
  masked = np.broadcast_to(~VALID, weights.shape).copy()
  masked[2, 1, 2] = False
  masked[3] |= ~first
  assert not np.any(weights[masked])
  assert np.all(np.abs(weights[2, 1, 2] - 1 / 6) < 1e-4)


def test_masked_sums():
  """`where=` of JAX's own functions; numbers so small that no exponential is near 0."""
  fn = lambda w, x: (
    jax.nn.softmax(x * w, where=VALID),
    jax.nn.logsumexp(x * w, -1, where=VALID),
    jax.nn.logsumexp(jnp.where(VALID, x * w, -1e9), -1),
  )
  weights = checked(fn, (UNIT, X[:1] / 8))[0]
  assert not np.any(np.asarray(weights)[..., ~VALID])


def test_maxima_and_comparisons():
  def fn(w, x):
    x = x * w
    masked = jnp.where(VALID, x, -jnp.inf)
    rows = jnp.where(CAUSAL[..., None] & VALID, x[:, None], -jnp.inf)
    return (
      masked.max(-1),
      jnp.where(VALID[:5, None], x, -jnp.inf).max((0, 1)),
      rows.max(2)[..., :4],  # of different numbers of entries
      jnp.max(x, -1, where=VALID, initial=-1e30),
      jnp.argmax(jnp.where(~VALID, x, -jnp.inf), -1),
      masked > -jnp.inf,
      masked >= 0.25,
      x > -jnp.inf,
      (x <= jnp.inf) & jnp.isfinite(masked),
      jax.nn.relu(masked),
      jnp.where(VALID, masked, 0),
      jnp.isnan(masked),
      jnp.maximum(x, np.where(VALID, -jnp.inf, 0.5)),
      lax.reduce_window(
        jnp.where(np.arange(6) != 2, x, -jnp.inf), -jnp.inf, lax.max, (1, 3, 3), (1, 2, 2), "SAME"
      ),
      jnp.where(VALID, x, -2e4) + 0.25,  # numbers like any others
    )

  checked(fn, (UNIT, X), atol=2e-3)


def test_a_secret_mask():
  """Of one party: as truth values or as numbers to add, beside public ones."""
  mask = np.broadcast_to(np.arange(6) < np.array([[3], [6], [1], [0], [5]]), (2, 5, 6))

  def fn(w, mask, x):
    x = x * w
    return jax.nn.softmax(
      jnp.stack(
        [
          jnp.where(mask, x, -1e9),
          jnp.where(mask, x, LEAST),
          jnp.where(VALID, jnp.where(mask, x, -1e9), -1e9),
          jnp.where(mask, x + biases(VALID, -1e9), -1e9),
          (jnp.where(mask, x, -1e9) + 0.5) / 2,
        ]
      )
    )

  weights = np.asarray(checked(fn, (UNIT, mask, X), WITH_MASK))
  some = mask.any(-1, keepdims=True)
  assert not np.any(weights[0][~mask & some])
  assert not np.any(weights[2][~(mask & VALID) & some])


def test_a_mask_that_its_owner_adds():
  mask = np.arange(6) < np.array([[3], [6], [1], [4], [5]])
  fn = lambda w, mask, x: jax.nn.softmax(jnp.where(VALID, x * w, -1e9) + mask * -1e9)
  weights = checked(fn, (UNIT, (~mask).astype(np.float32), X[0]), WITH_MASK)
  assert not np.any(np.asarray(weights)[~mask | ~VALID])


def test_maxima_under_a_secret_mask_are_right_even_where_all_is_masked():
  mask = np.array([[1, 0, 1, 0, 0, 0], [0] * 6], bool)
  fn = lambda w, mask, x: jnp.max(jnp.where(mask, x * w, -2e4), -1)
  assert np.all(np.asarray(checked(fn, (UNIT, mask, X[0, :2]), WITH_MASK))[1] == -2e4)


QUERIES = normal(1, 1, 4, 2, 3)


@pytest.mark.parametrize(
  "options",
  [
    {"is_causal": True},
    pytest.param({"bias": biases(CAUSAL[:4, :4], LEAST)[None, None]}, marks=pytest.mark.slow),
    pytest.param({"mask": CAUSAL[None, None, :4, :4]}, marks=pytest.mark.slow),
    pytest.param({"local_window_size": (1, 0)}, marks=pytest.mark.slow),
  ],
)
def test_dot_product_attention(options):
  fn = lambda w, q: jax.nn.dot_product_attention(q * w, q, q, **options)
  checked(fn, (UNIT, QUERIES))


def test_a_masked_token_changes_nothing():
  """Flax's attention under the data owner's secret mask: outputs are equal bit for bit."""
  tokens = normal(2, 2, 4, 4)
  lengths = np.arange(4)[None] < np.array([[2], [4]])
  mask = np.asarray(linen.make_attention_mask(lengths, lengths)).astype(bool)
  layer = linen.MultiHeadDotProductAttention(num_heads=2, deterministic=True)
  weights = jax.jit(layer.init)(jax.random.key(0), tokens, tokens)
  fn = lambda weights, mask, x: layer.apply(weights, x, x, mask=mask)
  args = (weights, mask, tokens)
  plan = planning.plan(fn, WITH_MASK, args, Config(), planning.calibrate(fn, WITH_MASK, [args]))
  model = clear.checker(plan)
  got = np.asarray(model(args))
  np.testing.assert_allclose(got, jax.jit(fn)(*args), atol=2e-4)
  other = tokens.copy()
  other[0, 3] = tokens[1, 0]
  np.testing.assert_array_equal(np.asarray(model((weights, mask, other)))[0, :2], got[0, :2])


@pytest.mark.slow
def test_nnx_attention():
  """Its state holds a key and a counter of dropout, which nothing here needs."""
  layer = nnx.MultiHeadAttention(2, 4, decode=False, dropout_rate=0.1, rngs=nnx.Rngs(0))
  graph, state = nnx.split(layer)
  fn = lambda state, x: nnx.merge(graph, state)(x, mask=CAUSAL[:4, :4], deterministic=True)
  checked(fn, (state, normal(3, 1, 4, 4)))


@pytest.mark.parametrize(
  ("fn", "reason"),
  [
    (lambda x: jnp.where(VALID, x, -jnp.inf), "select_n of a secret value and an infinite"),
    (lambda x: jnp.where(VALID, x, -jnp.inf).sum(-1), "select_n of a secret value and an infinite"),
    (lambda x: x * jnp.inf, "mul of a secret value and an infinite"),
    (lambda x: jnp.maximum(x, jnp.inf), "max of a secret value and an infinite"),
    (lambda x: jnp.minimum(x, np.where(VALID, 0, jnp.inf)), "min of a secret value and an inf"),
    (
      lambda x: jnp.isfinite(jnp.where(x > 0, x, -jnp.inf)),
      "select_n of a secret value and an inf",
    ),
    (lambda x: jnp.where(x > 0, x, jnp.nan), "select_n of a secret value and an infinite or NaN"),
    (lambda x: jax.nn.softmax(jnp.where(VALID & False, x, -jnp.inf)), "masked wholly by minus inf"),
  ],
)
def test_infinite_numbers_are_refused(fn, reason):
  with pytest.raises(NotImplementedError, match=reason + r".* at mpc_masks_test.py:\d+"):
    planning.plan(lambda w, x: fn(x * w), OWNERS, (UNIT, X))
