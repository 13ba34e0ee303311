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
from primia_jax.data.dataset import Dataset
from primia_jax.data.files import Files, is_image, read_file

MEANINGS = ("file", "label", "split", "site")  # columns whose names can be given
PATIENT = "patient"  # see `patient_ids.from_column` for another name

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
  of = _meanings(path, table, columns or {})
  if problems := _problems(path, table, of, label_names):
    raise ValueError(f"{path} has wrong lines; mend or remove them:{problems}")
  files = [posixpath.normpath(name) for name in of["file"]]
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
      )
  return datasets if lazy else scan.read(datasets, skip_bad_files=skip_bad_files)


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
    raise ValueError(f"{path} is no CSV in UTF-8 ({error}); save it as such") from error
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
  path: pathlib.Path, table: _Table, columns: Mapping[str, str]
) -> dict[str, list[str]]:
  """Returns the columns by what they mean; those with other names must be there."""
  named = {one: columns.get(one, one) for one in (*MEANINGS, PATIENT)}
  wanted = {"file", "label", *columns}
  if missing := [one for one in named if one in wanted and named[one] not in table.header]:
    raise ValueError(
      f"{path} has no column {', '.join(repr(named[one]) for one in missing)}, but {table.header}; "
      f"name its column with --csv_columns={missing[0]}=NAME"
    )
  by_name = _columns(table)
  return {one: by_name[name] for one, name in named.items() if name in by_name}


def _problems(
  path: pathlib.Path,
  table: _Table,
  of: Mapping[str, Sequence[str]],
  label_names: Sequence[str] | None,
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
    if not row["label"]:
      wrongs.append("has no label")
    elif known and row["label"].lower() not in known:
      wrongs.append(f"has the label {row['label']!r}, none of {', '.join(label_names or ())}")
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
    return f"names {name!r}, which is no image ({', '.join(decode.SUFFIXES)})"
  if not (root / name).is_file():
    return f"names {name!r}, which is no file in {root}"
  return ""
