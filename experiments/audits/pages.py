"""The text of `privacy_report.md`: the verdict first, then each part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from primia_jax.attacks.evidence import Evidence, beats_chance, verdict

from .. import markdown
from .parts import Part

_KEEP = (
  "**NOT PRIVATE**: the run was attacked on purpose. Pictures show images of the sites, and what "
  "attacks made of them; keep this folder as the images are kept."
)
_SAID = {
  "succeeds": "**not at chance**",
  "at chance": "at chance; its control succeeds",
  "inconclusive": "inconclusive: its control fails, or there is none",
  "no chance level": "–",
}


def first_line(evidence: Iterable[Evidence]) -> str:
  """Where identification is not at chance, of what somebody sees in the run.

  What is told to an adversary who knows more than its threat point gives is said apart: it leads
  where nothing else succeeds.
  """
  open_to = [one for one in evidence if one.occurs and one.chance is not None]
  if not open_to:
    return "**No view of this run was attacked**, so this report makes no statement about it."
  plain = [one for one in open_to if not one.assumed]
  told = [one for one in open_to if one.assumed and beats_chance(one)]
  known = "; ".join(
    f"**Numbers tell of one image to whoever knows {assumed}**: "
    + _told([one for one in told if one.assumed == assumed])
    for assumed in dict.fromkeys(one.assumed for one in told)
  )
  if above := [one for one in plain if beats_chance(one)]:
    more = f" {known}." if known else ""
    return f"**Identification is not at chance**: {_grouped(above)}.{more}"
  lead = f"{known}. Else: " if known else ""
  unsure = [one for one in open_to if verdict(one) == "inconclusive"]
  if unsure:
    where = _grouped(unsure, values=False)
    return f"{lead}**Inconclusive**, since a control fails or is missing: {where}."
  if not plain:
    return lead + "nothing else that somebody sees in this run was attacked."
  tried = _grouped(plain, values=False)
  return (
    f"{lead}**Identification is at chance** within its intervals in all that was tried ({tried}), "
    "and each attack succeeds in its control. An attack that fails proves nothing about better "
    "ones; what is proved stands under Ledger."
  )


def _told(evidence: Sequence[Evidence]) -> str:
  """All attacks, and all threat points of any of them."""
  attacks = ", ".join(dict.fromkeys(one.attack for one in evidence))
  return f"{attacks} ({'; '.join(dict.fromkeys(one.threat for one in evidence))})"


def _grouped(evidence: Iterable[Evidence], values: bool = True) -> str:
  """Attacks by threat point: "threat: attack, value; attack, value"."""
  by_threat: dict[str, list[str]] = {}
  for one in evidence:
    said = f"{one.attack}, {_value(one)}" if values else one.attack
    by_threat.setdefault(one.threat, []).append(said)
  join = "; " if values else ", "
  return "; ".join(f"{threat}: {join.join(dict.fromkeys(said))}"
                   for threat, said in by_threat.items())  # fmt: skip


def page(
  title: str, parts: Mapping[str, Part], absent: Mapping[str, str], pictures: Mapping[str, str]
) -> str:
  """The whole report.

  Args:
    title: what was audited.
    parts: by name, in order.
    absent: what was left out -> why.
    pictures: of all evidence together: file -> caption.
  """
  evidence = [one for part in parts.values() for one in part.evidence]
  failures = [text for part in parts.values() for text in part.failures]
  lines = [f"# {title}", "", first_line(evidence), "", _KEEP, ""]
  if failures:
    lines += ["## Where protection fails", "", *(f"- {text}" for text in failures), ""]
  for name, why in absent.items():
    lines += [f"Left out: {name}, {why}.", ""]
  lines += _pictures(pictures)
  if num := sum(one.chance is not None for one in evidence):
    lines += [
      f"Intervals hold at 95 % each: of {num} attacks that are at chance, {num / 40:.1g} seem to "
      "succeed on average.",
      "",
    ]
  for part in parts.values():
    lines += [f"## {part.title}", ""]
    for paragraph in part.text:
      lines += [paragraph, ""]
    if part.evidence:
      lines += [table(part.evidence), ""]
    lines += _pictures(part.pictures)
  return "\n".join(lines)


def _pictures(pictures: Mapping[str, str]) -> list[str]:
  lines: list[str] = []
  for file, caption in pictures.items():
    lines += [f"![{caption}]({file})", "", f"*{caption}.*", ""]
  return lines


def table(evidence: Iterable[Evidence]) -> str:
  """Evidence, an attack a row, beside its control."""
  head = (
    "threat point",
    "attack",
    "protection",
    "measure",
    "value",
    "chance",
    "control",
    "verdict",
  )
  return markdown.table(head, map(_row, evidence))


def _row(one: Evidence) -> tuple[str, ...]:
  here = "" if one.occurs else " (not in this run)"
  control = "–" if one.control is None else f"{_value(one.control)}, {one.control.threat}"
  chance = "–" if one.chance is None else _number(one.chance)
  note = f"; {one.note}" if one.note else ""
  said = _SAID[verdict(one)]
  known = f", {one.assumed} known" if one.assumed else ""
  return (
    one.threat + known + here, one.attack, one.protection, one.measure, _value(one), chance,
    control, said + note,
  )  # fmt: skip


def _value(one: Evidence) -> str:
  if one.interval is None:
    return _number(one.value)
  return f"{_number(one.value)} [{', '.join(map(_number, one.interval))}]"


def _number(x: float) -> str:
  return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"
