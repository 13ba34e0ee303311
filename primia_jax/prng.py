"""Cryptographic randomness as arrays: the ChaCha20 stream cipher (RFC 8439), subkeys, and signed
sums of masks.

Every function takes the secret key as an argument and is deterministic. It gives the same bits on
every backend, under jit, vmap and shard_map, and however the work is divided. Security rests on one
assumption: the ChaCha20 block function with a uniform secret key is a pseudorandom function of
(counter, nonce). Never use a (key, nonce) pair twice. Use `jax.random` for everything that is not
secret.

On CPU, `bits` and `mask_sum` run as C that is compiled on first use (see `native`); elsewhere, and
without a C compiler, they run as plain JAX. Shard them with shard_map: under automatic sharding
every device would run the whole C form.
"""

from __future__ import annotations

import functools
import math
import operator
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import native
from primia_jax.types import Array

TILE = 128  # blocks whose words lie side by side; fixes the order of words in `bits`
_SIGMA = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)  # "expand 32-byte k"
_MAX_BLOCKS = 2**32 - 4  # of `bits`; the last four counters of every nonce belong to `derive`
_CPU_CHUNK = 2**13  # blocks that plain JAX computes at a time on CPU: 0.5 MiB fits the cache
_CHUNK = 2**18  # the same on accelerators, which are wide and have no such cache: 16 MiB


def chacha20(key: Array, nonce: Array, counter: int | Array, num_blocks: int) -> Array:
  """The ChaCha20 block function at consecutive counters (RFC 8439, section 2.3).

  Args:
    key: [8] uint32, the key's bytes as little-endian words.
    nonce: [3] uint32.
    counter: uint32 scalar, the first block's counter.
    num_blocks: how many blocks.

  Returns:
    [16, num_blocks] uint32. Column b is block counter + b; the transpose, read in order, is the
    RFC's keystream.

  Raises:
    ValueError: a shape or dtype is wrong, or the counter would pass 2^32. A traced counter cannot
      be checked and wraps around.
  """
  _check("key", key, 8)
  _check("nonce", nonce, 3)
  if num_blocks < 0:
    raise ValueError(f"num_blocks={num_blocks}; it must not be negative")
  first = 0 if isinstance(counter, jax.core.Tracer) else int(counter)
  if not 0 <= first < 2**32 or first + num_blocks > 2**32:
    raise ValueError(
      f"blocks {first} to {first + num_blocks} pass the 32-bit counter; use another nonce"
    )
  return _blocks(key, nonce, jnp.asarray(counter, jnp.uint32), num_blocks)


def bits(key: Array, nonce: Array, shape: Sequence[int], dtype=jnp.uint32) -> Array:
  """Uniform bits from a key and a nonce.

  The flat output is a row of tiles. Tile t holds blocks 128 t to 128 t + 127: first word 0 of every
  block, then word 1, and so on. Position p of a tile is word p // 128 of its block p % 128. A
  uint64 takes its low half from word w and its high half from word w + 8 of one block. A shorter
  output is therefore a prefix of a longer one.

  Args:
    key: [8] uint32.
    nonce: [3] uint32, never used twice with this key.
    shape: the shape wanted.
    dtype: uint32, or uint64 (needs x64).

  Returns:
    An array of that shape and dtype.

  Raises:
    ValueError: key, nonce or dtype is wrong, dtype is uint64 without x64, or the output needs more
      than 2^32 - 4 blocks (256 GiB).
  """
  _check("key", key, 8)
  _check("nonce", nonce, 3)
  size, dtype = math.prod(shape), _unsigned(dtype)
  _num_blocks(size, dtype)
  return _mask_sum(
    key[None], jnp.ones(1, jnp.int32), nonce, size, dtype, native.available()
  ).reshape(tuple(shape))


def mask_sum(
  keys: Array, signs: Array, nonce: Array, shape: Sequence[int], dtype=jnp.uint32
) -> Array:
  """The sum over peers of sign x mask, modulo 2^32 or 2^64, in the memory of one mask.

  Equals `sum(signs[p] * bits(keys[p], nonce, shape, dtype) for p in range(P))`. In secure
  aggregation, a site adds this to its update (Bonawitz et al. 2017, section 4.0.1).

  Args:
    keys: [P, 8] uint32, one key for each peer.
    signs: [P] int32: +1, -1, or 0 for an absent peer.
    nonce: [3] uint32, never used twice with any of these keys.
    shape: the shape wanted.
    dtype: uint32, or uint64 (needs x64).

  Returns:
    An array of that shape and dtype.

  Raises:
    ValueError: as `bits`, and if keys and signs do not match.
  """
  if keys.ndim != 2 or keys.shape[1] != 8 or keys.dtype != jnp.uint32:
    raise ValueError(f"keys is {keys.dtype}{list(keys.shape)}; it must be uint32[P, 8]")
  _check("nonce", nonce, 3)
  if signs.shape != keys.shape[:1] or signs.dtype != jnp.int32:
    raise ValueError(
      f"signs is {signs.dtype}{list(signs.shape)}; it must be int32[{len(keys)}], one for each key"
    )
  size, dtype = math.prod(shape), _unsigned(dtype)
  _num_blocks(size, dtype)
  return _mask_sum(keys, signs, nonce, size, dtype, native.available()).reshape(tuple(shape))


def random_key() -> Array:
  """A fresh key from the operating system: [8] uint32."""
  return key_of(os.urandom(32))


def random_keys(count: int) -> np.ndarray:
  """Several fresh keys, as `random_key`: [count, 8] uint32 on the host."""
  return np.frombuffer(os.urandom(32 * count), "<u4").astype(np.uint32).reshape(count, 8)


def key_of(secret: bytes) -> Array:
  """The key of 32 secret uniform bytes, which serve once: [8] uint32."""
  return jnp.asarray(np.frombuffer(secret, "<u4").astype(np.uint32))


def derive(key: Array, *words: int | Array) -> Array:
  """Derives a subkey for one to three words, e.g. a round and a pair of sites; nest it for more.

  To anyone without `key`, subkeys for different words are independent uniform keys, also
  independent of the `bits` of `key`, if ChaCha20 is a pseudorandom function. The n words are the
  nonce of the block with counter 2^32 - 1 - n, which `bits` never reaches.

  Args:
    key: [8] uint32.
    *words: integers from 0 to 2^32 - 1 or uint32 scalars.

  Returns:
    [8] uint32, the first half of the block.

  Raises:
    ValueError: there are no words or more than three, or a word is outside uint32.
  """
  if not 1 <= len(words) <= 3:
    raise ValueError(f"{len(words)} words; derive takes one to three; nest it for more")
  for word in words:
    if isinstance(word, (int, np.integer)):
      if not 0 <= word < 2**32:
        raise ValueError(f"word {word} is not in [0, 2^32)")
    elif word.dtype != jnp.uint32 or word.ndim:
      raise ValueError(f"word {word.dtype}{list(word.shape)} is not a uint32 scalar")
  nonce = jnp.stack([jnp.asarray(w, jnp.uint32) for w in (*words, 0, 0)[:3]])
  return chacha20(key, nonce, 2**32 - 1 - len(words), 1)[:8, 0]


def _check(name: str, value: Array, size: int) -> None:
  if value.shape != (size,) or value.dtype != jnp.uint32:
    raise ValueError(f"{name} is {value.dtype}{list(value.shape)}; it must be uint32[{size}]")


def _unsigned(dtype) -> np.dtype:
  dtype = np.dtype(dtype)
  if dtype not in (np.uint32, np.uint64):
    raise ValueError(f"dtype={dtype}; it must be uint32 or uint64")
  if dtype == np.uint64 and not jax.config.jax_enable_x64:  # type: ignore[attr-defined]
    raise ValueError("dtype=uint64 needs 64-bit types; set jax_enable_x64")
  return dtype


def _num_blocks(size: int, dtype: np.dtype) -> int:
  """The number of blocks in the whole tiles that hold `size` values."""
  tiles = -(-size * dtype.itemsize // (64 * TILE))
  if tiles * TILE > _MAX_BLOCKS:
    raise ValueError(
      f"{size} values of {dtype} need {tiles * TILE} blocks, over {_MAX_BLOCKS}; use several nonces"
    )
  return tiles * TILE


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _mask_sum(
  keys: Array, signs: Array, nonce: Array, size: int, dtype: np.dtype, use_native: bool
) -> Array:
  """`mask_sum`, flat and unchecked, in the form for the platform that it is compiled for."""
  if not size or not len(keys):
    return jnp.zeros(size, dtype)
  portable = functools.partial(_portable_mask_sum, size=size, dtype=dtype)
  on_cpu = functools.partial(portable, chunk_blocks=_CPU_CHUNK)
  if use_native:
    on_cpu = functools.partial(_native_mask_sum, size=size, dtype=dtype)
  elsewhere = functools.partial(portable, chunk_blocks=_CHUNK)
  return lax.platform_dependent(keys, signs, nonce, cpu=on_cpu, default=elsewhere)


def _native_mask_sum(keys: Array, signs: Array, nonce: Array, size: int, dtype: np.dtype) -> Array:
  """`mask_sum` in C, with the mesh axes it varies over, which a foreign call loses."""
  return native.mask_sum(keys, signs, nonce, size, dtype) | varying_zero(keys, signs, nonce).astype(
    dtype
  )


def _portable_mask_sum(
  keys: Array, signs: Array, nonce: Array, size: int, dtype: np.dtype, chunk_blocks: int
) -> Array:
  """`mask_sum` in plain JAX: chunk by chunk, so that the state stays in fast memory, and peer by
  peer within a chunk.
  """
  num_blocks = _num_blocks(size, dtype)
  tiles = -(-num_blocks // (TILE * -(-num_blocks // chunk_blocks)))  # per chunk, about equal
  factors = signs.astype(jnp.int64 if dtype == jnp.uint64 else jnp.int32).astype(dtype)

  def mask(peer, first):
    key, factor = peer
    words = _blocks(key, nonce, first, tiles * TILE).reshape(16, tiles, TILE).transpose(1, 0, 2)
    if dtype == jnp.uint64:
      words = words[:, :8].astype(dtype) | (words[:, 8:].astype(dtype) << dtype.type(32))
    return factor * words

  def chunk(first):
    add = lambda total, peer: (total + mask(peer, first), None)
    return lax.scan(add, mask((keys[0], factors[0]), first), (keys[1:], factors[1:]))[0]

  return lax.map(chunk, np.arange(0, num_blocks, tiles * TILE, dtype=np.uint32)).reshape(-1)[:size]


@functools.partial(jax.jit, static_argnums=3)
def _blocks(key: Array, nonce: Array, counter: Array, num_blocks: int) -> Array:
  """`chacha20`, unchecked."""
  zero = jnp.broadcast_to(varying_zero(key, nonce, counter), num_blocks)
  counters = counter + lax.iota(jnp.uint32, num_blocks)
  rows = tuple(zero | word for word in (*np.array(_SIGMA, np.uint32), *key, counters, *nonce))
  mixed = lax.fori_loop(0, 10, lambda _, s: double_round(s), rows)
  return jnp.stack([a + b for a, b in zip(mixed, rows, strict=True)])


def varying_zero(*arrays: Array) -> Array:
  """A uint32 zero that varies over every mesh axis that any of the arrays varies over. The compiler
  removes it.

  Under shard_map, a loop's carry must keep the axes it varies over, and both branches of a choice
  must agree in theirs.
  """
  return functools.reduce(
    operator.or_, (a.ravel()[0].astype(jnp.uint32) for a in arrays)
  ) & np.uint32(0)


def double_round(state: tuple[Array, ...]) -> tuple[Array, ...]:
  """Four quarter rounds on the columns and four on the diagonals (RFC 8439, section 2.3.1)."""
  # `lax` and not operators: JAX traces an operator of arrays three times as long
  s = list(state)
  for shift in (0, 1):
    for i in range(4):
      a, b, c, d = (4 * row + (i + shift * row) % 4 for row in range(4))
      for x, y, z, n in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        s[x] = lax.add(s[x], s[y])
        turned = lax.bitwise_xor(s[z], s[x])
        left = lax.shift_left(turned, np.uint32(n))
        s[z] = lax.bitwise_or(left, lax.shift_right_logical(turned, np.uint32(32 - n)))
  return tuple(s)
