"""What of a trace is known while tracing: small integers, and which word is of which key."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_SIZE = 2**12  # larger arrays are followed only if all elements are equal
_ELEMENTWISE: dict[str, Callable[..., Any]] = {
  "add": operator.add,
  "sub": operator.sub,
  "mul": operator.mul,
  "neg": np.negative,
  "sign": np.sign,
  "and": operator.and_,
  "or": operator.or_,
  "xor": operator.xor,
  "not": np.invert,
  "max": np.maximum,
  "min": np.minimum,
  "eq": operator.eq,
  "ne": operator.ne,
  "lt": operator.lt,
  "le": operator.le,
  "gt": operator.gt,
  "ge": operator.ge,
}


def constant(value: Any) -> np.ndarray | None:
  """The elements of a literal or a constant, if they are followed."""
  dtype = getattr(value, "dtype", None)
  if dtype is not None and not isinstance(dtype, np.dtype):
    return None  # a typed key of jax.random
  array = np.asarray(value)
  return array if array.dtype.kind in "iub" and array.size <= _SIZE else None


def apply(eqn: Any, inputs: Sequence[np.ndarray | None]) -> np.ndarray | None:
  """The elements of an equation's result, or None if they are not known."""
  arrays = [v for v in inputs if v is not None]
  if not inputs or len(arrays) < len(inputs):
    return None
  name, shape = eqn.primitive.name, eqn.outvars[0].aval.shape
  dtype = eqn.outvars[0].aval.dtype
  if not isinstance(dtype, np.dtype) or dtype.kind not in "iub":
    return None
  are_numbers = all(v.dtype != object for v in arrays)
  with np.errstate(all="ignore"):
    out = _structural(name, eqn, shape, arrays)
    if out is None and are_numbers and name in _ELEMENTWISE:
      out = np.asarray(_ELEMENTWISE[name](*arrays)).astype(dtype)
    elif out is None and name == "convert_element_type":
      out = arrays[0].astype(dtype) if are_numbers else _same_width(eqn, arrays[0])
    elif out is None and name == "select_n" and arrays[0].dtype != object:
      out = _select(arrays, shape)
  if out is None or (out.ndim and out.size > _SIZE):
    return None
  return out


def _structural(
  name: str, eqn: Any, shape: tuple[int, ...], arrays: list[np.ndarray]
) -> np.ndarray | None:
  """Results that only move elements; a scalar stands for equal elements of any shape."""
  params, x = eqn.params, arrays[0]
  whole = [np.shape(v.aval) for v in eqn.invars]
  match name:
    case "reshape" | "squeeze" | "expand_dims" | "copy" | "pvary":
      return x if _is_fill(x, whole[0]) else x.reshape(shape)
    case "broadcast_in_dim":
      if x.size == 1 and math.prod(shape) > _SIZE:
        return x.reshape(())
      if _is_fill(x, whole[0]):
        return x
      if math.prod(shape) > _SIZE:
        return None
      spread = np.ones(len(shape), int)
      spread[list(params["broadcast_dimensions"])] = x.shape
      return np.broadcast_to(x.reshape(spread), shape)
    case "transpose":
      return x if _is_fill(x, whole[0]) else x.transpose(params["permutation"])
    case "slice":
      if _is_fill(x, whole[0]):
        return x
      steps = params["strides"] or (1,) * x.ndim
      cuts = zip(params["start_indices"], params["limit_indices"], steps, strict=True)
      return x[tuple(slice(*cut) for cut in cuts)]
    case "dynamic_slice":
      if _is_fill(x, whole[0]):
        return x
      if any(v.dtype == object for v in arrays[1:]):
        return None
      starts = [
        min(max(int(v), 0), n - size)
        for v, n, size in zip(arrays[1:], x.shape, params["slice_sizes"], strict=True)
      ]
      return x[tuple(slice(s, s + n) for s, n in zip(starts, params["slice_sizes"], strict=True))]
    case "concatenate" | "stack":
      if math.prod(shape) > _SIZE:
        return None
      filled = [np.broadcast_to(v, s) for v, s in zip(arrays, whole, strict=True)]
      if any(v.dtype == object for v in filled):
        filled = [v.astype(object) for v in filled]
      if name == "stack":
        return np.stack(filled, params.get("axis", params.get("dimension", 0)))
      return np.concatenate(filled, params["dimension"])
  return None


def _is_fill(x: np.ndarray, shape: tuple[int, ...]) -> bool:
  return x.shape != shape


def _same_width(eqn: Any, x: np.ndarray) -> np.ndarray | None:
  before, after = eqn.invars[0].aval.dtype, eqn.outvars[0].aval.dtype
  return x if before == after else None


def _select(arrays: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray | None:
  which, *cases = arrays
  if which.size and (which == which.flat[0]).all():
    return cases[int(which.flat[0])]
  if math.prod(shape) > _SIZE or any(v.dtype == object for v in cases):
    return None
  filled = [np.broadcast_to(v, shape) for v in cases]
  return np.choose(np.broadcast_to(which, shape).astype(int), filled)


def single(x: np.ndarray | None) -> int | None:
  """The number that all elements are equal to, if there is one and it is known."""
  if x is None or x.dtype == object or not x.size:
    return None
  first = x.flat[0]
  return int(first) if x.size == 1 or (x == first).all() else None
