"""Which subgroups of the test images a report compares."""

from __future__ import annotations

import dataclasses
import itertools
import math

from ..settings import names, setting


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a report compares."""

  subgroups: str = setting(
    "",
    "columns of the test images (a CSV's, say) by whose values scores are compared, separated by "
    "commas; of numbers with the edges of bins, such as sex,age:0:18:65:200. Sites are compared "
    "wherever test images carry one",
  )

  def __post_init__(self):
    self.columns()

  def check(self, of_pixels: bool, is_multi: bool, is_phantom: bool = False) -> None:
    """Raises a ValueError where reports have no subgroups."""
    if self.subgroups and (of_pixels or is_multi):
      what = "a model that learns masks" if of_pixels else "several labels an image"
      raise ValueError(
        f"subgroups={self.subgroups!r} with {what}: subgroups have accuracies and MCC, of images "
        "of one class each; leave it out"
      )
    if is_phantom and (absent := set(self.columns()) - {"site"}):
      raise ValueError(
        f"subgroups={self.subgroups!r}: the phantom has sites and no column {min(absent)!r}; "
        "leave it out, or name other images, such as --data=csv:PATH"
      )

  def columns(self) -> dict[str, tuple[float, ...]]:
    """Column -> edges of its bins, or none.

    Raises:
      ValueError: for another form.
    """
    said = f"subgroups={self.subgroups!r}"
    out: dict[str, tuple[float, ...]] = {}
    for one in names(self.subgroups):
      column, *texts = (part.strip() for part in one.split(":"))
      try:
        edges = tuple(map(float, texts))
      except ValueError as error:
        raise ValueError(f"{said}: write edges as numbers, such as age:0:18:65:200") from error
      rising = all(a < b for a, b in itertools.pairwise(edges))
      if len(edges) == 1 or not rising or not all(map(math.isfinite, edges)):
        raise ValueError(
          f"{said}: the edges of {column!r} must be at least two numbers that rise, such as "
          "age:0:18:65:200"
        )
      if not column or column in out:
        raise ValueError(f"{said} names {column!r} {'twice' if column else ''}; name columns once")
      out[column] = edges
    return out
