"""Pictures of a model that gives images any number of findings."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import lettering, plots


def areas(arms: Mapping[str, Any], names: Sequence[str], path: pathlib.Path, title: str) -> None:
  """Draws the ROC-AUC of each finding in each arm, with its interval."""
  figure = Figure(figsize=(7.5, 1.6 + (0.18 * len(arms) + 0.22) * len(names)), layout="constrained")
  axes = figure.add_subplot()
  axes.axvline(0.5, color=plots.INK, linewidth=0.8, linestyle=":")
  height = np.arange(len(names))[::-1]
  for i, (arm, of) in enumerate(arms.items()):
    entries = [of["of"][name]["auroc"] for name in names]
    value, low, high = (np.array([e[k] for e in entries]) for k in ("value", "low", "high"))
    shift = 0.6 * ((i + 0.5) / len(arms) - 0.5)
    error = np.maximum([value - low, high - value], 0)
    axes.errorbar(
      value, height - shift, xerr=error, fmt="o", markersize=4, elinewidth=1.2, label=arm,
      color=plots.PALETTE[i % len(plots.PALETTE)],
    )  # fmt: skip
  axes.set_yticks(height, lettering.shown(names))
  axes.set_xlabel("ROC-AUC (0.5: as by chance)")
  if len(arms) > 1:
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
  plots.tidy(axes)
  plots.save(figure, path, f"{title}:\neach finding")


def calibration(
  there: np.ndarray, probabilities: np.ndarray, num_bins: int, path: pathlib.Path, title: str
) -> None:
  """Draws how often findings are there in each bin of probabilities, over all findings together."""
  bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1).ravel()
  counts = np.bincount(bins, minlength=num_bins)
  filled = counts > 0
  total = lambda v: np.bincount(bins, v.astype(np.float64).ravel(), num_bins)[filled]
  said, found = total(probabilities) / counts[filled], total(there) / counts[filled]
  figure = Figure(figsize=(5.4, 4.8), layout="constrained")
  axes = figure.add_subplot()
  axes.plot([0, 1], [0, 1], color=plots.INK, linewidth=0.8, linestyle=":", label="calibrated")
  axes.plot(said, found, "o-", color=plots.BLUE, label="all findings together")
  for x, y, n in zip(said, found, counts[filled], strict=True):
    axes.annotate(f"{n:,}", (x, y), (4, -11), textcoords="offset points", fontsize=7)
  axes.set_xlim(-0.02, 1.02)
  axes.set_ylim(-0.02, 1.02)
  axes.set_xlabel("probability that the model gives (mean of a bin; its size beside it)")
  axes.set_ylabel("share that has the finding")
  axes.legend(frameon=False, fontsize=9)
  plots.tidy(axes)
  plots.save(figure, path, f"{title}: calibration")
