"""Arithmetic of scales: what one unit of a fixed-point number stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def finer(scale: float, fraction_bits: int) -> int:
  """The bits by which a scale is finer than 2^-fraction_bits; 0 if it is coarser."""
  return max(0, math.floor(-fraction_bits - math.log2(scale) + 0.5))


def common(scales: Sequence[float], bits: int) -> float:
  """A scale of which each of the scales is a whole multiple, up to a relative error of 2^-bits.

  If their ratios are whole it is the finest of them; if not, it is finer by up to about bits / 2
  bits for each other ratio, since ratios are rounded to the fraction of least denominator.
  """
  finest, parts = min(scales), 1
  for scale in scales:
    ratio, most = scale / finest * parts, 1
    while abs((near := Fraction(ratio).limit_denominator(most)) / ratio - 1) > 2.0**-bits:
      most *= 2
    parts *= near.denominator
  return finest / parts
