"""Reads every image of a source once, before any work: which files are bad, how many bits 16-bit
images use, and which images are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from primia_jax.data import decode, patient_ids
from primia_jax.data.dataset import Dataset, Images, take

PIXELS = "pixels"  # the column that tells images apart
BITS = "bits of 16-bit grey images"  # notes of a `Dataset`
LEFT_OUT = "bad files, left out"

_BITS = (8, 10, 12, 14, 16)
_AT_ONCE = 512  # images that are read at a time
_SHOWN = 10  # files in a message
_NOTED = 100  # files in a report


def read(
  splits: Mapping[str, Dataset], *, keep: bool = True, skip_bad_files: bool = False
) -> dict[str, Dataset]:
  """Reads all images.

  16-bit grey images are scaled by the smallest of 8, 10, 12, 14 and 16 bits that holds the largest
  value of all splits, unless `grey_bits` is given, so that images of a source stay comparable.

  Args:
    splits: data sets of one source; images are read on demand.
    keep: in memory; else they are read on demand again, for images that do not fit.
    skip_bad_files: leave files out that cannot be read, and note which.

  Returns:
    The data sets, with a column `PIXELS`, where equal images have equal values, and notes.

  Raises:
    ValueError, FileNotFoundError: naming all files that cannot be read.
  """
  splits = _with_bits(splits)
  found: dict[str, Dataset] = {}
  bad: list[Exception] = []
  left_out: list[str] = []
  for split, dataset in splits.items():
    images, digests, errors = _read(dataset.images, keep)
    good = np.setdiff1d(np.arange(len(dataset)), list(errors))
    columns = {**dataset.columns, PIXELS: digests}
    whole = dataclasses.replace(dataset, images=images, columns=columns)
    found[split] = take(whole, good) if errors else whole
    bad += errors.values()
    left_out += patient_ids.image_names(dataset)[list(errors)].tolist()
  if not bad:
    return found
  if not skip_bad_files:
    raise _refused(bad)
  if empty := [split for split, dataset in found.items() if not len(dataset)]:
    raise ValueError(f"{_refused(bad)}. Without them, the splits {empty} are empty")
  total = len(bad) + sum(map(len, found.values()))
  more = ", ..." if len(left_out) > _NOTED else ""
  note = f"{len(bad)} of {total}: {', '.join(left_out[:_NOTED])}{more}"
  return {
    split: dataclasses.replace(dataset, notes={**dataset.notes, LEFT_OUT: note})
    for split, dataset in found.items()
  }


def bits(dataset: Dataset) -> int:
  """The bits of its 16-bit grey images; 0 without any, or where sources differ."""
  note = dataset.notes.get(BITS, "0")
  return int(note) if note.isdigit() else 0


def _refused(bad: list[Exception]) -> Exception:
  kind = FileNotFoundError if isinstance(bad[0], FileNotFoundError) else ValueError
  if len(bad) == 1:
    return kind(f"{bad[0]}, or leave it out with --skip_bad_files")
  more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
  lines = "\n  ".join([*map(str, bad[:_SHOWN]), *more])
  return ValueError(
    f"{len(bad)} images cannot be read; mend or remove them, or leave them out with "
    f"--skip_bad_files:\n  {lines}"
  )


def _read(images: Images, keep: bool) -> tuple[Images, np.ndarray, dict[int, Exception]]:
  """Returns the images, in memory if they are kept, their digests, and what is wrong."""
  num = images.shape[0]
  digests, bad = np.zeros(num, "S32"), dict[int, Exception]()
  is_lazy = not isinstance(images, np.ndarray)
  kept = np.empty(images.shape, np.uint8) if keep and is_lazy else None
  for start in range(0, num, _AT_ONCE):
    rows = np.arange(start, min(start + _AT_ONCE, num))
    if isinstance(images, decode.EncodedImages):
      block, wrong = images.try_read(rows)
      bad |= {start + i: error for i, error in wrong.items()}
    else:
      block = images[rows]
    if kept is not None:
      kept[rows] = block
    digests[rows] = [hashlib.blake2b(one.tobytes(), digest_size=16).hexdigest() for one in block]
  return images if kept is None else kept, digests, bad


def _with_bits(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
  """Finds the bits that 16-bit grey images use, over all splits, and has them decoded by these."""
  encoded = {
    split: dataset.images
    for split, dataset in splits.items()
    if isinstance(dataset.images, decode.EncodedImages)
  }
  bits = max((images.grey_bits for images in encoded.values()), default=0)
  if not bits:
    most = max((_largest(images) for images in encoded.values()), default=0)
    bits = next(b for b in _BITS if most < 2**b) if most else 0
  if not bits:
    return dict(splits)
  out = dict(splits)
  for split, images in encoded.items():
    out[split] = dataclasses.replace(
      splits[split],
      images=dataclasses.replace(images, grey_bits=bits),
      notes={**splits[split].notes, BITS: str(bits)},
    )
  return out


def _largest(images: decode.EncodedImages) -> int:
  """The largest value of 16-bit grey images; 0 without any."""
  may = (".png", ".tif", ".tiff", "")
  wanted = [
    key
    for key in images.keys.tolist()
    if not isinstance(key, str) or os.path.splitext(key)[1].lower() in may
  ]

  def largest(key: Any) -> int:
    try:
      return decode.largest_16_bit(images.read(key))
    except (ValueError, OSError):
      return 0  # `try_read` names it

  with ThreadPoolExecutor(os.cpu_count()) as pool:
    return max(pool.map(largest, wanted), default=0)
