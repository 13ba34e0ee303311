"""The report of an evaluation by several hospitals, from the sums of what they counted alone."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax import metrics, secagg
from primia_jax.disclosure import Crossing, Policy, Suppressed
from primia_jax.metrics import ScoreCounts

from . import binned_plots, crossings, lettering, markdown, plots, report
from .configs.scoring import Evaluate
from .markdown import PER_CLASS, SCALARS, row

PICTURES = {
  "confusion_matrix.png": "Confusion matrix",
  "roc.png": "ROC curves, at the edges of the bins",
  "reliability.png": "Accuracy by confidence",
}
FILES = ("report.md", "metrics.json", crossings.FILE, *PICTURES)
_ENDS = ("value", "low", "high")


def write(
  folder: pathlib.Path,
  config: Evaluate,
  label_names: Sequence[str],
  data_name: str,
  counts: ScoreCounts,
  sites: Sequence[int],
  floor: int,
  about: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes `report.md`, `metrics.json`, `disclosure.md` and the pictures.

  Args:
    folder: an existing one; files of an earlier report in it are replaced.
    config: of the evaluation.
    label_names: the L classes.
    data_name: shown in every title; "synthetic phantom" for the phantom.
    counts: of all sites' images.
    sites: numbers of the sites in the sum.
    floor: fewest patients in a count that is told; 0 tells all.
    about: what the report says of the settings.

  Returns:
    What `metrics.json` holds; null there means undefined.
  """
  policy = Policy(fewest_patients=floor, fewest_sites=config.fewest_in_sum)
  found = result(config, label_names, counts, sites, policy)
  crossed = crossed_by(config, len(label_names), len(sites))
  secure = facts(config, len(sites))
  of_run = report.Facts(about, secure_aggregation=secure, policy=policy, crossed=crossed)
  found = report.jsonable(found | {"data": data_name} | of_run.told())
  of_run.write(folder, found["title"], found)
  left_out = found["pictures left out"]
  title = f"{found['title']}: {data_name}"
  if "confusion_matrix.png" not in left_out:
    cm = np.array(found["confusion_matrix"])
    plots.confusion_matrix(cm, label_names, folder / "confusion_matrix.png", title)
  if not left_out:
    binned_plots.roc(counts.table, label_names, folder / "roc.png", title)
    binned_plots.reliability(counts.calibration, folder / "reliability.png", title)
  for name in left_out:
    (folder / name).unlink(missing_ok=True)  # of an earlier report
  (folder / "report.md").write_text(page(found), encoding="utf-8")
  return found


def result(
  config: Evaluate,
  label_names: Sequence[str],
  counts: ScoreCounts,
  sites: Sequence[int],
  policy: Policy,
) -> dict[str, Any]:
  """The scores with their intervals and bounds, without those that would tell a count below the
  floor; arguments as `write`.

  How many patients a set of cells has is not known. It is at least as many as its largest cell has,
  and that is what is compared with the floor.
  """
  names, cm = list(label_names), np.asarray(counts.confusion, np.int64)
  size, num = range(len(names)), int(cm.sum())
  found = metrics.binned_intervals(
    counts, jax.random.key(config.seed), num_resamples=report.NUM_RESAMPLES
  )
  area = metrics.binned_macro_roc_auc(counts.table)
  entry = lambda field, *index: {
    end: np.asarray(getattr(getattr(found, end), field))[index] for end in _ENDS
  }
  scores: dict[str, Any] = {field: entry(field) for field in SCALARS}
  scores["macro_roc_auc"]["error"] = area.error
  scores |= {field: {name: entry(field, k) for k, name in enumerate(names)} for field in PER_CLASS}
  right = int(np.trace(cm))
  everyone = int(counts.everyone)
  is_single = everyone == num  # one image a patient
  exact: Any = metrics.clopper_pearson(right, num) if is_single else None
  of_class = np.asarray(counts.patients, np.int64).max(axis=1)
  table = policy.table(cm, counts.patients)
  hidden, is_whole = policy.count(0), not _has_hidden(table)
  alike: Any = None if is_single else _alike(counts)
  if not is_whole:  # the sizes of classes and any of these ratios tell what the table hides
    scores |= dict.fromkeys(("accuracy", "mcc"), hidden)
    scores |= {field: dict.fromkeys(names, hidden) for field in PER_CLASS}
    exact = alike = hidden
  scores["macro_roc_auc"] = policy.ratio(scores["macro_roc_auc"], *of_class)
  areas = {}
  for k, name in enumerate(names):
    others = [of_class[j] for j in size if j != k]
    areas[name] = policy.ratio(_area(counts.table, k), int(of_class[k]), int(max(others)))
  error = calibration_error(config, num)
  of_calibration = {"value": metrics.binned_calibration_error(counts.calibration), "error": error}
  shows_all = not policy.fewest_patients
  why = f"it would tell counts of fewer than {policy.fewest_patients} patients"
  left_out = {} if shows_all else {name: why for name in ("roc.png", "reliability.png")}
  return {
    "title": f"Evaluation by {len(sites)} sites",
    "sites": list(sites),
    "num_sites": config.scoring.num_sites,
    "num_examples": policy.ratio(num, everyone),
    "num_patients": policy.count(everyone),
    "label_names": names,
    "missing classes": [names[k] for k in size if not cm[k].sum()] if shows_all else [],
    "scores": scores,
    "accuracy_clopper_pearson": exact,
    "variance of accuracy by patients over that by images": alike,
    "roc_auc": areas,
    "expected_calibration_error": policy.ratio(of_calibration, everyone),
    "confusion_matrix": table,
    "scores in bins": counts.table if shows_all else None,
    "calibration in bins": counts.calibration if shows_all else None,
    "pictures left out": left_out | ({} if is_whole else {"confusion_matrix.png": why}),
    "intervals": {
      "level": 0.95, "num_resamples": report.NUM_RESAMPLES, "seed": config.seed, "unit": "image",
    },
  }  # fmt: skip


def _alike(counts: ScoreCounts) -> float | None:
  """How much larger the variance of accuracy is than that of as many independent images."""
  cm = np.asarray(counts.confusion)
  share, num = np.trace(cm) / cm.sum(), cm.sum()
  by_images = share * (1 - share) / num
  return metrics.clustered_deviation(counts) ** 2 / by_images if by_images else None


def _area(table: Any, k: int) -> dict[str, float]:
  """The area of class k against all others, its bound, and its interval."""
  positive, negative = table[k, k], np.delete(table, k, axis=0)[:, k].sum(0)
  area = metrics.binned_roc_auc(positive, negative)
  low, high = metrics.normal_interval(area, metrics.binned_deviation(positive, negative))
  return {"value": area.value, "low": low, "high": high, "error": area.error}


def _has_hidden(table: Sequence[Sequence[Any]]) -> bool:
  return any(isinstance(cell, Suppressed) for cells in table for cell in cells)


def calibration_error(config: Evaluate, num_images: int) -> float:
  """How far the calibration error can be from that of the images themselves: what fixed point and
  float32 leave of the sums of confidences.
  """
  rounding = config.scoring.confidence_bins * config.scoring.sums().error_bound
  return rounding / max(num_images, 1) + 2.0**-22


def facts(config: Evaluate, num_in_sum: int) -> dict[str, Any]:
  """What the report says of the protection of counts."""
  secure, n = config.scoring.sums(), config.scoring.num_sites
  learns = (
    "the coordinator and every site's program learn the sums exactly; floors hold for what is "
    "written. No site's own counts are seen by anybody else"
  )
  if n == 2:
    learns += ". Each of two sites can subtract its own counts and learns the other's"
  return {
    "sites in the sum": f"{num_in_sum} of {n}",
    "fewest sites over which it opens": config.fewest_in_sum,
    "peers of each site (pairwise masks by ChaCha20)": secure.num_peers,
    "how many of a site and its peers must answer": secure.threshold,
    "sites that may collude with the coordinator": config.aggregation.num_colluding(n),
    "ring": f"integers modulo 2^{secure.fixed.num_bits}, {secure.fixed.fraction_bits} fraction "
    "bits; counts are exact",
    "who learns what": learns,
    "noise": "none: the counts are exact, and no ledger was charged for them",
  }


def crossed_by(config: Evaluate, num_classes: int, num_in_sum: int) -> list[Crossing]:
  """What crossed the boundary of the sites."""
  scoring = config.scoring
  secure = scoring.sums()
  numbers = num_classes**2 * (2 + scoring.score_bins) + 4 + 3 * scoring.confidence_bins
  masked, n = secagg.bytes_per_number(secure) * numbers, scoring.num_sites
  needs = config.fewest_in_sum
  charge = "nothing: exact counts of test images, which are in no ledger"
  return [
    Crossing("counts of scores", "each site", "coordinator and sites", num_in_sum,
             masked * num_in_sum, f"masks: only the sum over at least {needs} sites opens", charge),
    Crossing("sum of the counts", "all of them open it", "coordinator and sites", 1, 0,
             "none: it is what is wanted; floors hold for what is written", charge),
    crossing_of_hellos(n, num_classes),
  ]  # fmt: skip


def crossing_of_hellos(n: int, num_classes: int) -> Crossing:
  """What the sites tell each other before they count."""
  what, size = "hash of the model, classes, floor of patients", n * (64 + 8 * num_classes)
  signed = "signed; nothing in it is of images"
  return Crossing(what, "each site", "coordinator and sites", n, size, signed, "nothing")


def page(found: Mapping[str, Any]) -> str:
  """The text of `report.md`, of what `metrics.json` holds."""
  names = found["label_names"]
  data = markdown.plain(found["data"])
  lines = [f"# {found['title']}: {data}", "", _summary(found), ""]
  if "synthetic phantom" in found["data"]:
    lines += [markdown.SYNTHETIC, ""]
  for what, why in markdown.warnings(found):
    lines += [f"**{what}**: {why}.", ""]
  if missing := found["missing classes"]:
    listed = ", ".join(map(markdown.plain, missing))
    lines += [f"**No site has an image of {listed}**: scores of it are undefined.", ""]
  lines += [
    *results(found),
    "",
    "Brackets hold 95 % intervals: percentile bootstrap intervals of ratios, from "
    f"{found['intervals']['num_resamples']:,} resamples of the images by the cells of their "
    "confusion matrix; of ROC-AUC DeLong's, wider by the error of the bins on either side, and for "
    "more than two classes by the mean deviation of the pairs, which is at least that of their "
    "mean. They take images as independent.",
  ]
  alike = found["variance of accuracy by patients over that by images"]
  if found["num_examples"] != found["num_patients"] and not isinstance(alike, str):
    ratio = "" if alike is None else f", which is {alike:.2f} times that of independent images"
    lines += [
      "",
      "Patients have several images. So the interval of accuracy is by the variance over patients"
      f"{ratio}. The other intervals do not know whose an image is, and are too narrow by about "
      "the square root of such a ratio. A patient of two sites counts as two.",
    ]
  exact = found["accuracy_clopper_pearson"]
  if exact and not isinstance(exact, str):
    low, high = (f"{100 * x:.1f}" for x in exact)
    lines += ["", f"The exact (Clopper-Pearson) 95 % interval of accuracy is {low} to {high} %."]
  lines += ["", *areas(found), "", *_calibration(found), *_hidden(found), *markdown.sections(found)]
  if len(found["pictures left out"]) < len(PICTURES):
    lines += ["## Pictures", ""]
    if numbered := lettering.numbered(names):
      lines += [f"In the pictures {markdown.plain(numbered)}.", ""]
  for file, caption in PICTURES.items():
    if file not in found["pictures left out"]:
      lines += [f"![{caption}: {data}]({file})", ""]
  return "\n".join([*lines, *markdown.ending(found)]) + "\n"


def results(found: Mapping[str, Any]) -> list[str]:
  """The table of scores."""
  scores = found["scores"]
  lines = ["## Results", "", row("", "all sites together"), row("---", "---:")]
  for field, (name, percent) in SCALARS.items():
    lines.append(row(f"{name} (%)" if percent else name, cell(scores[field], percent)))
  for field in PER_CLASS:
    for name in found["label_names"]:
      value = cell(scores[field][name], percent=True)
      lines.append(row(f"{field}: {markdown.plain(name)} (%)", value))
  return lines


def areas(found: Mapping[str, Any]) -> list[str]:
  """The table of ROC-AUC by class."""
  lines = ["## ROC-AUC of each class against the others", ""]
  lines += [row("", "area", "error of the bins, at most"), row("---", "---:", "---:")]
  for name, of in found["roc_auc"].items():
    bound = "" if isinstance(of, str) or of["error"] is None else f"{of['error']:.4f}"
    lines.append(row(markdown.plain(name), cell(of, percent=False), bound))
  return lines


def cell(entry: Any, percent: bool) -> str:
  """A value and its interval; a text, such as that it is suppressed, as it is."""
  if isinstance(entry, str):
    return entry
  if entry["value"] is None:
    return "undefined"
  value, low, high = (
    "undefined" if entry[end] is None else f"{100 * entry[end]:.1f}" if percent
    else f"{entry[end]:.3f}" for end in _ENDS
  )  # fmt: skip
  return f"{value} [{low}, {high}]"


def _summary(found: Mapping[str, Any]) -> str:
  num, people = found["num_examples"], found["num_patients"]
  said = f"{num:,}" if isinstance(num, int) else num
  of_people = f" of {people:,} patients" if isinstance(people, int) and people != num else ""
  accuracy = cell(found["scores"]["accuracy"], percent=True)
  unit = "" if accuracy.startswith("suppressed") else " %"
  return (
    f"The sites {', '.join(map(str, found['sites']))} have scored {said} images{of_people}, each "
    f"its own. Accuracy is {accuracy}{unit}, and MCC {cell(found['scores']['mcc'], False)}. These "
    "scores are made of sums over the sites: no image, and no site's own count, has left a site."
  )


def _calibration(found: Mapping[str, Any]) -> list[str]:
  of = found["expected_calibration_error"]
  lines = ["## Calibration", ""]
  if isinstance(of, str):
    return [*lines, f"The expected calibration error is {of}.", ""]
  lines += [
    f"The expected calibration error is {of['value']:.4f}, at most {of['error']:.1g} from that of "
    "the images themselves.",
    "",
  ]
  if found["calibration in bins"] is None:
    return lines
  bins = len(found["calibration in bins"][0])
  lines += [row("confidence", "images", "mean confidence", "accuracy"), row("---", *["---:"] * 3)]
  for c, (num, right, confidence) in enumerate(zip(*found["calibration in bins"], strict=True)):
    if num:
      span = f"{c / bins:.2f} to {(c + 1) / bins:.2f}"
      lines.append(row(span, f"{num:,.0f}", f"{confidence / num:.3f}", f"{right / num:.3f}"))
  return [*lines, ""]


def _hidden(found: Mapping[str, Any]) -> list[str]:
  """The confusion matrix as a table, where its picture is left out."""
  if "confusion_matrix.png" not in found["pictures left out"]:
    return []
  names = [markdown.plain(name) for name in found["label_names"]]
  rows = ([name, *cells] for name, cells in zip(names, found["confusion_matrix"], strict=True))
  head = ["true (rows), predicted (columns)", *names]
  why = "A suppressed number is not zero. The floor is the largest of all sites."
  return ["## Confusion matrix", "", markdown.table(head, rows), "", why, ""]


def print_summary(found: Mapping[str, Any], folder: pathlib.Path) -> None:
  """Prints the scores and where the reports are."""
  num = found["num_examples"]
  counted = f"about {num:.0f} patients" if found["privacy"] else f"{num} images"
  print(f"\n{found['title']} on {found['data']}: {counted}")
  for what, why in markdown.warnings(found):
    print(f"  {what}: {why}")
  for name in ("accuracy", "mcc", "macro_roc_auc"):
    value = found["scores"][name]
    text = value if isinstance(value, str) else cell(value, percent=False)
    print(f"  {SCALARS[name][0]:14} {text}")
  print(f"Report: {folder / 'report.md'}; of this site's own images, for its own eyes: "
        f"{folder / 'own' / 'report.md'}")  # fmt: skip
