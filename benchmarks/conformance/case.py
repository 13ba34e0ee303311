"""What a conformance case is, and the numbers that it is run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from primia_jax.types import PyTree

_GRID = 2**10  # numbers are multiples of its inverse, which every ring of the table represents


class Case(NamedTuple):
  """A function of the model owner's weights and the data owner's input.

  Attributes:
    kind: the group in the table.
    name: unique in its kind.
    make: () -> (fn, weights, x): fn(weights, x) gives the outputs; weights are the model owner's; x
      is the data owner's, float32 or integers, and spans the range that is stated. It raises an
      ImportError if a package is not installed.
  """

  kind: str
  name: str
  make: Callable[[], tuple[Callable[[Any, Any], PyTree], PyTree, PyTree]]


def secret(kind: str, table: Mapping[str, tuple]) -> list[Case]:
  """name -> (fn, *arrays): fn of shared numbers, each a weight of 1 times the data owner's."""

  def case(name: str, fn: Callable, *arrays: np.ndarray) -> Case:
    shared = lambda w, x: fn(*(v * w for v in x))
    return Case(kind, name, lambda: (shared, np.float32(1), arrays))

  return [case(name, *row) for name, row in table.items()]


def owned(kind: str, table: Mapping[str, Any]) -> list[Case]:
  """name -> (fn, weights, x), or a function that makes these."""
  make = lambda row: row if callable(row) else lambda: row
  return [Case(kind, name, make(row)) for name, row in table.items()]


def spread(low: float, high: float, *shape: int, seed: int = 0) -> np.ndarray:
  """Numbers all over [low, high], both ends among them; [8, 32] by default."""
  x = np.random.default_rng(seed).uniform(low, high, shape or (8, 32))
  x.flat[:2] = low, high
  return _on_grid(x)


def octaves(low: float, high: float, *shape: int, seed: int = 0) -> np.ndarray:
  """Positive numbers in [low, high], equally many in each octave; [8, 32] by default."""
  x = np.exp(np.random.default_rng(seed).uniform(np.log(low), np.log(high), shape or (8, 32)))
  x.flat[:2] = low, high
  return _on_grid(x)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
  """Normal numbers."""
  return _on_grid(np.random.default_rng(seed).standard_normal(shape) * scale)


def _on_grid(x: np.ndarray) -> np.ndarray:
  return (np.rint(x * _GRID) / _GRID).astype(np.float32)
