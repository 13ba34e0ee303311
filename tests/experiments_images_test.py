"""From folders and tables to the images of sites: what is refused, and what a report says."""

import os

import numpy as np
import pytest
from data_dicom_test import make
from data_folder_test import encode, write

from experiments import image_facts, inputs, model_files, settings
from experiments.configs import Train
from experiments.configs.data import Data
from primia_jax.data import scan

RNG = np.random.default_rng(0)
SMALL = settings.replace(Train(), image_size=8, num_sites=2, partition="iid")


def images(names):
  """A picture of its own for each name."""
  return {name: encode(RNG.integers(0, 256, (8, 8), np.uint8)) for name in names}


def names(*levels, num=4):
  out = [""]
  for level in levels:
    out = [f"{name}{one}/" for name in out for one in level.split()]
  return [f"{name}{i}.png" for name in out for i in range(num)]


def config_of(root, **changes):
  return settings.replace(SMALL, data=f"folder:{root}", **changes)


def facts(config):
  found = inputs.site_images(config)
  return image_facts.facts(config, found.train, found.validation, found.test)


def paths(part):
  return [set(part.dataset.columns["path"][index].tolist()) for index in part.sites]


def test_sites_of_folders_are_the_sites_of_the_federation(tmp_path):
  write(tmp_path, images(names("north south", "train test", "x y")))
  config = config_of(tmp_path, partition="auto")
  found = inputs.site_images(config)
  for part in (found.train, found.validation):
    for site, of_site in zip(("north", "south"), paths(part), strict=True):
      assert all(path.startswith(f"{site}/train/") for path in of_site)
  assert len(found.test) == 16
  assert facts(config)["sites"] == "0: north, 1: south"
  with pytest.raises(ValueError, match="makes 2 sites; set --num_sites=2"):
    inputs.site_images(settings.replace(config, num_sites=3))
  with pytest.raises(ValueError, match=r"site_fractions='0\.5,0\.5': the source names its sites"):
    inputs.site_images(settings.replace(config, site_fractions="0.5,0.5"))


def test_a_table_of_labels_feeds_the_federation(tmp_path):
  files = images(f"{i}.png" for i in range(24))
  write(tmp_path, files)
  rows = [f"{n},{'ab'[i % 2]},p{i // 2},{'uv'[i // 12]}" for i, n in enumerate(files)]
  (tmp_path / "t.csv").write_text("\n".join(["image,label,patient,clinic", *rows]))
  changes = {"csv_columns": "image=label", "partition": "auto"}
  config = settings.replace(SMALL, data=f"csv:{tmp_path}/t.csv", partition="auto")
  config = settings.replace(config, csv_columns="file=image, site=clinic")
  found = inputs.site_images(config)
  assert [set(found.train.dataset.columns["clinic"][i]) for i in found.train.sites] == [
    {"u"},
    {"v"},
  ]
  train = set(found.train.dataset.groups)
  assert not train & set(found.test.groups)
  assert facts(config)["patients of training images"].startswith("known")
  assert inputs.source(config.data) == tmp_path / "t.csv"
  with pytest.raises(ValueError, match="write NAME=COLUMN"):
    settings.replace(config, **changes)


def test_a_patient_of_a_table_in_training_and_testing_is_refused_and_at_two_sites_named(tmp_path):
  files = images(f"{i}.png" for i in range(16))
  write(tmp_path, files)
  row = lambda i, name: f"{name},{'ab'[i % 2]},{'uv'[i // 8]},{'train' if i % 8 < 6 else 'test'}"
  patients = ["p", "q1", "q2", "q3", "q4", "q5", "r1", "r2"] * 2
  write_table = lambda whose: (tmp_path / "t.csv").write_text(
    "\n".join(
      ["file,label,site,split,patient"] + [f"{row(i, n)},{whose[i]}" for i, n in enumerate(files)]
    )
  )
  write_table(patients)
  config = settings.replace(SMALL, data=f"csv:{tmp_path}/t.csv", partition="auto")
  assert facts(config)["patients at several sites"].startswith("6 (p, q1, ")
  private = settings.replace(config, dp="patient", noise_multiplier=1.0)
  with pytest.raises(ValueError, match="patients have images at several sites"):
    inputs.site_images(private)
  write_table([*patients[:-1], "q1"])
  with pytest.raises(ValueError, match=r"both training and testing: 1 \(q1\).*--allow_overlap"):
    inputs.site_images(config)
  allowed = facts(settings.replace(config, allow_overlap=True))
  assert allowed["PATIENTS IN TRAINING AND TESTING"] == "1 (q1)"


def test_patients_of_folders_stay_together_and_are_refused_in_two_splits(tmp_path):
  write(tmp_path / "d", images(names("a b", "p0 p1 p2 p3 p4 p5", num=2)))
  config = config_of(tmp_path / "d", layout="class/patient")
  found = inputs.site_images(config)
  sets = [set(found.train.dataset.groups[i]) for i in found.train.sites]
  sets += [set(found.train.dataset.groups[i]) for i in found.validation.sites]
  sets += [set(found.test.groups)]
  assert sum(map(len, sets)) == len(set.union(*sets)) == 6
  write(tmp_path / "e", images(names("train test", "a b", "p0 p1 p2 p3", num=2)))
  with pytest.raises(ValueError, match=r"training and testing: 4 \(p0, p1, p2, p3\)"):
    inputs.site_images(config_of(tmp_path / "e", layout="split/class/patient"))


def test_the_same_patient_id_of_dicom_files_in_two_splits_is_refused(tmp_path):
  ids = {"train/a/1.dcm": "p", "train/b/2.dcm": "q", "test/a/3.dcm": "p", "test/b/4.dcm": "r"}
  pixels = lambda: RNG.integers(0, 4096, (8, 8), np.uint16)
  write(tmp_path, {name: make(pixels(), PatientID=one) for name, one in ids.items()})
  with pytest.raises(ValueError, match=r"training and testing: 1 \(patient/p\); move all"):
    inputs.site_images(config_of(tmp_path))


@pytest.mark.parametrize("sites_in_memory", [0, 1])
def test_copies_between_splits_are_refused_or_named(tmp_path, sites_in_memory):
  files = images(names("train test", "a b"))
  files["test/a/copy.png"] = files["train/a/0.png"]
  config = config_of(write(tmp_path, files), sites_in_memory=sites_in_memory)
  match = r"both training and testing: 1 \(train/a/0\.png = test/a/copy\.png\); remove one"
  with pytest.raises(ValueError, match=match):
    inputs.site_images(config)
  allowed = facts(settings.replace(config, allow_overlap=True))
  assert allowed["IMAGES IN TRAINING AND TESTING"] == "1 (train/a/0.png = test/a/copy.png)"


def test_copies_are_dealt_together_and_named_where_sites_are_given(tmp_path):
  files = images(names("a b", num=10))
  files |= {f"b/copy{i}.png": files[f"a/{i}.png"] for i in range(6)}
  config = config_of(write(tmp_path / "d", files))
  for seed in range(3):
    said = facts(settings.replace(config, seed=seed))
    assert not {"images at several sites", "IMAGES IN TRAINING AND TESTING"} & set(said)
  files = images(names("u v", "a b"))
  files["v/a/copy.png"] = files["u/a/0.png"]
  config = config_of(write(tmp_path / "e", files), layout="site/class", partition="auto")
  for seed in range(3):
    said = facts(settings.replace(config, seed=seed)).get("images at several sites", "")
    assert said in ("", "1 (u/a/0.png = v/a/copy.png)")  # both may be held out for testing


def test_bad_files_of_all_splits_are_named_before_work_and_left_out(tmp_path):
  write(tmp_path, images(names("train test", "a b")) | {"train/a/x.png": b"x", "test/b/x.png": b""})
  os.mkfifo(tmp_path / "test" / "a" / "pipe.png")
  for lazy in (0, 1):
    config = config_of(tmp_path, sites_in_memory=lazy)
    with pytest.raises(ValueError, match="3 images cannot be read"):
      inputs.site_images(config)
    said = facts(settings.replace(config, skip_bad_files=True))
    assert said[scan.LEFT_OUT] == "3 of 19: train/a/x.png, test/a/pipe.png, test/b/x.png"
  data = Data(data=f"folder:{tmp_path}", image_size=8)
  with pytest.raises(ValueError, match="2 images cannot be read"):
    inputs.images_to_test(data)
  skipping = settings.replace(data, skip_bad_files=True)
  assert len(inputs.images_to_test(skipping)[0]) == 8
  everything = inputs.unlabelled_images(skipping, ("a", "b"))
  assert everything.notes[scan.LEFT_OUT].startswith("3 of 19")


def test_a_site_of_one_image_and_a_site_of_one_class_are_ordinary(tmp_path):
  files = names("train test", "a b", "h0") + names("train test", "a", "h2") + ["train/a/h1/0.png"]
  root = write(tmp_path / "d", images(files))
  config = config_of(root, num_sites=3, layout="split/class/site")
  config = settings.replace(config, partition="auto")
  found = inputs.site_images(config)
  assert found.train.sizes[1] == 1
  assert found.validation.sizes[1] == 0
  said = facts(config)
  assert said["site 1"].startswith("1 image; images of one class only, a; none is held out")
  assert said["site 2"] == "4 images; images of one class only, a"
  one_each = [f"{split}/{c}/h{c}/0.png" for split in ("train", "test") for c in "ab"]
  config = config_of(write(tmp_path / "x", images(one_each)), layout="split/class/site")
  config = settings.replace(config, partition="auto")
  with pytest.raises(ValueError, match=r"no site has images to validate with, of \[1, 1\]"):
    inputs.site_images(config)


def test_sources_of_sites_are_compared(tmp_path):
  files = images(names("a b", "p q r s", num=2))
  write(tmp_path / "u", files)
  write(
    tmp_path / "v", {"a/x/copy.png": files["a/p/0.png"]} | images(names("a b", "r s t u", num=2))
  )
  sources = f"folder:{tmp_path}/u,folder:{tmp_path}/v"
  config = settings.replace(SMALL, site_data=sources, layout="class/patient", partition="auto")
  said = facts(settings.replace(config, allow_overlap=True))
  assert said["names of patients in several sources"].endswith(", counted as different patients")
  assert any(what.endswith(("IN TRAINING AND TESTING", "at several sites")) for what in said)


def test_a_model_is_tested_with_the_bits_of_its_training(tmp_path):
  write(tmp_path, {"model.json": b'{"grey_bits": 12}'})
  assert model_files.grey_bits(str(tmp_path)) == 12
  write(tmp_path, {"model.json": b"{}"})  # of an earlier version
  assert model_files.grey_bits(str(tmp_path)) == 0


def test_splits_that_are_not_used_are_named(tmp_path):
  write(tmp_path, images(names("train val test", "a b")))
  assert facts(config_of(tmp_path))["splits not used"].startswith("validation: each site")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data": "folder:x", "layout": "site"}, "must name the folders"),
    ({"data": "npz:x", "layout": "class"}, "layout='class' belongs to folder:PATH, not to data="),
    ({"data": "csv:x", "ignore": "*.txt"}, "ignore='\\*.txt' belongs to folder:PATH"),
    ({"csv_columns": "file=x"}, "belongs to csv:PATH, not to data='phantom'"),
    ({"data": "csv:x", "csv_columns": "patient=x"}, "patient_column names that of patients"),
    ({"data": "csv:x", "csv_columns": "file="}, "write NAME=COLUMN"),
    ({"data": "csv:x", "csv_columns": "file=a,file=b"}, "write NAME=COLUMN"),
    ({"data": "folder:x", "grey_bits": 7}, "grey_bits=7; use one of 0, 8, 9"),
    (
      {"data": "folder:x", "layout": "class/patient", "patient_pattern": "(p)"},
      "both say whose an image is",
    ),
  ],
)
def test_settings_of_another_source_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    settings.replace(Data(), **changes)


def test_settings_of_one_kind_of_several_sources_are_for_these_alone():
  data = Data(site_data="folder:a,npz:b", layout="site/class", ignore="*.txt")
  assert data.of("folder:a").layout == "site/class"
  assert data.of("npz:b") == Data(data="npz:b")


@pytest.mark.real_data
def test_real_x_rays_have_no_copy_in_two_splits_and_numbers_that_recur_are_named(real_data):
  config = settings.replace(
    SMALL, data=f"folder:{real_data / 'chest_xray_224.tar'}", image_size=32, num_sites=3
  )
  said = facts(config)
  assert "IMAGES IN TRAINING AND TESTING" not in said
  assert said["numbers of patients in training and testing"].startswith("79 (")
