import numpy as np
import pytest
from PIL import Image

from primia_jax.data.load import load

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (6, 8, 8), np.uint8)
COLOUR = RNG.integers(0, 256, (6, 8, 8, 3), np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0])


def save(tmp_path, **arrays):
  np.savez(tmp_path / "x.npz", **arrays)
  return f"npz:{tmp_path}/x.npz"


def test_medmnist_layout(tmp_path):
  spec = save(
    tmp_path,
    train_images=GREY,
    train_labels=LABELS[:, None].astype(np.uint8),
    val_images=GREY[:2],
    val_labels=LABELS[:2, None],
    test_images=GREY[2:3, ..., None],
    test_labels=LABELS[2:3],
  )
  data = load(spec, size=8, channels=1)
  assert list(data) == ["train", "validation", "test"]
  np.testing.assert_array_equal(data["train"].images, GREY[..., None])
  np.testing.assert_array_equal(data["train"].labels, LABELS)
  assert data["train"].labels.dtype == np.int32
  assert data["validation"].label_names == ("0", "1", "2")
  assert data["test"].labels.tolist() == [2]
  assert len({*data["train"].groups, *data["validation"].groups, *data["test"].groups}) == 9


def test_keras_layout_and_names(tmp_path):
  spec = save(tmp_path, x_train=COLOUR, y_train=LABELS, x_test=COLOUR[:1], y_test=LABELS[:1])
  data = load(spec, size=8, channels=3, label_names=("a", "b", "c"))
  assert list(data) == ["train", "test"]
  assert data["train"].label_names == ("a", "b", "c")
  np.testing.assert_array_equal(data["train"].images, COLOUR)
  with pytest.raises(
    ValueError, match=r"labels of 'x\.npz' run from 0 to 2, but there are 2 label names"
  ):
    load(spec, size=8, channels=3, label_names=("a", "b"))


def test_groups_and_columns(tmp_path):
  spec = save(
    tmp_path,
    test_images=GREY,
    test_labels=LABELS,
    test_groups=[1, 1, 2, 2, 3, 3],
    test_site=list("aabbcc"),
  )
  data = load(spec, size=8, channels=1)["test"]
  assert data.groups.tolist() == [1, 1, 2, 2, 3, 3]
  assert data.has_patient.all()
  by_site = load(spec, size=8, channels=1, patient_column="site")["test"]
  assert "".join(by_site.groups) == "aabbcc"
  with pytest.raises(ValueError, match="give one of them"):
    load(spec, size=8, channels=1, patient_column="site", patient_pattern="(a)")
  assert "".join(data.columns["site"]) == "aabbcc"


def test_resizing_and_channels(tmp_path):
  data = load(save(tmp_path, test_images=GREY, test_labels=LABELS), size=4, channels=3)["test"]
  expected = np.stack(
    [np.asarray(Image.fromarray(i).resize((4, 4), Image.Resampling.BILINEAR)) for i in GREY]
  )
  np.testing.assert_array_equal(data.images, np.repeat(expected[..., None], 3, -1))
  data = load(save(tmp_path, test_images=COLOUR, test_labels=LABELS), size=8, channels=1)["test"]
  np.testing.assert_allclose(
    data.images[..., 0], COLOUR @ np.array([0.299, 0.587, 0.114]), atol=0.51
  )


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    (
      {"test_images": GREY},
      r"x\.npz holds \['images'\] for the test split, but no labels; add test_labels",
    ),
    ({"test_mask": GREY, "test_images": GREY}, r"but no labels"),
    ({"images": GREY}, r"an array 'images'; rename it like train_images"),
    ({"holdout_images": GREY}, r"an array 'holdout_images'"),
    (
      {"test_images": GREY / 255, "test_labels": LABELS},
      r"x\.npz are float64; scale them to 0\.\.255 .* uint8",
    ),
    ({"test_images": GREY.astype(np.uint16), "test_labels": LABELS}, r"are uint16; scale"),
    (
      {"test_images": COLOUR[..., :2], "test_labels": LABELS},
      r"have shape \(6, 8, 8, 2\); store them as",
    ),
    ({"test_images": GREY[:, 0], "test_labels": LABELS}, r"have shape \(6, 8\); store"),
    ({"test_images": GREY[:0], "test_labels": LABELS[:0]}, r"have shape \(0, 8, 8\); .* N > 0"),
    (
      {"test_images": GREY, "test_labels": LABELS[:4]},
      r"\(4,\); store one integer for each of the 6 images",
    ),
    (
      {"test_images": GREY, "test_labels": np.eye(3, dtype=int)[LABELS]},
      r"\(6, 3\); .*\(np\.argmax",
    ),
    ({"test_images": GREY, "test_labels": LABELS / 2}, r"float64 \(6,\); store one integer"),
    ({"test_images": GREY, "test_labels": LABELS - 1}, r"hold -1; number the classes from 0"),
    (
      {"test_images": GREY, "test_labels": LABELS, "test_site": [1]},
      r"test_site .* shape \(1,\) for 6 images",
    ),
    (
      {"test_images": GREY, "test_labels": LABELS, "x_test": GREY},
      r"images of the test split twice",
    ),
    (
      {"test_images": np.array([GREY[0], GREY[0, :4]], object)},
      r"cannot be read as npz .* arrays of one shape",
    ),
    ({}, r"x\.npz holds no arrays"),
  ],
)
def test_what_is_wrong_is_named_with_its_cure(tmp_path, arrays, message):
  with pytest.raises(ValueError, match=message):
    load(save(tmp_path, **arrays), size=8, channels=1)


def test_a_missing_or_corrupt_file_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"no npz file at .*gone\.npz; check"):
    load(f"npz:{tmp_path}/gone.npz", size=8, channels=1)
  np.savez_compressed(tmp_path / "x.npz", test_images=GREY, test_labels=LABELS)
  whole = (tmp_path / "x.npz").read_bytes()
  damaged = bytearray(whole)
  damaged[100:200] = bytes(100)
  np.save(tmp_path / "one.npy", GREY)
  single = (tmp_path / "one.npy").read_bytes()
  for content in (whole[:200], bytes(damaged), b"", b"some text", single):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.npz cannot be read as npz .* copy it again"):
      load(f"npz:{tmp_path}/x.npz", size=8, channels=1)


@pytest.mark.real_data
def test_real_files(real_data):
  data = load(
    f"npz:{real_data}/pneumoniamnist_28.npz",
    size=28,
    channels=1,
    label_names=("normal", "pneumonia"),
  )
  assert {split: len(one) for split, one in data.items()} == {
    "train": 4708,
    "validation": 524,
    "test": 624,
  }
  assert np.bincount(data["test"].labels).tolist() == [234, 390]
  data = load(f"npz:{real_data}/mnist.npz", size=28, channels=1)
  assert {split: len(one) for split, one in data.items()} == {"train": 60000, "test": 10000}
  assert data["test"].label_names == tuple("0123456789")
  data = load(f"npz:{real_data}/msd_lung_48.npz", size=48, channels=1)
  assert {split: one.masks.shape for split, one in data.items()} == {
    "train": (130, 48, 48),
    "test": (130, 48, 48),
  }
  assert data["test"].label_names == ("background", "foreground")
