"""The report of a run: `report.md` for people, `metrics.json` for programs, pictures for both.

All intervals are percentile bootstrap intervals over the test examples, all arms scored on the same
resamples.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import pathlib
import platform
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import plots
from primia_jax import metrics

NUM_RESAMPLES = 2000
# Field of `metrics.Scores` -> its name in the table, and whether it is given in percent.
SCALARS = {
  "accuracy": ("accuracy", True),
  "mcc": ("MCC", False),
  "macro_roc_auc": ("macro ROC-AUC", False),
}
PER_CLASS = ("sensitivity", "specificity")


class Arm(NamedTuple):
  """One model's predictions on the test set.

  Attributes:
    labels: [N] integers in 0..L-1, the truth; the same for every arm of a report.
    probabilities: [N, L], rows that sum to 1.
  """

  labels: Any
  probabilities: Any


def write_report(
  run_dir: str | pathlib.Path,
  *,
  title: str,
  data_name: str,
  arms: Mapping[str, Arm],
  label_names: Sequence[str],
  config: Mapping[str, Any],
  versions: Mapping[str, Any],
  rounds: Sequence[Mapping[str, Any]] = (),
  secure_aggregation: Mapping[str, Any] | None = None,
  privacy: Mapping[str, Any] | None = None,
  references: Mapping[str, Any] | None = None,
  groups: Any = None,
  main_arm: str = "federated",
  baseline: str = "pooled",
  seed: int = 0,
) -> dict[str, Any]:
  """Writes `report.md`, `metrics.json` and the pictures of a run.

  Args:
    run_dir: an existing folder; files of an earlier report in it are replaced.
    title: what the run was, e.g. "Federated training, 3 sites".
    data_name: the test set's name; "synthetic phantom" when it is one. It stands in every title.
    arms: predictions by arm, in the order of the columns: "local: site 0", ..., "pooled",
      "federated".
    label_names: the L classes.
    config: the run's settings.
    versions: what `versions()` gives.
    rounds: the run's JSON lines, as `plots.curves` takes them; without any there is no
      `curves.png`.
    secure_aggregation: its facts (bits, bound, error bound, peers, ...), written as they are; None
      when not used.
    privacy: the facts of differential privacy (mechanism, unit, epsilon, ...), likewise.
    references: by name, [L, L] confusion matrices to compare with, such as a human reader's.
    groups: [N] the patient of each test image; given, intervals resample patients instead of
      images.
    main_arm: the arm whose confusion matrix and ROC curves are drawn, and that the summary is
      about.
    baseline: the arm it is compared with, if among `arms`.
    seed: of the resamples.

  Returns:
    What `metrics.json` holds; null there means undefined (or, for the log loss, infinite).

  Raises:
    FileNotFoundError: `run_dir` does not exist.
    ValueError: an absent main arm, arms with different labels, repeated label names, or a wrong
      shape.
  """
  run_dir = pathlib.Path(run_dir)
  if not run_dir.is_dir():
    raise FileNotFoundError(f"the run folder {run_dir} does not exist; create it first")
  if len(set(label_names)) != len(label_names):
    raise ValueError(f"label names {list(label_names)} repeat: no table could tell them apart")
  if main_arm not in arms:
    raise ValueError(f"the main arm {main_arm!r} is not among the arms {list(arms)}")
  truth = np.asarray(arms[main_arm].labels)
  for name, arm in arms.items():
    if not np.array_equal(arm.labels, truth):
      raise ValueError(
        f"arm {name!r} was tested on other labels than {main_arm!r}: all arms share one test set"
      )
    if np.asarray(arm.probabilities).shape != (len(truth), len(label_names)):
      raise ValueError(
        f"arm {name!r} has probabilities {np.asarray(arm.probabilities).shape}; "
        f"{len(truth)} labels of {len(label_names)} classes need {(len(truth), len(label_names))}"
      )
  references = {name: np.asarray(cm) for name, cm in (references or {}).items()}
  for name, cm in references.items():
    if cm.shape != (len(label_names),) * 2:
      raise ValueError(
        f"reference {name!r} is {cm.shape}, not a confusion matrix of {len(label_names)} classes"
      )

  key = jax.random.key(seed)
  options: dict[str, Any] = {"groups": groups, "num_resamples": NUM_RESAMPLES}
  intervals = {
    name: metrics.bootstrap_intervals(*arm, key, **options) for name, arm in arms.items()
  }
  result: dict[str, Any] = {
    "title": title,
    "data": data_name,
    "num_examples": len(truth),
    "label_names": list(label_names),
    "main_arm": main_arm,
    "intervals": {
      "method": "percentile bootstrap", "unit": "example" if groups is None else "group",
      "level": 0.95,
      "num_resamples": NUM_RESAMPLES, "seed": seed,
    },
    "arms": {
      name: _intervals_json(intervals[name], label_names) | _extras_json(arm, exact=groups is None)
      for name, arm in arms.items()
    },
    "difference": None,
    "references": {name: _reference_json(cm, label_names) for name, cm in references.items()},
    "secure_aggregation": None if secure_aggregation is None else dict(secure_aggregation),
    "privacy": None if privacy is None else dict(privacy),
    "config": dict(config),
    "versions": dict(versions),
  }  # fmt: skip
  if baseline in arms and baseline != main_arm:
    pair = arms[main_arm].probabilities, arms[baseline].probabilities
    difference = metrics.bootstrap_difference(truth, *pair, key, **options)
    result["difference"] = {"of": main_arm, "minus": baseline} | _intervals_json(
      difference, label_names
    )
  result = _jsonable(result)
  (run_dir / "metrics.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")

  cm = np.array(result["arms"][main_arm]["confusion_matrix"])
  about = f"{title} ({main_arm} model):\n{data_name}"
  plots.confusion_matrix(cm, label_names, run_dir / "confusion_matrix.png", about)
  plots.roc(*arms[main_arm], label_names, run_dir / "roc.png", about)
  pictures = {
    "confusion_matrix.png": f"Confusion matrix, {main_arm}",
    "roc.png": f"ROC curves, {main_arm}",
  }
  if rounds:
    plots.curves(rounds, run_dir / "curves.png", f"{title}: {data_name}")
    pictures["curves.png"] = "Training curves"
  if len(arms) > 1:
    path = run_dir / "comparison.png"
    plots.comparison(
      intervals, path, f"{title}: {data_name}", highlight=main_arm, references=references
    )
    pictures["comparison.png"] = "All arms, with 95 % intervals"
  for absent in {"curves.png", "comparison.png"} - set(pictures):
    (run_dir / absent).unlink(missing_ok=True)  # of an earlier report
  (run_dir / "report.md").write_text(_markdown(result, pictures))
  return result


def predictions_csv(
  path: str | pathlib.Path,
  ids: Sequence[str],
  labels: Any,
  probabilities: Any,
  label_names: Sequence[str],
) -> None:
  """Writes one line for each image: image, true class, predicted class, the probability of each
  class.

  Args:
    path: the file to write.
    ids: N names of images.
    labels: [N] integers; None, or -1 for a single image, where the truth is unknown: its cell is
      left empty.
    probabilities: [N, L], rows that sum to 1.
    label_names: the L classes.

  Raises:
    ValueError: lengths that differ, a label outside -1..L-1, probabilities that are none.
  """
  labels = np.full(len(ids), -1) if labels is None else np.asarray(labels)
  if len(labels) != len(ids) or np.shape(probabilities) != (len(ids), len(label_names)):
    raise ValueError(
      f"{len(ids)} images of {len(label_names)} classes do not fit {len(labels)} labels and "
      f"probabilities "
      f"{np.shape(probabilities)}"
    )
  metrics.check_probabilities(np.where(labels == -1, 0, labels), probabilities)
  with open(path, "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(
      ["image", "true", "predicted", *(f"probability {name}" for name in label_names)]
    )
    for image, label, p in zip(ids, labels, np.asarray(probabilities), strict=True):
      true = "" if label == -1 else label_names[label]
      # Nine digits give a float32 back exactly, and so the same ROC-AUC.
      writer.writerow([image, true, label_names[p.argmax()], *(f"{x:.9g}" for x in p)])


def versions() -> dict[str, str]:
  """What a result depends on beside its configuration: versions, git commit, device."""
  result = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "flax", "optax", "numpy", "primia-jax"):
    try:
      result[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      result[package] = "unknown"
  devices = jax.devices()
  commit = _git_commit(pathlib.Path(__file__).resolve().parents[1])
  return result | {
    "git commit": commit, "backend": jax.default_backend(), "device": f"{len(devices)} x "
                                                                      f"{devices[0].device_kind}",
  }  # fmt: skip


def _git_commit(root: pathlib.Path) -> str:
  if not (
    root / ".git"
  ).exists():  # else an installed copy would name the repository that surrounds it
    return "unknown"
  command = [
    "git",
    "-C",
    str(root),
    "describe",
    "--always",
    "--dirty",
    "--abbrev=40",
    "--exclude=*",
  ]
  try:
    return subprocess.run(
      command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return "unknown"


def _intervals_json(x: metrics.Intervals, label_names: Sequence[str]) -> dict[str, Any]:
  def entry(field: str, *index: int) -> dict[str, Any]:
    value, low, high, undefined = (np.asarray(getattr(scores, field))[index] for scores in x)
    return {"value": value, "low": low, "high": high, "undefined_resamples": undefined}

  scalars = {field: entry(field) for field in SCALARS}
  return scalars | {
    field: {name: entry(field, k) for k, name in enumerate(label_names)} for field in PER_CLASS
  }


def _extras_json(arm: Arm, exact: bool) -> dict[str, Any]:
  labels, probabilities = metrics.check_probabilities(*arm)
  predictions, num_classes = probabilities.argmax(1), probabilities.shape[1]
  right = int((predictions == labels).sum())
  return {
    # Assumes independent examples, so not for examples in groups.
    "accuracy_clopper_pearson": metrics.clopper_pearson(right, len(labels)) if exact else None,
    "log_loss": metrics.log_loss(labels, probabilities),
    "brier_score": metrics.brier_score(labels, probabilities),
    "expected_calibration_error": metrics.expected_calibration_error(labels, probabilities),
    "confusion_matrix": metrics.confusion_matrix(labels, predictions, num_classes),
  }


def _reference_json(cm: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
  per_class = {
    field: dict(zip(label_names, getattr(metrics, field)(cm), strict=True)) for field in PER_CLASS
  }
  return {
    "accuracy": metrics.accuracy(cm),
    "mcc": metrics.mcc(cm),
    **per_class,
    "confusion_matrix": cm,
  }


def _jsonable(x: Any) -> Any:
  """Plain Python values; a number that is not finite, which JSON has no word for, becomes null."""
  if isinstance(x, Mapping):
    return {str(k): _jsonable(v) for k, v in x.items()}
  if isinstance(x, (np.ndarray, np.generic, jax.Array)):
    return _jsonable(np.asarray(x).tolist())
  if isinstance(x, (list, tuple)):
    return [_jsonable(v) for v in x]
  if isinstance(x, float):
    return x if np.isfinite(x) else None
  return x if x is None or isinstance(x, (bool, int, str)) else str(x)


def _number(x: float | None, percent: bool, signed: bool = False) -> str:
  if x is None:
    return "undefined"
  return f"{100 * x if percent else x:{'+' if signed else ''}.{1 if percent else 3}f}"


def _cell(entry: Mapping[str, Any] | float | None, percent: bool, signed: bool = False) -> str:
  """A value with its interval, as the tables show it."""
  if not isinstance(entry, Mapping):
    return _number(entry, percent, signed)
  value, low, high = (_number(entry[k], percent, signed) for k in ("value", "low", "high"))
  return value if entry["value"] is None else f"{value} [{low}, {high}]"


def _row(*cells: Any) -> str:
  return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def _facts(facts: Mapping[str, Any], head: tuple[str, str]) -> list[str]:
  text = lambda v: v if isinstance(v, str) else json.dumps(v)
  return [_row(*head), _row("---", "---"), *(_row(k, text(v)) for k, v in facts.items())]


def _summary(result: Mapping[str, Any]) -> str:
  main, difference = result["arms"][result["main_arm"]], result["difference"]
  low, value, high = (_number(main["accuracy"][k], True) for k in ("low", "value", "high"))
  text = (
    f"On the {result['num_examples']:,} test images of **{result['data']}**, the "
    f"{result['main_arm']} model is right "
    f"on {value} % of them (95 % interval {low} to {high}), with a Matthews correlation (MCC) of "
    f"{_number(main['mcc']['value'], False)}"
  )
  if difference:
    low, value, high = (
      _number(difference["accuracy"][k], True, signed=True) for k in ("low", "value", "high")
    )
    text += (
      f"; its accuracy minus that of the {difference['minus']} model is {value} percentage points "
      f"(95 % interval {low} to {high})"
    )
  return text + "."


def _markdown(result: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
  arms, references, difference = result["arms"], result["references"], result["difference"]
  rows: list[tuple[str, tuple[str, ...], bool]] = [
    (name, (field,), percent) for field, (name, percent) in SCALARS.items()
  ]
  rows += [
    (f"{field}: {label}", (field, label), True)
    for field in PER_CLASS
    for label in result["label_names"]
  ]

  def pick(scores: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    for step in path:
      scores = scores.get(step, "")  # a reference has no ROC-AUC
    return scores

  def cell(
    scores: Mapping[str, Any], path: tuple[str, ...], percent: bool, signed: bool = False
  ) -> str:
    entry = pick(scores, path)
    return "–" if entry == "" else _cell(entry, percent, signed)

  head = ["", *arms, *references]
  lines = [f"# {result['title']}: {result['data']}", "", _summary(result), ""]
  if "synthetic phantom" in result["data"]:
    lines += [
      "The synthetic phantom is computed, not recorded: these figures say nothing about patients.",
      "",
    ]
  lines += ["## Results", ""]
  lines += [_row(*head), _row("---", *["---:"] * (len(head) - 1))]
  for name, path, percent in rows:
    cells = [cell(scores, path, percent) for scores in (*arms.values(), *references.values())]
    lines.append(_row(f"{name} (%)" if percent else name, *cells))
  unit = "images" if result["intervals"]["unit"] == "example" else "patients (groups of images)"
  lines += [
    "",
    f"In brackets: 95 % percentile bootstrap intervals, {result['intervals']['num_resamples']:,} "
    f"resamples of the test "
    f"{unit}, the same for all arms. ROC-AUC is one-vs-one, averaged over pairs of classes. MCC is "
    f"the multi-class "
    "Matthews correlation: 1 is perfect, 0 is chance.",
  ]
  if difference and difference["of"] == "federated" and difference["minus"] == "pooled":
    lines += [
      "",
      "*local*: trained on one site's images alone. *pooled*: on all sites' images brought "
      "together in one place. "
      "*federated*: on all sites' images, each staying at its site.",
    ]
  exact = arms[result["main_arm"]]["accuracy_clopper_pearson"]
  if exact:
    low, high = (_number(x, True) for x in exact)
    lines += [
      "",
      f"The exact (Clopper-Pearson) 95 % interval of the {result['main_arm']} accuracy is {low} to "
      f"{high} %.",
    ]
  undefined = sorted(
    {
      name
      for scores in arms.values()
      for name, path, _ in rows
      if pick(scores, path)["undefined_resamples"]
    }
  )
  if undefined:
    lines += [
      "",
      f"Some resamples lack a class and are left out of the intervals of: {', '.join(undefined)}.",
    ]
  if difference:
    lines += ["", f"## {difference['of'].capitalize()} minus {difference['minus']}", ""]
    lines += [_row("", "difference"), _row("---", "---:")]
    for name, path, percent in rows:
      lines.append(
        _row(f"{name} (points)" if percent else name, cell(difference, path, percent, signed=True))
      )
    lines += [
      "",
      "Paired intervals: each resample scores both models. An interval that holds 0 leaves open "
      "which is better.",
    ]
  lines += ["", "## Calibration", "", _row("", *arms), _row("---", *["---:"] * len(arms))]
  calibration = {
    "expected_calibration_error": "expected calibration error (15 bins)",
    "brier_score": "Brier score (0 to 2)",
    "log_loss": "log loss (nats)",
  }
  for field, name in calibration.items():
    values = ("infinite" if s[field] is None else _number(s[field], False) for s in arms.values())
    lines.append(_row(name, *values))
  lines += ["", "Lower is better in all three."]
  lines += ["", "## Secure aggregation", ""]
  if result["secure_aggregation"] is None:
    lines.append("Not used in this run.")
  else:
    lines += _facts(result["secure_aggregation"], ("fact", "value"))
  lines += ["", "## Differential privacy", ""]
  if result["privacy"] is None:
    lines.append(
      "Not used in this run: the trained model itself may give away something about its images."
    )
  else:
    lines += _facts(result["privacy"], ("fact", "value"))
  lines += ["", "## Pictures", ""]
  for file, caption in pictures.items():
    lines += [f"![{caption}: {result['data']}]({file})", ""]
  lines += ["## Configuration", "", *_facts(result["config"], ("setting", "value"))]
  lines += ["", "## Versions", "", *_facts(result["versions"], ("what", "version"))]
  return "\n".join(lines) + "\n"
