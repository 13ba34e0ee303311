"""Pictures of a segmentation."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from primia_jax import segmentation
from primia_jax.data.dataset import Dataset

from . import lettering
from .plots import AMBER, BLUE, GREEN, GRID, INK, ORANGE, PINK, SKY, save, tidy

_CLASSES = (AMBER, SKY, GREEN, PINK, BLUE, ORANGE)  # as the palette of found_masks has them


def cases(dice: Mapping[str, np.ndarray], path: pathlib.Path, title: str) -> None:
  """Draws each case's Dice coefficient by arm, with the mean and its interval.

  Args:
    dice: arm -> [M].
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
    count: how many images.
  """
  assert test.masks is not None
  sizes = (test.masks > 0).sum((1, 2))
  shown = np.argsort(-sizes, kind="stable")[: max(count, len(test) // 2)]
  num_classes = len(test.label_names)
  dice = segmentation.case_dice(test.masks[shown], found[shown], num_classes).mean(1)
  order = np.argsort(-dice, kind="stable")
  order = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
  figure = Figure(layout="constrained")
  for axes, i in zip(_panels(figure, len(order)), order, strict=True):
    number = int(shown[i])
    _image(axes, test, number, f"Dice {dice[i]:.2f}")
    for masks, colour, dash in ((test.masks, AMBER, "solid"), (found, SKY, "dashed")):
      for k in range(1, num_classes):
        _outline(axes, masks[number] == k, colour, dash)
  lines = [Line2D([], [], color=AMBER), Line2D([], [], color=SKY, linestyle="dashed")]
  figure.legend(lines, ["truth", "found"], loc="outside lower center", ncols=2, frameon=False)
  save(figure, path, title)


def found(images: Dataset, masks: np.ndarray, path: pathlib.Path, title: str, count: int) -> None:
  """Draws images with the outlines of what was found in them, where no truth is known.

  The images are those with the largest masks, in their order.

  Args:
    images: N.
    masks: [N, H, W].
    title: what the picture shows, including where the images are from.
    count: how many images.
  """
  order = np.sort(np.argsort(-(masks > 0).sum((1, 2)), kind="stable")[:count])
  names = images.label_names[1:]
  figure = Figure(layout="constrained")
  for axes, number in zip(_panels(figure, len(order)), order.tolist(), strict=True):
    share = (masks[number] > 0).mean()
    label = str(images.columns["path"][number]).rpartition("/")[2].rpartition(", ")[2]
    label = label if len(label) <= 20 else f"{label[:19]}…"
    _image(axes, images, number, f"{label}: {share:.1%}")
    for k in range(len(names)):
      _outline(axes, masks[number] == k + 1, _CLASSES[k % len(_CLASSES)], "solid")
  shown = lettering.shown(names)[: len(_CLASSES)]
  lines = [Line2D([], [], color=colour) for colour in _CLASSES[: len(shown)]]
  figure.legend(
    lines, [lettering.in_legend(name) for name in shown], loc="outside lower center",
    ncols=min(3, len(shown)), frameon=False,
  )  # fmt: skip
  save(figure, path, title)


def _panels(figure: Figure, count: int) -> list[Axes]:
  """Places for images, four in a row."""
  columns = min(4, count)
  rows = -(-count // columns)
  figure.set_size_inches(max(1.9 * columns + 0.2, 4.2), 2.15 * rows + 1.0)
  return [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _image(axes: Axes, images: Dataset, number: int, title: str) -> None:
  image = images.images[np.asarray([number])][0]
  axes.imshow(image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255)
  axes.set_title(title, fontsize=9, color=INK)
  axes.set_axis_off()


def _outline(axes: Axes, is_class: np.ndarray, colour: str, dash: str) -> None:
  if is_class.any() and not is_class.all():
    axes.contour(is_class.astype(float), [0.5], colors=[colour], linewidths=1.4, linestyles=[dash])
