"""What `infer_encrypted --check` says: encrypted answers beside those in the clear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import phases
from .planned import Infer


class Asked(NamedTuple):
  """What was asked.

  Attributes:
    config: the flags.
    ids: names of the N images.
    label_names: the model's classes.
    pixels: of all masks; None where images are classified.
  """

  config: Infer
  ids: Sequence[str]
  label_names: Sequence[str]
  pixels: int | None = None

  @property
  def total(self) -> int:
    return len(self.ids) if self.pixels is None else self.pixels


def record(asked: Asked, found: phases.Difference) -> dict[str, Any]:
  """The same as `text` for programs: `check.json`."""
  return {
    "of": "images" if asked.pixels is None else "pixels",
    "total": asked.total,
    "same_class_as_float32": found.same,
    "largest_logit_difference": found.largest,
    "same_bits_as_the_integer_model": found.bitwise,
    "close": [
      {
        "image": asked.ids[one.image],
        "float32_logits_apart": one.gap,
        "encrypted": asked.label_names[one.encrypted],
        "float32": asked.label_names[one.plain],
      }
      for one in found.close
    ],
  }


def text(asked: Asked, found: phases.Difference) -> str:
  """What is printed."""
  config, kind = asked.config, "images" if asked.pixels is None else "pixels"
  lines = ["Checked in the clear: every value stays within its planned range."]
  if found.largest is not None:
    is_chosen = config.ring_bits and config.fraction_bits  # then target_error chose nothing
    target = "" if is_chosen else f" (target {config.target_error:g})"
    lines.append(f"  largest difference of a logit from float32: {found.largest:.2g}{target}")
  lines.append(f"  the same class as float32: {found.same:,} of {asked.total:,} {kind}")
  reach = None if found.largest is None else f"{2 * found.largest:.2g}"
  if found.same < asked.total:
    known = "" if reach is None else f"; errors change a class only where they are within {reach}"
    lines.append(
      f"  elsewhere float32's two best logits are {found.margin:.2g} apart at most{known}"
    )
  if found.bitwise is not None:
    said = "yes" if found.bitwise else "NO, which is an error in the code"
    lines.append(f"  bit for bit what the integer model gives: {said}")
  if asked.pixels is None and reach is not None:
    close = f"whose two best float32 logits are within {reach}, so that a class may change"
    lines.append(f"  images {close}: {len(found.close) or 'none'}")
  lines += [
    f"    {asked.ids[one.image]}: {one.gap:.2g} apart, encrypted "
    f"{asked.label_names[one.encrypted]}, float32 {asked.label_names[one.plain]}"
    for one in found.close
  ]
  return "\n".join(lines)
