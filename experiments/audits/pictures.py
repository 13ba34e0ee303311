"""Pictures of an audit; like `plots`, each writes one file."""

from __future__ import annotations

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from primia_jax.attacks.evidence import Evidence
from primia_jax.attacks.rates import Curve

from .. import plots


def membership(curves: Mapping[str, Curve], path: pathlib.Path, title: str) -> None:
  """Draws true against false positive rates on logarithmic axes, with intervals of both.

  Args:
    curves: by name; those of one attack stand one after the other, the run's before the control's.
    path: the file to write.
    title: what the picture shows, including the data set.
  """
  figure = Figure(figsize=(7.2, 6.0), layout="constrained")
  axes = figure.add_subplot()
  low = min(float(curve.aimed.min()) for curve in curves.values()) / 2
  axes.plot([low, 1], [low, 1], color="#999999", linewidth=1, linestyle=(0, (2, 3)), label="chance")
  for i, (name, curve) in enumerate(curves.items()):
    false, true = curve.false_positive, curve.true_positive
    x, y = np.maximum(false.value, low), np.maximum(true.value, low)
    colour = plots.PALETTE[i // 2 % len(plots.PALETTE)]
    style: dict[str, Any] = {"color": colour, "alpha": 1.0 if i % 2 == 0 else 0.55}
    line = "-" if i % 2 == 0 else "--"
    axes.plot(x, y, line, linewidth=1.8, marker="o", markersize=3.5, label=name, **style)
    for rates, other, is_x in ((true, x, False), (false, y, True)):
      ends = np.maximum(rates.low, low), np.maximum(rates.high, low)
      lines = axes.hlines if is_x else axes.vlines
      lines(other, *ends, linewidth=0.8, **style)
  axes.set(xscale="log", yscale="log", xlim=(low, 1.05), ylim=(low, 1.05))
  axes.set(xlabel="false positive rate", ylabel="true positive rate")
  for axis in (axes.xaxis, axes.yaxis):
    axis.set_major_formatter(PercentFormatter(1.0, decimals=None))
  plots.tidy(axes)
  axes.legend(frameon=False, fontsize=9, loc="lower right")
  plots.save(figure, path, title)


def rates(evidence: Sequence[Evidence], path: pathlib.Path, title: str) -> None:
  """Draws each attack's score with its interval, its control's, and chance.

  Args:
    evidence: those that have a chance level.
    path: the file to write.
    title: what the picture shows, including the data set.
  """
  figure = Figure(figsize=(9.6, 0.55 * len(evidence) + 1.7), layout="constrained")
  axes = figure.add_subplot()
  for y, one in enumerate(evidence):
    pairs = [(one.control, plots.AMBER, 0.16, "control"), (one, plots.BLUE, -0.16, "attack")]
    for shown, colour, shift, name in pairs:
      if shown is None:
        continue
      marker = "o" if shown.control is not None else "s"
      label = name if y == 0 else ""
      axes.plot(shown.value, y + shift, marker, color=colour, markersize=6, label=label)
      if shown.interval is not None:
        axes.plot(shown.interval, [y + shift] * 2, color=colour, linewidth=2)
    axes.plot(np.full(2, one.chance), [y - 0.38, y + 0.38], color=plots.INK, linewidth=1.4,
              label="chance" if y == 0 else "")  # fmt: skip
  under = lambda one: one.protection.replace("none", "no protection")
  names = [textwrap.fill(f"{one.threat}; {under(one)}: {one.attack}", 62) for one in evidence]
  axes.set_yticks(range(len(evidence)), names, fontsize=8)
  axes.set(xlim=(0, 1.02), ylim=(len(evidence) - 0.5, -0.5), xlabel="share that is right")
  axes.xaxis.set_major_formatter(PercentFormatter(1.0))
  plots.tidy(axes)
  axes.grid(axis="y", visible=False)
  figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  plots.save(figure, path, title)


def grid(
  rows: Mapping[str, np.ndarray], quality: Mapping[str, np.ndarray], path: pathlib.Path, title: str
) -> None:
  """Draws rows of images below each other.

  Args:
    rows: name -> [V, H, W, C] float32 in [0, 1], the same images in each.
    quality: of some rows -> [V] PSNR in dB, written below the images.
    path: the file to write.
    title: what the picture shows, including the data set.
  """
  num = len(next(iter(rows.values())))
  figure = Figure(figsize=(1.15 * num + 1.6, 1.3 * len(rows) + 0.8), layout="constrained")
  all_axes = figure.subplots(len(rows), num, squeeze=False)
  for (name, images), of_row in zip(rows.items(), all_axes, strict=True):
    for i, (image, axes) in enumerate(zip(images, of_row, strict=True)):
      shown = image[..., 0] if image.shape[-1] == 1 else image
      axes.imshow(np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1)
      axes.set(xticks=[], yticks=[])
      axes.spines[:].set_visible(False)
      if name in quality:
        axes.set_xlabel(f"{quality[name][i]:.1f}", fontsize=8, labelpad=2)
    label = textwrap.fill(name, 18)
    of_row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
  plots.save(figure, path, title)
