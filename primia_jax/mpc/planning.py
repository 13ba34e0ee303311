"""The cost and assumed ranges of an encrypted computation, before anything is dealt or sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc import encoding, protocol
from primia_jax.mpc.circuit import Apply, Circuit, Config, Linear, Open, Product, Value
from primia_jax.mpc.gates.elementwise import COMPARISONS, RELU
from primia_jax.mpc.lowering.lower import lower
from primia_jax.mpc.lowering.program import PUBLIC, Program, evaluate, trace
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER, PARTY, Sent, Wire
from primia_jax.types import Array, PyTree

SHARED = "shared"
OWNERS = {"model_owner": MODEL_OWNER, "data_owner": DATA_OWNER, SHARED: None, PUBLIC: PUBLIC}


@dataclasses.dataclass(frozen=True)
class Plan:
  """A function ready to be dealt for; everybody may see it.

  It reveals the architecture, the scales of the weights and the calibrated range of every gate
  (powers of two), and nothing else about model or image.

  Attributes:
    program: the function, flat.
    circuit: what the parties will do.
    owners: of each flat argument: 0 (model owner), 1 (data owner), None (given as shares) or
      "public".
  """

  program: Program
  circuit: Circuit
  owners: tuple[Any, ...]

  @property
  def config(self) -> Config:
    """The ring, and how exact."""
    return self.circuit.config

  def __str__(self) -> str:
    return table(self)


class Row(NamedTuple):
  """One step of a plan.

  Attributes:
    operation: its number in the circuit; -1 for the output.
    layer: its place in the function.
    what: open, linear, product, relu, max, truncate, sign or output.
    shape: of its result.
    range_bits: K of a gate; 0 elsewhere.
    shift: bits that a gate truncates.
    dealt: bytes that party 1 receives from the dealer.
    sent: bytes that each party sends to the other.
    rounds: of communication.
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


class Network(NamedTuple):
  """A link between the parties; every round costs a whole round trip."""

  round_trip: float  # seconds
  bandwidth: float  # bits per second, each way

  def seconds(self, rounds: int, num_bytes: int) -> float:
    """The time of communication alone."""
    return rounds * self.round_trip + 8 * num_bytes / self.bandwidth


LAN, WAN = Network(0.0005, 1e9), Network(0.040, 100e6)


def plan(
  fn: Callable,
  owners: Sequence[Any],
  args: Sequence[PyTree],
  config: Config = Config(),  # noqa: B008
  ranges: np.ndarray | None = None,
) -> Plan:
  """Plans fn for secret arguments.

  Args:
    fn: a JAX function of positional arguments, such as a Flax module's apply. Whatever it closes
      over is public.
    owners: for each argument (with all its leaves) "model_owner", "data_owner", "shared" (given as
      shares) or "public".
    args: arrays, or ShapeDtypeStructs if only the shape is known. If the model owner plans with its
      weights at hand, their scales follow from their largest magnitudes.
    config: the ring, and how exact.
    ranges: from `calibrate`. Without it every gate assumes that values fill the ring, which costs
      more.

  Raises:
    NotImplementedError: a primitive has no protocol; the message names it and its source line.
    ValueError: an owner is unknown, or a calibrated range does not fit the ring.
  """
  config.dtype  # noqa: B018  (raises without x64 where the ring needs it)
  program = trace(fn, args, [PUBLIC if owner == PUBLIC else "secret" for owner in owners])
  flat = _flat_owners(owners, args)
  if ranges is not None and len(ranges) != program.num_values:
    raise ValueError(
      f"{len(ranges)} ranges for {program.num_values} values; calibrate the same function with the "
      f"same shapes"
    )
  known = {}
  for party in (MODEL_OWNER, DATA_OWNER):
    leaves = [
      v if owner == party else None
      for owner, v in zip(flat, jax.tree.leaves(tuple(args)), strict=True)
    ]
    concrete = all(
      isinstance(v, jax.Array | np.ndarray) and not isinstance(v, jax.core.Tracer)
      for v in leaves
      if v is not None
    )
    if party == MODEL_OWNER and concrete:
      known[party] = jax.jit(lambda leaves: evaluate(program, leaves))(leaves)
  return Plan(program, lower(program, flat, config, ranges, known), flat)


def calibrate(
  fn: Callable, owners: Sequence[Any], examples: Iterable[Sequence[PyTree]]
) -> np.ndarray:
  """The largest magnitude that each value inside fn takes over examples, which the model owner has.

  Args:
    fn, owners: as given to `plan`.
    examples: argument lists, all of the shapes to be planned for.

  Returns:
    [number of values] float64; `Config.margin` is applied later.
  """
  program, measure, largest = None, None, None
  for args in examples:
    leaves = jax.tree.leaves(tuple(args))
    if measure is None:
      program = trace(fn, args, [PUBLIC if owner == PUBLIC else "secret" for owner in owners])
      measure = jax.jit(lambda leaves, program=program: _magnitudes(program, leaves))
    new = np.asarray(measure(leaves), np.float64)
    largest = new if largest is None else np.maximum(largest, new)
  if largest is None:
    raise ValueError("examples is empty; calibrate with at least one list of arguments")
  if not np.all(np.isfinite(largest)):
    raise ValueError(
      "a value inside the function is infinite or NaN on the examples; calibrate with finite ones"
    )
  return largest


def _magnitudes(program: Program, leaves: Sequence[Array]) -> Array:
  env = evaluate(program, leaves)
  real = lambda v: jnp.abs(v) if jnp.iscomplexobj(v) else v.astype(jnp.float32)
  finite = lambda v: jnp.where(jnp.isneginf(v), jnp.zeros_like(v), v)  # padding before a maximum
  values = [finite(real(env[i])) for i in range(program.num_values)]
  return jnp.stack([jnp.max(jnp.abs(v), initial=0) for v in values])


def _flat_owners(owners: Sequence[Any], args: Sequence[PyTree]) -> tuple[Any, ...]:
  for owner in owners:
    if owner not in OWNERS:
      raise ValueError(f"owner {owner!r} is unknown; use one of {', '.join(OWNERS)}")
  return tuple(
    OWNERS[owner] for owner, arg in zip(owners, args, strict=True) for _ in jax.tree.leaves(arg)
  )


# ---- what it costs


def rows(plan: Plan) -> list[Row]:
  """Every step that deals or sends something, in order."""
  dealt, sent = protocol.dealt_shapes(plan.circuit), sent_messages(plan)
  size = lambda tree: sum(math.prod(v.shape) * v.dtype.itemsize for v in jax.tree.leaves(tree))
  out = []
  for number, op in enumerate(plan.circuit.operations):
    if not isinstance(op, Open | Linear | Product | Apply):
      continue
    messages = [m for m in sent if m.operation == number]
    gate = op.gate if isinstance(op, Apply) else None
    what = type(op).__name__.lower()
    if gate:
      what = "max" if gate.action == RELU and not gate.shift else gate.action
    num_dealt = size(dealt.sent.get(number, {})) + size(dealt.common.get(number, {}))
    bits, shift = (gate.range_bits, gate.shift) if gate else (0, 0)
    num_sent = sum(m.num_bytes for m in messages)
    out.append(
      Row(number, op.layer, what, op.shape, bits, shift, num_dealt, num_sent, len(messages))
    )
  secrets = [v for v in plan.circuit.outputs if isinstance(v, Value)]
  num_bytes = sum(math.prod(v.shape) for v in secrets) * plan.config.dtype.itemsize
  shape = secrets[0].shape if secrets else ()
  return [*out, Row(-1, "", "output", shape, 0, 0, 0, num_bytes, int(bool(secrets)))]


def ready_shapes(plan: Plan) -> protocol.Ready:
  """Shapes and dtypes of what a party holds of the correlations during the online phase."""
  dealt = protocol.dealt_shapes(plan.circuit)
  out: protocol.Ready = {}
  for number, op in enumerate(plan.circuit.operations):
    each: dict[str, Any] = {
      name: jax.ShapeDtypeStruct(m.shape, m.dtype)
      for name, m in protocol.masks(op, plan.config).items()
    }
    each |= {**dealt.sent.get(number, {}), **dealt.common.get(number, {})}
    if each:
      out[number] = each
  return out


def sent_messages(plan: Plan) -> list[Sent]:
  """The messages that each party sends, in order; one for each round."""
  log: list[Sent] = []
  blanks = jax.eval_shape(
    lambda: [encoding.blank(operand, plan.config) for operand in plan.circuit.operands]
  )
  run = lambda ready, operands: protocol.run(
    plan.circuit, Wire(log=log), ready, dict(enumerate(operands))
  )
  jax.eval_shape(
    jax.vmap(run, axis_name=PARTY, axis_size=2, in_axes=(None, None)), ready_shapes(plan), blanks
  )
  return log


def published_bytes(plan: Plan) -> int:
  """Bytes of D = W - B, which the data owner receives once per publication."""
  operands = [plan.circuit.operands[i] for i in plan.circuit.linear_operands(MODEL_OWNER)]
  return sum(math.prod(o.shape) for o in operands) * plan.config.dtype.itemsize


def table(plan: Plan, steps: Sequence[Row] | None = None) -> str:
  """The plan as text: a line for every step (default `rows(plan)`), and the totals."""
  steps = rows(plan) if steps is None else steps
  config = plan.config
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
  dealt, sent, rounds = (
    sum(getattr(row, name) for row in steps) for name in ("dealt", "sent", "rounds")
  )
  lines.append(
    f"{'':>4} {'total':<71} {'':>4} {bytes_text(dealt):>10} {bytes_text(sent):>10} {rounds:>6}"
  )
  exact = "exact" if config.exact else "within one unit"
  also = "" if COMPARISONS[config.comparison].seed_only else " and the correction words"
  lines.append(
    f"ring of 2^{config.num_bits}, about {config.fraction_bits} fraction bits, truncation {exact}, "
    f"comparison by {config.comparison}; range and cut in bits of the ring, dealt: to the data "
    f"owner (the model owner gets a seed{also})"
  )
  for name, network in (("LAN 1 Gb/s, 0.5 ms", LAN), ("WAN 100 Mb/s, 40 ms", WAN)):
    lines.append(f"{name}: {network.seconds(rounds, sent):.2f} s of communication")
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
