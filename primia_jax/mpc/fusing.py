"""Operations of one kind that do not wait for each other share their messages.

A circuit as it is written opens and compares one value after the other. Here a small operation
joins the others of its kind that are ready with it: their inputs are flattened and concatenated,
one operation works on all, and slices of its result take the places of theirs. So small circuits,
such as recurrent networks, take about as many rounds as their longest chain, not as they have
operations. Exact gates give the same bits as before. What does not lead to an output is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from primia_jax.mpc.circuit import Apply, Circuit, Input, Local, Open, Operation, Product, Value
from primia_jax.mpc.gates.elementwise import CLAMP, Gate
from primia_jax.mpc.maps import MULTIPLY
from primia_jax.types import Array

_PRODUCT = "product"


def fuse(circuit: Circuit, most: int = 2**16) -> Circuit:
  """The same outputs in no more rounds; where nothing joins, operations stay as they are.

  Gates of one kind join at the largest K and the longest shift among them, if the ring has room: an
  input with a shorter shift is multiplied by a power of two first, which leaves its result as it
  was.

  Args:
    circuit: what to compute.
    most: elements that operations have together if they join. Rounds of larger ones cost little
      beside their bytes.
  """
  operations = circuit.operations
  maker = {op.out: i for i, op in enumerate(operations)}
  reads = [[maker[number] for number in read(op)] for op in operations]
  outputs = [maker[v.number] for v in circuit.outputs if isinstance(v, Value)]
  needed = sorted(_above(outputs, reads, set()))
  kinds = {i: kind for i in needed if (kind := _kind(operations[i], i, most)) is not None}
  groups = [
    group
    for ready in _schedule(needed, reads, kinds)
    for group in _packed([operations[i] for i in ready], most)
  ]
  if all(len(group) == 1 for group in groups):
    return circuit._replace(operations=tuple(operations[i] for i in needed))
  count, out = max(maker) + 1, []
  done: set[int] = set()
  for group in groups:
    members = [maker[op.out] for op in group]
    before = _above([i for member in members for i in reads[member]], reads, done)
    done |= before | set(members)
    out += [operations[i] for i in sorted(before)]
    joined = _joined(group, count) if len(group) > 1 else group
    count += len(joined)
    out += joined
  out += [operations[i] for i in sorted(_above(outputs, reads, done))]
  return circuit._replace(operations=tuple(out))


def read(op: Operation) -> tuple[int, ...]:
  """The numbers of the values that an operation reads."""
  if isinstance(op, Input):
    return ()
  return op.inputs if isinstance(op, Local | Product) else (op.input,)


def _above(start: Iterable[int], reads: Sequence[Sequence[int]], done: set[int]) -> set[int]:
  """The given operations and all that they follow from, without those in `done`."""
  found, todo = set(), list(start)
  while todo:
    i = todo.pop()
    if i not in found and i not in done:
      found.add(i)
      todo += reads[i]
  return found


def _kind(op: Operation, number: int, most: int) -> Hashable:
  """What an operation's partners must have alike: its own number if it is too large to have any.

  None for one that is done where its result is needed.
  """
  match op:
    case Open() | Apply() if math.prod(op.shape) > most:
      return number
    case Open():
      return "open"
    case Product() if op.map == MULTIPLY and math.prod(op.shape) <= most:
      return _PRODUCT
    case Apply(gate=gate):
      cut = bool(gate.shift) if gate.exact else (gate.shift, gate.skip)
      if gate.action == CLAMP:  # scaled inputs would have other low bits
        cut = gate.shift, 0
      return gate.action, cut, gate.exact, gate.comparison.name
  return None


# ---- the order


def _schedule(
  needed: Sequence[int], reads: Sequence[Sequence[int]], kinds: dict[int, Hashable]
) -> list[list[int]]:
  """All operations that have a kind, each group ready once the groups before it are done.

  Next comes a kind of which no other operation could still join, if there is one; else the kind
  with the longest way to go. Products cost no round and never wait.
  """
  before: dict[int, set[int]] = {}  # the nearest operations with a kind
  levels: dict[int, Counter] = {}  # of each kind, the most on a way that ends here
  for i in needed:
    before[i] = set().union(*({j} if j in kinds else before[j] for j in reads[i]))
    levels[i] = Counter()
    for j in before[i]:
      levels[i] |= levels[j]
    if i in kinds and kinds[i] != i:  # it may join others
      levels[i][kinds[i]] += 1
  after: dict[int, list[int]] = {i: [] for i in kinds}
  rest = dict.fromkeys(kinds, 0)  # gates and openings on the longest way to the end
  for i in reversed(list(kinds)):
    rest[i] += kinds[i] != _PRODUCT
    for j in before[i]:
      after[j].append(i)
      rest[j] = max(rest[j], rest[i])
  waiting = Counter((kind, levels[i][kind]) for i, kind in kinds.items())
  left = {i: len(before[i]) for i in kinds}
  ready: dict[Hashable, list[int]] = {}

  def enter(i: int) -> None:
    waiting[kinds[i], levels[i][kinds[i]]] -= 1
    ready.setdefault(kinds[i], []).append(i)

  def urgency(kind: Hashable) -> tuple[bool, bool, int, int]:
    group = ready[kind]
    last = max(levels[i][kind] for i in group)
    complete = not any(waiting[kind, level] for level in range(1, last + 1))
    longest = 0 if complete else max(rest[i] for i in group)
    return kind == _PRODUCT, complete, longest, -min(group)

  for i in kinds:
    if not left[i]:
      enter(i)
  order = []
  while ready:
    group = sorted(ready.pop(max(ready, key=urgency)))
    order.append(group)
    for j in (j for i in group for j in after[i]):
      left[j] -= 1
      if not left[j]:
        enter(j)
  return order


# ---- joining


def _packed(operations: Sequence[Any], most: int) -> list[list[Any]]:
  """Operations of one kind, parted where they are too many or the ring has no room."""
  groups: list[list[Any]] = []
  shift = lambda op: op.gate.shift if isinstance(op, Apply) else 0
  for op in sorted(operations, key=shift):
    group = [*groups[-1], op] if groups else [op]
    small = sum(math.prod(member.shape) for member in group) <= most
    gate = isinstance(op, Apply) and _common([member.gate for member in group])
    if len(group) > 1 and small and (not gate or gate.range_bits <= gate.num_bits - 2):
      groups[-1] = group
    else:
      groups.append([op])
  return groups


def _common(gates: Sequence[Gate]) -> Gate:
  """One gate for the elements of all, once each is multiplied up to the longest shift."""
  shift = max(gate.shift for gate in gates)
  bits = max(gate.range_bits + shift - gate.shift for gate in gates)
  return gates[0]._replace(num=sum(gate.num for gate in gates), range_bits=bits, shift=shift)


def _joined(group: Sequence[Any], count: int) -> list[Operation]:
  """One operation for several of a kind, with values numbered from `count`."""
  layer = _shared([op.layer for op in group])
  sizes = [math.prod(op.shape) for op in group]
  shape, first, opened = (sum(sizes),), group[0], isinstance(group[0], Open)
  out: list[Operation] = []

  def local(fn: Callable[..., Array], inputs: Iterable[int], opened: bool, label: str) -> int:
    out.append(Local(count + len(out), tuple(inputs), fn, opened, label))
    return out[-1].out

  def flat(*values: Array) -> Array:
    parts = zip(values, group, strict=True)
    return jnp.concatenate([jnp.broadcast_to(v, op.shape).reshape(-1) for v, op in parts])

  match first:
    case Open():
      whole = local(flat, (op.input for op in group), False, layer)
      out.append(Open(count + len(out), whole, shape, layer))
    case Product():
      sides = [local(flat, (op.inputs[i] for op in group), True, layer) for i in (0, 1)]
      out.append(Product(count + len(out), (sides[0], sides[1]), first.map, shape, layer))
    case Apply():
      gate = _common([op.gate for op in group])
      factors = [2 ** (gate.shift - op.gate.shift) for op in group]
      raised = lambda *values: flat(
        *(v if n == 1 else v * v.dtype.type(n) for v, n in zip(values, factors, strict=True))
      )
      whole = local(raised, (op.input for op in group), False, layer)
      out.append(Apply(count + len(out), whole, gate, shape, layer))
  joint, start = out[-1].out, 0
  for op, size in zip(group, sizes, strict=True):
    part = lambda v, a=start, b=start + size, s=op.shape: v[a:b].reshape(s)
    out.append(Local(op.out, (joint,), part, opened, op.layer))
    start += size
  return out


def _shared(layers: Sequence[str]) -> str:
  """The part of their paths that layers have in common."""
  paths, common = [layer.split("/") for layer in layers], []
  for parts in zip(*paths, strict=False):
    if len(set(parts)) > 1:
      break
    common.append(parts[0])
  return "/".join(common) or "(several)"
