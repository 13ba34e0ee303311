"""From settings to images: training and validation images of each site, and the test images."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.settings import Data, Train, fractions, names
from primia_jax.data import partition, phantom
from primia_jax.data.dataset import Dataset, take
from primia_jax.data.folder import read_images
from primia_jax.data.load import load
from primia_jax.federated import Site

_FIRST_VALIDATION, _FIRST_TEST = 2**20, 2**21  # phantom: ranges of image numbers that never meet


class Part(NamedTuple):
  """Training or validation images, and which of them each site holds.

  Attributes:
    dataset: the images; in a process of its own, only those of its site can be read.
    sites: S index arrays into it.
  """

  dataset: Dataset
  sites: tuple[np.ndarray, ...]

  @property
  def sizes(self) -> tuple[int, ...]:
    return tuple(map(len, self.sites))


class Inputs(NamedTuple):
  train: Part
  validation: Part
  test: Dataset


def images_to_test(
  settings: Data, seed: int = 0, label_names: tuple[str, ...] | None = None
) -> Dataset:
  """The test split of a source, or all its images where it is not split.

  Raises:
    ValueError, FileNotFoundError: the source is wrong, or has no test images.
  """
  if settings.data == "phantom":
    styles = phantom.site_styles(3, seed)
    return phantom.phantom(
      600, size=settings.image_size, seed=seed, styles=styles, first=_FIRST_TEST
    )
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


def site_images(settings: Train, only_site: int | None = None) -> Inputs:
  """Loads the images of a federated run.

  Args:
    settings: the run's.
    only_site: the site whose images this process may read; None for all.

  Raises:
    ValueError, FileNotFoundError: the source or the partition asked for is wrong.
  """
  inputs = (
    _phantom(settings, only_site)
    if settings.data == "phantom"
    else _loaded(settings, only_site is not None)
  )
  for part in (inputs.train, inputs.validation):
    if empty := [i for i, n in enumerate(part.sizes) if not n]:
      raise ValueError(
        f"sites {empty} have no images to {'train on' if part is inputs.train else 'validate with'}"
      )
  return inputs


def patients(part: Part, site: int) -> np.ndarray:
  """The patient of each of a site's images, numbered from 0 in any order."""
  groups = np.asarray(part.dataset.groups)[part.sites[site]]
  return np.unique(groups, return_inverse=True)[1].astype(np.int32)


def stack(part: Part, site_ids: np.ndarray, max_examples: int) -> Site:
  """Stacks the images of some sites as [K, max_examples, H, W, C], padded with zeros.

  Raises:
    ValueError: a site has more images.
  """
  images = np.zeros((len(site_ids), max_examples, *part.dataset.images.shape[1:]), np.uint8)
  labels = np.zeros((len(site_ids), max_examples), np.int32)
  counts = np.zeros(len(site_ids), np.int32)
  for row, site in enumerate(site_ids):
    index = part.sites[site]
    counts[row] = len(index)
    if len(index) > max_examples:
      raise ValueError(
        f"site {site} has {len(index)} images, more than max_examples={max_examples}"
      )
    images[row, : len(index)] = part.dataset.images[index]
    labels[row, : len(index)] = part.dataset.labels[index]
  return Site(np.asarray(site_ids, np.int32), images, labels, counts)  # type: ignore[arg-type]


def merge(part: Part, sites: tuple[int, ...]) -> Part:
  """One site that holds the images of the given sites: local training for one, pooled for all."""
  return Part(part.dataset, (np.concatenate([part.sites[i] for i in sites]),))


def _load(settings: Data, label_names: tuple[str, ...] | None, lazy: bool) -> dict[str, Dataset]:
  return load(
    settings.data,
    size=settings.image_size,
    channels=settings.channels,
    label_names=label_names or names(settings.label_names) or None,
    lazy=lazy,
    data_dir=settings.data_dir or None,
    manual_dir=settings.manual_dir or None,
  )


def _site_sizes(settings: Train, total: int) -> list[int]:
  shares = fractions(settings.site_fractions)
  if shares is None:  # the largest site three times the smallest
    weights = np.linspace(1.5, 0.5, settings.num_sites)
    shares = tuple((weights / weights.sum()).tolist())
  if len(shares) != settings.num_sites or abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
    raise ValueError(
      f"site_fractions={shares}: {settings.num_sites} positive numbers that add up to 1 are needed"
    )
  return [max(1, round(total * share)) for share in shares]


def _phantom(settings: Train, only_site: int | None) -> Inputs:
  if settings.channels != 1:
    raise ValueError(f"channels={settings.channels}: the phantom is grey; use --channels=1")
  if settings.partition not in ("auto", "column:site"):
    raise ValueError(
      f"partition={settings.partition!r}: the phantom comes with its sites; use auto, and num_sites"
    )
  styles = phantom.site_styles(settings.num_sites, settings.seed)

  def make(total: int, first: int) -> Part:
    sizes = _site_sizes(settings, total)
    ends = np.cumsum(sizes)
    options = {"size": settings.image_size, "seed": settings.seed, "styles": styles, "first": first}
    dataset = phantom.phantom(sizes, only_site=only_site, **options)  # type: ignore[arg-type]
    start = 0 if only_site is None else ends[only_site] - sizes[only_site]
    return Part(
      dataset,
      tuple(np.arange(end - size, end) - start for size, end in zip(sizes, ends, strict=True)),
    )

  train = make(settings.phantom_images, 0)
  validation = make(
    max(settings.num_sites, round(settings.validation_fraction * settings.phantom_images)),
    _FIRST_VALIDATION,
  )
  test = phantom.phantom(
    max(settings.num_sites, settings.phantom_images // 2),
    size=settings.image_size,
    seed=settings.seed,
    styles=styles,
    first=_FIRST_TEST,
  )
  return Inputs(train, validation, test)


def _loaded(settings: Train, lazy: bool) -> Inputs:
  splits = _load(settings, None, lazy=lazy or settings.sites_in_memory > 0)
  if "train" in splits and "test" in splits:
    train, test = splits["train"], splits["test"]
  else:
    whole = splits.get("train", splits.get("all"))
    if whole is None:
      raise ValueError(
        f"{settings.data} has only the splits {sorted(splits)}; training images are needed"
      )
    kept, held = partition.hold_out(whole, settings.test_fraction, settings.seed)
    train, test = take(whole, kept), take(whole, held)
  dealt = _partition(settings, train)
  if len(dealt) != settings.num_sites:
    raise ValueError(
      f"partition {settings.partition} makes {len(dealt)} sites; set --num_sites={len(dealt)}"
    )
  sites, held_sites = [], []
  for number, index in enumerate(dealt):
    kept, held = partition.hold_out(
      take(train, index), settings.validation_fraction, settings.seed + number
    )
    sites.append(index[kept])
    held_sites.append(index[held])
  return Inputs(Part(train, tuple(sites)), Part(train, tuple(held_sites)), test)


def _partition(settings: Train, dataset: Dataset) -> partition.Partition:
  kind, _, argument = settings.partition.partition(":")
  shares = fractions(settings.site_fractions)
  if kind == "column" and argument:
    return partition.by_column(dataset, argument)
  if kind == "iid":
    return partition.iid(dataset, settings.num_sites, settings.seed)
  if kind == "unequal":
    equal = (1 / settings.num_sites,) * settings.num_sites
    return partition.unequal(dataset, shares or equal, settings.seed)
  if kind in ("auto", "dirichlet"):
    alpha = settings.dirichlet_alpha
    return partition.dirichlet(
      dataset, settings.num_sites, alpha, settings.seed, fractions=shares, min_examples=2
    )
  raise ValueError(
    f"partition={settings.partition!r}; use auto, iid, unequal, dirichlet or column:NAME"
  )
