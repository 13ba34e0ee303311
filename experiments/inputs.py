"""From settings to images: training and validation images of each site, and the test images."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import numpy as np

from experiments.configs import Train
from experiments.configs.data import Data, Hospitals
from experiments.settings import fractions, names
from primia_jax.data import partition, patient_ids, phantom, sites
from primia_jax.data.dataset import Dataset, in_memory, take
from primia_jax.data.folder import read_images
from primia_jax.data.load import load
from primia_jax.data.sites import Part


class Inputs(NamedTuple):
  train: Part
  validation: Part
  test: Dataset


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
  if kind not in ("folder", "npz") or not where:
    raise ValueError(f"data={settings.data!r}; it must be folder:PATH, npz:PATH or tfds:NAME")
  if not path.exists():
    raise FileNotFoundError(f"data={settings.data}: there is no {path}")
  return path.resolve()


def images_to_test(
  settings: Data, seed: int = 0, label_names: tuple[str, ...] | None = None
) -> Dataset:
  """The test split of a source, or all its images where it is not split.

  Raises:
    ValueError, FileNotFoundError: the source is wrong, or has no test images.
  """
  if settings.data == "phantom":
    return _phantom_test(settings, 600, 3, seed)
  splits = _load(settings, label_names, lazy=False)
  for split in ("test", "all"):
    if split in splits:
      return splits[split]
  raise ValueError(
    f"{settings.data} has the splits {sorted(splits)} but neither test images nor images without "
    f"split"
  )


def unlabelled_images(settings: Data, label_names: tuple[str, ...]) -> Dataset:
  """All images of a folder, with 0 for a label.

  Raises:
    ValueError, FileNotFoundError: the source is no folder, or wrong.
  """
  kind, _, path = settings.data.partition(":")
  if kind != "folder":
    raise ValueError(f"data={settings.data!r}: only folder:PATH can be unlabelled")
  paths, images = read_images(path, size=settings.image_size, channels=settings.channels)
  return Dataset(images, np.zeros(len(paths), np.int32), label_names, paths, {"path": paths}, path)


def site_images(config: Train, only_site: int | None = None) -> Inputs:
  """Loads the images of a federated run.

  Args:
    config: the run's.
    only_site: the site whose images this process may read; None for all.

  Raises:
    ValueError, FileNotFoundError: the source or the partition asked for is wrong.
  """
  inputs = (
    _phantom(config, only_site)
    if config.data.data == "phantom"
    else _loaded(config, only_site is not None)
  )
  if config.privacy.by_patient:
    sites.check_patients(inputs.train)
  used = (inputs.train, inputs.validation) if config.privacy.validates else (inputs.train,)
  for part in used:
    if empty := [i for i, n in enumerate(part.sizes) if not n]:
      raise ValueError(
        f"sites {empty} have no images to {'train on' if part is inputs.train else 'validate with'}"
      )
  return inputs


def _load(settings: Data, label_names: tuple[str, ...] | None, lazy: bool) -> dict[str, Dataset]:
  return load(
    settings.data,
    size=settings.image_size,
    channels=settings.channels,
    label_names=label_names or names(settings.label_names) or None,
    lazy=lazy,
    data_dir=settings.data_dir or None,
    manual_dir=settings.manual_dir or None,
    patient_column=settings.patient_column,
    patient_pattern=settings.patient_pattern,
  )


def _phantom(config: Train, only_site: int | None) -> Inputs:
  data, h = config.data, config.hospitals
  if data.channels != 1:
    raise ValueError(f"channels={data.channels}: the phantom is grey; use --channels=1")
  if h.partition not in ("auto", "column:site"):
    raise ValueError(
      f"partition={h.partition!r}: the phantom comes with its sites; use auto, and num_sites"
    )

  def make(total: int, first: int) -> Part:
    sizes = sites.site_sizes(total, h.num_sites, fractions(h.site_fractions))
    size, seed = data.image_size, config.seed
    return sites.phantom_part(sizes, size=size, seed=seed, first=first, only_site=only_site)

  train = make(h.phantom_images, sites.TRAINING)
  num_held = round(h.validation_fraction * h.phantom_images)
  validation = make(max(h.num_sites, num_held), sites.VALIDATION)
  num_test = max(h.num_sites, h.phantom_images // 2)
  return Inputs(train, validation, _phantom_test(data, num_test, h.num_sites, config.seed))


def _phantom_test(settings: Data, total: int, num_sites: int, seed: int) -> Dataset:
  styles = phantom.site_styles(num_sites, seed)
  size = settings.image_size
  return phantom.phantom(total, size=size, seed=seed, styles=styles, first=sites.TEST)


def _loaded(config: Train, lazy: bool) -> Inputs:
  data, h = config.data, config.hospitals
  splits = _load(data, None, lazy=True)
  whole = splits.get("train", splits.get("all"))
  if whole is None:
    raise ValueError(
      f"{data.data} has only the splits {sorted(splits)}; training images are needed"
    )
  if config.privacy.by_patient:  # before any image is decoded
    patient_ids.require(whole)
  read = (lambda dataset: dataset) if lazy or h.sites_in_memory else in_memory
  train = read(whole)
  if "train" in splits and "test" in splits:
    test = read(splits["test"])
  else:
    kept, held = partition.hold_out(train, h.test_fraction, config.seed)
    train, test = take(train, kept), take(train, held)
  dealt = _partition(h, train, config.seed)
  if len(dealt) != h.num_sites:
    raise ValueError(
      f"partition {h.partition} makes {len(dealt)} sites; set --num_sites={len(dealt)}"
    )
  return Inputs(*sites.hold_out(Part(train, dealt), h.validation_fraction, config.seed), test)


def _partition(h: Hospitals, dataset: Dataset, seed: int) -> partition.Partition:
  kind, _, argument = h.partition.partition(":")
  shares = fractions(h.site_fractions)
  if kind == "column" and argument:
    return partition.by_column(dataset, argument)
  if kind == "iid":
    return partition.iid(dataset, h.num_sites, seed)
  if kind == "unequal":
    equal = (1 / h.num_sites,) * h.num_sites
    return partition.unequal(dataset, shares or equal, seed)
  if kind in ("auto", "dirichlet"):
    return partition.dirichlet(
      dataset, h.num_sites, h.dirichlet_alpha, seed, fractions=shares, min_examples=2
    )
  raise ValueError(f"partition={h.partition!r}; use auto, iid, unequal, dirichlet or column:NAME")
