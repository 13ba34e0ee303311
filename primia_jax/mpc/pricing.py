"""What an encrypted computation costs, before anything is dealt or sent."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from primia_jax.mpc import protocol, tags
from primia_jax.mpc.circuit import CHECKED, TRUSTED, Apply, Circuit, Linear, Open, Product, Value
from primia_jax.mpc.fusing import read
from primia_jax.mpc.gates.elementwise import COMPARISONS, RELU
from primia_jax.mpc.sharing import MODEL_OWNER


class Row(NamedTuple):
  """One step of a plan.

  Attributes:
    operation: its number in the circuit; -1 for the output.
    layer: its place in the function.
    what: open, linear, product, clamp, relu, max, truncate, sign, check or output.
    shape: of its result.
    range_bits: K of a gate; 0 elsewhere.
    shift: bits that a gate truncates.
    dealt: bytes that party 1 receives from the dealer, with its tags where it is checked.
    sent: bytes that each party sends to the other.
    rounds: of communication; `rounds` says how many all steps take together.
  """

  operation: int
  layer: str
  what: str
  shape: tuple[int, ...]
  range_bits: int
  shift: int
  dealt: int
  sent: int
  rounds: int


class Total(NamedTuple):
  """What a whole inference costs.

  Attributes:
    dealt: bytes that party 1 receives from the dealer.
    sent: bytes that each party sends to the other.
    rounds: of communication; the number of messages that the model owner sends
      (`multiprocess.sizes`).
  """

  dealt: int
  sent: int
  rounds: int


class Network(NamedTuple):
  """A link between the parties; every round costs a whole round trip."""

  round_trip: float  # seconds
  bandwidth: float  # bits per second, each way

  def seconds(self, rounds: int, num_bytes: int) -> float:
    """The time of communication alone."""
    return rounds * self.round_trip + 8 * num_bytes / self.bandwidth


_Result = TypeVar("_Result")


def _scoped(fn: Callable[..., _Result]) -> Callable[..., _Result]:
  """fn(circuit, ...) with the circuit's ring, whatever types its caller computes in."""

  @functools.wraps(fn)
  def scoped(circuit: Circuit, *args: Any) -> _Result:
    with circuit.config.scope():
      return fn(circuit, *args)

  return scoped


_CHECK_BYTES, _CHECK_ROUNDS = tags.CHALLENGE_BYTES + tags.RESPONSE_BYTES, 2
LAN, WAN = Network(0.0005, 1e9), Network(0.040, 100e6)


@_scoped
def rows(circuit: Circuit) -> list[Row]:
  """Every step that deals or sends something, in order."""
  dealt, sent = protocol.dealt_shapes(circuit), protocol.messages(circuit)
  size = lambda tree: sum(math.prod(v.shape) * v.dtype.itemsize for v in jax.tree.leaves(tree))
  checked = circuit.config.client == CHECKED
  out = []
  for number, op in enumerate(circuit.operations):
    if not isinstance(op, Open | Linear | Product | Apply):
      continue
    messages = [m for m in sent if m.operation == number]
    gate = op.gate if isinstance(op, Apply) else None
    what = type(op).__name__.lower()
    if gate:
      what = "max" if gate.action == RELU and not gate.shift else gate.action
    num_dealt = size(dealt.sent.get(number, {})) + size(dealt.common.get(number, {}))
    if checked:
      num_dealt += tags.num_bytes(circuit, number)
    bits, shift = (gate.range_bits, gate.shift) if gate else (0, 0)
    num_sent = sum(m.num_bytes for m in messages)
    out.append(
      Row(number, op.layer, what, op.shape, bits, shift, num_dealt, num_sent, len(messages))
    )
  if checked:
    out.append(Row(-1, "", "check", (), 0, 0, 0, _CHECK_BYTES, _CHECK_ROUNDS))
  secrets = [v for v in circuit.outputs if isinstance(v, Value)]
  num_bytes = sum(math.prod(v.shape) for v in secrets) * circuit.config.dtype.itemsize
  shape = secrets[0].shape if secrets else ()
  return [*out, Row(-1, "", "output", shape, 0, 0, 0, num_bytes, int(bool(secrets)))]


@_scoped
def rounds(circuit: Circuit) -> int:
  """Rounds of a whole inference: messages that do not wait for each other are sent as one.

  It is the longest chain of messages that do, the output's among them, and the two of a check, and
  so the number of `multiprocess.sizes` and at most the sum of the rows' rounds.
  """
  own = Counter(message.operation for message in protocol.messages(circuit))
  depth: dict[int, int] = {}  # by number of a value, the rounds until it is there
  for number, op in enumerate(circuit.operations):
    depth[op.out] = own[number] + max((depth[i] for i in read(op)), default=0)
  secrets = [v.number for v in circuit.outputs if isinstance(v, Value)]
  checks = _CHECK_ROUNDS if circuit.config.client == CHECKED else 0
  return max((depth[i] + 1 for i in secrets), default=0) + checks


def total(circuit: Circuit, steps: Sequence[Row] | None = None) -> Total:
  """The bytes of all steps (default `rows(circuit)`), and the rounds that they take together."""
  steps = rows(circuit) if steps is None else steps
  return Total(sum(row.dealt for row in steps), sum(row.sent for row in steps), rounds(circuit))


@_scoped
def ready_shapes(circuit: Circuit) -> protocol.Ready:
  """Shapes and dtypes of what a party holds of the correlations during the online phase."""
  dealt = protocol.dealt_shapes(circuit)
  out: protocol.Ready = {}
  for number, op in enumerate(circuit.operations):
    each: dict[str, Any] = {
      name: jax.ShapeDtypeStruct(m.shape, m.dtype)
      for name, m in protocol.masks(op, circuit.config).items()
    }
    each |= {**dealt.sent.get(number, {}), **dealt.common.get(number, {})}
    if each:
      out[number] = each
  return out


@_scoped
def tag_bytes(circuit: Circuit) -> int | None:
  """Bytes of tags that the dealer deals for an inference whose client is "checked"; an estimate for
  another client, without the clamp. None where there are none: in a wider ring, or without tables.
  """
  config = circuit.config
  if config.num_bits > 32 or config.comparison != "tables":
    return None
  return sum(tags.num_bytes(circuit, i) for i in range(len(circuit.operations)))


@_scoped
def published_bytes(circuit: Circuit) -> int:
  """Bytes of D = W - B, which the data owner receives once per publication."""
  operands = [circuit.operands[i] for i in circuit.linear_operands(MODEL_OWNER)]
  return sum(math.prod(o.shape) for o in operands) * circuit.config.dtype.itemsize


def table(circuit: Circuit, steps: Sequence[Row] | None = None) -> str:
  """The plan as text: a line for every step (default `rows(circuit)`), and the totals.

  The total of rounds is `rounds(circuit)`.
  """
  steps = rows(circuit) if steps is None else steps
  config = circuit.config
  lines = [
    f"{'':>4} {'layer':<28} {'step':<9} {'shape':<20} {'range':>6} {'cut':>4} {'dealt':>10} "
    f"{'sent':>10} {'rounds':>6}"
  ]
  for i, row in enumerate(steps):
    shape = "x".join(map(str, row.shape)) or "1"
    bits = f"2^{row.range_bits}" if row.range_bits else ""
    cut = str(row.shift) if row.shift else ""
    lines.append(
      f"{i:>4} {_shorten(row.layer, 28):<28} {row.what:<9} {shape:<20} {bits:>6} {cut:>4} "
      f"{bytes_text(row.dealt):>10} {bytes_text(row.sent):>10} {row.rounds:>6}"
    )
  dealt, sent, together = total(circuit, steps)
  apart = sum(row.rounds for row in steps)
  lines.append(
    f"{'':>4} {'total':<71} {'':>4} {bytes_text(dealt):>10} {bytes_text(sent):>10} {together:>6}"
  )
  if together < apart:
    lines.append(
      f"steps that do not wait for each other share messages: {together} rounds instead of {apart}"
    )
  exact = "exact" if config.exact else "within one unit"
  also = "" if COMPARISONS[config.comparison].seed_only else " and the correction words"
  lines.append(
    f"ring of 2^{config.num_bits}, about {config.fraction_bits} fraction bits, truncation {exact}, "
    f"comparison by {config.comparison}; range and cut in bits of the ring, dealt: to the data "
    f"owner (the model owner gets a seed{also})"
  )
  if config.client in (TRUSTED, CHECKED) and (tagged := tag_bytes(circuit)) is not None:
    lead = "client checked" if config.client == CHECKED else "with client='checked' it would be"
    lines.append(
      f"{lead}: {bytes_text(tagged)} of tags dealt to the data owner "
      f"({LAN.seconds(0, tagged):.2f} s at 1 Gb/s), {_CHECK_BYTES} B and {_CHECK_ROUNDS} rounds "
      "online"
    )
  for name, network in (("LAN 1 Gb/s, 0.5 ms", LAN), ("WAN 100 Mb/s, 40 ms", WAN)):
    lines.append(f"{name}: {network.seconds(together, sent):.2f} s of communication")
  return "\n".join(lines)


def bytes_text(num_bytes: float) -> str:
  """A number of bytes with its unit."""
  for unit in ("B", "kB", "MB"):
    if num_bytes < 1000:
      return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
    num_bytes /= 1000
  return f"{num_bytes:.2f} GB"


def _shorten(text: str, width: int) -> str:
  return text if len(text) <= width else "…" + text[-(width - 1) :]
