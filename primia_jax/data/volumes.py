"""Reads volumes with masks, as NIfTI in the layout of the Medical Segmentation Decathlon.

  FOLDER/dataset.json   names of the classes, and pairs of files: "labels", "training"
  FOLDER/imagesTr/*.nii.gz, FOLDER/labelsTr/*.nii.gz

A volume becomes its axial slices, which stay together as one patient's wherever data are divided.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from primia_jax.data import decode
from primia_jax.data.dataset import Dataset, largest_class

SLICES = ("all", "labelled")
INDEX = "dataset.json"
_BROKEN = (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error)


def read_msd(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  ct_window: tuple[float, float] | None = None,
  slices: str = "all",
) -> dict[str, Dataset]:
  """Reads a task of the Decathlon into memory.

  A slice is shown as radiologists see it: the patient's front is up, and his right side is left.

  Args:
    path: the folder.
    size: height and width, in pixels, to which slices are resized; masks take the nearest class.
    channels: 1, or 3 for three equal ones.
    label_names: the classes in order of their numbers; by default those of dataset.json.
    ct_window: (centre, width) in Hounsfield units, which become 0 to 255; without it, percentiles 1
      and 99 of each volume do.
    slices: "all", or "labelled" for those only that hold another class than the background. Scores
      on these say nothing of false alarms elsewhere.

  Returns:
    {"all": a `Dataset` with masks}, since only training volumes have masks. Columns: `volume`,
    `slice` (from the feet, from 0) and `position_mm`. Groups are the volumes.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: a file is damaged, or no pair of volumes of one shape and place, or dataset.json has
      another form. The message names the file and the cure.
    ImportError: nibabel is not installed.
  """
  decode.check_form(size, channels)
  if slices not in SLICES:
    raise ValueError(f"slices={slices!r}; use {' or '.join(SLICES)}")
  folder = pathlib.Path(path)
  own_names, pairs = _index(folder)
  if label_names is not None and len(label_names) != len(own_names):
    raise ValueError(
      f"label_names={list(label_names)} for the classes {own_names} of {folder}; give one name each"
    )
  images, masks, columns = [], [], []
  for image_path, mask_path in pairs:
    grey, mask, positions = _volume(image_path, mask_path, ct_window)
    if mask.max() >= len(own_names):
      raise ValueError(
        f"{mask_path} holds class {mask.max()}, but dataset.json names {own_names}; add its name"
      )
    for k in range(len(grey)):
      if slices == "all" or mask[k].any():
        images.append(decode.to_uint8(grey[k], size, channels))
        masks.append(decode.nearest(mask[k : k + 1], size)[0])
        columns.append((_stem(image_path), k, positions[k]))
  if not images:
    raise ValueError(f"{folder}: no slice has another class than {own_names[0]}; use slices=all")
  volumes, numbers, millimetres = zip(*columns, strict=True)
  stacked = np.stack(masks)
  return {
    "all": Dataset(
      images=np.stack(images),
      labels=largest_class(stacked, len(own_names)),
      label_names=tuple(label_names or own_names),
      groups=np.asarray(volumes),
      columns={
        "volume": np.asarray(volumes),
        "slice": np.asarray(numbers),
        "position_mm": np.asarray(millimetres, np.float32),
      },
      name=folder.name,
      has_patient=np.ones(len(images), bool),
      notes={"slices": f"{len(images)} of {len(pairs)} volumes; {slices}"},
      masks=stacked,
    )
  }


def is_volume(path: str | os.PathLike[str]) -> bool:
  """Whether a file's name is one of a NIfTI volume."""
  return pathlib.Path(path).name.lower().endswith((".nii", ".nii.gz"))


def read_volume(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] = ("",),
  ct_window: tuple[float, float] | None = None,
  slices: tuple[int, int] | None = None,
) -> Dataset:
  """Reads the axial slices of one volume without masks, as `read_msd` shows them.

  Args:
    path: the file.
    size, channels, ct_window: see `read_msd`.
    label_names: the classes of a model, for the data set.
    slices: (first, last), counted from the feet, from 0; None takes all.

  Returns:
    A data set whose labels are 0. Columns: `path` (file and number of the slice), `slice` and
    `position_mm`.

  Raises:
    FileNotFoundError, ImportError: as `read_msd`.
    ValueError: the file is damaged, is no volume, or has no such slices.
  """
  decode.check_form(size, channels)
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"there is no {path}; check the path")
  image = _read(path)
  grey = _shown(_grey(_values(image, path), ct_window))
  first, last = slices or (0, len(grey) - 1)
  if not 0 <= first <= last < len(grey):
    raise ValueError(f"slices={first}-{last}: {path} has the slices 0 to {len(grey) - 1}")
  numbers = np.arange(first, last + 1)
  return Dataset(
    images=np.stack([decode.to_uint8(grey[k], size, channels) for k in numbers]),
    labels=np.zeros(len(numbers), np.int32),
    label_names=tuple(label_names),
    groups=np.full(len(numbers), _stem(path)),
    columns={
      "path": np.array([f"{path.name}, slice {k}" for k in numbers]),
      "slice": numbers,
      "position_mm": _heights(image)[numbers].astype(np.float32),
    },
    name=path.name,
    has_patient=np.ones(len(numbers), bool),
  )


def write_masks(
  path: str | os.PathLike[str],
  source: str | os.PathLike[str],
  masks: np.ndarray,
  num_classes: int,
  first: int,
) -> np.ndarray:
  """Writes masks of a volume's slices as NIfTI, on the voxels of these slices.

  Args:
    path: the file to write.
    source: the volume that `read_volume` read.
    masks: uint8 [Z, size, size], of consecutive slices. If they are not all, the file holds these
      slices alone; its affine puts them in their place.
    num_classes: L.
    first: the number of the first slice.

  Returns:
    The millilitres of each class, float64 [L].
  """
  part = _read(pathlib.Path(source)).slicer[:, :, first : first + len(masks)]
  import nibabel  # here, since `_read` says what to do where it is missing

  found = decode.nearest(masks, part.shape[1], part.shape[0])
  made = nibabel.Nifti1Image(np.ascontiguousarray(_stored(found)), part.affine)
  axes = nibabel.orientations.io_orientation
  own: Any = nibabel.load(source)
  back = nibabel.orientations.ornt_transform(axes(part.affine), axes(own.affine))
  nibabel.save(made.as_reoriented(back), path)
  voxel = abs(np.linalg.det(part.affine[:3, :3])) / 1000
  return np.bincount(found.ravel(), minlength=num_classes) * voxel


def _index(folder: pathlib.Path) -> tuple[list[str], list[tuple[pathlib.Path, pathlib.Path]]]:
  """Names of the classes and pairs of files, as dataset.json has them."""
  path = folder / INDEX
  if not path.is_file():
    raise FileNotFoundError(f"there is no {path}; name the folder of a task, such as Task06_Lung")
  try:
    told = json.loads(path.read_text())
    names = {int(number): str(name) for number, name in told["labels"].items()}
    pairs = [(folder / pair["image"], folder / pair["label"]) for pair in told["training"]]
  except _BROKEN as error:
    raise ValueError(
      f'{path} has not the Decathlon\'s form ({error!r}); it needs "labels": {{"0": NAME, ...}} '
      'and "training": [{"image": FILE, "label": FILE}, ...]'
    ) from error
  if sorted(names) != list(range(len(names))) or len(names) < 2 or not pairs:
    raise ValueError(
      f"{path} names the classes {names} and {len(pairs)} training volumes; it needs classes from "
      "0, the background, at least two, and a volume"
    )
  for file in (file for pair in pairs for file in pair):
    if not file.is_file():
      raise FileNotFoundError(f"there is no {file}, which {path} names; copy it there")
  return [names[i] for i in range(len(names))], pairs


def _volume(
  image_path: pathlib.Path, mask_path: pathlib.Path, ct_window: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Grey slices float32 [Z, H, W] in 0..255, masks uint8 [Z, H, W], and heights in mm [Z]."""
  image, mask = _read(image_path), _read(mask_path)
  if image.shape != mask.shape or not np.allclose(image.affine, mask.affine, atol=1e-2):
    raise ValueError(
      f"{image_path} {image.shape} and {mask_path} {mask.shape} differ in shape or place; resample "
      "one onto the other"
    )
  values = _values(image, image_path)
  try:
    classes = np.asarray(mask.dataobj)
  except _BROKEN as error:
    raise ValueError(f"{mask_path} is damaged ({error}); copy it again") from error
  if (classes != np.rint(classes)).any() or classes.min() < 0 or classes.max() > 255:
    raise ValueError(f"{mask_path} holds other values than classes 0 to 255")
  return _shown(_grey(values, ct_window)), _shown(classes.astype(np.uint8)), _heights(image)


def _values(image: Any, path: pathlib.Path) -> np.ndarray:
  try:
    values = np.asarray(image.dataobj, np.float32)
  except _BROKEN as error:
    raise ValueError(f"{path} is damaged ({error}); copy it again") from error
  if not np.isfinite(values).all():
    raise ValueError(f"{path} holds values that are not finite; mend it")
  return values


def _grey(values: np.ndarray, ct_window: tuple[float, float] | None) -> np.ndarray:
  """Values in 0..255."""
  if ct_window is None:
    low, high = np.percentile(values, decode.PERCENTILES)
  else:
    low, high = ct_window[0] - ct_window[1] / 2, ct_window[0] + ct_window[1] / 2
  return 255 * np.clip((values - low) / max(high - low, 1e-6), 0, 1)


def _shown(a: np.ndarray) -> np.ndarray:
  """Axes right, front, up as slices [Z, H, W]."""
  return a[::-1, ::-1].transpose(2, 1, 0)


def _stored(a: np.ndarray) -> np.ndarray:
  """The inverse of `_shown`."""
  return a.transpose(2, 1, 0)[::-1, ::-1]


def _heights(image: Any) -> np.ndarray:
  """Of each slice, in mm."""
  return image.affine[2, 3] + image.affine[2, 2] * np.arange(image.shape[2])


def _read(path: pathlib.Path) -> Any:
  """A volume whose axes point to the patient's right, front and head."""
  try:
    import nibabel
  except ImportError as error:
    raise ImportError(
      f"{path} is a NIfTI file, and reading it needs nibabel; run `pip install 'primia_jax[nifti]'`"
    ) from error
  try:
    found = nibabel.as_closest_canonical(nibabel.load(path))
  except (*_BROKEN, nibabel.filebasedimages.ImageFileError) as error:
    raise ValueError(f"{path} cannot be read as NIfTI ({error}); copy it again") from error
  if len(found.shape) != 3:
    raise ValueError(
      f"{path} has shape {found.shape}; a volume of one kind has three axes: save one of its kinds "
      "(nibabel: image.slicer[..., 0])"
    )
  return found


def _stem(path: pathlib.Path) -> str:
  return path.name.removesuffix(".gz").removesuffix(".nii")
