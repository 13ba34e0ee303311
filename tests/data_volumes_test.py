import json

import numpy as np
import pytest

from primia_jax.data import load, volumes
from primia_jax.data.sites import Part, hold_out

nibabel = pytest.importorskip("nibabel")


def task(folder, shapes=((6, 5, 4), (6, 5, 3)), affine=None, classes=None):
  """A task whose values tell where they are: right 100, front 10, head 1 a voxel."""
  affine = np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine
  told = {"labels": classes or {"0": "background", "1": "tumour"}, "training": []}
  for kind in ("imagesTr", "labelsTr"):
    (folder / kind).mkdir(parents=True, exist_ok=True)
  for i, shape in enumerate(shapes):
    x, y, z = np.indices(shape)
    values = (100 * x + 10 * y + z).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[1:3, 2:4, 1] = 1
    name = f"case_{i}.nii.gz"
    for kind, array in (("imagesTr", values), ("labelsTr", mask)):
      nibabel.save(nibabel.Nifti1Image(array, affine), folder / kind / name)
    told["training"].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
  (folder / "dataset.json").write_text(json.dumps(told))
  return folder


def test_slices_are_shown_as_radiologists_see_them(tmp_path):
  found = volumes.read_msd(task(tmp_path), size=6, channels=1, ct_window=(300.0, 600.0))["all"]
  assert len(found) == 7
  assert found.label_names == ("background", "tumour")
  assert found.groups.tolist() == ["case_0"] * 4 + ["case_1"] * 3
  assert found.columns["slice"].tolist() == [0, 1, 2, 3, 0, 1, 2]
  assert found.columns["position_mm"][:4].tolist() == [0, 3, 6, 9]
  assert found.labels.tolist() == [0, 1, 0, 0, 0, 1, 0]
  grey = found.images[0][..., 0].astype(int)
  # the affine's first axis points to the patient's right, which is left in the picture
  assert (grey[:, 0] > grey[:, -1]).all()  # larger numbers are further right
  assert (grey[0] > grey[-1]).all()  # and further to the front, which is up
  assert found.images[1].max() - grey.max() in (0, 1)


def test_a_volume_stored_in_other_axes_is_turned(tmp_path):
  one = volumes.read_msd(task(tmp_path / "a"), size=6, channels=1)["all"]
  folder = task(tmp_path / "b")
  for file in folder.rglob("*.nii.gz"):
    image = nibabel.load(file)
    codes = nibabel.orientations.axcodes2ornt(("S", "L", "P"))
    change = nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), codes)
    turned = image.as_reoriented(change)
    content = np.asarray(turned.dataobj)
    nibabel.save(nibabel.Nifti1Image(content, turned.affine), file)
  other = volumes.read_msd(folder, size=6, channels=1)["all"]
  np.testing.assert_array_equal(one.images, other.images)
  np.testing.assert_array_equal(one.masks, other.masks)
  np.testing.assert_array_equal(one.columns["position_mm"], other.columns["position_mm"])


def test_the_window_and_only_labelled_slices(tmp_path):
  folder = task(tmp_path)
  found = volumes.read_msd(folder, size=6, channels=3, ct_window=(50.0, 100.0), slices="labelled")[
    "all"
  ]
  assert len(found) == 2
  assert found.labels.tolist() == [1, 1]
  assert found.images.shape == (2, 6, 6, 3)
  assert found.images.max() == 255
  assert found.images.min() <= 3


def test_load_reads_it_and_patients_stay_whole(tmp_path):
  folder = task(tmp_path, shapes=((6, 5, 4),) * 5)
  found = load.load(f"msd:{folder}", size=8, channels=1)["all"]
  kept, held = hold_out(Part(found, (np.arange(len(found)),)), 0.4, 0)
  assert not set(found.groups[kept.sites[0]]) & set(found.groups[held.sites[0]])
  assert found.masks.shape == (20, 8, 8)
  assert found.has_patient.all()


def test_refusals(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"dataset\.json"):
    volumes.read_msd(tmp_path, size=6, channels=1)
  folder = task(tmp_path / "a")
  with pytest.raises(ValueError, match="slices='some'"):
    volumes.read_msd(folder, size=6, channels=1, slices="some")
  with pytest.raises(ValueError, match="one name each"):
    volumes.read_msd(folder, size=6, channels=1, label_names=["a", "b", "c"])
  (folder / "imagesTr" / "case_1.nii.gz").write_bytes(b"\x1f\x8b damaged")
  with pytest.raises(ValueError, match=r"case_1\.nii\.gz"):
    volumes.read_msd(folder, size=6, channels=1)
  (folder / "imagesTr" / "case_1.nii.gz").unlink()
  with pytest.raises(FileNotFoundError, match=r"case_1\.nii\.gz"):
    volumes.read_msd(folder, size=6, channels=1)
  few = task(tmp_path / "b", classes={"0": "background", "2": "tumour"})
  with pytest.raises(ValueError, match="classes from"):
    volumes.read_msd(few, size=6, channels=1)
  moved = task(tmp_path / "c")
  image = nibabel.load(moved / "labelsTr" / "case_0.nii.gz")
  shifted = image.affine.copy()
  shifted[0, 3] = 40
  nibabel.save(
    nibabel.Nifti1Image(np.asarray(image.dataobj), shifted), moved / "labelsTr" / "case_0.nii.gz"
  )
  with pytest.raises(ValueError, match="shape or place"):
    volumes.read_msd(moved, size=6, channels=1)
  four = task(tmp_path / "d")
  nibabel.save(
    nibabel.Nifti1Image(np.zeros((6, 5, 4, 2), np.int16), np.eye(4)),
    four / "imagesTr" / "case_0.nii.gz",
  )
  with pytest.raises(ValueError, match="three axes"):
    volumes.read_msd(four, size=6, channels=1)
