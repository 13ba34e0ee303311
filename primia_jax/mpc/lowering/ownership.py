"""The state of a lowering: the circuit so far, who holds each value, and in which units."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc import scales
from primia_jax.mpc.builder import Builder
from primia_jax.mpc.circuit import Config, Value
from primia_jax.mpc.lowering.holders import (
  Complex,
  Lazy,
  Masked,
  Owned,
  Pending,
  Read,
  compact,
  compact_shape,
  is_low,
  is_secret,
  most_of,
  outwards,
  varies_along,
)
from primia_jax.mpc.lowering.program import Equation, Program, Ref
from primia_jax.mpc.lowering.refusals import nearest

_FEWEST_BITS, _ENOUGH_BITS = 6, 10  # of the largest weight of a layer
Rule = Callable[["Lowering", Equation, list[Any]], Any]


class Lowering:
  """The state of a lowering: the circuit so far, and who holds each value."""

  def __init__(
    self,
    program: Program,
    config: Config,
    bounds: np.ndarray | None,
    magnitude: Callable[[Owned], float],
  ):
    self.build = Builder(config)
    self.bounds, self.magnitude = bounds, magnitude
    self.env: dict[int, Any] = {}
    self.forced: dict[Any, Value] = {}
    self.labels: dict[int, str] = {}
    self.dtypes: dict[int, Any] = {}
    self.places: dict[int, str] = {}
    self.counts: set[int] = set()  # the numbers of Values that cannot be negative
    self.pools = _pooled(program)
    self.needs = _needs(program, bounds)
    self.units = self._units(program)

  def enter(self, ref: Ref, owner: int | None, aval: jax.ShapeDtypeStruct) -> None:
    self.dtypes[ref.number] = aval.dtype
    owned = self._owned(owner or 0, ref, aval, frozenset(range(len(aval.shape))))
    if owner is None:
      self.env[ref.number] = self.build.input(None, owned.read, aval.shape, self.bound(ref))
    else:
      self.env[ref.number] = owned

  def _owned(
    self, owner: int, ref: Ref, aval: jax.ShapeDtypeStruct, varies: frozenset[int]
  ) -> Owned:
    """A value of the program that its owner has."""
    bound, unit = self.bound(ref), float(self.units[ref.number])
    return Owned(owner, Read(ref.number), aval.shape, varies, bound, aval.dtype, unit)

  def dtype(self, v: Any) -> Any:
    """Of an equation's input."""
    return self.dtypes[v.number] if isinstance(v, Ref) else np.asarray(v).dtype

  def bound(self, ref: Ref) -> float:
    """The planned magnitude of a value: `outwards` of its calibrated one, or infinity."""
    return math.inf if self.bounds is None else float(self.bounds[ref.number])

  def _units(self, program: Program) -> np.ndarray:
    """[number of values] in which units an owner's value is worth sharing: those of its own range,
    or of a smaller range that differences of it have.
    """
    own = np.array([self.build.unit(self.bound(Ref(i))) for i in range(program.num_values)])
    units = own.copy()
    for equation in reversed(program.equations):
      if equation.name in _UNITS:
        (out,) = (ref.number for ref in equation.outputs)
        for i in (v.number for v in equation.inputs if isinstance(v, Ref)):
          factor = own[i] / own[out] if equation.name in ("mul", "div") else 1.0
          units[i] = min(units[i], units[out] * factor)
    return units

  def lower(self, equation: Equation, rules: Mapping[str, Rule]) -> None:
    """Lowers one equation by its rule, or leaves it to the party that holds all its inputs."""
    inputs = [self.env[v.number] if isinstance(v, Ref) else v for v in equation.inputs]
    self.build.layer = layer = self.label(equation)
    self.build.place = place = f"{equation.name} at {equation.source}"
    self.dtypes |= {
      ref.number: v.dtype for ref, v in zip(equation.outputs, equation.avals, strict=True)
    }
    self.places |= {ref.number: place for ref in equation.outputs}
    owners = {v.owner for v in inputs if isinstance(v, Owned)}
    if len(owners) == 1 and all(isinstance(v, Owned) or not is_secret(v) for v in inputs):
      (owner,) = owners
      for ref, aval in zip(equation.outputs, equation.avals, strict=True):
        self.env[ref.number] = self._owned(owner, ref, aval, varies_along(equation, inputs, aval))
      return
    if inputs and equation.outputs and not any(map(is_secret, inputs)):  # such as x == x
      with jax.ensure_compile_time_eval():
        found = equation.bind(*map(jnp.asarray, inputs))
      self.env |= {ref.number: v for ref, v in zip(equation.outputs, found, strict=True)}
      return
    rule = rules.get(equation.name)
    if rule is None:
      raise NotImplementedError(
        f"{equation.name} of a secret value has no protocol (at {equation.source}, in "
        f"{equation.layer}); {nearest(equation.name)}"
      )
    outputs = rule(self, equation, inputs)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    for ref, out in zip(equation.outputs, outputs, strict=True):
      bounded = lambda v: v._replace(max_abs=min(v.max_abs, self.bound(ref)))  # noqa: B023
      if isinstance(out, Value):
        out = bounded(out)
      elif isinstance(out, Complex):
        out = Complex(*(bounded(v) if isinstance(v, Value) else v for v in out))
      elif isinstance(out, Lazy | Pending):
        out = out._replace(bound=self.bound(ref), layer=layer, place=place)
        if isinstance(out, Lazy):
          out = out._replace(needed=float(self.needs[ref.number]))
      self.env[ref.number] = out

  def label(self, equation: Equation) -> str:
    """The layer of an equation: its own scope, or the deeper one that its input comes from."""
    label = equation.layer
    for v in equation.inputs:
      if isinstance(v, Ref) and self.labels.get(v.number, "").startswith(label):
        label = self.labels[v.number]
    for ref in equation.outputs:
      self.labels[ref.number] = label
    return label

  # ---- conversions

  def value(self, v: Any) -> Value:
    """v as shares; a waiting value is computed now, once."""
    if isinstance(v, Value):
      return v
    if isinstance(v, Complex):
      raise NotImplementedError(
        f"{self.build.place}: a complex number; take jnp.real and jnp.imag of it first"
      )
    if v not in self.forced:
      match v:
        case Owned():
          largest = min(v.bound, self.largest(v, self.build.config.margin), most_of(v.dtype))
          unit = self.build.unit(largest) if v.unit is None else v.unit
          scale = unit if jnp.issubdtype(v.dtype, jnp.floating) else 1.0
          self.forced[v] = self.build.input(v.owner, v.read, v.shape, largest, scale)
        case Masked():
          self.forced[v] = v.plain()
        case Pending() | Lazy():
          build, here = self.build, (self.build.layer, self.build.place)
          build.layer, build.place = v.layer or build.layer, v.place or build.place
          out = self.compute(v) if isinstance(v, Lazy) else self.build.relu(v.x)
          self.forced[v] = out._replace(max_abs=min(out.max_abs, v.bound))
          build.layer, build.place = here
        case _:
          raise TypeError(f"a public {type(v).__name__} needs no shares; use it as it is")
    return self.forced[v]

  def compute(self, lazy: Lazy) -> Value:
    """The one-sided product, at a scale that fills the operand's bits and fits the ring."""
    config = self.build.config
    bound, x, largest = lazy.bound, lazy.x, self.largest(lazy.weight)
    fraction_bits, bits = -round(math.log2(lazy.weight.unit or config.unit)), config.num_bits
    if not math.isinf(largest) and largest > 0:
      bits = config.weight_bits
      fraction_bits = bits - 1 - max(math.frexp(largest)[1], -64)
    magnitude = math.frexp(largest if math.isfinite(largest) else 1.0)[1]
    above = lambda most: config.num_bits - 3 - math.log2(most) if 0 < most < math.inf else math.inf
    room, coarsest = above(max(bound, lazy.needed)), math.log2(max(x.scale, config.unit))
    if room + coarsest + magnitude < _FEWEST_BITS:
      room = above(bound)  # what is added is truncated first
    # As after a product; a mean is less fine.
    spare = scales.finer(x.scale, config.fraction_bits) > config.fraction_bits // 2
    if spare and (room == math.inf or fraction_bits > math.floor(room + math.log2(x.scale))):
      x = self.build.narrow(x)
    fits = math.floor(room + math.log2(x.scale)) if room < math.inf else fraction_bits
    if fraction_bits > fits:  # weights lose bits; if too many, x is truncated first
      if fits + magnitude < _ENOUGH_BITS:
        x = self.build.narrow(x, _ENOUGH_BITS - fits - magnitude)
        fits = math.floor(room + math.log2(x.scale))
      fraction_bits = min(fraction_bits, fits)
      if fraction_bits + magnitude < _FEWEST_BITS:
        raise ValueError(
          f"{self.build.layer}: {self.build.place}: values up to {bound:.4g} leave weights fewer "
          f"than {_FEWEST_BITS} bits in a ring of num_bits={config.num_bits}; use a wider ring or "
          f"fewer fraction_bits"
        )
    out = self.build.linear(
      x,
      lazy.weight.owner,
      lazy.weight.read,
      lazy.weight.shape,
      2.0**-fraction_bits,
      bits,
      lazy.map,
      bound,
    )
    for fn in lazy.after:
      out = self.build.local(fn, out)
    if lazy.offset is not None:
      offset = lazy.offset
      largest = self.largest(offset, slack=config.margin)
      out = self.build.add_owned(out, offset.owner, compact(offset), compact_shape(offset), largest)
      out = out._replace(max_abs=bound)
    return out

  def least(self, x: Value) -> float:
    """A magnitude that no value exceeds and that leaves room for a difference."""
    return (
      x.max_abs if not math.isinf(x.max_abs) else 2.0 ** (self.build.config.num_bits - 4) * x.scale
    )

  def largest(self, owned: Owned, slack: float = 1.0) -> float:
    """The magnitude of an owned value if its owner plans with it at hand, times a slack,
    `outwards`.
    """
    return outwards(self.magnitude(owned) * slack)


_UNITS = {
  "add", "sub", "neg", "mul", "div", "reshape", "squeeze", "expand_dims", "broadcast_in_dim",
  "transpose", "slice", "copy",
}  # fmt: skip
_MAXIMA = {"max", "reduce_window_max"}
_THROUGH = {"pad", "slice", "reshape", "squeeze", "expand_dims", "transpose", "copy"}
_ONE_SCALE = _THROUGH | {
  "add", "add_any", "sub", "neg", "reduce_sum", "reduce_window_sum", "cumsum", "concatenate",
  "stack", "broadcast_in_dim", "rev", "gather", "dynamic_slice", "split", "tile", "copy_p",
  "convert_element_type", "stop_gradient", "optimization_barrier",
}  # fmt: skip


def _needs(program: Program, bounds: np.ndarray | None) -> np.ndarray:
  """For each value the largest magnitude of what has its scale: the value and its sums."""
  needs = np.full(program.num_values, math.inf) if bounds is None else np.array(bounds)
  for equation in reversed(program.equations):
    if equation.name in _ONE_SCALE and not any(map(is_low, equation.inputs)):
      inputs = [v.number for v in equation.inputs if isinstance(v, Ref)]
      largest = max(needs[ref.number] for ref in equation.outputs)
      needs[inputs] = np.maximum(needs[inputs], largest)
  return needs


def _pooled(program: Program) -> set[int]:
  """The values that only maxima read, directly or through reshapings."""
  readers: dict[int, list[Equation]] = {}
  for equation in program.equations:
    for v in equation.inputs:
      if isinstance(v, Ref):
        readers.setdefault(v.number, []).append(equation)
  kept = {v.number for v in program.outputs if isinstance(v, Ref)}
  pooled: set[int] = set()
  for equation in program.equations[::-1]:
    if not equation.outputs:  # a callback
      continue
    ref = equation.outputs[0].number
    found = readers.get(ref, [])
    reaches = lambda e: e.name in _MAXIMA or (e.name in _THROUGH and e.outputs[0].number in pooled)
    if found and ref not in kept and all(map(reaches, found)):
      pooled.add(ref)
  return pooled
