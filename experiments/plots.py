"""Pictures of a run. Each function writes one file, `path`, in the format of its suffix, and
changes no global state.

The colours are Okabe and Ito's, which colour-blind readers can distinguish; lines also differ in
their dashes. The caller passes each title, which must name the data set, so that nobody mistakes a
phantom's result for a patient's.
"""

from __future__ import annotations

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from primia_jax import metrics

from . import lettering

BLUE, ORANGE, GREEN, PINK, AMBER, SKY, INK = (
  "#0072B2",
  "#D55E00",
  "#009E73",
  "#CC79A7",
  "#E69F00",
  "#56B4E9",
  "#222222",
)
PALETTE = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
DASHES = ("-", "--", "-.", ":")
BACKDROP = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"}
GRID: dict[str, Any] = {"color": "#DDDDDD", "linewidth": 0.7}

# Panel of `curves` -> the key of the run's JSON lines -> its name in the legend.
CURVES = {
  "loss": {"train_loss": "training", "val_loss": "validation"},
  "validation score": {"val_accuracy": "accuracy", "val_mcc": "MCC"},
  "learning rate": {"learning_rate": "learning rate"},
  "epsilon spent": {"epsilon": "epsilon spent"},
}
# The order is that of the columns: the claim first.
ACCOUNTANTS = {"pld": "privacy loss distributions", "rdp": "Renyi divergences"}
SINGLE = ("learning rate", "epsilon spent")  # panels with one line, which their axis names


def confusion_matrix(
  cm: Any, label_names: Sequence[str], path: str | pathlib.Path, title: str
) -> None:
  """Draws a confusion matrix, coloured by the share of each true class.

  Args:
    cm: [L, L] integers, rows true, columns predicted.
    label_names: the L classes.

  Raises:
    ValueError: the matrix is not [L, L].
  """
  cm, size = np.asarray(cm), len(label_names)
  if cm.shape != (size, size):
    raise ValueError(
      f"a confusion matrix of the {size} classes {list(label_names)} is {(size, size)}, got "
      f"{cm.shape}"
    )
  rows = cm.sum(1, keepdims=True)
  share = cm / np.maximum(rows, 1)
  cell = 1.15 if size <= 5 else max(0.38, 4.5 / size)
  figure = Figure(
    figsize=(max(5.4, cell * size + 2.6), max(4.4, cell * size + 1.5)), layout="constrained"
  )
  axes = figure.add_subplot()
  image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
  names = lettering.shown(label_names)
  tilted = size > 5 or max(map(len, names)) > 24
  names = names if tilted else [textwrap.fill(name, 14) for name in names]
  axes.set_xticks(range(size), names)
  axes.set_yticks(range(size), names)
  if tilted:
    for label in axes.get_xticklabels():
      label.set(rotation=40, ha="right", rotation_mode="anchor")
  axes.set_xlabel("predicted class")
  axes.set_ylabel("true class")
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_xticks(np.arange(size - 1) + 0.5, minor=True)
  axes.set_yticks(np.arange(size - 1) + 0.5, minor=True)
  axes.grid(which="minor", color="white", linewidth=1.5)
  axes.tick_params(which="minor", length=0)
  for (i, j), count in np.ndenumerate(cm):
    text = f"{count:,}" + (f"\n{share[i, j]:.0%}" if rows[i, 0] and size <= 8 else "")
    colour = "white" if share[i, j] > 0.55 else INK
    axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=11 if size <= 8 else 7)
  bar = figure.colorbar(
    image, ax=axes, shrink=0.8, format=PercentFormatter(1.0), label="share of the true class"
  )
  bar.outline.set_visible(False)  # type: ignore[operator]
  summary = (
    f"accuracy {_number(metrics.accuracy(cm), percent=True)}, MCC {_number(metrics.mcc(cm))}, "
    f"n = {cm.sum():,}"
  )
  axes.set_title(summary, fontsize=10, color="#444444")
  save(figure, path, title)


def roc(
  labels: Any, probabilities: Any, label_names: Sequence[str], path: str | pathlib.Path, title: str
) -> None:
  """Draws a one-vs-rest ROC curve for each class, and their mean.

  A class that has no examples, or all of them, has no curve; the legend says so.

  Args:
    labels: [N] integers in 0..L-1.
    probabilities: [N, L].
    label_names: the L classes.
  """
  labels, probabilities = metrics.check_probabilities(labels, probabilities)
  crowded = len(label_names) > len(PALETTE)
  figure = Figure(figsize=(9.2 if crowded else 6.4, 6.4), layout="constrained")
  axes = figure.add_subplot()
  axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (2, 3)))
  curves, areas = [], []
  for k, name in enumerate(map(lettering.in_legend, lettering.shown(label_names))):
    curve = metrics.roc_curve(labels == k, probabilities[:, k])
    area = metrics.roc_auc(labels == k, probabilities[:, k])
    style: dict[str, Any] = {
      "color": PALETTE[k % len(PALETTE)],
      "linestyle": DASHES[(k + k // len(PALETTE)) % len(DASHES)],
    }
    if np.isnan(area):
      axes.plot([], [], label=f"{name}: undefined in these data", **style)
      continue
    curves.append(curve)
    areas.append(area)
    axes.plot(
      curve.false_positive_rate,
      curve.true_positive_rate,
      linewidth=1.8,
      label=f"{name}: {area:.3f}",
      **style,
    )
  if len(curves) > 1:
    grid = np.unique(np.concatenate([c.false_positive_rate for c in curves]))
    mean = np.mean(
      [np.interp(grid, c.false_positive_rate, c.true_positive_rate) for c in curves], axis=0
    )
    label = f"mean of {len(curves)} curves: {np.mean(areas):.3f}"
    # A wide, pale band below the curves, so that it hides none of them.
    axes.plot([0, *grid], [0, *mean], color="#C4C4C4", linewidth=5, zorder=1.5, label=label)
  one_vs_one = _number(metrics.macro_roc_auc(labels, probabilities))
  heading = f"area under the curve\n(macro one-vs-one: {one_vs_one})"
  if crowded:
    legend = figure.legend(loc="outside right center", title=heading, frameon=False, fontsize=9)
  else:
    legend = axes.legend(
      loc="lower right", title=heading, frameon=True, edgecolor="none", fontsize=9
    )
  legend.get_title().set_fontsize(9)
  axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
  axes.set_xlabel("false positive rate (1 - specificity)")
  axes.set_ylabel("true positive rate (sensitivity)")
  tidy(axes)
  save(figure, path, title)


def curves(rows: Sequence[Mapping[str, Any]], path: str | pathlib.Path, title: str) -> None:
  """Draws loss, validation scores, learning rate and spent epsilon against the round.

  Args:
    rows: a run's JSON lines. Each has `round` and any of `train_loss`, `val_loss`, `val_accuracy`,
      `val_mcc`, `learning_rate` and `epsilon`. A value that is absent or None has no point. A
      suppressed one is a text; it has no point either, and the legend says in how many rounds. A
      panel without values is left out.

  Raises:
    ValueError: there are no rows, a row has no `round`, or there is nothing to draw.
  """
  if not rows or not all("round" in row for row in rows):
    raise ValueError("rows must hold at least one row, and a `round` in each")
  has = lambda key: any(row.get(key) is not None for row in rows)
  panels = {panel: {k: v for k, v in lines.items() if has(k)} for panel, lines in CURVES.items()}
  panels = {panel: lines for panel, lines in panels.items() if lines}
  if not panels:
    raise ValueError(
      f"rows hold none of {[key for lines in CURVES.values() for key in lines]}; give at least one"
    )
  is_empty = {
    panel: not any(_is_shown(row.get(key)) for row in rows for key in lines)
    for panel, lines in panels.items()
  }
  heights = [1.2 if panel in SINGLE or is_empty[panel] else 2.6 for panel in panels]
  figure = Figure(figsize=(7.2, sum(heights) + 1.3), layout="constrained")
  all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[
    :, 0
  ]
  for axes, (panel, lines) in zip(all_axes, panels.items(), strict=True):
    for i, (key, name) in enumerate(lines.items()):
      points = [(row["round"], row[key]) for row in rows if _is_shown(row.get(key))]
      x, y = np.array(points, np.float64).reshape(-1, 2).T
      hidden = [row[key] for row in rows if isinstance(row.get(key), str)]
      name += f": {hidden[0]} in {len(hidden)} of {len(rows)} rounds" if hidden else ""
      marker = "o" if len(points) <= 30 else ""
      colour = "#666666" if panel in SINGLE else PALETTE[i]
      axes.plot(
        x,
        y,
        color=colour,
        linestyle=DASHES[i],
        linewidth=1.7,
        marker=marker,
        markersize=3.5,
        label=name,
      )
      if key == "val_mcc" and np.isfinite(y).any():
        best = int(np.nanargmax(y))
        label = f"best MCC: {y[best]:.3f}, round {x[best]:.0f}"
        axes.plot(x[best], y[best], "*", color=INK, markersize=11, linestyle="none", label=label)
    axes.set_ylabel(panel)
    tidy(axes)
    if is_empty[panel]:
      axes.set_yticks([])  # nothing here is a number
    if panel in SINGLE:
      axes.set_ylim(bottom=0)
      axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    else:
      axes.legend(frameon=False, fontsize=9)
  rounds = [row["round"] for row in rows]
  pad = max(0.5, 0.02 * (max(rounds) - min(rounds)))
  all_axes[-1].set(xlabel="round", xlim=(min(rounds) - pad, max(rounds) + pad))
  all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  figure.align_ylabels(list(all_axes))
  save(figure, path, title)


def comparison(
  results: Mapping[str, metrics.Intervals],
  path: str | pathlib.Path,
  title: str,
  *,
  highlight: str = "federated",
  references: Mapping[str, Any] | None = None,
) -> None:
  """Draws accuracy, MCC and macro ROC-AUC of all arms as bars with their intervals.

  Args:
    results: arm -> what `metrics.bootstrap_intervals` returned.
    highlight: the arm to draw darker, if it is among them.
    references: name -> [L, L] confusion matrix, e.g. of a human reader; drawn as lines in the
      panels of accuracy and MCC.
  """
  fields = {"accuracy": "accuracy", "mcc": "MCC", "macro_roc_auc": "macro ROC-AUC (one-vs-one)"}
  lowest = min(0.0, *(float(np.nanmin([r.low.mcc, 0.0])) for r in results.values()))
  lowest = lowest - 0.04 if lowest else 0.0
  figure = Figure(
    figsize=(10.5, 0.52 * len(results) + (2.1 if references else 1.7)), layout="constrained"
  )
  all_axes = figure.subplots(1, 3, sharey=True)
  for axes, (field, name) in zip(all_axes, fields.items(), strict=True):
    for y, (arm, r) in enumerate(results.items()):
      value, low, high = (float(getattr(x, field)) for x in (r.value, r.low, r.high))
      if np.isnan(value):
        axes.text(0.02, y, "undefined", va="center", fontsize=9, color="#444444")
        continue
      axes.barh(y, value, height=0.62, color=BLUE if arm == highlight else "#A9C9E3")
      # First wider and in white, so that the interval can be seen on a dark bar.
      for colour, wide in (("white", 2.4), (INK, 0.0)):
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6 + wide)
        caps = {"markersize": 7 + wide, "markeredgewidth": 1.2 + wide}
        axes.plot([low, high], [y, y], "|", color=colour, **caps)
      axes.text(
        np.nanmax([value, high]) + 0.03,
        y,
        f"{value:.3f}",
        va="center",
        fontsize=9,
        color=INK,
        bbox=BACKDROP,
      )
    for i, (reference, cm) in enumerate((references or {}).items()):
      if field != "macro_roc_auc":
        x = float(getattr(metrics, field)(np.asarray(cm)))
        axes.axvline(
          x, color=ORANGE, linewidth=1.6, linestyle=DASHES[(i + 1) % len(DASHES)], label=reference
        )
    axes.set_title(name, fontsize=10.5)
    # Leave room to the right of 1 for the numbers.
    axes.set(xlim=(lowest if field == "mcc" else 0, 1.24), xticks=[0, 0.25, 0.5, 0.75, 1])
    axes.set_xticklabels(["0", "0.25", "0.5", "0.75", "1"])
    tidy(axes)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
  all_axes[0].set_yticks(range(len(results)), [textwrap.fill(arm, 24) for arm in results])
  all_axes[0].set_ylim(len(results) - 0.5, -0.5)
  if references:
    figure.legend(
      *all_axes[0].get_legend_handles_labels(),
      loc="outside lower center",
      frameon=False,
      fontsize=9,
    )
  save(figure, path, title)


def epsilon(
  rows: Sequence[Mapping[str, Any]], target: float, path: str | pathlib.Path, title: str
) -> None:
  """Draws epsilon against rounds, by each accountant; what is infinite has no point.

  Args:
    rows: each has `round` and epsilon by the accountants' names, that of the claim first.
    target: the budget; 0 for none.
  """
  figure = Figure(figsize=(7.2, 4.6), layout="constrained")
  axes = figure.add_subplot()
  known = [name for name in ACCOUNTANTS if name in rows[0]]
  for key, colour, dash in zip(known, (BLUE, ORANGE), DASHES, strict=False):
    name = ACCOUNTANTS[key] + " (claimed)" * (key == known[0])
    points = [(row["round"], row[key]) for row in rows if math.isfinite(row[key])]
    if points:
      x, y = zip(*points, strict=True)
      axes.plot(
        x, y, color=colour, linestyle=dash, linewidth=1.8, marker="o", markersize=3.5, label=name
      )
  if target:
    axes.axhline(target, color=INK, linestyle=":", linewidth=1.3, label=f"target {target:g}")
  end = rows[-1]
  if math.isfinite(claim := end[known[0]]):
    label = f"end: epsilon {claim:.3g} after round {end['round']}"
    axes.plot(end["round"], claim, "*", color=INK, markersize=12, linestyle="none", label=label)
  axes.set(xlabel="round", ylabel="epsilon", xlim=(0, end["round"] * 1.03))
  axes.margins(y=0.1)
  axes.set_ylim(bottom=0)
  axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
  tidy(axes)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(frameon=False, fontsize=9)
  if not any(math.isfinite(row[key]) for row in rows for key in known):
    axes.text(0.5, 0.5, "epsilon is infinite", transform=axes.transAxes, ha="center", color=INK)
  save(figure, path, title)


def _is_shown(value: Any) -> bool:
  """Whether a line holds a number, and neither nothing nor that it is suppressed."""
  return value is not None and not isinstance(value, str)


def _number(value: Any, percent: bool = False) -> str:
  if np.isnan(value):
    return "undefined"
  return f"{value:.1%}" if percent else f"{value:.3f}"


def tidy(axes: Axes) -> None:
  """Draws a pale grid behind the data, and no frame above and to the right."""
  axes.grid(**GRID)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, path: str | pathlib.Path, title: str) -> None:
  """Writes a figure under its title, with letters that fonts of this machine have."""
  width = int(figure.get_figwidth() * 9.5)  # how many characters of the title fit on a line
  figure.suptitle(
    "\n".join(textwrap.fill(line, width) for line in title.splitlines()),
    fontsize=12,
    fontweight="bold",
    color=INK,
  )
  lettering.prepare(figure)
  figure.savefig(path, dpi=150, facecolor="white")
