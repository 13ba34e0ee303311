"""The report of a case study, from the folders of its runs: `case_study.md` and pictures."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import metrics
from primia_jax.privacy import ledger

from . import markdown, running
from .study import Step

REPORT = "case_study.md"
PICTURES = ("arms.png", "epsilon.png", "reader.png")
_RESAMPLES = 2000
_GAP = "gap between classes (points)"
_PRIVATE = re.compile(r"private_(pooled_)?([\d.e+-]+)$")
_SECURE, _POOLED, _CLEAR = "federated, secure aggregation", "pooled", "federated, in the clear"


class Run(NamedTuple):
  """What one seed of an arm says of the test images.

  Attributes:
    labels, probabilities: [N] and [N, L].
    scores: of these.
    epsilon: that the run was charged, as its report says; None without privacy.
  """

  labels: np.ndarray
  probabilities: np.ndarray
  scores: metrics.Scores
  epsilon: str | None


class Found(NamedTuple):
  """A study's runs.

  Attributes:
    arms: name -> seed -> its run, in the order of tables.
    label_names, data: of the test images.
    reader: name and confusion matrix of a human reader of the same images; None without.
  """

  arms: dict[str, dict[int, Run]]
  label_names: tuple[str, ...]
  data: str
  reader: tuple[str, np.ndarray] | None


def read(folder: pathlib.Path, steps: Sequence[Step]) -> Found:
  """Reads what training runs have left in their folders."""
  arms: dict[str, dict[int, Run]] = {}
  names: tuple[str, ...] = ()
  data, reader = "", None
  for step in steps:
    if not step.module.startswith("train_"):
      continue
    seed = int(step.folder.partition("/")[0].removeprefix("seed_"))
    result = json.loads((folder / step.folder / "metrics.json").read_text())
    names, data = tuple(result["label_names"]), result["data"]
    for name, of_reader in result["references"].items():
      reader = (name, np.asarray(of_reader["confusion_matrix"]))
    epsilon = None
    if privacy := result["privacy"]:
      is_bare = markdown.NOT_PRIVATE in privacy
      epsilon = markdown.NOT_PRIVATE if is_bare else str(privacy[ledger.EPSILON])
    with np.load(folder / step.folder / running.PREDICTIONS) as saved:
      labels = saved["labels"]
      for key in saved.files:
        if key != "labels":
          scored = metrics.scores(labels, saved[key])
          run = Run(labels, saved[key], scored, epsilon)
          arms.setdefault(_row(step.folder.partition("/")[2], key), {})[seed] = run
  order = sorted(arms, key=lambda name: (not name.startswith("site"), "private" in name))
  return Found({name: arms[name] for name in order}, names, data, reader)


def write(
  folder: pathlib.Path, steps: Sequence[Step], commands: Mapping[str, str], about: str
) -> pathlib.Path:
  """Writes the report and its pictures.

  Args:
    folder: of the study, all of whose steps are finished.
    steps: of the study.
    commands: by a step's folder, as a user would type them.
    about: the study, in a line.

  Returns:
    The report's path.
  """
  from . import study_plots  # here, because the import takes a second

  found = read(folder, steps)
  title = f"Case study: {found.data}"
  scores = {name: [run.scores for run in runs.values()] for name, runs in found.arms.items()}
  for picture in PICTURES:
    (folder / picture).unlink(missing_ok=True)  # of an earlier report
  study_plots.arms(scores, folder / "arms.png", title, found.reader)
  text = [f"# {title}", "", about, "", *_arms(found), "", "![All arms](arms.png)", ""]
  if by_epsilon := _by_epsilon(found):
    study_plots.epsilons(by_epsilon, folder / "epsilon.png", f"{title}: differential privacy")
    text += ["![MCC against epsilon](epsilon.png)", ""]
  text += _compared(found) + _areas(found)
  main = _main(found)
  if found.reader is not None:
    text += _reader(found)
    run = next(iter(found.arms[main].values()))
    where = folder / "reader.png"
    study_plots.reader(
      run.labels, run.probabilities, found.label_names, found.reader, where, f"{title}\n{main}"
    )
    text += ["![ROC curves and the reader](reader.png)", ""]
  text += _others(folder, steps, found.label_names)
  text += ["## Runs", "", "Each is a command of its own, and has a report of its own.", ""]
  rows = [(f"[{s.folder}]({s.folder}/{_page(s)})", f"`{commands[s.folder]}`") for s in steps]
  text += [markdown.table(("run", "command"), rows), ""]
  path = folder / REPORT
  path.write_text("\n".join(text), encoding="utf-8")
  return path


def _row(folder: str, key: str) -> str:
  if matched := _PRIVATE.match(folder):
    return f"private, epsilon {matched[2]}, {'pooled' if matched[1] else 'federated'}"
  if key.startswith(markdown.LOCAL):
    return f"{key.removeprefix(markdown.LOCAL)} alone"
  return {"secure": _SECURE, "federated": _CLEAR}.get(folder, key)


def _page(step: Step) -> str:
  return "report.md" if step.made == "metrics.json" else step.made


def _main(found: Found) -> str:
  return _SECURE if _SECURE in found.arms else next(reversed(found.arms))


def _spread(values: Sequence[float], percent: bool) -> str:
  mean, low, high = (100 * v if percent else v for v in metrics.over_seeds(values))
  digits = 1 if percent else 3
  around = "" if len(values) == 1 else f" [{low:.{digits}f}, {high:.{digits}f}]"
  return f"{mean:.{digits}f}{around}"


def _arms(found: Found) -> list[str]:
  rows: list[tuple[Any, ...]] = []
  for name, runs in found.arms.items():
    of = lambda field, runs=runs: [float(getattr(r.scores, field)) for r in runs.values()]
    spent = {run.epsilon for run in runs.values()} - {None}
    cells = _spread(of("accuracy"), True), _spread(of("mcc"), False)
    epsilon = ", ".join(sorted(map(str, spent))) or "none"
    gaps = _spread([_class_gap(r.scores.sensitivity) for r in runs.values()], True)
    rows.append((name, len(runs), *cells, _spread(of("macro_roc_auc"), False), epsilon, gaps))
  if found.reader is not None:
    name, cm = found.reader
    scored = f"{100 * float(metrics.accuracy(cm)):.1f}", f"{float(metrics.mcc(cm)):.3f}"
    gap = f"{100 * _class_gap(np.asarray(metrics.sensitivity(cm))):.1f}"
    rows.append((name, "one reader", *scored, "", "", gap))
  head = "arm", "seeds", "accuracy (%)", "MCC", "macro ROC-AUC", "epsilon", _GAP
  num = len(next(iter(next(iter(found.arms.values())).values())).labels)
  return [
    "## Every arm",
    "",
    f"On {num:,} test images, which each run scores once. Figures are means over seeds with "
    "Student's 95 % intervals of the mean; one seed has none (its own report has an interval over "
    "images). The gap between classes is the largest sensitivity of a class minus the smallest.",
    "",
    markdown.table(head, rows),
  ]


def _class_gap(sensitivities: np.ndarray) -> float:
  return float(np.nanmax(sensitivities) - np.nanmin(sensitivities))


def _pairs(found: Found) -> list[tuple[str, str]]:
  pairs = [(_SECURE, _POOLED), (_SECURE, _CLEAR)]
  private = [name for name in found.arms if name.startswith("private")]
  pairs += [(name, _SECURE) for name in private if name.endswith("federated")]
  pairs += [
    (name, name.replace("federated", "pooled")) for name in private if name.endswith("federated")
  ]
  known = found.arms.keys()
  return [(a, b) for a, b in pairs if a in known and b in known]


def _compared(found: Found) -> list[str]:
  rows = []
  for first, second in _pairs(found):
    seeds = [s for s in found.arms[first] if s in found.arms[second]]
    one, other = ([found.arms[name][s] for s in seeds] for name in (first, second))
    cells = _differences(one, other)
    tests = [
      metrics.mcnemar(a.labels, a.probabilities.argmax(1), b.probabilities.argmax(1))
      for a, b in zip(one, other, strict=True)
    ]
    said = "; ".join(f"{t.only_first} : {t.only_second}, p = {t.p:.2g}" for t in tests)
    rows.append((f"{first} minus {second}", *cells, said))
  if not rows:
    return []
  head = "pair", "accuracy (points)", "MCC", "McNemar's exact test, by seed"
  return [
    "## Arms compared",
    "",
    "Mean differences over seeds on the same images, with 95 % intervals of a paired bootstrap of "
    "images that scores all seeds on each resample; where seeds have test images of their own, "
    "Student's over seeds. McNemar's test gives how many images one arm alone gets right. No p is "
    "corrected for how many there are.",
    "",
    markdown.table(head, rows),
    "",
  ]


def _differences(one: Sequence[Run], other: Sequence[Run]) -> tuple[str, str]:
  """Of accuracy in points, and of MCC."""
  labels = one[0].labels
  if all(np.array_equal(run.labels, labels) for run in (*one, *other)):
    first, second = ([run.probabilities for run in runs] for runs in (one, other))
    found = metrics.bootstrap_mean_difference(
      labels, first, second, jax.random.key(0), num_resamples=_RESAMPLES
    )
    ends = lambda field: tuple(float(getattr(x, field)) for x in found[:3])
  else:

    def ends(field: str) -> tuple[float, ...]:
      gaps = [
        float(getattr(a.scores, field)) - float(getattr(b.scores, field))
        for a, b in zip(one, other, strict=True)
      ]
      return metrics.over_seeds(gaps)

  points = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in ends("accuracy")))
  return points, "{:+.3f} [{:+.3f}, {:+.3f}]".format(*ends("mcc"))


def _areas(found: Found) -> list[str]:
  rows = []
  for first, second in _pairs(found):
    seed = next((s for s in found.arms[first] if s in found.arms[second]), None)
    if seed is None:
      continue
    a, b = found.arms[first][seed], found.arms[second][seed]
    for k, name in enumerate(found.label_names):
      truth = a.labels == k
      if min(truth.sum(), (~truth).sum()) < 2:
        continue
      test = metrics.delong(truth, a.probabilities[:, k], b.probabilities[:, k])
      gap = f"{test.difference:+.3f} [{test.low:+.3f}, {test.high:+.3f}]"
      rows.append(
        (f"{first} minus {second}", markdown.plain(name), f"{test.first:.3f}",
         f"{test.second:.3f}", gap, f"{test.p:.2g}")
      )  # fmt: skip
  if not rows:
    return []
  return [
    "## One class against the rest",
    "",
    "Areas under the ROC curves in the first seed, compared by DeLong's test.",
    "",
    markdown.table(("pair", "class", "first", "second", "difference", "p"), rows),
    "",
  ]


def _reader(found: Found) -> list[str]:
  assert found.reader is not None
  name, cm = found.reader
  rows = []
  for arm, runs in found.arms.items():
    tests = []
    for run in runs.values():
      said = run.probabilities.argmax(1)
      own = np.asarray(metrics.confusion_matrix(run.labels, said, len(found.label_names)))
      tests.append(metrics.worst_mcnemar(own, cm))
    worst = max(tests, key=lambda test: test.p)
    better = "better" if worst.only_first > worst.only_second else "worse"
    rows.append((arm, f"{better} on {abs(worst.only_first - worst.only_second)}", f"{worst.p:.2g}"))
  return [
    f"## Beside one human reader: {name}",
    "",
    "Only the reader's confusion matrix is known, and not which image he called what. So McNemar's "
    "exact test is computed for every pairing that the two matrices allow, and the largest p is "
    "given, of the worst seed.",
    "",
    markdown.table(("arm", "images", "largest p"), rows),
    "",
  ]


def _by_epsilon(found: Found) -> dict[str, dict[float, list[float]]]:
  """Kind of arm -> epsilon -> MCC of each seed; empty for fewer than two budgets."""
  out: dict[str, dict[float, list[float]]] = {}
  for name, runs in found.arms.items():
    if name.startswith("private, epsilon "):
      epsilon, _, kind = name.removeprefix("private, epsilon ").partition(", ")
      out.setdefault(kind, {})[float(epsilon)] = [float(r.scores.mcc) for r in runs.values()]
  return out if any(len(by_epsilon) > 1 for by_epsilon in out.values()) else {}


def _others(folder: pathlib.Path, steps: Sequence[Step], label_names: Sequence[str]) -> list[str]:
  """What the encrypted answers were, and what the attacks found."""
  text: list[str] = []
  for step in steps:
    own = folder / step.folder
    if step.module == "infer_encrypted":
      costs, checked = (json.loads((own / n).read_text()) for n in ("costs.json", "check.json"))
      text += ["## Under encryption", "", *_encrypted(costs, checked, label_names), ""]
    elif step.made == "privacy_report.md":
      report = (own / step.made).read_text()
      text += ["## Attacked", "", *_verdict(report, f"{step.folder}/{step.made}"), ""]
  return text


def _encrypted(
  costs: Mapping[str, Any], checked: Mapping[str, Any], label_names: Sequence[str]
) -> list[str]:
  phases = {phase["phase"]: phase for phase in costs["phases"]}
  online, dealt = phases["online"], phases["deal"]["bytes"]
  sent, rounds = online["bytes"], online["rounds"]
  each = [phases[name]["seconds"] for name in ("deal", "prepare", "online")]
  scores, close = checked["encrypted_scores"], checked["close"]
  error = checked["largest_logit_difference"]
  exact = "are" if checked["same_bits_as_the_integer_model"] else "ARE NOT"
  text = [
    f"The secure arm's model of the first seed answers {costs['images']:,} test images under "
    f"encryption, {costs['images_in_a_run']} in a run of the protocol: accuracy "
    f"{100 * scores['accuracy']:.1f} %, MCC {scores['mcc']:.3f}. "
    f"{checked['same_class_as_float32']:,} of {checked['total']:,} have the class of float32, and "
    f"{_close_text(close, error)}. No logit differs from float32's by more than {error:.2g}, and "
    f"all bits {exact} those of the integer model. A run deals {dealt / 1e6:.1f} MB, sends "
    f"{sent / 1e6:.1f} MB each way and takes {rounds} rounds. It took {sum(each):.2f} s on this "
    f"machine: {each[0]:.2f} s to deal, {each[1]:.2f} s to prepare, {each[2]:.2f} s online.",
    "",
    markdown.table(
      ("true", *map(markdown.plain, label_names)),
      [
        (markdown.plain(n), *row)
        for n, row in zip(label_names, scores["confusion_matrix"], strict=True)
      ],
    ),
  ]
  if not close:
    return text
  rows = [
    (markdown.plain(one["image"]), f"{one['float32_logits_apart']:.2g}",
     markdown.plain(one["encrypted"]), markdown.plain(one["float32"]))
    for one in close
  ]  # fmt: skip
  head = "image", "two best logits apart", "encrypted", "float32"
  return [*text, "", markdown.table(head, rows)]


def _close_text(close: Sequence[Any], error: float) -> str:
  if not close:
    return f"no image's two best logits are within {2 * error:.2g}, where a class might change"
  what = "image's two best logits are" if len(close) == 1 else "images' two best logits are"
  return f"{len(close)} {what} within {2 * error:.2g}, where a class may change (below)"


def _verdict(report: str, path: str) -> list[str]:
  """The first paragraphs of an audit, up to its first section."""
  body = report.partition("\n## ")[0].partition("\n")[2].strip()
  return [body, "", f"The whole is in [{path}]({path})."]
