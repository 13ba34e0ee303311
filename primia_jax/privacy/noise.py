"""Gaussian noise from a site's secret, by ChaCha20 and Box and Muller's transform, in jit and at
the speed of memory.

Who learns what: whoever lacks the secret cannot tell the noise from that of uniform bits, under the
assumption that ChaCha20 is a pseudorandom function. Whoever knows the secret can subtract the
noise. So the site draws the secret from the operating system (`prng.random_key`) and never sends
it. These float32 numbers have two limits:

- The tail is not exact. A radius stops at sqrt(66 ln 2) = 6.76 standard deviations; a pair of true
  normals lies beyond with probability 2^-33. Radii come in 2^32 steps. To be strict, add num_pairs
  x 2^-33 of a run to delta.
- The floating-point attack of Mironov (2012, "On significance of the least significant bits") is
  not prevented. The set of float32 results that gradient + noise can reach depends on the gradient,
  and an attacker who sees every bit of a site's noisy sum may use that. The integers of `discrete`
  have no such gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.privacy import subkeys
from primia_jax.types import Array, PyTree

# numbers of a tree that are drawn in one piece: a piece's fixed cost is that of some 10^5 numbers
_TOGETHER = 2**18
# Taylor's and, for the cosine, also even: both within 4e-9 on [-pi / 4, pi / 4].
_SINE = tuple((-1) ** i / math.factorial(2 * i + 1) for i in range(5))
_COSINE = tuple((-1) ** i / math.factorial(2 * i) for i in range(6))


def gaussian(secret: Array, nonce: Array, shape: Sequence[int], stddev: float | Array) -> Array:
  """Independent normal numbers of mean 0; see the module's text for how exact they are.

  Args:
    secret: [8] uint32.
    nonce: [3] uint32, never used twice with this secret.
    shape: the shape wanted.
    stddev: standard deviation, a float or a float32 scalar.

  Returns:
    float32 of that shape: each pair of 32-bit words u, v gives sqrt(-2 ln u) times cos and sin of 2
    pi v (Box and Muller 1958), all cosines first.

  Raises:
    ValueError: for a negative standard deviation, and as `prng.bits`.
  """
  if isinstance(stddev, (int, float)) and not 0 <= stddev < math.inf:
    raise ValueError(f"stddev={stddev} must be finite and not negative")
  size = math.prod(shape)
  pairs = -(-size // 2)
  words = prng.bits(secret, nonce, (2 * pairs,))
  # (u + 1/2) / 2^32 lies in (0, 1]: rounding to float32 may give 1, where the radius is 0, but
  # never 0.
  uniform = (words[:pairs].astype(jnp.float32) + np.float32(0.5)) * np.float32(2**-32)
  radius = jnp.sqrt(np.float32(-2) * jnp.log(uniform)) * jnp.asarray(stddev, jnp.float32)
  sine, cosine = _circle(words[pairs:])
  return jnp.concatenate([radius * cosine, radius * sine])[:size].reshape(tuple(shape))


def gaussian_like(secret: Array, step: int | Array, tree: PyTree, stddev: float | Array) -> PyTree:
  """Independent normal numbers of a tree's shapes, fresh for every step and leaf.

  Args:
    secret: [8] uint32; it may also serve `sampling`, which derives other subkeys (`subkeys`).
    step: uint32 scalar or a Python integer, never used twice with this secret.
    tree: arrays; only their shapes count.
    stddev: as in `gaussian`.

  Returns:
    float32 arrays in the same tree.
  """
  key = prng.derive(secret, subkeys.GAUSSIAN, step)
  leaves, structure = jax.tree.flatten(tree)
  nonces = np.arange(max(1, len(leaves)), dtype=np.uint32)[:, None] * np.array(
    [[1, 0, 0]], np.uint32
  )
  sizes = [math.prod(leaf.shape) for leaf in leaves]
  if sum(sizes) <= _TOGETHER:
    pieces = jnp.split(
      gaussian(key, jnp.asarray(nonces[0]), (sum(sizes),), stddev), np.cumsum(sizes)[:-1]
    )
    noise = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=False)]
  else:
    noise = [
      gaussian(key, jnp.asarray(nonces[i]), leaf.shape, stddev) for i, leaf in enumerate(leaves)
    ]
  return jax.tree.unflatten(structure, noise)


def _circle(words: Array) -> tuple[Array, Array]:
  """Sine and cosine of 2 pi words / 2^32: the nearest quarter turn exactly, and the rest, at most
  an eighth, by polynomials.
  """
  quarter = (words + np.uint32(2**29)) >> np.uint32(30)  # the addition wraps, as the circle does
  rest = jax.lax.bitcast_convert_type(words - (quarter << np.uint32(30)), jnp.int32).astype(
    jnp.float32
  )
  angle = rest * np.float32(2 * math.pi / 2**32)
  square = angle * angle
  sine, cosine = _polynomial(_SINE, square) * angle, _polynomial(_COSINE, square)
  swapped = (quarter & np.uint32(1)) == 1
  first, second = jnp.where(swapped, cosine, sine), jnp.where(swapped, sine, cosine)
  sign = lambda bit: np.float32(1) - np.float32(2) * bit.astype(jnp.float32)
  half = (quarter >> np.uint32(1)) & np.uint32(1)
  return sign(half) * first, sign(half ^ (quarter & np.uint32(1))) * second


def _polynomial(coefficients: Sequence[float], x: Array) -> Array:
  value = jnp.full_like(x, coefficients[-1])
  for c in coefficients[-2::-1]:
    value = value * x + np.float32(c)
  return value
