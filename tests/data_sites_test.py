"""Sites' images: sizes, held-out images, pooling, stacking, and the phantom's hospitals."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from primia_jax.data import phantom, sites
from primia_jax.data.dataset import Dataset, join


def part_of(sizes=(5, 3, 4), seed=0):
  """Distinct images dealt out in random order; two images a patient where the number is even."""
  total = sum(sizes)
  rng = np.random.default_rng(seed)
  images = np.arange(1, total + 1, dtype=np.uint8)[:, None, None, None] * np.ones(
    (1, 2, 3, 1), np.uint8
  )
  labels = rng.integers(0, 2, total).astype(np.int32)
  order = rng.permutation(total)
  dealt = tuple(np.split(order, np.cumsum(sizes)[:-1]))
  groups = np.empty(total, "U8")
  for site, index in enumerate(dealt):
    for position, image in enumerate(index):
      groups[image] = f"{site}-{position // 2}"
  known = np.ones(total, bool)
  return sites.Part(Dataset(images, labels, ("a", "b"), groups, has_patient=known), dealt)


def test_stack_holds_each_image_in_its_place_and_blank_padding():
  part = part_of()
  site = sites.stack(part, by_patient=True)
  assert site.images.shape == (3, 5, 2, 3, 1)
  assert site.images.dtype == np.uint8
  assert site.secret is None
  for a in (site.id, site.labels, site.num_examples, site.units):
    assert a.dtype == np.int32
  np.testing.assert_array_equal(site.id, [0, 1, 2])
  np.testing.assert_array_equal(site.num_examples, part.sizes)
  for row, index in enumerate(part.sites):
    n = len(index)
    np.testing.assert_array_equal(site.images[row, :n], part.dataset.images[index])
    np.testing.assert_array_equal(site.labels[row, :n], part.dataset.labels[index])
    np.testing.assert_array_equal(site.units[row, :n], np.arange(n) // 2)
    assert not site.images[row, n:].any()
    assert not site.labels[row, n:].any()
    assert (site.units[row, n:] == -1).all()


def test_stack_takes_some_sites_in_the_order_asked_for():
  part = part_of()
  some, every = sites.stack(part, [2, 0], 7), sites.stack(part, max_examples=7)
  np.testing.assert_array_equal(some.id, [2, 0])
  for name in ("images", "labels", "num_examples"):
    np.testing.assert_array_equal(getattr(some, name), getattr(every, name)[[2, 0]])
  assert some.units is None


def test_stack_reads_no_image_of_a_site_that_it_was_not_asked_for():
  part = part_of()

  class Counted:
    shape, read = part.dataset.images.shape, []

    def __getitem__(self, index):
      self.read += index.tolist()
      return part.dataset.images[index]

  data = part.dataset
  lazy = sites.Part(Dataset(Counted(), data.labels, data.label_names, data.groups), part.sites)
  np.testing.assert_array_equal(sites.stack(lazy, [1]).images, sites.stack(part, [1]).images)
  assert sorted(Counted.read) == sorted(part.sites[1].tolist())


def test_patients_are_known_and_at_one_site_or_refused():
  part = part_of()
  sites.check_patients(part)
  first = np.array([index[0] for index in part.sites])
  split = part.dataset.groups.copy()
  split[first] = "same"
  with pytest.raises(ValueError, match=r"at several sites: 1 \(same at \[0, 1, 2\]\); give each"):
    sites.check_patients(part._replace(dataset=dataclasses.replace(part.dataset, groups=split)))
  known = np.ones(len(part.dataset), bool)
  known[first[1]] = False
  for has_patient, named in ((known, first[1]), (None, r"\d+")):
    unknown = part._replace(dataset=dataclasses.replace(part.dataset, has_patient=has_patient))
    for refused in (sites.check_patients, functools.partial(sites.stack, by_patient=True)):
      with pytest.raises(ValueError, match=rf"image {named}\b.*set patient_column"):
        refused(unknown)
    sites.stack(unknown)


def test_too_many_images_are_refused():
  with pytest.raises(ValueError, match="site 0 has 5 images, more than max_examples=4"):
    sites.stack(part_of(), [1, 0], 4)


@pytest.mark.parametrize(
  ("total", "fractions", "sizes"),
  [
    (90, None, [45, 30, 15]),  # three to one
    (100, (0.5, 0.25, 0.25), [50, 25, 25]),
    (10, (0.98, 0.01, 0.01), [10, 1, 1]),  # no site is empty
  ],
)
def test_site_sizes(total, fractions, sizes):
  assert sites.site_sizes(total, 3, fractions) == sizes


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.4, 0.3), (1.1, 0.2, -0.3)])
def test_wrong_fractions_are_refused(fractions):
  with pytest.raises(ValueError, match=r"site_fractions=.*; give 3 positive numbers"):
    sites.site_sizes(90, 3, fractions)
  with pytest.raises(ValueError, match="num_sites=0; at least 1"):
    sites.site_sizes(90, 0)


def test_held_out_images_leave_their_site_by_whole_patients():
  part = part_of((12, 8, 20))
  kept, held = sites.hold_out(part, 0.3, seed=4)
  for site, index in enumerate(part.sites):
    np.testing.assert_array_equal(
      np.sort(np.concatenate([kept.sites[site], held.sites[site]])), np.sort(index)
    )
    assert abs(len(held.sites[site]) - 0.3 * len(index)) <= 2
    groups = [set(part.dataset.groups[p.sites[site]]) for p in (kept, held)]
    assert not groups[0] & groups[1]
  again = sites.hold_out(part, 0.3, seed=4)[1].sites
  other = sites.hold_out(part, 0.3, seed=5)[1].sites
  assert all((a == b).all() for a, b in zip(held.sites, again, strict=True))
  assert not all(np.array_equal(a, b) for a, b in zip(held.sites, other, strict=True))


def test_small_sites_hold_out_their_smallest_patient_and_a_single_one_stays():
  dataset = part_of((12, 8, 20)).dataset
  groups = np.array(["p"] * 1 + ["q"] * 2 + ["r", "s", "s"] + ["t"] * (len(dataset) - 6))
  dataset = dataclasses.replace(dataset, groups=groups)
  part = sites.Part(dataset, (np.arange(1), np.arange(1, 3), np.arange(3, 6)))
  kept, held = sites.hold_out(part, 0.15, seed=0)
  assert [index.tolist() for index in kept.sites] == [[0], [1, 2], [4, 5]]
  assert [index.tolist() for index in held.sites] == [[], [], [3]]


def test_merged_sites_hold_what_each_held():
  part = part_of()
  pooled = sites.merge(part, (0, 2))
  assert pooled.sizes == (9,)
  np.testing.assert_array_equal(pooled.sites[0], np.concatenate([part.sites[0], part.sites[2]]))
  assert sites.merge(part, (1,)).sizes == (3,)


def test_phantom_hospitals_are_the_phantom_dealt_out():
  sizes, size, seed = (3, 2, 1), 16, 7
  hospitals = sites.phantom_sites(sizes, size=size, seed=seed)
  data = phantom.phantom(sizes, size=size, seed=seed, styles=phantom.site_styles(3, seed))
  assert hospitals.images.shape == (3, 3, 16, 16, 1)
  for site, n in enumerate(sizes):
    mine = data.columns["site"] == site
    np.testing.assert_array_equal(hospitals.images[site, :n], data.images[mine])
    np.testing.assert_array_equal(hospitals.labels[site, :n], data.labels[mine])
    assert not hospitals.images[site, n:].any()
  held = sites.phantom_sites(sizes, size=size, seed=seed, first=sites.VALIDATION)
  for site, n in enumerate(sizes):
    for a in hospitals.images[site, :n]:
      assert not any((a == b).all() for b in held.images[site, :n])


def test_one_process_makes_its_own_hospital_and_cannot_read_another():
  sizes = (3, 2, 1)
  every = sites.phantom_part(sizes, size=16)
  for only in range(3):
    own = sites.phantom_part(sizes, size=16, only_site=only)
    assert own.sizes == every.sizes
    assert len(own.dataset) == sizes[only]
    mine, theirs = (sites.stack(p, [only]) for p in (own, every))
    assert all(jnp.array_equal(a, b) for a, b in zip(mine[:4], theirs[:4], strict=True))
    for other in {0, 1, 2} - {only}:
      with pytest.raises(ValueError, match=f"site {other}'s images are not in this process"):
        sites.stack(own, [other])


def test_joined_data_sets_keep_their_images_and_tell_their_patients_apart():
  one, other = part_of((2, 2)).dataset, part_of((3,), seed=1).dataset
  one = dataclasses.replace(one, name="one", columns={"path": np.arange(4), "age": np.arange(4)})
  other = dataclasses.replace(other, name="two", columns={"path": np.arange(3)}, has_patient=None)
  both = join([one, other])
  np.testing.assert_array_equal(both.images, np.concatenate([one.images, other.images]))
  np.testing.assert_array_equal(both.labels, np.concatenate([one.labels, other.labels]))
  assert both.groups.tolist() == [f"0/{g}" for g in one.groups] + [f"1/{g}" for g in other.groups]
  assert both.has_patient.tolist() == [True] * 4 + [False] * 3
  assert (both.name, list(both.columns)) == ("one + two", ["path"])
  assert join([one]) is one
  with pytest.raises(ValueError, match="sources have different classes"):
    join([one, dataclasses.replace(other, label_names=("a", "c"))])
