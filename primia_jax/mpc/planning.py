"""Plans: a function with owners, ranges and a ring, before anything is dealt or sent."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax.mpc import pricing
from primia_jax.mpc.circuit import Apply, Circuit, Config
from primia_jax.mpc.lowering import portable, truths, variances
from primia_jax.mpc.lowering.holders import Owned, outwards
from primia_jax.mpc.lowering.lower import lower
from primia_jax.mpc.lowering.program import PUBLIC, Program, Ref, evaluator, follow, measurer, trace
from primia_jax.mpc.lowering.refusals import finite
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.types import PyTree

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
    bounds: [number of values] the planned magnitude of each, a power of two less a 64th; None
      without calibration.
    magnitudes: of owned values, in the order in which lowering asked; as coarse as `bounds`.
  """

  program: Program
  circuit: Circuit
  owners: tuple[Any, ...]
  bounds: np.ndarray | None
  magnitudes: tuple[float, ...]

  @property
  def config(self) -> Config:
    """The ring, and how exact."""
    return self.circuit.config

  @functools.cached_property
  def _compiled(self) -> dict[Any, Any]:
    return {}

  def compiled(self, name: Any, fn: Callable) -> Callable:
    """jax.jit(fn), once for each name: what the roles run is compiled once for a plan."""
    if name not in self._compiled:
      self._compiled[name] = jax.jit(fn)
    return self._compiled[name]

  @functools.cached_property
  def plain(self) -> Callable:
    """The function itself: inputs -> its values by number, in plain JAX."""
    return evaluator(self.program)

  @functools.cached_property
  def digest(self) -> str:
    """SHA-256 of everything that the parties must agree on, in hexadecimal."""
    writer = portable.Writer(strict=False)
    parts = [
      writer.program(self.program, sources=False),
      [str(owner) for owner in self.owners],
      dataclasses.asdict(self.config),
      [] if self.bounds is None else [v.hex() for v in self.bounds.tolist()],
      [v.hex() for v in self.magnitudes],
      [_outline(v) for v in (*self.circuit.operations, *self.circuit.operands)],
    ]
    found = hashlib.sha256(json.dumps(parts).encode())
    for array in writer.arrays:
      found.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return found.hexdigest()

  def __str__(self) -> str:
    return pricing.table(self.circuit)


def _outline(part: Any) -> list[str]:
  """An operation or operand without its functions, for a digest."""
  fields = part._asdict()
  if isinstance(part, Apply):
    fields |= part.gate._asdict() | {"comparison": part.gate.comparison.name}
  plain = {k: v for k, v in fields.items() if isinstance(v, int | float | str | tuple | None)}
  return [type(part).__name__, *(f"{k} {v}" for k, v in plain.items() if k != "gate")]


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
      more, and nothing notices values or outputs that leave the ring and so are wrong.

  A warning names the lines where comparisons decide, as `lowering.truths` says, and the ring has no
  room for all that they may decide, or no bound of it is known: ranges are those of the examples
  there.

  Raises:
    NotImplementedError: a primitive has no protocol; the message names it and its source line.
    ValueError: an owner is unknown, or a calibrated range does not fit the ring.
  """
  made, lacks = planned(fn, owners, args, config, ranges)
  warn_of_no_room(made.program, lacks, stacklevel=2)
  return made


def planned(
  fn: Callable, owners: Sequence[Any], args: Sequence[PyTree], config: Config,
  ranges: np.ndarray | None,
) -> tuple[Plan, np.ndarray]:  # fmt: skip
  """A plan, as `plan`, and which values [number of values] it lacks room for."""
  program = _program(fn, owners, args)
  flat = _flat_owners(owners, args)
  if ranges is not None and ranges.shape != (2, program.num_values):
    raise ValueError(
      f"ranges of shape {ranges.shape} for {program.num_values} values; calibrate the same "
      f"function with the same shapes"
    )
  known = {}
  own = [
    v if owner == MODEL_OWNER else None
    for owner, v in zip(flat, jax.tree.leaves(tuple(args)), strict=True)
  ]
  if all(
    isinstance(v, jax.Array | np.ndarray | np.generic) and not isinstance(v, jax.core.Tracer)
    for v in own
    if v is not None
  ):
    known[MODEL_OWNER] = follow(program, own)
  asked: list[float] = []

  def magnitude(owned: Owned) -> float:
    found = math.inf
    if owned.owner in known:
      v = np.asarray(owned.read(known[owned.owner]))
      wide = v.astype(np.result_type(v.dtype, np.float64))  # abs(int8(-128)) is -128
      found = outwards(float(np.max(np.abs(wide), initial=0)))
    asked.append(found)
    return found

  choices = [None] if ranges is None else _bounds(ranges, config)
  for bounds in choices:
    asked.clear()
    try:
      with config.scope():
        circuit = lower(program, flat, config, bounds, magnitude)
      break
    except ValueError:  # no room for all that comparisons may decide
      if bounds is choices[-1]:
        raise
  made = Plan(program, circuit, flat, bounds, tuple(asked))
  if ranges is None or bounds is None:
    return made, np.zeros(program.num_values, bool)
  return made, ranges[1] * config.margin > bounds


def _bounds(ranges: np.ndarray, config: Config) -> list[np.ndarray]:
  """What to plan for: all that comparisons may decide where the ring has room, or the examples."""
  examples, decided = (np.array([outwards(r * config.margin) for r in row]) for row in ranges)
  room = 2.0 ** (config.num_bits - 3) * config.unit
  roomy = np.where(decided <= room, decided, examples)
  return [examples] if np.array_equal(roomy, examples) else [roomy, examples]


def warn_of_no_room(program: Program, lacks: np.ndarray, stacklevel: int) -> None:
  """Warns of the lines where a plan lacks room, as `planned` says."""
  outputs = ((e, ref.number) for e in program.equations for ref in e.outputs)
  lines = dict.fromkeys(f"{e.name} at {e.source}" for e, number in outputs if lacks[number])
  if lines:
    warnings.warn(
      f"the ring has no room, or no bound is known, for all that comparisons may decide at "
      f"{', '.join(lines)}: an input that decides otherwise than the examples may get a wrong "
      f"answer; calibrate with examples that take each side, or use a wider ring",
      stacklevel=stacklevel + 1,
    )


def lowered(
  program: Program,
  owners: tuple[Any, ...],
  config: Config,
  bounds: np.ndarray | None,
  magnitudes: tuple[float, ...],
) -> Plan:
  """The plan with these attributes, as `plan` made it."""
  each = iter(magnitudes)
  with config.scope():
    circuit = lower(program, owners, config, bounds, lambda owned: next(each))
  return Plan(program, circuit, owners, bounds, magnitudes)


def calibrate(
  fn: Callable, owners: Sequence[Any], examples: Iterable[Sequence[PyTree]]
) -> np.ndarray:
  """The largest magnitude that each value inside fn takes over examples, which the model owner has.

  Args:
    fn, owners: as given to `plan`.
    examples: argument lists, all of the shapes to be planned for.

  Returns:
    [2, number of values] float64: on the examples, and with room for what comparisons decide, as
    `lowering.truths` says; `Config.margin` is applied later.

  Raises:
    ValueError: there are no examples, or a value is infinite or NaN on them; the message names the
      operation and its line.
  """
  program, largest, taken = None, None, dict[int, int]()
  for args in examples:
    leaves = jax.tree.leaves(tuple(args))
    if program is None:
      program = _program(fn, owners, args)
      measure = measurer(program, functools.partial(truths.watch, taken))
    new = measure(leaves)
    _refuse_infinite(program, new)
    largest = new if largest is None else np.maximum(largest, new)
  if program is None or largest is None:
    raise ValueError("examples is empty; calibrate with at least one list of arguments")
  flat = _flat_owners(owners, args)
  own = [v if owner == MODEL_OWNER else None for owner, v in zip(flat, leaves, strict=True)]
  return np.stack([largest, truths.with_room(program, largest, taken, follow(program, own))])


def _refuse_infinite(program: Program, largest: np.ndarray) -> None:
  inputs = [v.number for v in program.inputs if isinstance(v, Ref)]
  if not np.all(np.isfinite(largest[inputs])):
    raise ValueError("an argument is infinite or NaN on the examples; calibrate with finite ones")
  for e in program.equations:
    if not np.all(np.isfinite(largest[[ref.number for ref in e.outputs]])):
      raise ValueError(
        f"{e.layer}: {e.name} at {e.source}: infinite or NaN on the examples; {finite(e.name)}"
      )


def _program(fn: Callable, owners: Sequence[Any], args: Sequence[PyTree]) -> Program:
  roles = [PUBLIC if owner == PUBLIC else "secret" for owner in owners]
  return variances.centred(trace(fn, args, roles))


def _flat_owners(owners: Sequence[Any], args: Sequence[PyTree]) -> tuple[Any, ...]:
  for owner in owners:
    if owner not in OWNERS:
      raise ValueError(f"owner {owner!r} is unknown; use one of {', '.join(OWNERS)}")
  return tuple(
    OWNERS[owner] for owner, arg in zip(owners, args, strict=True) for _ in jax.tree.leaves(arg)
  )
