"""A site without images in a training: it is in no sum of updates, is told each, and has the model.

The other sites form these sums, as those of a round do where it takes some of the sites. So a sum,
its threshold and what colluding sites can open are those of the sites that have images. Counts of
classes and of validation images are summed over all sites; such a site adds zeros.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from primia_jax.data import scan
from primia_jax.data.dataset import Dataset

from . import settings
from .configs import Train, tasks
from .configs.data import NO_IMAGES

WORD = "no images: it is in no sum of updates, and gets the model of the others"


def is_empty(data: str) -> bool:
  """Whether a source is none, or a folder without files."""
  kind, _, where = data.partition(":")
  path = pathlib.Path(where).expanduser()
  if data == NO_IMAGES:
    return True
  return kind == "folder" and path.is_dir() and not any(p.is_file() for p in path.rglob("*"))


def nothing(config: Train) -> Dataset:
  """No images, of the agreed classes and shape.

  Raises:
    ValueError: no classes are agreed.
  """
  d = config.data
  if not (agreed := settings.names(d.label_names)):
    raise ValueError("a site has no images to tell the classes by; give all of them in label_names")
  shape = 0, d.image_size, d.image_size
  return Dataset(
    images=np.zeros((*shape, d.channels), np.uint8),
    labels=np.zeros(0, np.int32),
    label_names=agreed,
    groups=np.zeros(0, np.str_),
    columns={scan.PIXELS: np.zeros(0, "S32")},
    name="no images",
    has_patient=np.zeros(0, bool),
    masks=np.zeros(shape, np.uint8) if tasks.of(config.model.model).of_pixels else None,
    is_multi=d.is_multi,
  )


def sums_of_others(config: Train, sizes: Sequence[int]) -> Train:
  """The configuration by which the sites with images sum their updates; the same where all have.

  Args:
    config: of the run.
    sizes: of the sites' training images.

  Raises:
    ValueError: fewer than two have images, or so few sites form no sum that this run allows.
  """
  without = [i for i, size in enumerate(sizes) if not size]
  if not without:
    return config
  left = len(sizes) - len(without)
  said = f"sites {without} have no images to train on, so that sums are of {left} sites at most"
  if left < 2:
    raise ValueError(f"{said}; a federation needs two sites with images")
  try:
    out = settings.replace(config, sites_per_round=min(config.sites_in_round, left))
    out.check_federation()
    out.aggregation.build(out.sites_in_round, out.in_processes)
  except ValueError as error:
    raise ValueError(f"{said}: {error}") from error
  return out
