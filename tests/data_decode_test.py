"""One image: every format and depth decodes as it should, and damage is named."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from primia_jax.data import decode


def encode(array, kind="PNG", **options):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(array)).save(buffer, kind, **options)
  return buffer.getvalue()


GREY = np.random.default_rng(0).integers(0, 256, (12, 10), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (12, 10, 3), np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP"])
def test_lossless_formats_of_the_asked_size_come_back_exactly(kind):
  square = GREY[:10, :10]
  np.testing.assert_array_equal(
    decode.decode(encode(square, kind), "x", size=10, channels=1), square[..., None]
  )
  grey3 = decode.decode(encode(square, kind), "x", size=10, channels=3)
  np.testing.assert_array_equal(grey3, np.repeat(square[..., None], 3, -1))
  np.testing.assert_array_equal(
    decode.decode(encode(COLOUR[:10], kind), "x", size=10, channels=3), COLOUR[:10]
  )


def test_colour_becomes_grey_by_the_luma_of_itu_r_601():
  grey = decode.decode(encode(COLOUR[:10]), "x", size=10, channels=1)[..., 0]
  np.testing.assert_allclose(grey, COLOUR[:10] @ np.array([0.299, 0.587, 0.114]), atol=0.51)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 65535), st.sampled_from(["PNG", "TIFF"]), st.sampled_from([1, 3]))
def test_16_bit_is_scaled_by_its_depth(value, kind, channels):
  image = decode.decode(
    encode(np.full((5, 7), value, np.uint16), kind), "x", size=4, channels=channels
  )
  assert image.shape == (4, 4, channels)
  np.testing.assert_array_equal(image, np.rint(value / 257).astype(np.uint8))  # 257 = 65535 / 255


def test_a_16_bit_tiff_in_which_0_is_white_is_inverted():
  ramp = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
  image = decode.decode(encode(ramp, "TIFF", tiffinfo={262: 0}), "x", size=8, channels=1)
  np.testing.assert_allclose(image[..., 0], 255 - ramp / 257, atol=0.51)


def test_downsampling_is_antialiased():
  stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
  image = decode.decode(encode(stripes), "x", size=8, channels=1)
  assert abs(image.astype(int) - 127).max() <= 12  # picking pixels would give 0 or 255
  image = decode.decode(encode(stripes.astype(np.uint16) * 257), "x", size=8, channels=1)
  assert abs(image.astype(int) - 127).max() <= 12


def test_a_large_jpeg_agrees_with_its_full_decoding():
  y, x = np.mgrid[:512, :512]
  smooth = (127 + 60 * np.sin(x / 40) + 60 * np.cos(y / 50)).astype(np.uint8)
  data = encode(np.stack([smooth] * 3, -1), "JPEG", quality=95)
  full = Image.open(io.BytesIO(data)).convert("L").resize((64, 64), Image.Resampling.BILINEAR)
  image = decode.decode(data, "x", size=64, channels=1)[..., 0]
  np.testing.assert_allclose(image.astype(int), np.asarray(full).astype(int), atol=2)


def test_palettes_bits_and_orientation_tags_are_resolved():
  palette = Image.fromarray(COLOUR[:10]).quantize(16)
  buffer = io.BytesIO()
  palette.save(buffer, "PNG")
  expected = np.asarray(palette.convert("RGB"))
  np.testing.assert_array_equal(
    decode.decode(buffer.getvalue(), "x", size=10, channels=3), expected
  )
  bits = GREY[:10, :10] > 127
  np.testing.assert_array_equal(
    decode.decode(encode(bits), "x", size=10, channels=1)[..., 0], bits * np.uint8(255)
  )
  exif = Image.Exif()
  exif[0x0112] = 3  # upside down
  turned = decode.decode(encode(GREY[:10, :10], exif=exif), "x", size=10, channels=1)[..., 0]
  np.testing.assert_array_equal(turned, GREY[9::-1, ::-1])


BROKEN = {
  "no image": b"hello, this is text",
  "cut PNG": encode(COLOUR)[:-60],
  "cut JPEG": encode(np.tile(COLOUR, (9, 9, 1)), "JPEG")[:3000],
  "cut TIFF": encode(COLOUR, "TIFF")[:100],
  "cut BMP": encode(COLOUR, "BMP")[:100],
  "damaged PNG": encode(COLOUR)[:50] + bytes(40) + encode(COLOUR)[90:],
  "GIF": encode(GREY, "GIF"),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named(data):
  with pytest.raises(ValueError, match=r"here/x\.png cannot be read .*copy it again or remove it"):
    decode.decode(data, "here/x.png", size=8, channels=1)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@settings(max_examples=60, deadline=None)
@given(
  st.sampled_from(["PNG", "JPEG", "TIFF", "BMP"]),
  st.integers(0, 10**6),
  st.binary(min_size=1, max_size=8),
)
def test_damage_gives_an_image_or_a_named_error(kind, at, junk):
  data = bytearray(encode(COLOUR, kind))
  data[at % len(data) : at % len(data) + len(junk)] = junk
  try:
    outcome = decode.decode(bytes(data), "x.png", size=8, channels=1).shape
  except ValueError as error:
    outcome = str(error)
  assert outcome == (8, 8, 1) or outcome.startswith("x.png ")


def test_values_of_unknown_scale_frames_and_empty_files_are_refused():
  for array in (GREY.astype(np.float32), GREY.astype(np.int32)):
    with pytest.raises(ValueError, match=r"x\.tif holds 32-bit .* save it with 8 or 16"):
      decode.decode(encode(array, "TIFF"), "x.tif", size=8, channels=1)
  pages = encode(GREY, "TIFF", save_all=True, append_images=[Image.fromarray(GREY)])
  with pytest.raises(ValueError, match=r"x\.tif holds 2 frames; save each"):
    decode.decode(pages, "x.tif", size=8, channels=1)
  with pytest.raises(ValueError, match=r"x\.png is empty"):
    decode.decode(b"", "x.png", size=8, channels=1)
  with pytest.raises(ValueError, match="size is 0"):
    decode.decode(encode(GREY), "x.png", size=0, channels=1)
  with pytest.raises(ValueError, match=r"channels is 2; it must be 1 .* or 3"):
    decode.decode(encode(GREY), "x.png", size=8, channels=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "JPEG"])
def test_an_image_beyond_the_limit_of_pixels_is_refused_with_the_limit(kind, monkeypatch):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
  with pytest.raises(ValueError, match=r"^x has more than 100 pixels; save it smaller$"):
    decode.decode(encode(GREY, kind), "x", size=8, channels=1)
