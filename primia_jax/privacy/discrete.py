"""Discrete Gaussian and Skellam noise as arrays of integers, drawn from ChaCha20 by the alias
method.

A table, made on the host from probabilities of 60 digits, holds every magnitude whose probability
counts. 95 uniform bits pick a column and one of its two magnitudes (Walker 1977; Vose 1991); one
more bit is the sign. Nothing is rejected, so no loop's length depends on the noise, and no floating
point lies between the bits and the integer. The remaining error comes from probabilities rounded to
multiples of 2^-95 and from the tail that is cut off; it is `sampler_error`, which an accountant
must add.

Distributions: the discrete Gaussian has probability proportional to exp(-x^2 / (2 s^2)) at every
integer x (Canonne, Kamath, Steinke 2020, definition 1). Its variance is at most s^2: smaller by
2e-7 of it at s = 1 and by 14 % at s = 1/2. The Skellam distribution is the difference of two
Poisson variables of mean s^2 / 2 (Agarwal et al. 2021); its variance is s^2.

Who learns what: whoever lacks the key cannot tell the noise from true samples, under the assumption
that the key is secret and uniform and that ChaCha20 is a pseudorandom function.
"""

from __future__ import annotations

import decimal
import functools
import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import prng
from primia_jax.types import Array

Kind = Literal["discrete_gaussian", "skellam"]
MAX_STDDEV = 20_000.0  # of which the table (4 MiB) still fits a processor's cache
_BITS = 95
_TAIL_BITS = 100  # at most 2^-100 of probability is cut off
_CHUNK = 2**16  # draws at a time, to stay in the cache


def sample(
  key: Array, shape: Sequence[int], stddev: float, kind: Kind = "discrete_gaussian"
) -> Array:
  """Independent integers of one of the distributions above.

  Args:
    key: [8] uint32, secret; derive one for each use, and use it for nothing else.
    shape: the shape wanted.
    stddev: s; static under jit, as the table is made from it.
    kind: which distribution.

  Returns:
    int32; each within `sampler_error` of its distribution, in total variation.

  Raises:
    ValueError: as `sampler_error`; for a wrong key.
  """
  rows = jnp.asarray(_table(float(stddev), kind))
  size = math.prod(shape)
  chunk = min(_CHUNK, max(size, 1))
  draw = lambda i: _lookup(
    rows, prng.bits(key, jnp.stack([i, *np.zeros(2, np.uint32)]), (3, chunk))
  )
  drawn = lax.map(draw, jnp.arange(-(-size // chunk), dtype=jnp.uint32))
  return drawn.reshape(-1)[:size].reshape(tuple(shape))


def sampler_error(stddev: float, kind: Kind = "discrete_gaussian") -> float:
  """Bounds the total variation between one draw and its distribution, for truly uniform bits.

  N columns round N probabilities to the nearest multiple of 2^-95, and the first one makes up the
  sum. This changes half the sum of absolute differences by at most N 2^-96, and the tail adds at
  most 2^-100: about 1e-24 together.

  Raises:
    ValueError: for a standard deviation that is not positive or beyond `MAX_STDDEV`, or an unknown
      kind.
  """
  return 2.0 ** (_index_bits(stddev, kind) - _BITS - 1) + 2.0**-_TAIL_BITS


def largest(stddev: float, kind: Kind = "discrete_gaussian") -> int:
  """The largest magnitude that is ever drawn; larger ones have probability at most 2^-100.

  It follows from the sub-Gaussian tail of the discrete Gaussian, P(|X| >= t) <= 2 exp(-t^2 / (2
  s^2)) (Canonne et al. 2020), and from Chernoff's bound with the Skellam's moments, E exp(u X) =
  exp(s^2 (cosh u - 1)).

  Raises:
    ValueError: as `sampler_error`.
  """
  if kind not in ("discrete_gaussian", "skellam"):
    raise ValueError(f"kind={kind!r}; use 'discrete_gaussian' or 'skellam'")
  if not 0 < stddev <= MAX_STDDEV:
    raise ValueError(
      f"stddev={stddev} must be positive and at most {MAX_STDDEV}: scale the numbers down"
    )
  variance = stddev**2

  def enough(t: int) -> bool:
    if kind == "discrete_gaussian":
      log_tail = -(t**2) / (2 * variance)
    else:
      log_tail = math.hypot(t, variance) - variance - t * math.asinh(t / variance)
    return log_tail < -(_TAIL_BITS + 2) * math.log(
      2
    )  # one bit for the factor 2, one for rounding here

  high = 1
  while not enough(high):
    high *= 2
  low = high // 2
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high


def probabilities(stddev: float, kind: Kind = "discrete_gaussian") -> list[decimal.Decimal]:
  """The probabilities of 0 to `largest`, to 50 digits; negative values have those of positive ones.
  They sum to 1 without the tail that is cut off.

  Raises:
    ValueError: as `sampler_error`.
  """
  top, weights = largest(stddev, kind), []
  with decimal.localcontext(prec=60, Emin=-(10**9), Emax=10**9):
    variance = decimal.Decimal(stddev) ** 2
    if (
      kind == "discrete_gaussian"
    ):  # exp(-(x + 1)^2 / 2 s^2) is exp(-x^2 / 2 s^2) times q^(2 x + 1)
      weight, ratio = decimal.Decimal(1), (-1 / (2 * variance)).exp()
      square = ratio * ratio
      for _ in range(top + 1):
        weights.append(weight)
        weight, ratio = weight * ratio, ratio * square
    # e^-v I_x(v), Bessel functions by Miller's recurrence downwards, which is stable: all terms are
    # positive
    else:
      above, here = decimal.Decimal(0), decimal.Decimal(1)
      for x in range(2 * top + 64, -1, -1):
        if x <= top:
          weights.append(here)
        above, here = here, above + 2 * x / variance * here
      weights.reverse()
    total = weights[0] + 2 * sum(weights[1:])
    return [w / total for w in weights]


def _index_bits(stddev: float, kind: Kind) -> int:
  return largest(stddev, kind).bit_length()


@functools.lru_cache(maxsize=8)
def _table(stddev: float, kind: Kind) -> np.ndarray:
  """[2^m, 4] uint32: a threshold of 95 - m bits in three words, and the magnitude that bits from
  there upwards draw.
  """
  index_bits = _index_bits(stddev, kind)
  num_columns, full = 2**index_bits, 2 ** (_BITS - index_bits)
  exact = probabilities(stddev, kind)
  with decimal.localcontext(prec=60):
    units = [int((p * 2 ** (_BITS + 1)).to_integral_value()) for p in exact]  # of both signs
  units += [0] * (num_columns - len(units))
  units[0] = 2**_BITS - sum(units[1:])
  low = [i for i, n in enumerate(units) if n < full]
  high = [i for i, n in enumerate(units) if n >= full]
  alias, threshold = list(range(num_columns)), [0] * num_columns  # a full column needs no other
  while low:
    i, j = low.pop(), high.pop()
    alias[i], threshold[i] = j, units[i]
    units[j] -= full - units[i]
    (low if units[j] < full else high).append(j)
  words = [
    [t >> 64, t >> 32 & 0xFFFFFFFF, t & 0xFFFFFFFF, a]
    for t, a in zip(threshold, alias, strict=True)
  ]
  return np.array(words, np.uint32)


def _lookup(rows: Array, words: Array) -> Array:
  """int32 [C] from uniform words [3, C]."""
  index_bits = rows.shape[0].bit_length() - 1
  column, sign = (
    (words[0] >> np.uint32(32 - index_bits)).astype(jnp.int32),
    (words[0] & np.uint32(1)).astype(jnp.int32),
  )
  first = words[0] >> np.uint32(1) & np.uint32(2 ** (31 - index_bits) - 1)
  row = rows.at[column].get(mode="promise_in_bounds")
  below = (first < row[:, 0]) | (first == row[:, 0]) & (
    (words[1] < row[:, 1]) | (words[1] == row[:, 1]) & (words[2] < row[:, 2])
  )
  magnitude = jnp.where(below, column, row[:, 3].astype(jnp.int32))
  return magnitude * (1 - 2 * sign)
