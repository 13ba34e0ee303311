"""DICOM files as scanners, archives and converters write them: read rightly, or refused for a
reason.
"""

import io
import sys

import numpy as np
import pydicom
import pytest
from dicom_maker import RAMP, make
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from primia_jax.data import decode, dicom, dicom_pixels

FULL = RAMP * (255 / 4095)  # RAMP without a window
PLAIN = dict(percentiles=None)
COLOUR = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)


def read(data, **options):
  return dicom.read(data, "x.dcm", **PLAIN | options)


def refuse(data, reason, **options):
  with pytest.raises(ValueError, match=rf"^x\.dcm {reason}"):
    read(data, **options)


def change(data, **tags):
  """Returns a file with other tags; None removes one."""
  header = pydicom.dcmread(io.BytesIO(data))
  for name, value in tags.items():
    place = header.file_meta if name == "TransferSyntaxUID" else header
    if value is None:
      delattr(place, name)
    else:
      setattr(place, name, value)
  buffer = io.BytesIO()
  header.save_as(buffer)
  return buffer.getvalue()


def items(**tags):
  """Returns a sequence of one item."""
  item = Dataset()
  for name, value in tags.items():
    setattr(item, name, value)
  return [item]


def big_endian(data):
  """Returns a file of 16-bit words in the other byte order."""
  header = pydicom.dcmread(io.BytesIO(data))
  names = ["PixelData", *(f"{c}PaletteColorLookupTableData" for c in ("Red", "Green", "Blue"))]
  for name in names:
    if name in header:
      setattr(header, name, np.frombuffer(header[name].value, "<u2").astype(">u2").tobytes())
  header["PixelData"].VR = "OW"
  header.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
  buffer = io.BytesIO()
  pydicom.dcmwrite(buffer, header, implicit_vr=False, little_endian=False)
  return buffer.getvalue()


def test_frames_without_their_number_are_refused_with_both_lengths():
  two = np.concatenate([RAMP, RAMP])
  refuse(make(two, Rows=16), r"holds 1024 bytes of pixels, and 16 x 16 pixels need 512: 2 frames")
  three = make(np.concatenate([RAMP] * 3), Rows=16)  # as many as a colour image has samples
  refuse(three, r"holds 1536 bytes .* 3 frames without NumberOfFrames\? Save each")
  packed = change(make(two, NumberOfFrames=2, Rows=16, rle=True), NumberOfFrames=None)
  refuse(packed, r"holds data of shape \(2, 16, 16\) where its header says \(16, 16\)")
  np.testing.assert_allclose(read(change(make(), PixelData=RAMP.tobytes() + bytes(64))), FULL)


@pytest.mark.parametrize("rle", [False, True])
def test_values_are_shifted_down_from_their_high_bit(rle):
  junk = np.random.default_rng(0).integers(0, 16, RAMP.shape, np.uint16)
  np.testing.assert_allclose(read(make(RAMP * 16 + junk, HighBit=15, rle=rle)), FULL)
  signed = ((RAMP.astype(np.int16) - 2048) * 16 + junk.astype(np.int16)).astype(np.int16)
  np.testing.assert_allclose(read(make(signed, HighBit=15, rle=rle)), FULL)


def test_bits_above_the_values_hold_a_sign_or_an_overlay_or_the_file_is_refused():
  negative = RAMP.astype(np.int16) - 2048
  np.testing.assert_allclose(read(make(negative & 4095)), FULL)
  drawn = RAMP | np.uint16(1 << 14)
  group = make(drawn)
  refuse(group, r"holds the value 16384, and its header gives values 12 bits \(BitsStored\)")
  header = pydicom.dcmread(io.BytesIO(group))
  header.add_new((0x6000, 0x0010), "US", 16)
  header.add_new((0x6000, 0x0102), "US", 14)
  buffer = io.BytesIO()
  header.save_as(buffer)
  np.testing.assert_allclose(read(buffer.getvalue()), FULL)
  for high_bit in (10, 16):
    refuse(make(HighBit=high_bit), rf"has HighBit={high_bit}, BitsStored=12 and BitsAllocated=16")


def palette(tables, bits, index, first=0):
  tags = {}
  for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
    tags[f"{name}PaletteColorLookupTableDescriptor"] = [len(table), first, bits]
    tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
  return make(index, "PALETTE COLOR", bits=8, **tags)


@pytest.mark.parametrize("order", [lambda data: data, big_endian])
@pytest.mark.parametrize("first", [0, 3])
def test_palettes_have_8_or_16_bits_whatever_they_declare(order, first):
  index = np.random.default_rng(1).integers(0, 20, (8, 8)).astype(np.uint8)
  tables = np.random.default_rng(2).integers(0, 256, (3, 16), np.uint8)
  expected = tables.T[np.clip(index.astype(int) - first, 0, 15)]
  for depth, scale, declared in ((np.uint8, 1, 8), ("<u2", 1, 16), ("<u2", 1, 8), ("<u2", 257, 16)):
    data = order(palette(tables.astype(depth) * scale, declared, index, first))
    np.testing.assert_array_equal(read(data), expected, f"{depth} {scale} {declared}")
  short = change(palette(tables, 8, index), BluePaletteColorLookupTableData=b"1234")
  refuse(short, "has a table of 16 entries and holds 4")


def test_palettes_in_segments_are_expanded():
  index = np.arange(64, dtype=np.uint8).reshape(8, 8) % 16
  tags = {}
  for name in ("Red", "Green", "Blue"):
    tags[f"{name}PaletteColorLookupTableDescriptor"] = [16, 0, 16]
    segments = np.array([0, 1, 0, 1, 15, 150], "<u2")  # one value, then a line of 15 up to 150
    tags[f"Segmented{name}PaletteColorLookupTableData"] = segments.tobytes()
  expected = np.repeat(10 * index[..., None], 3, -1)
  np.testing.assert_array_equal(read(make(index, "PALETTE COLOR", bits=8, **tags)), expected)


def test_padding_smeared_by_lossy_compression_is_left_out():
  rng = np.random.default_rng(0)
  pixels = (800 + RAMP // 10).astype(np.uint16)
  pixels[:, :6] = rng.integers(0, 4, (16, 6))
  data = make(pixels, PixelPaddingValue=0, LossyImageCompression="01")
  low, high = np.percentile(pixels[:, 6:], (1, 99))
  image = read(data, percentiles=(1, 99))
  np.testing.assert_array_equal(image[:, :6], 0)
  expected = 255 * np.clip((pixels[:, 6:] - low) / (high - low), 0, 1)
  np.testing.assert_allclose(image[:, 6:], expected, rtol=1e-5)
  exact = read(change(data, LossyImageCompression=None), percentiles=(1, 99))
  assert np.ptp(exact[:, 6:]) < 100  # as long as the smear counts as tissue


def test_padding_far_smeared_is_found_and_tissue_that_begins_there_is_kept():
  rng = np.random.default_rng(0)
  wide = np.concatenate([rng.normal(-2000, 40, 3000), rng.normal(40, 60, 6000)]).astype(np.int16)
  form = dict(PixelPaddingValue=-2000, LossyImageCompression="01", bits=16)
  header = dicom_pixels.parse(make(wide.reshape(90, 100), **form))
  is_padding = dicom_pixels.stored(header).is_padding
  assert is_padding.reshape(-1)[:3000].mean() > 0.99
  assert not is_padding.reshape(-1)[3000:].any()
  header = dicom_pixels.parse(make(PixelPaddingValue=0, LossyImageCompression="01"))
  assert dicom_pixels.stored(header).is_padding.sum() == 6  # values to 4080 / 50


def test_padding_values_may_have_the_wrong_sign_and_a_blank_limit():
  pixels = RAMP.astype(np.int16)
  pixels[0] = -2000
  data = make(pixels, bits=16, PixelPaddingValue=-2000)
  header = pydicom.dcmread(io.BytesIO(data))
  header.add_new("PixelPaddingValue", "US", 65536 - 2000)
  header.add_new("PixelPaddingRangeLimit", "US", None)
  buffer = io.BytesIO()
  header.save_as(buffer)
  window = dict(percentiles=(0, 100))
  np.testing.assert_array_equal(read(buffer.getvalue(), **window), read(data, **window))
  assert not read(data, **window)[0].any()


def test_blank_rescaling_is_none_and_one_of_functional_groups_is_found():
  np.testing.assert_allclose(read(make(RescaleSlope=None, RescaleIntercept=None)), FULL)
  blank = make(RescaleSlope=None, RescaleIntercept=-100, Modality="CT")
  named = make(RescaleSlope=1, RescaleIntercept=-100, Modality="CT")
  window = dict(ct_window=(1000, 2000))
  np.testing.assert_array_equal(read(blank, **window), read(named, **window))
  macro = items(RescaleSlope=1, RescaleIntercept=-100, RescaleType="HU")
  for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
    enhanced = make(Modality="CT", **{groups: items(PixelValueTransformationSequence=macro)})
    np.testing.assert_array_equal(read(enhanced, **window), read(named, **window))
  refuse(make(RescaleSlope=0, RescaleIntercept=1), "has RescaleSlope=0.* export it anew")


@pytest.mark.parametrize("kind", ["US", "OW"])
@pytest.mark.parametrize("first", [0, -100, 50])
def test_a_modality_table_is_applied(kind, first):
  table = (np.arange(4096) // 2)[::-1]
  item = Dataset()
  item.add_new("LUTDescriptor", "SS", [4096, first, 12])
  item.add_new("LUTData", kind, table.tolist() if kind == "US" else table.astype("<u2").tobytes())
  signed = make(RAMP.astype(np.int16), bits=16, ModalityLUTSequence=[item])
  expected = table[np.clip(RAMP.astype(int) - first, 0, 4095)] * (255 / 4095)
  np.testing.assert_allclose(read(signed), expected, rtol=1e-6)


@pytest.mark.parametrize("options", [PLAIN, dict(percentiles=(5, 95))])
def test_windows_of_a_file_change_nothing(options):
  plain = read(make(), **options)
  for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
    tags = dict(WindowCenter=[500, 900], WindowWidth=[50, 300], VOILUTFunction=function)
    np.testing.assert_array_equal(read(make(**tags), **options), plain)
  table = items(LUTDescriptor=[2, 0, 8], LUTData=[255, 0])
  table[0]["LUTDescriptor"].VR = table[0]["LUTData"].VR = "US"
  np.testing.assert_array_equal(read(make(VOILUTSequence=table), **options), plain)


def test_colour_by_plane_and_as_ybr():
  np.testing.assert_array_equal(read(make(COLOUR, "RGB", bits=8)), COLOUR)
  by_plane = make(COLOUR, "RGB", bits=8, PlanarConfiguration=1)
  planes = COLOUR.transpose(2, 0, 1).tobytes()
  np.testing.assert_array_equal(read(change(by_plane, PixelData=planes)), COLOUR)
  ybr = pydicom.pixels.convert_color_space(COLOUR, "RGB", "YBR_FULL")
  assert abs(read(make(ybr, "YBR_FULL", bits=8)).astype(int) - COLOUR).max() <= 2
  wide = COLOUR.astype(np.uint16) * 257
  np.testing.assert_array_equal(read(make(wide, "RGB", bits=16)), COLOUR)


@pytest.mark.parametrize(
  "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
)
def test_files_without_preamble_and_without_transfer_syntax_are_read(syntax):
  whole = make(PatientID="P1")
  header, bare = pydicom.dcmread(io.BytesIO(whole)), DicomBytesIO()
  bare.is_implicit_VR, bare.is_little_endian = syntax.is_implicit_VR, syntax.is_little_endian
  header["PixelData"].VR = "OW"
  if not bare.is_little_endian:
    header.PixelData = RAMP.astype(">u2").tobytes()
  write_dataset(bare, header)
  for data in (bare.getvalue(), whole[132:]):
    assert data[128:132] != b"DICM"
    assert dicom.is_dicom(data)
    assert dicom.patient_id(data, "x") == "P1"
    np.testing.assert_allclose(read(data), FULL)
    grey = decode.decode(data, "x", size=16, channels=1, percentiles=None)
    np.testing.assert_array_equal(grey[..., 0], np.rint(FULL))
  for other in (b"", b"\x89PNG\r\n", b"BM\x08\0", b"II*\0\x08\0\0\0", b"MM\0*", b"\xff\xd8\xff"):
    assert not dicom.is_dicom(other)


def test_compressed_pixels_without_transfer_syntax_are_refused():
  refuse(change(make(rle=True), TransferSyntaxUID=None), "does not tell how its pixels are compr")


@pytest.mark.parametrize(
  ("syntax", "words"),
  [
    (uid.JPEGLossless, r"JPEG Lossless, Non-Hierarchical \(Process 14\)"),
    (uid.JPEGLosslessSV1, "JPEG Lossless, Non-Hierarchical, First-Order Prediction .*"),
    (uid.JPEGLSLossless, "JPEG-LS Lossless Image Compression"),
    (uid.JPEG2000Lossless, "JPEG 2000 .*"),
    (uid.HTJ2K, "High-Throughput JPEG 2000 Image Compression"),
    (uid.JPEGExtended12Bit, "JPEG Extended .*"),
  ],
)
def test_a_missing_decoder_is_named_with_its_command(syntax, words, monkeypatch):
  monkeypatch.setitem(sys.modules, "imagecodecs", None)
  data = change(make(rle=True), TransferSyntaxUID=syntax)
  refuse(
    data, rf"is compressed as {words}, which needs .*; run `pip install 'primia_jax\[dicom\]'`"
  )


def test_transfer_syntaxes_without_any_decoder_are_named():
  for syntax, words in ((uid.MPEG4HP41, "MPEG-4"), (uid.UID("1.2.3.4"), r"1\.2\.3\.4")):
    refuse(change(make(rle=True), TransferSyntaxUID=syntax), f"is stored as {words}.*uncompressed")


@pytest.mark.parametrize(
  ("tags", "reason"),
  [
    ({"Modality": "SEG"}, "holds a segmentation, which is not a picture; remove it"),
    ({"Modality": "RTDOSE"}, "holds a radiation dose"),
    ({"PixelData": b""}, r"is a DICOM file without pixels \(Secondary Capture Image Storage\)"),
    ({"PhotometricInterpretation": "HSV"}, "has the photometric interpretation 'HSV'; save it as"),
    ({"PhotometricInterpretation": "RGB"}, "has 1 samples a pixel where RGB has 3"),
    ({"SamplesPerPixel": 3}, "has 3 samples a pixel where MONOCHROME2 has 1"),
    ({"Rows": None, "PixelRepresentation": None}, "lacks Rows, PixelRepresentation, which every"),
    ({"Rows": 60000, "Columns": 60000}, "has 60000 x 60000 pixels, more than 178956970"),
  ],
)
def test_what_is_no_image_is_refused_with_the_reason(tags, reason):
  refuse(change(make(), **tags), reason)


def test_floating_point_pixels_are_refused():
  floats = change(make(None), FloatPixelData=np.ones((4, 4), np.float32).tobytes())
  refuse(floats, "holds floating-point pixels, whose scale is unknown; save them as integers")


CT = dict(Modality="CT", RescaleSlope=2, RescaleIntercept=-1024, PixelPaddingValue=0)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("window", [*dicom.CT_WINDOWS.values(), (-300, 0.5)])
def test_a_window_in_hounsfield_units(photometric, window):
  centre, width = window
  expected = 255 * np.clip((2.0 * RAMP - 1024 - centre + width / 2) / width, 0, 1)
  expected = 255 - expected if photometric == "MONOCHROME1" else expected
  for percentiles in (None, (1, 99)):
    image = read(make(photometric=photometric, **CT), ct_window=window, percentiles=percentiles)
    np.testing.assert_allclose(image, np.where(RAMP == 0, 0, expected), atol=1e-3)


@pytest.mark.parametrize(
  ("tags", "why"),
  [
    ({"Modality": "MR"}, "is of the modality 'MR'"),
    ({"Modality": None}, "is of the modality 'None'"),
    ({"RescaleSlope": None, "RescaleIntercept": None}, "has no RescaleSlope and RescaleIntercept"),
    ({"RescaleType": "US"}, "has the RescaleType 'US'"),
  ],
)
def test_a_ct_window_refuses_what_is_not_in_hounsfield_units(tags, why):
  data = change(make(**CT), **tags)
  refuse(data, f"{why}, and ct_window needs CT images .* leave out ct_window", ct_window=(40, 400))


def test_the_unit_of_functional_groups_counts():
  macro = items(RescaleSlope=1, RescaleIntercept=0, RescaleType="US")
  groups = items(PixelValueTransformationSequence=macro)
  data = make(Modality="CT", SharedFunctionalGroupsSequence=groups)
  refuse(data, "has the RescaleType 'US'", ct_window=(40, 400))


def test_a_ct_window_refuses_colour_other_formats_and_itself():
  refuse(make(COLOUR, "RGB", bits=8, **CT), "is in colour", ct_window=(40, 400))
  for width in (0, -1, float("nan")):
    with pytest.raises(ValueError, match=r"the CT window \(centre, width\) is .* must be positive"):
      read(make(**CT), ct_window=(40, width))
  with pytest.raises(
    ValueError, match=r"x\.png is not a DICOM file, and ct_window needs CT images"
  ):
    decode.decode(b"\x89PNG", "x.png", size=8, channels=1, ct_window=(40, 400))
