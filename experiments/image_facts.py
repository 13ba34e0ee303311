"""What must be known of a run's images before its scores: patients and images at two places, small
sites, what was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from primia_jax.data import overlaps, patient_ids
from primia_jax.data.dataset import Dataset, take
from primia_jax.data.sites import Part

from .configs import Train


def check_overlap(where: str, train: Dataset, test: Dataset) -> None:
  """Refuses patients and images that are in training and testing, which make scores too good.

  Numbers that may start anew in another split are no such patients.

  Raises:
    ValueError: naming the first of them.
  """
  found = overlaps.between((train, test))
  cure = "or go on with --allow_overlap, which the report says"
  if found.patients and not train.is_numbered:
    raise ValueError(
      f"{where}: patients have images in both training and testing: "
      f"{patient_ids.listed(found.patients)}; move all images of each into one split, {cure}"
    )
  if found.images:
    raise ValueError(
      f"{where}: images are in both training and testing: "
      f"{patient_ids.listed(_pairs(found.images))}; remove one of "
      f"each, {cure}"
    )


def check_sizes(config: Train, train: Part) -> None:
  """Refuses a site of fewer images than the floor; where a process knows its own site only, that.

  Raises:
    ValueError: naming the sites, and not how many images they have.
  """
  floor = config.disclosure.fewest_images
  if few := [i for i, n in enumerate(train.sizes) if 0 < n < floor]:
    raise ValueError(
      f"fewest_images={floor}: sites {few} have fewer training images, so that a sum tells too "
      "much of each; leave these sites out, or lower the floor"
    )


def facts(config: Train, train: Part, validation: Part, test: Dataset) -> dict[str, str]:
  """The rows of a report on its images; where a process reads its own site only, of that site's."""
  dataset, h, policy = train.dataset, config.hospitals, config.disclosure.policy()
  listed = lambda names: (
    policy.count(len(names)) if policy.fewest_patients else patient_ids.listed(names)
  )
  pairs = lambda images: listed(_pairs(images))
  written = policy.count if policy.fewest_patients else "{:,}".format
  said_of_patients = patient_ids.described(dataset, written)
  out = {"patients of training images": said_of_patients} if len(dataset) else {}
  out |= dataset.notes
  both = overlaps.between((dataset, test))
  if both.patients and dataset.is_numbered:
    out["numbers of patients in training and testing"] = (
      f"{listed(both.patients)}: the same patients, or others if numbers start anew"
    )
  elif both.patients:
    out["PATIENTS IN TRAINING AND TESTING"] = str(listed(both.patients))
  if both.images:
    out["IMAGES IN TRAINING AND TESTING"] = str(pairs(both.images))
  if copies := overlaps.repeated(dataset):
    out["training images that copy another"] = f"{policy.count(copies)} of {len(dataset)}"
  here = lambda one: one[(one >= 0) & (one < len(dataset))]  # others are not in this process
  rows = [here(one) for one in train.sites]
  kind, _, argument = h.partition.partition(":")
  column = argument if kind == "column" else "site" if kind == "auto" else ""
  if column in dataset.columns and config.data.data != "phantom":
    names = [f"{i}: {dataset.columns[column][r[0]]}" for i, r in enumerate(rows) if len(r)]
    out["sites"] = ", ".join(names)
  if validation.dataset is dataset:  # the phantom's are no part of the training images
    held = [here(one) for one in validation.sites]
    rows = [np.concatenate(pair) for pair in zip(rows, held, strict=True)]
  no_images = np.zeros((len(dataset), 1, 1, 1), np.uint8)
  bare = dataclasses.replace(dataset, images=no_images, masks=None)
  if config.data.sources and len(dataset):  # `join` has numbered them
    bare = dataclasses.replace(bare, groups=np.strings.partition(bare.groups, "/")[2])
  shared = overlaps.between([take(bare, one) for one in rows])
  if shared.patients:
    if config.data.sources:
      out["names of patients in several sources"] = (
        f"{listed(shared.patients)}, counted as different patients"
      )
    else:
      out["patients of training images"] = "known"
      out["patients at several sites"] = str(listed(shared.patients))
  if shared.images:
    out["images at several sites"] = str(pairs(shared.images))
  is_told = not policy.fewest_patients
  for i, one in enumerate(rows):
    said = []
    kinds = np.unique(dataset.labels[one])
    if len(kinds) == 1 and dataset.masks is None and not dataset.is_multi:
      said.append(f"images of one class only, {dataset.label_names[kinds[0]]}")
    if config.privacy.validates and len(one) and not validation.sizes[i]:
      said.append("none is held out for validation" + ", since all are of one patient" * is_told)
    if said:
      number = policy.count(len(one))
      out[f"site {i}"] = f"{number} image{'s' * (len(one) > 1)}; {'; '.join(said)}"
  if config.in_processes and config.data.sources:
    out["other sites"] = "not read by this process, so that these rows are of its own site alone"
  if config.privacy.dp != "none":
    out["not protected"] = "these rows are exact, and no ledger was charged for them"
  return out


def _pairs(images: Sequence[tuple[str, str]]) -> list[str]:
  return [f"{one} = {other}" for one, other in images]
