"""Norms and weighted sums of single units' gradients, with or without forming those gradients.

`explicit` forms each unit's gradient, whatever the model. `bookkept` runs forward and backward once
for all units together. For each large kernel it keeps the layer's inputs and the gradients of its
outputs, which determine the norm of each unit's gradient and any weighted sum (Bu et al. 2023,
"Differentially private optimization on large model at small cost", section 4; norms from Gram
matrices: Goodfellow 2015, arXiv 1510.01799, and Bu et al. 2022, arXiv 2205.10683). This takes
hardly longer than training without privacy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import local, native, prng
from primia_jax.privacy import grid
from primia_jax.privacy.grid import Grid
from primia_jax.tapped import Log, Tapped, Taps, Use, only_in_layers
from primia_jax.types import Array, Batch, Key, LossFn, Metrics, ModelState, Params, PyTree

_CACHE_BYTES = 2**22  # of gradients formed at once: more are slower
_UNROLLED = 8  # units, whose addition is unrolled
_TAPS_BYTES, _UNITS = 24 * 2**20, 32  # of what taps hold at once; more are hardly faster
_WIDE = 32  # numbers of a row that `native.products` takes at once
_TINY = float(np.finfo(np.float32).tiny)


class UnitGradients(NamedTuple):
  """The gradients of m units.

  Attributes:
    squares: [m, L], an upper bound of the squared norm of each of the L leaves of the parameters,
      however large or small the numbers are; not finite where a unit's gradient has none.
    add: (total of int32, factors [m, L], counts [m] bool, grid) -> total plus, for each unit that
      counts, its gradient times factors, rounded to integers; a unit that does not count adds
      exactly 0, whatever is in it, and no unit changes what another adds.
    metrics: of each unit, [m].
    sound: float32, 1; NaN where taps missed part of a gradient.
  """

  squares: Array
  add: Callable[[PyTree, Array, Array, Grid], PyTree]
  metrics: Metrics
  sound: Array


class PerUnit(NamedTuple):
  """How units' gradients are formed.

  Attributes:
    gradients: (params, model_state, rows [m, R, ...], keys [m]) -> UnitGradients.
    fitting: (params, model_state, rows [R, ...] of one unit, key) -> the m that is best for time
      within reasonable memory; traces only.
  """

  gradients: Callable[[Params, ModelState, Batch, Key], UnitGradients]
  fitting: Callable[[Params, ModelState, Batch, Key], int]


def explicit(loss_fn: LossFn) -> PerUnit:
  """Forms each unit's gradient, in the memory of m gradients."""
  gradient_fn = local.gradients(loss_fn)

  def one(params: Params, model_state: ModelState, rows: Batch, key: Key):
    gradient, (_, metrics) = gradient_fn(params, model_state, rows, key)
    return gradient, metrics

  def run(params: Params, model_state: ModelState, rows: Batch, keys: Key) -> UnitGradients:
    num_units = rows.weights.shape[0]
    if num_units == 1:  # a convolution's own form, and not that of its `vmap`
      out = one(params, model_state, *jax.tree.map(lambda a: a[0], (rows, keys)))
      gradients, metrics = jax.tree.map(lambda a: a[None], out)
    else:
      gradients, metrics = jax.vmap(one, (None, None, 0, 0))(params, model_state, rows, keys)
    # The compiler could else form a gradient anew, and round it otherwise, for its norm and for the
    # sum, and where much cancels these would be of different vectors.
    gradients = jax.tree.map(native.settled, gradients)
    squares = jnp.stack([jax.vmap(grid.square)(g) for g in jax.tree.leaves(gradients)], axis=1)
    add = _adding([functools.partial(_add_held, g) for g in jax.tree.leaves(gradients)])
    return UnitGradients(squares, add, metrics, jnp.ones((), jnp.float32))

  def fitting(params: Params, *_) -> int:
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    return min(_UNROLLED, max(1, _CACHE_BYTES // max(size, 1)))

  return PerUnit(run, fitting)


def bookkept(loss_fn: LossFn, has_taps: Callable[[Params], PyTree]) -> PerUnit:
  """Forms gradients of a kernel with taps only where that is faster than norms from Gram matrices.

  It takes the memory of m units' activations, and of what kernels see of them at all positions: for
  a kernel of 3 x 3, nine times its input.

  Args:
    loss_fn: its model uses each kernel that has taps once, by `conv` or `dense`, and the others in
      any way.
    has_taps: parameters -> bools in their structure, True for large kernels.

  Returns:
    As `explicit`, equal up to rounding. While traced it raises a ValueError for a kernel with taps
    that is not used exactly once, or used in another way. A use in a loop, which tracing cannot
    count, makes `sound` NaN, and so does an output without a gradient (`stop_gradient`).
  """

  def split(
    params: Params,
  ) -> tuple[list[Array], list[Array], Callable[[Sequence, Sequence], list]]:
    """The kernels with taps, the other leaves, and what merges two such lists into a list of
    leaves.
    """
    flags = jax.tree.leaves(has_taps(params))
    leaves = jax.tree.leaves(params)
    kernels, others = (
      [a for a, flag in zip(leaves, flags, strict=True) if bool(flag) == w] for w in (True, False)
    )

    def merge(of_kernels: Sequence, of_others: Sequence) -> list:
      left = iter(of_kernels), iter(of_others)
      return [next(left[0 if flag else 1]) for flag in flags]

    return kernels, others, merge

  def uses_of(params: Params, *args) -> list[Use]:
    kernels, others, merge = split(params)
    join = lambda ws, others: jax.tree.unflatten(jax.tree.structure(params), merge(ws, others))
    logs = [Log() for _ in kernels]
    tapped = lambda ws: [Tapped(w, None, log) for w, log in zip(ws, logs, strict=True)]
    loss = lambda ws, others, *args: only_in_layers(
      lambda ws: loss_fn(join(tapped(ws), others), *args)[0], ws
    )
    jax.eval_shape(loss, kernels, others, *args)
    for w, log in zip(kernels, logs, strict=True):
      if len(log.uses) != 1:
        raise ValueError(
          f"a kernel {list(w.shape)} with taps is used {len(log.uses)} times in the loss, where it "
          f"must be once"
        )
    return [log.uses[0] for log in logs]

  def run(params: Params, model_state: ModelState, rows: Batch, keys: Key) -> UnitGradients:
    kernels, others, merge = split(params)
    join = lambda ws, others: jax.tree.unflatten(jax.tree.structure(params), merge(ws, others))
    uses = uses_of(params, model_state, *jax.tree.map(lambda a: a[0], (rows, keys)))
    num_units = rows.weights.shape[0]

    def unit(others: list, taps: list[Taps], rows: Batch, key: Key):
      tapped = [Tapped(w, t, Log()) for w, t in zip(kernels, taps, strict=True)]
      loss, (_, metrics) = loss_fn(join(tapped, others), model_state, rows, key)
      return loss, metrics

    def total(others: list, taps: list[Taps]):
      losses, metrics = jax.vmap(unit)(others, taps, rows, keys)
      return jnp.sum(losses), metrics

    each = lambda a: jnp.broadcast_to(a, (num_units, *a.shape))
    zeros = [
      jax.tree.map(lambda s: jnp.zeros((num_units, *s.shape), s.dtype), use.taps) for use in uses
    ]
    (of_others, of_taps), metrics = jax.grad(total, argnums=(0, 1), has_aux=True)(
      list(map(each, others)), zeros
    )
    of_others, of_taps = jax.tree.map(native.settled, (of_others, of_taps))  # as in `explicit`
    layers = [_layer(use, taps, w) for use, taps, w in zip(uses, of_taps, kernels, strict=True)]
    small = [(jax.vmap(grid.square)(g), functools.partial(_add_held, g)) for g in of_others]
    squares, sums = zip(*merge(layers, small), strict=True)
    sound = jnp.all(jnp.stack([jnp.all(taps.uses == 1) for taps in of_taps] or [jnp.bool_(True)]))
    sound = jnp.where(sound, 1.0, jnp.nan)
    return UnitGradients(jnp.stack(squares, axis=1), _adding(sums), metrics, sound)

  def fitting(params: Params, *args) -> int:
    num_bytes = sum(4 * leaf.size for use in uses_of(params, *args) for leaf in use.taps)
    return min(_UNITS, max(1, _TAPS_BYTES // max(num_bytes, 1)))

  return PerUnit(run, fitting)


def rounded_products(x: Array, g: Array, factors: Array) -> Array:
  """The sum over units of factors[m] x[m]^T g[m], each rounded to integers first.

  Args:
    x: [m, P, K] float32.
    g: [m, P, O] float32.
    factors: [m] float32; a unit of factor 0 adds exactly 0, whatever is in it.

  Returns:
    [K, O] int32. On CPU no product is stored; elsewhere one at a time.
  """

  def plain(x: Array, g: Array, factors: Array) -> Array:
    def body(u: Array, total: Array) -> Array:
      product = jnp.einsum("pk,po->ko", x[u], g[u], precision=_precision())
      return total + jnp.where(factors[u] != 0, grid.rounded(product, factors[u]), 0)

    varying = prng.varying_zero(x, g, factors).astype(jnp.int32)
    nothing = jnp.zeros((x.shape[-1], g.shape[-1]), jnp.int32) + varying
    return lax.fori_loop(0, factors.shape[0], body, nothing)

  if not native.available():
    return plain(x, g, factors)
  compiled = lambda *args: native.products(*args) | prng.varying_zero(*args).astype(jnp.int32)
  return lax.platform_dependent(x, g, factors, cpu=compiled, default=plain)


def _layer(
  use: Use, taps: Taps, w: Array
) -> tuple[Array, Callable[[Array, Array, Array, Grid], Array]]:
  """Bounds of the squared norms [m] of one kernel's gradients, and what adds these to a total; taps
  have leading axes [m, R].
  """
  num_units = taps.uses.shape[0]

  def rows_of(x: Array) -> Array:
    rows = use.rows(x.reshape(-1, *x.shape[2:]))
    return rows.reshape(num_units, -1, rows.shape[-1]).astype(w.dtype)

  rows, g = rows_of(taps.x), taps.g.reshape(num_units, -1, w.shape[-1]).astype(w.dtype)
  (positions, fan_in), features = rows.shape[1:], w.shape[-1]
  fewer_products = positions * (fan_in + features) < fan_in * features
  if positions == 1 or (
    fewer_products and 4 * num_units * fan_in * features > _CACHE_BYTES
  ):  # by Gram matrices
    squares = _squares_by_gram(rows, g)

    def add(total: Array, factors: Array, counts: Array, _: Grid) -> Array:
      # The rows are made again: until all norms are known, those of all layers would take much
      # memory.
      again = rows_of(jnp.where(counts.reshape(-1, *(1,) * (taps.x.ndim - 1)), taps.x, 0.0))
      own = jnp.where(counts, factors, 0.0)
      if features < _WIDE <= fan_in:  # the kernel is fast along its second factor
        return total + rounded_products(g, again, own).T.reshape(total.shape)
      return total + rounded_products(again, g, own).reshape(total.shape)

    return squares, add
  # faster on CPU than mko
  gradients = native.settled(jnp.einsum("mpk,mpo->mok", rows, g, precision=_precision()))
  turned = lambda total: total.reshape(fan_in, features).T
  return jax.vmap(grid.square)(gradients), lambda total, *how: _add_held(
    gradients, turned(total), *how
  ).T.reshape(total.shape)


def _squares_by_gram(rows: Array, g: Array) -> Array:
  """Upper bounds [m] of |rows[m]^T g[m]|^2, from rows [m, P, K] and g [m, P, O].

  The exact value is sum_pq (x_p . x_q) (g_p . g_q). Float32 changes it by at most (K + O + P^2 + 4)
  `EPS` times (sum_p |x_p| |g_p|)^2, to first order and in any order of the sums (Higham 2002,
  section 3.1). What adds the gradients up forms rows^T g itself, with an error of norm P `EPS`
  times that sum. Twice both are added, so that rounding makes no norm too small; without much
  cancellation between positions it is a thousandth at most. A product of two x or g below float32's
  range is taken for 0, which counts where the other's are very large.
  """
  (positions, fan_in), features = rows.shape[1:], g.shape[-1]
  gram = lambda a: jnp.einsum("mpk,mqk->mpq", a, a, precision=_precision())
  diagonal = lambda a: jnp.diagonal(a, axis1=1, axis2=2)
  seen, sent = gram(rows), gram(g)
  largest = jnp.sum(jnp.sqrt(diagonal(seen)) * jnp.sqrt(diagonal(sent)), axis=1)
  terms = fan_in + features + positions**2 + 4 * positions + 16
  lost = [
    np.float32(positions * n * _TINY) * jnp.sum(diagonal(a), axis=1)
    for n, a in ((features, seen), (fan_in, sent))
  ]
  exact = jnp.maximum(jnp.sum(seen * sent, axis=(1, 2)), 0.0)
  return exact + np.float32(2 * terms * grid.EPS) * jnp.square(largest) + lost[0] + lost[1]


def _adding(sums: Sequence[Callable]) -> Callable:
  """`UnitGradients.add` of what adds to each leaf."""

  def add(total: PyTree, factors: Array, counts: Array, on: Grid) -> PyTree:
    leaves, structure = jax.tree.flatten(total)
    pairs = enumerate(zip(leaves, sums, strict=True))
    return jax.tree.unflatten(structure, [f(a, factors[:, i], counts, on) for i, (a, f) in pairs])

  return add


def _add_held(gradients: Array, total: Array, factors: Array, counts: Array, on: Grid) -> Array:
  return total + grid.summed(gradients, factors, counts, on)


def _precision() -> lax.Precision | None:
  """Norms in full float32; on CPU products are so anyway, and asking for it misses XLA's
  fastest.
  """
  return None if jax.default_backend() == "cpu" else lax.Precision.HIGHEST
