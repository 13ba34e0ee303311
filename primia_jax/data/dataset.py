"""The interface of all data sources: a `Dataset` of uint8 images, labels, label names and groups.
Images are in memory or read on demand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

MOST_FINDINGS = 30  # of a label, which is an int32


class Images(Protocol):
  """Random access to N images of one shape, e.g. a uint8 array [N, H, W, C].

  `shape` is (N, H, W, C). Indexing with an int array [M] returns uint8 [M, H, W, C].
  """

  @property
  def shape(self) -> tuple[int, ...]: ...

  def __getitem__(self, index: np.ndarray, /) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Labelled images.

  Attributes:
    images: uint8 [N, H, W, C], in memory or read on demand.
    labels: int32 [N], an index into `label_names`.
    label_names: the classes, in the order of the labels.
    groups: [N], e.g. the patient of each image. Images of one group are never split between sites,
      or between training and validation.
    columns: name -> [N], further values of each image, e.g. its path or folder.
    name: shown in reports, e.g. "synthetic phantom".
    has_patient: bool [N], whether an image's group is its patient, as patient-level privacy needs
      (`patient_ids.require`). None where no patient is known.
    is_numbered: patients are numbers that may start anew in another split (Kermany's), so that one
      number in two splits need not be one patient.
    notes: what a report's reader must know of how the images were read, e.g. which were left out.
    is_multi: an image has any number of the classes: its label is the sum of 2^k over those that it
      has, and 0 for none.
    masks: uint8 [N, H, W], the class of each pixel, an index into `label_names`; None where images
      are classified as a whole. An image's label then is its largest class but the background, 0,
      and 0 where there is nothing else.
  """

  images: Images
  labels: np.ndarray
  label_names: tuple[str, ...]
  groups: np.ndarray
  columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  name: str = ""
  has_patient: np.ndarray | None = None
  is_numbered: bool = False
  notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
  masks: np.ndarray | None = None
  is_multi: bool = False

  def __post_init__(self):
    num = self.images.shape[0]
    if len(self.images.shape) != 4:
      raise ValueError(
        f"images of {self.name!r} have shape {self.images.shape}; expected (N, H, W, C)"
      )
    if self.labels.shape != (num,) or self.groups.shape != (num,):
      raise ValueError(
        f"{self.name!r} holds {num} images, but labels {self.labels.shape} and groups "
        f"{self.groups.shape}; give one label and one group for each image"
      )
    if self.is_multi and len(self.label_names) > MOST_FINDINGS:
      raise ValueError(
        f"{self.name!r} has {len(self.label_names)} findings; {MOST_FINDINGS} fit in a label"
      )
    most = 2 ** len(self.label_names) if self.is_multi else len(self.label_names)
    if num and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < most:
      raise ValueError(
        f"labels of {self.name!r} run from {self.labels.min()} to {self.labels.max()}, but there "
        f"are {len(self.label_names)} label names {self.label_names}"
      )
    if self.has_patient is not None and self.has_patient.shape != (num,):
      raise ValueError(
        f"has_patient of {self.name!r} has shape {self.has_patient.shape}; give one bool for each "
        f"of the {num} images"
      )
    if self.masks is not None and self.masks.shape != self.images.shape[:3]:
      raise ValueError(
        f"masks of {self.name!r} have shape {self.masks.shape} for images {self.images.shape}; "
        "give each image a mask of its height and width"
      )
    if self.masks is not None and self.masks.size and self.masks.max() >= len(self.label_names):
      raise ValueError(
        f"masks of {self.name!r} hold class {self.masks.max()}, but there are "
        f"{len(self.label_names)} label names {self.label_names}"
      )
    for name, column in self.columns.items():
      if len(column) != num:
        raise ValueError(
          f"column {name!r} of {self.name!r} has {len(column)} values for {num} images"
        )

  def __len__(self) -> int:
    return self.images.shape[0]


class Selected:
  """Random access to a selection of images, which are read only when indexed."""

  def __init__(self, images: Images, index: np.ndarray):
    self._images, self._index = images, index
    self.shape = (len(index), *images.shape[1:])

  def __getitem__(self, index: np.ndarray, /) -> np.ndarray:
    return self._images[self._index[index]]


def take(dataset: Dataset, index: np.ndarray) -> Dataset:
  """Returns the examples at `index` ([M] integers) as a `Dataset`. Images that are not in memory
  are read later, when they are indexed.
  """
  index = np.asarray(index, np.int64)
  images = (
    dataset.images[index]
    if isinstance(dataset.images, np.ndarray)
    else Selected(dataset.images, index)
  )
  return dataclasses.replace(
    dataset,
    images=images,
    labels=dataset.labels[index],
    groups=dataset.groups[index],
    columns={name: np.asarray(column)[index] for name, column in dataset.columns.items()},
    has_patient=None if dataset.has_patient is None else dataset.has_patient[index],
    masks=None if dataset.masks is None else dataset.masks[index],
  )


def largest_class(masks: np.ndarray, num_classes: int) -> np.ndarray:
  """The largest class of each mask besides 0, or 0: uint8 [N, H, W] -> int32 [N]."""
  sizes = np.stack([(masks == k).sum((1, 2)) for k in range(1, num_classes)], axis=1)
  return np.where(sizes.any(1), 1 + sizes.argmax(1), 0).astype(np.int32)


def in_memory(dataset: Dataset) -> Dataset:
  """The same examples, with all images read now."""
  if isinstance(dataset.images, np.ndarray):
    return dataset
  return dataclasses.replace(dataset, images=dataset.images[np.arange(len(dataset))])


def join(datasets: Sequence[Dataset]) -> Dataset:
  """All examples of several data sets in memory, in order.

  Groups of different data sets stay different, and columns are those that all have. A single data
  set is returned as it is.

  Raises:
    ValueError: they have different classes.
  """
  if len(datasets) == 1:
    return datasets[0]
  if len(classes := {one.label_names for one in datasets}) > 1:
    raise ValueError(f"the sources have different classes, {sorted(classes)}; give --label_names")
  if len({one.masks is None for one in datasets}) > 1:
    raise ValueError("some of the sources have masks and some have none; give sources of one kind")
  if len({one.is_multi for one in datasets}) > 1:
    raise ValueError("some of the sources have several labels an image and some have one")
  names = set.intersection(*(set(one.columns) for one in datasets))
  together = lambda values: np.concatenate([np.asarray(value) for value in values])
  named = [
    np.zeros(len(one), bool) if one.has_patient is None else one.has_patient for one in datasets
  ]
  notes: dict[str, str] = {}
  for what in dict.fromkeys(what for one in datasets for what in one.notes):
    texts = [one.notes.get(what, "") for one in datasets]
    each = [f"{one.name}: {text}" for one, text in zip(datasets, texts, strict=True) if text]
    notes[what] = texts[0] if len(set(texts)) == 1 else "; ".join(each)
  return Dataset(
    images=together(one.images for one in datasets),
    labels=together(one.labels for one in datasets),
    label_names=datasets[0].label_names,
    groups=together(
      np.char.add(f"{i}/", np.asarray(one.groups).astype(str)) for i, one in enumerate(datasets)
    ),
    columns={name: together(one.columns[name] for one in datasets) for name in sorted(names)},
    name=" + ".join(dict.fromkeys(one.name for one in datasets)),
    has_patient=together(named),
    is_numbered=any(one.is_numbered for one in datasets),
    notes=notes,
    masks=None if datasets[0].masks is None else together(one.masks for one in datasets),
    is_multi=datasets[0].is_multi,
  )
