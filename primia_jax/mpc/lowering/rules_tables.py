"""Rules for JAX's look-ups of a secret number among public knots: one gate compares it with all."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import piecewise
from primia_jax.mpc.lowering.ownership import Lowering, Rule, is_secret
from primia_jax.mpc.lowering.program import Equation


def _searchsorted(low: Lowering, equation: Equation, inputs: list[Any]) -> Value:
  """How many knots lie below a number, or at it on the side "right". Exact; C rounds."""
  (x,), (knots,) = _told_apart(equation, inputs, 1)
  knots = np.unique(knots).astype(np.float64)
  between = np.concatenate([knots[:1] - 1, (knots[1:] + knots[:-1]) / 2, knots[-1:] + 1])
  # Asked in public, it also tells what it makes of knots that are not in order.
  found = _probed(equation, inputs, np.concatenate([between, knots]))
  pieces, at = found[: len(between)], found[len(between) :]
  x = low.value(x)
  units = knots / x.scale
  if np.array_equal(at, pieces[1:]):
    thresholds = np.ceil(units)
  elif np.array_equal(at, pieces[:-1]):
    thresholds = np.floor(units) + 1
  else:
    raise NotImplementedError(
      f"searchsorted at {equation.source}: sort the knots and thin them out"
    )
  out = piecewise.table(low.build, piecewise.steps(low.build, x, thresholds), pieces, 1.0)
  low.counts.add(out.number)
  return out


def _interp(low: Lowering, equation: Equation, inputs: list[Any]) -> Value:
  """Straight lines between knots, and what was asked for beyond them; error and rounds as
  `piecewise.lines`.
  """
  (x,), (knots, values) = _told_apart(equation, inputs, 2)
  knots, values = knots.astype(np.float64), values.astype(np.float64)
  gaps = np.diff(knots)
  if not len(gaps) or gaps.min() <= 0:
    raise NotImplementedError(f"interp at {equation.source}: use two or more ascending knots")
  reach = np.abs(knots).max() + gaps.max()
  probes = np.array(
    [knots[0] - 2 * reach, knots[0] - reach, knots[-1] + reach, knots[-1] + 2 * reach]
  )
  found = _probed(equation, inputs, probes).astype(np.float64)
  ends = (found[1] - found[0]) / reach, (found[3] - found[2]) / reach
  slopes = np.concatenate([ends[:1], np.diff(values) / gaps, ends[1:]])
  at = np.concatenate([probes[:1], knots[:-1], probes[3:]])
  heights = np.concatenate([found[:1], values[:-1], found[3:]])
  return piecewise.lines(low.build, low.value(x), knots, slopes, heights - slopes * at)


def _told_apart(equation: Equation, inputs: list[Any], num: int) -> tuple[list[Any], list[Any]]:
  """The secret inputs, and the public tables."""
  tables = [np.asarray(v) for v in inputs if not is_secret(v) and np.ndim(v) == 1][:num]
  if len(tables) < num or not all(v.size and np.all(np.isfinite(v)) for v in tables):
    raise NotImplementedError(f"{equation.name} at {equation.source}: use public, finite knots")
  return [v for v in inputs if is_secret(v)], tables


def _probed(equation: Equation, inputs: list[Any], probes: np.ndarray) -> np.ndarray:
  """The function itself at public numbers."""
  shape = equation.avals[0].shape
  size = max(1, int(np.prod(shape)))
  times = -(-len(probes) // size)
  rows = np.resize(probes, times * size).reshape(times, *shape)
  outputs = []
  with jax.ensure_compile_time_eval():
    for row in rows:
      filled = [jnp.asarray(row, jnp.float32) if is_secret(v) else jnp.asarray(v) for v in inputs]
      outputs.append(np.asarray(equation.bind(*filled)[0]).reshape(-1))
  return np.concatenate(outputs)[: len(probes)]


RULES: dict[str, Rule] = {"searchsorted": _searchsorted, "interp": _interp}
