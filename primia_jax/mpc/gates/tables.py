"""[public < dealer-known] by one-time truth tables: leaves without communication, then ANDs of up
to four inputs.

The compared bits are cut into digits of four. For each digit the dealer shares the one-time table v
-> [v < digit] as a 16-bit word. The public digit indexes it, and [v == digit] is the difference of
two neighbouring entries. Digits are combined lexicographically, lt = lt_3 ^ eq_3 lt_2 ^ eq_3 eq_2
lt_1 ^ eq_3 eq_2 eq_1 lt_0, by opening masked bits and using dealt products of their masks (Beaver's
multiplication with many factors; the one-time tables are those of Ishai et al., TCC 2013). Up to 64
bits take two rounds and 40 bits of messages.

The bits of one level share a word. Each node has a lane in it: lane g holds eq in bit 2 g and lt in
bit 2 g + 1.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import native
from primia_jax.mpc.dealing import BOOLEAN, Correlation, Derived, Masks, Uniform, open_mask
from primia_jax.mpc.gates.comparison import Compared, Comparison, Span
from primia_jax.mpc.sharing import PARTY, Wire
from primia_jax.types import Array

_DIGIT, _RADIX = 4, 4


class _Level(NamedTuple):
  """One round of the tree: its nodes, each a tuple of children numbered from low to high."""

  nodes: tuple[tuple[int, ...], ...]
  low: int  # of the root: how many of its children lie below the cut

  @property
  def radix(self) -> int:
    return max(map(len, self.nodes))

  @property
  def is_root(self) -> bool:
    return len(self.nodes) == 1


def masks(span: Span, num: int) -> Masks:
  """The masks of the bits that each level opens."""
  _, levels = _tree(span)
  return {
    name: Uniform((num,), dtype, BOOLEAN)
    for i, level in enumerate(levels)
    for name, dtype in zip(_message_names(i, level), _message_dtypes(i, level), strict=True)
  }


def opens_borrow(span: Span) -> bool:
  """Whether the tree opens the borrow, masked, as an input of its root."""
  levels = _tree(span)[1]
  return bool(levels) and levels[-1].low == 1


def derive(span: Span, r: Array, shares: dict[str, Array]) -> tuple[Derived, Array | None]:
  """The dealer's tables and products of masks.

  Args:
    span: the bits to compare.
    r: [N] uint32 or uint64, the dealer's number.
    shares: both parties' shares [2, ...] of the `masks`.

  Returns:
    What the dealer deals, and the mask [N] uint8 of the borrow if the tree opens it.
  """
  digits, levels = _tree(span)
  one = jnp.uint32(1)
  boolean = {
    f"table{j}": ((one << _digit(r, d)) - one).astype(jnp.uint16) for j, d in enumerate(digits)
  }
  borrow_mask = None
  for i, level in enumerate(levels):
    words = _children(
      i, level, [open_mask(shares[name], BOOLEAN) for name in _message_names(i, level)]
    )
    variables = _variables(level, words)
    packed = _pack(level, [_and(variables, s) for s in _products(level)])
    boolean |= {f"products{i}_{j}": word for j, word in enumerate(packed)}
    if level.low == 1:
      borrow_mask = _borrow_bit(level, words)
  return Derived({}, boolean, {}), borrow_mask


def evaluate(span: Span, wire: Wire, v: Array, correlation: Correlation) -> Compared:
  """One party's part, in `len(levels)` rounds.

  Args:
    span: the bits to compare.
    wire: to the other party.
    v: [N] uint32 or uint64, public.
    correlation: this party's shares of the masks and of the derived values.
  """
  digits, levels = _tree(span)
  first = lax.axis_index(PARTY) == 0
  tables = [correlation[f"table{j}"] for j in range(len(digits))]
  if not levels:  # one digit: its table is the answer
    return Compared(_look_up(digits, _Level(((0,),), 0), v, tables, first)[0] >> np.uint8(1))
  message = [native.barrier(word) for word in _look_up(digits, levels[0], v, tables, first)]
  borrow = opened_borrow = None
  for i, level in enumerate(levels):
    mask = [correlation[name] for name in _message_names(i, level)]
    opened = wire.open_boolean([m ^ r for m, r in zip(message, mask, strict=True)], f"compare {i}")
    public = _children(i, level, opened, 1)
    if level.low == 1:
      opened_borrow = _borrow_bit(level, public)
    values = _variables(level, public)
    secrets = _variables(level, _children(i, level, mask))
    num_words = -(-len(_products(level)) // len(_slots(level)))
    products = _unpack(level, [correlation[f"products{i}_{j}"] for j in range(num_words)])
    known = dict(zip(_products(level), products, strict=True))
    known |= {(name,): secret for name, secret in secrets.items()}
    own = _variables(level, _children(i, level, message))  # the highest child's lt enters linearly

    def less(children: int) -> Array:
      """The lt of the lowest children together."""
      lt = own[f"l{children - 1}"]  # noqa: B023
      for term in _lt_terms(children):
        lt = lt ^ _masked_and(term, values, known, first)  # noqa: B023
      return lt

    lt = less(level.radix)
    message = [
      lt
      if level.is_root
      else _masked_and(_eq_term(level), values, known, first) | (lt << lt.dtype.type(1))
    ]
    message = [native.barrier(message[0])]
    if level.low > 1:
      borrow = native.barrier(less(level.low))
  return Compared(message[0], borrow, opened_borrow)


def _tree(span: Span) -> tuple[list[tuple[int, int]], list[_Level]]:
  """The digits (start, width) from low to high, and the levels that combine them."""
  cut = span.low if span.cut is None else span.cut
  parts = [_digits(span.low, cut), _digits(cut, span.high)]
  digits = parts[0] + parts[1]
  counts, levels = [len(p) for p in parts], []
  while sum(counts) > 1:
    if sum(counts) <= _RADIX:  # the root; its first children are the part below the cut
      levels.append(_Level((tuple(range(sum(counts))),), counts[0]))
      break
    groups = [_groups(0, counts[0]), _groups(counts[0], sum(counts))]
    levels.append(_Level(tuple(groups[0] + groups[1]), 0))
    counts = [len(g) for g in groups]
  return digits, levels


def _digits(low: int, high: int) -> list[tuple[int, int]]:
  return [(start, min(_DIGIT, high - start)) for start in range(low, high, _DIGIT)]


def _groups(first: int, last: int) -> list[tuple[int, ...]]:
  """Children first to last - 1 in as few and as equal groups as the radix allows."""
  num = -(-(last - first) // _RADIX)
  bounds = [first + (last - first) * i // num for i in range(num + 1)] if num else []
  return [tuple(range(a, b)) for a, b in itertools.pairwise(bounds)]


def _borrow_bit(level: _Level, words: list[Array]) -> Array:
  """The lt of child 0, which is the lowest child of node 0."""
  word = words[level.radix - len(level.nodes[0])]
  return ((word >> word.dtype.type(1)) & word.dtype.type(1)).astype(jnp.uint8)


def _lanes(num: int) -> np.dtype:
  return np.dtype(np.uint8 if num <= 4 else np.uint16 if num <= 8 else np.uint32)


def _even(dtype, num: int):
  """A word with a one in the even bit of each of `num` lanes."""
  return dtype.type(sum(1 << 2 * i for i in range(num)))


def _digit(v: Array, digit: tuple[int, int]) -> Array:
  start, width = digit
  return ((v >> v.dtype.type(start)) & v.dtype.type(2**width - 1)).astype(jnp.uint32)


def _look_up(
  digits: list[tuple[int, int]], level: _Level, v: Array, tables: list[Array], first: Array
) -> list[Array]:
  """The leaves' bits as the first level reads them: lane g of word i is child i of node g."""
  dtype, one = _lanes(len(level.nodes)), jnp.uint32(1)
  start = jnp.where(
    first, one, jnp.uint32(0)
  )  # [-1 < digit] is 1, known to all: party 0's share is 1
  words = []
  for i in range(level.radix):
    word = jnp.zeros(v.shape, jnp.uint32)
    for g, node in enumerate(level.nodes):
      child = i - (level.radix - len(node))  # nodes with fewer children lack the lowest ones
      if child < 0:
        pair = start  # a digit that is always equal: lt = 0, eq = 1
      else:
        table = (tables[node[child]].astype(jnp.uint32) << one) | start
        pair = (table >> _digit(v, digits[node[child]])) & jnp.uint32(3)
      word = word | (pair << jnp.uint32(2 * g))
    words.append(
      (word ^ ((word >> one) & _even(np.dtype(np.uint32), len(level.nodes)))).astype(dtype)
    )
  return words


def _message_names(i: int, level: _Level) -> list[str]:
  """The leaves send a word for the i-th children of all nodes; higher levels send the nodes' own
  word.
  """
  return [f"level{i}_{j}" for j in range(1 if i else level.radix)]


def _message_dtypes(i: int, level: _Level) -> list[np.dtype]:
  return [_lanes(sum(map(len, level.nodes)))] if i else [_lanes(len(level.nodes))] * level.radix


def _children(i: int, level: _Level, message: list[Array], missing: int = 0) -> list[Array]:
  """Word i, the i-th child of every node, from a level's message.

  `missing` is the eq of a child that does not exist.
  """
  if i == 0:
    return message
  word, dtype = message[0], message[0].dtype.type
  lanes, words = _lanes(len(level.nodes)), []
  for j in range(level.radix):
    out = jnp.zeros_like(word)
    for g, node in enumerate(level.nodes):
      child = j - (level.radix - len(node))
      pair = (
        (word >> dtype(2 * node[child])) & dtype(3) if child >= 0 else jnp.full_like(word, missing)
      )
      out = out | (pair << dtype(2 * g))
    words.append(out.astype(lanes))
  return words


def _variables(level: _Level, words: list[Array]) -> dict[str, Array]:
  """eq and lt of every child, each in the even bits of its lane."""
  even, out = _even(words[0].dtype, len(level.nodes)), {}
  for i, word in enumerate(words):
    out[f"e{i}"] = word & even
    out[f"l{i}"] = (word >> word.dtype.type(1)) & even
  return out


def _lt_terms(children: int) -> list[tuple[str, ...]]:
  return [(f"l{i}", *(f"e{j}" for j in range(i + 1, children))) for i in range(children - 1)]


def _eq_term(level: _Level) -> tuple[str, ...]:
  return tuple(f"e{j}" for j in range(level.radix))


def _products(level: _Level) -> list[tuple[str, ...]]:
  """The products of masks that the dealer deals: all subsets of two or more factors of a term."""
  terms = _lt_terms(level.radix) + ([] if level.is_root else [_eq_term(level)])
  subsets = {
    tuple(sorted(s))
    for t in terms
    for n in range(2, len(t) + 1)
    for s in itertools.combinations(t, n)
  }
  return sorted(subsets, key=lambda s: (len(s), s))


def _and(variables: dict[str, Array], names: tuple[str, ...]) -> Array:
  out = variables[names[0]]
  for name in names[1:]:
    out = out & variables[name]
  return out


def _masked_and(
  term: tuple[str, ...], values: dict[str, Array], known: dict, first: Array
) -> Array:
  """A share of the product of (value ^ mask) over a term: the sum over subsets of products of
  values and of masks.
  """
  everything = _and(values, term)
  out = jnp.where(first, everything, jnp.zeros_like(everything))
  for n in range(1, len(term) + 1):
    for s in itertools.combinations(term, n):
      rest = tuple(name for name in term if name not in s)
      mask = known[tuple(sorted(s))]
      out = out ^ (mask & _and(values, rest) if rest else mask)
  return out


def _slots(level: _Level) -> list[int]:
  """The products' places in a word: a lane has two bits, a product uses one, and few lanes leave
  room above.
  """
  num = len(level.nodes)
  bits = _lanes(num).itemsize * 8
  return [base + odd for base in range(0, bits - 2 * num + 1, 2 * num) for odd in (0, 1)]


def _pack(level: _Level, products: list[Array]) -> list[Array]:
  slots, words = _slots(level), []
  for i in range(0, len(products), len(slots)):
    word = jnp.zeros_like(products[0])
    for product, slot in zip(products[i : i + len(slots)], slots, strict=False):
      word = word | (product << word.dtype.type(slot))
    words.append(word)
  return words


def _unpack(level: _Level, words: list[Array]) -> list[Array]:
  slots, num = _slots(level), len(_products(level))
  shifted = [
    words[i // len(slots)] >> words[0].dtype.type(slots[i % len(slots)]) for i in range(num)
  ]
  return [word & _even(word.dtype, len(level.nodes)) for word in shifted]


TABLES = Comparison("tables", masks, derive, evaluate, opens_borrow, seed_only=True)
