"""Tables of labels: columns, splits, sites, patients, and all wrong lines at once."""

import os

import numpy as np
import pytest
from data_folder_test import write

from primia_jax.data.load import load

FILES = {f"img/{i}.png": i for i in range(6)}


def table(folder, text, files=FILES):
  write(folder, files)
  (folder / "labels.csv").write_text(text, encoding="utf-8")
  return f"csv:{folder / 'labels.csv'}"


def read(spec, **options):
  return load(spec, size=8, channels=1, **options)


def test_all_columns_are_read(tmp_path):
  lines = ["file,label,patient,site,split,age", "img/3.png,b,p,north,Training,61"]
  lines += [
    "./img/1.png,a,p,south,train,62",
    "img/5.png,a,q,south,Testing,63",
    "img/0.png,b,,x,test,6",
  ]
  data = read(table(tmp_path, "\n".join(lines)))
  train, test = data["train"], data["test"]
  assert train.label_names == ("a", "b")
  assert train.labels.tolist() == [1, 0]
  assert train.images[:, 0, 0, 0].tolist() == [3, 1]
  assert train.columns["path"].tolist() == ["img/3.png", "img/1.png"]
  assert train.columns["site"].tolist() == ["north", "south"]
  assert train.columns["age"].tolist() == ["61", "62"]
  assert (train.groups.tolist(), train.has_patient.tolist()) == (["p", "p"], [True, True])
  assert (test.groups.tolist(), test.has_patient.tolist()) == (["q", "img/0.png"], [True, False])


@pytest.mark.parametrize("separator", [";", "\t"])
def test_columns_have_any_name_and_tables_come_from_spreadsheets(tmp_path, separator):
  rows = [["Image Index", "Finding", "ward", "who"], ["img/0.png", "x, mild", "w2", "1"]]
  rows += [["img/1.png", "y", "w1", "2"]]
  text = "\ufeff" + "\r\n".join(separator.join(row) for row in rows)
  names = {"file": "Image Index", "label": "Finding", "site": "ward"}
  data = read(table(tmp_path, text), csv_columns=names, patient_column="who")["all"]
  assert data.label_names == ("x, mild", "y")
  assert data.columns["site"].tolist() == ["w2", "w1"]
  assert data.groups.tolist() == ["1", "2"]
  given = read(f"csv:{tmp_path}/labels.csv", csv_columns=names, label_names=("Y", "X, Mild"))["all"]
  assert given.labels.tolist() == [1, 0]


def test_all_wrong_lines_are_named_at_once(tmp_path):
  outside = write(tmp_path / "other", {"a.png": 1})
  (tmp_path / "d").mkdir()
  os.mkfifo(tmp_path / "d" / "pipe.png")
  lines = ["file,label,split", "img/0.png,a,train", "img/0.png,b,train", "img/./0.png,a,test"]
  lines += ["../other/a.png,a,train", f"{outside}/a.png,a,train", "img/../../other/b.png,a,train"]
  lines += ["img/9.png,a,train", "pipe.png,a,train", "labels.csv,a,dev", ",,train"]
  with pytest.raises(ValueError, match="wrong lines") as caught:
    read(table(tmp_path / "d", "\n".join(lines)))
  said = str(caught.value).splitlines()[1:]
  assert said[0] == "  line 3 repeats the file 'img/0.png' of line 2"
  assert said[1] == "  line 4 repeats the file 'img/./0.png' of line 2"
  assert all("outside of the table's folder" in line for line in said[2:5])
  assert said[5].startswith("  line 8 names 'img/9.png', which is no file in")
  assert said[6].startswith("  line 9 names 'pipe.png', which is no file in")
  assert said[7].startswith("  line 10 names 'labels.csv', which is not an image")
  assert said[8].startswith("  line 10 has the split 'dev', none of train, training")
  assert said[9:] == ["  line 11 names no file", "  and 1 more"]
  with pytest.raises(ValueError, match="line 3 has the label 'b', none of a"):
    read(table(tmp_path / "e", "file,label\nimg/0.png,a\nimg/1.png,b"), label_names=("a",))


@pytest.mark.parametrize(
  ("text", "options", "message"),
  [
    ("path,label\nimg/0.png,a", {}, r"no column 'file', but \['path', .*--csv_columns=file=NAME"),
    ("path,kind\nimg/0.png,a", {}, "no column 'file', 'label'"),
    ("file,label\nimg/0.png,a", {"csv_columns": {"site": "ward"}}, "no column 'ward'"),
    ("file,label,label\nimg/0.png,a,b", {}, r"columns \['label'\] twice"),
    ("file,label\nimg/0.png,a,b\nimg/1.png,a\nimg/2.png", {}, r"lines \[2, 4\] .* another number"),
    ("file,label", {}, "lists no image"),
    ("", {}, "lists no image"),
    ('file,label\nimg/0.png,"a', {}, "is not a CSV in UTF-8"),
    ("file,label\nimg/0.png,a\nimg/1.png,A", {}, "differ only in letter case"),
  ],
)
def test_wrong_tables_are_refused(tmp_path, text, options, message):
  with pytest.raises(ValueError, match=message):
    read(table(tmp_path, text), **options)


def test_a_missing_table_and_bad_images_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="there is no CSV at"):
    read(f"csv:{tmp_path}/none.csv")
  spec = table(tmp_path, "file,label\nimg/0.png,a\nimg/1.png,b", FILES | {"img/1.png": b"junk"})
  with pytest.raises(ValueError, match=r"img/1\.png cannot be read"):
    read(spec)
  data = read(spec, skip_bad_files=True)["all"]
  assert data.columns["path"].tolist() == ["img/0.png"]
  assert np.array_equal(data.labels, [0])
