"""The text of `privacy_report.md`: the verdict first, then each part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from primia_jax.attacks.evidence import (
  EFFECT,
  Evidence,
  at_most,
  beats_chance,
  breaches,
  doubt,
  verdict,
)

from .. import markdown
from .parts import Part

_KEEP = (
  "**NOT PRIVATE**: the run was attacked on purpose. Pictures show images of the sites, and what "
  "attacks made of them; keep this folder as the images are kept."
)


def first_line(evidence: Sequence[Evidence]) -> str:
  """Where identification is not at chance: first of what somebody sees in the run, then what is
  told to an adversary who knows more than its threat point gives, then in trials beside the run.
  """
  open_to = [one for one in evidence if one.occurs and one.chance is not None]
  above = [one for one in open_to if not one.assumed and beats_chance(one)]
  told = [one for one in open_to if one.assumed and beats_chance(one)]
  said = [f"**Identification is not at chance**: {_grouped(above, _scored)}."] if above else []
  said += [
    f"**Numbers tell of one image to whoever knows {assumed}**: "
    + _told([one for one in told if one.assumed == assumed])
    + "."
    for assumed in dict.fromkeys(one.assumed for one in told)
  ]
  if beside := _by_protection(evidence):
    failed = "; ".join(
      f"{protection} ({'; '.join(dict.fromkeys(map(_scored, mine)))})"
      for protection, mine in beside.items()
    )
    said.append(f"**In trials beside this run, protection fails**: {failed}.")
  if above:
    return " ".join(said)
  return " ".join([*said, *["Else:"] * bool(said and open_to), _of_failures(open_to)])


def _of_failures(open_to: Sequence[Evidence]) -> str:
  """What attacks that did not succeed say of what somebody sees in the run."""
  if not open_to:
    return "**No view of this run was attacked**, so this report makes no statement about it."
  failed = [one for one in open_to if not beats_chance(one)]
  if not failed:
    return "nothing else that somebody sees in this run was attacked."
  doubts = dict.fromkeys(filter(None, map(doubt, failed)))
  unsure = [
    f"**Inconclusive** ({why}): {_grouped([one for one in failed if doubt(one) == why], _bounded)}."
    for why in doubts
  ]
  sure = [one for one in failed if not doubt(one)]
  if unsure:
    return " ".join([*unsure, *[f"At chance: {_grouped(sure, _bounded)}."] * bool(sure)])
  return (
    f"**Identification is at chance**, less than {EFFECT:g} above guessing, in all that was tried "
    f"({_grouped(sure, _bounded)}), and each attack succeeds in its control. An attack that fails "
    "proves nothing about better ones; what is proved stands under Ledger."
  )


def failing(evidence: Iterable[Evidence]) -> list[str]:
  """The protections that failed in trials beside the run, a sentence for each attack."""
  return [
    f"{one.protection} does not hide what single updates hold: {_scored(one)}, where guessing "
    f"gives {_number(one.chance or 0)} ({one.measure}; {one.threat})"
    for mine in _by_protection(evidence).values()
    for one in mine
  ]


def _by_protection(evidence: Iterable[Evidence]) -> dict[str, list[Evidence]]:
  found: dict[str, list[Evidence]] = {}
  for one in filter(breaches, evidence):
    found.setdefault(one.protection, []).append(one)
  return found


def _told(evidence: Sequence[Evidence]) -> str:
  """All attacks, and all threat points of any of them."""
  attacks = ", ".join(dict.fromkeys(one.attack for one in evidence))
  return f"{attacks} ({'; '.join(dict.fromkeys(one.threat for one in evidence))})"


def _grouped(evidence: Iterable[Evidence], say: Callable[[Evidence], str]) -> str:
  """Attacks by threat point: "threat: attack, what is said of it; attack, ..."."""
  by_threat: dict[str, list[str]] = {}
  for one in evidence:
    by_threat.setdefault(one.threat, []).append(say(one))
  return "; ".join(f"{threat}: {'; '.join(dict.fromkeys(said))}"
                   for threat, said in by_threat.items())  # fmt: skip


def _scored(one: Evidence) -> str:
  return f"{one.attack}, {_value(one)}"


def _bounded(one: Evidence) -> str:
  return f"{one.attack}, at most {_number(at_most(one))}"


def page(
  title: str,
  parts: Mapping[str, Part],
  absent: Mapping[str, str],
  pictures: Mapping[str, str],
  code: str,
) -> str:
  """The whole report.

  Args:
    title: what was audited.
    parts: by name, in order.
    absent: what was left out -> why.
    pictures: of all evidence together: file -> caption.
    code: the version of this program, and the hash of its sources.
  """
  evidence = [one for part in parts.values() for one in part.evidence]
  failures = [text for part in parts.values() for text in part.failures] + failing(evidence)
  version, _, sources = code.partition(" ")
  by = f"Made by primia-audit {version}, sources {sources[:12]}."
  lines = [f"# {title}", "", first_line(evidence), "", f"{_KEEP} {by}", ""]
  if failures:
    lines += ["## Where protection fails", "", *(f"- {text}" for text in failures), ""]
  for name, why in absent.items():
    lines += [f"Left out: {name}, {why}.", ""]
  lines += _pictures(pictures)
  if num := sum(one.chance is not None for one in evidence):
    lines += [
      f"Intervals hold at 95 % each: if {num} attacks only guessed, {num / 40:.1g} would seem to "
      f"succeed on average. At chance means: the interval ends less than {EFFECT:g} above "
      "guessing, and above the score, and that of the control begins higher. What neither succeeds "
      "nor is at chance is inconclusive.",
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
  if one.sibling is not None:
    control += f"; beside it, no control: {_value(one.sibling)}, {one.sibling.threat}"
  chance = "–" if one.chance is None else _number(one.chance)
  note = f"; {one.note}" if one.note else ""
  known = f", {one.assumed} known" if one.assumed else ""
  return (
    one.threat + known + here, one.attack, one.protection, one.measure, _value(one), chance,
    control, _said(one) + note,
  )  # fmt: skip


def _said(one: Evidence) -> str:
  """The verdict in a table."""
  bound = f"at most {_number(at_most(one))}"
  return {
    "succeeds": "**not at chance**",
    "at chance": f"at chance, {bound}; its control succeeds",
    "inconclusive": f"inconclusive, {bound}: {doubt(one)}",
    "no chance level": "–",
  }[verdict(one)]


def _value(one: Evidence) -> str:
  if one.interval is None:
    return _number(one.value)
  return f"{_number(one.value)} [{', '.join(map(_number, one.interval))}]"


def _number(x: float) -> str:
  return f"{x:.3f}" if abs(x) < 10 else f"{x:.1f}"
