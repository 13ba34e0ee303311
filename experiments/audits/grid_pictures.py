"""Pictures of a grid of reconstructions: rates, and images."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, PercentFormatter

from primia_jax.attacks.grid import Explored
from primia_jax.metrics import clopper_pearson

from .. import plots

_SHOWN = 4  # images of each cell
_COLOURS = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.PINK)  # of batch sizes


def rates(found: Explored, chance: float, path: pathlib.Path, title: str) -> None:
  """Draws the share of images named by the number at a site: a panel by what is seen, a line by
  batch size, with intervals.

  Args:
    found: the grid.
    chance: of guessing.
    path: the file to write.
    title: what the picture shows, including the data set.
  """
  seen, sizes, batches = _axes(found)
  figure = Figure(figsize=(4.4 * len(seen) + 0.6, 4.4), layout="constrained")
  panels = figure.subplots(1, len(seen), sharey=True, squeeze=False)[0]
  for axes, num_sites in zip(panels, seen, strict=True):
    for i, batch in enumerate(batches):
      points = [(cell, one) for cell, one in found.outcomes.items()
                if (cell.batch_size, cell.num_sites) == (batch, num_sites)]  # fmt: skip
      if not points:
        continue
      colour, shift = _COLOURS[i % len(_COLOURS)], 1.06 ** (i - (len(batches) - 1) / 2)
      x = np.array([cell.num_images for cell, _ in points]) * shift
      y = np.array([one.named.mean() for _, one in points])
      ends = np.array([clopper_pearson(int(one.named.sum()), len(one.named)) for _, one in points])
      dash = plots.DASHES[i % len(plots.DASHES)]
      axes.plot(x, y, dash, marker="o", markersize=5, color=colour, label=f"batch {batch}")
      axes.vlines(x, *ends.T, color=colour, linewidth=1.6)
    alone = {cell.num_images: found.controls[cell].named.mean() for cell in found.outcomes
             if cell.num_sites == num_sites}  # fmt: skip
    axes.plot([*alone], [*alone.values()], "s", color=plots.AMBER, markersize=6, zorder=1,
              label="control: one image alone, as many steps")  # fmt: skip
    axes.axhline(chance, color=plots.INK, linewidth=1.2, linestyle=(0, (2, 3)), label="chance")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="images at a site", ylim=(-0.03, 1.03), title=view(num_sites))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    plots.tidy(axes)
  panels[0].set_ylabel("images named")
  handles = panels[0].get_legend_handles_labels()
  figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
  plots.save(figure, path, f"Reconstruction by images at a site: {title}")


def images(found: Explored, originals: np.ndarray, path: pathlib.Path, title: str) -> None:
  """Draws guesses beside the originals: a row by images and batch, side by side by what is seen.

  Args:
    found: the grid.
    originals: [N, H, W, C], those that are attacked, in their order.
    path: the file to write.
    title: what the picture shows, including the data set.
  """
  seen, sizes, batches = _axes(found)
  places = {(size, batch) for size, batch, _ in found.outcomes}
  rows = [(size, batch) for size in sizes for batch in batches if (size, batch) in places]
  shown = min(_SHOWN, *(len(one.guesses) for one in found.outcomes.values()))
  gap = 0.35  # of an image, between what different adversaries see
  widths = [*([1] * shown), gap] * len(seen)
  figure = Figure(
    figsize=(0.78 * sum(widths[:-1]) + 1.9, 0.86 * (len(rows) + 1) + 1.1), layout="constrained"
  )
  grid = figure.add_gridspec(len(rows) + 1, len(widths) - 1, width_ratios=widths[:-1])
  for part, num_sites in enumerate(seen):
    for r, row in enumerate([None, *rows]):
      one = None if row is None else found.outcomes.get((*row, num_sites))  # type: ignore[call-overload]
      if row is not None and one is None:
        continue
      for i in range(shown):
        axes = figure.add_subplot(grid[r, part * (shown + 1) + i])
        image = originals[i] if one is None else one.guesses[i]
        image = np.clip(image[..., 0] if image.shape[-1] == 1 else image, 0, 1)
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        if one is not None:
          axes.set_xlabel(f"{one.ssim[i]:.2f}", fontsize=7, labelpad=1)
        if i == 0 and part == 0:
          name = "original" if row is None else f"{count(row[0])}, batch {row[1]}"
          axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        if r == 0 and i == 0:
          axes.set_title(view(num_sites), fontsize=9, loc="left")
  plots.save(figure, path, f"Guesses and their SSIM: {title}")


def _axes(found: Explored) -> tuple[list[int], list[int], list[int]]:
  """Numbers of sites, images at a site and batch sizes of a grid."""
  size, batch, sites = zip(*found.outcomes, strict=True)
  return sorted({*sites}), sorted({*size}), sorted({*batch})


def view(num_sites: int) -> str:
  """What the adversary sees, in words."""
  return "one site's update" if num_sites == 1 else f"sum of {num_sites} sites"


def count(num: int) -> str:
  """A number of images, in words."""
  return "1 image" if num == 1 else f"{num} images"
