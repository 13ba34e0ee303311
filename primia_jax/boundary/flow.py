"""Data flow through a jaxpr: from the labels of its inputs to what crosses, and its outputs.

Every primitive without a rule of its own gives a function of its inputs, which tells no more than
they do and no longer masks a secret. Every equation with an effect, on a named axis, or in code
that cannot be read makes its inputs cross (`meetings`). So a primitive that is not understood can
make the audit fail, never pass. Loops are such primitives, because their bodies would use a stream
again and again. A choice by anything but the program's own constants joins all that may be chosen:
a branch that one site or one round takes would otherwise stand for all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import numpy as np

from primia_jax import prng
from primia_jax.boundary import known, meetings, sources
from primia_jax.boundary.values import (
  PUBLIC,
  KeyName,
  Part,
  Raw,
  Stream,
  Symbol,
  Value,
  Word,
  added,
  beside,
  chosen,
  depends,
  lowest,
  mixed,
  secret,
)
from primia_jax.mpc.lowering.program import CALLS

# Stands for a jaxpr that was traced once and for other shapes, `inner`; its results have the shapes
# `avals` here, and `resized` tells that of what crosses inside.
folded = jax.extend.core.Primitive("boundary_folded")
folded.multiple_results = True
folded.def_abstract_eval(lambda *args, inner, avals, resized: list(avals))


class Met(NamedTuple):
  """A value that meets others inside the function: by a collective, or on the host.

  Attributes:
    value: what is known of it.
    aval: its shape and dtype.
    how: the primitive.
    eqn: where.
    repeats: it does so in a loop, where masks would serve again.
  """

  value: Value
  aval: Any
  how: str
  eqn: Any
  repeats: bool


class Walk(NamedTuple):
  """One walk through a jaxpr.

  Attributes:
    met: what has crossed inside so far, in order.
    numbers: of new parts.
    streams: the number of each sum of streams, so that equal ones are one part.
    nonces: which words of each key's nonces are symbols. A symbol may be any number, so a key whose
      nonces differ in this might serve twice.
    position: on the named axis that is walked, e.g. the party; None where it is not known.
    disclosed: keys that the observer holds; streams of theirs are public.
    call: inside a function of JAX itself, the equation that calls it: what JAX has traced once
      serves many callers, so its own lines are those of the first.
    closed: arrays that the function may close over, since anybody may know them; None for all. Any
      other array that it closes over counts as secret.
  """

  met: list[Met]
  numbers: Iterator[int]
  streams: dict[Any, int]
  nonces: dict[Any, tuple[Any, ...]]
  position: int | None
  disclosed: frozenset[KeyName]
  call: Any = None
  closed: Sequence[Any] | None = None


def start(
  position: int | None = None,
  disclosed: Iterable[KeyName] = (),
  closed: Sequence[Any] | None = None,
) -> Walk:
  """A walk that has met nothing; it may go through several jaxprs, one after another."""
  return Walk([], itertools.count(), {}, {}, position, frozenset(disclosed), None, closed)


def follow(state: Walk, closed: Any, inputs: Sequence[Value]) -> list[Value]:
  """Labels of a closed jaxpr's outputs from those of its inputs."""
  return _run(state, closed.jaxpr, closed.consts, inputs, closed.jaxpr.outvars)


def follow_one(state: Walk, closed: Any, inputs: Sequence[Value], output: int) -> Value:
  """`follow` for one output alone, and only as far as that needs."""
  jaxpr, wanted, eqns = closed.jaxpr, {closed.jaxpr.outvars[output]}, []
  for eqn in reversed(jaxpr.eqns):
    if wanted & set(eqn.outvars):
      wanted |= {v for v in eqn.invars if not isinstance(v, jax.extend.core.Literal)}
      eqns.append(eqn)
  short = jaxpr.replace(eqns=eqns[::-1], outvars=[jaxpr.outvars[output]])
  return _run(state, short, closed.consts, inputs, short.outvars)[0]


def key(name: KeyName, shape: tuple[int, ...] = (8,)) -> Value:
  """The label of a key."""
  words = np.empty(8, object)
  words[:] = [Word(name, i) for i in range(8)]
  return keys(words.reshape(shape))


def keys(words: np.ndarray) -> Value:
  """The label of an array of words."""
  names = {word.key for word in words.flat if isinstance(word, Word)}
  return secret(map(Raw, sorted(names)))._replace(known=words) if names else Value((), words)


def _enter(state: Walk, body: Any, inputs: Sequence[Value]) -> list[Value]:
  jaxpr = meetings.jaxpr_of(body)
  return _run(state, jaxpr, getattr(body, "consts", ()), inputs, jaxpr.outvars)


def _run(
  state: Walk, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], outvars: Sequence[Any]
) -> list[Value]:
  env: dict[Any, Value] = {}
  for var, const in zip(jaxpr.constvars, consts, strict=True):
    env[var] = _constant(state, const)
  env.update(zip(jaxpr.invars, inputs, strict=True))

  def read(atom: Any) -> Value:
    if isinstance(atom, jax.extend.core.Literal):
      return _constant(state, atom.val)
    return env[atom]

  for eqn in jaxpr.eqns:
    values = [read(v) for v in eqn.invars]
    name = eqn.primitive.name
    if meetings.crosses(eqn):
      for atom, value in zip(eqn.invars, values, strict=True):
        state.met.append(Met(value, atom.aval, name, eqn, False))
        if not isinstance(atom, jax.extend.core.Literal):
          env[atom] = PUBLIC  # whoever observes has it now
      outputs = [PUBLIC] * len(eqn.outvars)
    else:
      outputs = _apply(state, name, eqn, values)
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [read(v) for v in outvars]


def _constant(state: Walk, value: Any) -> Value:
  """A literal, or an array that the function closes over."""
  if state.closed is None or np.size(value) < 2 or is_among(value, state.closed):
    return Value((), known.constant(value))
  return secret([f"an array {list(np.shape(value))} that the function closes over"])


def is_among(value: Any, arrays: Sequence[Any]) -> bool:
  """Whether an array is one of these, or equal to one."""
  alike = (a for a in arrays if np.shape(a) == np.shape(value) and a.dtype == value.dtype)
  return any(a is value or np.array_equal(a, value) for a in alike)


def _apply(state: Walk, name: str, eqn: Any, values: list[Value]) -> list[Value]:
  if name in CALLS:
    inner = next(eqn.params[p] for p in CALLS[name] if p in eqn.params)
    source = sources.function(inner)
    if source == _STREAMS:
      return [_streams(state, eqn, *values)]
    if source == _BLOCKS:
      return [_blocks(state, eqn, *values)]
    if state.call is None and sources.is_foreign(source):
      state = state._replace(call=eqn)
    return _enter(state, inner, values)
  if name == folded.name:
    return _unfold(state, eqn, values)
  if name == "cond":
    return _cond(state, eqn, values)
  if name == "axis_index":
    return [Value((), None if state.position is None else np.asarray(state.position, np.int32))]
  if held := meetings.bodies(eqn):  # a loop, or another one that is not followed
    inside = [_constant(state, const) for body in held for const in meetings.constants(body)]
    _meet_inside(state, eqn, [*values, *inside])
    return [mixed([*values, *inside], eqn)] * len(eqn.outvars)
  if meetings.is_barrier(eqn):
    return values
  outputs = _plain(state, name, eqn, values)
  return [v._replace(varies=True) for v in outputs] if any(v.varies for v in values) else outputs


def _plain(state: Walk, name: str, eqn: Any, values: list[Value]) -> list[Value]:
  is_followed = len(eqn.outvars) == 1 and not (name == "select_n" and values[0].varies)
  found = known.apply(eqn, [v.known for v in values]) if is_followed else None
  if not any(v.parts for v in values):
    return [Value((), found)] if len(eqn.outvars) == 1 else [PUBLIC] * len(eqn.outvars)
  if found is not None and found.dtype == object:
    return [_without_disclosed(state, keys(found))]
  out = _rule(state, name, eqn, values)
  return [out._replace(known=found)] if len(eqn.outvars) == 1 else [out] * len(eqn.outvars)


def _rule(state: Walk, name: str, eqn: Any, values: list[Value]) -> Value:
  """What an equation with one or more results makes of secret things."""
  aval, at = eqn.outvars[0].aval, state.call or eqn
  if name == "select_n" and not values[0].parts:
    which = _choice(values[0])
    return values[1 + which] if which is not None else chosen(values[1:], at)
  is_word = isinstance(aval.dtype, np.dtype) and aval.dtype.kind in "iub"
  width = 8 * aval.dtype.itemsize if is_word else 0
  fresh = functools.partial(next, state.numbers)
  if name in _WORDWISE:  # a smaller array is repeated, and with it every mask in it
    sizes = [math.prod(v.aval.shape) for v in eqn.invars]
    size = math.prod(aval.shape)
    values = [
      v if n == size or not v.parts else mixed([v], at) for v, n in zip(values, sizes, strict=True)
    ]
  if not is_word:
    return mixed(values, at)
  match name:
    case "add" | "sub" | "add_any" | "xor":
      return added(values[0], values[1], width, at, fresh)
    case "neg" | "not" | "reshape" | "squeeze" | "expand_dims" | "transpose" | "rev" | "copy":
      return beside(values, at)
    case "slice" | "pvary" | "pcast" | "sharding_constraint" | "copy_p":
      return beside(values, at)
    case "concatenate" | "stack":  # beside public elements a mask does not cover the whole array
      return beside(values, at) if all(v.parts for v in values) else mixed(values, at)
    case "broadcast_in_dim" if math.prod(eqn.invars[0].aval.shape) == math.prod(aval.shape):
      return beside(values, at)
    case "dynamic_slice" if not depends(values[1:]):
      return beside(values[:1], at)
    case "pad" if not depends(values[1:]):
      cuts = all(max(config) <= 0 for config in eqn.params["padding_config"])
      return beside(values[:1], at) if cuts else mixed(values[:1], at)
    case "convert_element_type":
      before = eqn.invars[0].aval.dtype
      if before.kind in "iu" and aval.dtype.kind in "iu":
        return lowest(values[0], width, at) if before.itemsize > aval.dtype.itemsize else values[0]
    case "bitcast_convert_type":
      before = eqn.invars[0].aval.dtype
      full = all(p.bits in (0, 8 * before.itemsize) for p in values[0].parts)
      if before.kind in "iu" and full:
        return lowest(values[0], width, at)
    case "and":
      for one, other in (values, values[::-1]):
        number = _choice(other)
        if number is not None and number >= 0 and number & (number + 1) == 0:
          return lowest(one, number.bit_length(), at)
  return mixed(values, at)


def _choice(value: Value) -> int | None:
  """The number that it is at every site and in every round, if that is known."""
  return None if value.varies else known.single(value.known)


def _unfold(state: Walk, eqn: Any, values: list[Value]) -> list[Value]:
  def fitting(value: Value, aval: Any) -> Value:
    fits = value.known is None or value.known.shape in ((), aval.shape)
    return value if fits else value._replace(known=None)

  inner, before = eqn.params["inner"], len(state.met)
  outputs = _enter(state, inner, list(map(fitting, values, inner.in_avals)))
  for i, m in enumerate(state.met[before:], before):
    state.met[i] = m._replace(aval=eqn.params["resized"](m.aval))
  return list(map(fitting, outputs, eqn.params["avals"]))


def _cond(state: Walk, eqn: Any, values: list[Value]) -> list[Value]:
  which, *operands = values
  branches, chosen = eqn.params["branches"], _choice(which)
  if chosen is not None:
    return _enter(state, branches[min(max(chosen, 0), len(branches) - 1)], operands)
  each = [_enter(state, branch, operands) for branch in branches]
  alike = lambda value: [part._replace(eqn=None) for part in value.parts]
  same = lambda outs: not which.parts and all(alike(out) == alike(outs[0]) for out in outs)
  join = lambda outs: Value(outs[0].parts) if same(outs) else mixed([which, *outs], eqn)
  return [join(outs) for outs in zip(*each, strict=True)]


def _meet_inside(state: Walk, eqn: Any, values: list[Value]) -> None:
  """Notes what crosses inside a body that is not followed, whatever it is made of."""
  for body in meetings.bodies(eqn):
    for inner in meetings.meetings(body):
      all_of = mixed(values, eqn)
      for atom in inner.invars:
        state.met.append(Met(all_of, atom.aval, inner.primitive.name, inner, True))


# ---- keystreams


def _streams(state: Walk, eqn: Any, key_words: Value, signs: Value, nonce: Value) -> Value:
  """`prng.bits` and `prng.mask_sum`: the signed sum of the keys' streams."""
  width = 8 * eqn.outvars[0].aval.dtype.itemsize
  if not key_words.parts and (key_words.known is None or key_words.known.dtype != object):
    return PUBLIC if not nonce.parts else mixed([nonce], eqn)
  words, factors, numbers = key_words.known, signs.known, nonce.known
  if words is None or factors is None or factors.dtype == object or numbers is None:
    return mixed([key_words, signs, nonce], eqn)
  total: dict[Stream, int] = {}
  rest: set[Any] = set()
  rows = eqn.invars[0].aval.shape[0]
  for row, sign in zip(words, np.broadcast_to(factors, rows), strict=True):
    name = _whole_key(row)
    if name is None:
      rest |= {Raw(w.key) for w in row if isinstance(w, Word) and not held(state, w.key)}
    elif sign and not held(state, name):
      drawn = _nonce(state, name, numbers)
      if drawn is None:
        return mixed([key_words, signs, nonce], eqn)
      total[Stream(name, drawn)] = total.get(Stream(name, drawn), 0) + int(sign)
  pads = frozenset(stream for stream, sign in total.items() if sign % 2)
  rest |= {stream for stream, sign in total.items() if sign and sign % 2 == 0}
  if not pads:
    return secret(rest, eqn) if rest else PUBLIC
  made = frozenset(total.items()), frozenset(rest), width
  number = state.streams.setdefault(made, next(state.numbers))
  return Value((Part(number, pads, frozenset(rest), width, False, eqn),))


def _blocks(state: Walk, eqn: Any, key_words: Value, nonce: Value, counter: Value) -> Value:
  """`prng.chacha20`, and with it `prng.derive`: a key of its own for each nonce and counter."""
  if not key_words.parts and (key_words.known is None or key_words.known.dtype != object):
    return mixed([nonce, counter], eqn)
  shape, words = eqn.outvars[0].aval.shape, key_words.known
  name = None if words is None else _whole_key(words)
  numbers, first = nonce.known, known.single(counter.known)
  if name is None or numbers is None or first is None or math.prod(shape) > 2**12:
    return mixed([key_words, nonce, counter], eqn)
  drawn = _nonce(state, (*name, f"blocks from {first}"), numbers)
  if drawn is None:
    return mixed([key_words, nonce, counter], eqn)
  out, told = np.empty(shape, object), ",".join(map(str, drawn))
  for i, b in np.ndindex(shape):
    out[i, b] = Word((*name, f"{told};{first + b}"), i)
  return _without_disclosed(state, keys(out))


def _nonce(state: Walk, name: KeyName, numbers: np.ndarray) -> tuple[int | Symbol, ...] | None:
  """The words of a nonce; None where it is not known or might be that of another stream."""
  drawn = tuple(np.broadcast_to(numbers, 3))
  if any(isinstance(n, Word) for n in drawn):
    return None
  kinds = tuple(n if isinstance(n, Symbol) else int for n in drawn)
  if state.nonces.setdefault(name, kinds) != kinds:
    return None
  return tuple(n if isinstance(n, Symbol) else int(n) for n in drawn)


def _whole_key(row: np.ndarray) -> KeyName | None:
  """The key whose eight words these are, in order."""
  words = list(row.flat)
  if len(words) != 8 or not all(isinstance(w, Word) for w in words):
    return None
  return words[0].key if words == [Word(words[0].key, i) for i in range(8)] else None


def held(state: Walk, name: KeyName) -> bool:
  """Whether the observer has this key, or one that it is derived from."""
  return bool(state.disclosed) and any(name[:i] in state.disclosed for i in range(1, len(name) + 1))


def _without_disclosed(state: Walk, value: Value) -> Value:
  rest = {item for item in depends([value]) if not held(state, item.key)}
  return (secret(rest) if rest else PUBLIC)._replace(known=value.known)


# What `prng` compiles by itself; every stream and every subkey is made in one of these.
_STREAMS, _BLOCKS = (f"{name} at {prng.__file__}" for name in ("_mask_sum", "_blocks"))
_WORDWISE = ("add", "sub", "add_any", "xor", "and")
