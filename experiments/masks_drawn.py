"""Pictures of a segmentation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from primia_jax import segmentation
from primia_jax.data.dataset import Dataset

from .plots import AMBER, BLUE, GRID, INK, SKY, save, tidy


def cases(dice: Mapping[str, np.ndarray], path: pathlib.Path, title: str) -> None:
  """Draws each case's Dice coefficient by arm, with the mean and its interval.

  Args:
    dice: arm -> [M].
    path: the file to write.
    title: what the picture shows, including the data set.
  """
  figure = Figure(figsize=(6.4, 1.2 + 0.62 * len(dice)), layout="constrained")
  axes, rng = figure.add_subplot(), np.random.default_rng(0)
  for row, values in enumerate(dice.values()):
    height = row + rng.uniform(-0.24, 0.24, len(values))
    axes.scatter(values, height, s=9, color=SKY, alpha=0.6, linewidths=0)
    mean = segmentation.bootstrap_mean(values, 0)
    axes.plot([mean.low, mean.high], [row, row], color=BLUE, linewidth=2.5)
    axes.plot(mean.value, row, "o", color=BLUE, markersize=7)
    axes.annotate(
      f"{mean.value:.2f}", (mean.value, row), (0, 8), textcoords="offset points", ha="center",
      color=INK, fontsize=9,
    )  # fmt: skip
  axes.set_yticks(range(len(dice)), list(dice))
  axes.set_ylim(len(dice) - 0.4, -0.6)
  axes.set_xlim(-0.02, 1.02)
  axes.set_xlabel("Dice coefficient of a case")
  axes.grid(axis="x", **GRID)
  tidy(axes)
  save(figure, path, title)


def overlays(test: Dataset, found: np.ndarray, path: pathlib.Path, title: str, count: int) -> None:
  """Draws images with the outlines of the truth and of what was found.

  The images are those with the largest masks, from the best found to the worst, evenly spaced.

  Args:
    test: images with masks.
    found: [N, H, W].
    path: the file to write.
    title: what the picture shows, including the data set.
    count: how many images.
  """
  assert test.masks is not None
  sizes = (test.masks > 0).sum((1, 2))
  shown = np.argsort(-sizes, kind="stable")[: max(count, len(test) // 2)]
  num_classes = len(test.label_names)
  dice = segmentation.case_dice(test.masks[shown], found[shown], num_classes).mean(1)
  order = np.argsort(-dice, kind="stable")
  order = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
  columns = min(4, len(order))
  rows = -(-len(order) // columns)
  figure = Figure(figsize=(1.9 * columns + 0.2, 2.15 * rows + 1.0), layout="constrained")
  for place, i in enumerate(order):
    axes, number = figure.add_subplot(rows, columns, place + 1), int(shown[i])
    image = test.images[np.asarray([number])][0]
    axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
    for masks, colour, dash in ((test.masks, AMBER, "solid"), (found, SKY, "dashed")):
      for k in range(1, num_classes):
        is_class = (masks[number] == k).astype(float)
        if is_class.any() and not is_class.all():
          axes.contour(is_class, [0.5], colors=[colour], linewidths=1.4, linestyles=[dash])
    axes.set_title(f"Dice {dice[i]:.2f}", fontsize=9, color=INK)
    axes.set_axis_off()
  lines = [Line2D([], [], color=AMBER), Line2D([], [], color=SKY, linestyle="dashed")]
  figure.legend(lines, ["truth", "found"], loc="outside lower center", ncols=2, frameon=False)
  save(figure, path, title)
