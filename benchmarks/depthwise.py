"""Times depthwise convolutions beside XLA's grouped ones: forward, and both gradients, over the
layers of an EfficientNet-Lite0.

  python -m benchmarks.depthwise
  python -m benchmarks.depthwise --size=224 --batch=4 --each

A row sums the layers as often as they occur. "shifts" is the form without a C compiler. XLA's
gradients take seconds a layer, so few rounds are measured; --noxla leaves them out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax

from benchmarks import measuring
from primia_jax import native
from primia_jax.depthwise import depthwise
from primia_jax.types import Array

_SIZE = flags.DEFINE_integer("size", 160, "Height and width of the images.", lower_bound=32)
_BATCH = flags.DEFINE_integer("batch", 8, "Images per batch.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Measured rounds, after a warm-up.", lower_bound=1)
_LIMIT = flags.DEFINE_float(
  "limit", 10.0, "Seconds per layer and direction after which no further round starts."
)
_XLA = flags.DEFINE_bool("xla", True, "Time XLA's grouped convolution.")
_EACH = flags.DEFINE_bool("each", False, "Report every layer.")


class Layer(NamedTuple):
  """A layer of Lite0: its map at 160 px and how often it occurs."""

  size: int
  channels: int
  taps: int
  stride: int
  count: int = 1


LAYERS = (
  Layer(80, 32, 3, 1), Layer(80, 96, 3, 2), Layer(40, 144, 3, 1), Layer(40, 144, 5, 2),
  Layer(20, 240, 5, 1), Layer(20, 240, 3, 2), Layer(10, 480, 3, 1, 2), Layer(10, 480, 5, 1),
  Layer(10, 672, 5, 1, 2), Layer(10, 672, 5, 2), Layer(5, 1152, 5, 1, 3), Layer(5, 1152, 3, 1),
)  # fmt: skip


def grouped(x: Array, w: Array, *, strides: tuple[int, int]) -> Array:
  return lax.conv_general_dilated(
    x,
    w[:, :, None],
    strides,
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[3],
  )


def runs(layer: Layer, is_gradient: bool) -> dict[str, measuring.Contestant]:
  """The contestants of a layer, compiled."""
  rng = np.random.default_rng(0)
  size, strides = -(-layer.size * _SIZE.value // 160), (layer.stride,) * 2
  shapes = (_BATCH.value, size, size, layer.channels), (layer.taps, layer.taps, layer.channels)
  x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
  g = depthwise(x, w, strides=strides)

  def contestant(fn: Callable) -> measuring.Contestant:
    fn = functools.partial(fn, strides=strides)
    if is_gradient:
      run = jax.jit(lambda x, w, g: jax.vjp(fn, x, w)[1](g)).lower(x, w, g).compile()
      return measuring.timed(functools.partial(run, x, w, g))
    return measuring.timed(functools.partial(jax.jit(fn).lower(x, w).compile(), x, w))

  made = {}
  before = os.environ.get("PRIMIA_NATIVE", "1")
  os.environ["PRIMIA_NATIVE"] = "0"
  made["shifts"] = contestant(depthwise)
  os.environ["PRIMIA_NATIVE"] = before
  if native.available():
    made["C"] = contestant(depthwise)
  if _XLA.value:
    made["XLA, grouped"] = contestant(grouped)
  return made


def main(_):
  for is_gradient, direction in ((False, "forward"), (True, "both gradients")):
    totals: dict[str, list] = {}
    for layer in LAYERS:
      costs = measuring.alternate(runs(layer, is_gradient), _ROUNDS.value, _LIMIT.value)
      for form, rounds in costs.items():
        if _EACH.value:
          measuring.report(f"{direction}, {form}: {layer}", rounds, unit="ms", scale=1e3)
        totals.setdefault(form, []).append((layer.count, rounds))
    sums = {form: summed(parts) for form, parts in totals.items()}
    what = f"{direction}, depthwise layers of Lite0, {_BATCH.value} x {_SIZE.value} px"
    for form, rounds in sums.items():
      measuring.report(f"{form}: {what}", rounds, unit="ms", scale=1e3)
    for form, rounds in sums.items():
      if form != "XLA, grouped" and _XLA.value:
        n = min(len(rounds), len(sums["XLA, grouped"]))
        name = f"{form} over XLA's grouped: {what}"
        measuring.report_ratio(name, rounds[:n], sums["XLA, grouped"][:n], target=None)


def summed(parts: list) -> list[measuring.Cost]:
  """Of (count, rounds) of each layer, the rounds of all layers."""
  num_rounds = min(len(rounds) for _, rounds in parts)
  total = lambda i, field: sum(count * getattr(rounds[i], field) for count, rounds in parts)
  return [measuring.Cost(total(i, "seconds"), total(i, "cpu")) for i in range(num_rounds)]


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
