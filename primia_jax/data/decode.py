"""Decodes images (JPEG, PNG, TIFF, BMP, DICOM) to uint8 arrays of one shape: one at a time, or many
on demand.
"""

from __future__ import annotations

import dataclasses
import io
import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from primia_jax.data import dicom

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", *dicom.SUFFIXES)
PERCENTILES = (1.0, 99.0)  # default window of a grey DICOM image

_FORMATS = ("JPEG", "PNG", "TIFF", "BMP")
# What Pillow raises for a truncated or damaged file of any format.
_BROKEN = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  KeyError,
  TypeError,
  struct.error,
  zlib.error,
)
_CHUNK = 16  # images that a thread decodes per task
_ORIENTATION = 0x0112  # tag of EXIF; 5 to 8 swap height and width


def decode(
  data: bytes,
  name: str,
  *,
  size: int,
  channels: int,
  ct_window: tuple[float, float] | None = None,
  percentiles: tuple[float, float] | None = PERCENTILES,
  grey_bits: int = 0,
) -> np.ndarray:
  """Decodes one image to uint8 [size, size, channels].

  Integer images are scaled by their bit depth (16 bits: 65535 becomes 255, or 2^grey_bits - 1 does,
  as scanners store 12 bits in 16), never clipped. Colour
  becomes grey by the ITU-R 601-2 luma; grey becomes three equal channels. The image is resized to a
  square with an antialiasing bilinear filter, which does not preserve the aspect ratio. The
  camera's orientation tag is applied; transparency is dropped.

  Args:
    data: a whole JPEG, PNG, TIFF, BMP or DICOM file. Its content, not its name, decides the format.
    name: the file, for error messages.
    size: height and width of the result, in pixels.
    channels: 1 (grey) or 3 (RGB).
    ct_window: for CT images as DICOM, all others being refused with it; see `dicom.read`.
    percentiles: for grey DICOM only; see `dicom.read`.
    grey_bits: that 16-bit grey images use; 0 for all 16. See `scan.read`, which finds them.

  Raises:
    ValueError: the file is corrupt or too large, or holds several frames, values of unknown scale
      (32-bit integers, floats) or values that `grey_bits` cannot hold.
    ImportError: it is a DICOM file and pydicom is not installed.
  """
  check_form(size, channels)
  if dicom.is_dicom(data):
    pixels = dicom.read(data, name, ct_window=ct_window, percentiles=percentiles)
    return to_uint8(pixels, size, channels)
  if not data:
    raise ValueError(f"{name} is empty; copy it again or remove it")
  if ct_window is not None:
    raise ValueError(
      f"{name} is not a DICOM file, and ct_window needs CT images in Hounsfield units; leave out "
      "ct_window, or remove it"
    )
  try:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    num_frames = getattr(image, "n_frames", 1)
    # Decodes a JPEG at the smallest of 1/8, 1/4, 1/2 and 1 of its size that is large enough.
    image.draft("L" if channels == 1 else "RGB", (size, size))
    depth, is_inverted = _bit_depth(image)
    image.load()
    image = ImageOps.exif_transpose(image)
  except Image.DecompressionBombError:
    limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
    raise ValueError(f"{name} has more than {limit} pixels; save it smaller") from None
  except _BROKEN as error:
    unknown = isinstance(error, UnidentifiedImageError)  # whose text is of this process's memory
    raise ValueError(
      f"{name} cannot be read as JPEG, PNG, TIFF, BMP or DICOM "
      f"({'its content is none of these' if unknown else error}); copy it again or remove it"
    ) from error
  if num_frames > 1:
    raise ValueError(f"{name} holds {num_frames} frames; save each in its own file")
  if image.mode in ("I", "F"):
    raise ValueError(
      f"{name} holds 32-bit or signed values, whose scale is unknown; save it with 8 or 16 "
      f"unsigned bits"
    )
  if image.mode.startswith("I;16"):
    if depth == 16 and 0 < grey_bits < 16:
      depth = grey_bits
      if (most := int(np.asarray(image).max())) >= 2**depth:
        raise ValueError(
          f"{name} holds the value {most}, more than {depth} bits; give --grey_bits=16 or remove it"
        )
    grey = np.asarray(image).astype(np.float32) * np.float32(255 / (2**depth - 1))
    return to_uint8(255 - grey if is_inverted else grey, size, channels)
  return _finish(image.convert("RGB") if image.mode == "P" else image, size, channels)


def largest_16_bit(data: bytes) -> int:
  """The largest value of a 16-bit grey PNG or TIFF whose bits no tag tells; 0 for any other file,
  a damaged one included.
  """
  if not data.startswith((b"\x89PNG", b"II*\0", b"MM\0*")):
    return 0
  try:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if not image.mode.startswith("I;16") or _bit_depth(image)[0] != 16:
      return 0
    return int(np.asarray(image).max())
  except (*_BROKEN, Image.DecompressionBombError):
    return 0  # `decode` names it


def own_shape(data: bytes, name: str) -> tuple[int, int]:
  """Height and width of an image as `decode` sees it before it resizes it; raises as `decode`."""
  if dicom.is_dicom(data):
    return dicom.shape(data, name)
  try:
    image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    is_turned = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
  except (*_BROKEN, Image.DecompressionBombError) as error:
    raise ValueError(f"{name} cannot be read ({error}); copy it again or remove it") from error
  return (width, height) if is_turned else (height, width)


def to_uint8(image: np.ndarray, size: int, channels: int) -> np.ndarray:
  """Converts an image (uint8 [H, W] or [H, W, 3], or float32 [H, W] in 0..255) to uint8 [size,
  size, channels].
  """
  if image.dtype == np.uint8:
    return _finish(Image.fromarray(image), size, channels)
  resized = Image.fromarray(image.astype(np.float32)).resize(
    (size, size), Image.Resampling.BILINEAR
  )
  grey = np.clip(np.rint(np.asarray(resized)), 0, 255).astype(np.uint8)
  return np.repeat(grey[..., None], channels, axis=-1)


def nearest(masks: np.ndarray, height: int, width: int | None = None) -> np.ndarray:
  """Masks [N, H, W] at a new height and width, which is the height unless given: each pixel takes
  the class at its centre.
  """
  sides = (height, height if width is None else width)
  rows, columns = (
    ((np.arange(new) + 0.5) * old / new).astype(int)
    for new, old in zip(sides, masks.shape[1:], strict=True)
  )
  return masks[:, rows[:, None], columns]


def check_form(size: int, channels: int) -> None:
  """Raises ValueError unless size and number of channels are supported."""
  if size < 1:
    raise ValueError(f"the image size is {size}; it must be at least 1 pixel")
  if channels not in (1, 3):
    raise ValueError(f"the number of channels is {channels}; it must be 1 (grey) or 3 (RGB)")


@dataclasses.dataclass(frozen=True)
class EncodedImages:
  """Random access to encoded images (a `dataset.Images`). A pool of threads decodes them on demand.

  `EncodedImages(...)[np.arange(n)]` loads the first n into memory. An instance can be pickled if
  `read` can.

  Attributes:
    keys: [N], the arguments of `read`, e.g. paths.
    read: returns the bytes of one encoded image; called from several threads.
    root: where the images are, for error messages.
    size: height and width, in pixels.
    channels: 1 (grey) or 3 (RGB).
    percentiles: for grey DICOM only; see `dicom.read`.
    ct_window: for CT images as DICOM, all others being refused with it; see `dicom.read`.
    grey_bits: that 16-bit grey images use; see `decode`.
  """

  keys: np.ndarray
  read: Callable[[Any], bytes]
  root: str
  size: int
  channels: int
  percentiles: tuple[float, float] | None = PERCENTILES
  ct_window: tuple[float, float] | None = None
  grey_bits: int = 0

  def __post_init__(self):
    check_form(self.size, self.channels)

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.keys), self.size, self.size, self.channels)

  def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
    images, bad = self.try_read(index)
    if bad:
      raise next(iter(bad.values()))
    return images

  def try_read(self, index: np.ndarray) -> tuple[np.ndarray, dict[int, Exception]]:
    """Reads images, and returns what is wrong with those that cannot be read, by their place in
    `index`.
    """
    keys = self.keys[np.asarray(index)]
    images = np.empty((len(keys), *self.shape[1:]), np.uint8)
    bad: dict[int, Exception] = {}

    def fill(start: int) -> None:
      for i in range(start, min(start + _CHUNK, len(keys))):
        try:
          images[i] = decode(
            self.read(keys[i].item()),
            f"{self.root}/{keys[i]}",
            size=self.size,
            channels=self.channels,
            ct_window=self.ct_window,
            percentiles=self.percentiles,
            grey_bits=self.grey_bits,
          )
        except (ValueError, OSError) as error:
          bad[i] = error

    # Threads help because Pillow decodes and resizes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
      for _ in pool.map(fill, range(0, len(keys), _CHUNK)):
        pass  # re-raises a thread's exception here, and cancels tasks that have not started
    return images, dict(sorted(bad.items()))


def _bit_depth(image: Image.Image) -> tuple[int, bool]:
  """Returns how many bits a 16-bit grey image uses, and whether 0 is white. Both are TIFF tags that
  Pillow ignores.
  """
  if image.format != "TIFF":
    return 16, False
  tags = image.tag_v2  # type: ignore[attr-defined]
  return tags.get(258, (16,))[0], tags.get(262, 1) == 0


def _finish(image: Image.Image, size: int, channels: int) -> np.ndarray:
  """Converts the colours of an 8-bit image and resizes it, to uint8 [size, size, channels]."""
  image = image.convert("L" if channels == 1 else "RGB")
  if image.size != (size, size):
    image = image.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(image).reshape(size, size, channels)
