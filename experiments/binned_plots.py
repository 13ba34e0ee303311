"""Pictures of scores in bins: ROC curves at the edges of the bins, and calibration."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from primia_jax import metrics

from . import lettering, plots


def roc(table: Any, label_names: Sequence[str], path: str | pathlib.Path, title: str) -> None:
  """Draws a one-vs-rest ROC curve for each class, whose points are the edges of the bins.

  The curve of the scores themselves passes through every point; between two points it is anywhere
  in the rectangle that they span, which is shaded.

  Args:
    table: [L, L, B] images by true class, class whose probability it is, and bin.
    label_names: the L classes.
  """
  table = np.asarray(table)
  figure = Figure(figsize=(6.4, 6.4), layout="constrained")
  axes = figure.add_subplot()
  axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (2, 3)))
  for k, name in enumerate(map(lettering.in_legend, lettering.shown(label_names))):
    colour = plots.PALETTE[k % len(plots.PALETTE)]
    style: dict[str, Any] = {
      "color": colour, "linestyle": plots.DASHES[(k + k // len(plots.PALETTE)) % len(plots.DASHES)],
    }  # fmt: skip
    pair = table[k, k], np.delete(table, k, axis=0)[:, k].sum(0)
    area = metrics.binned_roc_auc(*pair)
    if np.isnan(area.value):
      axes.plot([], [], label=f"{name}: undefined in these data", **style)
      continue
    false, true = metrics.binned_roc_curve(*pair)
    axes.fill_between(
      np.repeat(false, 2)[1:-1], np.repeat(true[:-1], 2), np.repeat(true[1:], 2), color=colour,
      alpha=0.15, linewidth=0,
    )  # fmt: skip
    label = f"{name}: {area.value:.3f} ± {area.error:.4f}"
    axes.plot(false, true, linewidth=1.8, label=label, **style)
  heading = "area under the curve\n± error of the bins, at most"
  legend = axes.legend(loc="lower right", title=heading, frameon=True, edgecolor="none", fontsize=9)
  legend.get_title().set_fontsize(9)
  axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
  axes.set_xlabel("false positive rate (1 - specificity)")
  axes.set_ylabel("true positive rate (sensitivity)")
  plots.tidy(axes)
  plots.save(figure, path, title)


def reliability(calibration: Any, path: str | pathlib.Path, title: str) -> None:
  """Draws accuracy against confidence, and how many images each bin has.

  Args:
    calibration: [3, C] images, right answers and the sum of confidences, by bin of confidence.
  """
  images, right, confidence = np.asarray(calibration, np.float64)
  bins = len(images)
  figure = Figure(figsize=(6.4, 6.4), layout="constrained")
  axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
  axes.plot([0, 1], [0, 1], color="#999999", linewidth=1, linestyle=(0, (2, 3)), label="calibrated")
  has = images > 0
  axes.plot(
    confidence[has] / images[has], right[has] / images[has], color=plots.BLUE, marker="o",
    linewidth=1.8, label="images of a bin",
  )  # fmt: skip
  error = metrics.binned_calibration_error(calibration)
  heading = f"expected calibration error {error:.3f}"
  axes.legend(loc="upper left", title=heading, frameon=True, edgecolor="none", fontsize=9)
  axes.set(xlim=(0, 1), ylim=(-0.02, 1.02))
  axes.set_ylabel("share of right answers")
  centres = (np.arange(bins) + 0.5) / bins
  below.bar(centres, images, width=0.9 / bins, color=plots.SKY)
  below.set_xlabel("confidence: the largest probability")
  below.set_ylabel("images")
  for one in (axes, below):
    plots.tidy(one)
  plots.save(figure, path, title)
