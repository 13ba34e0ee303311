"""Tags on what party 1 is dealt, so that it can open nothing but what follows from it.

In the table mode every message of party 1 is linear in what it was dealt, with coefficients that
are public once the openings before it are known: over the integers for ring elements, over bits
for words. So tags that are linear, too, follow every share to its opening (`replay`).

- A ring element x, held by party 1: its tag is t = alpha x + beta modulo 2^64, with a secret alpha
  of 32 bits and a uniform beta for each x. Shares live in Z_2^k, k <= 32, and are lifted to 64 bits
  first. The bits above the k-th of a mask are uniform, so that they hide the carries of what the
  mask hides (SPDZ2k: Cramer et al., CRYPTO 2018, of which this is the one-sided form, as in BDOZ:
  Bendlin et al., EUROCRYPT 2011).
- A bit b, held by party 1: its tag is t = b Delta ^ kappa, with a secret Delta of 32 bits and a
  uniform kappa for each b (TinyOT: Nielsen et al., CRYPTO 2012). Words of bits have 32 planes of
  their own shape, so that what is done to words is done to planes.

Party 0 holds alpha, Delta, and every beta and kappa, all expanded from its seed. Party 1 receives
the tags, which are uniform and independent of alpha and Delta, since each beta and kappa hides one.

`respond` and `check` verify all openings of an inference at once, before party 0 sends its shares
of the outputs:

1. Party 1 sends SHA-256 of the tags of all its bits; party 0 can compute the same from the bits
   that it received.
2. Party 0 draws 40 random subsets of the ring elements that party 1 has sent; their challenge was
   not known to party 1 before.
3. For each subset party 1 sends the sum of the elements' bits above the k-th, and SHA-256 of the
   sums of their tags. Party 0 knows the sums of the lower bits, and so of the tags.

Claim. A party 1 that sends anything else than the protocol says, at any opening except that of its
image, is found out but with probability 2^-32 + 2^-40, whatever it knows, if SHA-256 has no
collisions that it can find and ChaCha20 is a pseudorandom function.

Proof sketch. Until the check, what party 0 sends is under masks that party 1 has no share of, and
does not depend on alpha and Delta; so party 1's view is independent of both. Let e be the error in
its ring elements, modulo 2^k and not 0. The error of a random subset's sum is 0 modulo 2^k with
probability at most 1/2, so it is for all 40 with at most 2^-40. Let E be the error of a sum with
its upper bits, as party 1 claims them, for a subset where E is not 0 modulo 2^k. To pass, it must
add alpha E modulo 2^64 to the tags' sum. E is odd times 2^v, v < k <= 32, and alpha has 32 bits, so
each alpha gives another alpha E: it guesses with probability 2^-32. For an error in a bit it must
add Delta to its tag, and guesses as well. Whether it passes depends on alpha, Delta and its own
errors alone, so that a refusal tells nothing about the weights either.

Nothing new is learned about the image: party 0 can compute the hashes itself, but for the sums of
the upper bits, and those are uniform, since each element that is opened is under a mask whose upper
bits are used for it alone. Party 0 is semi-honest, as everywhere.

The opening of the image itself is free, since it defines the image. It is clamped (`clamping`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import prng
from primia_jax.mpc import dealing, protocol
from primia_jax.mpc.circuit import TRUSTED, Apply, Circuit, Linear, Product
from primia_jax.mpc.dealing import ADDITIVE, Derived
from primia_jax.mpc.protocol import Dealt, Operands, Part
from primia_jax.types import Array

BITS, SUBSETS = 32, 40
CHALLENGE_BYTES = DIGEST_BYTES = 32
RESPONSE_BYTES = 8 * SUBSETS + DIGEST_BYTES
_SECRETS, _LIFTS = 3, 4  # subkeys of a party's seed
_KEYS = 2**17  # arrays of keys are numbered from here, those of `dealing` below


class Tagged(NamedTuple):
  """Lifted shares, tags, or keys, of everything that party 1 is dealt.

  Attributes:
    elements: by operation and name, [...] uint64.
    bits: by operation and name, [32, ...] words.
  """

  elements: dict[int, dict[str, Array]]
  bits: dict[int, dict[str, Array]]


class Keys(NamedTuple):
  """What party 0 checks tags by; nobody else may know it."""

  alpha: Array  # [] uint64, below 2^32
  delta: Array  # [32] bool
  keys: Tagged


class Holding(NamedTuple):
  """What party 1 shows tags by; it stays with party 1."""

  shares: Tagged  # without bits
  tags: Tagged


def names(circuit: Circuit, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
  """Shapes and dtypes of what party 1 is dealt for an operation: ring elements, and words."""
  op = circuit.operations[number]
  masks = protocol.masks(op, circuit.config)
  derived: Any = Derived({}, {}, {})
  if isinstance(op, Apply):
    derived = protocol.derived_shapes(op.gate)
  elif isinstance(op, Linear | Product):
    u: Any = jax.ShapeDtypeStruct(op.shape, circuit.config.dtype)
    derived = Derived({"u": u}, {}, {})
  elements: dict[str, Any] = {name: m for name, m in masks.items() if m.kind == ADDITIVE}
  elements |= derived.additive
  words: dict[str, Any] = {name: m for name, m in masks.items() if m.kind != ADDITIVE}
  words |= derived.boolean
  return dict(sorted(elements.items())), dict(sorted(words.items()))


def num_bytes(circuit: Circuit, number: int) -> int:
  """Bytes of an operation's tags, which the dealer sends to party 1."""
  elements, words = names(circuit, number)
  size = lambda v: int(np.prod(v.shape, dtype=np.int64))
  return sum(8 * size(v) for v in elements.values()) + sum(
    BITS * size(v) * np.dtype(v.dtype).itemsize for v in words.values()
  )


# ---- the dealer, and each party alone


def deal(circuit: Circuit, dealt: Dealt) -> Tagged:
  """Party 1's tags on its shares; the caller computes with x64."""
  first, second = dealt.seeds
  alpha, delta, keys = expand_keys(circuit, first)
  shares = lifted(circuit, Part(second, dealt.sent, {}))
  elements = {
    i: {name: alpha * v + keys.elements[i][name] for name, v in each.items()}
    for i, each in shares.elements.items()
  }
  bits = {
    i: {name: times(delta, v) ^ keys.bits[i][name] for name, v in each.items()}
    for i, each in shares.bits.items()
  }
  return Tagged(elements, bits)


def times(delta: Array, words: Array) -> Array:
  """Delta's bits times words [...]: [32, ...]."""
  chosen = delta.reshape(-1, *[1] * words.ndim)
  return jnp.where(chosen, words[None], jnp.zeros_like(words)[None])


def expand_keys(circuit: Circuit, seed: Array) -> Keys:
  """alpha, Delta, and all beta and kappa, from party 0's seed."""
  alpha, delta = prng.bits(prng.derive(seed, _SECRETS), jnp.zeros(3, jnp.uint32), (2,), jnp.uint32)
  fresh = lambda i, j, shape, dtype: dealing.uniform(seed, i, _KEYS + j, shape, dtype)
  elements, bits = {}, {}
  for i in range(len(circuit.operations)):
    ring, words = names(circuit, i)
    elements[i] = {n: fresh(i, j, v.shape, np.uint64) for j, (n, v) in enumerate(ring.items())}
    bits[i] = {
      n: fresh(i, len(ring) + j, (BITS, *v.shape), v.dtype)
      for j, (n, v) in enumerate(words.items())
    }
  planes = (delta >> jnp.arange(BITS, dtype=jnp.uint32)) & jnp.uint32(1)
  return Keys(alpha.astype(jnp.uint64), planes == 1, Tagged(elements, bits))


def lifted(circuit: Circuit, part: Part) -> Tagged:
  """Party 1's shares as the tags know them: ring elements of 64 bits; and its words."""
  key = prng.derive(part.seed, _LIFTS)
  elements, bits = {}, {}
  for i, op in enumerate(circuit.operations):
    ring, words = names(circuit, i)
    masks = protocol.masks(op, circuit.config)
    mine = dealing.expand_masks(part.seed, i, masks) | (part.sent or {}).get(i, {})
    elements[i] = {name: mine[name].astype(jnp.uint64) for name in ring}
    for j, name in enumerate(name for name in ring if name in masks):
      above = dealing.uniform(key, i, j, ring[name].shape, np.uint32).astype(jnp.uint64)
      elements[i][name] = elements[i][name] | (above << jnp.uint64(32))
    bits[i] = {name: mine[name] for name in words}
  return Tagged(elements, bits)


def hold(circuit: Circuit, part: Part, tags: Tagged, published: Operands) -> Holding:
  """Party 1's work on its tags before the image exists."""
  prepared = functools.partial(prepare, circuit, published=published)
  shares = lifted(circuit, part)
  return Holding(
    Tagged(prepared(shares.elements), {}), tags._replace(elements=prepared(tags.elements))
  )


def keep(circuit: Circuit, part: Part, published: Operands) -> Keys:
  """Party 0's work on its keys before the image exists."""
  found = expand_keys(circuit, part.seed)
  elements = prepare(circuit, found.keys.elements, published)
  return found._replace(keys=found.keys._replace(elements=elements))


def prepare(circuit: Circuit, elements: dict, published: Operands) -> dict:
  """What `protocol.prepare` does to party 1's shares, done to their tags: u + L_D(r).

  Args:
    elements: as in `Tagged`.
    published: D of the model owner, as published.
  """
  circuit = wide(circuit)
  full = protocol.full(
    circuit, {i: jnp.asarray(d).astype(jnp.uint64) for i, d in published.items()}
  )
  each = lambda masks, shapes, seed, number: dict(elements[number])
  return protocol.prepare(circuit, 1, Part(None, {}, {}), {}, full, each)  # type: ignore[arg-type]


def wide(circuit: Circuit) -> Circuit:
  """The circuit in Z_2^64; gates still know their ring."""
  return circuit._replace(config=dataclasses.replace(circuit.config, num_bits=64, client=TRUSTED))


# ---- the check


def respond(
  challenge: bytes, num_bits: int, shares: Sequence[np.ndarray], tags: Sequence[np.ndarray]
) -> bytes:
  """Party 1's answer: sums of the upper bits, and a hash of the sums of tags."""
  chosen = _subsets(challenge, sum(v.size for v in shares))
  above = chosen @ (_flat(shares) >> np.uint64(num_bits)) & np.uint64(2 ** (64 - num_bits) - 1)
  return above.astype("<u8").tobytes() + _digest([chosen @ _flat(tags)])


def check(
  challenge: bytes,
  response: bytes | memoryview,
  num_bits: int,
  alpha: int,
  sent: Sequence[np.ndarray],
  keys: Sequence[np.ndarray],
) -> bool:
  """Whether the ring elements that party 1 has sent follow from what it was dealt.

  Args:
    challenge: what party 0 drew after it had received them.
    response: party 1's.
    num_bits: k.
    alpha: the secret.
    sent: what party 1 sent.
    keys: of the same, from `replay`.
  """
  chosen = _subsets(challenge, sum(v.size for v in sent))
  low = _flat(sent) & np.uint64(2**num_bits - 1)
  above = np.frombuffer(response, "<u8", SUBSETS).astype(np.uint64)
  sums = chosen @ low + (above << np.uint64(num_bits))
  want = _digest([np.uint64(alpha) * sums + chosen @ _flat(keys)])
  return hmac.compare_digest(bytes(response[8 * SUBSETS :]), want)


def digest_bits(tags: Sequence[np.ndarray]) -> bytes:
  """SHA-256 of the tags of all words that party 1 sends."""
  return _digest(tags)


def check_bits(
  digest: bytes | memoryview,
  delta: np.ndarray,
  sent: Sequence[np.ndarray],
  keys: Sequence[np.ndarray],
) -> bool:
  """Whether the words that party 1 has sent follow from what it was dealt; as `check`."""
  planes = [
    np.where(delta.reshape(-1, *[1] * v.ndim), v[None], np.zeros_like(v)[None]) ^ key
    for v, key in zip(sent, keys, strict=True)
  ]
  return hmac.compare_digest(bytes(digest), _digest(planes))


def _subsets(challenge: bytes, count: int) -> np.ndarray:
  """[40, count] uint64 of 0 and 1."""
  width = -(-count // 8)
  stream = hashlib.shake_256(challenge).digest(SUBSETS * width)
  bits = np.unpackbits(np.frombuffer(stream, np.uint8).reshape(SUBSETS, width), axis=1)
  return bits[:, :count].astype(np.uint64)


def _flat(values: Sequence[np.ndarray]) -> np.ndarray:
  each = [np.asarray(v).astype(np.uint64).reshape(-1) for v in values]
  return np.concatenate(each) if each else np.zeros(0, np.uint64)


def _digest(values: Sequence[np.ndarray]) -> bytes:
  found = hashlib.sha256()
  for v in values:
    found.update(np.ascontiguousarray(v).tobytes())
  return found.digest()
