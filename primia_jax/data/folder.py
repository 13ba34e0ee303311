"""Reads images from a folder, or from an uncompressed tar archive in place: with a folder for each
class, or without classes.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import posixpath
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.data import decode, dicom, layouts, patient_ids, scan
from primia_jax.data.dataset import Dataset, Images
from primia_jax.data.files import Files, list_files, them, these

KERMANY_LABELS = ("normal", "bacterial", "viral")

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
  sites: np.ndarray  # "" where folders tell none
  layout: str  # as given or recognised
  is_numbered: bool  # see `Dataset`


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
  layout: str = "",
  grey_bits: int = 0,
  skip_bad_files: bool = False,
) -> dict[str, Dataset]:
  """Reads labelled images from a folder for each class.

  The layout is `[SITE/][SPLIT/]CLASS/**/IMAGE`, where SPLIT is one of `layouts.SPLITS` in any
  letter case, or is given. Folders that may be sites or classes are refused. The column "folder"
  holds the folders above SPLIT and below CLASS. A single folder that contains everything is
  skipped. In the Kermany layout (NORMAL, PNEUMONIA, and names such as `person1_virus_6.jpeg`) the
  classes are `KERMANY_LABELS`, unless `label_names` contains "pneumonia". Dot files and
  `files.JUNK` are ignored; any other file that is not an image is an error.

  Groups are the folders of patients where the layout has them; else in the Kermany layout (class,
  number), because the same number in another class is another patient; else patient IDs if DICOM
  headers name at least two patients. Otherwise each image is its own group, and its patient is
  unknown.

  Args:
    path: a folder, or an uncompressed `.tar`, which is read in place.
    size: height and width, in pixels; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB).
    label_names: the classes in order, e.g. a checkpoint's; by default the sorted class folders.
      Letter case is ignored.
    lazy: decode on demand instead of now. `scan.read` then finds bad files and the bits of 16-bit
      images.
    ct_window: for CT images as DICOM, all others being refused with it; see `dicom.read`.
    percentiles: for grey DICOM only; see `dicom.read`.
    ignore: further files and folders to ignore, e.g. `["*.csv"]`; with a slash, paths.
    layout: what folders mean, from the root to the image; see `layouts.levels`.
    grey_bits: that 16-bit grey images use; by default what `scan.read` finds.
    skip_bad_files: see `scan.read`.

  Returns:
    A `Dataset` for each split, or {"all": ...} without split folders. Columns: "path", "folder",
    and "site" where folders tell it.

  Raises:
    FileNotFoundError: there is no such folder or tar.
    ValueError: the folder is empty, files are corrupt, no images or in no class folder, a class is
      unknown, or folders may be classes or not. All such files are named.
  """
  decode.check_form(size, channels)
  listing = list_folder(path, label_names=label_names, ignore=ignore, layout=layout)
  columns = {"path": listing.paths, "folder": listing.folders}
  if listing.sites.any():
    columns["site"] = listing.sites
  form: dict[str, Any] = {
    "size": size, "channels": channels, "percentiles": percentiles, "ct_window": ct_window,
    "grey_bits": grey_bits,
  }  # fmt: skip
  datasets = {}
  for split in dict.fromkeys([*layouts.SPLITS.values(), "all"]):
    index = np.flatnonzero(listing.splits == split)
    if not len(index):
      continue
    datasets[split] = Dataset(
      images=decode.EncodedImages(
        listing.paths[index], listing.files.read, listing.files.root, **form
      ),
      labels=listing.labels[index],
      label_names=listing.label_names,
      groups=listing.groups[index],
      has_patient=listing.has_patient[index],
      columns={name: column[index] for name, column in columns.items()},
      name=pathlib.PurePath(listing.files.root).name,
      is_numbered=listing.is_numbered,
      notes={"folders": listing.layout},
    )
  return datasets if lazy else scan.read(datasets, skip_bad_files=skip_bad_files)


def read_images(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  lazy: bool = False,
  ct_window: tuple[float, float] | None = None,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  ignore: Sequence[str] = (),
  grey_bits: int = 0,
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
  images = decode.EncodedImages(
    paths, files.read, files.root, size, channels, percentiles, ct_window, grey_bits
  )
  return paths, images if lazy else scan.read({"all": unlabelled(paths, images)})["all"].images


def unlabelled(paths: np.ndarray, images: Images, label_names: Sequence[str] = ("",)) -> Dataset:
  """Images without labels as a data set, with 0 for a label."""
  return Dataset(images, np.zeros(len(paths), np.int32), tuple(label_names), paths, {"path": paths})


def list_folder(
  path: str | os.PathLike[str],
  *,
  label_names: Sequence[str] | None = None,
  ignore: Sequence[str] = (),
  layout: str = "",
) -> Listing:
  """Derives what `read_folder` describes from file names alone, without decoding images. Raises as
  `read_folder`.
  """
  files = list_files(path, ignore)
  places = layouts.places(files, layout, label_names)
  classes = places.classes
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
    classes = _kermany_classes(files, classes, matches)
  names = (
    tuple(label_names)
    if label_names is not None
    else default_names(files.root, classes, is_kermany)
  )
  labels = label_indices(classes, names, [f"{files.root}/{name}" for name in files.names])
  if any(places.patients):
    ids = places.patients
  elif is_kermany:
    ids = kermany_patients(files.names, classes)
  else:
    ids = dicom_patients(files)
  return Listing(
    files,
    names,
    np.array(files.names),
    np.array(places.splits),
    labels,
    *patient_ids.groups(ids, files.names),
    np.array(places.folders),
    np.array(places.sites),
    places.layout,
    is_kermany and not any(places.patients),
  )


def kermany_patients(names: Sequence[str], classes: Sequence[str] | None = None) -> list[str]:
  """The patients that Kermany's file names tell, as class and number; "" where a name tells none.

  Numbers of different classes may be of different patients.

  Args:
    names: files, with or without folders.
    classes: of each; by default what the names tell.
  """
  ids = []
  for i, name in enumerate(names):
    if match := _KERMANY.match(posixpath.basename(name)):
      told = _KINDS.get((match["kind"] or match["kind3"] or "").lower(), "normal")
      number = int(match["person"] or match["number3"] or match["number"])
      ids.append(f"{told if classes is None else classes[i]}/{number}")
    else:
      ids.append("")
  return ids


def label_indices(
  kinds: Sequence[str], label_names: tuple[str, ...], where: Sequence[str]
) -> np.ndarray:
  """Returns the index of each class among the label names, ignoring letter case unless that is
  ambiguous.

  Args:
    kinds: the classes, [N].
    label_names: the known classes.
    where: a file of each class, for the error message.

  Returns:
    [N] int32.

  Raises:
    ValueError: classes are unknown; all of them are named, with a file of each.
  """
  lower = [known.lower() for known in label_names]
  index = {known: i for i, known in enumerate(label_names)}
  alone = {known: i for i, known in enumerate(lower) if lower.count(known) == 1}
  found = [index.get(kind, alone.get(kind.lower(), -1)) for kind in kinds]
  unknown: dict[str, str] = {}
  for kind, at, i in zip(kinds, where, found, strict=True):
    if i < 0:
      unknown.setdefault(kind, f"class {kind!r} of {at}")
  if unknown:
    verb, them = ("is not one", "it") if len(unknown) == 1 else ("are none", "them")
    raise ValueError(
      f"{', '.join(unknown.values())} {verb} of the known classes {label_names}; rename {them} to "
      f"one of them, or remove {them}"
    )
  return np.array(found, np.int32)


def _kermany_classes(
  files: Files, folders: Sequence[str], matches: Sequence[re.Match[str] | None]
) -> list[str]:
  """Returns the classes that Kermany file names encode."""
  found, unnamed = [], []
  for name, folder, match in zip(files.names, folders, matches, strict=True):
    kind = (match["kind"] or match["kind3"] or "") if match else ""
    if folder.upper() != "NORMAL" and not kind:
      unnamed.append(name)
    found.append("normal" if folder.upper() == "NORMAL" else _KINDS.get(kind.lower(), ""))
  if unnamed:
    raise ValueError(
      f"{these(files.root, unnamed)} named neither bacterial (person1_bacteria_2) nor viral "
      f"(person1_virus_2), unlike other files; rename {them(unnamed)}, or make pneumonia one class "
      "with "
      'label_names=("normal", "pneumonia") (--label_names=normal,pneumonia)'
    )
  return found


def default_names(root: str, classes: Sequence[str], is_kermany: bool = False) -> tuple[str, ...]:
  """Returns the default label names."""
  names = sorted(set(classes))
  lower = [name.lower() for name in names]
  if is_kermany or set(lower) == set(KERMANY_LABELS):
    return KERMANY_LABELS
  twice = [name for name in names if lower.count(name.lower()) > 1]
  if twice:
    raise ValueError(
      f"class folders {twice} of {root} differ only in letter case; merge or rename them"
    )
  return tuple(names)


def dicom_patients(files: Files) -> list[str]:
  """Returns the patient of each file if DICOM headers name at least two patients; "" otherwise."""
  suffixes = (*dicom.SUFFIXES, "")
  ids = ["" for _ in files.names]
  for i, name in enumerate(files.names):
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in suffixes or suffix[1:].isdigit():
      with contextlib.suppress(ValueError, OSError):  # decoding names all bad files
        data = files.read(name)
        ids[i] = dicom.patient_id(data, f"{files.root}/{name}") if dicom.is_dicom(data) else ""
  if len(set(ids) - {""}) < 2:  # a single ID for all files comes from an anonymiser
    return ["" for _ in ids]
  return [f"patient/{one}" if one else "" for one in ids]
