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


def unit(max_abs: float, num_bits: int, fraction_bits: int) -> float:
  """The unit worth keeping of numbers up to max_abs: u = 2^-f, or finer for a range below 1.

  It is u max_abs, rounded up to a power of two, so that small numbers keep f bits too. A ring of k
  bits bounds how fine: a product of two such numbers leaves room for a sum of 2^6.
  """
  finest = max(0, (num_bits - 8) // 2 - fraction_bits)
  octave = math.ceil(math.log2(max_abs)) if 0 < max_abs < 1 else 0
  return 2.0**-fraction_bits * 2.0 ** max(-finest, octave)
