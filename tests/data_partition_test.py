"""Partitions are disjoint, complete and seeded, never split a group, and are as skewed or unequal
as requested.
"""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from primia_jax.data import partition
from primia_jax.data.dataset import Dataset


def make(labels, groups, columns=None, num_labels=3):
  labels = np.asarray(labels, np.int32)
  images = np.zeros((len(labels), 1, 1, 1), np.uint8)
  return Dataset(
    images, labels, tuple("abcdefghij"[:num_labels]), np.asarray(groups), columns or {}, "test set"
  )


def spread_out(num, seed=0, num_labels=3):
  """Each image is its own group; labels are balanced and in random order."""
  labels = np.random.default_rng(seed).permutation(np.arange(num) % num_labels)
  return make(labels, [f"p{i}" for i in range(num)], num_labels=num_labels)


@st.composite
def datasets(draw, min_groups=6):
  """Groups of 1 to 6 images, most of one label, some mixed, in shuffled order."""
  sizes = draw(st.lists(st.integers(1, 6), min_size=min_groups, max_size=40))
  rng = np.random.default_rng(draw(st.integers(0, 1000)))
  labels, groups = [], []
  for group, size in enumerate(sizes):
    mixed = rng.random() < 0.2
    labels += list(rng.integers(0, 3, size) if mixed else np.full(size, rng.integers(0, 3)))
    groups += [f"patient {group}"] * size
  order = rng.permutation(len(labels))
  return make(np.asarray(labels)[order], np.asarray(groups)[order])


def check(dataset, parts, num_sites):
  assert isinstance(parts, tuple)
  assert len(parts) == num_sites
  for part in parts:
    assert part.dtype == np.int64
    assert len(part) > 0
    assert (np.diff(part) > 0).all()
  np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(dataset)))
  owners = [set(dataset.groups[part]) for part in parts]
  assert sum(map(len, owners)) == len(set(dataset.groups))


def same(first, second):
  return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


seeds = st.integers(0, 2**32 - 1)


@given(datasets(), st.integers(1, 6), seeds)
@settings(deadline=None, max_examples=60)
def test_iid_is_a_partition_into_equal_parts(dataset, num_sites, seed):
  parts = partition.iid(dataset, num_sites, seed)
  check(dataset, parts, num_sites)
  assert same(parts, partition.iid(dataset, num_sites, seed))
  largest = np.unique(dataset.groups, return_counts=True)[1].max()
  assert max(map(len, parts)) < len(dataset) / num_sites + largest


@given(datasets(min_groups=12), seeds)
@settings(deadline=None, max_examples=60)
def test_unequal_is_a_partition_into_parts_of_the_asked_sizes(dataset, seed):
  fractions = (0.4, 0.35, 0.25)
  parts = partition.unequal(dataset, fractions, seed)
  check(dataset, parts, 3)
  assert same(parts, partition.unequal(dataset, fractions, seed))
  largest = np.unique(dataset.groups, return_counts=True)[1].max()
  for part, fraction in zip(parts, fractions, strict=True):
    assert len(part) < fraction * len(dataset) + largest


@given(datasets(min_groups=12), st.sampled_from([0.3, 1.0, 100.0]), st.booleans(), seeds)
@settings(deadline=None, max_examples=80)
def test_dirichlet_is_a_partition(dataset, alpha, with_fractions, seed):
  fractions = (0.5, 0.3, 0.2) if with_fractions else None
  parts = partition.dirichlet(dataset, 3, alpha, seed, fractions=fractions)
  check(dataset, parts, 3)
  assert same(parts, partition.dirichlet(dataset, 3, alpha, seed, fractions=fractions))


@given(datasets(), st.floats(0.2, 0.8), seeds)
@settings(deadline=None, max_examples=60)
def test_hold_out_is_a_partition(dataset, fraction, seed):
  largest = np.unique(dataset.groups, return_counts=True)[1].max()
  assume(min(fraction, 1 - fraction) * len(dataset) > largest)
  parts = partition.hold_out(dataset, fraction, seed)
  check(dataset, parts, 2)
  assert same(parts, partition.hold_out(dataset, fraction, seed))


@pytest.mark.parametrize(
  "split",
  [
    lambda dataset, seed: partition.iid(dataset, 3, seed),
    lambda dataset, seed: partition.unequal(dataset, (0.5, 0.3, 0.2), seed),
    lambda dataset, seed: partition.dirichlet(dataset, 3, 0.5, seed),
    lambda dataset, seed: partition.dirichlet(dataset, 3, 0.5, seed, fractions=(0.5, 0.3, 0.2)),
    lambda dataset, seed: partition.hold_out(dataset, 0.2, seed),
  ],
)
def test_seeds_give_different_partitions(split):
  dataset = spread_out(120)
  drawn = {tuple(map(tuple, split(dataset, seed))) for seed in range(10)}
  assert len(drawn) == 10


def test_single_images_meet_the_sizes_exactly():
  dataset = spread_out(1000)
  assert [len(part) for part in partition.unequal(dataset, (0.5, 0.3, 0.2), 1)] == [500, 300, 200]
  assert [len(part) for part in partition.iid(dataset, 4, 1)] == [250] * 4
  sizes = [len(part) for part in partition.dirichlet(dataset, 3, 0.5, 1, fractions=(0.5, 0.3, 0.2))]
  np.testing.assert_allclose(sizes, [500, 300, 200], atol=3)


def test_iid_sites_are_unbiased_in_label():
  dataset = spread_out(3000)
  for part in partition.iid(dataset, 3, 0):
    counts = np.bincount(dataset.labels[part], minlength=3)
    assert np.abs(counts - 1000 / 3).max() < 4 * np.sqrt(1000 * (1 / 3) * (2 / 3))


def label_skew(dataset, parts):
  """Mean total-variation distance between a site's labels and all labels."""
  overall = np.bincount(dataset.labels, minlength=3) / len(dataset)
  mixes = [np.bincount(dataset.labels[part], minlength=3) / len(part) for part in parts]
  return np.mean([np.abs(mix - overall).sum() / 2 for mix in mixes])


@pytest.mark.parametrize("fractions", [None, (0.5, 0.3, 0.2)])
def test_smaller_alpha_skews_more(fractions):
  dataset = spread_out(900)
  skews = [
    np.mean(
      [
        label_skew(dataset, partition.dirichlet(dataset, 3, alpha, s, fractions=fractions))
        for s in range(20)
      ]
    )
    for alpha in (0.1, 1.0, 1000.0)
  ]
  assert skews[0] > 1.4 * skews[1]
  assert skews[1] > 3 * skews[2]
  assert skews[2] < 0.05


def test_dirichlet_shares_have_the_moments_of_the_distribution():
  """A site's share of a label is one of Dirichlet(alpha): mean 1/S, variance (S-1)/(S^2 (S alpha +
  1)).
  """
  dataset, num_sites, alpha = spread_out(600, num_labels=2), 4, 0.8
  shares = []
  for seed in range(300):
    for part in partition.dirichlet(dataset, num_sites, alpha, seed):
      shares.append(np.bincount(dataset.labels[part], minlength=2)[0] / 300)
  variance = (num_sites - 1) / (num_sites**2 * (num_sites * alpha + 1))
  assert np.mean(shares) == pytest.approx(1 / num_sites)
  assert np.var(shares) == pytest.approx(variance, rel=0.15)


def test_dirichlet_gives_each_site_the_asked_minimum():
  dataset = spread_out(300)
  sizes = [
    len(part)
    for s in range(20)
    for part in partition.dirichlet(dataset, 5, 0.3, s, min_examples=20)
  ]
  assert min(sizes) >= 20
  assert min(len(part) for s in range(20) for part in partition.dirichlet(dataset, 5, 0.3, s)) < 20


def test_dirichlet_works_where_a_label_is_absent():
  dataset = make([0, 2] * 30, np.arange(60))
  check(dataset, partition.dirichlet(dataset, 3, 1.0, 0, fractions=(0.5, 0.3, 0.2)), 3)
  check(dataset, partition.dirichlet(dataset, 3, 1.0, 0), 3)


def test_by_column_recovers_the_sites():
  sites = np.asarray([2, 0, 0, 1, 2, 1])
  dataset = make([0] * 6, np.arange(6), {"site": sites, "folder": np.asarray(list("xyxyxy"))})
  parts = partition.by_column(dataset, "site")
  check(dataset, parts, 3)
  for part, expected in zip(parts, ([1, 2], [3, 5], [0, 4]), strict=True):
    np.testing.assert_array_equal(part, expected)
  np.testing.assert_array_equal(partition.by_column(dataset, "folder")[0], [0, 2, 4])


def test_hold_out_is_stratified():
  labels = np.repeat([0, 1, 2], (700, 200, 100))
  dataset = make(labels, np.arange(1000))
  train, held = partition.hold_out(dataset, 0.1, 3)
  np.testing.assert_array_equal(np.bincount(labels[held]), [70, 20, 10])
  np.testing.assert_array_equal(np.bincount(labels[train]), [630, 180, 90])


def test_hold_out_is_stratified_with_groups():
  rng = np.random.default_rng(0)
  group_labels, sizes = rng.integers(0, 3, 300), rng.integers(1, 6, 300)
  dataset = make(np.repeat(group_labels, sizes), np.repeat(np.arange(300), sizes))
  train, held = partition.hold_out(dataset, 0.2, 3)
  check(dataset, (train, held), 2)
  share = np.bincount(dataset.labels[held]) / np.bincount(dataset.labels)
  np.testing.assert_allclose(share, 0.2, atol=0.05)


def test_small_sites_get_groups_of_every_size():
  sizes = np.tile([1, 10], 200)
  dataset = make(np.zeros(sizes.sum(), np.int32), np.repeat(np.arange(400), sizes))
  small = partition.unequal(dataset, (0.9, 0.1), 0)[1]
  counts = np.unique(dataset.groups[small], return_counts=True)[1]
  assert (counts == 1).sum() > 5
  assert (counts == 10).sum() > 5


DATASET = make(
  [0, 0, 1, 2], ["p", "p", "q", "r"], {"site": np.asarray([0, 1, 1, 1]), "ward": np.arange(4)}
)


@pytest.mark.parametrize(
  ("split", "message"),
  [
    (lambda: partition.iid(DATASET, 0, 0), "num_sites is 0"),
    (lambda: partition.iid(DATASET, 4, 0), "'test set' has 3 groups, too few for 4 parts"),
    (lambda: partition.unequal(DATASET, (0.5, 0.4), 0), "add up to 1"),
    (lambda: partition.unequal(DATASET, (1.2, -0.2), 0), "positive numbers"),
    (lambda: partition.unequal(DATASET, (), 0), "positive numbers"),
    (lambda: partition.unequal(DATASET, (0.98, 0.01, 0.01), 0), "would get no example"),
    (lambda: partition.dirichlet(DATASET, 0, 0.5, 0), "num_sites is 0"),
    (lambda: partition.dirichlet(DATASET, 4, 0.5, 0), "too few for 4 parts"),
    (lambda: partition.dirichlet(DATASET, 2, 0.0, 0), "alpha is 0.0"),
    (lambda: partition.dirichlet(DATASET, 2, 0.5, 0, min_examples=3), "min_examples is 3"),
    (lambda: partition.dirichlet(DATASET, 2, 0.5, 0, fractions=(0.5, 0.3, 0.2)), "3 fractions"),
    (lambda: partition.dirichlet(spread_out(60), 20, 0.01, 0, max_draws=3), "none of 3 draws"),
    (
      lambda: partition.by_column(DATASET, "folder"),
      r"no column 'folder'; its columns are \['site', 'ward'\]",
    ),
    (
      lambda: partition.by_column(DATASET, "site"),
      "several values within groups: 1 \\(p at 0 and 1\\)",
    ),
    (lambda: partition.hold_out(DATASET, 1.0, 0), "fraction is 1.0"),
    (lambda: partition.hold_out(DATASET, 0.001, 0), "one part empty"),
    (lambda: partition.hold_out(make([0, 0], ["p", "p"]), 0.5, 0), "1 groups, too few for 2 parts"),
    (lambda: partition.by_column(make([], [], {"site": np.zeros(0)}), "site"), "holds no examples"),
  ],
)
def test_impossible_split_is_refused(split, message):
  with pytest.raises(ValueError, match=message):
    split()
