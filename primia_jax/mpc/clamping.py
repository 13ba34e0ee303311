"""Keeps what a data owner that need not be trusted puts in within the planned range, encrypted.

A tag, or a share, binds a party to a number and not to a range: an image beyond it would make gates
wrap around, and so tell more about the model than images do. So each input goes through a clamp
first, which takes any ring element to one in range. An image in range stays as it is.
"""

from __future__ import annotations

import math

from primia_jax.mpc.circuit import TRUSTED, Apply, Circuit, Config, Input, Operation
from primia_jax.mpc.gates.elementwise import CLAMP, COMPARISONS, Gate, check
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER


def bits(config: Config, owner: int | None, max_abs: float, scale: float) -> int | None:
  """Of an input with its sign, or None where nobody clamps it.

  Raises:
    ValueError: its range is not known, or leaves no room in the ring.
  """
  if config.client == TRUSTED or owner == MODEL_OWNER:
    return None
  if math.isinf(max_abs):
    raise ValueError(
      f"client={config.client!r} needs the range of every input; calibrate, and plan with ranges"
    )
  found = (math.ceil(max_abs / scale) + 1).bit_length() + 1
  if found + 1 > config.num_bits - 2:
    raise ValueError(
      f"an input of {found} bits leaves no room for its clamp in num_bits={config.num_bits}; use "
      "fewer fraction_bits or a wider ring"
    )
  return found


def clamped(circuit: Circuit) -> Circuit:
  """The circuit with a clamp behind each input that has `bits`.

  Raises:
    ValueError: the data owner puts in something else than one input, which nothing here binds to
      its image.
  """
  config = circuit.config
  if config.client == TRUSTED:
    return circuit
  entries = [o.layer for o in circuit.operands if o.owner == DATA_OWNER]
  if len(entries) > 1 or circuit.linear_operands(DATA_OWNER):
    raise ValueError(
      f"{', '.join(entries)}: the image enters the model in more than one place, or multiplies a "
      "secret value itself, so a data owner that need not be trusted could put in different ones; "
      f"use client={TRUSTED!r}"
    )
  count = 1 + max(op.out for op in circuit.operations)
  operations: list[Operation] = []
  for op in circuit.operations:
    operand = circuit.operands[op.operand] if isinstance(op, Input) else None
    if operand is None or operand.bits is None:
      operations.append(op)
      continue
    gate = Gate(
      CLAMP, math.prod(operand.shape), config.num_bits, operand.bits + 1, operand.bits,
      comparison=COMPARISONS[config.comparison],
    )  # fmt: skip
    check(gate)
    operations.append(op._replace(out=count))
    operations.append(Apply(op.out, count, gate, operand.shape, op.layer))
    count += 1
  return circuit._replace(operations=tuple(operations))
