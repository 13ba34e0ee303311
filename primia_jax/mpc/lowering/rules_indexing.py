"""Rules for reading and writing at positions.

Public positions cost no round. A read at a secret position is a product of a one-hot vector and the
table; a position out of bounds takes the nearest, unless the read fills in zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.lowering import rules_linear
from primia_jax.mpc.lowering.holders import Derived, Owned, is_secret
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation
from primia_jax.mpc.lowering.rules_linear import shape_of
from primia_jax.types import Array

_FILL = lax.GatherScatterMode.FILL_OR_DROP


def shared(build: Builder, array: Any, like: Value) -> Value:
  """A public array as shares; integers and truth values at scale 1."""
  scale = build.config.unit if jnp.issubdtype(np.asarray(array).dtype, jnp.floating) else 1.0
  zeros = build.local(lambda v: jnp.zeros(np.shape(array), v.dtype), like, max_abs=0.0)
  return build.add_public(zeros._replace(scale=scale), array)


# ---- reads at secret positions


def _gather(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """The rows of a table at whole numbers. C + P rounds for a shared position and table; a position
  or a table that its owner holds in the clear saves C or P; a public table costs P nothing.
  """
  table, indices = inputs
  if not is_secret(indices):
    return rules_linear.RULES["gather"](low, equation, inputs)
  params, numbers = equation.params, equation.params["dimension_numbers"]
  if len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
    raise NotImplementedError(
      f"gather at a secret position of several axes at {equation.source}; use sums of products "
      f"with jax.nn.one_hot(index, n), such as (x * one_hot).sum(-1)"
    )
  (axis,), sizes = numbers.start_index_map, params["slice_sizes"]
  num = shape_of(table)[axis] - sizes[axis] + 1
  depth = len(sizes) - len(numbers.collapsed_slice_dims)
  by_row = numbers._replace(offset_dims=tuple(range(1, depth + 1)))
  rows = lambda v: lax.gather(v, np.arange(num)[:, None], by_row, sizes, mode="clip")
  fills = params["mode"] == _FILL and params["fill_value"] == 0
  index = _mapped(low, indices, _first)
  out_shape = equation.avals[0].shape
  free = iter(range(len(out_shape) - depth))
  offsets = iter(range(len(out_shape) - depth, len(out_shape)))
  order = [next(offsets) if i in numbers.offset_dims else next(free) for i in range(len(out_shape))]
  return _lookup(low, equation, index, table, rows, num, not fills, order)


def _dynamic_slice(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """A slice whose start along one axis may be secret; rounds as `_gather`."""
  table, *starts = inputs
  secret = [i for i, v in enumerate(starts) if is_secret(v)]
  if not secret:
    return rules_linear.RULES["dynamic_slice"](low, equation, inputs)
  if len(secret) > 1:
    raise NotImplementedError(
      f"dynamic_slice at a secret position of several axes at {equation.source}; slice one axis "
      f"after the other"
    )
  (axis,), sizes = secret, equation.params["slice_sizes"]
  num = shape_of(table)[axis] - sizes[axis] + 1

  def rows(v: Array) -> Array:
    public = [0 if is_secret(s) else int(s) for s in starts]
    at = lambda j: [j if i == axis else s for i, s in enumerate(public)]
    return jnp.stack([lax.dynamic_slice(v, at(j), sizes) for j in range(num)])

  return _lookup(low, equation, starts[axis], table, rows, num, True, list(range(len(sizes))))


def _lookup(
  low: Lowering,
  equation: Equation,
  index: Any,
  table: Any,
  rows: Callable[[Array], Array],
  num: int,
  clip: bool,
  order: list[int],
) -> Any:
  """rows(table)[index], its axes in the given order.

  Args:
    low, equation: the read.
    index: [...] whole numbers below `num`.
    table: what is read.
    rows: table -> [num, ...].
    num: of rows.
    clip: whether a position out of bounds takes the nearest; else it gives zeros.
    order: of the result's axes, from those of the index followed by those of a row.
  """
  hot: Any = (
    _owned_one_hot(index, num, clip)
    if isinstance(index, Owned)
    else piecewise.one_hot(low.build, low.value(index), num, clip)
  )
  if not is_secret(table):
    return _public_lookup(low.build, low.value(hot), np.asarray(rows(jnp.asarray(table))), order)
  contracted = equation._replace(
    name="dot_general", params={"dimension_numbers": (((0,), (0,)), ((), ()))}
  )
  out = rules_linear.RULES["dot_general"](low, contracted, [hot, _mapped(low, table, rows)])
  return low.build.local(lambda v: lax.transpose(v, order), low.value(out))


def _public_lookup(build: Builder, hot: Value, rows: np.ndarray, order: list[int]) -> Value:
  """Exact up to the rounding of the table's numbers to the scale of activations."""
  if not np.all(np.isfinite(rows)):
    raise NotImplementedError(f"{build.place}: a table that is not finite; fill its gaps")
  scale = build.config.unit if np.issubdtype(rows.dtype, np.floating) else 1.0
  integers = np.rint(rows.astype(np.float64) / scale).astype(np.int64).astype(build.config.dtype)
  # Native products of whole numbers are slow, but need no rounding, and tables are small.
  read = lambda v: lax.transpose(jnp.tensordot(v, jnp.asarray(integers), ((0,), (0,))), order)
  out = build.local(read, hot._replace(scale=1.0))
  return out._replace(scale=scale, max_abs=float(np.abs(rows).max(initial=0)) + scale)


def _owned_one_hot(index: Owned, num: int, clip: bool) -> Owned:
  shape = (num, *index.shape)
  numbers = np.arange(num).reshape(-1, *[1] * len(index.shape))
  reachable = numbers <= jnp.iinfo(index.dtype).max

  def read(values: Any) -> Array:
    at = index.read(values)[None]
    at = jnp.clip(at, 0, num - 1) if clip else at
    return ((at == numbers.astype(at.dtype)) & reachable).astype(jnp.int32)

  return Owned(index.owner, read, shape, frozenset(range(len(shape))), 1.0, np.dtype(np.int32))


def _mapped(low: Lowering, v: Any, fn: Callable[[Array], Array]) -> Any:
  """A rearrangement of whatever holds a secret."""
  if not isinstance(v, Owned):
    return low.build.local(fn, low.value(v))
  shape = jax.eval_shape(fn, jax.ShapeDtypeStruct(v.shape, v.dtype)).shape
  everywhere = frozenset(range(len(shape)))
  return Owned(v.owner, Derived(fn, (v,)), shape, everywhere, v.bound, v.dtype)


def _first(v: Array) -> Array:
  return v[..., 0]


# ---- writes at public positions


def _dynamic_update_slice(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """No round."""
  x, update, *starts = inputs
  _refuse_secret(equation, starts)
  write = lambda base, v: lax.dynamic_update_slice(base, v, starts)
  return _replaced(low, equation, x, update, write)


def _scatter(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Replaces, adds, or multiplies; P + T rounds for secret factors, else none."""
  x, indices, updates = inputs
  _refuse_secret(equation, [indices])
  name, params = equation.name.replace("-", "_"), equation.params
  options = {"mode": params["mode"], "dimension_numbers": params["dimension_numbers"]}
  into = lambda fn: lambda base, v: fn(base, indices, v, **options)
  if name == "scatter":
    return _replaced(low, equation, x, updates, into(lax.scatter))
  add = into(lax.scatter_add)
  shape = equation.avals[0].shape
  count = _evaluated(add, jnp.zeros(shape), jnp.ones(shape_of(updates)))
  if name in ("scatter_add", "scatter_sub"):
    put = _written(low, updates, shape, add, float(count.max(initial=0)))
    return rules_linear.RULES["add" if name == "scatter_add" else "sub"](low, equation, [x, put])
  if is_secret(updates) and count.max(initial=0) > 1:
    raise NotImplementedError(
      f"{equation.name} of secret factors at equal positions at {equation.source}; multiply them "
      f"first"
    )
  factor: Any
  if is_secret(updates):
    factor = low.build.add_public(_written(low, updates, shape, add, 1.0), 1.0 - count)
  else:
    factor = _evaluated(into(lax.scatter_mul), jnp.ones(shape), jnp.asarray(updates, jnp.float64))
  return rules_linear.RULES["mul"](low, equation, [x, factor])


def _replaced(
  low: Lowering, equation: Equation, x: Any, update: Any, write: Callable[[Array, Array], Array]
) -> Any:
  """x, with an update written over it."""
  shape = equation.avals[0].shape
  kept = 1.0 - _evaluated(write, jnp.zeros(shape), jnp.ones(shape_of(update)))
  put = _written(low, update, shape, write, 1.0)
  if not is_secret(x):
    return low.build.add_public(put, np.asarray(x, np.float64) * kept)
  x, mask = low.value(x), jnp.asarray(kept.astype(low.build.config.dtype))
  rest = low.build.local(lambda v: v * mask, x)
  if not isinstance(put, Value):
    return low.build.add_public(rest, put)
  return low.build.add(rest, put)._replace(max_abs=max(x.max_abs, put.max_abs))


def _written(
  low: Lowering, update: Any, shape: tuple[int, ...], write: Callable, terms: float
) -> Any:
  """An update written over zeros."""
  if not is_secret(update):
    return _evaluated(write, jnp.zeros(shape, jnp.float64), jnp.asarray(update, jnp.float64))
  v = low.value(update)
  return low.build.local(
    lambda v: write(jnp.zeros(shape, v.dtype), v), v, max_abs=v.max_abs * terms
  )


def _evaluated(write: Callable[[Array, Array], Array], base: Array, update: Array) -> np.ndarray:
  with jax.ensure_compile_time_eval():
    return np.asarray(write(base, update.astype(base.dtype)), np.float64)


def _refuse_secret(equation: Equation, positions: list[Any]) -> None:
  if any(is_secret(v) for v in positions):
    instead = (
      "a sum of jax.nn.one_hot(index, n) times each update"
      if equation.name.startswith("scatter-")
      else "jnp.where(jnp.arange(n) == index, value, x)"
    )
    raise NotImplementedError(
      f"{equation.name} at a secret position at {equation.source}; use {instead}"
    )


RULES: dict[str, Rule] = {
  "gather": _gather,
  "dynamic_slice": _dynamic_slice,
  "dynamic_update_slice": _dynamic_update_slice,
}
RULES |= {
  name: _scatter
  for name in ("scatter", "scatter-add", "scatter-sub", "scatter_sub", "scatter-mul", "scatter_mul")
}
