"""A source is read once before work: bad files, bits of 16-bit images, equal images."""

import os
import socket

import numpy as np
import pytest
from data_folder_test import encode, pack, write

from primia_jax.data import scan
from primia_jax.data.folder import read_images
from primia_jax.data.load import load

GOOD = {f"{split}/{c}/{i}.png": i for split in ("train", "test") for c in "ab" for i in range(3)}
CUT = encode(np.random.default_rng(0).integers(0, 256, (20, 20), np.uint8))[:60]
BAD = {"train/a/cut.png": CUT, "train/b/empty.png": b"", "test/b/text.png": b"not an image"}


def broken(folder):
  return write(folder, GOOD | BAD)


@pytest.mark.parametrize("packed", [False, True])
def test_all_bad_files_of_all_splits_are_named_at_once(tmp_path, packed):
  root = broken(tmp_path / "d")
  spec = f"folder:{pack(root, tmp_path / 'd.tar') if packed else root}"
  with pytest.raises(ValueError, match=r"3 images cannot be read; .*--skip_bad_files") as caught:
    load(spec, size=8, channels=1)
  for name, why in zip(BAD, ("truncated", "is empty", "content is none of these"), strict=True):
    assert any(name in line and why in line for line in str(caught.value).splitlines())
  assert "BytesIO" not in str(caught.value)


def test_many_bad_files_are_counted(tmp_path):
  write(tmp_path, {"a/0.png": 0, "b/0.png": 1} | {f"a/x{i:02}.png": b"" for i in range(25)})
  with pytest.raises(ValueError, match="25 images cannot be read") as caught:
    load(f"folder:{tmp_path}", size=8, channels=1)
  assert len(str(caught.value).splitlines()) == 12
  assert str(caught.value).endswith("and 15 more")


@pytest.mark.parametrize("keep", [False, True])
def test_bad_files_are_left_out_and_noted(tmp_path, keep):
  lazy = load(f"folder:{broken(tmp_path)}", size=8, channels=1, lazy=True)
  data = scan.read(lazy, keep=keep, skip_bad_files=True)
  assert isinstance(data["train"].images, np.ndarray) == keep
  for split in ("train", "test"):
    one = data[split]
    assert one.columns["path"].tolist() == [name for name in sorted(GOOD) if split in name]
    assert one.images[np.arange(6)][:, 0, 0, 0].tolist() == [0, 1, 2] * 2
    assert one.labels.tolist() == [0] * 3 + [1] * 3
    assert one.notes[scan.LEFT_OUT] == f"3 of 15: {', '.join(BAD)}"


def test_a_source_without_a_good_image_is_refused(tmp_path):
  write(tmp_path, {"train/a/1.png": 1, "test/a/1.png": b"junk"})
  with pytest.raises(ValueError, match=r"\['test'\] are empty"):
    load(f"folder:{tmp_path}", size=8, channels=1, skip_bad_files=True)


def test_fifos_and_sockets_are_refused_and_never_opened(tmp_path, monkeypatch):
  write(tmp_path, {"a/1.png": 1, "b/1.png": 2})
  os.mkfifo(tmp_path / "a" / "pipe.png")
  os.mkfifo(tmp_path / "a" / "pipe")  # could be DICOM, whose headers are read first
  monkeypatch.chdir(tmp_path)  # the path of a socket must be short
  with socket.socket(socket.AF_UNIX) as server:
    server.bind("b/socket.png")
    with pytest.raises(ValueError, match="3 images cannot be read") as caught:
      load("folder:.", size=8, channels=1)
  assert str(caught.value).count("is no file but a FIFO, socket or device; remove it") == 3
  data = load("folder:.", size=8, channels=1, skip_bad_files=True)["all"]
  assert data.columns["path"].tolist() == ["a/1.png", "b/1.png"]
  with pytest.raises(FileNotFoundError, match="no image folder or tar at"):
    load("folder:a/pipe", size=8, channels=1)


def grey(most, kind="PNG", **options):
  return encode(np.array([[0, most], [most, most // 2]], np.uint16), kind, **options)


@pytest.mark.parametrize(
  ("most", "bits"), [(200, 8), (1000, 10), (1023, 10), (4095, 12), (4096, 14), (60000, 16)]
)
def test_16_bit_images_are_scaled_alike_by_the_fewest_bits_that_hold_them_all(tmp_path, most, bits):
  files = {"train/a/1.png": grey(most), "test/b/2.tif": grey(most // 2, "TIFF")}
  write(tmp_path, files | {"train/b/3.png": 9})
  data = load(f"folder:{tmp_path}", size=2, channels=1)
  scale = 255 / (2**bits - 1)
  assert data["train"].images[0].max() == round(most * scale)
  assert data["test"].images[0].max() == round(most // 2 * scale)
  assert data["train"].images[1].max() == 9  # 8 bits stay as they are
  assert data["test"].notes[scan.BITS] == str(bits)
  assert scan.bits(data["test"]) == bits


def test_given_bits_hold_and_larger_values_are_refused(tmp_path):
  write(tmp_path, {"a/1.png": grey(4095), "b/1.png": grey(50)})
  full = load(f"folder:{tmp_path}", size=2, channels=1, grey_bits=16)["all"]
  assert full.images[0].max() == 16
  with pytest.raises(ValueError, match=r"a/1\.png holds the value 4095, more than 10 bits"):
    load(f"folder:{tmp_path}", size=2, channels=1, grey_bits=10)
  assert read_images(tmp_path / "a", size=2, channels=1)[1].max() == 255
  assert read_images(tmp_path / "b", size=2, channels=1, grey_bits=12)[1].max() == 3


def test_bits_that_a_tiff_tells_stay(tmp_path):
  write(tmp_path, {"a/1.tif": grey(4000, "TIFF"), "b/1.png": 3})
  assert scan.bits(load(f"folder:{tmp_path}", size=2, channels=1)["all"]) == 12
  write(tmp_path, {"a/1.tif": encode(np.full((2, 2), 9, np.uint8), "TIFF")})
  assert scan.BITS not in load(f"folder:{tmp_path}", size=2, channels=1)["all"].notes


def test_equal_pixels_are_found_in_memory_and_on_demand(tmp_path):
  """The same picture as PNG and BMP, and in an npz."""
  write(
    tmp_path, {"a/1.png": 7, "a/2.bmp": encode(np.full((8, 8), 7, np.uint8), "BMP"), "b/3.png": 8}
  )
  lazy = load(f"folder:{tmp_path}", size=8, channels=1, lazy=True)
  for keep in (True, False):
    pixels = scan.read(lazy, keep=keep)["all"].columns[scan.PIXELS]
    assert pixels[0] == pixels[1] != pixels[2]
  images = np.stack([np.full((8, 8), value, np.uint8) for value in (8, 7)])
  np.savez(tmp_path / "x.npz", train_images=images, train_labels=np.arange(2))
  found = scan.read(load(f"npz:{tmp_path / 'x.npz'}", size=8, channels=1))["train"]
  assert found.columns[scan.PIXELS].tolist() == [pixels[2], pixels[0]]


def test_ignore_takes_names_and_paths_and_all_strange_files_are_named(tmp_path):
  strange = {f"{c}/{n}.txt": b"" for c in "ab" for n in range(2)}
  write(tmp_path, {"a/1.png": 1, "b/1.png": 2, "b/masks/1.png": 3} | strange)
  with pytest.raises(
    ValueError, match=r"4 files of .* \(a/0\.txt, .*\) are not an image .*--ignore"
  ):
    load(f"folder:{tmp_path}", size=8, channels=1)
  data = load(f"folder:{tmp_path}", size=8, channels=1, ignore=["*.txt", "b/masks"])["all"]
  assert data.columns["path"].tolist() == ["a/1.png", "b/1.png"]
