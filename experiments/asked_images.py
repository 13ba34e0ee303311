"""The images that a clinic asks about; needs no JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from primia_jax.data import dicom, scan
from primia_jax.data.dataset import Dataset
from primia_jax.data.folder import read_images, unlabelled
from primia_jax.service.cards import About

from .settings import names


def read(s: Any, about: About) -> Dataset:
  """All images, as the model takes them.

  Args:
    s: the flags images, ignore, grey_bits and skip_bad_files.
    about: the model.

  Raises:
    ValueError, FileNotFoundError: an image cannot be read, or there is none.
  """
  paths, images = read_images(
    s.images, size=about.image_size, channels=about.channels, lazy=True, ignore=names(s.ignore),
    grey_bits=s.grey_bits or about.grey_bits, ct_window=dicom.window(about.ct_window),
  )  # fmt: skip
  found = {"all": unlabelled(paths, images, about.label_names)}
  return scan.read(found, skip_bad_files=s.skip_bad_files)["all"]


def runs(count: int, size: int) -> Iterator[np.ndarray]:
  """The numbers of the images in each run; repetitions fill the last one."""
  for start in range(0, count, size):
    yield np.resize(np.arange(start, min(start + size, count)), size)
