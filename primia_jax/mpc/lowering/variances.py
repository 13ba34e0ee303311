"""Variances as the mean of squares of what is centred, however the function writes them.

mean(x^2) - mean(x)^2 is the difference of two large numbers where the mean is large beside the
deviation. Flax's normalisations compute it so by default. mean((x - mean(x))^2) is the same number;
its terms are small, so that fixed point keeps them in fine units, and it is never negative.

A normalisation y = (x - mean) r, where r = 1 / sqrt(variance + epsilon), then errs by at most
u ((1 + |y|) C r + |y| (R / r + 1) + 1), where C and R bound x - mean and r: up to 4 times their
largest in calibration. x must be in units of u C or finer, as a linear layer's output and an
owner's input are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.lowering.program import Equation, Program, Ref, trace
from primia_jax.types import Array

_LINEAR = {"reduce_sum", "div", "mul", "broadcast_in_dim", "reshape", "squeeze", "copy"}


class _Variance(NamedTuple):
  """mean(x^2) - mean(x)^2, where `mean` is a sum over axes and what divides and reshapes it."""

  x: Ref
  average: Ref
  keep: tuple[int, ...]  # the shape of the average with the summed axes
  mean: Callable[[Array], Array]


def centred(program: Program) -> Program:
  """The program with every mean(x^2) - mean(x)^2 replaced by mean((x - mean(x))^2).

  A maximum of that and 0 is the same number. What nobody reads any more is left out.
  """
  made = {ref.number: e for e in program.equations for ref in e.outputs}
  shapes = {
    ref.number: aval
    for refs, avals in [
      (program.inputs, program.avals),
      *((e.outputs, e.avals) for e in program.equations),
    ]
    for ref, aval in zip(refs, avals, strict=True)
    if isinstance(ref, Ref)
  }
  count, equations, renamed = program.num_values, [], dict[Ref, Ref]()
  new = lambda v: renamed.get(v, v) if isinstance(v, Ref) else v
  for equation in program.equations:
    equation = equation._replace(inputs=tuple(map(new, equation.inputs)))
    found = _variance(equation, made, shapes)
    if found:
      fn = lambda x, average, v=found: v.mean(jnp.square(x - average.reshape(v.keep)))
      part = trace(fn, [shapes[v.number] for v in (found.x, found.average)], ["secret"] * 2)
      given = {0: found.x, 1: found.average}
      for e in part.equations:
        place = lambda v, given=given, n=count: given.get(v.number, Ref(n + v.number))
        move = lambda vs, place=place: tuple(place(v) if isinstance(v, Ref) else v for v in vs)
        equations.append(
          e._replace(
            inputs=move(e.inputs),
            outputs=move(e.outputs),
            layer=equation.layer,
            source=equation.source,
          )
        )
      renamed[equation.outputs[0]] = equations[-1].outputs[0]
      count += part.num_values
    elif equation.name == "max" and (same := _positive(equation, set(renamed.values()))):
      renamed[equation.outputs[0]] = same
    else:
      equations.append(equation)
  if not renamed:
    return program
  outputs = tuple(map(new, program.outputs))
  return _numbered(program._replace(equations=tuple(equations), outputs=outputs))


def _variance(
  equation: Equation, made: Mapping[int, Equation], shapes: Mapping[int, Any]
) -> _Variance | None:
  if equation.name != "sub" or not all(isinstance(v, Ref) for v in equation.inputs):
    return None
  first, second = (made.get(v.number) for v in equation.inputs)
  average = _squared(second)
  if first is None or average is None:
    return None
  a: Equation | None = first
  b, steps = made.get(average.number), list[Equation]()
  while a and b and a.name == b.name and a.name in _LINEAR and a.params == b.params:
    if not isinstance(a.inputs[0], Ref) or not isinstance(b.inputs[0], Ref):
      return None
    others = zip(a.inputs[1:], b.inputs[1:], strict=True)
    if any(isinstance(v, Ref) or not np.array_equal(v, w) for v, w in others):
      return None
    steps.insert(0, a)
    x, a, b = b.inputs[0], made.get(a.inputs[0].number), made.get(b.inputs[0].number)
    if x == _squared(a):
      break
  else:
    return None

  def mean(v: Array) -> Array:
    for step in steps:
      (v,) = step.bind(v, *step.inputs[1:])
    return v

  shape, axes = shapes[x.number].shape, steps[0].params.get("axes", ())
  summed = [step.name for step in steps].count("reduce_sum")
  if steps[0].name != "reduce_sum" or summed > 1:
    return None
  keep = tuple(1 if i in axes else n for i, n in enumerate(shape))
  with jax.ensure_compile_time_eval():
    ones = mean(jnp.ones(shape, shapes[x.number].dtype))
  if ones.size != np.prod(keep) or not np.allclose(ones, 1, atol=1e-5):
    return None
  return _Variance(x, average, keep, mean)


def _squared(equation: Equation | None) -> Ref | None:
  """What an equation squares."""
  if equation is None:
    return None
  square = equation.name == "square" or (
    equation.name == "integer_pow" and equation.params["y"] == 2
  )
  if square or (equation.name == "mul" and equation.inputs[0] is equation.inputs[1]):
    return equation.inputs[0] if isinstance(equation.inputs[0], Ref) else None
  return None


def _positive(equation: Equation, variances: set[Ref]) -> Ref | None:
  """The variance of which an equation takes the maximum with 0."""
  for v, other in (equation.inputs, equation.inputs[::-1]):
    if isinstance(v, Ref) and v in variances and not isinstance(other, Ref) and not np.any(other):
      return v
  return None


def _numbered(program: Program) -> Program:
  """The program without equations that nobody reads, its values numbered in order."""
  needed = {v for v in program.outputs if isinstance(v, Ref)}
  kept: list[Equation] = []
  for equation in program.equations[::-1]:
    if not equation.outputs or needed & set(equation.outputs):
      needed |= {v for v in equation.inputs if isinstance(v, Ref)}
      kept.insert(0, equation)
  order = [v for v in program.inputs if isinstance(v, Ref)]
  order += [ref for e in kept for ref in e.outputs]
  numbers = {ref: Ref(i) for i, ref in enumerate(order)}
  new = lambda vs: tuple(numbers[v] if isinstance(v, Ref) else v for v in vs)
  equations = (e._replace(inputs=new(e.inputs), outputs=new(e.outputs)) for e in kept)
  return program._replace(
    inputs=new(program.inputs), equations=tuple(equations), outputs=new(program.outputs)
  )
