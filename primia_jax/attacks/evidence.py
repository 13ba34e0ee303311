"""What an attack showed: a score with its interval, the score of guessing, and a control."""

from __future__ import annotations

from typing import NamedTuple

EFFECT = 0.1  # of a score: what an attack must surely gain less than for "at chance"


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
    control: the same attack, on the same model and with the same effort, without protection; None
      for a control.
    note: what a reader must know to judge the value; may be empty.
    occurs: whether somebody sees this in the run that is audited; False for what is shown beside
      it, such as single updates of a run whose server sees sums.
    assumed: what the adversary knows beyond its threat point, e.g. "all other images"; or empty.
    sibling: the same attack on another model, which is known to be vulnerable. It shows that the
      attack works at all, and is no control: no verdict rests on it.
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
  sibling: Evidence | None = None


def beats_chance(one: Evidence) -> bool | None:
  """Whether the attack did better than guessing: the whole interval, or a value without sampling
  error, lies above chance. None where guessing has no score.
  """
  if one.chance is None:
    return None
  return (one.value if one.interval is None else one.interval[0]) > one.chance


def verdict(one: Evidence) -> str:
  """What the evidence says: "succeeds", "at chance", "inconclusive" or "no chance level".

  An attack is at chance where its interval ends less than `EFFECT` above chance, and that of its
  control begins higher: the same attack with the same effort, without protection, surely gains
  more. The interval must also end less than `EFFECT` above the score, so that no luck makes up for
  few tries. All else that does not succeed is inconclusive, for a `doubt`.
  """
  if (beats := beats_chance(one)) is None:
    return "no chance level"
  if beats:
    return "succeeds"
  return "inconclusive" if doubt(one) else "at chance"


def doubt(one: Evidence) -> str:
  """Why an attack that did not succeed shows nothing; empty where it is at chance."""
  if one.control is None:
    return "there is no control"
  if not beats_chance(one.control):
    if one.control.value > (one.control.chance or 0) + EFFECT:
      return "too few tries of its control"
    return "it fails without protection, too"
  if one.chance is None or at_most(one) >= min(one.chance, one.value) + EFFECT:
    return f"too few tries to exclude {EFFECT:g} above guessing"
  low = one.control.value if one.control.interval is None else one.control.interval[0]
  if one.control.chance is None or low <= one.control.chance + EFFECT:
    return f"its control is not surely {EFFECT:g} above guessing"
  return ""


def at_most(one: Evidence) -> float:
  """The upper end of the score's interval."""
  return one.value if one.interval is None else one.interval[1]


def breaches(one: Evidence) -> bool:
  """Whether a protection failed in a trial beside the run: what nobody sees in it, such as single
  updates or sums of few sites, told more than guessing in spite of it.
  """
  tried = one.protection not in ("", "none") and one.control is not None
  return tried and not one.occurs and not one.assumed and bool(beats_chance(one))
