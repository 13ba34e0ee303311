"""Loads the data sets that a string such as the flag `--data` names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from primia_jax.data import decode, folder, labels_csv, medimeta, npz, patient_ids, volumes
from primia_jax.data.dataset import Dataset

KINDS = ("folder", "csv", "npz", "msd", "medimeta", "tfds")


def load(
  spec: str,
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  ct_window: tuple[float, float] | None = None,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
  data_dir: str | os.PathLike[str] | None = None,
  manual_dir: str | os.PathLike[str] | None = None,
  patient_column: str = "",
  patient_pattern: str = "",
  layout: str = "",
  csv_columns: Mapping[str, str] | None = None,
  grey_bits: int = 0,
  skip_bad_files: bool = False,
  slices: str = "all",
  is_multi: bool = False,
  label_columns: Sequence[str] = (),
  task: str = "",
  splits: str = "",
) -> dict[str, Dataset]:
  """Loads labelled images.

  Args:
    spec: `folder:PATH` (a folder or a tar), `csv:PATH` (a table of files and labels), `npz:PATH`,
      `msd:PATH` (volumes with masks, see `volumes`), `medimeta:PATH` (see `medimeta`), or
      `tfds:NAME`.
    size: height and width, in pixels; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB).
    label_names: the classes in order, e.g. a checkpoint's; by default the source's own. Images of
      any other class are an error. (An npz file has no names of its own.)
    lazy: decode on demand instead of now; see `scan.read`. An npz file is always in memory.
    ct_window: for folders and tables of CT images as DICOM, all others being refused with it; see
      `dicom.read`; and for volumes.
    percentiles: for grey DICOM only; see `dicom.read`.
    ignore: for folders: files to ignore, e.g. `["*.csv"]`.
    data_dir: for TFDS: the folder of the prepared data sets.
    manual_dir: for TFDS: the folder of the images that our own builders prepare.
    patient_column: the column that holds each image's patient; see `patient_ids.from_column`.
    patient_pattern: or what finds it in file names; see `patient_ids.from_names`. By default the
      groups of the source, which are patients where it names these.
    layout: for folders: what they mean; see `layouts.levels`.
    csv_columns: for a CSV: names of its columns; see `labels_csv.read_csv`.
    grey_bits, skip_bad_files: for folders and a CSV; see `scan.read`.
    slices: of volumes; see `volumes.read_msd`.
    is_multi, label_columns: for a CSV: images with several labels; see `labels_csv.read_csv`.
    task, splits: of MedIMeta; see `medimeta.read_medimeta`.

  Returns:
    A `Dataset` for each split in the source: "train", "validation", "test". A folder without split
    folders gives "all" instead; the caller splits it by group.

  Raises:
    FileNotFoundError: the source does not exist.
    ValueError: the spec has another form, or something in the source is wrong, e.g. there is a
      single class or a name of two. The message names the file and the cure.
  """
  kind, _, where = spec.partition(":")
  if kind not in KINDS or not where:
    raise ValueError(
      f"data={spec!r}; it must be folder:PATH, csv:PATH, npz:PATH, msd:PATH, medimeta:PATH or "
      "tfds:NAME"
    )
  if patient_column and patient_pattern:
    raise ValueError(
      f"patient_column={patient_column!r} and patient_pattern={patient_pattern!r}: give one of them"
    )
  if patient_pattern:
    patient_ids.compiled(patient_pattern)
  if ct_window is not None and kind not in ("folder", "csv", "msd"):
    raise ValueError(f"ct_window={ct_window}: {spec} holds no DICOM files; leave it out")
  form: dict[str, Any] = {"size": size, "channels": channels, "label_names": label_names}
  of_files: dict[str, Any] = {
    "lazy": lazy, "ct_window": ct_window, "percentiles": percentiles, "grey_bits": grey_bits,
    "skip_bad_files": skip_bad_files,
  }  # fmt: skip
  path = os.path.expanduser(where)
  if kind == "folder":
    found = folder.read_folder(path, ignore=ignore, layout=layout, **of_files, **form)
  elif kind == "csv":
    found = labels_csv.read_csv(
      path, columns=csv_columns, is_multi=is_multi, label_columns=label_columns, **of_files, **form
    )
  elif kind == "npz":
    found = npz.read_npz(path, **form)
  elif kind == "msd":
    found = volumes.read_msd(path, ct_window=ct_window, slices=slices, **form)
  elif kind == "medimeta":
    found = medimeta.read_medimeta(
      path, task=task, splits=splits, lazy=lazy, skip_bad_files=skip_bad_files, **form
    )
  else:
    from primia_jax.data import tfds  # here, because the import takes a second

    found = tfds.read_tfds(where, lazy=lazy, data_dir=data_dir, manual_dir=manual_dir, **form)
  _check_classes(spec, next(iter(found.values())).label_names)
  if patient_column:
    return patient_ids.from_column(found, patient_column)
  return patient_ids.from_names(found, patient_pattern) if patient_pattern else found


def _check_classes(spec: str, label_names: Sequence[str]) -> None:
  if len(label_names) < 2:
    raise ValueError(
      f"data={spec} has the single class {list(label_names)}, and there is nothing to tell apart; "
      "give all classes in --label_names if these images are of one of them"
    )
  if twice := sorted({name for name in label_names if list(label_names).count(name) > 1}):
    raise ValueError(f"data={spec}: {twice} each name several classes; give each its own name")
