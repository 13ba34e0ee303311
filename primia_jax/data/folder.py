"""Reads images from a folder, or from an uncompressed tar archive in place: with a folder for each
class, or without classes.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from primia_jax.data import decode, dicom, patient_ids
from primia_jax.data.dataset import Dataset, Images
from primia_jax.data.files import Files, list_files

KERMANY_LABELS = ("normal", "bacterial", "viral")
SPLITS = {
  "train": "train",
  "val": "validation",
  "valid": "validation",
  "validation": "validation",
  "test": "test",
}

# person12_virus_34.jpeg, IM-0115-0001.jpeg, NORMAL2-IM-0383-0001.jpeg; the third edition:
# BACTERIA-1008087-0001.jpeg
_KERMANY = re.compile(
  r"person(?P<person>\d+)_(?P<kind>bacteria|virus)_|(?P<kind3>BACTERIA|VIRUS)-(?P<number3>\d+)-"
  r"|(?:NORMAL-|(?:NORMAL2-)?IM-)(?P<number>\d+)-"
)
_KINDS = {"bacteria": "bacterial", "virus": "viral"}


class Listing(NamedTuple):
  """What file names tell about each image; all arrays are [N]."""

  files: Files
  label_names: tuple[str, ...]
  paths: np.ndarray  # relative to the root
  splits: np.ndarray  # "train", "validation", "test", or "all" without split folders
  labels: np.ndarray  # int32
  groups: np.ndarray
  has_patient: np.ndarray  # bool; elsewhere a group is one image, named by its path
  folders: np.ndarray  # the path's folders other than split and class; "" if there are none


def read_folder(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  ct_window: tuple[float, float] | None = None,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
) -> dict[str, Dataset]:
  """Reads labelled images from a folder for each class.

  The layout is `[SPLIT/]CLASS/**/IMAGE`, where SPLIT is train, val, valid, validation or test. The
  column "folder" holds the folders above SPLIT and below CLASS (e.g. a site). A single folder that
  contains everything is skipped. In the Kermany layout (NORMAL, PNEUMONIA, and names such as
  `person1_virus_6.jpeg`) the classes are `KERMANY_LABELS`, unless `label_names` contains
  "pneumonia". Dot files and `files.JUNK` are ignored; any other file that is not an image is an
  error.

  In the Kermany layout the groups are (class, number), because the same number in another class is
  another patient. If DICOM headers name at least two patients, the groups are patient IDs.
  Otherwise each image is its own group, and its patient is unknown.

  Args:
    path: a folder, or an uncompressed `.tar`, which is read in place.
    size: height and width, in pixels; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB).
    label_names: the classes in order, e.g. a checkpoint's; by default the sorted class folders.
      Letter case is ignored.
    lazy: decode on demand instead of now, for images that do not fit in memory. Errors in images
      then also come later.
    ct_window: for CT images as DICOM, all others being refused with it; see `dicom.read`.
    percentiles: for grey DICOM only; see `dicom.read`.
    ignore: further files and folders to ignore, e.g. `["*.csv"]`.

  Returns:
    A `Dataset` for each split, or {"all": ...} without split folders. Columns: "path" and "folder".

  Raises:
    FileNotFoundError: there is no such folder or tar.
    ValueError: the folder is empty, a file is corrupt, not an image or in no class folder, or a
      class is unknown.
  """
  decode.check_form(size, channels)
  listing = list_folder(path, label_names=label_names, ignore=ignore)
  datasets = {}
  for split in dict.fromkeys([*SPLITS.values(), "all"]):
    index = np.flatnonzero(listing.splits == split)
    if not len(index):
      continue
    datasets[split] = Dataset(
      images=_images(
        listing.files, listing.paths[index], size, channels, percentiles, ct_window, lazy
      ),
      labels=listing.labels[index],
      label_names=listing.label_names,
      groups=listing.groups[index],
      has_patient=listing.has_patient[index],
      columns={"path": listing.paths[index], "folder": listing.folders[index]},
      name=pathlib.PurePath(listing.files.root).name,
    )
  return datasets


def read_images(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  lazy: bool = False,
  ct_window: tuple[float, float] | None = None,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
) -> tuple[np.ndarray, Images]:
  """Reads images without labels, e.g. for prediction: all images at any depth of a folder or tar,
  or one image file.

  Takes the arguments of `read_folder` and raises the same errors.

  Returns:
    The sorted paths relative to `path`, [N] strings; and the images, uint8 [N, size, size,
    channels].
  """
  decode.check_form(size, channels)
  files = list_files(path, ignore)
  paths = np.array(files.names)
  return paths, _images(files, paths, size, channels, percentiles, ct_window, lazy)


def list_folder(
  path: str | os.PathLike[str],
  *,
  label_names: Sequence[str] | None = None,
  ignore: Sequence[str] = (),
) -> Listing:
  """Derives what `read_folder` describes from file names alone, without decoding images. Raises as
  `read_folder`.
  """
  files = list_files(path, ignore)
  splits, classes, folders = _places(files, label_names)
  matches = [_KERMANY.match(posixpath.basename(name)) for name in files.names]
  wants_pneumonia = label_names is not None and "pneumonia" in {
    name.lower() for name in label_names
  }
  is_kermany = (
    {name.upper() for name in classes} <= {"NORMAL", "PNEUMONIA"}
    and any(matches)
    and not wants_pneumonia
  )
  if is_kermany:
    classes = [
      _kermany_class(files, *one) for one in zip(files.names, classes, matches, strict=True)
    ]
  names = (
    tuple(label_names) if label_names is not None else _default_names(files, classes, is_kermany)
  )
  labels = np.array(
    [
      label_index(kind, names, f"{files.root}/{name}")
      for name, kind in zip(files.names, classes, strict=True)
    ],
    np.int32,
  )
  if is_kermany:
    ids = [
      f"{kind}/{int(match['person'] or match['number3'] or match['number'])}" if match else ""
      for kind, match in zip(classes, matches, strict=True)
    ]
  else:
    ids = _dicom_patients(files)
  return Listing(
    files,
    names,
    np.array(files.names),
    np.array(splits),
    labels,
    *patient_ids.groups(ids, files.names),
    np.array(folders),
  )


def label_index(kind: str, label_names: tuple[str, ...], where: str) -> int:
  """Returns the index of a class among the label names, ignoring letter case unless that is
  ambiguous.

  Args:
    kind: the class.
    label_names: the known classes.
    where: a file of this class, for the error message.

  Raises:
    ValueError: the class is unknown.
  """
  if kind in label_names:
    return label_names.index(kind)
  lower = [known.lower() for known in label_names]
  if lower.count(kind.lower()) == 1:
    return lower.index(kind.lower())
  raise ValueError(
    f"class {kind!r} of {where} is not one of the known classes {label_names}; rename it to one of "
    "them, or remove it"
  )


def _images(
  files: Files, paths: np.ndarray, size, channels, percentiles, ct_window, lazy: bool
) -> Images:
  form = size, channels, percentiles, ct_window
  images = decode.EncodedImages(paths, files.read, files.root, *form)
  return images if lazy else images[np.arange(len(paths))]


def _places(
  files: Files, label_names: Sequence[str] | None
) -> tuple[list[str], list[str], list[str]]:
  """Returns the split, the class folder and the other folders of each file."""
  parts = [name.split("/")[:-1] for name in files.names]
  where = [next((i for i, part in enumerate(p) if part.lower() in SPLITS), None) for p in parts]
  has_split = [i is not None for i in where]
  if any(has_split) and not all(has_split):
    stray = files.names[has_split.index(False)]
    raise ValueError(
      f"{files.root} has split folders (train, validation, test), but {stray} is in none; move it"
    )
  start = 0  # the depth of the class folders if there are no splits
  known = {name.lower() for name in label_names or ()}
  while (
    not any(has_split) and min(map(len, parts)) > start + 1 and len({p[start] for p in parts}) == 1
  ):
    if parts[0][start].lower() in known:
      break
    start += 1
  splits, classes, folders = [], [], []
  for name, p, i in zip(files.names, parts, where, strict=True):
    at = start if i is None else i + 1
    if at >= len(p):
      raise ValueError(
        f"{files.root}/{name} is in no class folder; move it into one "
        f"(CLASS/{posixpath.basename(name)})"
      )
    splits.append("all" if i is None else SPLITS[p[i].lower()])
    classes.append(p[at])
    folders.append("/".join([*p[: start if i is None else i], *p[at + 1 :]]))
  return splits, classes, folders


def _kermany_class(files: Files, name: str, folder: str, match: re.Match[str] | None) -> str:
  """Returns the class that a Kermany file name encodes."""
  if folder.upper() == "NORMAL":
    return "normal"
  kind = match and (match["kind"] or match["kind3"])
  if not kind:
    raise ValueError(
      f"{files.root}/{name} is named neither bacterial (person1_bacteria_2) nor viral "
      "(person1_virus_2), unlike other files; rename it, or make pneumonia one class with "
      'label_names=("normal", "pneumonia")'
    )
  return _KINDS[kind.lower()]


def _default_names(files: Files, classes: Sequence[str], is_kermany: bool) -> tuple[str, ...]:
  """Returns the default label names."""
  names = sorted(set(classes))
  lower = [name.lower() for name in names]
  if is_kermany or set(lower) == set(KERMANY_LABELS):
    return KERMANY_LABELS
  twice = [name for name in names if lower.count(name.lower()) > 1]
  if twice:
    raise ValueError(
      f"class folders {twice} of {files.root} differ only in letter case; merge or rename them"
    )
  return tuple(names)


def _dicom_patients(files: Files) -> list[str]:
  """Returns the patient of each file if DICOM headers name at least two patients; "" otherwise."""
  suffixes = (*dicom.SUFFIXES, "")
  ids = ["" for _ in files.names]
  for i, name in enumerate(files.names):
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in suffixes or suffix[1:].isdigit():
      data = files.read(name)
      ids[i] = dicom.patient_id(data, f"{files.root}/{name}") if dicom.is_dicom(data) else ""
  if len(set(ids) - {""}) < 2:  # a single ID for all files comes from an anonymiser
    return ["" for _ in ids]
  return [f"patient/{one}" if one else "" for one in ids]
