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

from primia_jax import local
from primia_jax.tapped import Log, Tapped, Taps, Use, only_in_layers
from primia_jax.types import Array, Batch, Key, LossFn, Metrics, ModelState, Params, PyTree

_CACHE_BYTES = 2**22  # of gradients formed at once: more are slower
_UNROLLED = 8  # units, whose addition is unrolled
_TAPS_BYTES, _UNITS = 24 * 2**20, 32  # of what taps hold at once; more are hardly faster
_TINY = float(np.finfo(np.float32).tiny)
# of the largest that a norm from Gram matrices could be: above what float32 loses in summing them
_MARGIN = 1e-5


class UnitGradients(NamedTuple):
  """The gradients of m units.

  Attributes:
    squares: [m, L], the squared norm of each of the L leaves of the parameters.
    add: (total, factors [m, L], counts [m] bool) -> total plus the sum, over the units that count,
      of their gradients times factors; a unit that does not count adds exactly 0, whatever is in
      it.
    metrics: of each unit, [m].
  """

  squares: Array
  add: Callable[[PyTree, Array, Array], PyTree]
  metrics: Metrics


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
    return gradient, jnp.stack([_square(leaf) for leaf in jax.tree.leaves(gradient)]), metrics

  def run(params: Params, model_state: ModelState, rows: Batch, keys: Key) -> UnitGradients:
    num_units = rows.weights.shape[0]
    if num_units == 1:  # a convolution's own form, and not that of its `vmap`
      out = one(params, model_state, *jax.tree.map(lambda a: a[0], (rows, keys)))
      gradients, squares, metrics = jax.tree.map(lambda a: a[None], out)
    else:
      gradients, squares, metrics = jax.vmap(one, (None, None, 0, 0))(
        params, model_state, rows, keys
      )
    leaves, structure = jax.tree.flatten(gradients)

    def add(total: PyTree, factors: Array, counts: Array) -> PyTree:
      sums = jax.tree.leaves(total)
      for u in range(
        num_units
      ):  # in the units' order, so that the sum rounds alike however they are grouped
        sums = [
          s + jnp.where(counts[u], leaf[u] * factors[u, i], 0.0)
          for i, (s, leaf) in enumerate(zip(sums, leaves, strict=True))
        ]
      return jax.tree.unflatten(structure, sums)

    return UnitGradients(squares, add, metrics)

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
    As `explicit`, equal up to rounding. Squared norms from Gram matrices have 1e-5 of their largest
    possible value added, and what may be lost below float32's range, so that rounding makes no norm
    too small. While traced it raises a ValueError for a kernel with taps that is not used exactly
    once, or used in another way. A use in a loop, which tracing cannot count, makes all sums NaN,
    and so does an output without a gradient (`stop_gradient`).
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
    layers = [_layer(use, taps, w) for use, taps, w in zip(uses, of_taps, kernels, strict=True)]
    small = [(jax.vmap(_square)(g), functools.partial(_weighted, g)) for g in of_others]
    squares, sums = zip(*merge(layers, small), strict=True)

    def add(total: PyTree, factors: Array, counts: Array) -> PyTree:
      new = [weighted(factors[:, i], counts) for i, weighted in enumerate(sums)]
      return jax.tree.unflatten(
        jax.tree.structure(total), map(jnp.add, jax.tree.leaves(total), new)
      )

    return UnitGradients(jnp.stack(squares, axis=1), add, metrics)

  def fitting(params: Params, *args) -> int:
    num_bytes = sum(4 * leaf.size for use in uses_of(params, *args) for leaf in use.taps)
    return min(_UNITS, max(1, _TAPS_BYTES // max(num_bytes, 1)))

  return PerUnit(run, fitting)


def _layer(use: Use, taps: Taps, w: Array) -> tuple[Array, Callable[[Array, Array], Array]]:
  """The squared norms [m] of the gradients of one kernel, and how to sum them; taps have leading
  axes [m, R].
  """
  num_units = taps.uses.shape[0]
  merged = lambda a: a.reshape(-1, *a.shape[2:])
  rows, g = use.rows(merged(taps.x)), taps.g.reshape(num_units, -1, w.shape[-1])
  rows, g = rows.reshape(num_units, -1, rows.shape[-1]).astype(w.dtype), g.astype(w.dtype)
  (positions, fan_in), features = rows.shape[1:], w.shape[-1]
  once = jnp.where(jnp.all(taps.uses == 1), 1.0, jnp.nan)
  fewer_products = positions * (fan_in + features) < fan_in * features
  if positions == 1 or (
    fewer_products and 4 * num_units * fan_in * features > _CACHE_BYTES
  ):  # by Gram matrices
    gram = lambda a: jnp.einsum("mpk,mqk->mpq", a, a, precision=_precision())
    seen, sent = gram(rows), gram(g)
    of_x, of_g = (jnp.trace(a, axis1=1, axis2=2) for a in (seen, sent))
    rounded = np.float32(_MARGIN if positions > 1 else 0) * (of_x * of_g)
    # A product of two x or g below float32's range is taken for 0, which counts where the other's
    # are very large.
    lost = [np.float32(positions * n * _TINY) * a for n, a in ((features, of_x), (fan_in, of_g))]
    squares = jnp.maximum(jnp.sum(seen * sent, axis=(1, 2)), 0.0) + rounded + lost[0] + lost[1]

    def weighted(factors: Array, counts: Array) -> Array:
      x = merged(_where(counts, taps.x))
      with jax.default_matmul_precision("default" if jax.default_backend() == "cpu" else "highest"):
        pull = jax.vjp(lambda w: use.apply(x, w), w)[1]
        return pull(merged(_where(counts, _scaled(factors, taps.g))))[0] * once

    return squares, weighted
  gradients = jnp.einsum("mpk,mpo->mok", rows, g, precision=_precision())  # faster on CPU than mko
  return jax.vmap(_square)(
    gradients
  ), lambda *how: _weighted(gradients, *how).T.reshape(w.shape) * once


def _weighted(gradients: Array, factors: Array, counts: Array) -> Array:
  """The sum over units that count of gradients [m, ...] times factors [m]."""
  return jnp.sum(_where(counts, _scaled(factors, gradients)), axis=0)


def _scaled(factors: Array, a: Array) -> Array:
  return a * factors.reshape(-1, *(1,) * (a.ndim - 1))


def _where(counts: Array, a: Array) -> Array:
  """a [m, ...], with exactly 0 for units that do not count."""
  return jnp.where(counts.reshape(-1, *(1,) * (a.ndim - 1)), a, 0.0)


def _square(x: Array) -> Array:
  """The squared norm, summed within and then over rows so that float32 loses little of millions of
  terms.
  """
  return jnp.sum(jnp.sum(jnp.square(x.reshape(-1, x.shape[-1] if x.ndim > 1 else 1)), axis=1))


def _precision() -> lax.Precision | None:
  """Norms in full float32; on CPU products are so anyway, and asking for it misses XLA's
  fastest.
  """
  return None if jax.default_backend() == "cpu" else lax.Precision.HIGHEST
