"""Folders of images, or uncompressed tar archives of them read in place: one folder a class, or no
classes at all.
"""

from __future__ import annotations

import os
import pathlib
import posixpath
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from primia_jax.data import decode, dicom
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
  """What the names of the files say of each image; all arrays are [N]."""

  files: Files
  label_names: tuple[str, ...]
  paths: np.ndarray  # relative to the root
  splits: np.ndarray  # "train", "validation", "test", or "all" where there are no split folders
  labels: np.ndarray  # int32
  groups: np.ndarray
  folders: np.ndarray  # the path's folders other than split and class; "" where there are none


def read_folder(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
) -> dict[str, Dataset]:
  """Reads labelled images, one folder a class.

  The layout is `[SPLIT/]CLASS/**/IMAGE`, with SPLIT one of train, val, valid, validation and test;
  folders above SPLIT and below CLASS go to the column "folder" (e.g. a site). A single folder
  around everything is looked through. In the Kermany layout (NORMAL, PNEUMONIA, and names such as
  `person1_virus_6.jpeg`) the classes are `KERMANY_LABELS`, unless `label_names` holds "pneumonia".
  Dot files and `files.JUNK` are ignored; any other file that is no image is an error.

  Groups: in the Kermany layout (class, number), since numbers recur in other classes for other
  patients; the patient ID where DICOM headers tell at least two patients apart; otherwise each
  image is a group of its own.

  Args:
    path: a folder, or a `.tar` (not compressed), which is read in place.
    size: height and width, in pixels; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB).
    label_names: the classes in order, e.g. a checkpoint's; by default the class folders, sorted.
      Letter case is ignored.
    lazy: decode on demand instead of now, for images that do not fit in memory; errors then come
      late, too.
    percentiles: for grey DICOM only, see `dicom.read`.
    ignore: further files and folders to ignore, e.g. `["*.csv"]`.

  Returns:
    A `Dataset` for each split there is, else {"all": ...}, with the columns "path" and "folder".

  Raises:
    FileNotFoundError: if there is no such folder or tar.
    ValueError: for an empty folder, a corrupt file, a file that is no image or in no class, or an
      unknown class.
  """
  decode.check_form(size, channels)
  listing = list_folder(path, label_names=label_names, ignore=ignore)
  datasets = {}
  for split in dict.fromkeys([*SPLITS.values(), "all"]):
    index = np.flatnonzero(listing.splits == split)
    if not len(index):
      continue
    datasets[split] = Dataset(
      images=_images(listing.files, listing.paths[index], size, channels, percentiles, lazy),
      labels=listing.labels[index],
      label_names=listing.label_names,
      groups=listing.groups[index],
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
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
) -> tuple[np.ndarray, Images]:
  """Reads images without labels, e.g. to predict them: every image at any depth of a folder or tar,
  or one image file.

  Args: as for `read_folder`.

  Returns:
    The paths relative to `path`, [N] strings, sorted; and the images, uint8 [N, size, size,
    channels].

  Raises: as `read_folder`.
  """
  decode.check_form(size, channels)
  files = list_files(path, ignore)
  paths = np.array(files.names)
  return paths, _images(files, paths, size, channels, percentiles, lazy)


def list_folder(
  path: str | os.PathLike[str],
  *,
  label_names: Sequence[str] | None = None,
  ignore: Sequence[str] = (),
) -> Listing:
  """Reads from the names of the files what `read_folder` says, without decoding them; raises as
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
    groups = [
      f"{kind}/{int(match['person'] or match['number3'] or match['number'])}" if match else name
      for name, kind, match in zip(files.names, classes, matches, strict=True)
    ]
  else:
    groups = _patients(files)
  return Listing(
    files,
    names,
    np.array(files.names),
    np.array(splits),
    labels,
    np.array(groups),
    np.array(folders),
  )


def label_index(kind: str, label_names: tuple[str, ...], where: str) -> int:
  """Returns the index of a class among the label names, letter case ignored unless that is
  ambiguous.

  Args:
    kind: the class.
    label_names: the known classes.
    where: the file that is of this class, for the error message.

  Raises:
    ValueError: if the class is none of the known ones.
  """
  if kind in label_names:
    return label_names.index(kind)
  lower = [known.lower() for known in label_names]
  if lower.count(kind.lower()) == 1:
    return lower.index(kind.lower())
  raise ValueError(
    f"class {kind!r} of {where} is none of the known classes {label_names}; rename it to one of "
    f"them, or take it out"
  )


def _images(files: Files, paths: np.ndarray, size, channels, percentiles, lazy: bool) -> Images:
  images = decode.EncodedImages(paths, files.read, files.root, size, channels, percentiles)
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
      f"{files.root} has split folders (train, validation, test), but {stray} lies in none; move it"
    )
  start = 0  # where the class folder is, without splits
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
        f"{files.root}/{name} lies in no class folder; move it into one "
        f"(CLASS/{posixpath.basename(name)})"
      )
    splits.append("all" if i is None else SPLITS[p[i].lower()])
    classes.append(p[at])
    folders.append("/".join([*p[: start if i is None else i], *p[at + 1 :]]))
  return splits, classes, folders


def _kermany_class(files: Files, name: str, folder: str, match: re.Match[str] | None) -> str:
  """Returns the class that the Kermany file name tells."""
  if folder.upper() == "NORMAL":
    return "normal"
  kind = match and (match["kind"] or match["kind3"])
  if not kind:
    raise ValueError(
      f"{files.root}/{name} is named neither bacterial (person1_bacteria_2) nor viral "
      f"(person1_virus_2), as others "
      'are; rename it, or take pneumonia as one class by label_names=("normal", "pneumonia")'
    )
  return _KINDS[kind.lower()]


def _default_names(files: Files, classes: Sequence[str], is_kermany: bool) -> tuple[str, ...]:
  """Returns the label names where the caller gives none."""
  names = sorted(set(classes))
  lower = [name.lower() for name in names]
  if is_kermany or set(lower) == set(KERMANY_LABELS):
    return KERMANY_LABELS
  twice = [name for name in names if lower.count(name.lower()) > 1]
  if twice:
    raise ValueError(
      f"class folders {twice} of {files.root} differ in letter case only; merge or rename them"
    )
  return tuple(names)


def _patients(files: Files) -> list[str]:
  """Returns each file's patient where DICOM headers tell at least two apart, else its own name."""
  suffixes = (*dicom.SUFFIXES, "")
  ids = ["" for _ in files.names]
  for i, name in enumerate(files.names):
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in suffixes or suffix[1:].isdigit():
      data = files.read(name)
      ids[i] = dicom.patient_id(data, f"{files.root}/{name}") if dicom.is_dicom(data) else ""
  if len(set(ids) - {""}) < 2:  # one ID for all is an anonymiser's, and none tells nothing
    return list(files.names)
  return [f"patient/{one}" if one else name for one, name in zip(ids, files.names, strict=True)]
