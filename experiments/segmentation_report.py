"""The report of a segmentation: Dice of each case with intervals, for people and for programs.

A case is a patient where patients are known, with all of his slices, and else an image. Intervals
are percentile bootstrap intervals over cases, all arms on the same resamples.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from primia_jax import segmentation
from primia_jax.data.dataset import Dataset
from primia_jax.data.patient_ids import image_names

from . import crossings, markdown, predictions
from .report import Facts

PICTURES = ("dice.png", "curves.png", "overlays.png")
FILES = ("report.md", "metrics.json", "dice.csv", *PICTURES, crossings.FILE)


def write(
  folder: pathlib.Path,
  title: str,
  test: Dataset,
  arms: Mapping[str, np.ndarray],
  main_arm: str,
  seed: int,
  facts: Facts,
  overlays: int = 0,
) -> dict[str, Any]:
  """Writes report.md, metrics.json, dice.csv and pictures.

  Args:
    folder: an existing folder; an earlier report in it is replaced.
    title: what the run was.
    test: the test images, with masks.
    arms: name -> masks [N, H, W] that the arm found.
    main_arm: the arm that is compared with the pooled one.
    seed: of the resamples.
    facts: what else it says.
    overlays: how many test images to draw with the true outline and the main arm's; these are
      images of patients, so the default is none.

  Returns:
    The content of metrics.json.
  """
  from . import masks_drawn, plots  # here, because the import takes a second

  assert test.masks is not None
  names, by_patient = test.label_names[1:], test.has_patient is not None and test.has_patient.all()
  cases = np.asarray(test.groups) if by_patient else None
  case_names = np.unique(test.groups) if by_patient else image_names(test)
  dice = {
    name: segmentation.case_dice(test.masks, found, len(test.label_names), cases)
    for name, found in arms.items()
  }
  interval = lambda values: segmentation.bootstrap_mean(values, seed)._asdict()
  result: dict[str, Any] = {
    "title": title,
    "data": test.name,
    "num_examples": len(test),
    "num_cases": len(case_names),
    "case": "patient" if by_patient else "image",
    "label_names": list(test.label_names),
    "main_arm": main_arm,
    "arms": {
      name: {
        "dice": interval(values.mean(1)),
        "dice of": {k: interval(values[:, i]) for i, k in enumerate(names)},
        "median dice": float(np.median(values.mean(1))),
      }
      for name, values in dice.items()
    },
    "difference": None,
    **facts.told(),
  }
  if main_arm != "pooled" and "pooled" in dice:
    paired = dice[main_arm].mean(1) - dice["pooled"].mean(1)
    result["difference"] = {"of": main_arm, "minus": "pooled", "dice": interval(paired)}
  facts.write(folder, title, result)
  with predictions.private_file(folder / "dice.csv") as file:
    file.write(",".join(["case", *(f"{arm}: {k}" for arm in dice for k in names)]) + "\n")
    for i, case in enumerate(case_names):
      cells = (f"{v:.6f}" for values in dice.values() for v in values[i])
      file.write(",".join([predictions.csv_cell(str(case)), *cells]) + "\n")

  for old in PICTURES:
    (folder / old).unlink(missing_ok=True)
  about = f"{title}:\n{test.name}"
  masks_drawn.cases(
    {name: values.mean(1) for name, values in dice.items()}, folder / "dice.png", about
  )
  pictures = {"dice.png": f"Dice of each {result['case']}, with means and 95 % intervals"}
  if facts.rounds:
    plots.curves(facts.rounds, folder / "curves.png", f"{title}: {test.name}")
    pictures["curves.png"] = "Training curves; accuracy and MCC are of pixels"
  if overlays:
    masks_drawn.overlays(test, arms[main_arm], folder / "overlays.png", about, overlays)
    pictures["overlays.png"] = (
      f"IMAGES OF PATIENTS, with the true outline and that of the {main_arm} model"
    )
  (folder / "report.md").write_text(_text(result, pictures), encoding="utf-8")
  return result


def _cell(entry: Mapping[str, float], signed: bool = False) -> str:
  value, low, high = (f"{entry[k]:{'+' if signed else ''}.3f}" for k in ("value", "low", "high"))
  return f"{value} [{low}, {high}]"


def _text(result: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
  arms, main, data = result["arms"], result["main_arm"], markdown.plain(result["data"])
  said = (
    f"On {result['num_cases']:,} test {result['case']}s of **{data}**, the {main} model's mean "
  )
  said += f"Dice coefficient is {_cell(arms[main]['dice'])}."
  if result["difference"]:
    said += f" Minus the pooled model's, it is {_cell(result['difference']['dice'], signed=True)}."
  lines = [f"# {result['title']}: {data}", "", said, ""]
  for what, why in markdown.warnings(result):
    lines += [f"**{what}**: {why}.", ""]
  classes = list(result["label_names"][1:])
  several = classes if len(classes) > 1 else []
  rows = [
    [
      name,
      _cell(of["dice"]),
      f"{of['median dice']:.3f}",
      *(_cell(of["dice of"][k]) for k in several),
    ]
    for name, of in arms.items()
  ]
  head = ["arm", "mean Dice", "median", *map(markdown.plain, several)]
  lines += ["## Results", "", markdown.table(head, rows), ""]
  lines += [
    f"A case is {'a patient with all slices' if result['case'] == 'patient' else 'an image'}. "
    "Brackets hold 95 % percentile bootstrap intervals over cases; the difference is paired. Dice "
    "is 2 |A and B| / (|A| + |B|), and 1 where neither the truth nor the model has the class. "
    "`dice.csv` has every case.",
    "",
  ]
  shown = [f"![{k}: {data}]({file})\n\n*{k}.*\n" for file, k in pictures.items()]
  lines += [*markdown.sections(result), "## Pictures", "", *shown]
  return "\n".join([*lines, *markdown.ending(result)]) + "\n"
