"""What a model says of images, on the terminal and as a table; needs no JAX."""

from __future__ import annotations

import csv
import os
import pathlib
from collections.abc import Sequence
from typing import Any, TextIO

import numpy as np
import scipy.special


def csv_cell(text: str) -> str:
  """A name for a table: one that a spreadsheet would take for a formula begins with an
  apostrophe, which marks text there.
  """
  return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_probabilities(
  path: str | pathlib.Path,
  ids: Sequence[str],
  true: Sequence[str],
  probabilities: Any,
  label_names: Sequence[str],
) -> None:
  """Writes one line for each image: its name, true class, predicted class, and the probability of
  each class.

  Args:
    path: the file to write.
    ids: N names of images.
    true: N names of classes, empty where the class is unknown.
    probabilities: [N, L], rows that sum to 1.
    label_names: the L classes.
  """
  with private_file(path) as file:
    writer = csv.writer(file)
    names = (f"probability {name}" for name in label_names)
    writer.writerow(["image", "true", "predicted", *names])
    for image, label, p in zip(ids, true, np.asarray(probabilities), strict=True):
      said = (csv_cell(name) for name in (image, label, label_names[p.argmax()]))
      # Nine digits restore a float32 exactly, so the table gives the same ROC-AUC.
      writer.writerow([*said, *(f"{x:.9g}" for x in p)])


def write(
  path: pathlib.Path,
  ids: Sequence[str],
  outputs: np.ndarray,
  label_names: Sequence[str],
  true: Sequence[str] = (),
) -> None:
  """The same for outputs of a model: logits [N, L], or classes [N], whose table has no
  probabilities; true is empty where no class is known.
  """
  true = true or [""] * len(ids)
  if outputs.ndim == 2:
    probabilities = scipy.special.softmax(outputs.astype(np.float64), axis=1)
    write_probabilities(path, ids, true, probabilities, label_names)
    return
  with private_file(path) as file:
    writer = csv.writer(file)
    writer.writerow(["image", "true", "predicted"])
    writer.writerows(
      [csv_cell(image), csv_cell(label), csv_cell(label_names[round(said)])]
      for image, label, said in zip(ids, true, outputs.tolist(), strict=True)
    )


def private_file(path: str | pathlib.Path) -> TextIO:
  """A file that its user alone can read: it says what images of patients show."""
  made = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
  os.fchmod(made, 0o600)  # one that was there, too
  return open(made, "w", newline="", encoding="utf-8")


def show(ids: Sequence[str], outputs: np.ndarray, label_names: Sequence[str]) -> None:
  """Prints the class of each image, and its probabilities where outputs are logits."""
  labels = np.rint(outputs).astype(int) if outputs.ndim == 1 else outputs.argmax(1)
  width = max(len("image"), *map(len, ids))
  wide = max(len("class"), *map(len, label_names))
  with_probabilities = outputs.ndim == 2
  head = (
    "".join(f"  {name:>{max(len(name), 7)}}" for name in label_names) if with_probabilities else ""
  )
  print(f"\n{'image':<{width}}  {'class':<{wide}}{head}")
  for i, (image, label) in enumerate(zip(ids, labels, strict=True)):
    cells = ""
    if with_probabilities:
      likely = scipy.special.softmax(outputs[i].astype(np.float64))
      cells = "".join(
        f"  {f'{100 * p:.1f} %':>{max(len(name), 7)}}"
        for name, p in zip(label_names, likely, strict=True)
      )
    print(f"{image:<{width}}  {label_names[label]:<{wide}}{cells}")
