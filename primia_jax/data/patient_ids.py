"""Whose each image is: patients that a source names, a column holds, or file names tell.

Patients are named alike over all of a source: the same name at two sites is the same patient.
Images whose patient is unknown are groups of their own, which is enough to deal them out, but no
unit of privacy.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from primia_jax.data.dataset import Dataset

_SHOWN = 5  # names in a message


def groups(
  values: Sequence | np.ndarray, own: Sequence[str] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Groups of images from the names of their patients.

  Args:
    values: [N] texts or numbers; an empty text or NaN where the patient is unknown.
    own: [N] a name for each image, which is its group there.

  Returns:
    The groups [N], and whether they are patients: bool [N].
  """
  values = np.asarray(values)
  if np.issubdtype(values.dtype, np.bytes_):
    values = np.char.decode(values)
  missing = np.zeros(len(values), bool)
  if np.issubdtype(values.dtype, np.floating):
    missing = np.isnan(values)
  elif np.issubdtype(values.dtype, np.str_):
    missing = np.char.strip(values) == ""
  if missing.any():
    values = np.where(missing, np.asarray(own, str), values.astype(str))
  return values, ~missing


def from_column(splits: Mapping[str, Dataset], column: str) -> dict[str, Dataset]:
  """Takes each image's patient from a column.

  Args:
    splits: data sets of one source.
    column: a name in `Dataset.columns`, e.g. "folder" where each patient has a folder.

  Raises:
    ValueError: a split has no such column of one text or number an image, or images have no value.
  """
  found, unnamed = {}, []
  for split, dataset in splits.items():
    values = np.asarray(dataset.columns.get(column, np.zeros((0, 0))))
    if values.ndim != 1:
      raise ValueError(
        f"patient_column={column!r}: the {split} split of {dataset.name!r} has no such column of "
        f"one text or number an image; its columns are {sorted(dataset.columns)}"
      )
    names, is_named = groups(values, image_names(dataset))
    unnamed += image_names(dataset)[~is_named].tolist()
    found[split] = dataclasses.replace(
      dataset, groups=names, has_patient=is_named, is_numbered=False
    )
  if unnamed:
    raise ValueError(
      f"patient_column={column!r} is empty for {listed(unnamed)}; name their patients, or remove "
      "them"
    )
  return found


def from_names(splits: Mapping[str, Dataset], pattern: str) -> dict[str, Dataset]:
  r"""Takes each image's patient from its file name.

  Args:
    splits: data sets of one source, with a column "path".
    pattern: a regular expression, searched in the path of each image below the source's root; its
      one group is the patient, e.g. r"(person\d+)_". Where names repeat in several folders, take
      these in: r"(site\d/person\d+)_".

  Raises:
    ValueError: another pattern, a source without file names, or files that do not match.
  """
  expression, found, unnamed = compiled(pattern), {}, []
  for split, dataset in splits.items():
    if "path" not in dataset.columns:
      raise ValueError(
        f"patient_pattern={pattern!r}: {dataset.name!r} holds no file names; use patient_column, "
        f"of {sorted(dataset.columns)}"
      )
    paths = [str(path) for path in dataset.columns["path"]]
    matches = [expression.search(path) for path in paths]
    names = [(match and match[1]) or "" for match in matches]
    unnamed += [path for path, name in zip(paths, names, strict=True) if not name]
    known = np.ones(len(paths), bool)
    found[split] = dataclasses.replace(
      dataset, groups=np.array(names), has_patient=known, is_numbered=False
    )
  if unnamed:
    raise ValueError(
      f"patient_pattern={pattern!r} finds no patient in {listed(unnamed)}; widen the pattern, or "
      "rename or remove them"
    )
  return found


def compiled(pattern: str) -> re.Pattern[str]:
  """The regular expression of `from_names`; raises a ValueError unless it has one group."""
  try:
    expression = re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"patient_pattern={pattern!r} is not a regular expression ({error}); use one such as "
      r"(person\d+)_"
    ) from error
  if expression.groups != 1:
    raise ValueError(
      f"patient_pattern={pattern!r} has {expression.groups} groups; put the patient, and nothing "
      r"else, in parentheses, such as (person\d+)_, and write other groups as (?:...)"
    )
  return expression


def require(dataset: Dataset, index: np.ndarray | None = None) -> None:
  """Checks that images' patients are known, as patient-level privacy needs: otherwise one patient's
  images would be several units, at several sites.

  Args:
    dataset: N images.
    index: which of them to check; None for all.

  Raises:
    ValueError: naming the first images whose patient is unknown, and the cure.
  """
  index = np.arange(len(dataset)) if index is None else index
  unknown = np.sort(index[~known(dataset)[index]])
  if len(unknown):
    names = listed(image_names(dataset)[unknown].tolist())
    raise ValueError(
      f"{dataset.name!r} does not tell the patients of its images, {names}, so each would count as "
      f"a patient; set patient_column (columns are {sorted(dataset.columns)}), or patient_pattern, "
      r"a regular expression on file names such as (person\d+)_, or give DICOM files with a "
      "PatientID; dp=example protects single images instead"
    )


def described(dataset: Dataset, count: Callable[[int], object] = "{:,}".format) -> str:
  """What a report says of patients; `count` writes a number of images, or that it is suppressed."""
  if unknown := int(np.sum(~known(dataset))):
    return (
      f"unknown for {count(unknown)} of {len(dataset):,} images: each of these counts as a "
      "patient, so images of one person may be at several sites, or in training and testing"
    )
  return "known: no patient's images are split between sites, or training and validation"


def known(dataset: Dataset) -> np.ndarray:
  """Whether the patient of each image is known: bool [N]."""
  has_patient = dataset.has_patient
  return np.zeros(len(dataset), bool) if has_patient is None else has_patient


def image_names(dataset: Dataset) -> np.ndarray:
  """What messages call each image: its path, or its number; [N] strings."""
  numbers = np.char.add("image ", np.arange(len(dataset)).astype(str))
  return np.asarray(dataset.columns.get("path", numbers)).astype(str)


def listed(names: Sequence[str]) -> str:
  """The number of names, and the first of them."""
  more = ", ..." if len(names) > _SHOWN else ""
  return f"{len(names)} ({', '.join(names[:_SHOWN])}{more})"
