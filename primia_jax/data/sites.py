"""What each site holds, and how sites' images are stacked for a round.

A `Part` is a data set and the indices of each site's images in it; `partition` deals them out.
`hold_out` sets validation images aside at each site, `merge` pools sites, and `stack` makes the
arrays that a round takes. Three synthetic hospitals are one line:

  hospitals = sites.phantom_sites((40, 30, 20), size=32)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from primia_jax.data import partition, patient_ids, phantom
from primia_jax.data.dataset import Dataset, take
from primia_jax.types import Site

# First image numbers of the phantom's splits, far enough apart that no two splits share an image.
TRAINING, VALIDATION, TEST = 0, 2**20, 2**21


class Part(NamedTuple):
  """Images of one purpose, e.g. training, and which of them each site holds.

  Attributes:
    dataset: the images. Where each site runs in its own process, only the images of that
      process's site can be read.
    sites: S index arrays into `dataset`, e.g. a `partition.Partition`.
  """

  dataset: Dataset
  sites: tuple[np.ndarray, ...]

  @property
  def sizes(self) -> tuple[int, ...]:
    """The number of images of each site."""
    return tuple(map(len, self.sites))


def site_sizes(total: int, num_sites: int, fractions: Sequence[float] | None = None) -> list[int]:
  """Divides a number of images between S sites.

  Args:
    total: about how many images there are in all. Each site's share is rounded and is at least 1.
    num_sites: S.
    fractions: [S] positive shares that add up to 1. By default shares fall evenly from the first
      site to the last, and the first has three times as many images as the last.

  Raises:
    ValueError: the fractions are not such shares, or num_sites is below 1.
  """
  if num_sites < 1:
    raise ValueError(f"num_sites={num_sites}; at least 1 is needed")
  if fractions is None:
    weights = np.linspace(1.5, 0.5, num_sites)
    fractions = tuple((weights / weights.sum()).tolist())
  if len(fractions) != num_sites or abs(sum(fractions) - 1) > 1e-6 or min(fractions) <= 0:
    raise ValueError(
      f"site_fractions={fractions}; give {num_sites} positive numbers that add up to 1"
    )
  return [max(1, round(total * share)) for share in fractions]


def hold_out(part: Part, fraction: float, seed: int) -> tuple[Part, Part]:
  """Sets images of each site aside, e.g. for validation, without splitting a group (a patient).

  A site of at least two groups holds out at least one, and a site of one group keeps it.

  Args:
    part: S sites.
    fraction: the share of each site's images to hold out, between 0 and 1, both excluded.
    seed: any non-negative integer; site s uses seed + s.

  Returns:
    (what remains, what is held out), both over the same data set.

  Raises:
    ValueError: the fraction is out of its range.
  """
  kept, held = [], []
  for number, index in enumerate(part.sites):
    own = take(part.dataset, index)
    rest, apart = partition.hold_out(own, fraction, seed + number, smallest=True)
    kept.append(index[rest])
    held.append(index[apart])
  return Part(part.dataset, tuple(kept)), Part(part.dataset, tuple(held))


def merge(part: Part, sites: Sequence[int]) -> Part:
  """Pools the images of the given sites at one site; a single number is local training."""
  return Part(part.dataset, (np.concatenate([part.sites[i] for i in sites]),))


def patients(part: Part, site: int) -> np.ndarray:
  """Returns the patient of each of a site's images: [N] int32, numbered from 0. Raises as
  `check_patients`, for this site alone.
  """
  patient_ids.require(part.dataset, part.sites[site])
  groups = np.asarray(part.dataset.groups)[part.sites[site]]
  return np.unique(groups, return_inverse=True)[1].astype(np.int32)


def check_patients(part: Part) -> None:
  """Checks that every image's patient is known and has all of its images at one site, without
  which a bound on one patient at each site bounds no patient.

  Raises:
    ValueError: naming the images, or the patients and their sites.
  """
  patient_ids.require(part.dataset, np.concatenate(part.sites))
  names, of_image = np.unique(part.dataset.groups, return_inverse=True)
  at = np.zeros((len(part.sites), len(names)), bool)
  for site, index in enumerate(part.sites):
    at[site, of_image[index]] = True
  if len(split := np.flatnonzero(at.sum(0) > 1)):
    where = [f"{names[i]} at {np.flatnonzero(at[:, i]).tolist()}" for i in split]
    raise ValueError(
      f"patients have images at several sites: {patient_ids.listed(where)}; give each patient one "
      "site, or names that tell patients of different sites apart"
    )


def stack(
  part: Part,
  site_ids: Sequence[int] | np.ndarray | None = None,
  max_examples: int | None = None,
  *,
  by_patient: bool = False,
) -> Site:
  """Stacks the images of K sites, each padded with blank (all-zero) images to the same number.

  Args:
    part: S sites.
    site_ids: [K] which sites; by default all, in order.
    max_examples: N, the rows of each site; by default the size of the largest site in `part`.
    by_patient: also fill `units` with each image's patient, as patient-level privacy needs.
      `check_patients` tells whether patients are bounded over all sites.

  Returns:
    A `Site` of NumPy arrays with a leading axis K: images uint8 [K, N, H, W, C], labels and units
    int32 [K, N], or labels [K, N, H, W] of each pixel for a data set with masks. Padding has label
    0 and unit -1.

  Raises:
    ValueError: a site has more than N images, its images are not in this process, or `by_patient`
      and the patient of an image is unknown.
  """
  ids = np.arange(len(part.sites)) if site_ids is None else np.asarray(site_ids)
  rows = max(part.sizes, default=0) if max_examples is None else max_examples
  images = np.zeros((len(ids), rows, *part.dataset.images.shape[1:]), np.uint8)
  of_image = part.dataset.labels if part.dataset.masks is None else part.dataset.masks
  labels = np.zeros((len(ids), rows, *of_image.shape[1:]), np.int32)
  units = np.full((len(ids), rows), -1, np.int32)
  counts = np.zeros(len(ids), np.int32)
  for row, site in enumerate(ids.tolist()):
    index = part.sites[site]
    counts[row] = size = len(index)
    if size > rows:
      raise ValueError(f"site {site} has {size} images, more than max_examples={rows}; raise it")
    if size and not 0 <= index.min() <= index.max() < len(part.dataset):
      raise ValueError(
        f"site {site}'s images are not in this process; stack only the site it was loaded for"
      )
    images[row, :size] = part.dataset.images[index]
    labels[row, :size] = of_image[index]
    if by_patient:
      units[row, :size] = patients(part, site)
  return Site(ids.astype(np.int32), images, labels, counts, None, units if by_patient else None)  # type: ignore[arg-type]


def phantom_part(
  sizes: Sequence[int],
  *,
  size: int = 64,
  seed: int = 0,
  first: int = TRAINING,
  only_site: int | None = None,
) -> Part:
  """Makes the synthetic phantom's images for S sites, each with its own style.

  Args:
    sizes: [S] how many images each site has.
    size: height and width, in pixels.
    seed: any integer from 0 to 2^32 - 1; another seed gives other children and other styles.
    first: TRAINING, VALIDATION or TEST; these never share an image.
    only_site: makes this site's images only, bit for bit as if all sites' were made. The other
      sites keep their sizes, but their images cannot be read.

  Raises:
    ValueError: as `phantom.phantom`.
  """
  styles = phantom.site_styles(len(sizes), seed)
  dataset = phantom.phantom(
    sizes, size=size, seed=seed, styles=styles, first=first, only_site=only_site
  )
  ends = np.cumsum(sizes)
  start = 0 if only_site is None else ends[only_site] - sizes[only_site]
  ranges = (np.arange(end - n, end) - start for n, end in zip(sizes, ends, strict=True))
  return Part(dataset, tuple(ranges))


def phantom_sites(
  sizes: Sequence[int], *, size: int = 64, seed: int = 0, first: int = TRAINING
) -> Site:
  """Makes S synthetic hospitals as arrays, ready for a round: `stack(phantom_part(...))`.

  Returns:
    A `Site` with a leading axis S: images uint8 [S, max(sizes), size, size, 1], labels in the order
    of `phantom.LABEL_NAMES`.
  """
  return stack(phantom_part(sizes, size=size, seed=seed, first=first))
