"""What an attack showed: a score with its interval, the score of guessing, and a control."""

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
    occurs: whether somebody sees this in the run that is audited; False for what is shown beside
      it, such as single updates of a run whose server sees sums.
    assumed: what the adversary knows beyond its threat point, e.g. "all other images"; or empty.
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
  occurs: bool = True
  assumed: str = ""


def beats_chance(one: Evidence) -> bool | None:
  """Whether the attack did better than guessing: the whole interval, or a value without sampling
  error, lies above chance. None where guessing has no score.
  """
  if one.chance is None:
    return None
  return (one.value if one.interval is None else one.interval[0]) > one.chance


def verdict(one: Evidence) -> str:
  """What the evidence says: "succeeds", "at chance", "inconclusive" or "no chance level".

  An attack that is at chance says something only where its control succeeds with the same effort;
  else, or without a control, it is inconclusive.
  """
  if (beats := beats_chance(one)) is None:
    return "no chance level"
  if beats:
    return "succeeds"
  return "at chance" if one.control is not None and beats_chance(one.control) else "inconclusive"
