"""Gaussian noise on a grid: integers from a site's secret that the accountant may take for normal
numbers, and a proof of it.

What is noised are vectors of integers, multiples of a grid step g. The noise is the integer X = K
X_1 + X_0, where X_1 and X_0 are discrete Gaussians of standard deviation s_0 >= 2.375 K
(`discrete`). Why a Gaussian mechanism's cost may be charged for x + X:

1. Let s^2 = (1 + K^2) s_0^2 and t = s_0 / sqrt(1 + K^2). P(X = y) is proportional to
   exp(-y^2 / 2 s^2) times sum_k exp(-(k - c_y)^2 / 2 t^2), which for any c_y is t sqrt(2 pi) up to
   a factor 1 +- e(t), e(t) = 2.01 exp(-2 pi^2 t^2) (Poisson's summation; Micciancio, Walter 2017,
   "Gaussian sampling over the integers", section 4). So X is a discrete Gaussian of standard
   deviation s up to factors 1 +- 3 e(t), with e(t) < 2^-126.
2. Round a continuous N(0, s^2 - r^2) to an integer y at random, with probability proportional to
   exp(-(y - v)^2 / 2 r^2). The same sum shows that the result is that discrete Gaussian up to
   factors 1 +- 3 e(r) (Peikert 2010, "An efficient and parallel Gaussian sampler for lattices",
   theorem 3.1). Here r = 2.125, and e(r) < 2^-126.
3. Rounding at random commutes with adding an integer. So x + X is, up to these factors, a function
   of x + N(0, s^2 - r^2): whatever holds for the Gaussian mechanism of `stddev`, subsampled and
   composed in any way, holds for x + X.

`error` bounds the total variation of one number, these factors and the table's rounding included.
An accountant takes it times the numbers of a step and the steps, times (1 + e^epsilon), from delta
(`Release.extra_delta`).

Who learns what: whoever lacks the secret cannot tell the noise from that of uniform bits, under the
assumption that ChaCha20 is a pseudorandom function. Whoever knows the secret can subtract the
noise. So the site draws the secret from the operating system (`prng.random_key`) and never sends
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.privacy import discrete, subkeys
from primia_jax.types import Array, PyTree

LEVELS = range(2, 27)  # each doubles the standard deviation
NUMBERS = 2**32  # of a release, at most: what `error_of_release` charges
_SPREAD, _ROUNDING, _FACTORS = 2.375, 2.125, 2.0**-120
# numbers of a tree that are drawn in one piece: a piece's fixed cost is that of some 10^5 numbers
_TOGETHER = 2**18


def stddev(level: int) -> float:
  """The standard deviation of the Gaussian that may be charged for `integers`; their own is larger
  by less than 2 %, and by less than 1e-4 from level 6 on.

  Raises:
    ValueError: for a level that is not in `LEVELS`.
  """
  base, shift = _digits(level)
  return math.sqrt(base**2 * (1 + 4**shift) - _ROUNDING**2)


def largest(level: int) -> int:
  """The largest magnitude of `integers`."""
  base, shift = _digits(level)
  return discrete.largest(base) * (1 + 2**shift)


def error(level: int) -> float:
  """Bounds the total variation between one of `integers` and what may be charged: below 1e-32."""
  return 2 * discrete.sampler_error(_digits(level)[0]) + _FACTORS


def error_of_release() -> float:
  """`error` times the most numbers of a release, at any level: below 1e-22."""
  return NUMBERS * max(error(level) for level in LEVELS)


def integers(secret: Array, shape: Sequence[int], level: int) -> Array:
  """Independent noise; see the module's text.

  Args:
    secret: [8] uint32, used for nothing else.
    shape: the shape wanted.
    level: static, in `LEVELS`.

  Returns:
    int32 of that shape.

  Raises:
    ValueError: for another level, and as `discrete.sample`.
  """
  base, shift = _digits(level)
  keys = jax.vmap(lambda digit: prng.derive(secret, digit))(jnp.arange(2, dtype=jnp.uint32))
  return discrete.digits(keys, shape, base, shift)


def integers_like(secret: Array, step: int | Array, tree: PyTree, level: int) -> PyTree:
  """Independent noise of a tree's shapes, fresh for every step and leaf.

  Args:
    secret: [8] uint32; it may also serve `sampling`, which derives other subkeys (`subkeys`).
    step: uint32 scalar or a Python integer, never used twice with this secret.
    tree: arrays; only their shapes count.
    level: as in `integers`.

  Returns:
    int32 arrays in the same tree.

  Raises:
    ValueError: as `integers`, and for more than `NUMBERS` numbers.
  """
  return _like(secret, step, tree, lambda key, size: integers(key, (size,), level))


def digits_like(
  secret: Array, step: int | Array, tree: PyTree, level: int
) -> tuple[PyTree, PyTree]:
  """The X_1 and X_0 of `integers_like`, which are 2^shift X_1 + X_0 with `shift(level)`."""
  base, _ = _digits(level)
  one = lambda digit: lambda key, size: discrete.sample(prng.derive(key, digit), (size,), base)
  return _like(secret, step, tree, one(0)), _like(secret, step, tree, one(1))


def shift(level: int) -> int:
  """The bits between the two digits of a level's noise."""
  return _digits(level)[1]


def _like(
  secret: Array, step: int | Array, tree: PyTree, draw: Callable[[Array, int], Array]
) -> PyTree:
  key = prng.derive(secret, subkeys.GAUSSIAN, step)
  leaves, structure = jax.tree.flatten(tree)
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  if sum(sizes) > NUMBERS:
    raise ValueError(f"{sum(sizes)} numbers; the accountant allows for {NUMBERS} in a release")
  if sum(sizes) <= _TOGETHER:
    pieces = jnp.split(draw(key, sum(sizes)), np.cumsum(sizes)[:-1])
  else:
    numbers = jnp.arange(len(leaves), dtype=jnp.uint32)
    keys = jax.vmap(lambda i: prng.derive(key, i))(numbers)
    pieces = [draw(k, size) for k, size in zip(keys, sizes, strict=True)]
  shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=False)]
  return jax.tree.unflatten(structure, shaped)


def _digits(level: int) -> tuple[float, int]:
  """Standard deviation of a digit, and the bits between two: K = 2^shift."""
  if level not in LEVELS:
    raise ValueError(f"level={level} must lie from {LEVELS[0]} to {LEVELS[-1]}")
  shift = level // 2
  return _SPREAD * 2.0 ** (level - shift), shift
