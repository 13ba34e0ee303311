"""The largest of many shared numbers, and its position. For C and P see `polynomials`."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions.polynomials import opened, product


def tournament(build: Builder, x: Value, axis: int) -> Value:
  """The largest along an axis, which is removed; exact.

  n - 1 comparisons, ceil(log2(n)) of them one after the other.
  """
  while x.shape[axis] > 1:
    n = x.shape[axis]
    first, second, rest = (
      build.local(lambda v, a=a, b=b: lax.slice_in_dim(v, a, b, axis=axis), x)
      for a, b in ((0, n // 2), (n // 2, n // 2 * 2), (n // 2 * 2, n))
    )
    most = build.maximum(first, second)
    if n % 2:
      most, rest = build.align(most, rest)
      most = build.local(lambda a, b: lax.concatenate([a, b], axis), most, rest)
    x = most
  return build.local(lambda v: lax.squeeze(v, (axis,)), x)


def argmax(build: Builder, x: Value, axis: int) -> Value:
  """The position of the largest along an axis, which is removed; the first of equals. Exact, at
  scale 1.

  Within groups of up to 16, all pairs are compared at once; a comparison of a few bits finds the
  one that wins against all others. C + 2 or 3 rounds for n <= 16; each further factor of 8 adds the
  same and P.
  """
  n, shape = x.shape[axis], x.shape[:axis] + x.shape[axis + 1 :]
  x = build.local(lambda v: jnp.moveaxis(v, axis, 0), x)
  position = None  # of the candidates, once it is no longer their number
  while n > 1:
    size = min(16, n) if n <= 16 else 8
    groups = -(-n // size)
    # The last element fills the group; its repetitions lose to it, since it comes first.
    grouped = lambda v, n=n, size=size, groups=groups: v[
      np.minimum(np.arange(groups * size), n - 1)
    ].reshape(groups, size, *shape)
    x = build.local(grouped, x)
    wins = _winners(build, x)
    numbers = np.minimum(np.arange(groups * size), n - 1).reshape(groups, size, *[1] * len(shape))
    if position is None:
      table = jnp.asarray(numbers.astype(build.config.dtype))
      chosen = build.local(
        lambda w, table=table: (w * table).sum(1, dtype=w.dtype), wins, max_abs=float(n - 1)
      )
    if n > size:
      rows = [wins, x] if position is None else [wins, x, build.local(grouped, position)]
      first, *others = opened(build, rows)
      picked = [_sum(build, product(build, first, v)) for v in others]
      x = picked[0]._replace(max_abs=x.max_abs)
      position = chosen if position is None else picked[1]._replace(max_abs=position.max_abs)
    elif position is not None:
      chosen = _sum(build, product(build, *opened(build, [wins, build.local(grouped, position)])))
      position = chosen._replace(max_abs=position.max_abs)
    else:
      position = chosen
    n = groups
  if position is None:
    return build.local(lambda v: jnp.zeros(shape, v.dtype), x)._replace(scale=1.0, max_abs=0.0)
  return build.local(lambda v: v.reshape(shape), position)


def _winners(build: Builder, x: Value) -> Value:
  """[groups, size, ...]: a single 1 in each group, at the first of the largest."""
  size = x.shape[1]
  i, j = np.triu_indices(size, 1)
  pairs = build.local(lambda v: v[:, i] - v[:, j], x, max_abs=2 * x.max_abs)
  bits = build.sign(pairs)
  win = (i == np.arange(size)[:, None]).astype(np.int64) - (j == np.arange(size)[:, None])
  coefficients = jnp.asarray(win.astype(build.config.dtype))  # [size, pairs]
  rows = lambda b: jnp.stack(
    [
      (b * coefficients[r].reshape(1, -1, *[1] * (b.ndim - 2))).sum(1, dtype=b.dtype)
      for r in range(size)
    ],
    axis=1,
  )
  lost = (j == np.arange(size)[:, None]).sum(1)  # comparisons that the later of a pair wins by a 0
  wins = build.local(rows, bits, max_abs=float(size))
  level = (lost - (size - 1)).reshape(1, -1, *[1] * (len(x.shape) - 2)).astype(np.float64)
  return build.sign(build.add_public(wins, level)._replace(max_abs=float(size)))


def _sum(build: Builder, v: Value) -> Value:
  return build.local(lambda a: a.sum(1, dtype=a.dtype), v)
