"""The report of a run: `report.md` for people, `metrics.json` for programs, pictures for both.

All intervals are percentile bootstrap intervals over the test examples, all arms scored on the same
resamples.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import metrics, subgroups
from primia_jax.disclosure import Crossing, Policy

from . import crossings, markdown, predictions, subgroup_tables, suppression, versions
from .hospitals import Hospitals
from .markdown import PER_CLASS, SCALARS

NUM_RESAMPLES = 2000
_UNSCORED = (
  "This place has no images to test on, so that nothing is scored here. The model is in `model`."
)
_ALL = Policy(fewest_patients=0)
_SHOWN = {"accuracy": "accuracy", "mcc": "MCC"}  # scores of the summary
FILES = (
  "report.md", "metrics.json", "confusion_matrix.png", "roc.png", "curves.png", "comparison.png",
  crossings.FILE,
)  # fmt: skip


class Arm(NamedTuple):
  """One model's predictions on the test set.

  Attributes:
    labels: [N] integers in 0..L-1, the truth; the same for every arm of a report.
    probabilities: [N, L], rows that sum to 1.
  """

  labels: Any
  probabilities: Any


class Facts(NamedTuple):
  """What a report says besides scores.

  Attributes:
    config: the run's settings.
    images: what a reader must know of the images, such as which were left out.
    rounds: the run's JSON lines, as `plots.curves` takes them. Without any, no curves are drawn.
    secure_aggregation: its facts (bits, bound, error bound, peers, ...), written as they are; None
      if not used.
    privacy: the facts of differential privacy (mechanism, unit, epsilon, ...), written as they
      are; None if not used.
    policy: what may be told; None tells all.
    crossed: what left the sites, for `disclosure.md`; nothing writes none.
  """

  config: Mapping[str, Any]
  images: Mapping[str, str] | None = None
  rounds: Sequence[Mapping[str, Any]] = ()
  secure_aggregation: Mapping[str, Any] | None = None
  privacy: Mapping[str, Any] | None = None
  policy: Policy | None = None
  crossed: Sequence[Crossing] = ()

  def told(self) -> dict[str, Any]:
    """What `metrics.json` says of them, and of the versions."""
    return {
      "images": dict(self.images or {}),
      "secure_aggregation": self.secure_aggregation,
      "privacy": self.privacy,
      "crossed": [one._asdict() for one in self.crossed],
      "config": dict(self.config),
      "versions": versions.found(),
    }

  def write(self, folder: pathlib.Path, title: str, result: Mapping[str, Any]) -> None:
    """Writes `metrics.json`, and beside it what left the sites, where something did."""
    text = json.dumps(jsonable(result), indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n")
    if self.crossed:
      crossings.write(folder, title, self.policy or _ALL, self.crossed)


def write_report(
  run_dir: str | pathlib.Path,
  *,
  title: str,
  data_name: str,
  arms: Mapping[str, Arm],
  label_names: Sequence[str],
  facts: Facts,
  references: Mapping[str, Any] | None = None,
  groups: Any = None,
  patients: Any = None,
  hospitals: Hospitals | None = None,
  compared: Mapping[str, subgroups.Members] | None = None,
  main_arm: str = "federated",
  baseline: str = "pooled",
  seed: int = 0,
) -> dict[str, Any]:
  """Writes `report.md`, `metrics.json` and the pictures of a run.

  Args:
    run_dir: an existing folder. Files of an earlier report in it are replaced.
    title: what the run was, e.g. "Federated training, 3 sites".
    data_name: the test set's name, shown in every title; "synthetic phantom" for the phantom.
    arms: predictions by arm, in the order of the columns: "local: site 0", ..., "pooled",
      "federated".
    label_names: the L classes.
    facts: what else it says.
    references: name -> [L, L] confusion matrix to compare with, such as a human reader's.
    groups: [N] the patient of each test image. If given, intervals resample patients instead of
      images.
    patients: [N] the patient of each test image, or a name of its own where he is unknown, for the
      floors of the policy; None takes the groups.
    hospitals: what the phantom's differ in, with images of each; None for real ones.
    compared: column -> the subgroups of the test images by it, whose scores it compares.
    main_arm: the arm that the summary, the confusion matrix and the ROC curves show.
    baseline: the arm that the main arm is compared with, if it is among `arms`.
    seed: of the resamples.

  Returns:
    The content of `metrics.json`; null there means undefined (or, for the log loss, infinite).

  Raises:
    FileNotFoundError: `run_dir` does not exist.
    ValueError: the main arm is absent, arms have different labels, label names repeat, or a shape
      is wrong.
  """
  from . import hospitals_drawn, lettering, plots  # here, because the import takes a second

  run_dir = pathlib.Path(run_dir)
  if not run_dir.is_dir():
    raise FileNotFoundError(f"the run folder {run_dir} does not exist; create it first")
  if len(set(label_names)) != len(label_names):
    raise ValueError(f"label_names={list(label_names)} repeat; give each class its own name")
  if main_arm not in arms:
    raise ValueError(f"main_arm={main_arm!r} is not among the arms {list(arms)}")
  truth = np.asarray(arms[main_arm].labels)
  for name, arm in arms.items():
    if not np.array_equal(arm.labels, truth):
      raise ValueError(
        f"arm {name!r} has other labels than {main_arm!r}; test all arms on the same images"
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

  key, policy = jax.random.key(seed), facts.policy or _ALL
  units = groups if patients is None else patients
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
      name: _intervals_json(intervals[name], label_names)
      | _extras_json(arm, exact=groups is None)
      | {"class_gap": subgroup_tables.gap(subgroups.class_gap(*arm, label_names, key, **options))}
      for name, arm in arms.items()
    },
    "subgroups": {
      column: subgroup_tables.told(
        subgroups.table(*arms[main_arm], of, key, patients=units, policy=policy, **options)
      )
      for column, of in (compared or {}).items()
    },
    "difference": None,
    "hospitals": None if hospitals is None else hospitals.rows,
    "references": {name: _reference_json(cm, label_names) for name, cm in references.items()},
    **facts.told(),
  }  # fmt: skip
  if baseline in arms and baseline != main_arm:
    pair = arms[main_arm].probabilities, arms[baseline].probabilities
    difference = metrics.bootstrap_difference(truth, *pair, key, **options)
    result["difference"] = {"of": main_arm, "minus": baseline} | _intervals_json(
      difference, label_names
    )
  probabilities = {name: arm.probabilities for name, arm in arms.items()}
  left_out = suppression.suppress(result, policy, truth, probabilities, units)
  result = jsonable(result | {"pictures left out": left_out})
  (run_dir / crossings.FILE).unlink(missing_ok=True)  # left by an earlier report
  facts.write(run_dir, title, result)

  about = f"{title} ({main_arm} model):\n{data_name}"
  pictures: dict[str, str] = {}
  if "confusion_matrix.png" not in left_out:
    cm = np.array(result["arms"][main_arm]["confusion_matrix"])
    plots.confusion_matrix(cm, label_names, run_dir / "confusion_matrix.png", about)
    pictures["confusion_matrix.png"] = f"Confusion matrix, {main_arm}"
  if "roc.png" not in left_out:
    plots.roc(*arms[main_arm], label_names, run_dir / "roc.png", about)
    pictures["roc.png"] = f"ROC curves, {main_arm}"
  if facts.rounds:
    plots.curves(facts.rounds, run_dir / "curves.png", f"{title}: {data_name}")
    pictures["curves.png"] = "Training curves"
  if len(arms) > 1 and "comparison.png" not in left_out:
    path = run_dir / "comparison.png"
    plots.comparison(
      intervals, path, f"{title}: {data_name}", highlight=main_arm, references=references
    )
    pictures["comparison.png"] = "All arms, with 95 % intervals"
  of_hospitals = run_dir / "hospitals.png"
  if hospitals is not None:
    about = f"Test images of each hospital: {data_name}"
    hospitals_drawn.draw(hospitals, label_names, of_hospitals, about)
  else:
    of_hospitals.unlink(missing_ok=True)  # left by an earlier report
  for absent in {name for name in FILES if name.endswith(".png")} - set(pictures):
    (run_dir / absent).unlink(missing_ok=True)  # left by an earlier report
  section = subgroup_tables.section(result)
  text = markdown.markdown(result, pictures, lettering.numbered(label_names), section)
  (run_dir / "report.md").write_text(text, encoding="utf-8")
  return result


def write_unscored(
  run_dir: pathlib.Path, title: str, label_names: Sequence[str], facts: Facts
) -> dict[str, Any]:
  """Writes the report of a run at a place without test images: all but scores; see `write_report`.

  Returns:
    The content of `metrics.json`, in which no arm is.
  """
  from . import plots  # here, because the import takes a second

  result = jsonable(
    {"title": title, "data": "no images", "num_examples": 0, "label_names": list(label_names),
     "arms": {}, **facts.told()}
  )  # fmt: skip
  for absent in FILES:
    (run_dir / absent).unlink(missing_ok=True)  # left by an earlier report
  facts.write(run_dir, title, result)
  lines = [f"# {title}: no images here", "", _UNSCORED, ""]
  for what, why in markdown.warnings(result):
    lines += [f"**{what}**: {why}.", ""]
  lines += markdown.sections(result)
  if facts.rounds:
    plots.curves(facts.rounds, run_dir / "curves.png", title)
    lines += ["## Pictures", "", "![Training curves](curves.png)", ""]
  text = "\n".join([*lines, *markdown.ending(result)]) + "\n"
  (run_dir / "report.md").write_text(text, encoding="utf-8")
  return result


def print_summary(result: dict[str, Any], folder: pathlib.Path) -> None:
  """Prints the arms' scores and where the report is."""
  tested = f" on {result['data']}: {result['num_examples']} test images"
  print(f"\n{result['title']}{tested if result['arms'] else f': {_UNSCORED}'}")
  for what, why in markdown.warnings(result):
    print(f"  {what}: {why}")
  shown = {"dice": f"mean Dice ({result['case']}s)"} if "case" in result else _SHOWN
  if is_multi := "images with" in result:
    shown = {"auroc": "mean ROC-AUC", "average_precision": "mean average precision"}
  for name, of in result["arms"].items():
    scores = of["mean"] if is_multi else of
    cells = [
      "{} {value:.3f} [{low:.3f}, {high:.3f}]".format(shown[k], **scores[k])
      if isinstance(scores[k], Mapping)
      else f"{shown[k]} {scores[k]}"
      for k in shown
    ]
    print(f"  {name:16} {'   '.join(cells)}")
  if said := "" if is_multi or "case" in result else markdown.learnt(result):
    print(said)
  print(f"Report: {folder / 'report.md'}")


def predictions_csv(
  path: str | pathlib.Path,
  ids: Sequence[str],
  labels: Any,
  probabilities: Any,
  label_names: Sequence[str],
) -> None:
  """Writes one line for each image: its name, true class, predicted class, and the probability of
  each class. Names are as `predictions.csv_cell` gives them.

  Args:
    path: the file to write.
    ids: N names of images.
    labels: [N] integers; -1 leaves the true class of an image empty, and None that of all images.
    probabilities: [N, L], rows that sum to 1.
    label_names: the L classes.

  Raises:
    ValueError: lengths differ, a label is outside -1..L-1, or a row is not probabilities.
  """
  labels = np.full(len(ids), -1) if labels is None else np.asarray(labels)
  if len(labels) != len(ids) or np.shape(probabilities) != (len(ids), len(label_names)):
    raise ValueError(
      f"{len(ids)} images of {len(label_names)} classes need as many labels, not {len(labels)}, "
      f"and probabilities {(len(ids), len(label_names))}, not {np.shape(probabilities)}"
    )
  metrics.check_probabilities(np.where(labels == -1, 0, labels), probabilities)
  true = ["" if label == -1 else label_names[label] for label in labels]
  predictions.write_probabilities(path, ids, true, probabilities, label_names)


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


def jsonable(x: Any) -> Any:
  """Converts to plain Python values. Numbers that are not finite become null, as JSON has none."""
  if isinstance(x, Mapping):
    return {str(k): jsonable(v) for k, v in x.items()}
  if isinstance(x, (np.ndarray, np.generic, jax.Array)):
    return jsonable(np.asarray(x).tolist())
  if isinstance(x, (list, tuple)):
    return [jsonable(v) for v in x]
  if isinstance(x, float):
    return x if np.isfinite(x) else None
  return x if x is None or isinstance(x, (bool, int, str)) else str(x)
