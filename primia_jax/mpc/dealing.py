"""What the dealer hands out: correlated randomness, of which a party's uniform part is only a seed.

A gate names its `masks`, uniform values of which each party expands its own share from its own seed
by ChaCha20, and what the dealer `derive`s from them: values that are shared additively or as
Boolean words (party 0's share is once more expanded from its seed, so only party 1 receives an
array) and values both parties are given as they are. The nonce of each array is (gate, number of
the array, 0): no keystream is ever used twice under one seed.

Assumption: ChaCha20 with a uniform secret key is a pseudorandom function, and the dealer, who
learns shapes only, colludes with neither party.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.types import Array

ADDITIVE, BOOLEAN = "additive", "boolean"
CHACHA20, THREEFRY = "chacha20", "threefry"
_DERIVED = 2**16  # numbers of derived arrays begin here; those of masks at 0


class Uniform(NamedTuple):
  """A uniform mask: both parties expand their shares of it from their seeds."""

  shape: tuple[int, ...]
  dtype: Any
  kind: str  # ADDITIVE or BOOLEAN: how the shares add up


class Derived(NamedTuple):
  """What the dealer computes from the masks of one gate, in the clear."""

  additive: dict[str, Array]
  boolean: dict[str, Array]
  common: dict[str, Array]  # both parties receive these as they are


Masks = dict[str, Uniform]
Correlation = dict[str, Array]  # one party's share of everything a gate was dealt


def uniform(
  key: Array, gate: int, number: int, shape: tuple[int, ...], dtype, generator: str = CHACHA20
) -> Array:
  """Uniform words of any unsigned dtype, for one array of one gate.

  Args:
    key: [8] uint32, a party's seed.
    gate: which gate of the plan.
    number: which of the gate's arrays.
    shape: the shape wanted.
    dtype: an unsigned integer dtype.
    generator: CHACHA20, or THREEFRY, JAX's statistical generator, which promises no secrecy.
  """
  dtype = np.dtype(dtype)
  if generator == THREEFRY:
    seed = jax.random.wrap_key_data(key[:2] ^ key[2:4] ^ key[4:6] ^ key[6:], impl="threefry2x32")
    return jax.random.bits(jax.random.fold_in(jax.random.fold_in(seed, gate), number), shape, dtype)
  nonce = jnp.asarray([gate, number, 0], jnp.uint32)
  if dtype.itemsize >= 4:
    return prng.bits(key, nonce, shape, dtype)
  size = math.prod(shape)
  words = prng.bits(key, nonce, (-(-size * dtype.itemsize // 4),), jnp.uint32)
  return jax.lax.bitcast_convert_type(words, dtype).reshape(-1)[:size].reshape(shape)


def expand_masks(key: Array, gate: int, masks: Masks, generator: str = CHACHA20) -> Correlation:
  """One party's shares of a gate's masks, from that party's seed."""
  return {
    name: uniform(key, gate, i, mask.shape, mask.dtype, generator)
    for i, (name, mask) in enumerate(sorted(masks.items()))
  }


def expand_derived(
  key: Array, gate: int, derived: Derived, generator: str = CHACHA20
) -> Correlation:
  """Party 0's shares of what was derived, from its seed; `derived` may hold shapes only."""
  return expand_shares(key, gate, {**derived.additive, **derived.boolean}, generator)


def expand_shares(
  key: Array, gate: int, shapes: Mapping[str, Any], generator: str = CHACHA20
) -> Correlation:
  """The same from the shapes and dtypes by name."""
  return {
    name: uniform(key, gate, _DERIVED + i, v.shape, v.dtype, generator)
    for i, (name, v) in enumerate(sorted(shapes.items()))
  }


def split(key: Array, gate: int, derived: Derived, generator: str = CHACHA20) -> Correlation:
  """Party 1's shares: what the dealer sends, uniform and independent of the values to whoever lacks
  party 0's seed.
  """
  first = expand_derived(key, gate, derived, generator)
  sent = {name: v - first[name] for name, v in derived.additive.items()}
  sent |= {name: v ^ first[name] for name, v in derived.boolean.items()}
  return sent


def open_mask(shares: Array, kind: str) -> Array:
  """The mask that two shares [2, ...] stand for; the dealer alone can compute it."""
  return shares[0] + shares[1] if kind == ADDITIVE else shares[0] ^ shares[1]
