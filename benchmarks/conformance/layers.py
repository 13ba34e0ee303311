"""What networks are built from: activations, norms, attention and masks, losses, small models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.conformance.case import Case, normal, octaves, owned, secret, spread

X = spread(-8, 8)
ONE, SIX = np.float32(1), np.ones(6, np.float32)
ACTIVATIONS = secret(
  "activations",
  {
    fn.__name__: (fn, X)
    for fn in (
      nn.relu, nn.relu6, nn.leaky_relu, nn.elu, nn.selu, nn.celu, nn.gelu, nn.silu, nn.sigmoid,
      nn.hard_sigmoid, nn.hard_silu, nn.hard_tanh, nn.softplus, nn.soft_sign, nn.log_sigmoid,
      jax.nn.mish, jax.nn.squareplus, jax.nn.sparse_plus, jax.nn.sparse_sigmoid, nn.glu,
      jax.nn.softmax, jax.nn.log_softmax,
    )
  }
  | {
    "gelu, exact": (functools.partial(nn.gelu, approximate=False), X),
    "leaky_relu, slope 0.2": (functools.partial(nn.leaky_relu, negative_slope=0.2), X),
    "softmax of large numbers": (jax.nn.softmax, X * 10),
    "softmax over the first axis": (lambda x: jax.nn.softmax(x, 0), X),
    "softmax with temperature": (lambda x: jax.nn.softmax(x / 0.5), X),
    "relu, squared": (lambda x: nn.relu(x) ** 2, X),
    "hardshrink, softshrink": (
      lambda x: (jnp.where(jnp.abs(x) > 0.5, x, 0), jnp.sign(x) * nn.relu(jnp.abs(x) - 0.5)),
      X,
    ),
    "tanhshrink": (lambda x: x - jnp.tanh(x), X),
    "swish, beta 1.5": (lambda x: x * nn.sigmoid(1.5 * x), X),
    "maxout": (lambda x: x.reshape(8, 16, 2).max(-1), X),
  },
)  # fmt: skip

ROWS, HIDDEN = normal(4, 6), {"a": normal(6, 6, seed=1), "b": normal(6, 6, seed=2)}


def _parametric(w, x, axis_free):
  y = x @ w["k"]
  return jnp.where(y >= 0, y, (w["a"] if axis_free else w["a"][0]) * y)


def stacked(activation, depth):
  """Dense layers of width 6 with an activation after each."""
  ws = tuple(normal(6, 6, seed=i, scale=0.5) for i in range(depth))

  def fn(w, x):
    for each in w:
      x = activation(x @ each)
    return x

  return fn, ws, ROWS


LEARNT = owned(
  "layers in sequence",
  {
    "PReLU, one slope": (
      functools.partial(_parametric, axis_free=True),
      {"k": HIDDEN["a"], "a": np.float32(0.25)},
      ROWS,
    ),
    "PReLU, a slope for each channel": (
      functools.partial(_parametric, axis_free=True),
      {"k": HIDDEN["a"], "a": np.abs(normal(6)) / 2},
      ROWS,
    ),
    "nn.PReLU": (
      lambda w, x: nn.PReLU().apply({"params": w["p"]}, x @ w["k"]),
      {"k": HIDDEN["a"], "p": {"negative_slope": ONE / 4}},
      ROWS,
    ),
    "ReZero": (
      lambda w, x: x + w["a"] * nn.relu(x @ w["k"]),
      {"k": HIDDEN["a"], "a": ONE / 8},
      ROWS,
    ),
    "LayerScale": (
      lambda w, x: x + w["a"] * nn.relu(x @ w["k"]),
      {"k": HIDDEN["a"], "a": normal(6) / 8},
      ROWS,
    ),
    "one layer with relu": stacked(nn.relu, 1),
    "two layers with relu": stacked(nn.relu, 2),
    "eight layers with relu": stacked(nn.relu, 8),
    "two layers with leaky_relu": stacked(nn.leaky_relu, 2),
    "eight layers with leaky_relu": stacked(nn.leaky_relu, 8),
    "four layers with hard_silu": stacked(nn.hard_silu, 4),
    "four layers with gelu": stacked(nn.gelu, 4),
    "four layers with elu": stacked(nn.elu, 4),
    "four layers with tanh": stacked(jnp.tanh, 4),
    "four layers without activation": stacked(lambda x: x, 4),
    "four layers, each divided by 3": stacked(lambda x: nn.relu(x) / 3, 4),
  },
)


def flax(module, x, **variables):
  """A Flax module of shared numbers, with random parameters around those of its initialisation."""

  def make():
    leaves, tree = jax.tree.flatten(module.init(jax.random.key(0), x).get("params", {}))
    moved = [np.asarray(v) + normal(*v.shape, seed=i, scale=0.1) for i, v in enumerate(leaves)]
    weights = {"one": ONE, "rest": {"params": jax.tree.unflatten(tree, moved), **variables}}
    return lambda w, x: module.apply(w["rest"], x * w["one"]), weights, x

  return make


IMAGE, TOKENS = spread(-2, 2, 2, 6, 6, 4), normal(2, 5, 8)
FINE = (3 + normal(4, 32) * 0.125).astype(np.float32)


def normalised(x, epsilon=1e-6, axis=-1):
  centred = x - x.mean(axis, keepdims=True)
  return centred * lax.rsqrt((centred**2).mean(axis, keepdims=True) + epsilon)


STATISTICS = {
  "batch_stats": {"mean": normal(4), "var": np.abs(normal(4, seed=1)) + np.float32(0.1)}
}
NORMS = owned(
  "norms",
  {
    "BatchNorm, given statistics": flax(nn.BatchNorm(True), IMAGE, **STATISTICS),
    "LayerNorm": flax(nn.LayerNorm(), TOKENS),
    "RMSNorm": flax(nn.RMSNorm(), TOKENS),
    "GroupNorm": flax(nn.GroupNorm(2), IMAGE),
    "InstanceNorm": flax(nn.InstanceNorm(), IMAGE),
    "WeightNorm": flax(nn.WeightNorm(nn.Dense(5)), TOKENS),
  },
) + secret(
  "norms",
  {
    "LayerNorm of mean 3, deviation 1": (normalised, 3 + FINE - FINE.mean()),
    "LayerNorm of mean 3, deviation 0.1": (lambda x: normalised(x), FINE),
    "LayerNorm of mean 3, deviation 0.01": (lambda x: normalised(3 + 0.01 * x), normal(4, 32)),
    "LayerNorm of mean 3, deviation 0.001": (lambda x: normalised(3 + 0.001 * x), normal(4, 32)),
    "LayerNorm up to 300": (normalised, normal(4, 32) * 100),
    "InstanceNorm of mean 5, deviation 0.01": (
      lambda x: normalised(5 + 0.01 * x, 1e-5, (1, 2)),
      normal(1, 8, 8, 2),
    ),
    "standardize": (lambda x: jax.nn.standardize(x), normal(4, 32)),
    "L2 normalisation": (lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), normal(4, 8)),
    "divided by the sum": (
      lambda x: (y := jnp.abs(x) + 0.1) / y.sum(-1, keepdims=True),
      normal(4, 8),
    ),
    "min-max scaling": (lambda x: (x - x.min()) / (x.max() - x.min()), normal(4, 8)),
    "local response": (
      lambda x: x / (1 + lax.reduce_window(x * x, 0.0, lax.add, (1, 3), (1, 1), "SAME")) ** 0.75,
      normal(4, 8),
    ),
  },
)

VALID = np.arange(5)[None, None, :] < np.array([3, 5])[:, None, None]
LOWER = np.tril(np.ones((5, 5), bool))


def attention(x, mask, value):
  scores = jnp.einsum("bid,bjd->bij", x, x) / np.sqrt(x.shape[-1])
  return jax.nn.softmax(jnp.where(mask, scores, value), -1) @ x


def _of_jax(**options):
  def fn(w, x):
    q, k, v = (jnp.einsum("bsd,dhe->bshe", x, m) for m in w)
    return jax.nn.dot_product_attention(q, k, v, **options)

  return fn, tuple(normal(8, 2, 4, seed=i, scale=0.5) for i in range(3)), TOKENS


def _secret_mask(x):
  scores = jnp.einsum("bid,bjd->bij", x, x) / 3
  return jax.nn.softmax(jnp.where(x[:, None, :, 0] > -0.5, scores, -1e9), -1) @ x


class _Masked(nn.Module):
  """Self-attention of two heads with a public mask."""

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2)(x, x, mask=LOWER[None, None])


ATTENTION = secret(
  "attention and masks",
  {
    "no mask": (lambda x: attention(x, True, 0.0), TOKENS),
    "masked by -inf": (lambda x: attention(x, VALID, -jnp.inf), TOKENS),
    "masked by -1e9": (lambda x: attention(x, VALID, -1e9), TOKENS),
    "masked by the least float32": (
      lambda x: attention(x, LOWER, np.finfo(np.float32).min),
      TOKENS,
    ),
    "added mask of -1e4": (
      lambda x: jax.nn.softmax(x @ x.swapaxes(1, 2) + np.where(LOWER, 0, -1e4), -1) @ x,
      TOKENS,
    ),
    "a secret mask": (_secret_mask, TOKENS),
    "softmax(where=)": (lambda x: jax.nn.softmax(x, -1, where=VALID[:, 0, :, None]), TOKENS),
    "maximum over what is not masked": (
      lambda x: jnp.max(jnp.where(VALID[:, 0, :, None], x, -jnp.inf), 1),
      TOKENS,
    ),
    "minimum over what is not masked": (
      lambda x: jnp.min(x, 1, where=VALID[:, 0, :, None], initial=jnp.inf),
      TOKENS,
    ),
    "argmax over what is not masked": (
      lambda x: jnp.argmax(jnp.where(VALID[:, 0, :, None], x, -jnp.inf), 1),
      TOKENS,
    ),
    "logsumexp over what is not masked": (
      lambda x: jax.nn.logsumexp(x, 1, where=VALID[:, 0, :, None]),
      TOKENS,
    ),
    "mean over what is not masked": (lambda x: x.mean(1, where=VALID[:, 0, :, None]), TOKENS),
    "linear attention": (lambda x: (nn.elu(x) + 1) @ ((nn.elu(x) + 1).swapaxes(1, 2) @ x), TOKENS),
  },
) + owned(
  "attention and masks",
  {
    "dot_product_attention": _of_jax(),
    "dot_product_attention, is_causal": _of_jax(is_causal=True),
    "dot_product_attention, mask": _of_jax(mask=LOWER[None, None]),
    "Flax, no mask": flax(nn.SelfAttention(2), TOKENS),
    "Flax, mask": flax(_Masked(), TOKENS),
    "attention pooling (gated)": (
      lambda w, x: jnp.einsum(
        "bs,bsd->bd", jax.nn.softmax((jnp.tanh(x @ w["v"]) * nn.sigmoid(x @ w["u"])) @ w["a"]), x
      ),
      {"v": normal(8, 4), "u": normal(8, 4, seed=1), "a": normal(4)},
      TOKENS,
    ),
  },
)

LOGITS, CLASSES = normal(6, 5, scale=2), np.arange(6) % 5
HOT = np.eye(5, dtype=np.float32)[CLASSES]
CHANCES = np.abs(normal(6, 5, seed=3)) + np.float32(0.1)
LOSSES = secret(
  "losses and scores",
  {
    "squared error": (lambda x: ((x - HOT) ** 2).mean(), LOGITS),
    "absolute error": (lambda x: jnp.abs(x - HOT).mean(), LOGITS),
    "Huber": (lambda x: optax.huber_loss(x, HOT), LOGITS),
    "log cosh": (lambda x: optax.log_cosh(x, HOT), LOGITS),
    "cross-entropy, public labels": (
      lambda x: optax.softmax_cross_entropy_with_integer_labels(x, CLASSES),
      LOGITS,
    ),
    "cross-entropy, secret labels": (optax.softmax_cross_entropy, LOGITS, HOT),
    "binary cross-entropy": (lambda x: optax.sigmoid_binary_cross_entropy(x, HOT), LOGITS),
    "hinge": (lambda x: optax.hinge_loss(x, 2 * HOT - 1), LOGITS),
    "focal": (lambda x: optax.sigmoid_focal_loss(x, HOT), LOGITS),
    "Kullback-Leibler divergence": (
      lambda x: optax.kl_divergence(
        jax.nn.log_softmax(x), CHANCES / CHANCES.sum(-1, keepdims=True)
      ),
      LOGITS,
    ),
    "Poisson": (lambda x: jnp.exp(x) - CHANCES * x, LOGITS / 2),
    "cosine similarity": (lambda x, y: optax.cosine_similarity(x, y), LOGITS, CHANCES),
    "Dice": (
      lambda x: 1 - 2 * (nn.sigmoid(x) * HOT).sum() / (nn.sigmoid(x).sum() + HOT.sum()),
      LOGITS,
    ),
    "triplet": (
      lambda x, y: nn.relu(((x - y) ** 2).sum(-1) - ((x + y) ** 2).sum(-1) + 1),
      LOGITS,
      CHANCES,
    ),
    "accuracy": (lambda x: (jnp.argmax(x, -1) == CLASSES).mean(), LOGITS),
    "entropy": (lambda x: -(jax.nn.softmax(x) * jax.nn.log_softmax(x)).sum(-1), LOGITS),
    "margin of the first two": (lambda x: (y := lax.top_k(x, 2)[0])[:, 0] - y[:, 1], LOGITS),
  },
)

CENTRES = normal(3, 6, seed=5)
distances = lambda w, x: ((x[:, None] - w[None]) ** 2).sum(-1)
MODELS = owned(
  "classic models",
  {
    "logistic regression": (lambda w, x: nn.sigmoid(x @ w), normal(6, 1), ROWS),
    "nearest centre": (lambda w, x: jnp.argmin(distances(w, x), 1), CENTRES, ROWS),
    "squared distances": (distances, CENTRES, ROWS),
    "radial basis functions": (lambda w, x: jnp.exp(-distances(w, x) / 8), CENTRES, ROWS),
    "support vector machine, polynomial kernel": (
      lambda w, x: ((x @ w["v"].T + 1) ** 3) @ w["a"] + w["b"],
      {"v": CENTRES / 2, "a": normal(3), "b": ONE},
      ROWS,
    ),
    "Gaussian naive Bayes": (
      lambda w, x: -0.5 * (((x[:, None] - w[0]) ** 2) / w[1] + jnp.log(w[1])).sum(-1),
      (CENTRES, octaves(0.25, 4, 3, 6)),
      ROWS,
    ),
    "decision stumps, boosted": (
      lambda w, x: jnp.where(x > w["t"], w["hi"], w["lo"]).sum(-1),
      {"t": normal(6), "hi": normal(6, seed=1), "lo": normal(6, seed=2)},
      ROWS,
    ),
    "principal components": (
      lambda w, x: (x - w["m"]) @ w["c"],
      {"m": SIX / 2, "c": CENTRES.T},
      ROWS,
    ),
    "k nearest neighbours' vote": (lambda w, x: lax.top_k(-distances(w, x), 2)[1], CENTRES, ROWS),
    "proportional hazards": (lambda w, x: jnp.exp(x @ w), normal(6, scale=0.5), ROWS),
  },
)

CASES: list[Case] = [*ACTIVATIONS, *LEARNT, *NORMS, *ATTENTION, *LOSSES, *MODELS]
