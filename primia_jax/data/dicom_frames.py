"""Decodes compressed DICOM pixels with imagecodecs, which the extra `dicom` brings. RLE and JPEG of
8 bits are left to pydicom and Pillow. Of the alternatives, GDCM ends the process on some damaged
files, and pydicom's reading of JPEG 2000 headers never ends on others.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from pydicom import encaps, pixels, uid

_JPEG = (uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
_JPEG_LS = (uid.JPEGLSLossless, uid.JPEGLSNearLossless)
_JPEG_2000 = (uid.JPEG2000Lossless, uid.JPEG2000)
_HTJ2K = (uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K)


def is_needed(header: Any) -> bool:
  """Tells whether imagecodecs must decode a file's pixels."""
  syntax = header.file_meta.TransferSyntaxUID
  if syntax == uid.JPEGExtended12Bit:
    return header.BitsStored > 8
  return syntax in (*_JPEG, *_JPEG_LS, *_JPEG_2000, *_HTJ2K)


def is_installed() -> bool:
  """Tells whether imagecodecs is there."""
  try:
    import imagecodecs  # noqa: F401
  except ImportError:
    return False
  return True


def decode(header: Any) -> np.ndarray:
  """Returns the values of a frame, signed or not as the header says: [H, W], or in RGB [H, W, 3];
  or [F, ...], if there are F > 1 frames.
  """
  import imagecodecs

  syntax, top = header.file_meta.TransferSyntaxUID, 2**header.BitsStored
  frames = list(encaps.generate_frames(header.PixelData, number_of_frames=1))
  size = _size_2000(frames[0]) if syntax in (*_JPEG_2000, *_HTJ2K) else _size(frames[0])
  if size != (header.Rows, header.Columns):  # damage may ask for a huge image
    raise ValueError(f"the compressed image is {size[0]} x {size[1]}, unlike Rows and Columns")
  if syntax in _JPEG:
    space = "RGB" if header.SamplesPerPixel == 3 else "GRAYSCALE"  # so that none is converted
    values = imagecodecs.jpeg8_decode(frames[0], colorspace=space, outcolorspace=space)
  elif syntax in _JPEG_LS:
    values = imagecodecs.jpegls_decode(frames[0])
  elif syntax in _JPEG_2000:
    values = imagecodecs.jpeg2k_decode(frames[0])
  else:
    values = imagecodecs.htj2k_decode(frames[0])
  if len(frames) > 1:
    return np.broadcast_to(values, (len(frames), *values.shape))
  if header.PhotometricInterpretation.startswith("YBR_FULL"):
    values = pixels.convert_color_space(values, "YBR_FULL", "RGB")
  # JPEG and JPEG-LS know no sign, and JPEG 2000 may have another one than the header.
  kind, wide = values.dtype, values.astype(np.int64)
  if header.PixelRepresentation == 1 and kind.kind == "u":
    return (wide - top * (wide >= top // 2)).astype(f"i{kind.itemsize}")
  if header.PixelRepresentation == 0 and kind.kind == "i":
    return (wide + top * (wide < 0)).astype(f"u{kind.itemsize}")
  return values


def _size(frame: bytes) -> tuple[int, int]:
  """Height and width in the frame header of JPEG or JPEG-LS."""
  at = 2
  while True:
    kind, length = struct.unpack_from(">HH", frame, at)
    if kind == 0xFFF7 or (kind & 0xFFF0 == 0xFFC0 and kind not in (0xFFC4, 0xFFC8, 0xFFCC)):
      return struct.unpack_from(">HH", frame, at + 5)
    at += 2 + length


def _size_2000(frame: bytes) -> tuple[int, int]:
  """Height and width at the beginning of a JPEG 2000 codestream, alone or in a file of boxes."""
  right, bottom, left, top = struct.unpack_from(">4I", frame, frame.find(b"\xff\x4f\xff\x51") + 8)
  return bottom - top, right - left
