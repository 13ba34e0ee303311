"""Times exact products in Z_2^k in each of their forms, and the same layers in float32.
`mpc.products.choose` is based on the results.

  python -m benchmarks.ring_products
  python -m benchmarks.ring_products --size=64 --batch=32 --forms=integer
  python -m benchmarks.ring_products --layers=matmul

It times the layers of a ResNet-18 (224 x 224 x 3) one by one and adds them up. With --each it also
prints a line for each layer and form.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax import lax

from benchmarks import measuring
from primia_jax import native, ring
from primia_jax.mpc import maps, products

_LAYERS = flags.DEFINE_enum(
  "layers", "resnet18", ["resnet18", "matmul"], "The layers to time; matmul is 1024^3."
)
_SIZE = flags.DEFINE_integer("size", 224, "Height and width of the images.", lower_bound=32)
_BATCH = flags.DEFINE_integer("batch", 1, "Images per batch.", lower_bound=1)
_FORMS = flags.DEFINE_list(
  "forms", list(products.FORMS), "The forms to time; halves only where it is to be had."
)
_RINGS = flags.DEFINE_list(
  "rings",
  ["18:32", "18:40", "18:44", "18:64", "32:32", "40:40", "44:44", "64:64"],
  "Pairs of bits of w : bits of the ring.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Measured rounds, after a warm-up.", lower_bound=1)
_LIMIT = flags.DEFINE_float(
  "limit", 10.0, "Seconds per layer after which no further round starts.", lower_bound=1
)
_EACH = flags.DEFINE_bool("each", False, "Report every layer.")


@dataclasses.dataclass(frozen=True)
class Layer:
  """A layer, and how often it occurs in the network."""

  name: str
  map: maps.Map
  x: tuple[int, ...]
  w: tuple[int, ...]
  count: int = 1


def conv(size: int, channels: int, taps: int, stride: int, features: int, count: int = 1) -> Layer:
  """A square convolution with "SAME" padding."""
  x, w = (_BATCH.value, size, size, channels), (taps, taps, channels, features)
  strides = (stride, stride)
  params = {
    "window_strides": strides,
    "padding": tuple(lax.padtype_to_pads(x[1:3], w[:2], strides, "SAME")),
    "dimension_numbers": lax.conv_dimension_numbers(x, w, ("NHWC", "HWIO", "NHWC")),
  }
  name = f"{size}x{size}x{channels}, {taps}x{taps}/{stride}, {features}"
  return Layer(name, maps.Map("conv_general_dilated", tuple(params.items())), x, w, count)


def matmul(m: int, k: int, n: int) -> Layer:
  numbers = (((1,), (0,)), ((), ()))
  return Layer(
    f"{m}x{k}x{n}", maps.Map("dot_general", (("dimension_numbers", numbers),)), (m, k), (k, n)
  )


def resnet18(size: int) -> list[Layer]:
  a, b, c, d, e = (-(-size // 2**i) for i in (0, 2, 3, 4, 5))
  return [
    conv(a, 3, 7, 2, 64), conv(b, 64, 3, 1, 64, 4),
    conv(b, 64, 3, 2, 128), conv(b, 64, 1, 2, 128), conv(c, 128, 3, 1, 128, 3),
    conv(c, 128, 3, 2, 256), conv(c, 128, 1, 2, 256), conv(d, 256, 3, 1, 256, 3),
    conv(d, 256, 3, 2, 512), conv(d, 256, 1, 2, 512), conv(e, 512, 3, 1, 512, 3),
    matmul(_BATCH.value, 512, 1000),
  ]  # fmt: skip


def contestants(layer: Layer, cases: Sequence[tuple[int, int, str]]) -> dict:
  """The plain float32 layer, and its exact products with w split in advance."""
  rng = np.random.default_rng(0)
  plain = jax.jit(functools.partial(maps.apply, layer.map))
  x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (layer.x, layer.w))
  runs = {"float32": measuring.timed(functools.partial(plain, x, w))}
  for w_bits, num_bits, form in cases:
    x = jnp.asarray(
      rng.integers(0, 2**num_bits - 1, layer.x, np.uint64).astype(ring.storage(num_bits))
    )
    w = jnp.asarray(rng.integers(1 - 2 ** (w_bits - 1), 2 ** (w_bits - 1) - 1, layer.w))
    operand = jax.jit(products.split, static_argnums=(0, 2, 3, 4))(
      layer.map, w, w_bits, num_bits, form
    )
    multiply = jax.jit(products.multiply, static_argnums=(0, 3))
    runs[w_bits, num_bits, form] = measuring.timed(
      functools.partial(multiply, layer.map, x, operand, num_bits)
    )
  return runs


def main(_):
  jax.config.update("jax_enable_x64", True)
  layers = resnet18(_SIZE.value) if _LAYERS.value == "resnet18" else [matmul(1024, 1024, 1024)]
  forms = [form for form in _FORMS.value if form != "halves" or native.has_wide_products()]
  cases = [(*map(int, bits.split(":")), form) for bits in _RINGS.value for form in forms]
  totals: dict = {}
  for layer in layers:
    costs = measuring.alternate(contestants(layer, cases), _ROUNDS.value, _LIMIT.value)
    for case, rounds in costs.items():
      if _EACH.value:
        measuring.report(f"{_name(case)}: {layer.name}", rounds, unit="ms", scale=1e3)
      totals.setdefault(case, []).append((layer.count, rounds))
  what = (
    f"ResNet-18, {_BATCH.value} x {_SIZE.value} x {_SIZE.value}"
    if len(layers) > 1
    else layers[0].name
  )
  for case, parts in totals.items():
    num_rounds = min(len(rounds) for _, rounds in parts)
    total = lambda i, field: sum(count * getattr(rounds[i], field) for count, rounds in parts)  # noqa: B023
    sums = [measuring.Cost(total(i, "seconds"), total(i, "cpu")) for i in range(num_rounds)]
    measuring.report(f"{_name(case)}: {what}", sums, unit="ms", scale=1e3)


def _name(case) -> str:
  return case if case == "float32" else f"{case[2]}, w of {case[0]} bits in Z_2^{case[1]}"


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
