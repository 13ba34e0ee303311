"""Takes out of a report what would tell a count of few patients: counts, and the scores and
pictures that are made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from primia_jax.disclosure import Policy, Suppressed

_WHY = "it would tell counts of fewer than {} patients"


def suppress(
  result: dict[str, Any], policy: Policy, labels: Any, probabilities: Mapping[str, Any], groups: Any
) -> dict[str, str]:
  """Suppresses in what `metrics.json` holds, in place.

  Scores that tell counts beside the sizes of the classes are suppressed with them: accuracy with
  the right and wrong answers, and ROC-AUC with the size of any class. Where any cell of the
  confusion matrix is suppressed, so are accuracy, MCC, and all sensitivities and specificities,
  from which it follows. Differences of two arms are suppressed with the scores of either.

  Args:
    result: arms with their scores.
    policy: its floor of patients.
    labels: [N] the truth.
    probabilities: arm -> [N, L].
    groups: [N] the patient of each image; None counts images.

  Returns:
    Pictures not to be drawn, and why.
  """
  floor = policy.fewest_patients
  if not floor:
    return {}
  labels = np.asarray(labels)
  names = result["label_names"]
  who = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
  patients = lambda chosen: len(np.unique(who[chosen]))
  everyone = np.ones(len(labels), bool)
  classes = [patients(labels == k) for k in range(len(names))]
  if isinstance(policy.count(patients(everyone)), Suppressed):
    result["num_examples"] = policy.count(0)
  for row in result["hospitals"] or ():
    row["training images"] = policy.count(row["training images"])
  for arm, scores in result["arms"].items():
    said = np.asarray(probabilities[arm]).argmax(1)
    _of_arm(scores, policy, labels, said, names, patients, classes)
  if difference := result["difference"]:
    for name in ("of", "minus"):
      _copy(result["arms"][difference[name]], difference)
  why, hidden = _WHY.format(floor), list(_hidden(result["arms"]))
  pictures = {"roc.png": f"its steps are single patients; {why}"}
  return pictures | (
    dict.fromkeys(("confusion_matrix.png", "comparison.png"), why) if hidden else {}
  )


def trained(sizes: Sequence[int], most: int | None) -> int:
  """How many different images a round's training scores are of, at most.

  Args:
    sizes: the images of each site in the round.
    most: that a site trains on in a round; None for all of them.
  """
  return sum(size if most is None else min(size, most) for size in sizes)


def of_round(
  row: Mapping[str, Any], policy: Policy, confusion: Any, trained: int, of_one: int
) -> dict[str, Any]:
  """The line of a round without the scores that would tell a count of few patients.

  Args:
    row: the line.
    policy: its floor of patients.
    confusion: [L, L] of the validation images of all sites; None without.
    trained: how many images the training scores are of; see `trained`.
    of_one: the most images of one patient: n images are of at least n / of_one patients.
  """
  if not policy.fewest_patients:
    return dict(row)
  patients = lambda n: -(-np.asarray(n, np.int64) // max(1, of_one))
  right = round((row.get("train_accuracy") or 0.0) * trained)
  counts: dict[str, tuple[int, ...]] = {
    "train_accuracy": (right, trained - right),
    "train_loss": (trained,),
  }
  if confusion is not None:
    confusion = np.asarray(confusion, np.int64)
    total, right = int(confusion.sum()), int(np.trace(confusion))
    table = policy.table(confusion, patients(confusion))
    is_whole = all(not isinstance(cell, Suppressed) for cells in table for cell in cells)
    cells = () if is_whole else (0,)  # scores would tell them, as in `suppress`
    counts["val_accuracy"] = right, total - right, *cells
    counts["val_mcc"] = total, *cells
    counts["val_loss"] = (total,)
  small = lambda of: isinstance(policy.ratio(0.0, *patients(of).tolist()), Suppressed)
  hidden = [name for name, of in counts.items() if row.get(name) is not None and small(of)]
  return {**row, **dict.fromkeys(hidden, str(policy.count(0)))}


def _of_arm(
  scores: dict[str, Any],
  policy: Policy,
  labels: np.ndarray,
  said: np.ndarray,
  names: Sequence[str],
  patients: Any,
  classes: Sequence[int],
) -> None:
  size = range(len(names))
  of_cells = np.array([[patients((labels == i) & (said == j)) for j in size] for i in size])
  table = policy.table(scores["confusion_matrix"], of_cells)
  whole = all(not isinstance(cell, Suppressed) for row in table for cell in row)
  scores["confusion_matrix"] = table
  right = labels == said
  for name in ("accuracy", "accuracy_clopper_pearson"):
    scores[name] = policy.ratio(scores[name], patients(right), patients(~right))
  scores["macro_roc_auc"] = policy.ratio(scores["macro_roc_auc"], *classes)
  for k, name in enumerate(names):
    of_class, called = labels == k, said == k
    for field, among, hit in (
      ("sensitivity", of_class, called),
      ("specificity", ~of_class, ~called),
    ):
      parts = patients(among & hit), patients(among & ~hit)
      scores[field][name] = policy.ratio(scores[field][name], *parts)
  if not whole:  # the sizes of classes and any of these ratios tell what the table hides
    for name in ("accuracy", "accuracy_clopper_pearson", "mcc"):
      scores[name] = policy.count(0)
    for field in ("sensitivity", "specificity"):
      scores[field] = dict.fromkeys(names, policy.count(0))
  if any(isinstance(one, Suppressed) for one in scores["sensitivity"].values()):
    scores["class_gap"] = policy.count(0)
  for name in ("log_loss", "brier_score", "expected_calibration_error"):
    scores[name] = policy.ratio(scores[name], patients(np.ones(len(labels), bool)))


def _copy(hidden: Mapping[str, Any], shown: dict[str, Any]) -> None:
  for name, value in shown.items():
    if isinstance(value, dict) and isinstance(hidden.get(name), dict) and "value" not in value:
      _copy(hidden[name], value)
    elif isinstance(hidden.get(name), Suppressed):
      shown[name] = hidden[name]


def _hidden(value: Any) -> Any:
  """Every suppressed number in a tree."""
  if isinstance(value, Suppressed):
    yield value
  elif isinstance(value, Mapping):
    for one in value.values():
      yield from _hidden(one)
  elif isinstance(value, (list, tuple)):
    for one in value:
      yield from _hidden(one)
