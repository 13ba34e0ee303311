"""The text of a report: the tables and sentences of `report.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Field of `metrics.Scores` -> (its name in tables, whether it is shown in percent).
SCALARS = {
  "accuracy": ("accuracy", True),
  "mcc": ("MCC", False),
  "macro_roc_auc": ("macro ROC-AUC", False),
}
PER_CLASS = ("sensitivity", "specificity")
LOCAL = "local: "  # begins the names of arms of one site alone
ABORTED = "rounds aborted, too few sites being left"  # fact of an arm
TRAINED_ON = "TRAINED ON"  # fact of images
NOT_PRIVATE = "NOT PRIVATE"  # fact of a run, or of its privacy
SYNTHETIC = (
  "The synthetic phantom is computed, not recorded. These figures say nothing about patients."
)


def _number(x: float | None, percent: bool, signed: bool = False) -> str:
  if x is None:
    return "undefined"
  return f"{100 * x if percent else x:{'+' if signed else ''}.{1 if percent else 3}f}"


def cell(entry: Mapping[str, Any] | float | str | None, percent: bool, signed: bool = False) -> str:
  """A value and its interval, as tables show them; a text, such as that it is suppressed, as is."""
  if isinstance(entry, str):
    return entry
  if not isinstance(entry, Mapping):
    return _number(entry, percent, signed)
  value, low, high = (_number(entry[k], percent, signed) for k in ("value", "low", "high"))
  return value if entry["value"] is None else f"{value} [{low}, {high}]"


def gap_cell(gap: Mapping[str, Any] | str | None, percent: bool) -> str:
  """The gap between the best and the worst of several, its interval, and which these are."""
  if gap is None or isinstance(gap, str):
    return gap or "undefined"
  return f"{cell(gap, percent)} (best {plain(gap['best'])}, worst {plain(gap['worst'])})"


def row(*cells: Any) -> str:
  """A row of a table."""
  return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  """A table of text cells."""
  return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def plain(text: str) -> str:
  """A text that Markdown shows as it is, whatever is in it; `_row` takes care of its bars."""
  return re.sub(r"([\\`*<>\[\]$~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", text)


def _facts(facts: Mapping[str, Any], head: tuple[str, str]) -> list[str]:
  text = lambda v: v if isinstance(v, str) else json.dumps(v)
  return [row(*head), row("---", "---"), *(row(k, text(v)) for k, v in facts.items())]


def _summary(result: Mapping[str, Any]) -> str:
  main, difference = result["arms"][result["main_arm"]], result["difference"]
  text = f"On the {_count(result)} test images of **{plain(result['data'])}**, the "
  if isinstance(main["accuracy"], str):
    text += f"accuracy of the {result['main_arm']} model is {main['accuracy']}"
  else:
    low, value, high = (_number(main["accuracy"][k], True) for k in ("low", "value", "high"))
    text += (
      f"{result['main_arm']} model is correct on {value} % (95 % interval {low} to {high}). Its "
      f"Matthews correlation (MCC) is {cell(_value(main['mcc']), False)}"
    )
  if difference and not isinstance(difference["accuracy"], str):
    low, value, high = (
      _number(difference["accuracy"][k], True, signed=True) for k in ("low", "value", "high")
    )
    text += (
      f". Its accuracy minus that of the {difference['minus']} model is {value} percentage points "
      f"(95 % interval {low} to {high})"
    )
  return text + "."


def _count(result: Mapping[str, Any]) -> str:
  found = result["num_examples"]
  return found if isinstance(found, str) else f"{found:,}"


def _value(entry: Mapping[str, Any] | str) -> Any:
  return entry if isinstance(entry, str) else entry["value"]


def warnings(result: Mapping[str, Any]) -> list[tuple[str, str]]:
  """What a reader must know of a run before its scores, as (what, why)."""
  privacy = result["privacy"] or {}
  facts = [(k, str(v)) for k, v in result["config"].items() if k.endswith((ABORTED, TRAINED_ON))]
  recorded = [(k, v) for k, v in result["config"].items() if k == NOT_PRIVATE]
  of_privacy = [(k, privacy[k]) for k in (NOT_PRIVATE, "NOT PROTECTED") if k in privacy]
  of_images = [(k, v) for k, v in result["images"].items() if k.isupper()]
  return recorded + of_privacy + of_images + facts


def learnt(result: Mapping[str, Any]) -> str:
  """What a federated run beside others has shown, in a sentence; empty without the others."""
  found = {name: _value(scores["accuracy"]) for name, scores in result["arms"].items()}
  if any(isinstance(value, str) for value in found.values()):
    return ""
  of = {name: 100 * value for name, value in found.items()}
  alone = {name.removeprefix(LOCAL): x for name, x in of.items() if name.startswith(LOCAL)}
  if "federated" not in of or not alone:
    return ""
  ours, best = of["federated"], max(alone, key=alone.__getitem__)

  def beside(other: float) -> str:
    points = round(ours, 1) - round(other, 1)
    if round(points, 1) == 0:
      return "as good as"
    return f"{abs(points):.1f} points {'below' if points < 0 else 'above'}"

  pooled = ""
  if "pooled" in of:
    pooled = (
      f", and {beside(of['pooled'])} the {of['pooled']:.1f} % of all images in one place (pooled)"
    )
  return (
    f"Training together, each hospital's images staying with it, reached {ours:.1f} % accuracy: "
    f"{beside(alone[best])} the {alone[best]:.1f} % of the best hospital alone ({best}){pooled}."
  )


def _hospitals(result: Mapping[str, Any]) -> list[str]:
  """What the phantom's hospitals differ in."""
  rows = result["hospitals"]
  if rows is None:
    return []
  return [
    "## The hospitals",
    "",
    "Hospitals differ in size, detector and patients. Less *exposure* makes images brighter and "
    "noisier, and *blur* is the standard deviation of the detector's. Percentages are the chances "
    "of the classes among a hospital's patients. The test images are of all hospitals in equal "
    "shares.",
    "",
    row(*rows[0]),
    row("---", *["---:"] * (len(rows[0]) - 1)),
    *(row(*hospital.values()) for hospital in rows),
    "",
    f"![Test images of each hospital: {result['data']}](hospitals.png)",
    "",
    "These images are computed, so they may be shown. No report shows images of real patients.",
    "",
  ]


def markdown(
  result: Mapping[str, Any],
  pictures: Mapping[str, str],
  numbered: str = "",
  compared: Sequence[str] = (),
) -> str:
  """The whole report.

  Args:
    result: what `metrics.json` holds.
    pictures: file -> caption.
    numbered: what the numbers of classes in the pictures stand for; empty where they have names.
    compared: lines of a section about subgroups.
  """
  arms, references, difference = result["arms"], result["references"], result["difference"]
  rows: list[tuple[str, tuple[str, ...], bool]] = [
    (name, (field,), percent) for field, (name, percent) in SCALARS.items()
  ]
  rows += [
    (f"{field}: {plain(label)}", (field, label), True)
    for field in PER_CLASS
    for label in result["label_names"]
  ]

  def pick(scores: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for step in path:
      scores = scores.get(step, "")  # a reference has no ROC-AUC
    return scores

  def at(
    scores: Mapping[str, Any], path: tuple[str, ...], percent: bool, signed: bool = False
  ) -> str:
    entry = pick(scores, path)
    return "–" if entry == "" else cell(entry, percent, signed)

  head = ["", *arms, *references]
  data = plain(result["data"])
  lines = [f"# {result['title']}: {data}", "", _summary(result), ""]
  lines += [said, ""] if (said := learnt(result)) else []
  for what, why in warnings(result):
    lines += [f"**{what}**: {why}.", ""]
  if "synthetic phantom" in result["data"]:
    lines += [SYNTHETIC, ""]
  lines += [*_hospitals(result), "## Results", ""]
  lines += [row(*head), row("---", *["---:"] * (len(head) - 1))]
  for name, path, percent in rows:
    cells = [at(scores, path, percent) for scores in (*arms.values(), *references.values())]
    lines.append(row(f"{name} (%)" if percent else name, *cells))
  gaps = [gap_cell(scores["class_gap"], True) for scores in arms.values()]
  lines.append(row("gap between classes (points)", *gaps, *["–"] * len(references)))
  unit = "images" if result["intervals"]["unit"] == "example" else "patients (groups of images)"
  lines += [
    "",
    f"Brackets hold 95 % percentile bootstrap intervals from "
    f"{result['intervals']['num_resamples']:,} resamples of the test {unit}, the same for all "
    "arms. ROC-AUC is one-vs-one, averaged over pairs of classes. MCC is the multi-class Matthews "
    "correlation: 1 is perfect, 0 is chance. The gap between classes is the largest sensitivity "
    "minus the smallest; its interval is for all pairs of classes at once, so one that holds 0 may "
    "be chance.",
  ]
  if difference and difference["of"] == "federated" and difference["minus"] == "pooled":
    lines += [
      "",
      "*local*: trained on the images of one site. *pooled*: trained on the images of all sites, "
      "collected in one place. *federated*: trained on the images of all sites, each image "
      "staying at its site.",
    ]
  exact = arms[result["main_arm"]]["accuracy_clopper_pearson"]
  if exact and not isinstance(exact, str):
    low, high = (_number(x, True) for x in exact)
    lines += [
      "",
      f"The exact (Clopper-Pearson) 95 % interval of the {result['main_arm']} model's accuracy is "
      f"{low} to {high} %.",
    ]
  undefined = sorted(
    {
      name
      for scores in arms.values()
      for name, path, _ in rows
      if isinstance(entry := pick(scores, path), Mapping) and entry["undefined_resamples"]
    }
  )
  if undefined:
    lines += [
      "",
      f"Some resamples lack a class. These intervals leave them out: {', '.join(undefined)}.",
    ]
  if difference:
    lines += ["", f"## {difference['of'].capitalize()} minus {difference['minus']}", ""]
    lines += [row("", "difference"), row("---", "---:")]
    for name, path, percent in rows:
      lines.append(
        row(f"{name} (points)" if percent else name, at(difference, path, percent, signed=True))
      )
    lines += [
      "",
      "The intervals are paired: each resample scores both models. If an interval contains 0, "
      "either model may be the better one.",
    ]
  lines += ["", "## Calibration", "", row("", *arms), row("---", *["---:"] * len(arms))]
  calibration = {
    "expected_calibration_error": "expected calibration error (15 bins)",
    "brier_score": "Brier score (0 to 2)",
    "log_loss": "log loss (nats)",
  }
  for field, name in calibration.items():
    values = ("infinite" if s[field] is None else cell(s[field], False) for s in arms.values())
    lines.append(row(name, *values))
  lines += ["", "Lower is better in all three."]
  lines += ["", *compared, *_suppressed(result), *sections(result), "## Pictures", ""]
  if numbered:
    lines += [
      f"No font of this machine has the letters of some names. In the pictures {plain(numbered)}.",
      "",
    ]
  for file, caption in pictures.items():
    lines += [f"![{caption}: {data}]({file})", ""]
  return "\n".join([*lines, *ending(result)]) + "\n"


def _suppressed(result: Mapping[str, Any]) -> list[str]:
  """The confusion matrix as a table, where its picture is left out."""
  left_out, names = result["pictures left out"], [plain(name) for name in result["label_names"]]
  if not left_out:
    return []
  lines = ["## Suppressed", ""]
  if "confusion_matrix.png" in left_out:
    found = result["arms"][result["main_arm"]]["confusion_matrix"]
    rows = ([name, *cells] for name, cells in zip(names, found, strict=True))
    lines += [table(["true (rows), predicted (columns)", *names], rows), ""]
  lines += ["A suppressed number is not zero. Pictures left out:", ""]
  return [*lines, *(f"- {name}: {why}." for name, why in left_out.items()), ""]


def sections(result: Mapping[str, Any]) -> list[str]:
  """What every report says of its images, its sums and its privacy."""
  lines = list[str]()
  if result["images"]:
    lines += ["## Images", "", *_facts(result["images"], ("fact", "value")), ""]
  lines += ["## Secure aggregation", ""]
  if result["secure_aggregation"] is None:
    lines.append("Not used in this run.")
  else:
    lines += _facts(result["secure_aggregation"], ("fact", "value"))
  lines += ["", "## Differential privacy", ""]
  if result["privacy"] is None:
    lines.append(
      "Not used in this run. The trained model itself may reveal something about its training "
      "images."
    )
  else:
    lines += _facts(result["privacy"], ("fact", "value"))
  return [*lines, ""]


def ending(result: Mapping[str, Any]) -> list[str]:
  """The settings and versions, with which every report ends."""
  lines = ["## Configuration", "", *_facts(result["config"], ("setting", "value"))]
  return [*lines, "", "## Versions", "", *_facts(result["versions"], ("what", "version"))]
