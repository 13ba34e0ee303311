"""Discrete Gaussian and Skellam noise as arrays of integers, drawn from ChaCha20 by the alias
method.

A table, made on the host from probabilities of 60 digits, holds every magnitude whose probability
counts. 127 uniform bits pick a column and one of its two magnitudes (Walker 1977; Vose 1991); one
more bit is the sign. The first word of 32 bits nearly always decides, and the other three are made
only where it cannot. Nothing is rejected, and no floating point lies between the bits and the
integer. The remaining error comes from probabilities rounded to multiples of 2^-127 and from the
tail that is cut off; it is `sampler_error`, which an accountant must add.

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

from primia_jax import native, prng
from primia_jax.types import Array

Kind = Literal["discrete_gaussian", "skellam"]
MAX_STDDEV = 20_000.0  # of which the table (5 MiB) still fits a processor's cache
_BITS = 127
_TAIL_BITS = 130  # at most 2^-130 of probability is cut off
_DIGITS = 80  # of decimal arithmetic
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
  return digits(jnp.asarray(key)[None], shape, stddev, 0, kind)


def digits(
  keys: Array, shape: Sequence[int], stddev: float, shift: int, kind: Kind = "discrete_gaussian"
) -> Array:
  """Numbers of several independent draws: the sum over digits d of draw_d 2^(shift (D - 1 - d)).

  Args:
    keys: [D, 8] uint32, one for each digit, as in `sample`.
    shape, stddev, kind: as in `sample`.
    shift: bits between two digits.

  Returns:
    int32, which wraps around where the sum does not fit.

  Raises:
    ValueError: as `sample`.
  """
  if keys.ndim != 2 or keys.shape[1] != 8 or keys.dtype != jnp.uint32:
    raise ValueError(f"keys is {keys.dtype}{list(keys.shape)}; it must be uint32[D, 8]")
  rows, size = _table(float(stddev), kind), math.prod(shape)
  heads, tails = jnp.asarray(rows[:, [0, 4]]), jnp.asarray(rows[:, 1:4])

  def plain(keys: Array) -> Array:
    drawn = [_stream(key, heads, tails, size) for key in keys]
    return functools.reduce(lambda total, digit: (total << shift) + digit, drawn)

  if not size:
    return jnp.zeros(tuple(shape), jnp.int32)
  if not native.available():
    return plain(keys).reshape(tuple(shape))
  compiled = lambda keys: (
    native.discrete(keys, heads, tails, jnp.uint32(shift), size)
    | prng.varying_zero(keys).astype(jnp.int32)
  )
  return lax.platform_dependent(keys, cpu=compiled, default=plain).reshape(tuple(shape))


def sampler_error(stddev: float, kind: Kind = "discrete_gaussian") -> float:
  """Bounds the total variation between one draw and its distribution, for truly uniform bits.

  N columns round N probabilities to the nearest multiple of 2^-127, and the first one makes up the
  sum. This changes half the sum of absolute differences by at most N 2^-128, and the tail adds at
  most 2^-130: below 1e-33 together.

  Raises:
    ValueError: for a standard deviation that is not positive or beyond `MAX_STDDEV`, or an unknown
      kind.
  """
  return 2.0 ** (_index_bits(stddev, kind) - _BITS - 1) + 2.0**-_TAIL_BITS


def largest(stddev: float, kind: Kind = "discrete_gaussian") -> int:
  """The largest magnitude that is ever drawn; larger ones have probability at most 2^-130.

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
  with decimal.localcontext(prec=_DIGITS, Emin=-(10**9), Emax=10**9):
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


@functools.lru_cache(maxsize=16)
def _table(stddev: float, kind: Kind) -> np.ndarray:
  """[2^m, 5] uint32: a threshold of 127 - m bits in four words, and the magnitude that bits from
  there upwards draw.
  """
  index_bits = _index_bits(stddev, kind)
  num_columns, full = 2**index_bits, 2 ** (_BITS - index_bits)
  exact = probabilities(stddev, kind)
  with decimal.localcontext(prec=_DIGITS):
    units = [int((p * 2 ** (_BITS + 1)).to_integral_value()) for p in exact]  # of both signs
  units += [0] * (num_columns - len(units))
  units[0] = 2**_BITS - sum(units[1:])
  low = [i for i, n in enumerate(units) if n < full]
  high = [i for i, n in enumerate(units) if n >= full]
  # a full column needs no other
  alias, threshold = list(range(num_columns)), [0] * num_columns
  while low:
    i, j = low.pop(), high.pop()
    alias[i], threshold[i] = j, units[i]
    units[j] -= full - units[i]
    (low if units[j] < full else high).append(j)
  words = [
    [*(t >> s & 0xFFFFFFFF for s in (96, 64, 32, 0)), a]
    for t, a in zip(threshold, alias, strict=True)
  ]
  return np.array(words, np.uint32)


def _stream(key: Array, heads: Array, tails: Array, size: int) -> Array:
  """int32 [size]: draws of one key, a chunk at a time."""
  words = [prng.bits(key, jnp.asarray([0, 0, 0], jnp.uint32), (size,))]
  chunk = min(_CHUNK, max(size, 1))
  padded = jnp.pad(words[0], (0, -size % chunk)).reshape(-1, chunk)

  def draw(row: tuple[Array, Array]) -> Array:
    index, first = row
    decided, tie = _by_head(first, heads)
    return lax.cond(jnp.any(tie), lambda: _by_all(first, index), lambda: decided)

  def _by_all(first: Array, index: Array) -> Array:
    more = [prng.bits(key, jnp.asarray([0, 0, w], jnp.uint32), (size,)) for w in (1, 2, 3)]
    take = lambda a: lax.dynamic_slice_in_dim(jnp.pad(a, (0, -size % chunk)), index * chunk, chunk)
    return _lookup(heads, tails, jnp.stack([first, *map(take, more)]))

  varying = prng.varying_zero(key).astype(jnp.int32)
  index = jnp.arange(padded.shape[0], dtype=jnp.int32) + varying
  return lax.map(draw, (index, padded)).reshape(-1)[:size]


def _split(first: Array, heads: Array) -> tuple[Array, Array, Array, Array]:
  """Column, the first word's other bits, sign, and the column's head."""
  index_bits = heads.shape[0].bit_length() - 1
  column = (first >> np.uint32(32 - index_bits)).astype(jnp.int32)
  rest = first >> np.uint32(1) & np.uint32(2 ** (31 - index_bits) - 1)
  sign = 1 - 2 * (first & np.uint32(1)).astype(jnp.int32)
  return column, rest, sign, heads.at[column].get(mode="promise_in_bounds")


def _by_head(first: Array, heads: Array) -> tuple[Array, Array]:
  """int32 [C] from first words [C], and where these cannot tell."""
  column, rest, sign, head = _split(first, heads)
  magnitude = jnp.where(rest < head[:, 0], column, head[:, 1].astype(jnp.int32))
  return magnitude * sign, rest == head[:, 0]


def _lookup(heads: Array, tails: Array, words: Array) -> Array:
  """int32 [C] from all words [4, C]."""
  column, rest, sign, head = _split(words[0], heads)
  tail = tails.at[column].get(mode="promise_in_bounds")
  below = words[3] < tail[:, 2]
  for w in (1, 0):
    below = (words[w + 1] < tail[:, w]) | (words[w + 1] == tail[:, w]) & below
  below = (rest < head[:, 0]) | (rest == head[:, 0]) & below
  return jnp.where(below, column, head[:, 1].astype(jnp.int32)) * sign
