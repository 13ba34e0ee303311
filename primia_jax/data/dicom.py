"""Reads pixels of DICOM files with pydicom, an optional extra: `pip install primia_jax[dicom]`."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

SUFFIXES = (".dcm", ".dicom", ".ima")

# What pydicom raises for a damaged file, besides its own exceptions.
_BROKEN = (
  OSError,
  EOFError,
  ValueError,
  AttributeError,
  LookupError,
  TypeError,
  ArithmeticError,
  RuntimeError,
  struct.error,
)


def is_dicom(data: bytes) -> bool:
  """Tells whether `data` starts like a DICOM file: 128 bytes of preamble, then "DICM" (PS3.10,
  section 7.1).
  """
  return data[128:132] == b"DICM"


def read(
  data: bytes, name: str, *, percentiles: tuple[float, float] | None = (1.0, 99.0)
) -> np.ndarray:
  """Returns the pixels of one DICOM image in 0..255, where bright means dense.

  Grey values pass through the modality transformation (rescale slope and intercept, or a table) and
  then a linear window. MONOCHROME1 is inverted. The file's own window (VOI) is not applied, because
  manufacturers choose it differently. Padding (the pixel padding value or range) is left out of the
  percentiles and becomes 0.

  Args:
    data: a whole DICOM file.
    name: the file, for error messages.
    percentiles: the percentiles of the image that become 0 and 255; values outside are clipped. If
      both percentiles are equal (a few bright dots on black), the smallest and largest values are
      used instead; an image with a single value becomes 0. With None, the range of the stored bits
      becomes 0 to 255, so that images stay comparable. Colour images always use their stored bits.

  Returns:
    float32 [H, W] for grey, uint8 [H, W, 3] for colour.

  Raises:
    ValueError: the file is corrupt, holds no image or several, or is compressed in a way that
      cannot be read.
    ImportError: pydicom is not installed.
  """
  if percentiles is not None and not 0 <= percentiles[0] < percentiles[1] <= 100:
    raise ValueError(
      f"the DICOM percentiles are {percentiles}; they must increase and lie within 0 to 100"
    )
  with _pydicom(name) as pydicom:
    header = pydicom.dcmread(io.BytesIO(data))
    num_frames = int(header.get("NumberOfFrames") or 1)
  if "PixelData" not in header:
    raise ValueError(f"{name} is a DICOM file without pixels (a report or an index?); remove it")
  if num_frames > 1:
    raise ValueError(f"{name} holds {num_frames} frames; save each in its own file")
  with _pydicom(name) as pydicom:
    stored = pydicom.pixels.pixel_array(header)  # colour arrives as RGB
    photometric, bits = header.PhotometricInterpretation, int(header.BitsStored)
    if photometric == "PALETTE COLOR":
      stored = pydicom.pixels.apply_color_lut(stored, header)
      bits = 8 * stored.dtype.itemsize
    if stored.ndim == 3:
      return np.clip(np.rint(stored[..., :3] * (255 / (2**bits - 1))), 0, 255).astype(np.uint8)
    values = pydicom.pixels.apply_modality_lut(stored, header).astype(np.float64)
    is_padding = _padding(stored, header)
    low, high = (
      np.percentile(values[~is_padding], percentiles) if percentiles else _stored_range(header)
    )
  if low == high:
    low, high = values[~is_padding].min(), values[~is_padding].max()
  if low == high:
    return np.zeros(values.shape, np.float32)
  grey = np.clip((values - low) / (high - low), 0, 1)
  grey = 1 - grey if photometric == "MONOCHROME1" else grey
  return np.where(is_padding, 0, 255 * grey).astype(np.float32)


def patient_id(data: bytes, name: str) -> str:
  """Returns the patient ID in a DICOM file's header, or "" if it has none. Raises as `read`."""
  with _pydicom(name) as pydicom:
    header = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=["PatientID"])
    return str(header.get("PatientID") or "").strip()


@contextlib.contextmanager
def _pydicom(name: str) -> Iterator[Any]:
  """Yields the pydicom module, and adds the file's name to errors that pydicom raises for it."""
  try:
    import pydicom
    import pydicom.pixels
  except ImportError as error:
    raise ImportError(
      f"{name} is a DICOM file, and reading it needs pydicom; run `pip install 'primia_jax[dicom]'`"
    ) from error
  try:
    yield pydicom
  except (*_BROKEN, pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException) as error:
    raise ValueError(
      f"{name} is corrupt DICOM, or compressed in a way that cannot be read ({error}); copy it "
      "again or remove it, install decoders (`pip install 'pylibjpeg[all]'`), or store it "
      "uncompressed"
    ) from error


def _padding(stored: np.ndarray, header: Any) -> np.ndarray:
  """Returns which stored values are padding: bool, of the shape of `stored`."""
  first = header.get("PixelPaddingValue")
  if first is None:
    return np.zeros(stored.shape, bool)
  last = header.get("PixelPaddingRangeLimit", first)
  is_padding = (stored >= min(first, last)) & (stored <= max(first, last))
  return is_padding if not is_padding.all() else np.zeros(stored.shape, bool)


def _stored_range(header: Any) -> tuple[float, float]:
  """Returns the smallest and the largest value that the stored bits can represent, after the
  modality transformation.
  """
  from pydicom import pixels

  if header.get("ModalityLUTSequence"):
    return 0.0, 2.0 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
  bits = int(header.BitsStored)
  first = -(2 ** (bits - 1)) if header.PixelRepresentation == 1 else 0
  ends = pixels.apply_modality_lut(np.array([first, first + 2**bits - 1]), header)
  return float(ends.min()), float(ends.max())
