"""Leaky ReLUs and PReLUs, however they are written, as one comparison.

where(y >= 0, y, a y) = r + a (y - r) with r = max(y, 0). So the comparison needs no product of
secrets, and a layer before it is computed once.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.lowering.holders import Lazy, is_secret
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation, Program, Ref, needed
from primia_jax.mpc.lowering.rules_linear import RULES as LINEAR

LEAKY_RELU = "leaky_relu"
_ABOVE, _BELOW = {"ge", "gt"}, {"le", "lt"}


def with_leaky_relus(program: Program) -> Program:
  """The program with such choices as one equation (y, a); what nothing else reads is left out."""
  made = {ref.number: e for e in program.equations for ref in e.outputs}
  equations = [_leaky_relu(e, made) or e for e in program.equations]
  return program._replace(equations=needed(equations, program.outputs))


def _leaky_relu(e: Equation, made: dict[int, Equation]) -> Equation | None:
  """The equation (y, a) in place of a choice, or None if it is another choice."""
  if e.name != "select_n" or len(e.inputs) != 3 or not all(isinstance(v, Ref) for v in e.inputs):
    return None
  bit, off, on = e.inputs
  compared = made.get(bit.number)
  if compared is None or compared.name not in _ABOVE | _BELOW:
    return None
  y, zero = compared.inputs
  above = (compared.name in _ABOVE) == isinstance(y, Ref)
  if not isinstance(y, Ref):
    y, zero = zero, y
  whole, sloped = (on, off) if above else (off, on)
  scaled = made.get(sloped.number)
  if isinstance(zero, Ref) or np.any(zero) or whole != y or scaled is None or scaled.name != "mul":
    return None
  first, second = scaled.inputs
  is_y = lambda v: isinstance(v, Ref) and v == y
  if not is_y(first) and not is_y(second):
    return None
  bind = lambda y, a: [jnp.where(y >= 0, y, a * y)]
  inputs = (y, second if is_y(first) else first)
  return e._replace(name=LEAKY_RELU, bind=bind, params={}, inputs=inputs)


def _lower(low: Lowering, equation: Equation, inputs: list[Any]) -> Any:
  """As a ReLU, with a truncation beside it if y is finer than activations; a secret slope adds a
  one-sided product. |error| <= u / 2 + |a| u / 2, and |y| u / 16 for the rounding of a public a.
  """
  build, (y, slope) = low.build, inputs
  x = low.value(y)
  above = build.relu(x)
  below = build.subtract(build.narrow(x), above)._replace(max_abs=x.max_abs)
  product = LINEAR["mul"](low, equation, [below, slope])
  if isinstance(product, Lazy):
    bound = low.bound(equation.outputs[0])
    product = product._replace(bound=bound, needed=bound, layer=build.layer, place=build.place)
  product = low.value(product) if is_secret(product) else product
  out = build.add(above, product)
  return out._replace(max_abs=max(above.max_abs, product.max_abs))


RULES: dict[str, Rule] = {LEAKY_RELU: _lower}
