"""Reads a data set of MedIMeta by the splits that are published with it (Woerner et al., Scientific
Data 2025, arXiv 2404.16000).

  FOLDER/info.yaml              tasks, and the names of their classes
  FOLDER/images/000000.tiff     all of one size
  FOLDER/task_labels/TASK.npy   the label of each image
  FOLDER/splits/train.txt, val.txt, test.txt   lines such as images/000000.tiff
  FOLDER/original_splits/...    those of the data set that it was made of
  FOLDER/annotations.csv        filepath, original_filepath, and patient_id where it is known
"""

from __future__ import annotations

import csv
import os
import pathlib
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import yaml

from primia_jax.data import decode, folder, layouts, patient_ids, scan
from primia_jax.data.dataset import Dataset
from primia_jax.data.files import read_file

INDEX = "info.yaml"
SPLITS = {"": "splits", "original": "original_splits"}
# Targets whose label is one class; of MedIMeta's others, a label is a grade or several classes.
_TARGETS = ("BINARY_CLASSIFICATION", "MULTICLASS_CLASSIFICATION")
_LINE = re.compile(r"(?:.*/)?images/(\d+)\.tiff?")
_BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)


def read_medimeta(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  task: str = "",
  splits: str = "",
  skip_bad_files: bool = False,
) -> dict[str, Dataset]:
  """Reads a data set's images for one of its tasks, by the published splits.

  Groups are the patients where annotations.csv names them (`patient_id`), or where the original
  files have Kermany's names, as in the data set `pneumonia`; elsewhere patients are unknown.

  Args:
    path: the folder of one data set.
    size, channels, lazy, skip_bad_files: see `folder.read_folder`.
    label_names: the classes in order; by default those of info.yaml. Letter case is ignored.
    task: name of the task; empty takes the only one.
    splits: "" for MedIMeta's own, "original" for those of the source.

  Returns:
    A `Dataset` for each split. Columns: "path", and all of annotations.csv. Images in no split are
    left out, and the notes say how many there are.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file has another form, an image is in two splits, or the task has no classes. The
      message names the file and the cure.
  """
  decode.check_form(size, channels)
  root = pathlib.Path(path)
  names, labels = _task(root, task)
  own = names if label_names is None else tuple(label_names)
  where = [str(root / INDEX)] * len(names)
  labels = folder.label_indices(names, own, where)[labels]
  rows = _splits(root, splits, len(labels))
  files = [f"images/{number:06d}.tiff" for number in range(len(labels))]
  used = np.concatenate(list(rows.values()))
  if lost := [files[i] for i in used.tolist() if not (root / files[i]).is_file()]:
    raise FileNotFoundError(
      f"{root} lacks {len(lost)} images that its splits name, such as {lost[0]}; unpack it again"
    )
  columns = {"path": np.array(files)} | _annotations(root, files)
  original = columns.get("original_filepath", np.array([""] * len(files))).tolist()
  kermany = folder.kermany_patients(original)
  ids = columns.get("patient_id", np.array(kermany)).tolist()
  groups, has_patient = patient_ids.groups(ids, files)
  form: dict[str, Any] = {"size": size, "channels": channels}
  notes = {"splits": f"{SPLITS[splits]} of {root.name}: "
           + ", ".join(f"{len(index)} {name}" for name, index in rows.items())}  # fmt: skip
  if left := len(labels) - len(used):
    notes["images in no split"] = f"{left}, left out"
  read = partial(read_file, root)
  datasets = {
    split: Dataset(
      images=decode.EncodedImages(columns["path"][index], read, str(root), **form),
      labels=labels[index],
      label_names=own,
      groups=groups[index],
      has_patient=has_patient[index],
      columns={name: column[index] for name, column in columns.items()},
      name=f"MedIMeta {root.name}",
      is_numbered="patient_id" not in columns and any(kermany),
      notes=notes,
    )
    for split, index in rows.items()
  }
  return datasets if lazy else scan.read(datasets, skip_bad_files=skip_bad_files)


def _task(root: pathlib.Path, wanted: str) -> tuple[tuple[str, ...], np.ndarray]:
  """The classes of a task, and the label of each image, [N] integers."""
  index = root / INDEX
  if not index.is_file():
    raise FileNotFoundError(f"there is no {index}; name the folder of one data set of MedIMeta")
  try:
    told = yaml.safe_load(index.read_text(encoding="utf-8"))
    tasks = {str(one["task_name"]): one for one in told["tasks"]}
  except (*_BROKEN, yaml.YAMLError) as error:
    raise ValueError(f"{index} has not MedIMeta's form ({error!r}); unpack it again") from error
  if not wanted and len(tasks) != 1:
    raise ValueError(f"{index} has the tasks {sorted(tasks)}; choose one with --task")
  if wanted and wanted not in tasks:
    raise ValueError(f"task={wanted!r}: {index} has {sorted(tasks)}; use one of them")
  name = wanted or next(iter(tasks))
  if (target := tasks[name].get("task_target")) not in _TARGETS:
    raise ValueError(
      f"task={name!r} of {index} is a {target}, and a label must be one class "
      f"({', '.join(_TARGETS)}); choose another task"
    )
  file = root / "task_labels" / f"{name}.npy"
  if not file.is_file():
    raise FileNotFoundError(f"there is no {file}, the labels of the task; unpack it again")
  try:
    classes = tasks[name]["labels"]
    by_number = classes if isinstance(classes, dict) else dict(enumerate(classes))
    names = tuple(str(by_number[k]) for k in range(len(by_number)))
    labels = np.load(file, allow_pickle=False)
    labels = labels.reshape(len(labels)).astype(np.int64, casting="same_kind")
  except _BROKEN as error:
    raise ValueError(
      f"{file}, or the labels of {name!r} in {index}, have not MedIMeta's form ({error!r}); it is "
      "one integer for each image, and a name for each class from 0"
    ) from error
  if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
    raise ValueError(
      f"{file} holds labels {labels.min()} to {labels.max()}, but {index} names {list(names)}"
    )
  return names, labels


def _splits(root: pathlib.Path, which: str, num_images: int) -> dict[str, np.ndarray]:
  """The numbers of the images of each split, in order."""
  if which not in SPLITS:
    raise ValueError(f"splits={which!r}; use original, or leave it out for MedIMeta's own")
  found: dict[str, np.ndarray] = {}
  of: dict[int, str] = {}
  for name in ("train", "val", "test"):
    file = root / SPLITS[which] / f"{name}.txt"
    if not file.is_file():
      continue
    numbers = []
    for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
      match = _LINE.fullmatch(line)
      number = int(match[1]) if match else -1
      if not 0 <= number < num_images:
        raise ValueError(
          f"{file} names {line!r}, which is none of {num_images} images such as images/000000.tiff"
        )
      if number in of:
        raise ValueError(
          f"{file} names {line!r}, which {of[number]}.txt has named before; unpack it again"
        )
      of[number] = name
      numbers.append(number)
    if numbers:
      found[layouts.SPLITS[name]] = np.array(sorted(numbers))
  if "train" not in found or "test" not in found:
    raise FileNotFoundError(
      f"{root / SPLITS[which]} has images for {sorted(found)}; it needs train.txt and test.txt"
    )
  return found


def _annotations(root: pathlib.Path, files: Sequence[str]) -> dict[str, np.ndarray]:
  """The columns of annotations.csv in the order of the images; none where there is no such file."""
  path = root / "annotations.csv"
  if not path.is_file():
    return {}
  try:
    with path.open(newline="", encoding="utf-8-sig") as file:
      rows = {row["filepath"]: row for row in csv.DictReader(file)}
    header = [name for name in next(iter(rows.values())) if name not in ("filepath", "path")]
    return {name: np.array([rows[one][name] or "" for one in files]) for name in header}
  except (*_BROKEN, csv.Error, StopIteration) as error:
    raise ValueError(
      f"{path} has not a row with a filepath for each image ({error!r}); unpack it again"
    ) from error
