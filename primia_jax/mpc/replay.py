"""From the tags of what party 1 was dealt to those of what it opens.

The protocol itself, run as party 1 with the opened values known, is a linear map from what was
dealt to what is opened. So it is run again on tags, or on keys, in place of shares: once in Z_2^64
for ring elements, and once for each plane of tags of bits. Nothing is exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import ring
from primia_jax.mpc import encoding, protocol, segments, tags
from primia_jax.mpc.circuit import Circuit
from primia_jax.mpc.gates.elementwise import IMAGE
from primia_jax.mpc.sharing import DATA_OWNER, PARTY, Wire
from primia_jax.types import Array

ELEMENT, WORD, FREE = "element", "word", "free"  # what an opening opens; FREE: a secret input


class Noting(Wire):
  """A wire that notes the kind of each opening, in the program's order, and sends k bits only.

  What a share has above the k-th bit may follow from earlier masks in another way than its lifted
  form has it, so both together could tell something about them.
  """

  kinds: list[str]
  num_bits: int

  def open_additive(self, x: Array, what: str) -> Array:
    self.kinds.append(FREE if what == IMAGE else ELEMENT)
    return super().open_additive(ring.reduce(x, self.num_bits), what)

  def open_boolean(self, words: list[Array], what: str) -> list[Array]:
    self.kinds += [WORD] * len(words)
    return super().open_boolean(words, what)


def noting(num_bits: int) -> Noting:
  """A wire between devices that has noted nothing yet."""
  wire = Noting(swap=True)
  wire.kinds, wire.num_bits = [], num_bits
  return wire


class _Known(Wire):
  """A wire on which everything was opened before; it notes what party 1 would send."""

  opened: list[Array]
  elements: list[Array]
  words: list[Array]

  def open_additive(self, x: Array, what: str) -> Array:
    if what != IMAGE:
      self.elements.append(x)
    return self.opened.pop(0).astype(x.dtype)

  def open_boolean(self, words: list[Array], what: str) -> list[Array]:
    self.words += words
    return [self.opened.pop(0) for _ in words]


class Replay(NamedTuple):
  """Both maps of a circuit, compiled; they compute with x64.

  Attributes:
    elements: (ring elements as in `Tagged`, opened values) -> those of each element that is opened.
    bits: (words as in `Tagged`, opened values) -> the planes [32, ...] of each word.
  """

  elements: Callable[[dict, Sequence[Any]], list[np.ndarray]]
  bits: Callable[[dict, Sequence[Any]], list[np.ndarray]]


def compiled(circuit: Circuit, opened: Sequence[Any]) -> Replay:
  """Traces and compiles both.

  Args:
    circuit: of a plan whose client is "checked".
    opened: shapes and dtypes of what is opened, in the program's order.
  """
  dealt = [tags.names(circuit, i) for i in range(len(circuit.operations))]
  elements = {i: {n: _aval(v, np.uint64) for n, v in e.items()} for i, (e, _) in enumerate(dealt)}
  words = {i: {n: _aval(v, v.dtype) for n, v in w.items()} for i, (_, w) in enumerate(dealt)}
  planes = jax.tree.map(lambda v: jax.ShapeDtypeStruct((tags.BITS, *v.shape), v.dtype), words)
  wide = tags.wide(circuit)
  blanks = lambda: {i: encoding.blank(o, wide.config) for i, o in enumerate(wide.operands)}

  def known(elements: dict, words: dict, operands: Any, values: Sequence[Array]) -> _Known:
    wire = _Known(swap=True)
    wire.opened, wire.elements, wire.words = list(values), [], []
    ready = {i: elements[i] | words[i] for i in elements if elements[i] or words[i]}
    protocol.run(wide, wire, ready, operands)
    return wire

  def of_elements(elements: dict, words: dict, *rest: Any) -> list[Array]:
    return known(elements, words, *rest).elements

  def of_bits(elements: dict, planes: dict, *rest: Any) -> list[Array]:
    return jax.vmap(lambda words: known(elements, words, *rest).words)(planes)

  with jax.enable_x64(True):
    rest = jax.eval_shape(blanks), list(opened)
    return Replay(
      _program(of_elements, (elements, words, *rest), (0, 3)),
      _program(of_bits, (elements, planes, *rest), (1, 3)),
    )


def _aval(v: Any, dtype: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(v.shape, dtype)


def _program(fn: Callable, inputs: tuple[Any, ...], read: tuple[int, int]) -> Callable:
  """fn as party 1 runs it, of two of its inputs; it must read no other."""
  traced = jax.make_jaxpr(fn, axis_env=[(PARTY, 2)])(*inputs)
  (part,), outputs, _ = segments.cut(traced, DATA_OWNER)
  leaves, structure = jax.tree.flatten(inputs)
  numbered = jax.tree.unflatten(structure, range(len(leaves)))
  mine = jax.tree.leaves([numbered[i] for i in read])
  assert set(part.reads) <= set(mine), "a tag depends on what is not dealt"

  def run(values: dict, opened: Sequence[Any]) -> list[np.ndarray]:
    env = dict(zip(mine, jax.tree.leaves([values, list(opened)]), strict=True))
    with jax.enable_x64(True):
      env |= zip(part.makes, part.run(*(env[i] for i in part.reads)), strict=True)
    return [np.asarray(env[i]) for i in outputs]

  return run
