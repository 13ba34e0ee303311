"""Loads the data sets that a string such as the flag `--data` names."""

from __future__ import annotations

import os
from collections.abc import Sequence

from primia_jax.data import decode, folder, npz
from primia_jax.data.dataset import Dataset


def load(
  spec: str,
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
  data_dir: str | os.PathLike[str] | None = None,
  manual_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Dataset]:
  """Loads labelled images.

  Args:
    spec: `folder:PATH` (a folder or a tar), `npz:PATH`, or `tfds:NAME`.
    size: height and width, in pixels; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB).
    label_names: the classes in order, e.g. a checkpoint's; by default the source's own. Images of
      any other class are an error. (An npz file has no names of its own.)
    lazy: decode on demand instead of now. An npz file is always in memory.
    percentiles: for grey DICOM only; see `dicom.read`.
    ignore: for folders: files to ignore, e.g. `["*.csv"]`.
    data_dir: for TFDS: the folder of the prepared data sets.
    manual_dir: for TFDS: the folder of the images that our own builders prepare.

  Returns:
    A `Dataset` for each split in the source: "train", "validation", "test". A folder without split
    folders gives "all" instead; the caller splits it by group.

  Raises:
    FileNotFoundError: the source does not exist.
    ValueError: the spec has another form, or something in the source is wrong. The message names
      the file and the cure.
  """
  kind, _, where = spec.partition(":")
  if kind not in ("folder", "npz", "tfds") or not where:
    raise ValueError(f"data={spec!r}; it must be folder:PATH, npz:PATH or tfds:NAME")
  if kind == "folder":
    return folder.read_folder(
      os.path.expanduser(where),
      size=size,
      channels=channels,
      label_names=label_names,
      lazy=lazy,
      percentiles=percentiles,
      ignore=ignore,
    )
  if kind == "npz":
    return npz.read_npz(
      os.path.expanduser(where), size=size, channels=channels, label_names=label_names
    )
  from primia_jax.data import tfds  # here, because the import takes a second

  return tfds.read_tfds(
    where,
    size=size,
    channels=channels,
    label_names=label_names,
    lazy=lazy,
    data_dir=data_dir,
    manual_dir=manual_dir,
  )
