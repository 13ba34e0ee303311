"""The integer model: what the exact protocol computes, bit for bit, in the clear."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from primia_jax import ring
from primia_jax.mpc import inference, protocol
from primia_jax.mpc.circuit import (
  Apply,
  Circuit,
  Input,
  Linear,
  Local,
  Offset,
  Open,
  Product,
  Value,
)
from primia_jax.mpc.gates import elementwise
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.products import multiply, product
from primia_jax.mpc.protocol import Operands
from primia_jax.ring import signed
from primia_jax.types import Array, PyTree


def check(plan: Plan, args: Sequence[PyTree]) -> PyTree:
  """`checker(plan)(args)`, for a single use."""
  return checker(plan)(args)


def checker(plan: Plan) -> Callable[[Sequence[PyTree]], PyTree]:
  """Computes the exact protocol's outputs in the clear and checks the range of every gate.

  Returns:
    args -> outputs. It raises a ValueError that names the layer if a value leaves its planned
    range, which the protocol itself cannot notice.
  """
  encode_all, check_encoded = inference.encoder(plan), operands_checker(plan)
  return lambda args: check_encoded(encode_all(args))


def operands_checker(plan: Plan) -> Callable[[Operands], PyTree]:
  """`checker` for arguments that are encoded already."""
  gate_operations = [op for op in plan.circuit.operations if isinstance(op, Apply)]
  wide = jnp.int64 if plan.config.num_bits > 32 else jnp.int32

  @jax.jit
  def integers(operands: Operands) -> tuple[list[Array], list[Array]]:
    largest: list[Array] = []
    watch = lambda op, z: largest.append(jnp.max(jnp.abs(z.astype(wide)), initial=0))
    return compute(plan.circuit, operands, watch), largest

  def run_clear(operands: Operands) -> PyTree:
    elements, largest = integers(operands)
    for op, most in zip(gate_operations, largest, strict=True):
      if int(most) + elementwise.slack(op.gate) >= 2**op.gate.range_bits:
        raise ValueError(
          f"{op.layer}: the input of a {op.gate.action} takes {int(most).bit_length()} bits but "
          f"was planned for {op.gate.range_bits}; calibrate with more examples or a larger margin"
        )
    return inference.decode_outputs(plan, elements)

  return run_clear


def compute(
  circuit: Circuit, operands: Operands, watch: Callable[[Apply, Array], None] | None = None
) -> list[Array]:
  """The circuit's outputs as ring elements, computed in the clear.

  Args:
    circuit: what to compute.
    operands: everybody's, encoded.
    watch: called with each gate's operation and its input as signed numbers.
  """
  env: dict[int, Array] = {}
  num_bits = circuit.config.num_bits
  for op in circuit.operations:
    match op:
      case Input():
        env[op.out] = operands[op.operand]
      case Local():
        env[op.out] = op.fn(*(env[i] for i in op.inputs))
      case Offset():
        env[op.out] = env[op.input] + protocol.offset(op, operands, circuit.config)
      case Open():
        env[op.out] = env[op.input]
      case Linear():
        env[op.out] = multiply(op.map, env[op.input], operands[op.operand].ready, num_bits)
      case Product():
        a, b = (env[i] for i in op.inputs)
        env[op.out] = product(op.map, a, b, num_bits)
      case Apply():
        if watch is not None:
          watch(op, signed(env[op.input], num_bits))
        env[op.out] = elementwise.clear(op.gate, env[op.input].reshape(-1)).reshape(op.shape)
  secrets = [v.number for v in circuit.outputs if isinstance(v, Value)]
  return [ring.reduce(env[number], num_bits) for number in secrets]
