"""What folders mean: sites, splits, classes and patients, recognised, given, or refused."""

import pytest
from data_folder_test import pack, write

from primia_jax.data import layouts
from primia_jax.data.files import Files
from primia_jax.data.load import load


def places(names, layout="", label_names=None):
  return layouts.places(Files("root", tuple(names), lambda name: b""), layout, label_names)


def product(*levels):
  names = [""]
  for level in levels:
    names = [f"{name}/{one}" for name in names for one in level.split()]
  return [f"{name}/{i}.png"[1:] for name in names for i in range(2)]


HOSPITALS = product("h1 h2 h3", "benign malignant")


@pytest.mark.parametrize(
  "spelling", ["Training Testing", "TRAIN test", "train Validation", "valid val"]
)
def test_splits_are_known_in_common_spellings(spelling):
  found = places(product(spelling, "x y"))
  assert found.layout == "split/class"
  assert set(found.splits) == {layouts.SPLITS[one.lower()] for one in spelling.split()}
  assert set(found.classes) == {"x", "y"}


def test_sites_above_splits_are_sites():
  found = places(product("data", "north south", "train test", "x y"))
  assert found.layout == "*/site/split/class"
  assert found.sites == ["north"] * 8 + ["south"] * 8
  assert found.folders == ["data/north"] * 8 + ["data/south"] * 8
  assert places(product("data", "train test", "x y")).sites == [""] * 8


@pytest.mark.parametrize(
  ("names", "choices"),
  [
    (HOSPITALS, r"h1, h2, h3 .*benign, malignant.*=site/class where benign .* class/site or"),
    (HOSPITALS[:-2], "--layout=site/class"),  # one hospital lacks a class
    (product("d", "a b", "p1 p2 p3"), r"--layout=\*/site/class .* \*/class/patient where a"),
    (product("train test", "h1 h2", "x y"), "--layout=split/site/class"),
    (
      product("a", "train test", "p1 p2") + product("b", "train test", "p3"),
      "=site/split/class, cl",
    ),
  ],
)
def test_folders_that_may_be_sites_or_classes_are_refused_with_the_choice(names, choices):
  with pytest.raises(ValueError, match=choices):
    places(names)


@pytest.mark.parametrize(
  "names",
  [
    product("a b", "p1 p2")[:4] + product("b", "p3 p4"),
    product("a b", "images"),
    product("train test", "a b", "h1 h2")[:-2],  # SPLIT/CLASS is usual; a site lacks a class
    ["a/1.png", "b/2.png"],
  ],
)
def test_usual_folders_stay_classes(names):
  found = places(names)
  assert set(found.classes) == {"a", "b"}
  assert set(found.sites) == {""}


def test_names_of_classes_decide():
  found = places(HOSPITALS, label_names=("Benign", "malignant"))
  assert (found.layout, set(found.sites)) == ("site/class", {"h1", "h2", "h3"})
  assert set(places(HOSPITALS, label_names=("h1", "h2", "h3")).classes) == {"h1", "h2", "h3"}
  apart = ["h1/benign/1.png", "h2/malignant/2.png"]
  assert places(apart, label_names=("benign", "malignant")).classes == ["benign", "malignant"]
  assert set(places(product("h1 h2", "NORMAL PNEUMONIA")).sites) == {"h1", "h2"}


def test_a_layout_is_taken_at_its_word():
  found = places(["d/test/a/p1/x/1.png", "d/Train/b/p2/2.png"], "*/split/class/patient")
  assert found.splits == ["test", "train"]
  assert found.classes == ["a", "b"]
  assert found.patients == ["p1", "p2"]
  assert found.folders == ["d/p1/x", "d/p2"]
  found = places(HOSPITALS, " Class/SITE")
  assert set(found.sites) == {"benign", "malignant"}


@pytest.mark.parametrize(
  ("layout", "message"),
  [
    ("site", "must name the folders"),
    ("class/class", "each once at most"),
    ("class/ward", r"site/class or \*/split/class/patient"),
    (
      "site/class/patient",
      r"3 folders .* 12 files of root \(h1/benign/0\.png, .* \(12 in all\)\) are",
    ),
    ("split/class", r"h1, h2, h3 of root are not splits"),
  ],
)
def test_layouts_that_do_not_fit_are_refused(layout, message):
  with pytest.raises(ValueError, match=message):
    places(HOSPITALS, layout)


@pytest.mark.parametrize("packed", [False, True])
def test_folders_and_tars_give_sites_and_patients(tmp_path, packed):
  root = write(tmp_path / "d", {f"{s}/{c}/{p}/1.png": 1 for s in "st" for c in "ab" for p in "pq"})
  path = pack(root, tmp_path / "d.tar") if packed else root
  data = load(f"folder:{path}", size=8, channels=1, layout="site/class/patient")["all"]
  assert data.columns["site"].tolist() == ["s"] * 4 + ["t"] * 4
  assert data.groups.tolist() == list("pqpqpqpq")
  assert data.has_patient.all()
  assert data.notes["folders"] == "site/class/patient"
  with pytest.raises(ValueError, match="--layout=site/class"):
    load(f"folder:{path}", size=8, channels=1)
