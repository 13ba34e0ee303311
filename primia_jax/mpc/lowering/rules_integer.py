"""Rules for whole numbers: quotients, bits, shifts, and the wrapping of their dtypes.

A value of an integer dtype is a whole number; its scale is 1 wherever bits matter. Results are
exact. For C, T and P see `functions.polynomials`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Value
from primia_jax.mpc.functions import rounding
from primia_jax.mpc.lowering.holders import Lazy, Owned, is_secret, most_of
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation
from primia_jax.mpc.lowering.rules_linear import shape_of


def is_integer(dtype: Any) -> bool:
  return jnp.issubdtype(dtype, jnp.integer)


def whole(build: Builder, x: Value) -> Value:
  """A value that is a whole number, at scale 1. No round if it counts in whole numbers, T else."""
  if x.scale >= 1 and x.scale == int(x.scale):
    factor = int(x.scale)
    grown = x if factor == 1 else build.local(lambda v: v * v.dtype.type(factor), x)
    return grown._replace(scale=1.0, max_abs=x.max_abs)
  return rounding.nearest(build, x)._replace(max_abs=x.max_abs)


# ---- dtypes that wrap around


def wrapped(build: Builder, x: Value, dtype: Any) -> Value:
  """The whole number that a dtype keeps of x: x modulo 2^bits. T rounds."""
  info, x = jnp.iinfo(dtype), whole(build, x)
  moved = build.add_public(x, -float(info.min))
  turns = build.floored(moved, info.bits)  # counts in 2^bits
  return build.subtract(x, turns)._replace(max_abs=most_of(dtype))


def in_dtype(rule: Rule) -> Rule:
  """A rule whose whole results wrap around as their dtype does, where they may leave it."""

  def wrapping(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
    out = rule(low, equation, inputs)
    dtype = equation.avals[0].dtype if equation.avals else None
    if not isinstance(out, Value | Lazy) or not is_integer(dtype):
      return out
    x = low.value(out)
    negative = np.dtype(dtype).kind == "u" and equation.name in ("sub", "neg")
    return wrapped(low.build, x, dtype) if negative or x.max_abs > most_of(dtype) else x

  return wrapping


# ---- quotients


def divide(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """The quotient by a public number, towards 0; C rounds."""
  a, b = _by_public(equation, inputs)
  quotient = rounding.trunc(low.build, whole(low.build, low.value(a)), np.abs(b))
  return _signed(low.build, quotient, b)


def remainder(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """x - d trunc(x / d), with the sign of x, for a public d; of reals too. C rounds.

  It is exact if d is a whole multiple of x's unit, else off by at most a unit of d's rounding for
  each d in x.
  """
  build, (a, b) = low.build, _by_public(equation, inputs)
  x = low.value(a)
  x = whole(build, x) if is_integer(equation.avals[0].dtype) else x
  step = np.abs(b)
  turns = rounding.trunc(build, x, step)
  taken = build.multiply_public(turns, step) if np.size(step) == 1 else _times(build, turns, step)
  x = build.broadcast(x, equation.avals[0].shape)
  return build.subtract(x, taken)._replace(max_abs=min(x.max_abs, float(step.max())))


def _times(build: Builder, x: Value, factors: np.ndarray) -> Value:
  """Whole numbers times public ones or, rounded, public reals."""
  if np.any(factors != np.rint(factors)):
    return build.multiply_public(x, factors)
  integers = factors.astype(np.int64).astype(build.config.dtype)
  return build.local(lambda v: v * integers, x, max_abs=x.max_abs * float(np.abs(factors).max()))


def chosen(build: Builder, bit: Value, off: Any, on: Any) -> Value:
  """off + bit (on - off) for public whole numbers; no round.

  Raises:
    ValueError: the numbers do not fit the ring.
  """
  off, on = (np.asarray(v).astype(np.int64) for v in (off, on))
  most = lambda v: float(np.abs(v.astype(np.float64)).max(initial=0))
  step = (on - off).astype(build.config.dtype)
  moved = build.local(lambda v: v * step, whole(build, bit), max_abs=most(on - off))
  out = build.add_public(moved, off)._replace(max_abs=max(most(off), most(on)))
  build.range_bits(out)
  return out


def _signed(build: Builder, x: Value, by: np.ndarray) -> Value:
  """x times the sign of a public array."""
  if np.all(by > 0):
    return x
  return build.negate(x) if np.all(by < 0) else _times(build, x, np.sign(by))


def _by_public(equation: Equation, inputs: list[Any]) -> tuple[Any, np.ndarray]:
  a, b = inputs
  if is_secret(b):
    raise NotImplementedError(
      f"{equation.name} by a secret number at {equation.source}; divide reals, x / y, and round"
    )
  b = np.asarray(b, np.float64)
  if np.any(b == 0):
    raise NotImplementedError(f"{equation.name} by zero at {equation.source}; mask the divisor")
  b = np.broadcast_to(b, equation.avals[0].shape) if b.ndim else b
  return a, b.reshape(-1)[0] if b.size and np.all(b == b.flat[0]) else b


def product(others: Rule) -> Rule:
  """Sums of products of whole numbers, exact; their bound counts every term."""

  def rule(low: Lowering, equation: Equation, inputs: list[Any]) -> Value:
    build, a, b = low.build, *inputs
    if equation.name == "mul" and not (is_secret(a) and is_secret(b)):
      secret, public = (a, b) if is_secret(a) else (b, a)
      x = build.broadcast(whole(build, low.value(secret)), equation.avals[0].shape)
      return _times(build, x, np.asarray(public, np.float64))
    terms, most = 1, 1.0
    for v, ref in zip(inputs, equation.inputs, strict=True):
      most *= _largest(low, v, low.dtype(ref))
    if equation.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      terms = math.prod(shape_of(a)[i] for i in contracted)
    elif equation.name == "conv_general_dilated":
      terms = math.prod(shape_of(b))
    x = low.value(others(low, equation, inputs))
    if x.scale > 1:
      raise NotImplementedError(
        f"{equation.name} of whole numbers by weights of more than weight_bits="
        f"{build.config.weight_bits} at {equation.source}; convert them to float32"
      )
    return x._replace(max_abs=most * terms)

  return rule


def _largest(low: Lowering, v: Any, dtype: Any) -> float:
  if isinstance(v, Owned):
    return min(low.largest(v), most_of(dtype))
  return (
    low.value(v).max_abs
    if is_secret(v)
    else float(np.abs(np.asarray(v, np.float64)).max(initial=0))
  )


# ---- bits


def bits_of(build: Builder, x: Value) -> Value:
  """[n + 1, ...]: the n bits of a whole number, lowest first, and whether it is negative.

  T rounds, n numbers of 2 n bits each.
  """
  n = _num_bits(build, x)
  floors = rounding.shifted(build, x, range(n + 1))
  bits = lambda v: jnp.concatenate([v[:-1] - v[1:] * v.dtype.type(2), v.dtype.type(0) - v[-1:]])
  return build.local(bits, floors, max_abs=1.0)


def from_bits(build: Builder, bits: Value) -> Value:
  """The inverse of `bits_of`."""
  n = bits.shape[0] - 1
  places = np.array([*(2**i for i in range(n)), -(2**n)], np.int64).astype(build.config.dtype)
  places = places.reshape(-1, *[1] * (len(bits.shape) - 1))
  return build.local(lambda v: (v * places).sum(0, dtype=v.dtype), bits, max_abs=2.0**n)


def _num_bits(build: Builder, *values: Value) -> int:
  most = max(v.max_abs for v in values)
  return int(most).bit_length() if most < 2.0**62 else 62


def _and_public(build: Builder, x: Value, mask: np.ndarray) -> Value:
  """x & mask. T rounds, a number for each end of a run of ones in the mask.

  Bit i of x is F_i - 2 F_(i + 1), with F_i = floor(x / 2^i); so the sum over a mask's bits m_i is
  that of 2^i (m_i - m_(i - 1)) F_i.
  """
  n = _num_bits(build, x)
  mask = np.asarray(mask, np.int64)
  bit = lambda i: (mask >> i) & 1 if i >= 0 else np.zeros_like(mask)
  factors = [2**i * (bit(i) - bit(i - 1)) for i in range(n)]
  factors.append(-((mask >> n) << n) - 2**n * bit(n - 1))  # F_i is the same for all i >= n
  used = [i for i, f in enumerate(factors) if np.any(f)]
  if not used:
    return build.scaled(x, 0.0)
  floors = rounding.shifted(
    build, build.broadcast(x, np.broadcast_shapes(x.shape, mask.shape)), used
  )
  table = np.stack([np.broadcast_to(factors[i], floors.shape[1:]) for i in used])
  table = table.astype(build.config.dtype)
  largest = float(np.abs(mask).max(initial=0))
  bound = largest if mask.min(initial=0) >= 0 else x.max_abs + largest
  return build.local(lambda v: (v * table).sum(0, dtype=v.dtype), floors, max_abs=bound)


def bitwise(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """and, or, xor, not of whole numbers; T rounds, and P if both are secret."""
  build, name, dtype = low.build, equation.name, equation.avals[0].dtype
  values: list[Any] = [
    whole(build, low.value(v)) if is_secret(v) else np.asarray(v, np.int64) for v in inputs
  ]
  if name == "not":
    top = -1.0 if np.dtype(dtype).kind == "i" else float(jnp.iinfo(dtype).max)
    return build.add_public(build.negate(values[0]), top)._replace(max_abs=most_of(dtype))
  a, b = values if isinstance(values[0], Value) else values[::-1]
  if isinstance(b, Value):
    most = max(a.max_abs, b.max_abs)
    rows = lambda v: bits_of(
      build, build.broadcast(v, equation.avals[0].shape)._replace(max_abs=most)
    )
    both = from_bits(build, build.multiply(rows(a), rows(b)))
    total = build.add(a, b)
  else:
    both, total = _and_public(build, a, b), build.add_public(a, b)
  if name == "and":
    return both
  return build.subtract(total, both if name == "or" else build.scaled(both, 2.0))._replace(
    max_abs=most_of(dtype)
  )


def shift(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """Shifts by public numbers; to the left without a round, to the right T rounds."""
  build, dtype, (a, by) = low.build, equation.avals[0].dtype, inputs
  if is_secret(by) or not is_secret(a):
    raise NotImplementedError(
      f"{equation.name} by a secret number at {equation.source}; multiply by a table of powers of "
      f"two, jnp.array([1, 2, 4, 8])[i]"
    )
  x = whole(build, build.broadcast(low.value(a), equation.avals[0].shape))
  width, by = jnp.iinfo(dtype).bits, np.broadcast_to(np.asarray(by, np.int64), x.shape)
  by = np.where((by < 0) | (by > width), width, by)
  if equation.name == "shift_left":
    return _times(build, x, np.where(by == width, 0, 2.0**by))
  # Beyond the bits of x, only its sign is left.
  n = _num_bits(build, x)
  used = sorted({n, *np.minimum(by, n).reshape(-1).tolist()})
  factors = np.minimum(by, n)[None] == np.array(used).reshape(-1, *[1] * by.ndim)
  factors = factors.astype(np.int64)
  if equation.name == "shift_right_logical" and np.dtype(dtype).kind == "i":
    factors[-1] -= np.where(by > 0, 2 ** (width - by), 0)  # no copies of the sign move in
  floors, table = rounding.shifted(build, x, used), factors.astype(build.config.dtype)
  bound = x.max_abs + 1 + 2.0 ** (width - 1) * bool(np.any(factors < 0))
  return build.local(lambda v: (v * table).sum(0, dtype=v.dtype), floors, max_abs=bound)


# ---- conversions and rounding


def to_integer(low: Lowering, equation: Equation, inputs: list[Any]) -> Value:
  """Reals lose their fraction, C rounds; whole numbers wrap around if the new dtype is narrower."""
  build, dtype, old = low.build, equation.avals[0].dtype, low.dtype(equation.inputs[0])
  x = low.value(inputs[0])
  if not is_integer(old):
    is_whole = x.scale >= 1 and x.scale == int(x.scale)
    return whole(build, x) if is_whole else rounding.trunc(build, x)
  loses_sign = (
    np.dtype(dtype).kind == "u" and np.dtype(old).kind == "i" and x.number not in low.counts
  )
  return wrapped(build, x, dtype) if loses_sign or x.max_abs > most_of(dtype) else x


def _round(low: Lowering, equation: Equation, inputs: list[Any]) -> Value:
  """To the nearest whole number: halves to the even one (T rounds) or away from 0 (C rounds)."""
  even = int(equation.params["rounding_method"]) == 1
  return (rounding.nearest_even if even else rounding.nearest_away)(low.build, low.value(inputs[0]))


def _rounding(fn: Callable[[Builder, Value], Value]) -> Rule:
  return lambda low, equation, inputs: fn(low.build, low.value(inputs[0]))


def by_dtype(integers: Rule, others: Rule) -> Rule:
  """One rule for results of integer dtypes, and one for the rest."""
  return lambda low, equation, inputs: (
    integers if is_integer(equation.avals[0].dtype) else others
  )(low, equation, inputs)


def rules(others: Mapping[str, Rule]) -> dict[str, Rule]:
  """All rules, with those of whole numbers and with dtypes that wrap around."""
  out = dict(others) | {
    "div": by_dtype(divide, others["div"]),
    "rem": remainder,
    "round": _round,
    "floor": _rounding(rounding.floor),
    "ceil": _rounding(rounding.ceil),
  }
  for name in ("mul", "dot_general", "conv_general_dilated"):
    out[name] = by_dtype(product(others[name]), others[name])
  out |= {name: by_dtype(bitwise, others[name]) for name in ("and", "or", "xor", "not")}
  out |= {name: shift for name in ("shift_left", "shift_right_logical", "shift_right_arithmetic")}
  return {name: in_dtype(rule) for name, rule in out.items()}
