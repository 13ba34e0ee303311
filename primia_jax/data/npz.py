"""Reads images and labels from one npz file, with array names as in MedMNIST, MNIST or Keras."""

from __future__ import annotations

import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Sequence

import numpy as np

from primia_jax.data import decode, layouts, patient_ids
from primia_jax.data.dataset import Dataset, largest_class

_KERAS = {"x": "images", "y": "labels"}  # x_train, y_train


def read_npz(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
) -> dict[str, Dataset]:
  """Reads labelled images from one npz file into memory.

  The arrays are `{train,val,test}_{images,labels}` (or `x_train`, `y_train`, ...): images uint8 [N,
  H, W], [N, H, W, 1] or [N, H, W, 3], labels integers [N] or [N, 1]. In place of labels,
  `SPLIT_masks` [N, H, W] or [N, H, W, 1] gives the class of each pixel, 0 for the background. An
  optional array `SPLIT_groups` [N] gives each image's patient (empty or NaN where it is unknown);
  without it, each image is its own group and patients are unknown. Any further array `SPLIT_NAME`
  [N, ...] becomes the column NAME.

  Args:
    path: the file.
    size: height and width, in pixels. Images of another size are resized; see `decode.decode`.
    channels: 1 (grey) or 3 (RGB). Images of the other kind are converted.
    label_names: the name of each label; by default "0", "1", ... up to the largest label in the
      file; of masks with one class, "background" and "foreground".

  Returns:
    A `Dataset` for each split in the file: "train", "validation", "test".

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is corrupt, or an array is missing, or has an unknown name, a wrong shape
      or a wrong type.
  """
  decode.check_form(size, channels)
  arrays = _load(pathlib.Path(path))
  splits: dict[str, dict[str, np.ndarray]] = {}
  for key, array in arrays.items():
    split, name = _parse(path, key)
    if name in splits.setdefault(split, {}):
      raise ValueError(
        f"{path} holds {name} of the {split} split twice, the second time as {key!r}; remove one"
      )
    splits[split][name] = array
  if not splits:
    raise ValueError(f"{path} holds no arrays; add train_images, train_labels, ...")
  for split, parts in splits.items():
    _check(path, split, parts)
  if len({"masks" in parts for parts in splits.values()}) > 1:
    raise ValueError(f"{path} holds masks for some splits only; give all of them, or none")
  if label_names is None:
    what = "masks" if "masks" in next(iter(splits.values())) else "labels"
    largest = max(int(parts[what].max()) for parts in splits.values())
    label_names = [str(i) for i in range(1 + largest)]
    if what == "masks" and largest == 1:
      label_names = ["background", "foreground"]
  return {
    split: _dataset(
      pathlib.Path(path).name, split, splits[split], size, channels, tuple(label_names)
    )
    for split in ("train", "validation", "test")
    if split in splits
  }


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
  if not path.is_file():
    raise FileNotFoundError(f"there is no npz file at {path}; check the path")
  try:
    with path.open("rb") as file:
      if file.read(4) not in (b"PK\3\4", b"PK\5\6", b"\x93NUM"):
        raise ValueError("it is not a zip archive, as npz files are")
    with np.load(path, allow_pickle=False) as file:
      if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array")
      return {key: file[key] for key in file.files}
  except (
    OSError,
    EOFError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
    TypeError,
  ) as error:
    raise ValueError(
      f"{path} cannot be read as npz ({error}); copy it again, or write it with np.savez and "
      "arrays of one shape"
    ) from error


def _parse(path: str | os.PathLike[str], key: str) -> tuple[str, str]:
  """Returns the split and the array's name that a key encodes."""
  if (match := re.fullmatch(r"([xy])_([a-z]+)", key)) and match[2] in layouts.SPLITS:
    return layouts.SPLITS[match[2]], _KERAS[match[1]]
  if (match := re.fullmatch(r"([a-z]+)_(\w+)", key)) and match[1] in layouts.SPLITS:
    return layouts.SPLITS[match[1]], match[2]
  raise ValueError(
    f"{path} holds an array {key!r}; rename it like train_images, val_labels or x_test, y_test, or "
    "remove it"
  )


def _check(path: str | os.PathLike[str], split: str, parts: dict[str, np.ndarray]) -> None:
  """Checks the arrays of one split, and reshapes images to [N, H, W, C], labels to [N] and masks
  to [N, H, W].
  """
  if "labels" in parts and "masks" in parts:
    raise ValueError(
      f"{path} holds labels and masks for the {split} split; a run learns one of them: remove the "
      "other"
    )
  for name in ("images", "labels"):
    if name not in parts and not (name == "labels" and "masks" in parts):
      raise ValueError(
        f"{path} holds {sorted(parts)} for the {split} split, but no {name}; add {split}_{name}"
      )
  images = parts["images"]
  if images.dtype != np.uint8:
    raise ValueError(
      f"{split} images of {path} are {images.dtype}; scale them to 0..255 and store them as uint8"
    )
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
    raise ValueError(
      f"{split} images of {path} have shape {parts['images'].shape}; store them as [N, H, W] or "
      "[N, H, W, C] with N > 0 and C = 1 or 3"
    )
  num = len(images)
  if "masks" in parts:
    parts["masks"] = _checked_masks(path, split, parts["masks"], images.shape[:3])
    parts["labels"] = np.zeros(num, np.int32)  # known once the classes are
  labels = parts["labels"]
  if labels.shape not in ((num,), (num, 1)) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(
      f"{split} labels of {path} are {labels.dtype} {labels.shape}; store one integer for each of "
      f"the {num} images (np.argmax(labels, -1) for one-hot labels)"
    )
  if labels.min() < 0:
    raise ValueError(f"{split} labels of {path} hold {labels.min()}; number the classes from 0")
  for name, array in parts.items():
    if len(np.atleast_1d(array)) != num:
      raise ValueError(
        f"{split}_{name} of {path} has shape {array.shape} for {num} images; store one value for "
        "each image"
      )
  parts["images"], parts["labels"] = images, labels.reshape(num).astype(np.int32)


def _checked_masks(
  path: str | os.PathLike[str], split: str, masks: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
  """uint8 [N, H, W]."""
  if masks.shape not in (shape, (*shape, 1)) or masks.dtype.kind not in "iub":
    raise ValueError(
      f"{split} masks of {path} are {masks.dtype} {masks.shape}; store one integer for each pixel "
      f"of the images, {shape}"
    )
  if int(masks.min()) < 0 or int(masks.max()) > 255:
    raise ValueError(
      f"{split} masks of {path} hold {masks.min()} to {masks.max()}; number the classes from 0 to "
      "255"
    )
  return masks.reshape(shape).astype(np.uint8)


def _dataset(
  name: str,
  split: str,
  parts: dict[str, np.ndarray],
  size: int,
  channels: int,
  label_names: tuple[str, ...],
) -> Dataset:
  images, num = parts["images"], len(parts["images"])
  if images.shape[1:] != (size, size, channels):
    resized = np.empty((num, size, size, channels), np.uint8)
    for i, image in enumerate(images):
      resized[i] = decode.to_uint8(image[..., 0] if image.shape[-1] == 1 else image, size, channels)
    images = resized
  masks, labels = parts.get("masks"), parts["labels"]
  if masks is not None:
    masks = decode.nearest(masks, size)
    labels = largest_class(masks, max(len(label_names), 1 + int(masks.max())))
  # With the split's name, so that groups stay distinct when splits are joined.
  own = np.char.add(f"{split}/", np.arange(num).astype(str))
  groups, has_patient = patient_ids.groups(parts.get("groups", np.full(num, "")), own)
  return Dataset(
    images=images,
    labels=labels,
    label_names=label_names,
    groups=groups,
    has_patient=has_patient,
    columns={
      key: array
      for key, array in parts.items()
      if key not in ("images", "labels", "groups", "masks")
    },
    name=name,
    masks=masks,
  )
