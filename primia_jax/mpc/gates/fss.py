"""[public < dealer-known] by function secret sharing: no communication, 0.6 kB of dealt keys for 40
bits.

A distributed comparison function (Boyle et al., EUROCRYPT 2021, figure 1, with one payload bit;
AriaNN and PriMIA use the same family). Each party grows a binary tree of 128-bit seeds from a root
of its own. Correction words, which both parties receive, make the two trees equal off the dealer's
path r and independent on it, so the shares that the parties gather on the way to the public v
cancel to [v < r]. The last seven levels are one 128-bit seed, used as a one-time pad of the answers
to their 128 numbers (early termination; Boyle et al., CCS 2016).

Assumption: ChaCha20 with a uniform 128-bit key (the cipher's own 16-byte form) is a pseudorandom
function of nonce and counter. A node's seed is the key, its level the nonce and its element the
counter. One block gives both children, and guessing one seed of a gate helps to guess no other. One
party alone sees uniform words, whatever r is.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import prng
from primia_jax.mpc.dealing import BOOLEAN, Correlation, Derived, Masks, Uniform
from primia_jax.mpc.gates.comparison import Compared, Comparison, Span
from primia_jax.mpc.sharing import PARTY, Wire
from primia_jax.types import Array

_SIGMA = np.frombuffer(b"expand 16-byte k", "<u4").astype(np.uint32)
_LEAF = 7  # bits that one leaf answers
_FIELD, _FIELDS = 3, 10  # bits of a level's control correction, and levels to a word
_CPU_CHUNK = 2**9  # elements at a time: a quarter of a megabyte of keys stays in the cache
_CHUNK = 2**17  # the same on wide machines: 80 MB of keys

Words = tuple[Array, ...]  # a seed: four uint32 arrays
Rounds = Callable[[Words], Words]


class _Tree(NamedTuple):
  """One comparison, of bits low to high - 1."""

  suffix: str
  low: int
  high: int

  @property
  def levels(self) -> int:
    return max(0, self.high - self.low - _LEAF)

  @property
  def leaf_words(self) -> int:
    return -(-(2 ** min(self.high - self.low, _LEAF)) // 32)


def masks(span: Span, num: int) -> Masks:
  """The roots: each party's share of a root is its own seed."""
  return {f"root{t.suffix}": Uniform((t.leaf_words, num), np.uint32, BOOLEAN) for t in _trees(span)}


def derive(span: Span, r: Array, shares: dict[str, Array]) -> tuple[Derived, None]:
  """The dealer's correction words.

  Args:
    span: the bits to compare.
    r: [N] uint32 or uint64, the dealer's number.
    shares: both parties' shares [2, ...] of the `masks`.

  Returns:
    What both parties receive, and no mask: this comparison opens nothing.
  """
  common: Correlation = {}
  for tree in _trees(span):
    fn = functools.partial(_derive_chunk, tree)
    common |= _chunked(fn, {"r": r, "roots": shares[f"root{tree.suffix}"]})
  return Derived({}, {}, common), None


def evaluate(span: Span, wire: Wire, v: Array, correlation: Correlation) -> Compared:
  """One party's part, without communication.

  Args:
    span: the bits to compare.
    wire: unused.
    v: [N] uint32 or uint64, public; element n must be the dealer's element n, since the nonces hold
      its number.
    correlation: this party's roots and the correction words.
  """
  del wire
  party = lax.axis_index(PARTY).astype(jnp.uint32)
  answers = []
  for tree in _trees(span):
    names = [f"{name}{tree.suffix}" for name in ("root", "seeds", "controls", "leaf")]
    keys = {name: correlation[name] for name in names if name in correlation}
    fn = functools.partial(_run_chunk, tree)
    answers.append(_chunked(fn, {"v": v, **keys}, party)["share"])
  return Compared(*answers)


def _trees(span: Span) -> list[_Tree]:
  """The low bits are no prefix of all bits, so the borrow has a tree of its own."""
  return [_Tree("", span.low, span.high)] + (
    [] if span.cut is None else [_Tree("_cut", 0, span.cut)]
  )


def _derive_chunk(tree: _Tree, rounds: Rounds, chunk: Correlation, first: Array) -> Correlation:
  """The correction words of a few elements: the dealer walks the path r as both parties.

  Arrays are [2, T].
  """
  r, roots = chunk["r"], chunk["roots"]
  seed = tuple(roots[:, i] for i in range(tree.leaf_words))
  zero = seed[0] & np.uint32(0)
  both = lambda x: x[0] ^ x[1]

  def level(carry, i):
    seed, t, value = carry
    bit = _bit(tree, r, i)
    left, right, control = _expand(tree, rounds, seed, first, i)
    off_path = [jnp.where(bit == 1, both(a), both(b)) for a, b in zip(left, right, strict=True)]
    total = both(control)
    stop = (
      both(value) ^ (total >> (3 - bit)) ^ bit
    )  # leaving the path to the left, where bit = 1, means less
    field = (total ^ bit ^ 1) & 1 | (total ^ bit << 1) & 2 | (stop & 1) << 2
    seed, t, step = _descend(
      left, right, control, bit[None], t, tuple(w[None] for w in off_path), field[None]
    )
    return (seed, t, value ^ step), (jnp.stack(off_path), field)

  parties = lax.broadcasted_iota(jnp.uint32, zero.shape, 0)
  carry, out = (seed, zero | parties, zero), {}
  if tree.levels:
    carry, (seeds, fields) = lax.scan(level, carry, np.arange(tree.levels, dtype=np.uint32))
    out = {"seeds": seeds, "controls": _pack(fields)}
  seed, _, value = carry
  fewer = [(_low(tree, r) - 32 * i).clip(0, 32).astype(jnp.uint32) for i in range(tree.leaf_words)]
  answers = [
    ~(jnp.full_like(n, 2**32 - 1) << n) for n in fewer
  ]  # bit v is [v < r]; a shift by 32 gives 0
  pad = [both(word) ^ -both(value) for word in seed]
  out["leaf"] = jnp.stack([a ^ b for a, b in zip(answers, pad, strict=True)])
  return {f"{name}{tree.suffix}": value for name, value in out.items()}


def _run_chunk(
  tree: _Tree, rounds: Rounds, chunk: Correlation, first: Array, party: Array
) -> Correlation:
  """One party's walk to v, for a few elements, arrays [T]."""
  v, root, leaf = chunk["v"], chunk[f"root{tree.suffix}"], chunk[f"leaf{tree.suffix}"]
  seed = tuple(root[i] for i in range(tree.leaf_words))
  zero = seed[0] & np.uint32(0)
  carry = seed, zero | party, zero
  if tree.levels:
    seeds, controls = chunk[f"seeds{tree.suffix}"], chunk[f"controls{tree.suffix}"]

    def level(carry, key):
      (seed, t, value), (i, correction) = carry, key
      left, right, control = _expand(tree, rounds, seed, first, i)
      field = lax.dynamic_index_in_dim(controls, i // _FIELDS, keepdims=False) >> (
        _FIELD * (i % _FIELDS)
      )
      seed, t, step = _descend(left, right, control, _bit(tree, v, i), t, tuple(correction), field)
      return (seed, t, value ^ step), None

    carry, _ = lax.scan(level, carry, (np.arange(tree.levels, dtype=np.uint32), seeds))
  seed, t, value = carry
  low = _low(tree, v).astype(jnp.uint32)
  answer = zero
  for i, word in enumerate(seed):
    answer = jnp.where(low >> 5 == i, word ^ leaf[i] & -t, answer)
  return {"share": ((answer >> (low & 31) ^ value) & 1).astype(jnp.uint8)}


def _expand(
  tree: _Tree, rounds: Rounds, seed: Words, first: Array, level: Array
) -> tuple[Words, Words, Array]:
  """The seeds of both children, and a word with their control bits (0, 1) and value bits (2, 3)."""
  zero = seed[0] & np.uint32(0)
  element = zero | (first + lax.broadcasted_iota(jnp.uint32, zero.shape, zero.ndim - 1))
  nonce = (zero | level, zero | (1 if tree.suffix else 0), zero)
  block = rounds((*(zero | word for word in _SIGMA), *seed, *seed, element, *nonce))
  return block[:4], block[4:8], block[8]


def _descend(
  left: Words, right: Words, control: Array, bit: Array, t: Array, correction: Words, field: Array
) -> tuple[Words, Array, Array]:
  """One step down: the child's corrected seed, its control bit, and what it adds to the share."""
  children = zip(left, right, correction, strict=True)
  seed = tuple(jnp.where(bit == 1, b, a) ^ c & -t for a, b, c in children)
  return seed, (control >> bit ^ t & field >> bit) & 1, (control >> (2 + bit) ^ t & field >> 2) & 1


def _bit(tree: _Tree, v: Array, level: Array) -> Array:
  return ((v >> (tree.high - 1 - level).astype(v.dtype)) & 1).astype(jnp.uint32)


def _low(tree: _Tree, v: Array) -> Array:
  """The position of v among its leaf's numbers."""
  return ((v >> tree.low) & (2 ** min(tree.high - tree.low, _LEAF) - 1)).astype(jnp.int32)


def _pack(fields: Array) -> Array:
  """[levels, T] -> [ceil(levels / 10), T] uint32."""
  words = -(-fields.shape[0] // _FIELDS)
  fields = jnp.pad(fields, ((0, words * _FIELDS - fields.shape[0]), (0, 0))).reshape(
    words, _FIELDS, -1
  )
  shifts = _FIELD * np.arange(_FIELDS, dtype=np.uint32)[None, :, None]
  return lax.reduce(fields << shifts, np.uint32(0), lax.bitwise_or, (1,))


def _chunked(fn: Callable[..., Correlation], arrays: Correlation, *scalars: Array) -> Correlation:
  """fn(rounds, arrays, first, *scalars) for all elements, a few at a time, along the last axis."""
  rounds = _rounds_in_one_loop if _windows_are_exact() else _rounds
  on_cpu = functools.partial(_in_chunks, functools.partial(fn, rounds), _CPU_CHUNK)
  elsewhere = functools.partial(_in_chunks, functools.partial(fn, _rounds), _CHUNK)
  return lax.platform_dependent(arrays, *scalars, cpu=on_cpu, default=elsewhere)


def _in_chunks(
  fn: Callable[..., Correlation], size: int, arrays: Correlation, *scalars: Array
) -> Correlation:
  num = next(iter(arrays.values())).shape[-1]
  size = min(size, num)

  def chunk(start):
    cut = {name: lax.dynamic_slice_in_dim(x, start, size, -1) for name, x in arrays.items()}
    return fn(cut, start.astype(jnp.uint32), *scalars)

  def step(i, out):
    start = jnp.minimum(
      i * size, num - size
    )  # the last may overlap the one before and agrees with it
    return {
      name: lax.dynamic_update_slice_in_dim(out[name], x, start, -1)
      for name, x in chunk(start).items()
    }

  # Under shard_map the loop's carry must vary over the mesh axes that the results vary over.
  zero = functools.reduce(
    operator.or_, (x.ravel()[0].astype(jnp.uint32) for x in arrays.values())
  ) & np.uint32(0)
  shapes = jax.eval_shape(chunk, jax.ShapeDtypeStruct((), jnp.int32))
  init = {
    name: jnp.zeros((*x.shape[:-1], num), x.dtype) | zero.astype(x.dtype)
    for name, x in shapes.items()
  }
  return lax.fori_loop(0, -(-num // size), step, init)


def _rounds(state: Words) -> Words:
  """The ChaCha20 block function, of sixteen arrays of words."""
  mixed = lax.fori_loop(0, 10, lambda _, s: prng.double_round(s), state)
  return tuple(a + b for a, b in zip(mixed, state, strict=True))


def _rounds_in_one_loop(state: Words) -> Words:
  """The same, four times faster on CPU: windows of one word compile to one loop over registers.

  The block function is no monoid, so XLA does not promise to apply it once: see
  `_windows_are_exact`.
  """

  def block(a: Words, b: Words) -> Words:  # one of them is the initial zero
    start = mixed = tuple(x ^ y for x, y in zip(a, b, strict=True))
    for _ in range(10):
      mixed = prng.double_round(mixed)
    return tuple(x + y for x, y in zip(mixed, start, strict=True))

  ones = (1,) * state[0].ndim
  return tuple(lax.reduce_window(state, (np.uint32(0),) * 16, block, ones, ones, "VALID"))


@functools.cache
def _windows_are_exact() -> bool:
  """Whether `_rounds_in_one_loop` equals `_rounds` on this XLA:CPU, found by trying; False without
  a CPU backend.
  """
  try:
    cpu = jax.local_devices(backend="cpu")[0]
  except RuntimeError:
    return False
  words = np.arange(16 * 64, dtype=np.uint32).reshape(16, 64) * np.uint32(2654435761)
  with jax.ensure_compile_time_eval(), jax.default_device(cpu):
    fast, slow = (
      jax.jit(fn)(tuple(map(jnp.asarray, words))) for fn in (_rounds_in_one_loop, _rounds)
    )
    return all(bool((a == b).all()) for a, b in zip(fast, slow, strict=True))


FSS = Comparison("fss", masks, derive, evaluate, lambda span: False, seed_only=False)
