"""Folders and tars: layouts, classes and groups, and errors that name the file and the cure."""

import io
import os
import pickle
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from primia_jax.data import files, folder
from primia_jax.data.dataset import take
from primia_jax.data.folder import label_indices
from primia_jax.data.load import load


def encode(array, kind="PNG", **options):
  buffer = io.BytesIO()
  Image.fromarray(np.asarray(array)).save(buffer, kind, **options)
  return buffer.getvalue()


def write(root, layout):
  """Writes {name: bytes}, or a grey image of one value for {name: int}."""
  for name, content in layout.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(
      encode(np.full((8, 8), content, np.uint8)) if isinstance(content, int) else content
    )
  return root


def pack(root, path):
  with tarfile.open(path, "w") as archive:
    archive.add(root, arcname=".")
  return path


GREY = np.random.default_rng(0).integers(0, 256, (12, 10), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (12, 10, 3), np.uint8)


def test_class_folders_at_any_depth_with_columns(tmp_path):
  write(
    tmp_path,
    {
      "b/one.png": 3,
      "b/deep/er/two.png": 4,
      "a/x.jpeg": 1,
      ".git/x": b"",
      "a/Thumbs.db": b"",
      "README.md": b"",
    },
  )
  data = load(f"folder:{tmp_path}", size=4, channels=1)
  assert list(data) == ["all"]
  data = data["all"]
  assert data.label_names == ("a", "b")
  assert data.columns["path"].tolist() == ["a/x.jpeg", "b/deep/er/two.png", "b/one.png"]
  assert data.columns["folder"].tolist() == ["", "deep/er", ""]
  assert data.labels.tolist() == [0, 1, 1]
  assert data.labels.dtype == np.int32
  assert len(set(data.groups)) == 3
  assert not data.has_patient.any()
  np.testing.assert_array_equal(data.images[:, 0, 0, 0], [1, 4, 3])
  assert data.images.shape == (3, 4, 4, 1)
  assert data.images.dtype == np.uint8


def test_splits_and_sites_above_them(tmp_path):
  layout = {"s1/train/a/1.png": 1, "s1/val/b/2.png": 2, "s2/test/a/3.png": 3, "s2/Train/b/4.png": 4}
  data = load(f"folder:{write(tmp_path, layout)}", size=8, channels=1)
  assert list(data) == ["train", "validation", "test"]
  assert data["train"].columns["folder"].tolist() == ["s1", "s2"]
  assert data["train"].labels.tolist() == [0, 1]
  assert data["validation"].images[0, 0, 0, 0] == 2
  assert data["test"].label_names == ("a", "b")


KERMANY = {
  "train/NORMAL/IM-0115-0001.jpeg": 1,
  "train/NORMAL/IM-0115-0002-0001.jpeg": 2,
  "train/NORMAL/NORMAL2-IM-0383-0001.jpeg": 3,
  "train/PNEUMONIA/person115_bacteria_7.jpeg": 4,
  "train/PNEUMONIA/person115_virus_8_1.jpeg": 5,
  "train/PNEUMONIA/person115_bacteria_9.jpeg": 6,
  "test/NORMAL/NORMAL-1003233-0001.jpeg": 7,
  "test/PNEUMONIA/BACTERIA-1083680-0001.jpeg": 8,
  "test/PNEUMONIA/VIRUS-1083680-0002.jpeg": 9,
}


def test_kermany_classes_and_groups(tmp_path):
  data = load(f"folder:{write(tmp_path, KERMANY)}", size=8, channels=3)
  assert data["train"].label_names == data["test"].label_names == ("normal", "bacterial", "viral")
  by_path = dict(
    zip(
      data["train"].columns["path"],
      zip(data["train"].labels, data["train"].groups, strict=True),
      strict=True,
    )
  )
  assert [by_path[path] for path in list(KERMANY)[:6]] == [
    (0, "normal/115"),
    (0, "normal/115"),
    (0, "normal/383"),
    (1, "bacterial/115"),
    (2, "viral/115"),
    (1, "bacterial/115"),
  ]
  assert data["test"].labels.tolist() == [0, 1, 2]
  assert data["test"].groups.tolist() == ["normal/1003233", "bacterial/1083680", "viral/1083680"]
  assert data["test"].has_patient.all()


def test_kermany_follows_the_label_names_given(tmp_path):
  write(tmp_path, KERMANY)
  order = ("viral", "normal", "bacterial")
  data = load(f"folder:{tmp_path}", size=8, channels=1, label_names=order)["test"]
  assert (data.label_names, data.labels.tolist()) == (order, [1, 2, 0])
  data = load(f"folder:{tmp_path}", size=8, channels=1, label_names=("normal", "pneumonia"))["test"]
  assert data.labels.tolist() == [0, 1, 1]
  with pytest.raises(
    ValueError, match=r"class 'viral' of .*VIRUS-1083680-0002\.jpeg is not one of the known classes"
  ):
    load(f"folder:{tmp_path}", size=8, channels=1, label_names=("normal", "bacterial"))
  (tmp_path / "train/PNEUMONIA/person1.jpeg").write_bytes(encode(GREY))
  with pytest.raises(
    ValueError,
    match=r"person1\.jpeg is named neither bacterial .* rename it, or make pneumonia one",
  ):
    load(f"folder:{tmp_path}", size=8, channels=1)


def test_the_three_class_folders_keep_their_order(tmp_path):
  data = load(
    f"folder:{write(tmp_path, {'bacterial/1.png': 1, 'viral/2.png': 2, 'Normal/3.png': 3})}",
    size=8,
    channels=1,
  )
  assert data["all"].label_names == ("normal", "bacterial", "viral")
  assert dict(zip(data["all"].images[:, 0, 0, 0], data["all"].labels, strict=True)) == {
    1: 1,
    2: 2,
    3: 0,
  }


def test_label_names_fix_the_order_and_refuse_other_classes(tmp_path):
  write(tmp_path, {"cat/1.png": 1, "dog/2.png": 2})
  data = load(f"folder:{tmp_path}", size=8, channels=1, label_names=("dog", "emu", "CAT"))["all"]
  assert data.labels.tolist() == [2, 0]
  with pytest.raises(
    ValueError,
    match=r"class 'dog' of .*dog/2\.png is not one of the known classes \('cat',\); rename",
  ):
    load(f"folder:{tmp_path}", size=8, channels=1, label_names=("cat",))
  write(tmp_path, {"dog/3.png": 2, "fox/4.png": 2})
  with pytest.raises(
    ValueError,
    match=r"class 'dog' of .*dog/2\.png, class 'fox' of .*fox/4\.png are none .* rename them",
  ):
    load(f"folder:{tmp_path}", size=8, channels=1, label_names=("cat",))
  with pytest.raises(ValueError, match="class 'CAT'"):  # which of the two?
    label_indices(["CAT", "Cat"], ("cat", "Cat"), ["1.png", "2.png"])


def test_a_folder_around_everything_is_looked_through_unless_it_is_a_class(tmp_path):
  write(tmp_path, {"MedNIST/Hand/1.png": 1, "MedNIST/CXR/2.png": 2})
  assert load(f"folder:{tmp_path}", size=8, channels=1)["all"].label_names == ("CXR", "Hand")
  data = load(f"folder:{tmp_path}", size=8, channels=1, label_names=("mednist", "other"))["all"]
  assert data.labels.tolist() == [0, 0]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tar_reads_as_its_folder(tmp_path, lazy):
  write(tmp_path / "d", KERMANY | {"train/NORMAL/.hidden": b"", "__MACOSX/x.txt": b""})
  pack(tmp_path / "d", tmp_path / "d.tar")
  unpacked = load(f"folder:{tmp_path}/d", size=5, channels=3)
  packed = load(f"folder:{tmp_path}/d.tar", size=5, channels=3, lazy=lazy)
  for split in ("train", "test"):
    one, other = unpacked[split], packed[split]
    np.testing.assert_array_equal(one.images, other.images[np.arange(len(other))])
    np.testing.assert_array_equal(one.labels, other.labels)
    np.testing.assert_array_equal(one.groups, other.groups)
    np.testing.assert_array_equal(one.columns["path"], other.columns["path"])


def test_lazy_images_read_at_random_and_only_what_is_asked(tmp_path):
  write(
    tmp_path, {f"{c}/{i:02}.png": 10 * i for c in "ab" for i in range(20)} | {"b/99.png": b"broken"}
  )
  data = load(f"folder:{tmp_path}", size=6, channels=1, lazy=True)["all"]
  assert data.images.shape == (41, 6, 6, 1)
  index = np.array([25, 3, 3, -2])
  np.testing.assert_array_equal(data.images[index][:, 0, 0, 0], [50, 30, 30, 190])
  np.testing.assert_array_equal(take(data, [7, 21]).images[np.array([1, 0])][:, 0, 0, 0], [10, 70])
  np.testing.assert_array_equal(pickle.loads(pickle.dumps(data.images))[index], data.images[index])
  assert data.images[np.array([], int)].shape == (0, 6, 6, 1)
  with pytest.raises(ValueError, match=r"b/99\.png cannot be read"):
    data.images[np.array([0, 40])]
  (tmp_path / "a/00.png").unlink()
  with pytest.raises(FileNotFoundError, match=r"a/00\.png has disappeared"):
    data.images[np.array([0])]


def test_images_without_labels(tmp_path):
  write(tmp_path, {"z.png": 1, "sub/y.bmp": 2, "x.tif": 3, ".DS_Store": b""})
  paths, images = folder.read_images(tmp_path, size=8, channels=3)
  assert paths.tolist() == ["sub/y.bmp", "x.tif", "z.png"]
  np.testing.assert_array_equal(images[:, 0, 0, :], [[2] * 3, [3] * 3, [1] * 3])
  paths, images = folder.read_images(tmp_path / "z.png", size=8, channels=1, lazy=True)
  assert paths.tolist() == ["z.png"]
  np.testing.assert_array_equal(images[np.array([0])], np.ones((1, 8, 8, 1)))
  paths, images = folder.read_images(
    pack(tmp_path, tmp_path.parent / "flat.tar"), size=8, channels=1
  )
  assert paths.tolist() == ["sub/y.bmp", "x.tif", "z.png"]


@pytest.mark.parametrize(
  ("layout", "message"),
  [
    ({"a/1.png": 1, "b/2.png": b"junk"}, r"b/2\.png cannot be read .* copy it again or remove it"),
    ({"a/1.png": 1, "2.png": 2}, r"/2\.png is in no class folder; move it into one"),
    ({"train/1.png": 1}, r"train/1\.png is in no class folder"),
    ({"a/1.png": 1, "train/b/2.png": 2}, r"but a/1\.png is in none; move it"),
    ({"a/1.png": 1, "b/notes.txt": b""}, r"b/notes\.txt is not an image .* --ignore='\*\.txt'"),
    ({"a/1.png": 1, "A/2.png": 2}, r"\['A', 'a'\] .* differ only in letter case"),
    ({"a/1.png": 1, "b/.keep": b""}, r"folder .*/b holds no image; remove it or put"),
    ({".keep": b""}, r"holds no image"),
  ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_wrong_in_a_folder_is_named_with_its_cure(tmp_path, layout, message, packed):
  path = write(tmp_path / "root", layout)
  with pytest.raises(ValueError, match=message):
    load(f"folder:{pack(path, tmp_path / 'root.tar') if packed else path}", size=8, channels=1)


def test_ignore_names_further_files(tmp_path):
  write(tmp_path, {"a/1.png": 1, "b/2.png": 2, "b/notes.txt": b"", "masks/1.png": 1})
  data = load(f"folder:{tmp_path}", size=8, channels=1, ignore=["*.txt", "masks"])
  assert data["all"].label_names == ("a", "b")


def test_what_is_not_there_or_no_source_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no image folder or tar at .*nowhere; check"):
    load(f"folder:{tmp_path}/nowhere", size=8, channels=1)
  for spec in ("nonsense", "folder:", "zip:x"):
    with pytest.raises(
      ValueError, match=r"must be folder:PATH, csv:PATH, npz:PATH, msd:PATH, medimeta:PATH or tfds"
    ):
      load(spec, size=8, channels=1)
  (tmp_path / "data.zip").write_bytes(b"PK")
  with pytest.raises(ValueError, match=r"data\.zip is not an image"):
    load(f"folder:{tmp_path}/data.zip", size=8, channels=1)
  with pytest.raises(ValueError, match="channels is 4"):
    load(f"folder:{tmp_path}", size=8, channels=4)


def test_damaged_tars_are_named(tmp_path):
  whole = pack(
    write(tmp_path / "d", {"a/1.png": 1, "b/2.png": encode(np.tile(COLOUR, (9, 9, 1)))}),
    tmp_path / "d.tar",
  )
  data = whole.read_bytes()
  for name, content in {
    "cut": data[:5000],
    "gz": zlib.compress(data),
    "text": b"hello" * 200,
  }.items():
    path = tmp_path / f"{name}.tar"
    path.write_bytes(content)
    with pytest.raises(
      ValueError,
      match=rf"{name}\.tar is compressed, truncated or not a tar .* copy it again or unpack",
    ):
      files.list_files(path)
  listed = files.list_files(whole)
  whole.write_bytes(data[:3000])
  with pytest.raises(ValueError, match=r"d\.tar is truncated within b/2\.png"):
    listed.read("b/2.png")
  (tmp_path / "d/a/link.png").symlink_to("1.png")
  with pytest.raises(ValueError, match=r"a/link\.png is a link or special file; unpack"):
    files.list_files(pack(tmp_path / "d", tmp_path / "links.tar"))


def test_links_in_folders_are_followed_but_not_round(tmp_path):
  write(tmp_path / "store", {"1.png": 1})
  write(tmp_path / "d", {"a/1.png": 1})
  (tmp_path / "d/b").symlink_to(tmp_path / "store")
  assert files.list_files(tmp_path / "d").names == ("a/1.png", "b/1.png")
  (tmp_path / "d/a/up").symlink_to(tmp_path / "d")
  with pytest.raises(ValueError, match=r"a/up links to a folder that contains it"):
    files.list_files(tmp_path / "d")
  (tmp_path / "d/a/up").unlink()
  (tmp_path / "d/a/0.png").symlink_to(tmp_path / "gone.png")
  with pytest.raises(FileNotFoundError, match=r"a/0\.png has disappeared or is a broken link"):
    load(f"folder:{tmp_path}/d", size=8, channels=1)


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path, monkeypatch):
  write(tmp_path, {"a/1.png": 1, "b/2.png": 2})
  scandir = os.scandir

  def refuse(path):
    if os.path.basename(path) == "b":
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  with pytest.raises(PermissionError, match=r"/b"):
    files.list_files(tmp_path)


# --- real data


@pytest.mark.real_data
def test_chest_xrays_counts_order_and_groups(real_data):
  data = load(f"folder:{real_data}/chest_xray_224.tar", size=32, channels=1)
  assert np.bincount(data["train"].labels).tolist() == [1191, 2278, 1195]
  assert np.bincount(data["test"].labels).tolist() == [234, 242, 148]
  assert data["train"].label_names == ("normal", "bacterial", "viral")
  for one in data.values():
    for path, label, group in zip(one.columns["path"], one.labels, one.groups, strict=True):
      assert label == (0 if "/NORMAL/" in path else 1 if "_bacteria_" in path else 2)
      assert group.startswith(one.label_names[label])
  assert data["train"].images.std() > 30
  assert len(np.unique(data["train"].groups)) == 3085


@pytest.mark.real_data
def test_mednist_counts(real_data):
  data = load(f"folder:{real_data}/mednist_64.tar", size=64, channels=1, lazy=True)["all"]
  assert data.label_names == ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")
  assert np.bincount(data.labels).tolist() == [1000] * 6
  assert data.images[np.arange(0, 6000, 500)].shape == (12, 64, 64, 1)
