"""JAX's look-ups of a number among public knots, written as comparisons with all knots at once.

For u, C and P see `functions.polynomials`. searchsorted and digitize are exact and take C rounds.
interp takes C rounds, and C + P for each end that it does not hold constant; its error is at most
u + 2 u max |slope|, and slopes are rounded to 2^-f of the steepest. What is not written out here,
such as knots with NaN, goes JAX's own way: a search step by step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.types import Array

_Function = Callable[[Array], Array]
_Probe = Callable[[np.ndarray], np.ndarray]


def written_out(eqn: Any, inputs: Sequence[Any]) -> Any:
  """The jaxpr of a look-up as a function of its one secret number, or None if it is none.

  Args:
    eqn: an equation that calls a function of JAX.
    inputs: its inputs, None for what is secret.
  """
  found = _LOOK_UPS.get(eqn.params.get("name"))
  tables = [np.asarray(v) for v in inputs if v is not None and np.ndim(v) == 1]
  usable = tables and all(v.size and np.all(np.isfinite(v)) for v in tables)
  if found is None or not usable or [v is None for v in inputs].count(True) != 1:
    return None
  (aval,) = (v.aval for v, x in zip(eqn.invars, inputs, strict=True) if x is None)
  fn = found(tables, functools.partial(_probed, eqn, inputs, aval))
  return None if fn is None else jax.make_jaxpr(fn)(aval)


def _searchsorted(tables: list[np.ndarray], probe: _Probe) -> _Function | None:
  """How many knots lie below a number, or at it on the side "right"."""
  knots = np.unique(tables[0])
  end = lambda v: max(1, 2 * abs(v))
  between = (knots[1:] + knots[:-1]) / 2
  between = np.concatenate([knots[:1] - end(knots[0]), between, knots[-1:] + end(knots[-1])])
  real = np.issubdtype(knots.dtype, np.floating)
  if real and not np.all((between[:-1] < knots) & (knots < between[1:])):
    return None
  # Asked in public, it tells its side, and what it makes of knots that are not in order.
  found = probe(np.concatenate([between, knots]))
  pieces, at = found[: len(between)], found[len(between) :]
  if not np.array_equal(at, pieces[1:]) and not np.array_equal(at, pieces[:-1]):
    return None
  reaches = jnp.greater_equal if np.array_equal(at, pieces[1:]) else jnp.greater

  def fn(x: Array) -> Array:
    wide = (1,) * x.ndim + (-1,)
    reached = reaches(x[..., None], knots.reshape(wide).astype(x.dtype)).astype(pieces.dtype)
    return (reached * np.diff(pieces).reshape(wide)).sum(-1, dtype=pieces.dtype) + pieces[0]

  return fn


def _interp(tables: list[np.ndarray], probe: _Probe) -> _Function | None:
  """Straight lines between knots, and what was asked for beyond them.

  Between knots k_i it adds up slopes times max(x - k_i, 0) - max(x - k_(i + 1), 0), which are never
  longer than a gap, so that slopes need few bits.
  """
  if len(tables) < 2 or len(tables[0]) < 2 or np.diff(tables[0]).min() <= 0:
    return None
  knots, values = (v.astype(np.float64) for v in tables[:2])
  slopes, reach = np.diff(values) / np.diff(knots), np.ptp(knots)
  ends = [knots[0] - 2 * reach, knots[0] - reach, knots[-1] + reach, knots[-1] + 2 * reach]
  found = probe(np.array(ends)).astype(np.float64)
  left, right = (found[1] - found[0]) / reach, (found[3] - found[2]) / reach
  jumps = np.array([found[1] + left * reach - values[0], found[2] - right * reach - values[-1]])
  jumps[np.abs(jumps) <= 1e-5 * (1 + np.abs(values).max())] = 0  # rounding

  def fn(x: Array) -> Array:
    wide = (1,) * x.ndim + (-1,)
    public = lambda v: np.asarray(v, x.dtype).reshape(wide)
    beyond = jnp.maximum(x[..., None] - public(knots), 0)
    inside = beyond[..., :-1] - beyond[..., 1:]
    out = (inside * public(slopes)).sum(-1) + np.asarray(values[0], x.dtype)
    first, last = (np.asarray(v, x.dtype) for v in (knots[0], knots[-1]))
    if left:
      out = out + jnp.minimum(x - first, 0) * np.asarray(left, x.dtype)
    if right:
      out = out + beyond[..., -1] * np.asarray(right, x.dtype)
    for outside, jump in zip((x < first, x > last), jumps.astype(x.dtype), strict=True):
      out = out + outside.astype(x.dtype) * jump if jump else out
    return out

  return fn


def _probed(eqn: Any, inputs: Sequence[Any], aval: Any, numbers: np.ndarray) -> np.ndarray:
  """The function itself at public numbers."""
  times = -(-len(numbers) // max(1, aval.size))
  rows = np.resize(numbers, (times, *aval.shape)).astype(aval.dtype)
  outputs = []
  with jax.ensure_compile_time_eval():
    for row in rows:
      filled = [jnp.asarray(row if v is None else v) for v in inputs]
      (out,) = eqn.primitive.bind(*filled, **eqn.params)
      outputs.append(np.asarray(out).reshape(-1))
  return np.concatenate(outputs)[: len(numbers)]


_LOOK_UPS: dict[str | None, Callable[[list[np.ndarray], _Probe], _Function | None]] = {
  "searchsorted": _searchsorted,
  "_interp": _interp,
}
