"""What the dealer hands out: correlated randomness; each party's uniform part is only a seed.

A gate names its `masks`, uniform values. Each party expands its own share of them from its own seed
with ChaCha20. From the masks the dealer `derive`s further values, which it shares additively or as
Boolean words: party 0 expands its share from its seed too, so only party 1 receives arrays. Some
derived values go to both parties as they are. The nonce of each array is (gate, number of the
array, 0), so no keystream is used twice under one seed.

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
_DERIVED = 2**16  # derived arrays are numbered from here, masks from 0


class Uniform(NamedTuple):
  """A uniform mask: each party expands its share from its seed."""

  shape: tuple[int, ...]
  dtype: Any
  kind: str  # ADDITIVE or BOOLEAN: how the shares add up


class Derived(NamedTuple):
  """What the dealer computes from the masks of one gate, in the clear."""

  additive: dict[str, Array]
  boolean: dict[str, Array]
  common: dict[str, Array]  # both parties receive these as they are


Masks = dict[str, Uniform]
Correlation = dict[str, Array]  # one party's share of everything that a gate was dealt


def uniform(key: Array, gate: int, number: int, shape: tuple[int, ...], dtype) -> Array:
  """Uniform words of any unsigned dtype, for one array of one gate.

  Args:
    key: [8] uint32, a party's seed.
    gate: the gate's number in the plan.
    number: the array's number in the gate.
    shape: the shape wanted.
    dtype: an unsigned integer dtype.
  """
  dtype = np.dtype(dtype)
  nonce = jnp.asarray([gate, number, 0], jnp.uint32)
  if dtype.itemsize >= 4:
    return prng.bits(key, nonce, shape, dtype)
  size = math.prod(shape)
  words = prng.bits(key, nonce, (-(-size * dtype.itemsize // 4),), jnp.uint32)
  return jax.lax.bitcast_convert_type(words, dtype).reshape(-1)[:size].reshape(shape)


def expand_masks(key: Array, gate: int, masks: Masks) -> Correlation:
  """One party's shares of a gate's masks, from that party's seed."""
  return {
    name: uniform(key, gate, i, mask.shape, mask.dtype)
    for i, (name, mask) in enumerate(sorted(masks.items()))
  }


def expand_shares(key: Array, gate: int, shapes: Mapping[str, Any]) -> Correlation:
  """Party 0's shares of derived values, from its seed.

  Args:
    key: [8] uint32, party 0's seed.
    gate: the gate's number in the plan.
    shapes: by name, the derived arrays or anything else with their shape and dtype.
  """
  return {
    name: uniform(key, gate, _DERIVED + i, v.shape, v.dtype)
    for i, (name, v) in enumerate(sorted(shapes.items()))
  }


def split(key: Array, gate: int, derived: Derived) -> Correlation:
  """Party 1's shares of derived values, which the dealer sends.

  They are uniform and independent of the values for anybody without `key`, party 0's seed.
  """
  first = expand_shares(key, gate, derived.additive | derived.boolean)
  sent = {name: v - first[name] for name, v in derived.additive.items()}
  return sent | {name: v ^ first[name] for name, v in derived.boolean.items()}


def open_mask(shares: Array, kind: str) -> Array:
  """The mask behind two shares [2, ...]; only the dealer holds both."""
  return shares[0] + shares[1] if kind == ADDITIVE else shares[0] ^ shares[1]
