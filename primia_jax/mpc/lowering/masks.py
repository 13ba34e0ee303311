"""Equations whose operands may be masked: what the rules of `rules_masks` have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.circuit import Value
from primia_jax.mpc.lowering.holders import LOW, Masked, Owned, is_low, is_real, is_secret
from primia_jax.mpc.lowering.ownership import Lowering, Rule
from primia_jax.mpc.lowering.program import Equation, Ref

# Primitives whose own rules take an infinite number.
_UNBOUNDED = {
  "max": (-math.inf,),
  "min": (math.inf,),
  "clamp": (-math.inf, math.inf),
  "pad": (-math.inf, math.inf),
}


class Part(NamedTuple):
  """An operand as a value that is 0 where it is masked, a mask, and public numbers.

  Attributes:
    x: secret, or a public array.
    keep: bool.
    fill: the public numbers: of masked entries, or all of a public operand.
    doubt: how far an entry may be from `fill`.
  """

  x: Any
  keep: np.ndarray
  fill: np.ndarray
  doubt: np.ndarray


class Step(NamedTuple):
  """An equation to be lowered, its inputs, and its rule without masks."""

  low: Lowering
  equation: Equation
  inputs: list[Any]
  rule: Rule

  @property
  def shape(self) -> tuple[int, ...]:
    return self.equation.avals[0].shape

  def run(self, inputs: Sequence[Any]) -> Any:
    """The rule on other inputs."""
    return self.rule(self.low, self.equation, list(inputs))

  def value(self, inputs: Sequence[Any]) -> Value:
    return self.low.value(self.run(inputs))

  def plain(self) -> Any:
    """Without masks: masked values as the numbers that they are."""
    inputs = [self.low.value(v) if isinstance(v, Masked) else v for v in self.inputs]
    allowed = _UNBOUNDED.get(self.equation.name, ())
    if not all(is_finite(v) or any(np.all(np.asarray(v) == n) for n in allowed) for v in inputs):
      raise NotImplementedError(
        f"{self.equation.name} of a secret value and an infinite or NaN public number at "
        f"{self.equation.source}; only maxima, comparisons and exp may follow minus infinity"
      )
    if any(map(is_low, inputs)):  # the unit of activations leaves more room than a finer one
      inputs = [self.low.build.narrow(v) if isinstance(v, Value) else v for v in inputs]
    return self.run(inputs)

  def public(self, inputs: Sequence[Any]) -> Any:
    """The equation itself, on public arrays."""
    with jax.ensure_compile_time_eval(), np.errstate(all="ignore"):
      found = [np.asarray(v) for v in self.equation.bind(*map(jnp.asarray, inputs))]
    return found if len(found) > 1 else found[0]

  def masked(self, x: Value, keep: np.ndarray, fill: Any, spread: Any, number: int = 0) -> Any:
    """Output `number` under a public mask; a plain value if nothing is masked."""
    if keep.all():
      return x
    x = x._replace(max_abs=min(x.max_abs, self.low.bound(self.equation.outputs[number])))
    fill, spread = (np.where(keep, 0.0, np.asarray(v, np.float64)) for v in (fill, spread))
    return Masked(x, keep, fill, spread, x.max_abs, self._late(number))

  def hidden(self, x: Value, top: float, bound: float, origin: Any, number: int = 0) -> Masked:
    """Output `number` under a secret mask; masked entries lie at or below `top`."""
    bound = min(bound, self.low.bound(self.equation.outputs[number]))
    return Masked(x, None, np.asarray(top), np.zeros(()), bound, self._late(number), origin)

  def _late(self, number: int) -> Any:
    def plain() -> Value:
      out = self.plain()
      out = self.low.value(out[number] if isinstance(out, list) else out)
      bound = self.low.bound(self.equation.outputs[number])
      return out._replace(max_abs=min(out.max_abs, bound))

    return plain

  def bound(self, i: int) -> float:
    """Of the magnitude of the entries of input i that are not masked."""
    v, ref = self.inputs[i], self.equation.inputs[i]
    if isinstance(v, Masked):
      return v.bound
    if is_secret(v):
      planned = self.low.bound(ref) if isinstance(ref, Ref) else math.inf
      if isinstance(v, Owned):
        return min(self.low.largest(v, self.low.build.config.margin), planned)
      return min(self.low.value(v).max_abs, planned)
    v = np.asarray(v, np.float64)
    return float(np.abs(np.where(v <= LOW, 0.0, v)).max(initial=0))

  def part(self, i: int) -> Part:
    """Input i, which no secret mask hides."""
    v = self.inputs[i]
    if isinstance(v, Masked):
      return Part(v.x, v.keep, v.fill, np.where(v.keep, v.bound, v.spread))
    if is_secret(v):
      x = v if isinstance(v, Owned) else self.low.value(v)
      everywhere = np.ones(x.shape, bool)
      return Part(x, everywhere, np.zeros(x.shape), np.full(x.shape, self.bound(i)))
    v = np.asarray(v, np.float64)
    keep = ~(v <= LOW)
    return Part(np.where(keep, v, 0.0), keep, v, np.zeros(v.shape))

  def levelled(self, i: int, level: float) -> Any:
    """Input i with `level` for what is masked in public."""
    v = self.inputs[i]
    if is_hidden(v):
      return v.x
    if isinstance(v, Masked):
      return lowered(self.low, v.x, v.keep, level)
    return np.where(np.asarray(v) <= LOW, level, v) if is_low(v) else v


# ---- values


def zeroed(low: Lowering, x: Value, keep: np.ndarray) -> Value:
  """x, and 0 where masked."""
  if keep.all():
    return x
  factors = keep.astype(low.build.config.dtype)
  return low.build.local(
    lambda v: v * factors, low.build.broadcast(x, keep.shape), shape=keep.shape
  )


def lowered(low: Lowering, x: Value, keep: np.ndarray, level: float) -> Value:
  """x, which is 0 where masked, with `level` there."""
  out = low.build.add_public(x, np.where(keep, 0.0, level))
  return out._replace(max_abs=max(x.max_abs, -level))


def limit(low: Lowering) -> float:
  """exp gives exactly 0 from minus this down, in whatever unit it has."""
  return (low.build.config.num_bits / 2 + 4) * math.log(2)


def level(low: Lowering, bound: float) -> float:
  """Where a secret mask puts entries; several times too low, since a division may follow."""
  return -(bound + 4 * limit(low))


# ---- what operands are


def is_hidden(v: Any) -> bool:
  return isinstance(v, Masked) and v.keep is None


def is_finite(v: Any) -> bool:
  return not is_real(v) or bool(np.all(np.isfinite(np.asarray(v, np.float64))))
