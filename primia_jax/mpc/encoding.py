"""Real numbers as ring elements and back, one operand at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from primia_jax import native, prng
from primia_jax.mpc import products
from primia_jax.mpc.circuit import Config, Operand
from primia_jax.ring import signed
from primia_jax.types import Array, PyTree


class Weight(NamedTuple):
  """A linear layer's operand: its ring elements, and the same made ready for products."""

  elements: Array
  ready: products.Factor


def encode(operand: Operand, value: Array, config: Config) -> Any:
  """An owner's array as ring elements; a `Weight` for the operand of a linear layer.

  Rounding is off by at most half of the operand's scale; whole numbers at scale 1 stay exact.
  """
  wide = jnp.float64 if config.num_bits > 32 else jnp.float32
  if operand.scale == 1 and jnp.issubdtype(value.dtype, jnp.integer):
    integers = value
  else:
    integers = jnp.round(value.astype(wide) / jnp.asarray(operand.scale, wide))
  elements = integers.astype(jnp.int64 if config.num_bits > 32 else jnp.int32).astype(config.dtype)
  if operand.map is None:
    return elements
  # The elements are used here and for D. Computed again there, a fused multiply-add might round
  # to the neighbouring integer.
  elements = native.once(elements)
  bits = operand.bits or config.num_bits
  return Weight(elements, products.split(operand.map, elements, bits, config.num_bits))


def blank(operand: Operand, config: Config) -> Any:
  """Zeros of an operand's shapes, for the party that does not hold it."""
  return encode(operand, jnp.zeros(operand.shape, jnp.float32), config)


def decode(elements: Array, scale: float, config: Config, dtype: Any = jnp.float32) -> Array:
  """Ring elements as float32 numbers, or as integers or truth values of another dtype."""
  wide = jnp.float64 if config.num_bits > 32 else jnp.float32
  integers, real = signed(elements, config.num_bits), jnp.issubdtype(dtype, jnp.floating)
  if scale == 1 and not real:
    return integers.astype(dtype)
  numbers = integers.astype(wide) * jnp.asarray(scale, wide)
  return numbers.astype(jnp.float32) if real else jnp.round(numbers).astype(dtype)


def largest(value: Array) -> Array:
  """The largest magnitude in float32, for `check_fits`."""
  # The least whole number of a dtype has no magnitude there.
  return jnp.max(jnp.abs(value.astype(jnp.float32)), initial=0)


def fits(operand: Operand, most: Array, config: Config) -> Array:
  """Whether a magnitude fits the operand's bits; NaN does not. It traces."""
  return most < _limit(operand, config)


def check_fits(operand: Operand, most: Array, config: Config) -> None:
  """Raises a ValueError unless `fits`; under jit and vmap, where nothing can be raised, outputs are
  `spoiled` instead.
  """
  if isinstance(most, jax.core.Tracer) or bool(fits(operand, most, config)):
    return
  kind, limit = "a weight" if operand.map else "an input or offset", _limit(operand, config)
  advice = "scale it down, plan with the weights at hand, or use fewer fraction_bits"
  if not jnp.isfinite(most):
    advice = "there is no fixed-point number for it"
  raise ValueError(
    f"{operand.layer}: {kind} of magnitude {float(most):.4g} does not fit below {limit:.4g}; "
    f"{advice}"
  )


def spoiled(outputs: PyTree, good: Array) -> PyTree:
  """The outputs, or NaN unless good ([] bool): a plausible number would be worse than none.

  Integers have no NaN and become the least of their type; truth values stay.
  """

  def spoil(v: Array) -> Array:
    if jnp.issubdtype(v.dtype, jnp.bool_):
      return v
    real = jnp.issubdtype(v.dtype, jnp.floating)
    return jnp.where(good, v, jnp.asarray(jnp.nan if real else jnp.iinfo(v.dtype).min, v.dtype))

  return jax.tree.map(spoil, outputs)


def _limit(operand: Operand, config: Config) -> float:
  bits = min(operand.bits or config.num_bits, config.num_bits - 1)
  units = 2.0 ** (bits - 1)
  if operand.map is None and operand.bits is not None:  # it is clamped; rounding must not lead out
    units -= 1
  return units * operand.scale


def share(x: Array, key: Array, config: Config) -> Array:
  """Shares [2, ...] of a float array at the scale of activations; each alone is uniform.

  Args:
    x: float array; |x| < 2^(k - 2 - f).
    key: [8] uint32, secret, never used twice.
    config: the ring.

  Raises:
    ValueError: a number does not fit the ring.
  """
  operand = Operand(None, lambda values: x, config.unit, x.shape, None, None, "share")
  check_fits(operand, largest(x), config)
  elements = encode(operand, x, config)
  first = prng.bits(key, jnp.zeros(3, jnp.uint32), x.shape, config.dtype)
  return jnp.stack([first, elements - first])
