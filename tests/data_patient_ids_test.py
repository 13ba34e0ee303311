"""Whose an image is: columns, file names, what is missing, and what a report says."""

import numpy as np
import pytest

from primia_jax.data import patient_ids
from primia_jax.data.dataset import Dataset, take


def dataset_of(paths, has_path=True, **columns):
  num = len(paths)
  columns |= {"path": np.array(paths)} if has_path else {}
  images, labels = np.zeros((num, 1, 1, 1), np.uint8), np.zeros(num, np.int32)
  return Dataset(images, labels, ("a",), np.array(paths), columns, "these")


NAMES = ["x/person1_2.png", "x/person1_3.png", "y/person10_1.png"]
SPLITS = {
  "train": dataset_of(NAMES, age=np.array([7, 7, 8]), ward=np.array(["p", "p", ""])),
  "test": dataset_of(["x/person2_1.png"], age=np.array([7]), ward=np.array(["q"])),
}


def test_file_names_tell_patients_alike_in_all_splits():
  found = patient_ids.from_names(SPLITS, r"(person\d+)_")
  assert found["train"].groups.tolist() == ["person1", "person1", "person10"]
  assert found["test"].groups.tolist() == ["person2"]
  by_folder = patient_ids.from_names(SPLITS, r"(\w/person\d)")
  assert by_folder["train"].groups.tolist() == ["x/person1", "x/person1", "y/person1"]
  for dataset in (*found.values(), *by_folder.values()):
    patient_ids.require(dataset)
  assert take(found["train"], np.array([2])).has_patient.tolist() == [True]


def test_a_column_tells_patients():
  found = patient_ids.from_column(SPLITS, "age")
  assert found["train"].groups.tolist() == [7, 7, 8]
  patient_ids.require(found["train"])


@pytest.mark.parametrize(
  ("named", "message"),
  [
    (lambda: patient_ids.from_names(SPLITS, r"person(\d)_"), r"in 1 \(y/person10_1\.png\); widen"),
    (
      lambda: patient_ids.from_names({"all": dataset_of([f"{i}.png" for i in range(9)])}, "(x)"),
      r"in 9 \(0\.png, 1\.png, 2\.png, 3\.png, 4\.png, \.\.\.\)",
    ),
    (lambda: patient_ids.from_names(SPLITS, r"(x)?/"), r"in 1 \(y/person10_1\.png\)"),
    (lambda: patient_ids.from_names(SPLITS, "person"), "has 0 groups; put the patient"),
    (lambda: patient_ids.from_names(SPLITS, "(a)(b)"), "has 2 groups"),
    (lambda: patient_ids.from_names(SPLITS, "(a"), "is not a regular expression"),
    (
      lambda: patient_ids.from_names({"all": dataset_of(["a"], has_path=False, id=["1"])}, "(a)"),
      r"no file names; use patient_column, of \['id'\]",
    ),
    (lambda: patient_ids.from_column(SPLITS, "id"), r"columns are \['age', 'path', 'ward'\]"),
    (lambda: patient_ids.from_column(SPLITS, "ward"), r"empty for 1 \(y/person10_1\.png\)"),
  ],
)
def test_what_names_no_patient_is_refused(named, message):
  with pytest.raises(ValueError, match=message):
    named()


@pytest.mark.parametrize(
  ("values", "groups", "known"),
  [
    ([3, 4], [3, 4], [True, True]),
    (["a", " "], ["a", "own 1"], [True, False]),
    ([1.5, np.nan], ["1.5", "own 1"], [True, False]),
    ([b"a", b""], ["a", "own 1"], [True, False]),
  ],
)
def test_images_without_a_patient_are_groups_of_their_own(values, groups, known):
  got = patient_ids.groups(np.array(values), ["own 0", "own 1"])
  assert [a.tolist() for a in got] == [groups, known]


def test_reports_say_where_patients_are_unknown():
  assert "unknown for 3 of 3 images" in patient_ids.described(SPLITS["train"])
  found = patient_ids.from_names(SPLITS, r"(person\d+)_")
  assert patient_ids.described(found["train"]).startswith("known")
