"""The report of a search: search.md, its two pictures, and best.flags."""

from __future__ import annotations

import math
import pathlib
import shlex
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from primia_jax import durable

from . import markdown, plots, search_space, searching, settings
from .configs import Train
from .search_space import Space

_FEW = 4  # finished trials below which importance says nothing
_SHOWN = 25  # trials in the report's table
_STATES = {
  TrialState.COMPLETE: "finished",
  TrialState.PRUNED: "ended early",
  TrialState.FAIL: "diverged",
}


def write(folder: pathlib.Path, study: optuna.Study, config: Train, space: Space) -> None:
  """Writes the report of the trials so far."""
  trials = searching.ended(study)
  finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
  data = config.data.site_data or config.data.data
  text = [
    "# Search",
    f"{len(trials)} trials have ended: {_counts(trials)}. Each is a federated run on the same "
    f"images ({data}, {config.hospitals.num_sites} sites, "
    f"aggregation={config.aggregation.aggregation}), scored by its best MCC on the sites' "
    "validation images. Test images were not scored; the best of many trials on the same "
    "validation images looks better than it is, so train and test it once.",
  ]
  if finished:
    best = max(finished, key=_rank)
    flags = shlex.quote(f"--flagfile={folder}/best.flags")
    chosen = search_space.trial_settings(config, best.params)
    said = f"Trial {best.number} of a search of {len(trials)}: validation MCC {best.value:.4f}."
    durable.replace(folder / "best.flags", settings.flagfile(chosen, said).encode())
    history(trials, folder / "history.png", data)
    text += [
      "## Best",
      f"Validation MCC {best.value:.4f}, trial {best.number}:",
      markdown.table(("setting", "value"), [(n, _value(v)) for n, v in best.params.items()]),
      f"```\nprimia-train {flags} --run_dir=runs/best\n```",
      "![Validation MCC of each trial](history.png)",
    ]
    weights = importance(study, finished)
    if weights:
      bars(weights, folder / "importance.png", data)
      text += [
        "## Importance",
        f"What share of the variation among the {len(finished)} finished trials each setting "
        "explains (Optuna's functional ANOVA). Of few trials it is rough.",
        "![Importance of each setting](importance.png)",
      ]
    else:
      text += [
        "## Importance",
        f"It needs {_FEW} finished trials of different scores; there are {len(finished)}.",
      ]
  rank = lambda trial: (trial.state != TrialState.COMPLETE, -_rank(trial))
  shown = sorted(trials, key=rank)[:_SHOWN]
  rows = [
    (trial.number, _STATES[trial.state], _value(_score(trial)),
     *(_value(trial.params.get(name, "")) for name in space))
    for trial in shown
  ]  # fmt: skip
  ranges = [(name, str(range_)) for name, range_ in space.items()]
  text += [
    "## Trials",
    markdown.table(("trial", "how it ended", "MCC", *space), rows),
    *([f"The best {_SHOWN} of {len(trials)}."] if len(trials) > _SHOWN else []),
    "A trial that ended early, or diverged, has the last MCC that it reported.",
    "## Space",
    markdown.table(("setting", "values"), ranges),
  ]
  durable.replace(folder / "search.md", ("\n\n".join(text) + "\n").encode())


def print_summary(study: optuna.Study, folder: pathlib.Path) -> None:
  """Prints the best trial and where the report is."""
  trials = searching.ended(study)
  print(f"\n{len(trials)} trials: {_counts(trials)}")
  if any(trial.state == TrialState.COMPLETE for trial in trials):
    best = study.best_trial
    print(f"  best: trial {best.number}, validation MCC {best.value:.4f}")
    for name, value in best.params.items():
      print(f"    --{name}={_value(value)}")
    print(f"Train with it: primia-train --flagfile={folder / 'best.flags'} --run_dir=runs/best")
  print(f"Report: {folder / 'search.md'}")


def importance(study: optuna.Study, finished: Sequence[FrozenTrial]) -> dict[str, float]:
  """The share of each setting, the largest first; empty where trials are too few or all alike."""
  if len(finished) < _FEW or len({trial.value for trial in finished}) < 2:
    return {}
  evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Optuna, about settings that never varied
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def history(trials: Sequence[FrozenTrial], path: pathlib.Path, data: str) -> None:
  """Draws the score of each trial and the best so far."""
  figure = Figure(figsize=(7, 4), layout="constrained")
  axes = figure.add_subplot()
  styles = {
    TrialState.COMPLETE: (plots.BLUE, "o"),
    TrialState.PRUNED: (plots.AMBER, "v"),
    TrialState.FAIL: (plots.ORANGE, "x"),
  }
  for state, (colour, marker) in styles.items():
    points = [
      (trial.number, _score(trial))
      for trial in trials
      if trial.state == state and _score(trial) is not None
    ]
    if points:
      x, y = zip(*points, strict=True)
      axes.scatter(x, y, color=colour, marker=marker, label=_STATES[state], zorder=3)
  best = np.fmax.accumulate([t.value if t.value is not None else math.nan for t in trials])
  axes.step(
    [trial.number for trial in trials], best, where="post", color=plots.INK, label="best so far"
  )
  axes.set_xlabel("trial")
  axes.set_ylabel("validation MCC")
  axes.xaxis.set_major_locator(plots.MaxNLocator(integer=True))
  axes.legend(frameon=False, fontsize=9)
  plots.tidy(axes)
  plots.save(figure, path, f"Validation MCC of each trial ({data})")


def bars(weights: dict[str, float], path: pathlib.Path, data: str) -> None:
  """Draws the importance of each setting."""
  figure = Figure(figsize=(7, 0.9 + 0.4 * len(weights)), layout="constrained")
  axes = figure.add_subplot()
  names = list(reversed(weights))
  axes.barh(names, [weights[name] for name in names], color=plots.BLUE, height=0.6)
  for i, name in enumerate(names):
    axes.text(weights[name] + 0.01, i, f"{weights[name]:.0%}", va="center", fontsize=9)
  axes.set_xlim(0, max(weights.values()) * 1.15 + 0.02)
  axes.xaxis.set_major_formatter(plots.PercentFormatter(1.0, 0))
  axes.set_xlabel("share of the variation that the setting explains")
  plots.tidy(axes)
  plots.save(figure, path, f"Importance of each setting ({data})")


def _rank(trial: FrozenTrial) -> float:
  return -math.inf if (score := _score(trial)) is None else score


def _score(trial: FrozenTrial) -> float | None:
  if trial.state == TrialState.COMPLETE:
    return trial.value
  last = max(trial.intermediate_values, default=None)
  return None if last is None else trial.intermediate_values[last]


def _counts(trials: Sequence[FrozenTrial]) -> str:
  counts = {what: sum(t.state == state for t in trials) for state, what in _STATES.items()}
  return ", ".join(f"{n} {what}" for what, n in counts.items() if n) or "none"


def _value(value: Any) -> str:
  if value is None:
    return "-"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
