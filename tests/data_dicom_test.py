import io
import sys

import numpy as np
import pydicom
import pytest
from dicom_maker import RAMP, make
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax.data import decode, dicom, folder, patient_ids
from primia_jax.data.load import load


def test_stored_bits_without_a_window():
  image = dicom.read(make(), "x", percentiles=None)
  assert image.dtype == np.float32
  np.testing.assert_allclose(image, RAMP * (255 / 4095), rtol=1e-6)
  grey = decode.decode(make(), "x", size=16, channels=3, percentiles=None)
  np.testing.assert_array_equal(grey, np.repeat(np.rint(RAMP[..., None] * (255 / 4095)), 3, -1))


def test_signed_values_without_a_window():
  signed = (RAMP.astype(np.int32) - 2048).astype(np.int16)
  np.testing.assert_allclose(
    dicom.read(make(signed), "x", percentiles=None), RAMP * (255 / 4095), rtol=1e-6
  )


@pytest.mark.parametrize("percentiles", [(1.0, 99.0), (10.0, 60.0), (0.0, 100.0)])
def test_percentile_window(percentiles):
  low, high = np.percentile(RAMP, percentiles)
  expected = 255 * np.clip((RAMP - low) / (high - low), 0, 1)
  np.testing.assert_allclose(dicom.read(make(), "x", percentiles=percentiles), expected, rtol=1e-5)


def test_the_default_window_resists_an_outlier():
  pixels = RAMP // 4
  pixels[0, 0] = 4095  # a metal marker
  assert dicom.read(make(pixels), "x").mean() > 100
  assert dicom.read(make(pixels), "x", percentiles=None).mean() < 40


def test_monochrome1_is_inverted():
  image = dicom.read(make(photometric="MONOCHROME1"), "x", percentiles=None)
  np.testing.assert_allclose(image, 255 - RAMP * (255 / 4095), atol=1e-4)


@pytest.mark.parametrize("percentiles", [None, (5.0, 95.0)])
def test_rescale_slope_and_intercept(percentiles):
  plain = dicom.read(make(), "x", percentiles=percentiles)
  rescaled = dicom.read(
    make(RescaleSlope=2.5, RescaleIntercept=-1024), "x", percentiles=percentiles
  )
  np.testing.assert_allclose(rescaled, plain, atol=1e-3)  # a window follows a rising line
  falling = dicom.read(make(RescaleSlope=-1, RescaleIntercept=4095), "x", percentiles=percentiles)
  np.testing.assert_allclose(falling, 255 - plain, atol=1e-3)
  both = make(photometric="MONOCHROME1", RescaleSlope=-1, RescaleIntercept=4095)
  np.testing.assert_allclose(dicom.read(both, "x", percentiles=percentiles), plain, atol=1e-3)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_counts_for_nothing_and_is_black(photometric):
  signed = RAMP.astype(np.int16)
  signed[:8] = -2000
  image = dicom.read(
    make(signed, photometric, bits=16, PixelPaddingValue=-2000), "x", percentiles=(0, 100)
  )
  inner = (signed[8:] - signed[8:].min()) * (255 / np.ptp(signed[8:]))
  np.testing.assert_allclose(image[:8], 0)
  np.testing.assert_allclose(
    image[8:], inner if photometric == "MONOCHROME2" else 255 - inner, atol=1e-3
  )


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_an_empty_window_widens_to_the_whole_range_and_a_constant_image_is_zero(photometric):
  pixels = np.full((20, 20), 7, np.uint16)
  np.testing.assert_array_equal(dicom.read(make(pixels, photometric), "x"), np.zeros((20, 20)))
  pixels[3, 4] = 9
  expected = np.where(pixels == 9, 255, 0)
  image = dicom.read(make(pixels, photometric), "x")
  np.testing.assert_array_equal(image, expected if photometric == "MONOCHROME2" else 255 - expected)


def test_colour_and_palette():
  colour = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  data = make(colour, "RGB", bits=8)
  np.testing.assert_array_equal(decode.decode(data, "x", size=8, channels=3), colour)
  luma = decode.decode(data, "x", size=8, channels=1)[..., 0]
  np.testing.assert_allclose(luma, colour @ np.array([0.299, 0.587, 0.114]), atol=0.51)
  tables = {
    f"{name}PaletteColorLookupTable{kind}": value
    for name, table in (("Red", [10, 20, 30, 40]), ("Green", [1, 2, 3, 4]), ("Blue", [9, 8, 7, 6]))
    for kind, value in (("Descriptor", [4, 0, 8]), ("Data", bytes(table)))
  }
  index = (np.arange(64) % 4).astype(np.uint8).reshape(8, 8)
  painted = decode.decode(make(index, "PALETTE COLOR", bits=8, **tables), "x", size=8, channels=3)
  np.testing.assert_array_equal(painted[0, :4], [[10, 1, 9], [20, 2, 8], [30, 3, 7], [40, 4, 6]])


def test_run_length_compression_is_read():
  np.testing.assert_array_equal(dicom.read(make(rle=True), "x"), dicom.read(make(), "x"))


def test_what_cannot_be_read_is_named():
  with pytest.raises(ValueError, match=r"x\.dcm is a DICOM file without pixels .* remove it"):
    dicom.read(make(None), "x.dcm")
  with pytest.raises(ValueError, match=r"x\.dcm holds 2 frames; save each"):
    dicom.read(make(np.concatenate([RAMP, RAMP]), NumberOfFrames=2, Rows=16), "x.dcm")
  for cut in (140, 300, len(make()) - 100):
    with pytest.raises(
      ValueError, match=r"x\.dcm is (corrupt DICOM|a DICOM file without pixels).*remove"
    ):
      dicom.read(make()[:cut], "x.dcm")
  wavelet = pydicom.dcmread(io.BytesIO(make(rle=True)))
  wavelet.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
  buffer = io.BytesIO()
  wavelet.save_as(buffer)
  with pytest.raises(ValueError, match=r"x\.dcm is .* compressed in a way that cannot be read .*"):
    dicom.read(buffer.getvalue(), "x.dcm")
  with pytest.raises(ValueError, match=r"percentiles are \(99, 1\); they must increase"):
    dicom.read(make(), "x.dcm", percentiles=(99, 1))
  with pytest.raises(ValueError, match=r"x\.dcm cannot be read as .* DICOM"):
    decode.decode(make()[131:], "x.dcm", size=8, channels=1)


@settings(max_examples=100, deadline=None)
@given(st.booleans(), st.integers(132, 2000), st.binary(min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")
def test_damage_gives_an_image_or_a_named_error(rle, at, junk):
  data = bytearray(make(rle=rle))
  data[at : at + len(junk)] = junk
  try:
    outcome = decode.decode(bytes(data), "x.dcm", size=8, channels=1).shape
  except ValueError as error:
    outcome = str(error)
  assert outcome == (8, 8, 1) or "x.dcm" in outcome


def test_without_pydicom_the_extra_is_named(monkeypatch):
  data = make()
  monkeypatch.setitem(sys.modules, "pydicom", None)
  with pytest.raises(
    ImportError, match=r"x\.dcm is a DICOM file, .* `pip install 'primia_jax\[dicom\]'`"
  ):
    decode.decode(data, "x.dcm", size=8, channels=1)


def test_a_folder_of_dicom_files_is_grouped_by_patient(tmp_path):
  names = {
    "normal/1.dcm": "P1",
    "normal/2": "P1",
    "viral/1.2.840.3": "P2",
    "viral/4.IMA": "",
    "bacterial/5.dcm": "P1",
  }
  for name, patient in names.items():
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(make(PatientID=patient))
  data = load(f"folder:{tmp_path}", size=16, channels=1, percentiles=None)["all"]
  assert data.label_names == ("normal", "bacterial", "viral")
  assert dict(zip(data.columns["path"], data.groups, strict=True)) == {
    name: f"patient/{patient}" if patient else name for name, patient in names.items()
  }
  assert data.has_patient.tolist() == [name != "viral/4.IMA" for name in data.columns["path"]]
  with pytest.raises(ValueError, match=r"1 \(viral/4\.IMA\), so each would count as a patient"):
    patient_ids.require(data)
  np.testing.assert_array_equal(data.images[2, ..., 0], np.rint(RAMP * (255 / 4095)))
  paths, images = folder.read_images(tmp_path, size=4, channels=3)
  assert images.shape == (len(paths), 4, 4, 3) == (5, 4, 4, 3)


def test_one_id_for_all_is_an_anonymisers_and_groups_nothing(tmp_path):
  for name in ("a/1.dcm", "b/2.dcm"):
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(make(PatientID="ANON"))
  data = load(f"folder:{tmp_path}", size=4, channels=1)["all"]
  assert data.groups.tolist() == ["a/1.dcm", "b/2.dcm"]
  assert not data.has_patient.any()
