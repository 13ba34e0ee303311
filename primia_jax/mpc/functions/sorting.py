"""Order of shared numbers along an axis. For C and P see `polynomials`.

Up to `_ALL_PAIRS` numbers are compared pair by pair, all at once: the comparisons that a number
wins are its rank, which makes a permutation matrix. More of them go through Batcher's network of
odd-even merges, whose numbers of comparisons and rounds grow with n log(n)^2 and log(n)^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.functions.polynomials import opened, product

_ALL_PAIRS = 16


def sort(build: Builder, operands: Sequence[Value], axis: int) -> list[Value]:
  """All operands in ascending order of the first along an axis; equal ones keep theirs. Exact.

  n <= 16: 2 C + P rounds. Else p (p + 1) / 2 times C rounds for one operand, C + P for several,
  with p = ceil(log2(n)); then p bits more are compared.
  """
  moved = [build.local(lambda v: jnp.moveaxis(v, axis, 0), x) for x in operands]
  n = moved[0].shape[0]
  if n <= 1:
    return list(operands)
  if n <= _ALL_PAIRS:
    out = _permuted(build, moved, _ranks(build, moved[0]), n)
  elif len(moved) == 1:
    out = [_network(build, moved[0])]
  else:
    out = _network_of_rows(build, moved)
  return [build.local(lambda v: jnp.moveaxis(v, 0, axis), v) for v in out]


def largest(build: Builder, x: Value, num: int, axis: int) -> tuple[Value, Value]:
  """The `num` largest along an axis, in descending order, and their positions; the first of equals.

  Rounds as `sort`.
  """
  x = build.negate(build.local(lambda v: jnp.moveaxis(v, axis, 0), x))
  n = x.shape[0]
  numbers = np.broadcast_to(np.arange(n).reshape(-1, *[1] * (len(x.shape) - 1)), x.shape)
  positions = build.add_public(
    build.local(jnp.zeros_like, x)._replace(scale=1.0, max_abs=0.0), numbers
  )
  if 1 < n <= _ALL_PAIRS:
    values, places = _permuted(build, [x, positions], _ranks(build, x), num)
  else:
    values, places = (build.local(lambda v: v[:num], v) for v in sort(build, [x, positions], 0))
  back = lambda v: build.local(lambda v: jnp.moveaxis(v, 0, axis), v)
  return back(build.negate(values)), back(places)


# ---- all pairs


def _ranks(build: Builder, x: Value) -> Value:
  """[n, ...]: how many others come before each number. C rounds, n (n - 1) / 2 comparisons."""
  n = x.shape[0]
  first, second = np.triu_indices(n, 1)
  later = build.sign(build.local(lambda v: v[second] - v[first], x, max_abs=2 * x.max_abs))
  # The second of a pair counts the first where it is not smaller; the first counts the rest.
  side = lambda i: (np.arange(n)[:, None] == i).astype(np.int64)
  signs = jnp.asarray((side(second) - side(first)).astype(build.config.dtype))

  def total(bits):
    shaped = signs.reshape(n, -1, *[1] * (bits.ndim - 1))
    return jnp.stack([(bits * shaped[i]).sum(0, dtype=bits.dtype) for i in range(n)])

  won = build.local(total, later, max_abs=float(n))
  constant = side(first).sum(1).reshape(-1, *[1] * (len(x.shape) - 1)).astype(np.float64)
  return build.add_public(won, constant)._replace(max_abs=float(n))


def _permuted(build: Builder, operands: Sequence[Value], ranks: Value, num: int) -> list[Value]:
  """The first `num` rows by rank. C + P rounds, n x num comparisons of few bits."""
  chosen = piecewise.one_hot(build, ranks, num, clip=num == ranks.shape[0])  # [num, n, ...]
  chosen, *rows = opened(build, [chosen, *operands])
  out = []
  for x in rows:
    spread = build.local(lambda v: jnp.broadcast_to(v, (num, *v.shape)), x)
    picked = build.local(lambda v: v.sum(1, dtype=v.dtype), product(build, chosen, spread))
    out.append(picked._replace(max_abs=x.max_abs))
  return out


# ---- a network


def exchanges(n: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Batcher's odd-even merge sort of n numbers: for each step, the pairs (i, j), i < j, of which i
  gets the smaller number.
  """
  out, p = [], 1
  while p < n:
    k = p
    while k >= 1:
      pairs = [
        (i + j, i + j + k)
        for j in range(k % p, n - k, 2 * k)
        for i in range(min(k, n - j - k))
        if (i + j) // (2 * p) == (i + j + k) // (2 * p)
      ]
      out.append(tuple(np.array(pairs).T))
      k //= 2
    p *= 2
  return out


def _network(build: Builder, x: Value) -> Value:
  for first, second in exchanges(x.shape[0]):
    excess = build.positive_part(
      build.local(lambda v, i=first, j=second: v[i] - v[j], x, max_abs=2 * x.max_abs)
    )
    swap = lambda v, e, i=first, j=second: v.at[i].add(v.dtype.type(0) - e).at[j].add(e)
    x = build.local(swap, x, excess, max_abs=x.max_abs)
  return x


def _network_of_rows(build: Builder, operands: Sequence[Value]) -> list[Value]:
  """As `_network`, with other operands in tow."""
  key, n = operands[0], operands[0].shape[0]
  factor = 1 << (n - 1).bit_length()  # equal keys differ by their numbers
  numbers = np.arange(n, dtype=np.int64).reshape(-1, *[1] * (len(key.shape) - 1))
  grown = build.local(lambda v: v * v.dtype.type(factor), key)
  grown = grown._replace(scale=key.scale / factor)
  rows = [build.add_public(grown, numbers * grown.scale), *operands]
  for first, second in exchanges(n):
    differences = [
      build.local(lambda v, i=first, j=second: v[i] - v[j], x, max_abs=2 * x.max_abs) for x in rows
    ]
    bit, *apart = opened(build, [build.sign(differences[0]), *differences])
    excesses = [product(build, bit, d) for d in apart]
    swap = lambda v, e, i=first, j=second: v.at[i].add(v.dtype.type(0) - e).at[j].add(e)
    rows = [build.local(swap, x, e, max_abs=x.max_abs) for x, e in zip(rows, excesses, strict=True)]
  return rows[1:]
