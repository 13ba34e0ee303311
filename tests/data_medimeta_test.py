"""A made sample in the layout that MedIMeta publishes; its images cannot be had here."""

import csv

import numpy as np
import pytest
import yaml
from PIL import Image

from experiments import inputs, settings
from experiments.configs import Train
from primia_jax.data import load, medimeta

ORIGINAL = (
  "train/NORMAL/IM-0115-0001.jpeg", "train/NORMAL/IM-0115-0002.jpeg",
  "train/PNEUMONIA/person3_bacteria_10.jpeg", "train/PNEUMONIA/person3_virus_11.jpeg",
  "train/PNEUMONIA/person4_virus_12.jpeg", "train/NORMAL/NORMAL2-IM-0116-0001.jpeg",
  "test/NORMAL/IM-0200-0001.jpeg", "test/PNEUMONIA/person90_bacteria_1.jpeg",
  "test/PNEUMONIA/person91_virus_1.jpeg",
)  # fmt: skip
OWN = {"train": (0, 1, 2, 4), "val": (3,), "test": (7, 6)}  # 5 and 8 are in no split
TASKS = [
  {"task_name": "disease", "task_target": "BINARY_CLASSIFICATION",
   "labels": {0: "NORMAL", 1: "PNEUMONIA"}},
]  # fmt: skip


def sample(folder, tasks=TASKS, own=OWN, patients=None):
  """Images whose grey value is ten times their number."""
  num = len(ORIGINAL)
  for name in ("images", "task_labels", "splits", "original_splits"):
    (folder / name).mkdir(parents=True, exist_ok=True)
  info = {"id": "pneumonia", "name": "Pediatric Pneumonia", "tasks": tasks,
          "input_size": [1, 224, 224]}  # fmt: skip
  (folder / "info.yaml").write_text(yaml.safe_dump(info))
  for i in range(num):
    Image.fromarray(np.full((16, 16), 10 * i, np.uint8)).save(folder / f"images/{i:06d}.tiff")
  labels = np.array(["PNEUMONIA" in name for name in ORIGINAL]).astype(np.int64)
  for task in tasks:
    np.save(folder / "task_labels" / f"{task['task_name']}.npy", labels)
  splits = {"splits": own, "original_splits": {"train": range(6), "test": range(6, 9)}}
  for kind, of in splits.items():
    for split, numbers in of.items():
      lines = "\n".join(f"images/{i:06d}.tiff" for i in numbers)
      (folder / kind / f"{split}.txt").write_text(lines)
  with (folder / "annotations.csv").open("w", newline="") as file:
    writer = csv.writer(file)
    more = ["patient_id"] if patients else []
    writer.writerow(["filepath", "tasks/disease", "original_filepath", "original_split", *more])
    for i, name in reversed(list(enumerate(ORIGINAL))):
      row = [f"images/{i:06d}.tiff", labels[i], f"chest_xray/{name}", name.split("/")[0]]
      writer.writerow([*row, *([patients[i]] if patients else [])])
  return folder


def test_the_published_splits_are_taken_image_by_image(tmp_path):
  found = load.load(f"medimeta:{sample(tmp_path / 'pneumonia')}", size=8, channels=1)
  assert list(found) == ["train", "validation", "test"]
  grey = {name: one.images[:, 0, 0, 0].tolist() for name, one in found.items()}
  assert grey == {"train": [0, 10, 20, 40], "validation": [30], "test": [60, 70]}
  assert found["train"].label_names == ("NORMAL", "PNEUMONIA")
  assert found["train"].labels.tolist() == [0, 0, 1, 1]
  assert found["test"].labels.tolist() == [0, 1]
  assert found["train"].groups.tolist() == ["normal/115", "normal/115", "bacterial/3", "viral/4"]
  assert found["train"].has_patient.all()
  assert found["train"].is_numbered
  assert found["train"].notes["images in no split"] == "2, left out"
  assert "4 train, 1 validation, 2 test" in found["train"].notes["splits"]


def test_the_original_splits_and_other_orders_of_classes(tmp_path):
  spec = f"medimeta:{sample(tmp_path)}"
  found = load.load(
    spec, size=8, channels=1, splits="original", label_names=["pneumonia", "normal"]
  )
  assert {name: len(one) for name, one in found.items()} == {"train": 6, "test": 3}
  assert found["test"].labels.tolist() == [1, 0, 0]
  lazy = load.load(spec, size=8, channels=3, lazy=True)["test"]
  assert lazy.images.shape == (2, 8, 8, 3)
  assert lazy.images[np.array([1])].max() == 70


def test_patients_of_the_annotations_come_first(tmp_path):
  patients = ["a", "b", "a", "", "c", "c", "d", "e", "f"]
  found = medimeta.read_medimeta(sample(tmp_path, patients=patients), size=8, channels=1)
  assert found["train"].groups.tolist() == ["a", "b", "a", "c"]
  assert found["validation"].has_patient.tolist() == [False]
  assert not found["train"].is_numbered


def test_a_run_trains_and_tests_by_these_splits(tmp_path):
  config = settings.replace(
    Train(), data=f"medimeta:{sample(tmp_path)}", image_size=8, splits="original", num_sites=2,
    partition="iid", validation_fraction=0.3,
  )  # fmt: skip
  images = inputs.site_images(config)
  assert len(images.test) == 3
  sizes = (*images.train.sizes, *images.validation.sizes)
  assert sum(sizes) == 6
  own = inputs.site_images(settings.replace(config, splits=""))
  note = own.train.dataset.notes["splits not used"]
  assert "validation: each site holds out images of its own" in note
  with pytest.raises(ValueError, match="splits='validation'"):
    settings.replace(config, splits="validation")
  with pytest.raises(ValueError, match="task='disease' belongs to medimeta"):
    settings.replace(Train(), task="disease")


MANY = [*TASKS, {**TASKS[0], "task_name": "kind"},
        {**TASKS[0], "task_name": "signs", "task_target": "MULTILABEL_CLASSIFICATION"}]  # fmt: skip


@pytest.mark.parametrize(
  ("made", "asked", "told"),
  [
    ({"tasks": MANY}, {}, r"tasks \['disease', 'kind', 'signs'\]; choose one with --task"),
    ({"tasks": MANY}, {"task": "age"}, "task='age'"),
    ({"tasks": MANY}, {"task": "signs"}, "MULTILABEL_CLASSIFICATION, and a label must be one"),
    ({"own": {"train": (0, 1), "test": (1, 2)}}, {}, r"000001.tiff', which train.txt has named"),
    ({"own": {"train": (0, 1), "test": (99,)}}, {}, r"000099.tiff', which is none of 9"),
    ({"own": {"train": (0, 1)}}, {}, r"has images for \['train'\]; it needs train.txt and test"),
    ({"tasks": [{**TASKS[0], "labels": {0: "NORMAL"}}]}, {}, "holds labels 0 to 1"),
    ({"tasks": [{**TASKS[0], "labels": {1: "NORMAL"}}]}, {}, "have not MedIMeta's form"),
    ({"tasks": []}, {}, r"has the tasks \[\]"),
  ],
)
def test_other_forms_are_refused(tmp_path, made, asked, told):
  folder = sample(tmp_path, **made)
  with pytest.raises((ValueError, FileNotFoundError), match=told):
    medimeta.read_medimeta(folder, size=8, channels=1, **asked)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"info\.yaml; name the folder of one data set"):
    medimeta.read_medimeta(tmp_path, size=8, channels=1)
  folder = sample(tmp_path)
  (folder / "images" / "000004.tiff").unlink()
  with pytest.raises(FileNotFoundError, match=r"lacks 1 images .* images/000004\.tiff"):
    medimeta.read_medimeta(folder, size=8, channels=1)
  (folder / "info.yaml").write_text("tasks: [")
  with pytest.raises(ValueError, match=r"info\.yaml has not MedIMeta's form"):
    medimeta.read_medimeta(folder, size=8, channels=1)
