"""Reads pixels of DICOM files with pydicom, an optional extra: `pip install primia_jax[dicom]`."""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

SUFFIXES = (".dcm", ".dicom", ".ima")
CT_WINDOWS = {  # centre and width in Hounsfield units, as radiologists know them
  "lung": (-600.0, 1500.0),
  "bone": (400.0, 1800.0),
  "soft_tissue": (40.0, 400.0),
  "brain": (40.0, 80.0),
}

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


def window(text: str) -> tuple[float, float] | None:
  """Centre and width of a CT window in Hounsfield units, from its name or "CENTRE,WIDTH"; None from
  the empty text.

  Raises:
    ValueError: it is none.
  """
  if not text:
    return None
  if text in CT_WINDOWS:
    return CT_WINDOWS[text]
  try:
    centre, width = map(float, text.split(","))
  except ValueError:
    centre, width = math.nan, math.nan
  if not (math.isfinite(centre) and 0 < width < math.inf):
    raise ValueError(
      f"ct_window={text} is not a window; use CENTRE,WIDTH in Hounsfield units with a positive "
      f"width, such as 40,400, or one of {', '.join(CT_WINDOWS)}"
    )
  return centre, width


def is_dicom(data: bytes) -> bool:
  """Tells whether `data` starts like a DICOM file: 128 bytes of preamble, then "DICM" (PS3.10,
  section 7.1), or, as older files do, with the first elements of group 2 or 8.
  """
  group, element = data[:2], data[2:4]
  is_little = group in (b"\2\0", b"\x08\0") and element[1:] == b"\0"
  return data[128:132] == b"DICM" or is_little or (group == b"\0\x08" and element[:1] == b"\0")


def read(
  data: bytes,
  name: str,
  *,
  percentiles: tuple[float, float] | None = (1.0, 99.0),
  ct_window: tuple[float, float] | None = None,
) -> np.ndarray:
  """Returns the pixels of one DICOM image in 0..255, where bright means dense.

  Grey values pass through the modality transformation (rescale slope and intercept, or a table) and
  then a linear window. MONOCHROME1 is inverted. The file's own window (VOI) is not applied, because
  manufacturers choose it differently. Padding (the pixel padding value or range, and after lossy
  compression what is near it) is left out of the percentiles and becomes 0.

  Args:
    data: a whole DICOM file.
    name: the file, for error messages.
    percentiles: the percentiles of the image that become 0 and 255; values outside are clipped. If
      both percentiles are equal (a few bright dots on black), the smallest and largest values are
      used instead; an image with a single value becomes 0. With None, the range of the stored bits
      becomes 0 to 255, so that images stay comparable. Colour images always use their stored bits.
    ct_window: instead of percentiles, (centre, width) of a window in Hounsfield units: centre -
      width / 2 becomes 0, and centre + width / 2 becomes 255. A file that is no CT image in these
      units is then refused.

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
  if ct_window is not None and not ct_window[1] > 0:
    raise ValueError(f"the CT window (centre, width) is {ct_window}; its width must be positive")
  with _pixels(name) as pixels:
    header = pixels.parse(data)
    pixels.check(header)
    if ct_window is not None:
      pixels.check_hounsfield(header)
    stored, is_padding = pixels.stored(header)
    photometric = header.PhotometricInterpretation
    if not photometric.startswith("MONOCHROME"):
      return pixels.colour(stored, header)
    values = pixels.physical(stored, header)
    if ct_window is not None:
      low, high = ct_window[0] - ct_window[1] / 2, ct_window[0] + ct_window[1] / 2
    elif percentiles is not None:
      low, high = np.percentile(values[~is_padding], percentiles)
    else:
      low, high = pixels.physical_range(header)
  if low == high:
    low, high = values[~is_padding].min(), values[~is_padding].max()
  if low == high:
    return np.zeros(values.shape, np.float32)
  grey = np.clip((values - low) / (high - low), 0, 1)
  grey = 1 - grey if photometric == "MONOCHROME1" else grey
  return np.where(is_padding, 0, 255 * grey).astype(np.float32)


def patient_id(data: bytes, name: str) -> str:
  """Returns the patient ID in a DICOM file's header, or "" if it has none. Raises as `read`."""
  with _pixels(name) as pixels:
    header = pixels.parse(data, stop_before_pixels=True, specific_tags=["PatientID"])
    return str(header.get("PatientID") or "").strip()


def shape(data: bytes, name: str) -> tuple[int, int]:
  """Returns the height and width in a DICOM file's header. Raises as `read`."""
  with _pixels(name) as pixels:
    header = pixels.parse(data, stop_before_pixels=True, specific_tags=["Rows", "Columns"])
    return int(header.Rows), int(header.Columns)


@contextlib.contextmanager
def _pixels(name: str) -> Iterator[Any]:
  """Yields the module `dicom_pixels`, and adds the file's name to errors."""
  try:
    import pydicom

    from primia_jax.data import dicom_pixels
  except ImportError as error:
    raise ImportError(
      f"{name} is a DICOM file, and reading it needs pydicom; run `pip install 'primia_jax[dicom]'`"
    ) from error
  try:
    yield dicom_pixels
  except dicom_pixels.Refused as error:
    raise ValueError(f"{name} {error}") from None
  except (*_BROKEN, pydicom.errors.InvalidDicomError, pydicom.errors.BytesLengthException) as error:
    raise ValueError(
      f"{name} is corrupt DICOM, or compressed in a way that cannot be read "
      f"({' '.join(str(error).split())}); copy it again or remove it, or store it uncompressed"
    ) from error
