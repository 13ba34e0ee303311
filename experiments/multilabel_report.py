"""The report of a model that gives images any number of findings: of each finding, how well images
with it are ranked before others, and how far its probabilities can be trusted.

Intervals are percentile bootstrap intervals over patients where these are known, and else over
images; all arms are scored on the same resamples.
"""

from __future__ import annotations

import csv
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from primia_jax import metrics
from primia_jax.data.dataset import Dataset
from primia_jax.data.patient_ids import image_names
from primia_jax.multilabel import findings

from . import markdown, predictions
from .report import Facts

PICTURES = ("findings.png", "calibration.png", "curves.png")
NUM_RESAMPLES = 500
_WITHOUT_INTERVAL = ("calibration_error",)  # images drawn twice make it larger than it is
_BINS = 10  # of probabilities, in the picture of calibration


def scores(there: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
  """The scores of each finding [L]: ROC-AUC and average precision (NaN where all images or none
  have it), the Brier score, and the calibration error.
  """
  rows = [(there[:, k], probabilities[:, k]) for k in range(there.shape[1])]
  ranked = lambda score: np.array(
    [score(y, p) if 0 < y.sum() < len(y) else np.nan for y, p in rows]
  )
  return {
    "auroc": ranked(metrics.roc_auc),
    "average_precision": ranked(metrics.average_precision),
    "brier": np.array([np.mean((p - y) ** 2) for y, p in rows]),
    "calibration_error": np.array([metrics.binary_calibration_error(y, p) for y, p in rows]),
  }


def write(
  folder: pathlib.Path,
  title: str,
  test: Dataset,
  arms: Mapping[str, np.ndarray],
  main_arm: str,
  seed: int,
  facts: Facts,
) -> dict[str, Any]:
  """Writes report.md, metrics.json, predictions.csv and pictures.

  Args:
    folder: an existing folder; an earlier report in it is replaced.
    title: what the run was.
    test: the test images, with several labels each.
    arms: name -> probabilities [N, L].
    main_arm: the arm of the pictures and predictions.
    seed: of the resamples.
    facts: what else it says.

  Returns:
    The content of metrics.json; null there means undefined.
  """
  from . import findings_drawn, plots  # here, because the import takes a second

  names = test.label_names
  there = findings(test.labels, len(names))
  by_patient = test.has_patient is not None and bool(test.has_patient.all())
  units = np.unique(test.groups, return_inverse=True)[1] if by_patient else np.arange(len(test))
  members = np.split(np.argsort(units, kind="stable"), np.cumsum(np.bincount(units))[:-1])
  drawn = [
    np.concatenate([members[i] for i in row])
    for row in metrics.resamples(len(members), seed, NUM_RESAMPLES)
  ]
  found = {name: _with_intervals(there, p, drawn) for name, p in arms.items()}
  result: dict[str, Any] = {
    "title": title,
    "data": test.name,
    "num_examples": len(test),
    "label_names": list(names),
    "images with": dict(zip(names, there.sum(0).tolist(), strict=True)),
    "images without any": int((test.labels == 0).sum()),
    "main_arm": main_arm,
    "arms": {
      name: {
        "mean": {score: of["mean"] for score, of in by_score.items()},
        "of": {
          k: {score: of["each"][i] for score, of in by_score.items()} for i, k in enumerate(names)
        },
      }
      for name, by_score in found.items()
    },
    "resampled": "patients" if by_patient else "images",
    **facts.told(),
  }
  facts.write(folder, title, result)
  probabilities_csv(folder / "predictions.csv", image_names(test), arms[main_arm], names, there)
  for old in PICTURES:
    (folder / old).unlink(missing_ok=True)
  about = f"{title}: {test.name}"
  findings_drawn.areas(result["arms"], names, folder / "findings.png", about)
  findings_drawn.calibration(there, arms[main_arm], _BINS, folder / "calibration.png", about)
  pictures = {
    "findings.png": "ROC-AUC of each finding, with 95 % intervals",
    "calibration.png": f"How often findings are there, by the {main_arm} model's probability",
  }
  if facts.rounds:
    plots.curves(facts.rounds, folder / "curves.png", about)
    pictures["curves.png"] = "Training curves; accuracy and MCC are means over findings"
  (folder / "report.md").write_text(_text(result, pictures), encoding="utf-8")
  return result


def probabilities_csv(
  path: pathlib.Path,
  ids: Iterable[str],
  probabilities: np.ndarray,
  names: Sequence[str],
  there: np.ndarray | None = None,
) -> None:
  """Writes each image's probability of each finding, and the truth where it is known."""
  with predictions.private_file(path) as file:
    writer = csv.writer(file)
    true = [] if there is None else [f"true: {name}" for name in names]
    writer.writerow([predictions.csv_cell(cell) for cell in ("image", *names, *true)])
    for i, image in enumerate(ids):
      of_truth = [] if there is None else there[i].astype(int).tolist()
      cells = [f"{p:.6f}" for p in probabilities[i]]
      writer.writerow([predictions.csv_cell(str(image)), *cells, *of_truth])


def _with_intervals(
  there: np.ndarray, probabilities: np.ndarray, drawn: Sequence[np.ndarray]
) -> dict[str, dict[str, Any]]:
  """score -> {"each": of each finding, "mean": over findings}, as value, low and high."""
  values = scores(there, probabilities)
  samples = [scores(there[rows], probabilities[rows]) for rows in drawn]
  interval = lambda value, drawn: metrics.percentile_interval(value, drawn)._asdict()
  out: dict[str, dict[str, Any]] = {}
  for score, value in values.items():
    each = np.stack([sample[score] for sample in samples])  # [R, L]
    if score in _WITHOUT_INTERVAL:
      each = np.full_like(each, np.nan)
    known = ~np.isnan(value)
    mean = np.array([_mean(row[known]) for row in each])
    out[score] = {
      "each": [interval(v, each[:, k]) for k, v in enumerate(value)],
      "mean": interval(_mean(value[known]), mean),
    }
  return out


def _mean(values: np.ndarray) -> float:
  values = values[~np.isnan(values)]
  return float(values.mean()) if len(values) else float("nan")


def _cell(entry: Mapping[str, float]) -> str:
  if np.isnan(entry["value"]):
    return "undefined"
  if np.isnan(entry["low"]):
    return f"{entry['value']:.3f}"
  return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _text(result: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
  arms, main, data = result["arms"], result["main_arm"], markdown.plain(result["data"])
  heads = {
    "auroc": "ROC-AUC", "average_precision": "average precision", "brier": "Brier score",
    "calibration_error": "calibration error",
  }  # fmt: skip
  lines = [
    f"# {result['title']}: {data}",
    "",
    f"On {result['num_examples']:,} test images of **{data}** "
    f"({result['images without any']:,} without any finding), the {main} model's mean ROC-AUC over "
    f"{len(result['label_names'])} findings is {_cell(arms[main]['mean']['auroc'])}.",
    "",
  ]
  for what, why in markdown.warnings(result):
    lines += [f"**{what}**: {why}.", ""]
  means = [[name, *(_cell(of["mean"][s]) for s in heads)] for name, of in arms.items()]
  rows = [
    [markdown.plain(k), result["images with"][k], *(_cell(arms[main]["of"][k][s]) for s in heads)]
    for k in result["label_names"]
  ]
  lines += [
    "## Results", "", "Means over findings:", "",
    markdown.table(["arm", *heads.values()], means), "", f"The {main} model, of each finding:", "",
    markdown.table(["finding", "images with it", *heads.values()], rows), "",
    f"Brackets hold 95 % percentile bootstrap intervals over {result['resampled']} "
    f"({NUM_RESAMPLES} resamples). A score is undefined where all test images or none have the "
    "finding, and means leave it out. The calibration error is the mean gap between probability "
    "and frequency, over 15 bins of equal width; it has no interval, since resampling makes it "
    "larger. `predictions.csv` has every image.", "",
  ]  # fmt: skip
  shown = [f"![{k}: {data}]({file})\n\n*{k}.*\n" for file, k in pictures.items()]
  lines += [*markdown.sections(result), "## Pictures", "", *shown]
  return "\n".join([*lines, *markdown.ending(result)]) + "\n"
