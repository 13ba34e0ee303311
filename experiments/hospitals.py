"""What a report shows of the phantom's hospitals: what they differ in, and images of each.

Real images never come into a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.data import phantom
from primia_jax.data.dataset import Dataset

from .configs import Train

_SHOWN = 8  # hospitals in the picture
_OF_A_CLASS = 2  # images of each class in a hospital's row


class Hospitals(NamedTuple):
  """The hospitals of a run on the phantom.

  Attributes:
    rows: what each differs in, by name.
    images: [hospitals shown, images of a row, H, W] uint8; a row is sorted by class, and white
      where the test images hold no more of a class.
    labels: [images of a row] their classes.
  """

  rows: list[dict[str, Any]]
  images: np.ndarray
  labels: np.ndarray


def of_phantom(config: Train, sizes: Sequence[int], test: Dataset) -> Hospitals | None:
  """Describes the hospitals; None for other images than the phantom's.

  Args:
    config: of the run.
    sizes: the number of each hospital's training images.
    test: the test images, in which every hospital has a share.
  """
  if config.data.data != "phantom" or config.data.site_data:
    return None
  pixels, rows = config.data.image_size, []
  for site, style in enumerate(phantom.site_styles(len(sizes), config.seed)):
    mix = zip(phantom.LABEL_NAMES, style.class_mix, strict=True)
    rows.append(
      {
        "hospital": f"site {site}",
        "training images": sizes[site],
        "exposure": f"{style.gain:.2f}",
        "blur (pixels)": f"{style.blur * pixels:.2f}",
        **{f"{name} (%)": f"{100 * share:.0f}" for name, share in mix},
      }
    )
  labels = np.repeat(np.arange(len(phantom.LABEL_NAMES)), _OF_A_CLASS)
  images = np.full((min(len(sizes), _SHOWN), len(labels), pixels, pixels), 255, np.uint8)
  for site, row in enumerate(images):
    for label in range(len(phantom.LABEL_NAMES)):
      found = np.flatnonzero((test.columns["site"] == site) & (test.labels == label))
      found = found[:_OF_A_CLASS]
      row[np.flatnonzero(labels == label)[: len(found)]] = test.images[found][..., 0]
  return Hospitals(rows, images, labels)
