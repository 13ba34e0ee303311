"""What an attack showed: its score, the interval, what guessing scores, and a positive control."""

from __future__ import annotations

from typing import NamedTuple


class Evidence(NamedTuple):
  """The outcome of one attack at one threat point.

  Attributes:
    threat: who attacks and what it sees, e.g. "honest server, each site's update".
    attack: by its name in the literature.
    protection: what stood in its way, e.g. "secure aggregation of 3 sites".
    measure: what `value` is, e.g. "identification among 500 candidates".
    value: the score; larger is better for the attacker.
    interval: of `value` at 95 % confidence; None for a value without sampling error.
    chance: what guessing scores; None where guessing has no score, as for PSNR.
    control: the same attack with the same effort where it should succeed; None for a control.
    note: what a reader must know to judge the value; may be empty.
  """

  threat: str
  attack: str
  protection: str
  measure: str
  value: float
  interval: tuple[float, float] | None = None
  chance: float | None = None
  control: Evidence | None = None
  note: str = ""
