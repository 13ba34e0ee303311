"""The weight of a penalty, chosen by its score on images that are not reported.

An attack with a wrong weight fails, and its failure says nothing of protection. So values are added
while the best is the last of those tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Tuned(NamedTuple):
  """A chosen value.

  Attributes:
    value: the best of those tried.
    is_at_end: whether it is the last of all that there are, so that a better one may lie beyond.
      Nothing lies below 0.
  """

  value: float
  is_at_end: bool

  def __str__(self) -> str:
    return f"{self.value:g}" + ", the best at the end of the grid" * self.is_at_end


def tune(
  first: Sequence[float], score: Callable[[float], float], ladder: Sequence[float] = LADDER
) -> Tuned:
  """The value with the largest score: of the first ones, and of the ladder's beyond them, for as
  long as the best is at an end. A score that is not a number never wins.

  Args:
    first: values that are tried in any case.
    score: of a value, larger is better; asked once for each value that is tried.
    ladder: further values, in any order; those between the first ones are not tried.

  Raises:
    ValueError: there are no first values.
  """
  if not first:
    raise ValueError("first holds no value to try")
  below = sorted(value for value in ladder if value < min(first))
  above = sorted((value for value in ladder if value > max(first)), reverse=True)
  number = lambda value: -math.inf if math.isnan(got := score(value)) else got
  found = {value: number(value) for value in first}
  while True:
    best = max(found, key=found.__getitem__)
    beyond = (best == max(found) and above) or (best == min(found) and below)
    if not beyond:
      return Tuned(best, best in (min(found), max(found)) and best != 0)
    value = beyond.pop()
    found[value] = number(value)
