"""Bilinear maps as they stand in a jaxpr: their shapes, and which axis of a result comes from which
of the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from primia_jax.mpc.products import Map, apply

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


def from_equation(name: str, params: Mapping[str, Any]) -> Map:
  """The map of a jaxpr's dot_general or conv_general_dilated."""
  freeze = lambda v: v if not isinstance(v, list) else tuple(map(tuple, v))
  return Map(name, tuple((key, freeze(params[key])) for key in _KEPT[name]))


def shape_of(mapping: Map, x: Sequence[int], w: Sequence[int]) -> tuple[int, ...]:
  """The shape of a map's result."""
  operands = [jax.ShapeDtypeStruct(tuple(s), jnp.float32) for s in (x, w)]
  return tuple(jax.eval_shape(lambda x, w: apply(mapping, x, w), *operands).shape)


def weight_axes(mapping: Map, x: Sequence[int], w: Sequence[int]) -> tuple[int | None, ...]:
  """For each axis of the result, the axis of w that it runs along with, or None."""
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
  """A dot_general with its operands exchanged, and the transposition of its result that undoes
  it.
  """
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
