"""The results as Markdown."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence

from benchmarks.conformance.measure import ACCEPTED, BROKEN, CONFIG, REFUSED, SKIPPED, Result
from primia_jax.mpc import pricing

_HEAD = "| | | error | rounds | sent | dealt |", "| --- | --- | ---: | ---: | ---: | ---: |"
_WIDTH = 90  # characters of a refusal

_INTRODUCTION = """# What encrypted inference accepts

Of these {total} functions `mpc` runs {accepted} under encryption. It refuses {refused} when it
plans, by an error that says why and what to do instead.{others}

This table is made by

    python -m benchmarks.conformance --output=docs/conformance.md

in a ring of 2^{num_bits} with {fraction_bits} fraction bits, a step of {unit:.1e}.
`--kinds=norms,order` prints some kinds only; `--plans` times the plans of the networks at full
size.

Operations act on shared numbers: the data owner's input times a weight of 1, which takes the first
round. Products, convolutions, layers and networks have weights of the model owner. Ranges are
calibrated on the input itself, which spans the range that a name states, or about -8 to 8.
Networks named after a paper have an eighth of its width. All stand in `benchmarks/conformance/`.

- **error**: the largest |y - y64| / max(1, |y64|), where y64 is the same function in float64 and y
  what `mpc.check` gives, which an encrypted inference equals bit for bit
- **rounds** of communication, the output's among them; messages that do not wait for each other
  share a round
- **sent**: bytes that each party sends to the other
- **dealt**: bytes that the data owner receives from the dealer
"""


def markdown(results: Sequence[Result]) -> str:
  """A section for each kind, a row for each case, in order."""
  count = lambda outcome: sum(r.outcome == outcome for r in results)
  others = [
    f"{count(outcome)} {outcome} ({why})"
    for outcome, why in ((BROKEN, "a fault"), (SKIPPED, "a package is not installed"))
    if count(outcome)
  ]
  text = _INTRODUCTION.format(
    accepted=count(ACCEPTED),
    total=len(results),
    refused=count(REFUSED),
    others="".join(f" {each}." for each in others),
    num_bits=CONFIG.num_bits,
    fraction_bits=CONFIG.fraction_bits,
    unit=CONFIG.unit,
  )
  lines = [text]
  for kind, group in itertools.groupby(results, lambda r: r.case.kind):
    lines += [f"## {kind[0].upper()}{kind[1:]}", "", *_HEAD]
    lines += [*map(row, group), ""]
  return "\n".join(lines)


def row(result: Result) -> str:
  """One line of a table."""
  if result.outcome == ACCEPTED:
    sent, dealt = (pricing.bytes_text(n) for n in (result.sent, result.dealt))
    cells = ["yes", number(result.error), str(result.rounds), sent, dealt]
  else:
    cells = [f"{result.outcome}: {first_words(result.said)}", "", "", "", ""]
  return "| " + " | ".join([plain(result.case.name), *cells]) + " |"


def names(text: str) -> dict[str, list[str]]:
  """The cases that a written table lists, by their kind's heading."""
  out: dict[str, list[str]] = {}
  for section in text.split("\n## ")[1:]:
    kind, *lines = section.splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    out[kind] = [re.split(r"(?<!\\) \| ", line[2:])[0] for line in rows[2:]]
  return out


def listed(cases: Iterable) -> dict[str, list[str]]:
  """`names` of a table of these cases."""
  groups = itertools.groupby(cases, lambda case: case.kind)
  return {
    kind[0].upper() + kind[1:]: [plain(case.name) for case in group] for kind, group in groups
  }


def number(error: float) -> str:
  """An error with one digit; without sign where there is none."""
  return "0" if error == 0 else "infinite" if math.isinf(error) else f"{error:.0e}"


def first_words(text: str) -> str:
  """The beginning of an error's text, without the line of the case that caused it."""
  place = r"^\(top\): | \(at [\w.]+:\d+(, in .*?\)?)?\)(?=[;:,]|$)| at [\w.]+:\d+"
  text = re.sub(place, "", text.split("\n")[0]).split(";")[0]
  return plain(text if len(text) <= _WIDTH else text[: _WIDTH - 1].rsplit(" ", 1)[0] + " …")


def plain(text: str) -> str:
  """Text that Markdown shows as it is."""
  return re.sub(r"([\\`*<>|\[\]_])", r"\\\1", text)
