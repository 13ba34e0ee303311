"""Masks that an encrypted inference found: which images it took, what it says, and the files that
their owner keeps.
"""

from __future__ import annotations

import csv
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from primia_jax.data import decode, volumes
from primia_jax.data.dataset import Dataset
from primia_jax.data.files import list_files

from . import folders, predictions
from .planned import Infer
from .settings import names

AREAS, VOLUME, OVERLAYS, FOLDER = "areas.csv", "masks.nii.gz", "overlays.png", "masks"
FILES = (AREAS, VOLUME, OVERLAYS, FOLDER)
_SLICES = re.compile(r"(\d+)(?:-(\d+))?")


def slices(text: str) -> tuple[int, int] | None:
  """Reads "40" or "40-60" as (first, last); None where nothing is asked for.

  Raises:
    ValueError: the text is neither.
  """
  if not text:
    return None
  match = _SLICES.fullmatch(text.strip())
  first, last = (int(n) for n in (match[1], match[2] or match[1])) if match else (1, 0)
  if first > last:
    raise ValueError(f"slices={text!r}; use the number of a slice, or two such as 40-60")
  return first, last


def check(s: Infer) -> None:
  """Refuses flags of masks that go with no image.

  Raises:
    ValueError: naming the flag and the cure.
  """
  if s.overlays < 0:
    raise ValueError(f"overlays={s.overlays} is negative; use 0 to draw none")
  if slices(s.slices) and not volumes.is_volume(s.images):
    raise ValueError(
      f"slices={s.slices}: images={s.images} is not a NIfTI volume (.nii, .nii.gz); leave it out"
    )


def volume(
  s: Infer,
  of_pixels: bool,
  label_names: Sequence[str],
  size: int,
  channels: int,
  ct_window: tuple[float, float] | None,
) -> Dataset | None:
  """The axial slices of a volume, as a model takes them; None where other images are named.

  Args:
    s: the flags images and slices.
    of_pixels: whether the model gives masks.
    label_names, size, channels, ct_window: of the model.

  Raises:
    ValueError, FileNotFoundError, ImportError: it cannot be read, or the model takes no volumes.
  """
  if not volumes.is_volume(s.images):
    return None
  if not of_pixels:
    raise ValueError(
      f"images={s.images} is a volume, and the model classifies images; name images, or a model "
      "that gives masks"
    )
  return volumes.read_volume(
    os.path.expanduser(s.images), size=size, channels=channels, label_names=label_names,
    ct_window=ct_window, slices=slices(s.slices),
  )  # fmt: skip


def of(outputs: np.ndarray) -> np.ndarray:
  """Masks uint8 [N, H, W] of logits [N, H, W, L] or of classes [N, H, W]."""
  classes = outputs.argmax(-1) if outputs.ndim == 4 else np.rint(outputs)
  return classes.astype(np.uint8)


def areas(masks: np.ndarray, num_classes: int) -> np.ndarray:
  """The share of an image that each class but the background has: [N, L - 1]."""
  return np.stack([(masks == k).mean((1, 2)) for k in range(1, num_classes)], axis=1)


def show(ids: Sequence[str], masks: np.ndarray, label_names: Sequence[str]) -> None:
  """Prints the share of each class but the background in each image."""
  width = max(len("image"), *map(len, ids))
  heads = [f"{name:>{max(len(name), 8)}}" for name in label_names[1:]]
  print(f"\nShare of the pixels\n{'image':<{width}}  {'  '.join(heads)}")
  for image, shares in zip(ids, areas(masks, len(label_names)), strict=True):
    cells = (f"{f'{100 * x:.2f} %':>{len(h)}}" for x, h in zip(shares, heads, strict=True))
    print(f"{image:<{width}}  {'  '.join(cells)}")


def write(
  folder: pathlib.Path, s: Infer, images: Dataset, masks: np.ndarray, num_shown: int
) -> list[str]:
  """Writes areas.csv, the masks (one NIfTI file of a volume, a PNG of each other image) and a
  picture of some outlines, all of mode 0600 from the start.

  Args:
    folder: an existing folder.
    s: the flags.
    images: N, as `read` gave them.
    masks: uint8 [N, H, W].
    num_shown: how many to draw, those with the largest masks.

  Returns:
    What to print: the files, and the millilitres of each class of a volume.
  """
  label_names = images.label_names
  ids = [str(path) for path in images.columns["path"]]
  with predictions.private_file(folder / AREAS) as file:
    writer = csv.writer(file)
    writer.writerow(["image", *(f"share of {name}" for name in label_names[1:])])
    for image, shares in zip(ids, areas(masks, len(label_names)), strict=True):
      writer.writerow([predictions.csv_cell(image), *(f"{x:.6f}" for x in shares)])
  if volumes.is_volume(s.images):
    first = int(images.columns["slice"][0])
    path, source = folder / VOLUME, os.path.expanduser(s.images)
    predictions.private_file(path).close()
    litres = volumes.write_masks(path, source, masks, len(label_names), first)
    found = (f"{n} {ml:.2f} ml" for n, ml in zip(label_names[1:], litres[1:], strict=True))
    said = [f"{path} lies on the volume's own voxels: {', '.join(found)}"]
  else:
    _write_pngs(folder / FOLDER, s, ids, masks, label_names)
    numbers = ", ".join(f"{k} is {name}" for k, name in enumerate(label_names))
    said = [f"{folder / FOLDER} holds a PNG for each image, whose values are classes: {numbers}"]
  if num_shown:
    from . import masks_drawn  # here, because the import takes a second

    title = f"Masks found under encryption:\n{images.name or pathlib.PurePath(s.images).name}"
    predictions.private_file(folder / OVERLAYS).close()
    masks_drawn.found(images, masks, folder / OVERLAYS, title, num_shown)
    said.append(f"{folder / OVERLAYS} shows IMAGES OF PATIENTS, with outlines of their masks")
  return said


def _write_pngs(
  folder: pathlib.Path, s: Infer, ids: Sequence[str], masks: np.ndarray, label_names: Sequence[str]
) -> None:
  """A PNG for each image, of its own height and width; the palette shows the classes in colours."""
  files = list_files(os.path.expanduser(s.images), names(s.ignore))
  for name, mask in zip(ids, masks, strict=True):
    shape = decode.own_shape(files.read(name), f"{files.root}/{name}")
    png: Any = Image.fromarray(decode.nearest(mask[None], *shape)[0])
    png.putpalette(_palette(len(label_names)))
    path = folder / f"{name}.mask.png"
    folders.private(path.parent)
    predictions.private_file(path).close()
    png.save(path)


def _palette(num_classes: int) -> list[int]:
  """Red, green and blue of each class: black for the background, then colours that differ in
  brightness, too.
  """
  colours = [
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (213, 94, 0),
  ]
  chosen = [colours[k and 1 + (k - 1) % 6] for k in range(num_classes)]
  return [value for colour in chosen for value in colour]
