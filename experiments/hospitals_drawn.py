"""The picture of the phantom's hospitals, beside what `hospitals` says of them."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from . import plots
from .hospitals import Hospitals


def draw(
  shown: Hospitals, label_names: Sequence[str], path: str | pathlib.Path, title: str
) -> None:
  """Draws a row of images for each hospital, sorted by class.

  Args:
    shown: the hospitals.
    label_names: the classes.
  """
  num, columns = shown.images.shape[:2]
  figure = Figure(figsize=(1.4 * columns + 0.6, 1.4 * num + 0.9), layout="constrained")
  all_axes = figure.subplots(num, columns, squeeze=False)
  for (row, column), axes in np.ndenumerate(all_axes):
    axes.imshow(shown.images[row, column], cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    if not row:
      axes.set_title(label_names[int(shown.labels[column])], fontsize=10)
    if not column:
      axes.set_ylabel(shown.rows[row]["hospital"], fontsize=10)
  plots.save(figure, path, title)
