"""Bilinear maps as a jaxpr has them: their shapes, and which axis of a result comes from which axis
of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from primia_jax.types import Array


class Map(NamedTuple):
  """A bilinear map of JAX, static and hashable.

  Attributes:
    name: "conv_general_dilated", "dot_general" or "mul" (elementwise, of equal shapes).
    params: the primitive's parameters as (name, value) pairs with hashable values, such as
      `tuple(eqn.params.items())` of a jaxpr's equation; precision and element types are ignored.
  """

  name: str
  params: tuple[tuple[str, Any], ...] = ()


MULTIPLY = Map("mul", ())
_KEPT = {
  "dot_general": ("dimension_numbers",),
  "conv_general_dilated": (
    "window_strides",
    "padding",
    "lhs_dilation",
    "rhs_dilation",
    "dimension_numbers",
    "feature_group_count",
    "batch_group_count",
  ),
}


def apply(map: Map, x: Array, w: Array, dtype: Any = None) -> Array:
  """The plain XLA operation on operands of one dtype, accumulated in `dtype` (default: theirs)."""
  p = dict(map.params)
  if map.name == "mul":
    return (x if dtype is None else x.astype(dtype)) * (w if dtype is None else w.astype(dtype))
  if map.name == "dot_general":
    return lax.dot_general(x, w, p["dimension_numbers"], preferred_element_type=dtype)
  if map.name != "conv_general_dilated":
    raise ValueError(f"map.name={map.name!r}; use conv_general_dilated, dot_general or mul")
  known = {name: p[name] for name in _KEPT[map.name] if name in p}
  return lax.conv_general_dilated(x, w, **known, preferred_element_type=dtype)


def from_equation(name: str, params: Mapping[str, Any]) -> Map:
  """The map of a jaxpr's dot_general or conv_general_dilated."""
  freeze = lambda v: v if not isinstance(v, list) else tuple(map(tuple, v))
  return Map(name, tuple((key, freeze(params[key])) for key in _KEPT[name]))


def shape_of(mapping: Map, x: Sequence[int], w: Sequence[int]) -> tuple[int, ...]:
  """The shape of a map's result."""
  return _shape_of(mapping, tuple(x), tuple(w))


@functools.cache
def _shape_of(mapping: Map, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[int, ...]:
  operands = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (x, w)]
  return tuple(jax.eval_shape(lambda x, w: apply(mapping, x, w), *operands).shape)


def weight_axes(mapping: Map, x: Sequence[int], w: Sequence[int]) -> tuple[int | None, ...]:
  """For each axis of the result, the axis of w that it follows, or None."""
  params = dict(mapping.params)
  ndim = len(shape_of(mapping, x, w))
  if mapping.name == "mul":
    return tuple(range(ndim))
  if mapping.name == "dot_general":
    (_, contracted), (_, batch) = params["dimension_numbers"]
    free = [i for i in range(len(w)) if i not in (*contracted, *batch)]
    return (*batch, *[None] * (ndim - len(batch) - len(free)), *free)
  axes: list[int | None] = [None] * ndim
  if params["batch_group_count"] == 1:
    axes[params["dimension_numbers"].out_spec[1]] = params["dimension_numbers"].rhs_spec[0]
  return tuple(axes)


def swapped(mapping: Map, a_ndim: int, b_ndim: int) -> tuple[Map, tuple[int, ...]]:
  """A dot_general with exchanged operands, and the transposition that its result then needs."""
  (a_contracted, b_contracted), (a_batch, b_batch) = dict(mapping.params)["dimension_numbers"]
  numbers = ((b_contracted, a_contracted), (b_batch, a_batch))
  batch = len(a_batch)
  b_free, a_free = b_ndim - len(b_contracted) - batch, a_ndim - len(a_contracted) - batch
  order = (
    *range(batch),
    *range(batch + b_free, batch + b_free + a_free),
    *range(batch, batch + b_free),
  )
  return Map("dot_general", (("dimension_numbers", numbers),)), order
