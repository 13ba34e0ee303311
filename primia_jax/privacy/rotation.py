"""Randomised Hadamard rotation, chunk by chunk: it spreads a vector evenly over its coordinates and
changes no norm.

If the signs are random and independent of the vector, every rotated coordinate of a chunk of m
numbers is sub-Gaussian with variance at most (norm of the chunk)^2 / m (Hoeffding; Kairouz et al.
2021, section 4). A vector of known norm then fits a ring of few bits. Rotation hides nothing: the
signs are public, and the same at all sites of a sum.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax.types import Array, Key, PyTree

_EXACT = lax.Precision.HIGHEST  # accelerators round factors to fewer bits otherwise


def padded_size(dim: int, chunk_size: int) -> int:
  """The size of a rotated vector: dim rounded up to a multiple of the chunk's size.

  Raises:
    ValueError: for a chunk's size that is not a power of two.
  """
  if chunk_size < 1 or chunk_size & (chunk_size - 1):
    raise ValueError(f"chunk_size={chunk_size} must be a power of two")
  return -(-dim // chunk_size) * chunk_size


def rotate(x: Array, key: Key, chunk_size: int) -> Array:
  """H D x of each chunk: random signs D, then the orthogonal Hadamard matrix H.

  Args:
    x: [D] float32.
    key: public randomness.
    chunk_size: m, a power of two.

  Returns:
    [padded_size] float32, of the same norm up to about 1e-6 of it.

  Raises:
    ValueError: as `padded_size`.
  """
  size = padded_size(x.shape[0], chunk_size)
  x = jnp.pad(x, (0, size - x.shape[0]))
  return _hadamard(_flip(x, key), chunk_size)


def unrotate(y: Array, key: Key, chunk_size: int, dim: int) -> Array:
  """Undoes `rotate`, up to rounding: [padded_size] -> [dim] float32.

  Raises:
    ValueError: where y is not of the padded size; as `padded_size`.
  """
  if y.shape != (padded_size(dim, chunk_size),):
    raise ValueError(
      f"y has shape {list(y.shape)}; dim={dim} is padded to [{padded_size(dim, chunk_size)}]"
    )
  return _flip(_hadamard(y, chunk_size), key)[:dim]


def flatten(tree: PyTree) -> Array:
  """All leaves, as one float32 vector in the order of `jax.tree.leaves`."""
  return jnp.concatenate([jnp.ravel(a).astype(jnp.float32) for a in jax.tree.leaves(tree)])


def unflatten(flat: Array, like: PyTree) -> PyTree:
  """Cuts a vector into the shapes and dtypes of `like` (arrays or `jax.ShapeDtypeStruct`).

  Raises:
    ValueError: where their sizes differ.
  """
  leaves, structure = jax.tree.flatten(like)
  sizes = [math.prod(a.shape) for a in leaves]
  if flat.shape != (sum(sizes),):
    raise ValueError(
      f"a vector of shape {list(flat.shape)} cannot fill leaves of {sum(sizes)} numbers"
    )
  parts = jnp.split(flat, np.cumsum(sizes)[:-1])
  return jax.tree.unflatten(
    structure, [p.reshape(a.shape).astype(a.dtype) for p, a in zip(parts, leaves, strict=True)]
  )


def _flip(x: Array, key: Key) -> Array:
  """x with random signs, one bit each."""
  size = x.shape[0]
  words = jax.random.bits(key, (-(-size // 32), 1), jnp.uint32)
  bits = (words >> np.arange(32, dtype=np.uint32)[None, :]).reshape(-1)[:size] << np.uint32(31)
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.uint32) ^ bits, jnp.float32)


def _hadamard(x: Array, chunk_size: int) -> Array:
  """H x of each chunk, as a matrix X [a, b]: H_a X H_b, Sylvester's matrix being a Kronecker
  product.
  """
  power = chunk_size.bit_length() - 1
  chunks = x.reshape(-1, 2 ** (power // 2), 2 ** (power - power // 2))
  return lax.platform_dependent(chunks, cpu=_butterflies, default=_products).reshape(-1)


def _products(chunks: Array) -> Array:
  """Two products with small dense matrices: the fewest passes over memory."""
  left, right = (_matrix(n) for n in chunks.shape[1:])
  return jnp.matmul(jnp.matmul(left, chunks, precision=_EXACT), right, precision=_EXACT)


def _butterflies(chunks: Array) -> Array:
  """Additions only, one chunk at a time, which stays in the cache."""
  scale = np.float32(chunks.shape[1] * chunks.shape[2]) ** np.float32(-0.5)

  def down(x: Array) -> Array:
    """The transform of every column."""
    rows, columns = x.shape
    half = 1
    while half < rows:
      pairs = x.reshape(-1, 2, half, columns)
      x = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(
        rows, columns
      )
      half *= 2
    return x

  return lax.map(lambda x: down(down(x).T).T * scale, chunks)


def _matrix(size: int) -> np.ndarray:
  """Sylvester's matrix of +-1, divided by the root of its size."""
  i = np.arange(size)
  odd = np.bitwise_count(i[:, None] & i[None, :]) & 1
  return ((1 - 2.0 * odd) / math.sqrt(size)).astype(np.float32)
