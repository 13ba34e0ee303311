"""The number of an inference as the dealer's commitment to what it dealt for it.

Everything that is dealt for one inference follows from a seed of 32 bytes. The number is SHA-256 of
the publication, of a commitment to the seed, and of a digest of each party's part. So a party that
holds its part and the two other values can check that its part is the one that the number stands
for; the parties compare the number when they begin. Who is shown the seed, and knows the weights'
B, can compute both parts anew and compare.

Assumptions: SHA-256 is collision resistant (the dealer can open no number in two ways), and of a
uniform seed it tells nothing (random oracle).
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import prng
from primia_jax.types import Array

SEED_BYTES = 32


class Committed(NamedTuple):
  """What stands behind a number, besides the publication.

  Attributes:
    seed: the commitment to the seed, hexadecimal.
    parts: the digest of each party's part, hexadecimal.
  """

  seed: str
  parts: tuple[str, str]


def commitment(publication: str, seed: bytes) -> str:
  """To a seed, for one publication."""
  return hashlib.sha256(b"primia_jax seed\n" + publication.encode() + b"\n" + seed).hexdigest()


def digest(part: Any) -> str:
  """Of one party's part: a tree of arrays."""
  found = hashlib.sha256(b"primia_jax part\n")
  for path, leaf in jax.tree_util.tree_flatten_with_path(_plain(part))[0]:
    array = np.ascontiguousarray(leaf)
    name = f"{jax.tree_util.keystr(path)} {array.dtype.str} {array.shape}\n"
    found.update(name.encode())
    found.update(array.data if array.size else b"")
  return found.hexdigest()


def _plain(v: Any) -> Any:
  """The same tree without names of fields, which a file forgets."""
  if isinstance(v, dict):
    return {key: _plain(x) for key, x in v.items()}
  return tuple(map(_plain, v)) if isinstance(v, tuple) else v


def number(publication: str, committed: Committed) -> str:
  """Of the inference, 64 hexadecimal digits."""
  text = "\n".join(["primia_jax inference", publication, committed.seed, *committed.parts])
  return hashlib.sha256(text.encode()).hexdigest()


def key(seed: bytes, purpose: str) -> Array:
  """A key that follows from a seed: HMAC-SHA256(seed, purpose), [8] uint32."""
  return prng.key_of(hmac.digest(seed, purpose.encode(), "sha256"))
