"""DICOM files made from arrays, for several test files."""

import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
  ExplicitVRLittleEndian,
  RLELossless,
  SecondaryCaptureImageStorage,
  generate_uid,
)

RAMP = np.arange(0, 4096, 16, dtype=np.uint16).reshape(16, 16)  # 12 bits


def make(pixels=RAMP, photometric="MONOCHROME2", bits=12, rle=False, **tags):
  """Returns a DICOM file as bytes."""
  header = Dataset()
  header.file_meta = FileMetaDataset()
  header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  header.file_meta.MediaStorageSOPClassUID = header.SOPClassUID = SecondaryCaptureImageStorage
  header.file_meta.MediaStorageSOPInstanceUID = header.SOPInstanceUID = generate_uid()
  if pixels is not None:
    header.Rows, header.Columns = pixels.shape[:2]
    header.SamplesPerPixel = 3 if pixels.shape[-1] == 3 else 1
    header.PhotometricInterpretation = photometric
    header.BitsAllocated = 8 * pixels.dtype.itemsize
    header.BitsStored, header.HighBit = bits, bits - 1
    header.PixelRepresentation = int(pixels.dtype.kind == "i")
    header.PlanarConfiguration = 0
    header.PixelData = pixels.tobytes()
  for name, value in tags.items():
    setattr(header, name, value)
  if rle:
    header.compress(RLELossless)
  buffer = io.BytesIO()
  header.save_as(buffer, enforce_file_format=True)
  return buffer.getvalue()
