"""Operations on whole arrays: reductions, comparisons, choices, positions, order, control flow."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.conformance.case import Case, normal, owned, secret, spread

X, Y = spread(-4, 4, 4, 6), spread(-4, 4, 4, 6, seed=1)
NEAR_ONE = spread(-1.5, 1.5, 4, 6)
TIES = np.round(X)
EVEN = np.arange(6) % 2 == 0
ONE = np.float32(1)

REDUCTIONS = secret(
  "reductions",
  {
    "sum": (lambda x: x.sum(1), X),
    "sum of 10,000": (lambda x: x.sum(), spread(-8, 8, 100, 100)),
    "mean": (lambda x: x.mean(), X),
    "weighted average": (lambda x: jnp.average(x, 1, np.arange(1.0, 7.0)), X),
    "var": (lambda x: x.var(1), X),
    "std": (lambda x: x.std(1), X),
    "var of numbers near 100": (lambda x: x.var(1), 100 + X / 4),
    "max": (lambda x: x.max(1), X),
    "min": (lambda x: x.min(), X),
    "ptp": (lambda x: jnp.ptp(x, 1), X),
    "prod": (lambda x: x.prod(1), NEAR_ONE),
    "any": (lambda x: jnp.any(x > 2, 1), X),
    "all": (lambda x: jnp.all(x > -2, 1), X),
    "count_nonzero": (jnp.count_nonzero, TIES),
    "count of x > 1": (lambda x: (x > 1).sum(1), X),
    "argmax": (lambda x: x.argmax(1), X),
    "argmax among equals": (lambda x: x.argmax(1), TIES),
    "argmin": (lambda x: x.argmin(0), X),
    "L1 norm": (lambda x: jnp.linalg.norm(x, 1, axis=1), X),
    "L2 norm": (lambda x: jnp.linalg.norm(x, axis=1), X),
    "greatest absolute value": (lambda x: jnp.abs(x).max(), X),
    "logsumexp": (lambda x: jax.nn.logsumexp(x, 1), X),
    "logsumexp of large numbers": (lambda x: jax.nn.logsumexp(x, 1), X * 20),
    "cumsum": (lambda x: jnp.cumsum(x, 1), X),
    "cumsum, then relu": (lambda x: jax.nn.relu(jnp.cumsum(x, 1)), np.abs(X) + 1),
    "cumprod": (lambda x: jnp.cumprod(x, 1), NEAR_ONE),
    "cummax, cummin": (lambda x: (lax.cummax(x, 1), lax.cummin(x, 1)), X),
    "cumlogsumexp": (lambda x: lax.cumlogsumexp(x, 1), X),
    "nansum": (jnp.nansum, X),
    "trapezoid": (jnp.trapezoid, X),
    "covariance": (jnp.cov, X),
    "correlation": (jnp.corrcoef, X),
  },
)
COMPARISONS = secret(
  "comparisons and choices",
  {
    "x > y, x >= y": (lambda x, y: (x > y, x >= y), TIES, np.round(Y)),
    "x < y, x <= y": (lambda x, y: (x < y, x <= y), TIES, np.round(Y)),
    "x == y, x != y": (lambda x, y: (x == y, x != y), TIES, np.round(Y)),
    "x > 0.5": (lambda x: x > 0.5, X),
    "x > -inf, x < inf": (lambda x: (x > -np.inf, x < np.inf), X),
    "isclose": (lambda x: jnp.isclose(x, 1.0, atol=0.25), TIES),
    "isnan, isinf, isfinite": (lambda x: (jnp.isnan(x), jnp.isinf(x), jnp.isfinite(x)), X),
    "signbit": (jnp.signbit, X),
    "and, or, not": (lambda x: (x < 1) & (x > -1) | ~(x <= 2), X),
    "xor": (lambda x: (x < 1) ^ (x > -1), X),
    "maximum": (jnp.maximum, X, Y),
    "minimum": (jnp.minimum, X, Y),
    "maximum with -inf": (lambda x: jnp.maximum(x, -np.inf), X),
    "maximum of a public vector": (lambda x: jnp.maximum(x, np.linspace(-2, 2, 6)), X),
    "sign": (jnp.sign, TIES),
    "heaviside": (lambda x: jnp.heaviside(x, 0.5), TIES),
    "where(x > y, x, y)": (lambda x, y: jnp.where(x > y, x, y), X, Y),
    "where(x > 0, 1, -1)": (lambda x: jnp.where(x > 0, 1.0, -1.0), X),
    "where(public, x, 0)": (lambda x: jnp.where(EVEN, x, 0.0), X),
    "where(public, x, y)": (lambda x, y: jnp.where(EVEN, x, y), X, Y),
    "select_n of 3 at public places": (
      lambda x, y: lax.select_n(np.arange(24, dtype=np.int32).reshape(4, 6) % 3, x, y, x - y),
      X,
      Y,
    ),
    "select_n of 3 by argmax": (
      lambda x: lax.select_n(jnp.argmax(x[:, :3], 1).astype(jnp.int32), x[:, 0], x[:, 1], x[:, 2]),
      X,
    ),
    "jnp.select": (lambda x: jnp.select([x < -1, x < 1], [-x, x * x], 1.0), X),
    "bits of a comparison, summed and multiplied": (lambda x: (x > 0) * x + (x > 1), X),
    "two thresholds of a score": (lambda x: (x > 0).astype(x.dtype) + (x > 2), X),
  },
)
INDICES = np.array([3, 0, 1, 1])
STRUCTURE = secret(
  "structure and public positions",
  {
    "reshape, transpose, flip": (lambda x: x.reshape(2, 12).T[:, ::-1], X),
    "slices": (lambda x: x[1:3, ::2], X),
    "roll, rot90": (lambda x: (jnp.roll(x, 2, 1), jnp.rot90(x)), X),
    "x[indices]": (lambda x: x[INDICES], X),
    "take_along_axis": (lambda x: jnp.take_along_axis(x, INDICES[:, None], 1), X),
    "take beyond the end": (lambda x: jnp.take(x, np.array([1, 9]), 0), X),
    "dynamic_slice": (lambda x: lax.dynamic_slice(x, (1, 2), (2, 3)), X),
    "dynamic_update_slice": (lambda x: lax.dynamic_update_slice(x, x[:2, :2] * 2, (1, 1)), X),
    "at[].set": (lambda x: x.at[1:3].set(0.5), X),
    "at[].set of a secret": (lambda x: jnp.zeros((4, 8), x.dtype).at[:, 1:7].set(x), X),
    "at[].add": (lambda x: jnp.zeros((8, 6), x.dtype).at[INDICES * 2].add(x), X),
    "at[].max": (lambda x: x.at[INDICES].max(-x), X),
    "at[].multiply": (lambda x: x.at[0].multiply(3.0), X),
    "segment_sum": (lambda x: jax.ops.segment_sum(x, INDICES, 4), X),
    "segment_max": (lambda x: jax.ops.segment_max(x, np.array([0, 0, 1, 1]), 2), X),
    "concatenate, stack": (lambda x: (jnp.concatenate([x, 2 * x]), jnp.stack([x, -x])), X),
    "concatenate a public array": (lambda x: jnp.concatenate([x, np.ones((1, 6))]), X),
    "split": (lambda x: jnp.split(x, 2)[1], X),
    "pad with 0.5": (lambda x: jnp.pad(x, 1, constant_values=0.5), X),
    "pad by the edge, by reflection": (
      lambda x: (jnp.pad(x, 1, mode="edge"), jnp.pad(x, 2, mode="reflect")),
      X,
    ),
    "tile, repeat, broadcast_to": (
      lambda x: (jnp.tile(x, (2, 1)), x.repeat(2, 1), jnp.broadcast_to(x, (2, 4, 6))),
      X,
    ),
    "tril, diag, trace": (lambda x: (jnp.tril(x), jnp.diag(x), jnp.trace(x)), X),
    "diff": (jnp.diff, X),
    "meshgrid": (lambda x: jnp.meshgrid(x[0], x[1]), X),
    "real, imag, conj": (lambda x: (jnp.real(x), jnp.imag(x), jnp.conj(x)), X),
    "bitcast to int32": (lambda x: lax.bitcast_convert_type(x, jnp.int32), X),
  },
)
SECRET_POSITIONS = secret(
  "secret positions",
  {
    "x[argmax]": (lambda x: x[jnp.arange(4), jnp.argmax(x, 1)], X),
    "public table[argmax]": (lambda x: jnp.asarray(Y[0])[jnp.argmax(x, 1)], X),
    "dynamic_slice at argmax": (
      lambda x: lax.dynamic_slice_in_dim(x[0], jnp.argmax(x[1, :3]), 2),
      X,
    ),
    "x[x > 0]": (lambda x: x[x > 0], X),
    "nonzero of a fixed size": (lambda x: jnp.nonzero(x[0] > 0, size=4)[0], X),
    "at[argmax].set": (lambda x: x[0].at[jnp.argmax(x[0])].set(0.0), X),
  },
)
ORDER = secret(
  "order",
  {
    "sort": (lambda x: jnp.sort(x, 1), X),
    "sort, descending": (lambda x: jnp.sort(x, 1, descending=True), X),
    "argsort": (lambda x: jnp.argsort(x, 1), X),
    "sort of keys and values": (lambda x, y: lax.sort((x, y), num_keys=1), X, Y),
    "top_k": (lambda x: lax.top_k(x, 2), X),
    "median": (lambda x: jnp.median(x, 1), X),
    "median of all": (jnp.median, X),
    "quantile 0.25": (lambda x: jnp.quantile(x, 0.25), X),
    "percentiles 5 and 95": (lambda x: jnp.percentile(x, np.array([5.0, 95.0]), axis=1), X),
    "second largest": (lambda x: jnp.sort(x, 1)[:, -2], X),
    "rank": (lambda x: jnp.argsort(jnp.argsort(x, 1), 1), X),
    "unique": (lambda x: jnp.unique(x[0], size=6), TIES),
  },
)


def _halves(x):
  return lax.fori_loop(0, 4, lambda i, v: v / 2 + i, x)


def _public_while(x):
  step = lambda state: (state[0] + 1, state[1] * 0.5 + 1)
  return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]


def _secret_while(x):
  return lax.while_loop(lambda v: v.sum() < 100, lambda v: v * v + 1, x)


def _newton_root(x):
  return lax.fori_loop(0, 5, lambda i, y: 0.5 * (y + x / y), jnp.ones_like(x))


CONTROL = secret(
  "control flow and transformations",
  {
    "jit": (lambda x: jax.jit(lambda v: jax.nn.relu(v) * 2)(x), X),
    "checkpoint": (lambda x: jax.checkpoint(jax.nn.relu)(x), X),
    "vmap": (lambda x: jax.vmap(lambda v: v @ v)(x), X),
    "scan": (lambda x: lax.scan(lambda c, v: (c / 2 + v, c * v), x[0], x), X),
    "scan, reversed": (lambda x: lax.scan(lambda c, v: (c / 2 + v, c), x[0], x, reverse=True), X),
    "lax.map": (lambda x: lax.map(lambda v: v * v.sum(), x), X),
    "associative_scan": (lambda x: lax.associative_scan(jnp.add, x, axis=1), X),
    "fori_loop": (_halves, X),
    "while_loop on a public condition": (_public_while, X),
    "while_loop on a secret condition": (_secret_while, X),
    "Newton's square root": (_newton_root, spread(0.5, 4, 4, 6)),
    "cond on a public value": (lambda x: lax.cond(True, jnp.abs, jnp.negative, x), X),
    "cond on a secret value": (lambda x: lax.cond(x.sum() > 0, jnp.abs, jnp.negative, x), X),
    "switch on a public value": (lambda x: lax.switch(1, [jnp.abs, jnp.negative], x), X),
    "switch on a secret value": (
      lambda x: lax.switch(jnp.argmax(x[0, :2]), [jnp.abs, jnp.negative], x),
      X,
    ),
    "gradient in the input": (jax.grad(lambda x: (jnp.tanh(x) ** 2).sum()), X),
    "gradient of relu": (jax.grad(lambda x: jax.nn.relu(x * 2).sum()), X),
    "jvp": (lambda x: jax.jvp(jnp.square, (x,), (x / 2,))[1], X),
    "Jacobian": (lambda x: jax.jacobian(lambda v: v * v.sum())(x[0]), X),
    "dropout at random with a public key": (
      lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x * 2, 0),
      X,
    ),
    "noise of a public key": (lambda x: x + jax.random.normal(jax.random.key(0), x.shape), X),
    "debug print": (lambda x: (jax.debug.print("{}", x[0, 0]), x)[1], X),
    "pure_callback": (
      lambda x: jax.pure_callback(np.sort, jax.ShapeDtypeStruct(x.shape, x.dtype), x),
      X,
    ),
  },
)
UNSOUND = owned(
  "inputs out of range",
  {
    "output beyond the ring: x ** 2 at 1e5": (lambda w, x: (x * w) ** 2, ONE, normal(4, 6) * 1e5),
    "NaN in the image": (
      lambda w, x: jax.nn.relu(x @ w),
      normal(6, 3),
      np.where(np.arange(24).reshape(4, 6) == 7, np.nan, X).astype(np.float32),
    ),
    "infinity in the image": (
      lambda w, x: jax.nn.relu(x @ w),
      normal(6, 3),
      np.where(np.arange(24).reshape(4, 6) == 7, np.inf, X).astype(np.float32),
    ),
    "NaN among the weights": (
      lambda w, x: jax.nn.relu(x @ w),
      np.where(np.arange(18).reshape(6, 3) == 7, np.nan, normal(6, 3)).astype(np.float32),
      X,
    ),
    "log of negative numbers": (lambda w, x: jnp.log(x * w), ONE, X),
    "1 / 0": (lambda w, x: 1 / (x * w), ONE, TIES),
  },
)

CASES: list[Case] = [
  *REDUCTIONS,
  *COMPARISONS,
  *STRUCTURE,
  *SECRET_POSITIONS,
  *ORDER,
  *CONTROL,
  *UNSOUND,
]
