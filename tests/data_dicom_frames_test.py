"""Compressed pixels come back as they were, with their sign and colour, or are refused."""

import io

import imagecodecs
import numpy as np
import pydicom
import pytest
from dicom_maker import RAMP, make
from pydicom import encaps, uid

from primia_jax.data import dicom

COLOUR = np.random.default_rng(0).integers(0, 256, (16, 20, 3), np.uint8)


def lossless_jpeg(a):
  space, bits = ("RGB", 8) if a.ndim == 3 else ("GRAYSCALE", 12)
  form = {"colorspace": space, "outcolorspace": space, "bitspersample": bits}
  return imagecodecs.jpeg8_encode(a, lossless=True, **form)


LOSSLESS = {
  uid.JPEGLossless: lossless_jpeg,
  uid.JPEGLSLossless: imagecodecs.jpegls_encode,
  uid.JPEG2000Lossless: lambda a: imagecodecs.jpeg2k_encode(a, level=0, reversible=True),
  uid.HTJ2KLossless: imagecodecs.htj2k_encode,
}


def compress(data, syntax, *frames):
  """Returns a file with other pixels."""
  header = pydicom.dcmread(io.BytesIO(data))
  header.PixelData = encaps.encapsulate(list(frames))
  header["PixelData"].is_undefined_length = True
  header.file_meta.TransferSyntaxUID = syntax
  buffer = io.BytesIO()
  header.save_as(buffer)
  return buffer.getvalue()


def read(data):
  return dicom.read(data, "x.dcm", percentiles=None)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_grey_comes_back_with_or_without_a_sign(syntax):
  frame = LOSSLESS[syntax](RAMP)
  np.testing.assert_array_equal(read(compress(make(), syntax, frame)), read(make()))
  signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
  form = dict(bits=12, PixelPaddingValue=-2048)
  unsigned_frame = LOSSLESS[syntax]((signed & 4095).astype(np.uint16))
  data = compress(make(signed, **form), syntax, unsigned_frame)
  np.testing.assert_array_equal(read(data), read(make(signed, **form)))


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_colour_comes_back(syntax):
  for space in ("RGB", "YBR_FULL"):
    plain = make(COLOUR, space, bits=8)
    np.testing.assert_array_equal(
      read(compress(plain, syntax, LOSSLESS[syntax](COLOUR))), read(plain)
    )


def test_signed_jpeg_2000_of_unsigned_values_is_read_as_the_header_says():
  frame = LOSSLESS[uid.JPEG2000Lossless](RAMP.astype(np.int16))
  np.testing.assert_array_equal(read(compress(make(), uid.JPEG2000Lossless, frame)), read(make()))


def test_jpeg_of_12_bits():
  frame = imagecodecs.jpeg8_encode(RAMP, level=98, bitspersample=12)
  image = read(compress(make(), uid.JPEGExtended12Bit, frame))
  np.testing.assert_allclose(image, read(make()), atol=1)


@pytest.mark.parametrize("syntax", LOSSLESS)
def test_frames_without_their_number_and_other_sizes_are_refused(syntax):
  frame = LOSSLESS[syntax](RAMP)
  with pytest.raises(ValueError, match=r"x\.dcm holds data of shape \(2, 16, 16\) where .* says"):
    read(compress(make(), syntax, frame, frame))
  large = LOSSLESS[syntax](np.concatenate([RAMP] * 2))
  with pytest.raises(ValueError, match=r"x\.dcm is corrupt .*is 32 x 16, unlike Rows and Columns"):
    read(compress(make(), syntax, large))
  with pytest.raises(ValueError, match=r"x\.dcm is corrupt DICOM"):
    read(compress(make(), syntax, frame[: len(frame) // 8]))
