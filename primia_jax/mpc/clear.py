"""The integer model: what the exact protocol computes, bit for bit, in the clear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import ring
from primia_jax.mpc import inference, protocol, ranges
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
from primia_jax.mpc.lowering.program import Ref, magnitude
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.products import multiply, product
from primia_jax.mpc.protocol import Operands
from primia_jax.ring import signed
from primia_jax.types import Array, PyTree


def check(plan: Plan, args: Sequence[PyTree]) -> PyTree:
  """`checker(plan)(args)`, for a single use."""
  return checker(plan)(args)


class Checked(NamedTuple):
  """The exact protocol beside the function itself.

  Attributes:
    outputs: the integer model's, in fn's own structure.
    plain: fn's.
    error: the largest difference between an output and its plain counterpart.
  """

  outputs: PyTree
  plain: PyTree
  error: float


def checker(plan: Plan) -> Callable[[Sequence[PyTree]], PyTree]:
  """Computes the exact protocol's outputs in the clear and checks every range.

  Returns:
    args -> outputs; raises as `comparer`'s result does.
  """
  compare = comparer(plan)
  return lambda args: compare(args).outputs


def comparer(plan: Plan) -> Callable[[Sequence[PyTree]], Checked]:
  """Computes the integer model beside the function itself and checks every range.

  Returns:
    args -> Checked. It raises a ValueError that names the layer if a value inside or an output
    leaves its planned range or the ring, which the protocol itself cannot notice.
  """
  encode_all, check_encoded = inference.encoder(plan), operands_checker(plan)
  watched = ranges.shared(plan) if plan.bounds is not None else {}

  def run(args: Sequence[PyTree]) -> Checked:
    env = plan.plain(jax.tree.leaves(tuple(args)))
    plain = [env[v.number] if isinstance(v, Ref) else v for v in plan.program.outputs]
    bounds = [] if plan.bounds is None else [float(plan.bounds[i]) for i in watched]
    for (number, where), bound in zip(watched.items(), bounds, strict=True):
      if not (most := magnitude(env[number])) <= bound:
        raise ValueError(
          f"{where}: a value of magnitude {most:.4g} leaves its planned range of {bound:.4g}; "
          "calibrate with more examples or a larger margin"
        )
    for v, value in zip(plan.circuit.outputs, plain, strict=True):
      room = 2.0 ** (plan.config.num_bits - 1) * v.scale if isinstance(v, Value) else np.inf
      if not np.max(np.abs(value), initial=0) < room:
        raise ValueError(
          f"an output of magnitude {np.max(np.abs(value)):.4g} does not fit a ring of "
          f"num_bits={plan.config.num_bits} at its scale; use a wider ring or calibrate"
        )
    outputs = check_encoded(encode_all(args))
    error = max(map(difference, jax.tree.leaves(outputs), plain), default=0.0)
    return Checked(outputs, jax.tree.unflatten(plan.program.out_tree, plain), error)

  return run


def difference(a: Any, b: Any) -> float:
  """The largest difference of two arrays' elements."""
  return float(np.max(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)), initial=0))


def operands_checker(plan: Plan) -> Callable[[Operands], PyTree]:
  """The integer model of arguments that are encoded already; checks the range of every gate."""
  gate_operations = [op for op in plan.circuit.operations if isinstance(op, Apply)]
  wide = jnp.int64 if plan.config.num_bits > 32 else jnp.int32

  def integers(operands: Operands) -> tuple[list[Array], list[Array]]:
    largest: list[Array] = []
    watch = lambda op, z: largest.append(jnp.max(jnp.abs(z.astype(wide)), initial=0))
    return inference.decoded(plan, compute(plan.circuit, operands, watch)), largest

  compiled = plan.compiled("clear", integers)

  def run_clear(operands: Operands) -> PyTree:
    with plan.config.scope():
      secrets, largest = compiled(operands)
    for op, most in zip(gate_operations, largest, strict=True):
      if int(most) + elementwise.slack(op.gate) >= 2**op.gate.range_bits:
        raise ValueError(
          f"{op.layer}: the input of a {op.gate.action} takes {int(most).bit_length()} bits but "
          f"was planned for {op.gate.range_bits}; calibrate with more examples or a larger margin"
        )
    return inference.outputs(plan, secrets)

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
