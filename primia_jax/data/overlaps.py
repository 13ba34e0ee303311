"""Patients and images that are at two places: in training and testing, or at two sites."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from primia_jax.data import patient_ids
from primia_jax.data.dataset import Dataset
from primia_jax.data.scan import PIXELS


class Overlap(NamedTuple):
  """What several sets of images share.

  Attributes:
    patients: known patients that have images in several sets.
    images: [K] pairs of names, of an image and its copy in another set.
  """

  patients: list[str]
  images: list[tuple[str, str]]


def between(parts: Sequence[Dataset]) -> Overlap:
  """What sets of images share; without the column `scan.PIXELS`, images are not compared."""
  names = [np.unique(np.asarray(p.groups)[patient_ids.known(p)].astype(str)) for p in parts]
  seen, count = np.unique(np.concatenate(names), return_counts=True)
  found: dict[bytes, tuple[int, str]] = {}
  copies = []
  for i, part in enumerate(parts):
    if PIXELS not in part.columns:
      continue
    for digest, name in zip(part.columns[PIXELS], patient_ids.image_names(part), strict=True):
      at, first = found.setdefault(digest, (i, str(name)))
      if at != i:
        copies.append((first, str(name)))
  return Overlap(seen[count > 1].tolist(), copies)


def repeated(dataset: Dataset) -> int:
  """How many images are copies of an earlier one."""
  return len(dataset) - len(np.unique(dataset.columns[PIXELS])) if PIXELS in dataset.columns else 0


def tied(dataset: Dataset) -> Dataset:
  """The same data with groups joined that share an image, so that dealing never parts copies.

  It only serves to deal: a joined group has the name of one of its patients.
  """
  if not repeated(dataset):
    return dataset
  names, groups = np.unique(dataset.groups, return_inverse=True)
  _, images = np.unique(dataset.columns[PIXELS], return_inverse=True)
  size = len(names) + int(images.max()) + 1
  edges = np.ones(len(dataset)), (groups, len(names) + images)
  _, component = csgraph.connected_components(sparse.coo_matrix(edges, (size, size)), False)
  _, first = np.unique(component[: len(names)], return_index=True)
  leader = names[first[np.searchsorted(np.unique(component[: len(names)]), component[groups])]]
  return dataclasses.replace(dataset, groups=leader)
