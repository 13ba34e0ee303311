"""Masks: numbers so low (-10,000 or less, such as -1e9 or minus infinity) that exp gives 0.

Fixed point has no room for them beside others, and a maximum or an exponential that follows does
not need them. Where the mask is public, maxima run over the other entries, and exp gives exactly 0
at the masked ones. Where it is secret, masked entries go only so far below the calibrated least of
the others that exp gives exactly 0. A row that is masked wholly, by one finite number, has a
uniform softmax as in JAX. Masked wholly by minus infinity it has NaN there: a public mask is then
refused; a secret one cannot be, and gives the uniform softmax. Whatever else reads a masked value
takes the numbers as they are, or is refused if they are infinite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.functions import extrema
from primia_jax.mpc.lowering.holders import LOW, Derived, Masked, Owned, is_low, is_real, is_secret
from primia_jax.mpc.lowering.masks import Step, is_finite, is_hidden, level, limit, lowered, zeroed
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation, Ref
from primia_jax.types import Array


def rules(base: Mapping[str, Rule]) -> dict[str, Rule]:
  """The rules of all primitives, with masks."""
  return {name: functools.partial(_lower, rule=rule) for name, rule in base.items()}


def _lower(low: Lowering, equation: Equation, inputs: list[Any], rule: Rule) -> Any:
  if equation.name == "select_n" and not is_secret(inputs[0]):
    # What is not chosen does not matter, be it infinite.
    chosen = np.asarray(inputs[0])
    cases = enumerate(inputs[1:])
    inputs = [chosen, *(np.where(chosen == i, v, 0) if is_real(v) else v for i, v in cases)]
  step, special = Step(low, equation, inputs, rule), _RULES.get(equation.name)
  out = special(step) if special else None
  return step.plain() if out is None else out


def _masks(v: Any) -> bool:
  return isinstance(v, Masked) or is_low(v)


# ---- what rearranges or chooses


def _move(step: Step) -> Any:
  """Rearrangements, and choices by a public condition: the mask goes the same way."""
  low, inputs = step.low, step.inputs
  if not any(map(_masks, inputs)):
    return None
  # Padding by minus infinity that only maxima read has a rule of its own.
  pooled = step.equation.name == "pad" and step.equation.outputs[0].number in low.pools
  if pooled and not isinstance(inputs[0], Masked) and np.isneginf(np.asarray(inputs[1])):
    return None
  if any(map(is_hidden, inputs)):
    return _move_hidden(step)
  parts = [step.part(i) if is_secret(v) or is_real(v) else None for i, v in enumerate(inputs)]
  pick = lambda get: [v if p is None else get(p) for p, v in zip(parts, inputs, strict=True)]
  outs = _listed(step.run(pick(lambda p: p.x)))
  keeps = _listed(step.public(pick(lambda p: p.keep.astype(np.float32))))
  where_masked = lambda p, v: np.where(p.keep, 0.0, v).astype(np.float32)
  fills = _listed(step.public(pick(lambda p: where_masked(p, p.fill))))
  doubts = _listed(step.public(pick(lambda p: where_masked(p, p.doubt))))
  return [
    step.masked(low.value(x), keep != 0, fill, doubt, i)
    for i, (x, keep, fill, doubt) in enumerate(zip(outs, keeps, fills, doubts, strict=True))
  ]


def _move_hidden(step: Step) -> Any:
  sources = [v for v in step.inputs if is_hidden(v)]
  top = max(v.top for v in sources)
  data = [i for i, v in enumerate(step.inputs) if is_secret(v) or is_real(v)]
  origin = sources[0].origin if len(data) == 1 else object()
  bound = max(step.bound(i) for i in data)
  outs = step.run([step.levelled(i, top) if i in data else v for i, v in enumerate(step.inputs)])
  return [
    step.hidden(step.low.value(x), top, bound, origin, i) for i, x in enumerate(_listed(outs))
  ]


def _listed(v: Any) -> list[Any]:
  return v if isinstance(v, list) else [v]


def _convert(step: Step) -> Any:
  real = jnp.issubdtype(step.equation.params["new_dtype"], jnp.floating)
  return _move(step) if real else None


def _select(step: Step) -> Any:
  """A choice by a secret condition hides the mask."""
  bit, *cases = step.inputs
  if not is_secret(bit):
    return _move(step)
  numbers = range(1, len(step.inputs))
  bound = max(step.bound(i) for i in numbers) if any(map(_masks, cases)) else math.inf
  if math.isinf(bound):
    return None
  least = level(step.low, bound)
  sources = [v for v in cases if is_hidden(v)]
  x = step.value([bit, *(step.levelled(i, least) for i in numbers)])
  x = x._replace(max_abs=min(x.max_abs, max([-least, *(v.x.max_abs for v in sources)])))
  return step.hidden(x, max([least, *(v.top for v in sources)]), bound, object())


# ---- arithmetic


def _add(step: Step) -> Any:
  a, b = step.inputs
  if (out := _add_owned(step)) is not None:
    return out
  if not (_masks(a) or _masks(b)):
    return None
  minus = step.equation.name == "sub"
  if is_hidden(a) or is_hidden(b):
    return _add_hidden(step, minus)
  p, q = step.part(0), step.part(1)
  keep, both = p.keep & q.keep, ~p.keep & ~q.keep
  with np.errstate(invalid="ignore"):
    fill = p.fill - q.fill if minus else p.fill + q.fill
  doubt = p.doubt + q.doubt
  if minus and np.any(np.isnan(fill)):
    raise NotImplementedError(
      f"a row that is masked wholly by minus infinity gives NaN at {step.equation.source}; mask by "
      f"a finite number such as -1e9"
    )
  if minus and (np.any(p.keep & ~q.keep) or np.any(both & (doubt != 0))):
    return None
  again = both & (fill > LOW)  # a difference of two masked numbers is a number like any other
  x = zeroed(step.low, step.value([p.x, q.x]), keep)
  if np.any(again):
    x = step.low.build.add_public(x, np.where(again, fill, 0.0))
  keep = keep | again
  return step.masked(x, keep, fill, doubt)


def _add_hidden(step: Step, minus: bool) -> Any:
  """What is secretly masked plus a number, or minus its own maximum."""
  low, (first, second) = step.low, (0, 1) if is_hidden(step.inputs[0]) else (1, 0)
  a, b = step.inputs[first], step.inputs[second]
  own = isinstance(b, Masked) and b.origin == (a.origin,)
  if minus and (first == 1 or (_masks(b) and not own)):
    return None
  if not minus and isinstance(b, Masked):
    return None
  bound, other = a.bound, step.bound(second)
  least = level(low, 2 * bound + other)  # for what the second masks in public
  inputs = [a.x, step.levelled(second, least)]
  x = step.value(inputs if first == 0 else inputs[::-1])
  top = max(a.top + other, bound + least) if is_low(b) else a.top + other
  return step.hidden(x, top, bound + other, a.origin)


def _add_owned(step: Step) -> Any:
  """A mask that one party adds, as numbers of -10,000 or less: it lifts them to what suffices."""
  low, owned = step.low, [isinstance(v, Owned) for v in step.inputs]
  if step.equation.name == "sub" or sum(owned) != 1:
    return None
  i = owned.index(True)
  b, ref, a = step.inputs[i], step.equation.inputs[i], step.inputs[1 - i]
  planned = low.bound(ref) if isinstance(ref, Ref) else math.inf
  if not -LOW <= planned < math.inf or not is_secret(a) or is_hidden(a):
    return None
  bound = step.bound(1 - i)
  if math.isinf(bound):
    return None
  least = level(low, 2 * bound - LOW)
  x = low.build.broadcast(low.value(step.levelled(1 - i, least + LOW)), step.shape)
  x = step.value([x, b._replace(read=Derived(_lifted, (b,), (least,)))])
  return step.hidden(x._replace(max_abs=bound - least - LOW), bound + least, bound - LOW, object())


def _lifted(v: Array, least: float) -> Array:
  return jnp.where(v <= LOW, least, v)


def _scale(step: Step) -> Any:
  """Products with, and quotients by, positive public numbers."""
  a, b = step.inputs
  if step.equation.name == "mul" and not isinstance(a, Masked):
    a, b = b, a
  if not isinstance(a, Masked) or not is_real(b) or not np.all(np.asarray(b) > 0):
    return None
  factor = np.asarray(b, np.float64)
  factor = 1 / factor if step.equation.name == "div" else factor
  x = step.value([a.x if v is a else v for v in step.inputs])
  most = float(factor.max())
  if a.keep is None:
    return step.hidden(x, a.top * float(factor.min()), a.bound * most, a.origin)
  keep = np.broadcast_to(a.keep, step.shape)
  return step.masked(x, keep, a.fill * factor, a.spread * factor)


def _exp(step: Step) -> Any:
  low, (a,) = step.low, step.inputs
  if not isinstance(a, Masked) or not a.top <= -limit(low):
    return None
  if a.keep is None:
    return step.run([a.x])
  # What is low already cannot leave the range of exp.
  x = lowered(low, a.x, a.keep, -min(a.x.max_abs, limit(low)))
  return zeroed(low, step.value([x]), a.keep)


# ---- maxima and comparisons


def _reduce_max(step: Step) -> Any:
  """Over what is not masked: each row has it in front, and repeats the first."""
  low, (a,) = step.low, step.inputs
  if not isinstance(a, Masked):
    return None
  if a.keep is None:
    below = a.top <= -a.bound
    return step.hidden(step.value([a.x]), a.top, a.bound, (a.origin,)) if below else None
  axes = tuple(sorted(step.equation.params["axes"]))
  last = tuple(range(len(step.shape), len(a.shape)))
  keep = np.moveaxis(a.keep, axes, last).reshape(*step.shape, -1)
  counts = keep.sum(-1, keepdims=True)
  places = np.argsort(~keep, axis=-1, kind="stable")[..., : max(1, int(counts.max(initial=0)))]
  places = np.where(np.arange(places.shape[-1]) < counts, places, places[..., :1])
  rows = lambda v: jnp.moveaxis(v, axes, last).reshape(keep.shape)
  taken = lambda v: jnp.take_along_axis(rows(v), places, axis=-1)
  x = extrema.tournament(
    low.build, low.build.local(taken, a.x, shape=places.shape), len(step.shape)
  )
  fill = np.where(a.keep, -np.inf, a.fill).max(axes)
  return step.masked(x, counts[..., 0] > 0, fill, a.spread.max(axes))


def _argmax(step: Step) -> Any:
  low, (a,) = step.low, step.inputs
  if not isinstance(a, Masked) or a.keep is None or a.spread.any():
    return None
  axes = step.equation.params["axes"]
  least, most = np.where(a.keep, np.inf, a.fill), np.where(a.keep, -np.inf, a.fill)
  if np.any((least.min(axes) < most.max(axes)) & ~a.keep.any(axes)):
    return None
  return step.run([lowered(low, a.x, a.keep, -1.5 * low.least(a.x))])


def _window_max(step: Step) -> Any:
  low, (a,) = step.low, step.inputs
  if not isinstance(a, Masked) or a.keep is None:
    return None
  keep = np.asarray(step.public([a.keep.astype(np.float32)]) > 0)
  fill = step.public([np.where(a.keep, -np.inf, a.fill).astype(np.float32)])
  x = zeroed(low, step.value([lowered(low, a.x, a.keep, -low.least(a.x))]), keep)
  return step.masked(x, keep, fill, np.full(keep.shape, a.spread.max()))


def _max(step: Step) -> Any:
  """With a public number: one that is below all others changes masked entries only."""
  low, i = step.low, 0 if is_secret(step.inputs[0]) else 1
  a, b = step.inputs[i], step.inputs[1 - i]
  if not is_real(b):
    return None
  b = np.broadcast_to(np.asarray(b, np.float64), step.shape)
  below = bool(np.all(b <= LOW)) and bool(np.all(b <= -step.bound(i)))
  if not isinstance(a, Masked):
    if below:
      return low.build.broadcast(low.value(a), step.shape)
    least = -low.least(low.value(a))
    return step.run([a, np.where(b <= least, least, b)]) if is_low(b) else None
  if a.keep is None:
    x = low.build.broadcast(a.x, step.shape)
    return step.hidden(x, a.top, a.bound, a.origin) if below else None
  keep, fill, spread = (np.broadcast_to(v, step.shape) for v in (a.keep, a.fill, a.spread))
  if below:
    return step.masked(low.build.broadcast(a.x, step.shape), keep, np.maximum(fill, b), spread)
  if np.any((fill + spread > b) & ~keep):
    return None
  x = zeroed(low, step.value([a.x, b]), keep)
  return low.build.add_public(x, np.where(keep, 0.0, b))


def _compare(step: Step) -> Any:
  """With public numbers: what is masked, or compared with infinity, is public."""
  if step.inputs[0] is step.inputs[1]:  # as JAX asks for NaN
    return np.full(step.shape, step.equation.name in ("eq", "ge", "le"))
  low, i = step.low, 0 if is_secret(step.inputs[0]) else 1
  numbers = step.inputs[1 - i]
  if not is_real(numbers) or is_hidden(step.inputs[i]):
    return None
  if is_finite(numbers) and not isinstance(step.inputs[i], Masked):
    return None
  p = step.part(i)
  full = lambda v: np.broadcast_to(v, step.shape)
  in_order = lambda v, w: [v, w] if i == 0 else [w, v]
  numbers, keep = full(np.asarray(numbers, np.float64)), full(p.keep)
  fill, doubt = (full(np.where(p.keep, 0.0, v)) for v in (p.fill, p.doubt))
  known = ~keep | np.isinf(numbers)
  near = (fill - doubt <= numbers) & (numbers <= fill + doubt) & (doubt > 0)
  if np.any(known & np.isfinite(numbers) & near):
    return None
  answer = step.public(in_order(fill, numbers)) & known
  if known.all():
    return answer
  x = low.build.broadcast(low.value(p.x), step.shape)
  bit = zeroed(low, step.value(in_order(x, np.where(known, 0.0, numbers))), ~known)
  return low.build.add_public(bit, answer.astype(np.float64))._replace(max_abs=1.0)


def _is_finite(step: Step) -> Any:
  (a,) = step.inputs
  if not isinstance(a, Masked):
    return None
  if a.keep is None:  # of a maximum under a secret mask, nobody knows whether all was masked
    return np.ones(step.shape, bool) if isinstance(a.origin, tuple) else None
  return a.keep | np.isfinite(a.fill)


_RULES: dict[str, Callable[[Step], Any]] = {
  "select_n": _select,
  "convert_element_type": _convert,
  "add": _add,
  "add_any": _add,
  "sub": _add,
  "mul": _scale,
  "div": _scale,
  "exp": _exp,
  "reduce_max": _reduce_max,
  "argmax": _argmax,
  "reduce_window_max": _window_max,
  "max": _max,
  "is_finite": _is_finite,
}
_RULES |= {name: _compare for name in ("ge", "le", "gt", "lt", "eq", "ne")}
_RULES |= dict.fromkeys(
  (
    "reshape", "squeeze", "expand_dims", "transpose", "broadcast_in_dim", "slice", "rev", "gather",
    "dynamic_slice", "split", "tile", "concatenate", "stack", "pad", "copy", "copy_p",
    "stop_gradient", "dynamic_update_slice",
  ),
  _move,
)  # fmt: skip
