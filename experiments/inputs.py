"""From settings to images: training and validation images of each site, and the test images."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from primia_jax.data import (
  medimeta,
  overlaps,
  partition,
  patient_ids,
  phantom,
  scan,
  sites,
  volumes,
)
from primia_jax.data.dataset import Dataset, in_memory, join, take
from primia_jax.data.folder import label_indices, read_images, unlabelled
from primia_jax.data.load import load
from primia_jax.data.sites import Part
from primia_jax.multilabel import renumbered

from . import image_facts, imageless, memory
from .configs import Train
from .configs.data import NO_IMAGES, Data, Hospitals
from .settings import fractions, names

# What a folder must hold, and an example of one.
_INDEXES = {"msd": (volumes.INDEX, "Task06_Lung"), "medimeta": (medimeta.INDEX, "pneumonia")}


class Inputs(NamedTuple):
  """The images of a run.

  Attributes:
    train, validation: what each site holds.
    test: where a process reads the source of its own site only, that site's.
    patients: of each site, see `count_patients`; empty where this process can count them.
  """

  train: Part
  validation: Part
  test: Dataset
  patients: tuple[tuple[int, int], ...] = ()


def count_patients(part: Part) -> tuple[tuple[int, int], ...]:
  """(Patients, the most images of one) of each site."""
  counts = [np.unique(part.dataset.groups[i], return_counts=True)[1] for i in part.sites]
  return tuple((len(n), int(n.max(initial=0))) for n in counts)


def source(settings: Data) -> pathlib.Path | None:
  """The file or folder that holds the images, by its real path; None for the phantom, which is
  computed. A data set of TFDS is prepared if it is not yet.

  Raises:
    FileNotFoundError: there is none.
    ValueError: data has another form.
  """
  kind, _, where = settings.data.partition(":")
  if settings.data == "phantom":
    return None
  if kind == "tfds":
    from primia_jax.data import tfds  # here, because the import takes a second

    if settings.manual_dir:
      tfds.prepare(where, manual_dir=settings.manual_dir, data_dir=settings.data_dir or None)
    return tfds.find(where, settings.data_dir or None).resolve()
  path = pathlib.Path(where).expanduser()
  if kind not in ("folder", "csv", "npz", *_INDEXES) or not where:
    known = "phantom, folder:PATH, csv:PATH, npz:PATH, msd:PATH, medimeta:PATH or tfds:NAME"
    raise ValueError(f"data={settings.data!r}; use {known}")
  if not path.exists():
    raise FileNotFoundError(f"data={settings.data}: there is no {path}; check the path")
  forms = {"folder": "a folder or a tar", "msd": "a folder", "medimeta": "a folder"}
  fits = path.is_dir() if kind in forms else path.is_file()
  if not fits and not (kind == "folder" and path.is_file()):
    raise ValueError(f"data={path} is not {forms.get(kind, 'an ordinary file')}; name one")
  if kind in _INDEXES and not (path / _INDEXES[kind][0]).is_file():
    index, example = _INDEXES[kind]
    raise FileNotFoundError(f"data={settings.data} has no {index}; name {example} or the like")
  return path.resolve()


def check_sources(config: Train, only_site: int | None = None) -> None:
  """Refuses sources that are not there and images that fit in no memory, and reads none; so a run
  with them leaves no folder behind. Arguments and errors as `site_images`.
  """
  data, h = config.data, config.hospitals
  memory.check_step(config)
  if data.data == "phantom" and not data.site_data:
    _check_phantom(config)
    memory.check_images(h.phantom_images, data)
  for site, one in enumerate(data.sources or (data.data,)):
    is_later = (one.startswith("tfds:") and data.manual_dir) or one == NO_IMAGES
    if not is_later and (only_site in (None, site) or not data.sources):
      source(data.of(one))


def images_to_test(
  settings: Data, seed: int = 0, label_names: tuple[str, ...] | None = None
) -> tuple[Dataset, bool]:
  """The test split of a source, or all its images where it has none; and whether it has one.

  Args:
    settings: the source. Its own label names say what its labels are.
    seed: of the phantom.
    label_names: of the model, whose labels the images get, by name; None keeps the source's.

  Raises:
    ValueError, FileNotFoundError: the source is wrong, or has a class that the model lacks.
  """
  if settings.data == "phantom":
    dataset, has_test = _phantom_test(settings, Hospitals().phantom_test_images, 3, seed), True
  else:
    splits = listed(settings, label_names)
    has_test = "test" in splits
    tested = {"test": splits["test"]} if has_test else splits
    dataset = _whole(list(scan.read(tested, skip_bad_files=settings.skip_bad_files).values()))
  if label_names is None or dataset.label_names == label_names:
    return dataset, has_test
  own = dataset.label_names
  indices = label_indices(own, label_names, [settings.data] * len(own))
  masks = None if dataset.masks is None else indices[dataset.masks].astype(np.uint8)
  labels = renumbered(dataset.labels, indices) if dataset.is_multi else indices[dataset.labels]
  return dataclasses.replace(dataset, labels=labels, label_names=label_names, masks=masks), has_test


def _whole(splits: Sequence[Dataset]) -> Dataset:
  """All splits of a source; a patient may be in several."""
  if len(splits) == 1:
    return splits[0]
  groups = np.concatenate([np.asarray(split.groups).astype(str) for split in splits])
  return dataclasses.replace(join(splits), groups=groups)


def tested_images(config: Train) -> Dataset:
  """The images on which a run's own report tests.

  Raises:
    ValueError, FileNotFoundError: as `site_images`.
  """
  if config.data.site_data or config.data.data == "phantom":
    return site_images(config, 0 if config.in_processes else None).test
  return in_memory(_with_test(config, config.data, lazy=True)[1])


def names_of(dataset: Dataset) -> list[str]:
  """A name of each image: its path, where it has one."""
  return [str(p) for p in dataset.columns.get("path", [f"image {i}" for i in range(len(dataset))])]


def unlabelled_images(settings: Data, label_names: tuple[str, ...]) -> Dataset:
  """All images of a folder, with 0 for a label.

  Raises:
    ValueError, FileNotFoundError: the source is no folder, or wrong.
  """
  kind, _, path = settings.data.partition(":")
  if kind != "folder":
    raise ValueError(f"data={settings.data!r}: only folder:PATH can be unlabelled")
  paths, images = read_images(
    path,
    size=settings.image_size,
    channels=settings.channels,
    lazy=True,
    ignore=names(settings.ignore),
    grey_bits=settings.grey_bits,
    ct_window=settings.hounsfield,
  )
  found = {"all": unlabelled(paths, images, label_names)}
  return scan.read(found, skip_bad_files=settings.skip_bad_files)["all"]


def site_images(config: Train, only_site: int | None = None) -> Inputs:
  """Loads the images of a federated run.

  Args:
    config: the run's.
    only_site: the site whose images this process may read; None for all.

  Raises:
    ValueError, FileNotFoundError: the source or the partition asked for is wrong.
  """
  if config.data.site_data:
    inputs = _of_sources(config, only_site)
  elif config.data.data == "phantom":
    inputs = _phantom(config, only_site)
  else:
    inputs = _loaded(config, only_site is not None)
  if not config.data.allow_overlap:
    where = config.data.site_data or config.data.data
    image_facts.check_overlap(where, inputs.train.dataset, inputs.test)
  if config.privacy.by_patient:
    sites.check_patients(inputs.train)
  # Where a process reads its own source, the others' sizes are told later.
  if only_site is None or not config.data.site_data:
    if empty := [i for i, n in enumerate(inputs.train.sizes) if not n]:
      raise ValueError(
        f"sites {empty} have no images to train on; give them some, or leave them out"
      )
    check_validation(inputs, config.privacy.validates)
  return inputs


def check_validation(inputs: Inputs, validates: bool) -> None:
  """Raises a ValueError where a run validates, and no site has images to validate with."""
  if validates and not any(inputs.validation.sizes):
    raise ValueError(
      f"no site has images to validate with, of {list(inputs.train.sizes)} to train on, because a "
      "patient's images stay together; give sites more patients, or use --validation=none"
    )


def _check_kinds(train: Dataset, where: str) -> None:
  kinds = np.unique(train.labels)
  if len(kinds) < 2 and train.masks is None:
    one = [*kinds] if train.is_multi else [train.label_names[i] for i in kinds]
    raise ValueError(
      f"all training images of {where} are of one class, {one}; give images of at least two"
    )


def _of_sources(config: Train, only_site: int | None) -> Inputs:
  """A source for each site; those of other sites are not opened where a process has its own."""
  data, h = config.data, config.hospitals
  mine = range(h.num_sites) if only_site is None else [only_site]
  trains, tests, kept, held, first = [], [], {}, {}, 0
  for i in mine:
    if imageless.is_empty(data.sources[i]):
      train = test = imageless.nothing(config)
    else:
      train, test = _with_test(config, data.of(data.sources[i]))
    parts = _hold_out(train, (np.arange(len(train)),), h.validation_fraction, config.seed + i)
    kept[i], held[i] = (first + part.sites[0] for part in parts)
    trains.append(train)
    site = np.full(len(test), f"site {i}")
    tests.append(dataclasses.replace(test, columns={"site": site, **test.columns}))
    first += len(train)
  joined, nothing = join(trains), np.zeros(0, np.int64)
  if only_site is None:
    _check_kinds(joined, data.site_data)
  part = lambda rows: Part(joined, tuple(rows.get(i, nothing) for i in range(h.num_sites)))
  return Inputs(part(kept), part(held), join(tests))


def listed(settings: Data, label_names: tuple[str, ...] | None) -> dict[str, Dataset]:
  """The splits of a source, whose images `scan.read` reads."""
  return load(
    settings.data,
    size=settings.image_size,
    channels=settings.channels,
    label_names=names(settings.label_names) or label_names,
    lazy=True,
    ignore=names(settings.ignore),
    layout=settings.layout,
    csv_columns=settings.columns,
    grey_bits=settings.grey_bits,
    ct_window=settings.hounsfield,
    data_dir=settings.data_dir or None,
    manual_dir=settings.manual_dir or None,
    patient_column=settings.patient_column,
    patient_pattern=settings.patient_pattern,
    slices=settings.slices or "all",
    is_multi=settings.multi_label,
    label_columns=names(settings.label_columns),
    task=settings.task,
    splits=settings.splits,
  )


def _check_phantom(config: Train) -> None:
  if (h := config.hospitals).partition not in ("auto", "column:site"):
    raise ValueError(
      f"partition={h.partition!r}: the phantom comes with its sites; use auto, and num_sites"
    )
  sites.site_sizes(h.phantom_images, h.num_sites, fractions(h.site_fractions))


def _phantom(config: Train, only_site: int | None) -> Inputs:
  data, h = config.data, config.hospitals
  _check_phantom(config)

  def make(total: int, first: int) -> Part:
    sizes = sites.site_sizes(total, h.num_sites, fractions(h.site_fractions))
    size, seed = data.image_size, config.seed
    return sites.phantom_part(sizes, size=size, seed=seed, first=first, only_site=only_site)

  train = make(h.phantom_images, sites.TRAINING)
  if only_site is None:
    _check_kinds(train.dataset, "the phantom")
  num_held = round(h.validation_fraction * h.phantom_test_images)
  validation = make(max(h.num_sites, num_held), sites.VALIDATION)
  num_test = max(h.num_sites, h.phantom_test_images)
  return Inputs(train, validation, _phantom_test(data, num_test, h.num_sites, config.seed))


def _phantom_test(settings: Data, total: int, num_sites: int, seed: int) -> Dataset:
  styles = phantom.site_styles(num_sites, seed)
  size = settings.image_size
  return phantom.phantom(total, size=size, seed=seed, styles=styles, first=sites.TEST)


def _loaded(config: Train, lazy: bool) -> Inputs:
  data, h = config.data, config.hospitals
  train, test = _with_test(config, data, lazy or h.sites_in_memory > 0)
  dealt = _partition(h, train, config.seed)
  if len(dealt) != h.num_sites:
    raise ValueError(
      f"partition {h.partition} makes {len(dealt)} sites; set --num_sites={len(dealt)}"
    )
  return Inputs(*_hold_out(train, dealt, h.validation_fraction, config.seed), test)


def _hold_out(
  train: Dataset, dealt: partition.Partition, fraction: float, seed: int
) -> tuple[Part, Part]:
  """`sites.hold_out` that parts no copies either; a fraction of 0 holds nothing out."""
  if not fraction or not len(train):
    return Part(train, tuple(dealt)), Part(train, tuple(index[:0] for index in dealt))
  parts = sites.hold_out(Part(overlaps.tied(train), dealt), fraction, seed)
  return Part(train, parts[0].sites), Part(train, parts[1].sites)


def _with_test(config: Train, data: Data, lazy: bool = False) -> tuple[Dataset, Dataset]:
  """The images of a source to train with and to test on, which are held out where it has none."""
  splits = listed(data, None)
  whole = splits.get("train", splits.get("all"))
  if whole is None:
    raise ValueError(
      f"{data.data} has only the splits {sorted(splits)}; training images are needed"
    )
  if not config.data.site_data:  # one of several sites may have images of one class
    _check_kinds(whole, data.data)
  if config.privacy.by_patient:  # before any image is decoded
    patient_ids.require(whole)
  if not lazy:
    memory.check_images(len(whole), data)
  used = {name: one for name, one in splits.items() if name in ("train", "test", "all")}
  read = scan.read(used, keep=not lazy, skip_bad_files=data.skip_bad_files)
  train = read.get("train", read.get("all"))
  assert train is not None
  if unused := [name for name in splits if name not in used]:
    note = f"{', '.join(unused)}: each site holds out images of its own to validate with"
    train = dataclasses.replace(train, notes={**train.notes, "splits not used": note})
  if "test" in read:
    return train, read["test"]
  fraction = config.hospitals.test_fraction
  kept, held = partition.hold_out(overlaps.tied(train), fraction, config.seed)
  return take(train, kept), take(train, held)


def _partition(h: Hospitals, dataset: Dataset, seed: int) -> partition.Partition:
  kind, _, argument = h.partition.partition(":")
  shares = fractions(h.site_fractions)
  has_sites = kind == "auto" and "site" in dataset.columns
  if has_sites and shares:
    cure = "leave it out, or deal the images to others with --partition=dirichlet"
    raise ValueError(f"site_fractions={h.site_fractions!r}: the source names its sites; {cure}")
  if (kind == "column" and argument) or has_sites:
    # A patient may have been at several sites; `facts` tells of it.
    alone = dataclasses.replace(dataset, groups=np.arange(len(dataset)))
    return partition.by_column(alone, argument or "site")
  dataset = overlaps.tied(dataset)
  if kind == "iid":
    return partition.iid(dataset, h.num_sites, seed)
  if kind == "unequal":
    return partition.unequal(dataset, shares or (1 / h.num_sites,) * h.num_sites, seed)
  if kind in ("auto", "dirichlet"):
    return partition.dirichlet(
      dataset, h.num_sites, h.dirichlet_alpha, seed, fractions=shares, min_examples=2
    )
  raise ValueError(f"partition={h.partition!r}; use auto, iid, unequal, dirichlet or column:NAME")
