"""From a DICOM file to the values it stores: what pydicom leaves to its callers. Only `dicom`
imports this, when it meets a DICOM file, because pydicom is an optional extra.
"""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
import pydicom
import pydicom.pixels
from pydicom import uid

from primia_jax.data import dicom_frames

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_SAMPLES = {"MONOCHROME1": 1, "MONOCHROME2": 1, "PALETTE COLOR": 1} | dict.fromkeys(_COLOURS, 3)
_REQUIRED = (
  "PhotometricInterpretation",
  "SamplesPerPixel",
  "Rows",
  "Columns",
  "BitsAllocated",
  "BitsStored",
  "PixelRepresentation",
)
_NO_PICTURES = {"SEG": "a segmentation", "RTDOSE": "a radiation dose"}
_MAX_PIXELS = 178_956_970  # Pillow's limit for the other formats
_LOSSY = (  # the last two may be
  uid.JPEGBaseline8Bit,
  uid.JPEGExtended12Bit,
  uid.JPEGLSNearLossless,
  uid.JPEG2000,
  uid.HTJ2K,
)


class Refused(ValueError):
  """Why a file is no image that can be used, and the cure; `dicom` puts its name before it."""


class Stored(NamedTuple):
  """The values that a file stores, integers [H, W] or, as RGB, [H, W, 3]; and which of them are
  padding, bool [H, W].
  """

  values: np.ndarray
  is_padding: np.ndarray


def parse(data: bytes, **options: Any) -> Any:
  """Returns the header of a file, with or without the preamble."""
  return pydicom.dcmread(io.BytesIO(data), force=True, **options)


def check(header: Any) -> None:
  """Raises Refused unless a file holds one image that can be read, as far as its header tells."""
  if what := _NO_PICTURES.get(str(header.get("Modality"))):
    raise Refused(f"holds {what}, which is not a picture; remove it")
  if "FloatPixelData" in header or "DoubleFloatPixelData" in header:
    raise Refused("holds floating-point pixels, whose scale is unknown; save them as integers")
  if not header.get("PixelData"):
    kind = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID")
    what = kind.name if kind else "a report or an index?"
    raise Refused(f"is a DICOM file without pixels ({what}); remove it")
  if missing := [name for name in _REQUIRED if header.get(name) is None]:
    raise Refused(f"lacks {', '.join(missing)}, which every image must tell; export it anew")
  photometric, samples = header.PhotometricInterpretation, header.SamplesPerPixel
  if photometric not in _SAMPLES:
    raise Refused(
      f"has the photometric interpretation {photometric!r}; save it as one of {', '.join(_SAMPLES)}"
    )
  if samples != _SAMPLES[photometric]:
    raise Refused(
      f"has {samples} samples a pixel where {photometric} has {_SAMPLES[photometric]}; export it "
      "anew"
    )
  rows, columns = header.Rows, header.Columns
  if rows * columns > _MAX_PIXELS:
    raise Refused(f"has {rows} x {columns} pixels, more than {_MAX_PIXELS}; save it smaller")
  if (num_frames := int(header.get("NumberOfFrames") or 1)) > 1:
    raise Refused(f"holds {num_frames} frames; save each in its own file")
  if "TransferSyntaxUID" not in header.file_meta:
    header.file_meta.TransferSyntaxUID = _guessed_syntax(header)
  _check_compression(header)


def stored(header: Any) -> Stored:
  """Returns the values of a file that has passed `check`.

  Raises:
    Refused: a value's bits are not where the header says, or there are more frames than it says.
    Exception: what pydicom raises for a damaged file.
  """
  syntax, bits = header.file_meta.TransferSyntaxUID, header.BitsStored
  high_bit = header.get("HighBit")
  low_bit = 0 if high_bit is None else high_bit + 1 - bits
  is_plain = not syntax.is_encapsulated or syntax == uid.RLELossless
  if not 0 <= low_bit <= header.BitsAllocated - bits or (low_bit and not is_plain):
    raise Refused(
      f"has HighBit={high_bit}, BitsStored={bits} and BitsAllocated={header.BitsAllocated}, which "
      "leaves open where a value's bits are; export it anew"
    )
  # Colour arrives as RGB. A decoder of JPEG returns whole values; elsewhere pydicom would take each
  # value's lowest bits.
  if dicom_frames.is_needed(header):
    cells = dicom_frames.decode(header)
  elif is_plain:
    cells = pydicom.pixels.pixel_array(header, correct_unused_bits=False)
  else:
    cells = pydicom.pixels.pixel_array(header, decoding_plugin="pillow")
  shape = (header.Rows, header.Columns, *([3] if header.SamplesPerPixel == 3 else []))
  if cells.shape != shape:
    raise Refused(
      f"holds data of shape {cells.shape} where its header says {shape}, which may be frames "
      "without NumberOfFrames; save each in its own file"
    )
  kind = cells.dtype
  cells = np.right_shift(cells, low_bit, dtype=np.int32 if kind.itemsize <= 2 else np.int64)
  is_padding = _padding(cells, kind, header)
  return Stored(_own_bits(cells, is_padding, header) if is_plain else cells, is_padding)


def colour(values: np.ndarray, header: Any) -> np.ndarray:
  """Returns uint8 [H, W, 3] of a colour image's stored values."""
  top = 2**header.BitsStored - 1
  if header.PhotometricInterpretation == "PALETTE COLOR":
    table, first = _palette(header)
    values = table[np.clip(values - first, 0, len(table) - 1)]
    # Many palettes of 8-bit values are declared as, or stored with, 16 bits.
    top = 255 if table.max() <= 255 else 65535
  return np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8)


def physical(values: np.ndarray, header: Any) -> np.ndarray:
  """Returns stored values after the modality transformation, as float64."""
  if header.get("ModalityLUTSequence"):
    lut = header.ModalityLUTSequence[0]
    length, first = _descriptor(lut.LUTDescriptor, header)
    table = _table(lut.LUTData, length, header)
    return table[np.clip(values - first, 0, length - 1)].astype(np.float64)
  slope, intercept, _ = rescaling(header) or (1.0, 0.0, "")
  return values * slope + intercept


def rescaling(header: Any) -> tuple[float, float, str] | None:
  """Returns the rescale slope, intercept and type; None if a file has no slope and intercept, or
  blanks.
  """
  groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
  macros = [item for name in groups for item in header.get(name) or []]
  values = [item for one in macros for item in one.get("PixelValueTransformationSequence") or []]
  for place in (header, *values):
    slope, intercept = place.get("RescaleSlope"), place.get("RescaleIntercept")
    if slope is None and intercept is None:
      continue
    a, b = float(1 if slope is None else slope), float(intercept or 0)
    if not a or not math.isfinite(a) or not math.isfinite(b):
      raise Refused(f"has RescaleSlope={slope} and RescaleIntercept={intercept}; export it anew")
    return a, b, place.get("RescaleType") or ""
  return None


def physical_range(header: Any) -> tuple[float, float]:
  """Returns the smallest and the largest value that the stored bits can represent, after the
  modality transformation.
  """
  if header.get("ModalityLUTSequence"):
    return 0.0, 2.0 ** int(header.ModalityLUTSequence[0].LUTDescriptor[2]) - 1
  bits = header.BitsStored
  first = -(2 ** (bits - 1)) if header.PixelRepresentation == 1 else 0
  ends = physical(np.array([first, first + 2**bits - 1]), header)
  return float(ends.min()), float(ends.max())


def check_hounsfield(header: Any) -> None:
  """Raises Refused unless the modality transformation leads to Hounsfield units."""
  modality, found, why = str(header.get("Modality")), rescaling(header), ""
  if modality != "CT":
    why = f"is of the modality {modality!r}"
  elif not header.PhotometricInterpretation.startswith("MONOCHROME"):
    why = "is in colour"
  elif header.get("ModalityLUTSequence") or found is None:
    why = "has no RescaleSlope and RescaleIntercept"
  elif found[2] not in ("", "HU"):
    why = f"has the RescaleType {found[2]!r}"
  if why:
    raise Refused(
      f"{why}, and ct_window needs CT images in Hounsfield units; leave out ct_window, or remove it"
    )


def _guessed_syntax(header: Any) -> uid.UID:
  """The transfer syntax of a file that does not tell it, whose pixels cannot be compressed."""
  if header["PixelData"].is_undefined_length:
    raise Refused("does not tell how its pixels are compressed (TransferSyntaxUID); export it anew")
  is_implicit, is_little = header.original_encoding
  explicit = uid.ExplicitVRLittleEndian if is_little else uid.ExplicitVRBigEndian
  return uid.ImplicitVRLittleEndian if is_implicit else explicit


def _check_compression(header: Any) -> None:
  syntax = header.file_meta.TransferSyntaxUID
  try:
    is_native = pydicom.pixels.get_decoder(syntax).is_native
  except NotImplementedError:
    raise Refused(f"is stored as {syntax.name}, which is not read; store it uncompressed") from None
  if is_native:
    _check_length(header)
  elif dicom_frames.is_needed(header) and not dicom_frames.is_installed():
    raise Refused(
      f"is compressed as {syntax.name}, which needs imagecodecs; run `pip install "
      "'primia_jax[dicom]'`, or store the file uncompressed"
    )


def _check_length(header: Any) -> None:
  """Raises Refused if there are the bytes of several frames; pydicom notes if there are too few."""
  bits = header.Rows * header.Columns * header.SamplesPerPixel * header.BitsAllocated
  if header.PhotometricInterpretation == "YBR_FULL_422":
    bits = bits * 2 // 3
  actual, expected = len(header.PixelData), math.ceil(bits / 8)
  if expected and actual >= 2 * expected:
    raise Refused(
      f"holds {actual} bytes of pixels, and {header.Rows} x {header.Columns} pixels need "
      f"{expected}: {actual // expected} frames without NumberOfFrames? Save each in its own file"
    )


def _padding(cells: np.ndarray, kind: np.dtype, header: Any) -> np.ndarray:
  """Returns which values are padding. `kind` is their type in the file: a padding value may be
  written with a sign where they have none, or without.
  """
  none, first = np.zeros(cells.shape[:2], bool), header.get("PixelPaddingValue")
  if first is None or header.SamplesPerPixel == 3:
    return none
  last = header.get("PixelPaddingRangeLimit")
  low, high = sorted(np.array([first, first if last is None else last]).astype(kind).tolist())
  distance = np.maximum(0, np.maximum(low - cells, cells - high))
  is_lossy = header.get("LossyImageCompression") == "01" or (
    header.file_meta.TransferSyntaxUID in _LOSSY
  )
  is_padding = _smeared(distance, int(np.ptp(cells))) if is_lossy else distance == 0
  return none if is_padding.all() else is_padding


def _smeared(distance: np.ndarray, width: int) -> np.ndarray:
  """Returns which values lossy compression may have made of padding: those within a fiftieth of the
  range of values, and on from there as long as each fiftieth has less than half as many values as
  the one before, which is the foot of a peak and no tissue.
  """
  fiftieths = distance * np.int64(50) // max(width, 1)
  counts = np.bincount(fiftieths.ravel())
  falls = [*(2 * counts[1:] < counts[:-1]), False]
  return fiftieths <= falls.index(False)


def _own_bits(cells: np.ndarray, is_padding: np.ndarray, header: Any) -> np.ndarray:
  """Keeps the bits of the values and drops those above, which may hold overlays.

  Raises:
    Refused: the bits above hold neither a sign nor overlays, so values may need them.
  """
  bits = header.BitsStored
  if bits == header.BitsAllocated:
    return cells
  values = lowest = cells & (2**bits - 1)
  if header.PixelRepresentation == 1:
    values = np.where(lowest >= 2 ** (bits - 1), lowest - 2**bits, lowest)
  groups = range(0x6000, 0x6020, 2)
  has_overlay = any((g, 0x0010) in header and (g, 0x3000) not in header for g in groups)
  is_beyond = (cells != values) & (cells != lowest)
  if header.SamplesPerPixel == 1:
    is_beyond &= ~is_padding
  if is_beyond.any() and not has_overlay:
    raise Refused(
      f"holds the value {cells[is_beyond][0]}, and its header gives values {bits} bits "
      "(BitsStored); export it anew"
    )
  return values


def _palette(header: Any) -> tuple[np.ndarray, int]:
  """Returns a palette as int64 [N, 3] and the stored value of its first entry."""
  length, first = _descriptor(header.RedPaletteColorLookupTableDescriptor, header)
  names = [f"{name}PaletteColorLookupTableData" for name in ("Red", "Green", "Blue")]
  if names[0] not in header:  # in segments
    whole = pydicom.pixels.apply_color_lut(first + np.arange(length), header)
    return whole[..., :3].astype(np.int64), first
  return np.stack([_table(header[name].value, length, header) for name in names], -1), first


def _descriptor(values: Any, header: Any) -> tuple[int, int]:
  """Returns the length of a table, and the stored value of its first entry with its own sign."""
  first = values[1] % 2**16
  is_negative = header.PixelRepresentation == 1 and first >= 2**15
  return values[0] % 2**16 or 2**16, first - 2**16 * is_negative


def _table(data: Any, length: int, header: Any) -> np.ndarray:
  """Returns the entries of a table of 8 or 16 bits, int64 [length]."""
  if isinstance(data, bytes):
    order = "<" if header.file_meta.TransferSyntaxUID.is_little_endian else ">"
    words = np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2")
    # Two entries of 8 bits share a word, the first in its lower half.
    data = words if len(words) >= length else words.astype("<u2").view(np.uint8)
  if (entries := np.atleast_1d(data).astype(np.int64)).size < length:
    raise Refused(f"has a table of {length} entries and holds {entries.size}; export it anew")
  return entries[:length]
