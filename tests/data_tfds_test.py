import importlib.util
import io
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from primia_jax.data import tfds as sources
from primia_jax.data.load import load


def jpeg(value, size=16):
  buffer = io.BytesIO()
  Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(buffer, "JPEG")
  return buffer.getvalue()


KERMANY = {
  "train/NORMAL/IM-0115-0001.jpeg": 10,
  "train/NORMAL/NORMAL2-IM-0383-0001.jpeg": 20,
  "train/PNEUMONIA/person7_bacteria_7.jpeg": 30,
  "train/PNEUMONIA/person7_virus_8.jpeg": 40,
  "test/PNEUMONIA/person7_virus_9.jpeg": 50,
}


@pytest.fixture
def manual_dir(tmp_path):
  for name, value in KERMANY.items():
    path = tmp_path / "manual" / "chest_xray" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(value))
  return tmp_path / "manual"


def prepare_other(
  data_dir, features, records, name="other", file_format="array_record", version="1.2.0"
):
  """Prepares a data set that is none of ours."""

  class Other(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version(version)
    pkg_dir_path = pathlib.Path(__file__).parent
    code_path = pathlib.Path(__file__)

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": enumerate(records[:-1]), "val": enumerate(records[-1:])}

    def _generate_examples(self):
      raise AssertionError

  Other.name = name
  Other(data_dir=data_dir, file_format=file_format).download_and_prepare(file_format=file_format)


IMAGE = {"picture": tfds.features.Image(), "what": tfds.features.ClassLabel(names=["cat", "dog"])}
RECORDS = [
  {"picture": jpeg(60), "what": 1},
  {"picture": jpeg(70), "what": 0},
  {"picture": jpeg(80), "what": 1},
]


def test_kermany_builder_from_a_folder_and_a_tar(tmp_path, manual_dir):
  data = load(
    "tfds:kermany_chest_xray", size=8, channels=1, data_dir=tmp_path / "a", manual_dir=manual_dir
  )
  assert set(data) == {"train", "test"}
  by_path = {}
  for one in data.values():
    assert one.label_names == ("normal", "bacterial", "viral")
    assert set(one.columns) == {"path"}
    by_path |= dict(
      zip(
        one.columns["path"],
        zip(one.labels, one.groups, one.images[:, 0, 0, 0], strict=True),
        strict=True,
      )
    )
  assert by_path == {
    "train/NORMAL/IM-0115-0001.jpeg": (0, "normal/115", 10),
    "train/NORMAL/NORMAL2-IM-0383-0001.jpeg": (0, "normal/383", 20),
    "train/PNEUMONIA/person7_bacteria_7.jpeg": (1, "bacterial/7", 30),
    "train/PNEUMONIA/person7_virus_8.jpeg": (2, "viral/7", 40),
    "test/PNEUMONIA/person7_virus_9.jpeg": (2, "viral/7", 50),
  }
  with tarfile.open(tmp_path / "chest_xray.tar", "w") as archive:
    archive.add(manual_dir / "chest_xray", arcname=".")
  packed = load(
    "tfds:kermany_chest_xray",
    size=8,
    channels=1,
    data_dir=tmp_path / "b",
    manual_dir=tmp_path,
    lazy=True,
  )
  for split, one in data.items():
    np.testing.assert_array_equal(packed[split].columns["path"], one.columns["path"])
    np.testing.assert_array_equal(packed[split].images[np.arange(len(one))], one.images)


def test_a_prepared_set_needs_no_manual_dir_and_maps_given_label_names(tmp_path, manual_dir):
  path = sources.prepare("kermany_chest_xray", manual_dir=manual_dir, data_dir=tmp_path)
  order = ("viral", "normal", "bacterial")
  by_name = load(
    "tfds:kermany_chest_xray", size=4, channels=3, data_dir=tmp_path, label_names=order
  )
  by_version = load(
    "tfds:kermany_chest_xray:1.0.0", size=4, channels=3, data_dir=tmp_path, label_names=order
  )
  by_path = load(f"tfds:{path}", size=4, channels=3, label_names=order)
  for data in (by_name, by_version, by_path):
    assert data["test"].labels.tolist() == [0]
    assert data["train"].label_names == order
    assert sorted(data["train"].labels.tolist()) == [0, 1, 1, 2]
  with pytest.raises(
    ValueError, match=r"class 'bacterial' of .*kermany_chest_xray.* is not one of the known classes"
  ):
    load(
      "tfds:kermany_chest_xray",
      size=4,
      channels=3,
      data_dir=tmp_path,
      label_names=("normal", "viral"),
    )


def test_the_prepared_set_reads_through_tfds_itself(tmp_path, manual_dir):
  path = sources.prepare("kermany_chest_xray", manual_dir=manual_dir, data_dir=tmp_path)
  record = tfds.builder_from_directory(path).as_data_source("test")[0]
  assert record["image"].shape == (16, 16, 3)
  assert record["label"] == 2


def test_mednist_builder(tmp_path):
  for i, name in enumerate(sources.MEDNIST_LABELS):
    path = tmp_path / "MedNIST" / name / "000001.jpeg"
    path.parent.mkdir(parents=True)
    path.write_bytes(jpeg(10 * i))
  data = load("tfds:med_nist", size=4, channels=1, data_dir=tmp_path / "data", manual_dir=tmp_path)[
    "train"
  ]
  assert data.label_names == sources.MEDNIST_LABELS
  np.testing.assert_array_equal(data.images[:, 0, 0, 0], 10 * data.labels)
  assert not data.has_patient.any()  # each image is a group, named by its path


def test_any_other_set_by_name_with_its_newest_version(tmp_path):
  extra = {
    "age": tfds.features.Scalar(np.int64),
    "box": tfds.features.Tensor(shape=(2,), dtype=np.float32),
  }
  records = [
    record | {"age": i, "box": np.zeros(2, np.float32)} for i, record in enumerate(RECORDS)
  ]
  prepare_other(tmp_path, IMAGE | extra, records)
  prepare_other(tmp_path, IMAGE, RECORDS[:2], version="1.10.0")
  data = load("tfds:other:1.2.0", size=8, channels=1, data_dir=tmp_path)
  assert list(data) == ["train", "validation"]
  train = data["train"]
  order = np.argsort(train.columns["age"])
  assert set(train.columns) == {"age"}
  assert train.labels[order].tolist() == [1, 0]
  assert train.images[order, 0, 0, 0].tolist() == [60, 70]
  assert len(set(train.groups)) == 2
  assert not train.has_patient.any()
  assert len(load("tfds:other", size=8, channels=1, data_dir=tmp_path)["train"]) == 1


def test_what_is_wrong_is_named_with_its_cure(tmp_path, manual_dir):
  for name, cure in {"nothing": "prepare it there", "med_nist": "give manual_dir"}.items():
    with pytest.raises(
      FileNotFoundError, match=rf"no TFDS data set '{name}' is prepared in .*{cure}"
    ):
      load(f"tfds:{name}", size=8, channels=1, data_dir=tmp_path)
  with pytest.raises(ValueError, match=r"no builder 'mnist'; known builders are"):
    load("tfds:mnist", size=8, channels=1, data_dir=tmp_path, manual_dir=manual_dir)
  with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere; Put one of"):
    load("tfds:med_nist", size=8, channels=1, data_dir=tmp_path, manual_dir=tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match=r"holds none of .*MedNIST.*; put the tar"):
    load("tfds:med_nist", size=8, channels=1, data_dir=tmp_path, manual_dir=manual_dir)
  (manual_dir / "chest_xray/train/NORMAL/IM-0001-0001.jpeg").write_bytes(b"junk")
  with pytest.raises(ValueError, match=r"IM-0001-0001\.jpeg is not a JPEG image; copy it again"):
    load("tfds:kermany_chest_xray", size=8, channels=1, data_dir=tmp_path, manual_dir=manual_dir)


def test_unfit_features_and_damage_are_named(tmp_path):
  prepare_other(tmp_path, {"what": IMAGE["what"]}, [{"what": 0}, {"what": 1}], name="no_image")
  with pytest.raises(
    ValueError, match=r"no_image.* has 0 features of the kind Image .*one is needed"
  ):
    load("tfds:no_image", size=8, channels=1, data_dir=tmp_path)
  two = IMAGE | {"other": tfds.features.ClassLabel(num_classes=2)}
  prepare_other(tmp_path, two, [record | {"other": 0} for record in RECORDS], name="two_labels")
  with pytest.raises(ValueError, match=r"two_labels.* has 2 features of the kind ClassLabel"):
    load("tfds:two_labels", size=8, channels=1, data_dir=tmp_path)
  prepare_other(tmp_path, IMAGE, [RECORDS[0] | {"picture": b"junk"}, RECORDS[1]], name="bad_image")
  with pytest.raises(ValueError, match=r"bad_image.*train split, record/0 cannot be read"):
    load("tfds:bad_image", size=8, channels=1, data_dir=tmp_path)
  prepare_other(tmp_path, IMAGE, RECORDS)
  (info,) = tmp_path.glob("other/*/dataset_info.json")
  text = info.read_text()
  info.write_text(text.replace("array_record", "tfrecord"))
  with pytest.raises(
    ValueError, match=r"stored as tfrecord, which only TensorFlow reads; prepare it again"
  ):
    load("tfds:other", size=8, channels=1, data_dir=tmp_path)
  info.write_text(text[: len(text) // 2])
  with pytest.raises(ValueError, match=r"other/1\.2\.0 cannot be read .* prepare it again"):
    load("tfds:other", size=8, channels=1, data_dir=tmp_path)
  info.write_text(text)
  (shard,) = tmp_path.glob("other/*/*train.array_record*")
  shard.write_bytes(shard.read_bytes()[:70000])
  with pytest.raises(ValueError, match=r"other/1\.2\.0 cannot be read"):
    load("tfds:other", size=8, channels=1, data_dir=tmp_path)
  shard.unlink()
  with pytest.raises(ValueError, match=r"other/1\.2\.0 cannot be read"):
    load("tfds:other", size=8, channels=1, data_dir=tmp_path)


def test_loading_folders_and_arrays_imports_neither_tfds_nor_tensorflow():
  code = (
    "import sys, primia_jax.data.load; assert not {'tensorflow_datasets', 'tensorflow'} & "
    "set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
  code = "import sys, primia_jax.data.tfds; assert 'tensorflow' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
  assert importlib.util.find_spec("tensorflow") is None


@pytest.mark.real_data
def test_real_archives(tmp_path, real_data):
  data = load(
    "tfds:kermany_chest_xray",
    size=16,
    channels=1,
    data_dir=tmp_path,
    manual_dir=real_data,
    lazy=True,
  )
  assert np.bincount(data["train"].labels).tolist() == [1191, 2278, 1195]
  assert np.bincount(data["test"].labels).tolist() == [234, 242, 148]
  expected = load(f"folder:{real_data}/chest_xray_224.tar", size=16, channels=1, lazy=True)["test"]
  where = np.argsort(data["test"].columns["path"])  # the folder's order
  np.testing.assert_array_equal(data["test"].columns["path"][where], expected.columns["path"])
  np.testing.assert_array_equal(data["test"].groups[where], expected.groups)
  some = np.arange(0, 624, 50)
  np.testing.assert_array_equal(data["test"].images[where[some]], expected.images[some])
  data = load(
    "tfds:med_nist", size=16, channels=1, data_dir=tmp_path, manual_dir=real_data, lazy=True
  )["train"]
  assert np.bincount(data.labels).tolist() == [1000] * 6
