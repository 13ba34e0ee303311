"""Reads images that a CSV lists, with their labels and, where it has such columns, their patients,
sites and splits.
"""

from __future__ import annotations

import csv
import os
import pathlib
import posixpath
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from primia_jax.data import decode, folder, layouts, patient_ids, scan
from primia_jax.data.dataset import MOST_FINDINGS, Dataset
from primia_jax.data.files import Files, is_image, read_file

MEANINGS = ("file", "label", "split", "site")  # columns whose names can be given
PATIENT = "patient"  # see `patient_ids.from_column` for another name

NO_FINDING = "No Finding"  # of several labels: none

_SHOWN = 10  # lines in a message


class _Table(NamedTuple):
  """Rows of texts, and the number of the line that each ends in."""

  header: list[str]
  rows: list[list[str]]
  lines: list[int]


def read_csv(
  path: str | os.PathLike[str],
  *,
  size: int,
  channels: int,
  label_names: Sequence[str] | None = None,
  lazy: bool = False,
  ct_window: tuple[float, float] | None = None,
  percentiles: tuple[float, float] | None = decode.PERCENTILES,
  columns: Mapping[str, str] | None = None,
  grey_bits: int = 0,
  skip_bad_files: bool = False,
  is_multi: bool = False,
  label_columns: Sequence[str] = (),
) -> dict[str, Dataset]:
  """Reads the images of a table: UTF-8, a header, values separated by commas, semicolons or tabs.

  Files are named relative to the table's folder. The columns "file" and "label" must be there;
  "split" (one of `layouts.SPLITS`), "site" and "patient" may be. An empty patient is unknown.
  Without patients, those of DICOM headers are taken if these name at least two.

  Args:
    path: the table.
    size, channels, label_names, lazy, ct_window, percentiles, grey_bits, skip_bad_files: see
      `folder.read_folder`. By default labels are sorted.
    columns: names of the columns for "file", "label", "split" and "site", where they are others.
    is_multi: an image has any number of labels, separated by | ("No Finding", or nothing, for none,
      as in NIH ChestX-ray14's Data_Entry_2017.csv).
    label_columns: or a column of 0 and 1 for each label, in place of the column "label".

  Returns:
    A `Dataset` for each split, or {"all": ...} without splits. Columns: "path", "site", and all of
    the table by their own names.

  Raises:
    FileNotFoundError: there is no such table.
    ValueError: columns are missing, or lines are wrong; all of them are named.
  """
  decode.check_form(size, channels)
  path = pathlib.Path(path)
  table = _read_table(path)
  of = _meanings(path, table, columns or {}, label_columns)
  is_multi = is_multi or bool(label_columns)
  if problems := _problems(path, table, of, label_names, is_multi):
    raise ValueError(f"{path} has wrong lines; mend or remove them:{problems}")
  files = [posixpath.normpath(name) for name in of["file"]]
  if is_multi:
    names, labels = _sets(path, of["label"], label_names, label_columns)
  else:
    names = tuple(label_names) if label_names else folder.default_names(str(path), of["label"])
    labels = folder.label_indices(of["label"], names, [str(path)] * len(files))
  listing = Files(str(path.parent), tuple(files), partial(read_file, path.parent))
  ids = of.get(PATIENT) or folder.dicom_patients(listing)
  groups, has_patient = patient_ids.groups(ids, files)
  splits = np.array([layouts.SPLITS[one.lower()] for one in of.get("split", [])] or "all")
  own = {name: np.array(column) for name, column in _columns(table).items()}
  own |= {"path": np.array(files)} | ({"site": np.array(of["site"])} if "site" in of else {})
  form: dict[str, Any] = {
    "size": size, "channels": channels, "percentiles": percentiles, "ct_window": ct_window,
    "grey_bits": grey_bits,
  }  # fmt: skip
  datasets = {}
  for split in dict.fromkeys([*layouts.SPLITS.values(), "all"]):
    index = np.flatnonzero(np.broadcast_to(splits, len(files)) == split)
    if len(index):
      datasets[split] = Dataset(
        images=decode.EncodedImages(own["path"][index], listing.read, listing.root, **form),
        labels=labels[index],
        label_names=names,
        groups=groups[index],
        has_patient=has_patient[index],
        columns={name: column[index] for name, column in own.items()},
        name=path.name,
        is_multi=is_multi,
      )
  return datasets if lazy else scan.read(datasets, skip_bad_files=skip_bad_files)


def _split(text: str) -> list[str]:
  """The labels of one image."""
  return list(dict.fromkeys(part.strip() for part in text.split("|") if part.strip()))


def _sets(
  path: pathlib.Path,
  texts: Sequence[str],
  label_names: Sequence[str] | None,
  label_columns: Sequence[str],
) -> tuple[tuple[str, ...], np.ndarray]:
  """The names of the labels, and each image's as one number."""
  every = [[one for one in _split(text) if one != NO_FINDING] for text in texts]
  flat = [one for labels in every for one in labels]
  names = tuple(label_names or label_columns or folder.default_names(str(path), flat))
  if len(names) > MOST_FINDINGS:
    raise ValueError(
      f"{path} has {len(names)} labels, more than {MOST_FINDINGS}; choose some by label_columns"
    )
  index = iter(folder.label_indices(flat, names, [str(path)] * len(flat)))
  numbers = [{int(next(index)) for _ in labels} for labels in every]  # "Mass|mass" is one
  return names, np.array([sum(1 << k for k in these) for these in numbers], np.int32)


def _joined(path: pathlib.Path, table: _Table, label_columns: Sequence[str]) -> list[str]:
  """A text of labels for each row, from a column of 0 and 1 for each."""
  if wrong := [name for name in label_columns if name == NO_FINDING or "|" in name]:
    raise ValueError(
      f"label_columns names {wrong}: {NO_FINDING} is an image with none of the others, so leave it "
      "out, and rename columns that hold a |"
    )
  by_name = _columns(table)
  if missing := [name for name in label_columns if name not in by_name]:
    raise ValueError(f"{path} has no columns {missing}, but {table.header}; mend label_columns")
  number = {"0": 0, "1": 1, "0.0": 0, "1.0": 1}
  texts = [[] for _ in table.rows]  # type: list[list[str]]
  for name in label_columns:
    for i, value in enumerate(by_name[name]):
      if value not in number:
        raise ValueError(
          f"line {table.lines[i]} of {path} has {name}={value!r}; write 1 where the image has it "
          "and 0 where not"
        )
      texts[i] += [name] * number[value]
  return ["|".join(labels) or NO_FINDING for labels in texts]


def _read_table(path: pathlib.Path) -> _Table:
  if not path.is_file():
    raise FileNotFoundError(f"there is no CSV at {path}; check the path")
  try:
    with path.open(newline="", encoding="utf-8-sig") as file:
      head = file.readline()
      file.seek(0)
      reader = csv.reader(file, delimiter=max(",;\t", key=head.count), strict=True)
      rows = [(row, reader.line_num) for row in reader if row]
  except (csv.Error, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not a CSV in UTF-8 ({error}); save it as such") from error
  if len(rows) < 2:
    raise ValueError(f"{path} lists no image; it needs a header, such as file,label, and rows")
  header = [name.strip() for name in rows[0][0]]
  if twice := sorted({name for name in header if header.count(name) > 1}):
    raise ValueError(f"{path} has the columns {twice} twice; rename or remove one")
  if uneven := [line for row, line in rows if len(row) != len(header)]:
    raise ValueError(
      f"lines {uneven[:_SHOWN]} of {path} ({len(uneven)} in all) have another number of values "
      f"than the header, {len(header)}; quote values that hold the separator"
    )
  texts = [[one.strip() for one in row] for row, _ in rows[1:]]
  return _Table(header, texts, [line for _, line in rows[1:]])


def _columns(table: _Table) -> dict[str, list[str]]:
  return {name: [row[i] for row in table.rows] for i, name in enumerate(table.header)}


def _meanings(
  path: pathlib.Path, table: _Table, columns: Mapping[str, str], label_columns: Sequence[str]
) -> dict[str, list[str]]:
  """Returns the columns by what they mean; those with other names must be there."""
  named = {one: columns.get(one, one) for one in (*MEANINGS, PATIENT)}
  wanted = {"file", *columns} | ({"label"} if not label_columns else set())
  if missing := [one for one in named if one in wanted and named[one] not in table.header]:
    raise ValueError(
      f"{path} has no column {', '.join(repr(named[one]) for one in missing)}, but {table.header}; "
      f"name its column with --csv_columns={missing[0]}=NAME"
    )
  by_name = _columns(table)
  out = {one: by_name[name] for one, name in named.items() if name in by_name}
  return out | ({"label": _joined(path, table, label_columns)} if label_columns else {})


def _problems(
  path: pathlib.Path,
  table: _Table,
  of: Mapping[str, Sequence[str]],
  label_names: Sequence[str] | None,
  is_multi: bool,
) -> str:
  """What is wrong, line by line; empty if nothing is."""
  known = {name.lower() for name in label_names or ()}
  first: dict[str, int] = {}
  found = []
  for i, line in enumerate(table.lines):
    row = {meaning: column[i] for meaning, column in of.items()}
    wrong = _of_file(path.parent, row["file"])
    place = posixpath.normpath(row["file"])
    if row["file"] and first.setdefault(place, line) != line:
      wrong = f"repeats the file {row['file']!r} of line {first[place]}"
    wrongs = [wrong] if wrong else []
    given = _split(row["label"]) if is_multi else [row["label"]]
    if not row["label"] and not is_multi:
      wrongs.append("has no label")
    for one in given if known else ():
      if one.lower() not in known and not (is_multi and one == NO_FINDING):
        wrongs.append(f"has the label {one!r}, none of {', '.join(label_names or ())}")
    if "split" in row and row["split"].lower() not in layouts.SPLITS:
      wrongs.append(f"has the split {row['split']!r}, none of {', '.join(layouts.SPLITS)}")
    if "site" in row and not row["site"]:
      wrongs.append("has no site")
    found += [f"line {line} {one}" for one in wrongs]
  more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
  return "".join(f"\n  {one}" for one in [*found[:_SHOWN], *more])


def _of_file(root: pathlib.Path, name: str) -> str:
  """What is wrong with the name of a file; empty if nothing is."""
  if not name:
    return "names no file"
  if name.startswith("/") or posixpath.normpath(name).split("/")[0] == "..":
    return f"names {name!r}, outside of the table's folder {root}; move the file or the table"
  if not is_image(name):
    return f"names {name!r}, which is not an image ({', '.join(decode.SUFFIXES)})"
  if not (root / name).is_file():
    return f"names {name!r}, which is no file in {root}"
  return ""
