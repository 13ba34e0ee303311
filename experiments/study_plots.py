"""Pictures of a case study: its arms over seeds, its private arms by epsilon, and a reader's
operating points in the ROC of a model. Each function writes one file, as those of `plots` do.
"""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from primia_jax import metrics

from . import lettering
from .plots import BLUE, DASHES, GREEN, INK, ORANGE, PALETTE, save, tidy

if TYPE_CHECKING:
  from primia_jax.mpc import pricing

  from .run_plots import Score, Timed

_FIELDS = {"accuracy": "accuracy", "mcc": "MCC", "macro_roc_auc": "macro ROC-AUC (one-vs-one)"}


def arms(
  scores: Mapping[str, Sequence[metrics.Scores]],
  path: str | pathlib.Path,
  title: str,
  reader: tuple[str, np.ndarray] | None = None,
) -> None:
  """Draws each arm's scores, a point for each seed, with their mean and its interval over seeds.

  Args:
    scores: arm -> the scores of each seed.
    reader: name and [L, L] confusion matrix of a human reader, drawn as a line.
  """
  height = 0.42 * len(scores) + (2.1 if reader else 1.7)
  figure = Figure(figsize=(10.5, height), layout="constrained")
  panels = figure.subplots(1, 3, sharey=True)
  for axes, (field, name) in zip(panels, _FIELDS.items(), strict=True):
    shown: list[float] = []
    for y, of_seeds in enumerate(scores.values()):
      values = [float(getattr(one, field)) for one in of_seeds]
      mean, low, high = metrics.over_seeds(values)
      if len(values) > 1:
        axes.plot([low, high], [y, y], color=INK, linewidth=1.4)
      axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.45, markersize=5)
      axes.plot([mean], [y], "D", color=BLUE, markersize=6)
      shown += values
    if reader and field != "macro_roc_auc":
      x = float(getattr(metrics, field)(reader[1]))
      axes.axvline(x, color=ORANGE, linewidth=1.6, linestyle=DASHES[1], label=reader[0])
      shown.append(x)
    axes.set_title(name, fontsize=10.5)
    axes.set_xlim(*_around(shown))
    tidy(axes)
    axes.tick_params(axis="y", length=0)
  panels[0].set_yticks(range(len(scores)), [textwrap.fill(arm, 34) for arm in scores])
  panels[0].set_ylim(len(scores) - 0.5, -0.5)
  if reader:
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", frameon=False, fontsize=9)
  save(figure, path, title)


def epsilons(
  scores: Mapping[str, Mapping[float, Sequence[float]]], path: str | pathlib.Path, title: str
) -> None:
  """Draws MCC against epsilon, with intervals over seeds.

  Args:
    scores: arm -> epsilon -> the MCC of each seed.
  """
  figure = Figure(figsize=(6.4, 4.4), layout="constrained")
  axes = figure.add_subplot()
  for i, (arm, by_epsilon) in enumerate(scores.items()):
    at = sorted(by_epsilon)
    spreads = [metrics.over_seeds(by_epsilon[e]) for e in at]
    colour, dashes = (BLUE, GREEN)[i % 2], DASHES[i % len(DASHES)]
    axes.plot(at, [s.mean for s in spreads], "o", linestyle=dashes, color=colour, label=arm)
    axes.vlines(at, [s.low for s in spreads], [s.high for s in spreads], color=colour)
  of_all = [
    v for by_epsilon in scores.values() for of_seeds in by_epsilon.values() for v in of_seeds
  ]
  axes.set_ylim(*_around(of_all))
  axes.set_xscale("log")
  ticks = sorted({e for by_epsilon in scores.values() for e in by_epsilon})
  axes.set_xticks(ticks, [f"{e:g}" for e in ticks])
  axes.minorticks_off()
  axes.set_xlabel("epsilon")
  axes.set_ylabel("MCC")
  axes.legend(frameon=False, fontsize=9)
  tidy(axes)
  save(figure, path, title)


def reader(
  labels: Any,
  probabilities: Any,
  label_names: Sequence[str],
  said: tuple[str, np.ndarray],
  path: str | pathlib.Path,
  title: str,
) -> None:
  """Draws a model's ROC curve of each class against the rest, with a reader's operating points.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L].
    label_names: the L classes.
    said: name and [L, L] confusion matrix of the reader.
  """
  labels, probabilities = metrics.check_probabilities(labels, probabilities)
  figure = Figure(figsize=(6.4, 6.4), layout="constrained")
  axes = figure.add_subplot()
  axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (2, 3)))
  found, left = metrics.sensitivity(said[1]), metrics.specificity(said[1])
  for k, name in enumerate(map(lettering.in_legend, lettering.shown(label_names))):
    curve = metrics.roc_curve(labels == k, probabilities[:, k])
    area = metrics.roc_auc(labels == k, probabilities[:, k])
    colour = PALETTE[k % len(PALETTE)]
    style: dict[str, Any] = {"color": colour, "linestyle": DASHES[k % len(DASHES)]}
    axes.plot(*curve[:2], label=f"{name}: AUC {area:.3f}", **style)
    point: dict[str, Any] = {
      "markersize": 12,
      "markeredgecolor": INK,
      "label": f"{name}: {said[0]}",
    }
    axes.plot([1 - left[k]], [found[k]], "*", color=colour, **point)
  axes.set_xlabel("1 - specificity (one class against the rest)")
  axes.set_ylabel("sensitivity")
  axes.legend(loc="lower right", frameon=False, fontsize=9)
  tidy(axes)
  save(figure, path, title)


def _around(values: Sequence[float]) -> tuple[float, float]:
  """The ends of an axis around values; wider intervals, as of two seeds, end at its edge."""
  margin = 0.04 + 0.25 * (max(values) - min(values))
  return min(values) - margin, min(max(values) + margin, 1.02)


def budgets(
  private: Sequence[Score],
  others: Sequence[Score],
  readers: Mapping[str, float],
  path: str | pathlib.Path,
  title: str,
) -> None:
  """Draws the MCC of private runs against epsilon, each with its interval, beside runs without
  privacy as bands, and human readers.

  Args:
    private: of runs with privacy; a line joins the means of one arm.
    others: of runs without.
    readers: name -> MCC.
  """
  figure = Figure(figsize=(6.4, 4.4), layout="constrained")
  axes = figure.add_subplot()
  arms = list(dict.fromkeys(one.arm for one in private))
  for i, arm in enumerate(arms):
    mine = [one for one in private if one.arm == arm]
    colour, at = PALETTE[i % len(PALETTE)], sorted({one.epsilon for one in mine})
    means = [np.mean([one.value for one in mine if one.epsilon == e]) for e in at]
    axes.plot(at, means, linestyle=DASHES[i % len(DASHES)], color=colour, label=arm)
    axes.plot([one.epsilon for one in mine], [one.value for one in mine], "o", color=colour)
    lows, highs = [one.low for one in mine], [one.high for one in mine]
    axes.vlines([one.epsilon for one in mine], lows, highs, color=colour, linewidth=1.2)
  for i, one in enumerate(others):
    style: dict[str, Any] = {"color": INK if i == 0 else "#888888"}
    label = f"no privacy: {one.arm}"
    axes.axhline(one.value, linestyle=DASHES[(1 + i) % len(DASHES)], label=label, **style)
    axes.axhspan(one.low, one.high, alpha=0.08, linewidth=0, **style)
  for name, value in readers.items():
    axes.axhline(value, color=ORANGE, linewidth=1.6, linestyle=":", label=name)
  ends = [v for one in (*private, *others) for v in one[2:]]
  axes.set_ylim(*_around([*ends, *readers.values()]))
  axes.set_xscale("log")
  ticks = sorted({one.epsilon for one in private})
  axes.set_xticks(ticks, [f"{e:g}" for e in ticks])
  axes.minorticks_off()
  axes.set_xlabel("epsilon")
  axes.set_ylabel("MCC, with 95 % intervals over test images")
  axes.legend(frameon=False, fontsize=9, loc="lower right")
  tidy(axes)
  save(figure, path, title)


def latency(
  times: Sequence[Timed], links: Mapping[str, pricing.Network], path: str | pathlib.Path, title: str
) -> None:
  """Draws the time of encrypted inferences over links, as the sum of computing, bytes and rounds.

  Args:
    times: of each.
    links: name -> round trip and bandwidth.
  """
  rows = [(one, name, link) for one in times for name, link in links.items()]
  figure = Figure(figsize=(9.2, 0.42 * len(rows) + 2.0), layout="constrained")
  axes = figure.add_subplot()
  place = [i + 0.6 * (i // len(links)) for i in range(len(rows))]
  left = np.zeros(len(rows))
  parts = {
    "computing, both parties on one machine (measured)": [one.seconds for one, *_ in rows],
    "bytes (estimated)": [link.seconds(0, one.num_bytes) for one, _, link in rows],
    "rounds (estimated)": [link.seconds(one.rounds, 0) for one, _, link in rows],
  }
  for (name, values), colour in zip(parts.items(), (BLUE, ORANGE, "#C4C4C4"), strict=True):
    axes.barh(place, values, left=left, height=0.72, color=colour, label=name)
    left = left + np.asarray(values)
  for y, total in zip(place, left.tolist(), strict=True):
    axes.annotate(
      f"{total:.2g} s", (total, y), (4, 0), textcoords="offset points", va="center", fontsize=9
    )
  for k, one in enumerate(times):
    named = (0.0, place[k * len(links)] - 0.72)
    axes.annotate(one.name, named, fontsize=10, fontweight="bold", color=INK, va="center")
  axes.set_yticks(place, [name for _, name, _ in rows])
  axes.set_ylim(place[-1] + 0.6, -1.15)
  axes.set_xlim(0, 1.1 * left.max())
  axes.set_xlabel("seconds")
  tidy(axes)
  axes.grid(axis="y", visible=False)
  axes.tick_params(axis="y", length=0)
  figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  save(figure, path, title)
