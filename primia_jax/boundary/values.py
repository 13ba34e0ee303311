"""The lattice of the audit: what is known of an array, as the set of what it is made of.

An array is public (no parts), or a function of its parts. A part is secret (no pads), or masked: a
bijection of each of its pads, which are keystreams, whatever else it depends on. So whoever does
not know one of the pads sees uniform numbers, provided that this stream is in nothing else that
crosses. `exposed` decides that for all crossings together.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

KeyName = tuple[str, ...]  # a key's name, then the words of each `prng.derive` from it


class Word(NamedTuple):
  """One uint32 word of a key."""

  key: KeyName
  place: int


class Stream(NamedTuple):
  """The keystream of one key and nonce, which may pad one value."""

  key: KeyName
  nonce: tuple[int | Symbol, ...]


class Symbol(NamedTuple):
  """A public number that another sum has another of, e.g. the round's. No branch may know it."""

  name: str


class Raw(NamedTuple):
  """A key in another use than `prng`'s, or with a nonce that is not known while tracing."""

  key: KeyName


class Part(NamedTuple):
  """One thing that an array is made of.

  Attributes:
    number: names this part, so that a slice of it and the whole are one thing; -1 if secret.
    pads: each hides this part from those who do not know the stream; none if secret.
    rest: what else it depends on: names of inputs, `Stream`s, `Raw` keys.
    bits: so many low bits of each element are padded independently of all other elements; 0 once
      that is not known, and then adding a secret does not mask it.
    high: whether the bits above these lie open.
    eqn: where it was masked, or lost its mask, or was computed.
  """

  number: int
  pads: frozenset[Stream]
  rest: frozenset[Any]
  bits: int
  high: bool
  eqn: Any


class Value(NamedTuple):
  """What is known of an array.

  Attributes:
    parts: it is a function of these and of public things; none if it is public.
    known: its elements, of a small array: numbers, or `Word`s and `Symbol`s in an object array; a
      scalar where all elements are equal; None if not known while tracing.
    varies: `known` is of the site that is followed, and of another site it is not.
  """

  parts: tuple[Part, ...] = ()
  known: np.ndarray | None = None
  varies: bool = False


PUBLIC = Value()


def secret(names: Iterable[Any], eqn: Any = None) -> Value:
  """An array that depends on these inputs or keys."""
  return Value((Part(-1, frozenset(), frozenset(names), 0, False, eqn),))


def contents(part: Part) -> frozenset[Any]:
  return part.pads | part.rest if part.pads else part.rest


def depends(values: Iterable[Value]) -> frozenset[Any]:
  """Everything secret that these depend on."""
  out: frozenset[Any] = frozenset()
  for value in values:
    for part in value.parts:
      out |= contents(part)
  return out


def mixed(values: Sequence[Value], eqn: Any) -> Value:
  """Any function of the values: it tells no more than their parts, and masks nothing any more."""
  return _join([_frozen(part, eqn) for value in values for part in value.parts], eqn)


def chosen(values: Sequence[Value], eqn: Any) -> Value:
  """An array whose elements are each an element of some value, whichever the choice is."""
  told = [value for value in values if value.parts]
  if len(told) > 1:
    return mixed(values, eqn)
  # some elements may be public, and add no mask to what is added to the array
  return Value(tuple(part._replace(bits=0) for value in told for part in value.parts))


def beside(values: Sequence[Value], eqn: Any) -> Value:
  """An array whose elements are each an element of one value, and none of them twice."""
  parts = [part for value in values for part in value.parts]
  return Value(tuple(parts)) if len(parts) < 2 else _join(parts, eqn)


def _frozen(part: Part, eqn: Any) -> Part:
  if part.high:  # not all of its bits are padded, and which they are is no longer known
    return Part(-1, frozenset(), contents(part), 0, False, eqn)
  return part._replace(bits=0) if part.bits else part


def _join(parts: list[Part], eqn: Any) -> Value:
  if len(parts) < 2:
    return Value(tuple(p if p.pads else p._replace(eqn=eqn) for p in parts))
  found: dict[int, Part] = {}
  for part in parts:
    had = found.get(part.number)
    if had is None:
      found[part.number] = part if part.pads else part._replace(eqn=eqn)
    elif part.pads:  # twice the same: adding a secret would use the pad twice
      found[part.number] = _frozen(part, eqn)
    elif had.rest is not part.rest:
      found[-1] = had._replace(rest=had.rest | part.rest, eqn=eqn)
  return Value(tuple(found.values()))


def added(a: Value, b: Value, width: int, eqn: Any, number: Callable[[], int]) -> Value:
  """The sum, difference or exclusive or of two arrays of unsigned or signed words of this width.

  It is a bijection of every pad of a that b does not depend on, and the other way round.
  """
  if not a.parts or not b.parts:
    return Value(tuple(part._replace(eqn=eqn) for part in a.parts or b.parts))
  # one mask for the whole array before several for its pieces
  worth = lambda value: (min(part.bits for part in value.parts), -len(value.parts))
  for padded, other in ((a, b), (b, a)) if worth(a) >= worth(b) else ((b, a), (a, b)):
    theirs = depends([other])
    fresh = [part.pads - theirs for part in padded.parts]
    if not all(part.bits and pads for part, pads in zip(padded.parts, fresh, strict=True)):
      continue
    more: frozenset[Stream] = frozenset()
    if len(padded.parts) == len(other.parts) == 1:
      (p,), (q,) = padded.parts, other.parts
      if q.bits >= p.bits:
        more = q.pads - contents(p)
    rest = theirs - more
    return Value(
      tuple(
        Part(
          number(),
          pads | more,
          (part.rest | (part.pads - pads) | rest) - (pads | more),
          part.bits,
          part.high or part.bits < width,
          eqn,
        )
        for part, pads in zip(padded.parts, fresh, strict=True)
      )
    )
  return mixed([a, b], eqn)


def lowest(value: Value, bits: int, eqn: Any) -> Value:
  """The lowest bits of each element."""
  parts = []
  for part in value.parts:
    high = part.high and part.bits < bits
    parts.append(part._replace(bits=min(part.bits, bits), high=high) if part.bits else part)
  return _join(parts, eqn)


def exposed(parts: Iterable[Part], usable: Callable[[Stream], bool]) -> dict[int, int | None]:
  """The masked parts, by number, that are not hidden when all of them cross.

  A part with a pad that is in no other part is uniform and independent of all others, so it tells
  nothing and can be left out; then the same holds of the rest. Where no part is left out any more,
  the last one is to blame, for it uses again what earlier ones have used.

  Args:
    parts: all masked parts that cross; a part that crosses twice counts once.
    usable: whether the observer does not know the stream's key.

  Returns:
    For each part to blame another part with the same mask; None if the observer knows all masks.
  """
  left = {part.number: part for part in parts if part.pads}
  uses: dict[Any, set[int]] = collections.defaultdict(set)
  for part in left.values():
    for item in contents(part):
      uses[item].add(part.number)

  def hides(part: Part, pad: Stream) -> bool:
    keys = [Raw(pad.key[:i]) for i in range(1, len(pad.key) + 1)]
    alone = uses[pad] <= {part.number} and not any(uses.get(key) for key in keys)
    return usable(pad) and alone

  blamed: dict[int, int | None] = {}
  queue = sorted(left)
  while left:
    is_stuck = not queue
    number = max(left) if is_stuck else queue.pop()
    if number not in left:
      continue
    part = left[number]
    if not any(map(functools.partial(hides, part), part.pads)):
      if not is_stuck:
        continue
      also = set().union(*(uses[pad] for pad in part.pads if usable(pad))) - {number}
      lost = any(map(usable, part.pads))
      blamed[number] = _nearest(left, part, also) if lost else None
    del left[number]
    for item in contents(part):
      uses[item].discard(number)
      queue += left if isinstance(item, Raw) else uses[item] if len(uses[item]) == 1 else ()
  return blamed


def _nearest(left: dict[int, Part], part: Part, others: set[int]) -> int:
  """The first of these that shares a pad, or else that depends on one."""
  return min(others, key=lambda other: (not left[other].pads & part.pads, other), default=-1)
