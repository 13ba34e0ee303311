"""Z_2^k and fixed point: represents real numbers as integers modulo 2^k, so that sums are exact and
additive masks are uniform.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp

from primia_jax.types import Array


@dataclasses.dataclass(frozen=True)
class FixedPoint:
  """Signed fixed-point numbers in Z_2^k, stored in uint32 (k <= 32) or uint64 (k <= 64; needs x64).

  Attributes:
    num_bits: k. An integer v stands for v - 2^k where v >= 2^(k-1).
    fraction_bits: f. The real number is v / 2^f.
  """

  num_bits: int = 32
  fraction_bits: int = 16

  def __post_init__(self):
    if not 2 <= self.num_bits <= 64:
      raise ValueError(f"num_bits={self.num_bits}; a ring of 2 to 64 bits is supported")
    if not 0 <= self.fraction_bits < self.num_bits:
      raise ValueError(
        f"fraction_bits={self.fraction_bits} must be at least 0 and less than "
        f"num_bits={self.num_bits}"
      )

  @property
  def max_abs(self) -> float:
    """The largest magnitude that is encoded without wrapping around."""
    # Low bits that a Python float cannot hold; subtracting them rounds down instead of up.
    unheld = max(0, self.num_bits - 54)
    return (2 ** (self.num_bits - 1) - 2**unheld) / 2**self.fraction_bits

  @property
  def resolution(self) -> float:
    """The value of the last bit. Rounding errors are at most half of it."""
    return 2.0**-self.fraction_bits


def fit(max_abs: float, num_terms: int, num_bits: int = 32) -> FixedPoint:
  """Returns the finest fixed point in which a sum of `num_terms` numbers up to `max_abs` cannot
  overflow.

  The encoded sum is at most num_terms * (max_abs * 2^f + 1/2) in magnitude, which must stay below
  2^(k-1).

  Raises:
    ValueError: even whole numbers do not fit (the message says how many bits suffice), or a number
      is not positive and finite.

  >>> fit(max_abs=32.0, num_terms=3)
  FixedPoint(num_bits=32, fraction_bits=24)
  """
  if not 0 < max_abs < math.inf or num_terms < 1:
    raise ValueError(f"max_abs={max_abs} and num_terms={num_terms} must be positive and finite")
  # Exact fractions, because floats would round up to 2^(k-1).
  largest = lambda f: num_terms * (Fraction(max_abs) * 2**f + Fraction(1, 2))
  fits = [f for f in range(num_bits) if largest(f) < 2 ** (num_bits - 1)]
  if not fits:
    enough = math.floor(largest(0)).bit_length() + 1
    raise ValueError(
      f"a sum of {num_terms} numbers up to {max_abs} overflows a ring of {num_bits} bits; use "
      f"num_bits >= {enough}"
      + (", which is more than the 64 supported: scale the numbers down" if enough > 64 else "")
    )
  return FixedPoint(num_bits, fits[-1])


def encode(x: Array, fixed: FixedPoint) -> Array:
  """Rounds real numbers to ring elements.

  Args:
    x: float32 or float64 of any shape, with magnitudes at most `fixed.max_abs`. Beyond that the
      result is undefined, so check first.
    fixed: the encoding.

  Returns:
    uint32 or uint64 of x's shape, reduced modulo 2^k. The error is at most 2^-(f+1), because
    scaling by 2^f is exact.

  Raises:
    ValueError: x has another dtype. float16 would overflow, and integers would not be scaled.
  """
  if x.dtype not in (jnp.float32, jnp.float64):
    raise ValueError(f"cannot encode {x.dtype}; convert to float32 or float64")
  wide = _signed(fixed.num_bits)
  scaled = jnp.round(x * jnp.asarray(2.0**fixed.fraction_bits, x.dtype))
  return reduce(
    jax.lax.bitcast_convert_type(scaled.astype(wide), _unsigned(fixed.num_bits)), fixed.num_bits
  )


def decode(v: Array, fixed: FixedPoint, dtype: jnp.dtype | type = jnp.float32) -> Array:
  """Returns the real numbers that ring elements represent, rounded to `dtype` (float32: relative
  error 2^-24).
  """
  numbers = signed(v, fixed.num_bits)
  return numbers.astype(dtype) * jnp.asarray(2.0**-fixed.fraction_bits, dtype)


def signed(v: Array, num_bits: int) -> Array:
  """The numbers in [-2^(k-1), 2^(k-1)) that integers of any dtype are congruent to modulo 2^k.

  Args:
    v: integers; bits above k are ignored.
    num_bits: k.

  Returns:
    int32 for k <= 32, else int64.
  """
  dtype = jnp.dtype(f"int{storage(num_bits).itemsize * 8}")
  unused = jnp.asarray(dtype.itemsize * 8 - num_bits, dtype)
  return v.astype(dtype) << unused >> unused


def reduce(v: Array, num_bits: int) -> Array:
  """Returns v modulo 2^k."""
  if num_bits == v.dtype.itemsize * 8:
    return v
  return v & jnp.asarray(2**num_bits - 1, v.dtype)


def storage(num_bits: int) -> jnp.dtype:
  """Returns the dtype that holds Z_2^k: uint32 for k <= 32, else uint64.

  Raises:
    ValueError: k > 32 without x64, where JAX would silently use 32 bits.
  """
  return jnp.dtype(_unsigned(num_bits))


def _unsigned(num_bits: int):
  if num_bits > 32 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ValueError(
      f"a ring of {num_bits} bits needs 64-bit integers: set JAX_ENABLE_X64=1 (or jax_enable_x64), "
      f"or num_bits <= 32"
    )
  return jnp.uint32 if num_bits <= 32 else jnp.uint64


def _signed(num_bits: int):
  return jnp.int32 if _unsigned(num_bits) is jnp.uint32 else jnp.int64
