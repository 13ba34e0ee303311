"""Divides a data set between sites, and holds examples out, without ever splitting a group.

Every function is pure NumPy, takes a seed, and reads labels, groups and columns but no images. A
partition is a tuple of S sorted, disjoint int64 index arrays that together contain every example.
`dataset.take` turns each of them into a site's data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from primia_jax.data.dataset import Dataset
from primia_jax.data.patient_ids import listed

Partition = tuple[np.ndarray, ...]


def iid(dataset: Dataset, num_sites: int, seed: int) -> Partition:
  """Divides at random into S sites, as equal in size as the groups allow.

  Args:
    dataset: N examples.
    num_sites: S.
    seed: any non-negative integer.

  Returns:
    S index arrays.

  Raises:
    ValueError: there are fewer groups than sites, or num_sites is below 1.
  """
  if num_sites < 1:
    raise ValueError(f"num_sites is {num_sites}; at least 1 is needed")
  return unequal(dataset, (1 / num_sites,) * num_sites, seed)


def unequal(dataset: Dataset, fractions: Sequence[float], seed: int) -> Partition:
  """Divides at random into sites of the given sizes.

  Groups are taken in random order. Each goes to the site that lacks most, so that no site exceeds
  its size by a whole (largest) group.

  Args:
    dataset: N examples.
    fractions: [S] positive shares of the examples that add up to 1, e.g. (0.5, 0.3, 0.2).
    seed: any non-negative integer.

  Returns:
    S index arrays.

  Raises:
    ValueError: the fractions are not such shares, there are fewer groups than sites, or a site
      would get no example.
  """
  shares = _checked_fractions(fractions)
  members, counts = _groups(dataset, len(shares))
  wanted = shares[:, None] * counts.sum()
  sites = _fill(counts.sum(1, keepdims=True), wanted, np.random.default_rng(seed))
  return _collect(members, sites, len(shares))


def dirichlet(
  dataset: Dataset,
  num_sites: int,
  alpha: float,
  seed: int,
  *,
  fractions: Sequence[float] | None = None,
  min_examples: int = 1,
  max_draws: int = 1000,
) -> Partition:
  """Divides so that every site has its own mix of labels: the usual model of non-IID hospitals.

  Without `fractions`, each label's examples are divided between the sites in proportions drawn from
  Dirichlet(alpha) (Yurochkin et al., ICML 2019; Li et al., ICDE 2022), so sizes differ too. With
  `fractions`, each site draws its mix of labels from Dirichlet(alpha L p), where p are the labels'
  frequencies (Hsu et al., 2019). A few rounds of iterative proportional fitting then match the
  sites' sizes and the labels' counts.

  Args:
    dataset: N examples.
    num_sites: S.
    alpha: concentration. About 0.1 is heavily skewed, 1 is moderately skewed, 100 is nearly IID.
    seed: any non-negative integer.
    fractions: [S] shares of the examples that add up to 1.
    min_examples: how many examples each site must have. Proportions are redrawn until it does.
    max_draws: how many draws to try.

  Returns:
    S index arrays.

  Raises:
    ValueError: an argument is out of its range, there are fewer groups than sites, or no draw gave
      each site `min_examples` examples.
  """
  if num_sites < 1:
    raise ValueError(f"num_sites is {num_sites}; at least 1 is needed")
  if not 0 < alpha < math.inf:
    raise ValueError(f"alpha is {alpha}; expected a positive number, e.g. 0.5")
  if min_examples < 1 or min_examples * num_sites > len(dataset):
    raise ValueError(
      f"min_examples is {min_examples}; expected at least 1, and at most "
      f"{len(dataset) // num_sites} for {num_sites} sites to share {len(dataset)} examples"
    )
  shares = None if fractions is None else _checked_fractions(fractions)
  if shares is not None and len(shares) != num_sites:
    raise ValueError(
      f"{len(shares)} fractions {tuple(fractions or ())} were given for {num_sites} sites"
    )
  members, counts = _groups(dataset, num_sites)
  rng = np.random.default_rng(seed)
  for _ in range(max_draws):
    wanted = _dirichlet_counts(counts.sum(0), num_sites, alpha, shares, rng)
    if wanted.sum(1).min() < min_examples - 1e-6:
      continue
    sites = _fill(counts, wanted, rng)
    if np.bincount(sites, weights=counts.sum(1), minlength=num_sites).min() >= min_examples:
      return _collect(members, sites, num_sites)
  raise ValueError(
    f"none of {max_draws} draws with alpha {alpha} gave each of {num_sites} sites {min_examples} "
    "examples; raise alpha, or lower min_examples or num_sites"
  )


def by_column(dataset: Dataset, column: str) -> Partition:
  """Makes one site for each value of a column, e.g. "site" or "folder", in sorted order.

  Args:
    dataset: N examples.
    column: a name in `dataset.columns`.

  Returns:
    S index arrays, where S is the number of distinct values.

  Raises:
    ValueError: there are no examples or no such column, or a group has more than one value.
  """
  if column not in dataset.columns:
    raise ValueError(
      f"{dataset.name!r} has no column {column!r}; its columns are {sorted(dataset.columns)}"
    )
  values, sites = np.unique(np.asarray(dataset.columns[column]), return_inverse=True)
  group_names, groups = np.unique(dataset.groups, return_inverse=True)
  if not len(dataset):
    raise ValueError(f"{dataset.name!r} holds no examples to divide")
  highest, lowest = (
    np.zeros(len(group_names), np.int64),
    np.full(len(group_names), len(values), np.int64),
  )
  np.maximum.at(highest, groups, sites)
  np.minimum.at(lowest, groups, sites)
  split = np.flatnonzero(highest != lowest)
  if len(split):
    name = lambda i: f"{group_names[i]} at {values[lowest[i]]} and {values[highest[i]]}"
    raise ValueError(
      f"column {column!r} has several values within groups: {listed(list(map(name, split)))}; give "
      "each group (patient) one value, or names that tell patients of different sites apart"
    )
  return tuple(np.flatnonzero(sites == site) for site in range(len(values)))


def hold_out(
  dataset: Dataset, fraction: float, seed: int, *, smallest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """Holds out examples, e.g. for validation, with the same mix of labels as the rest.

  Args:
    dataset: N examples.
    fraction: share of the examples to hold out, between 0 and 1, both excluded.
    seed: any non-negative integer.
    smallest: where the fraction would leave one part empty, hold out the smallest group instead;
      nothing of a single group.

  Returns:
    (train_index, held_index): sorted, disjoint int64 arrays that together contain every example.

  Raises:
    ValueError: the fraction is out of its range, there are fewer than two groups, or one part would
      be empty. The last happens only if a group is as large as that part should be.
  """
  if not 0 < fraction < 1:
    raise ValueError(f"fraction is {fraction}; expected a number between 0 and 1, both excluded")
  if smallest and len(np.unique(dataset.groups)) < 2:
    return np.arange(len(dataset)), np.zeros(0, np.int64)
  members, counts = _groups(dataset, 2)
  # A column of totals, so that rare labels do not all round the same way.
  counts = np.concatenate([counts, counts.sum(1, keepdims=True)], axis=1)
  wanted = np.asarray([1 - fraction, fraction])[:, None] * counts.sum(0)
  sites = _fill(counts, wanted, np.random.default_rng(seed))
  if smallest and len(np.unique(sites)) < 2:
    sites = np.arange(len(counts)) == np.argmin(counts[:, -1])
  if len(np.unique(sites)) < 2:
    raise ValueError(
      f"fraction {fraction} of {dataset.name!r} ({len(dataset)} examples, {len(counts)} groups) "
      "leaves one part empty; use a fraction closer to one half"
    )
  train, held = _collect(members, sites, 2)
  return train, held


def _checked_fractions(fractions: Sequence[float]) -> np.ndarray:
  shares = np.asarray(fractions, np.float64)
  if (
    shares.ndim != 1
    or not len(shares)
    or not (shares > 0).all()
    or not abs(shares.sum() - 1) < 1e-6
  ):
    raise ValueError(
      f"fractions are {tuple(fractions)}; expected positive numbers that add up to 1"
    )
  return shares


def _groups(dataset: Dataset, num_sites: int) -> tuple[list[np.ndarray], np.ndarray]:
  """Returns the examples of each group, and how many of each label it holds: int64 [G, L]."""
  _, groups = np.unique(dataset.groups, return_inverse=True)
  num_groups = int(groups.max()) + 1 if len(groups) else 0
  if num_groups < num_sites:
    raise ValueError(
      f"{dataset.name!r} has {num_groups} groups, too few for {num_sites} parts, because a group "
      "is never split; use fewer parts"
    )
  labels, num_labels = dataset.labels, len(dataset.label_names)
  if dataset.is_multi:  # sets of findings are dealt like classes
    kinds, labels = np.unique(labels, return_inverse=True)
    num_labels = len(kinds)
  counts = np.zeros((num_groups, num_labels), np.int64)
  np.add.at(counts, (groups, labels), 1)
  order = np.argsort(groups, kind="stable")
  return np.split(order, np.cumsum(counts.sum(1))[:-1]), counts


def _fill(counts: np.ndarray, wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Assigns each group to the site that lacks most of its labels.

  Args:
    counts: [G, L] examples of each label in each group.
    wanted: [S, L] examples of each label that each site should get.
    rng: orders the groups. Taking large groups first would fill sites more exactly, but would leave
      only small groups to small sites.

  Returns:
    int64 [G], the site of each group.
  """
  lacking = wanted.astype(np.float64)
  sites = np.empty(len(counts), np.int64)
  for group in rng.permutation(len(counts)):
    sites[group] = np.argmax(lacking @ counts[group])
    lacking[sites[group]] -= counts[group]
  return sites


def _dirichlet_counts(
  totals: np.ndarray,
  num_sites: int,
  alpha: float,
  shares: np.ndarray | None,
  rng: np.random.Generator,
) -> np.ndarray:
  """Draws how many examples of each label each site should get: [S, L], with columns that add up to
  `totals` [L].
  """
  if shares is None:
    return rng.dirichlet([alpha] * num_sites, size=len(totals)).T * totals
  present = totals > 0
  frequency = totals[present] / totals.sum()
  wanted = np.zeros((num_sites, len(totals)))
  wanted[:, present] = rng.dirichlet(alpha * present.sum() * frequency, size=num_sites) + 1e-9
  for _ in range(50):
    wanted *= (shares * totals.sum() / wanted.sum(1))[:, None]
    wanted[:, present] *= totals[present] / wanted[:, present].sum(0)
  return wanted


def _collect(members: list[np.ndarray], sites: np.ndarray, num_sites: int) -> Partition:
  """Returns the sorted examples of each site."""
  parts = []
  for site in range(num_sites):
    chosen = np.flatnonzero(sites == site)
    if not len(chosen):
      raise ValueError(
        f"site {site} of {num_sites} would get no example, because no group is split; use fewer "
        "sites or a larger share"
      )
    parts.append(np.sort(np.concatenate([members[group] for group in chosen])))
  return tuple(parts)
