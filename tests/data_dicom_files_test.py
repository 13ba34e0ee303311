"""Every file that comes with pydicom: its shape, its mean and its values by pydicom's own
functions, or the reason why it is refused. Files that pydicom does not decode alone were compared
with GDCM, and those of 12-bit JPEG with the pixels in pydicom's own tests.
"""

import pathlib
import re

import numpy as np
import pydicom
import pytest
from pydicom import pixels, uid

from primia_jax.data import decode, dicom

ROOT = pathlib.Path(pydicom.__file__).parent / "data/test_files"
IMAGES = {
  "693_J2KI.dcm": ((512, 512), 107.35),
  "CT_small.dcm": ((128, 128), 131.02),
  "ExplVR_BigEnd.dcm": ((60, 80, 3), 171.58),
  "GDCMJ2K_TextGBR.dcm": ((400, 400, 3), 124.44),
  "J2K_pixelrep_mismatch.dcm": ((512, 512), 107.02),
  "JPEG-lossy.dcm": ((1024, 256), 0.9),
  "JPGExtended.dcm": ((1024, 256), 0.9),
  "JPEG2000.dcm": ((1024, 256), 127.55),
  "JPEGLSNearLossless_08.dcm": ((45, 10), 55.56),
  "JPEGLSNearLossless_16.dcm": ((50, 10), 46.75),
  "MR_small.dcm": ((64, 64), 129.52),
  "MR_small_RLE.dcm": ((64, 64), 129.52),
  "MR_small_bigendian.dcm": ((64, 64), 129.52),
  "MR_small_expb.dcm": ((64, 64), 129.52),
  "MR_small_implicit.dcm": ((64, 64), 129.52),
  "MR_small_jp2klossless.dcm": ((64, 64), 129.52),
  "MR_small_jpeg_ls_lossless.dcm": ((64, 64), 129.52),
  "MR_small_padded.dcm": ((64, 64), 129.52),
  "SC_jpeg_no_color_transform.dcm": ((256, 256, 3), 243.97),
  "SC_jpeg_no_color_transform_2.dcm": ((256, 256, 3), 245.64),
  "SC_rgb_dcmtk_+eb+cr.dcm": ((100, 100, 3), 127.74),
  "SC_rgb_dcmtk_+eb+cy+n1.dcm": ((100, 100, 3), 127.55),
  "SC_rgb_dcmtk_+eb+cy+n2.dcm": ((100, 100, 3), 127.73),
  "SC_rgb_dcmtk_+eb+cy+np.dcm": ((100, 100, 3), 127.55),
  "SC_rgb_dcmtk_+eb+cy+s2.dcm": ((100, 100, 3), 127.73),
  "SC_rgb_dcmtk_+eb+cy+s4.dcm": ((100, 100, 3), 127.73),
  "SC_rgb_gdcm_KY.dcm": ((100, 100, 3), 127.7),
  "SC_rgb_jls_lossy_line.dcm": ((100, 100, 3), 128.0),
  "SC_rgb_jls_lossy_sample.dcm": ((100, 100, 3), 128.0),
  "SC_rgb_jpeg.dcm": ((256, 256, 3), 243.97),
  "SC_rgb_jpeg_app14_dcmd.dcm": ((256, 256, 3), 245.64),
  "SC_rgb_jpeg_dcmd.dcm": ((256, 256, 3), 243.97),
  "SC_rgb_jpeg_dcmtk.dcm": ((100, 100, 3), 127.73),
  "SC_rgb_jpeg_gdcm.dcm": ((100, 100, 3), 127.7),
  "SC_rgb_jpeg_lossy_gdcm.dcm": ((100, 100, 3), 127.53),
  "SC_rgb_rle.dcm": ((100, 100, 3), 127.7),
  "SC_rgb_rle_16bit.dcm": ((100, 100, 3), 127.7),
  "SC_rgb_rle_32bit.dcm": ((100, 100, 3), 127.7),
  "SC_rgb_small_odd.dcm": ((3, 3, 3), 128.78),
  "SC_rgb_small_odd_big_endian.dcm": ((3, 3, 3), 128.78),
  "SC_rgb_small_odd_jpeg.dcm": ((3, 3, 3), 128.33),
  "SC_ybr_full_422_uncompressed.dcm": ((100, 100, 3), 127.73),
  "examples_jpeg2k.dcm": ((480, 640, 3), 34.53),
  "examples_overlay.dcm": ((300, 484), 11.94),
  "examples_palette.dcm": ((350, 800, 3), 20.46),
  "examples_rgb_color.dcm": ((240, 320, 3), 34.27),
  "image_dfl.dcm": ((512, 512), 127.12),
}
REFUSED = {
  r"is a DICOM file without pixels \(": "ExplVR_BigEndNoMeta ExplVR_LitEndNoMeta UN_sequence "
  "empty_charset_LEI no_meta_group_length priv_SQ reportsi reportsi_with_empty_number_tags rtplan "
  "rtplan_truncated rtstruct test-SR waveform_ecg",
  "lacks PhotometricInterpretation, SamplesPerPixel": "meta_missing_tsyntax nested_priv_SQ",
  "holds a segmentation, which is not a picture": "liver_1frame liver_expb_1frame",
  "holds a radiation dose": "badVR rtdose rtdose_1frame rtdose_expb rtdose_expb_1frame rtdose_rle "
  "rtdose_rle_1frame",
  "holds 2 frames": "SC_rgb_rle_2frame SC_rgb_rle_16bit_2frame SC_rgb_rle_32bit_2frame",
  "holds 30 frames": "examples_ybr_color",
  "is corrupt DICOM": "JPEG2000-embedded-sequence-delimiter MR_truncated",
  "cannot be read as JPEG, PNG, TIFF, BMP or DICOM": "no_meta",  # begins with a space
}
FILES = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (*ROOT.glob("*.dcm"), *ROOT.glob("dicomdirtests/**/*"))
  if path.is_file() and not path.name.startswith("README")
)
BEYOND = (uid.JPEGExtended12Bit, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless)
REASONS = {f"{name}.dcm": reason for reason, names in REFUSED.items() for name in names.split()}
INDICES = [name for name in FILES if "DICOMDIR" in name or "TINY_ALPHA" in name]
REASONS |= dict.fromkeys(INDICES, r"is a DICOM file without pixels \(")


def by_pydicom(path):
  """What `dicom.read` should return without a window, and where it may differ."""
  header = pydicom.dcmread(path)
  values = pixels.pixel_array(header)
  if header.PhotometricInterpretation == "PALETTE COLOR":
    values = pixels.apply_color_lut(values, header)
    return values[..., :3] * (255 / (2 ** (8 * values.itemsize) - 1)), False
  if values.ndim == 3:
    return values * (255 / (2**header.BitsStored - 1)), False
  bits, is_signed = header.BitsStored, header.PixelRepresentation
  ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if is_signed else [0, 2**bits - 1])
  low, high = sorted(pixels.apply_modality_lut(ends, header))
  grey = 255 * (pixels.apply_modality_lut(values, header) - low) / (high - low)
  grey = 255 - grey if header.PhotometricInterpretation == "MONOCHROME1" else grey
  is_lossy = header.get("LossyImageCompression") == "01"
  padding = header.get("PixelPaddingValue")
  return np.where(values == padding, 0, grey), padding is not None and is_lossy


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
@pytest.mark.parametrize("name", FILES)
def test_each_file_is_as_pydicom_reads_it_or_refused(name):
  data = (ROOT / name).read_bytes()
  if name in REASONS:
    with pytest.raises(ValueError, match=rf"^{re.escape(name)} {REASONS[name]}"):
      decode.decode(data, name, size=8, channels=1)
    return
  image = dicom.read(data, name, percentiles=None)
  shape, mean = IMAGES.get(name, ((16, 16), image.mean()))
  assert image.shape == shape
  assert image.mean() == pytest.approx(mean, abs=0.01)
  syntax = pydicom.dcmread(ROOT / name).file_meta.TransferSyntaxUID
  if syntax not in BEYOND and name != "GDCMJ2K_TextGBR.dcm":
    expected, has_smeared_padding = by_pydicom(ROOT / name)
    differs = abs(image - expected) > (0.5001 if image.ndim == 3 else 1e-3)
    assert not differs.any() or (has_smeared_padding and not image[differs].any())
