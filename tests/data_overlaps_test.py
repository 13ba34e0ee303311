"""Patients and images at two places, and dealing that never parts copies."""

import numpy as np

from primia_jax.data import overlaps, partition, scan
from primia_jax.data.dataset import Dataset


def made(pixels, patients=None):
  num = len(pixels)
  paths = np.array([f"{i}.png" for i in range(num)])
  groups = np.array([p or path for p, path in zip(patients or [""] * num, paths, strict=True)])
  known = np.array([bool(p) for p in patients or [""] * num])
  columns = {"path": paths, scan.PIXELS: np.array(list(pixels), "S32")}
  images, labels = np.zeros((num, 1, 1, 1), np.uint8), np.arange(num, dtype=np.int32) % 2
  return Dataset(images, labels, ("a", "b"), groups, columns, "these", known)


def test_patients_and_images_at_two_places_are_found():
  found = overlaps.between([made("abca", ["p", "p", "q", ""]), made("xcz", ["q", "q", "r"])])
  assert found.patients == ["q"]
  assert found.images == [("2.png", "1.png")]
  # the same path of an unknown patient is no patient
  assert overlaps.between([made("ab"), made("cd")]) == overlaps.Overlap([], [])


def test_copies_are_never_parted_when_images_are_dealt():
  pixels = "abcdefghijklmnopqrst" + "aabbc"
  data = made(pixels, ["" if i % 3 else f"p{i % 4}" for i in range(25)])
  assert overlaps.repeated(data) == 5
  tied = overlaps.tied(data)
  for seed in range(20):
    parts = partition.iid(tied, 3, seed)
    held = partition.hold_out(tied, 0.3, seed)
    for sets in (parts, held):
      for column in (data.columns[scan.PIXELS], data.groups):
        several = [set(column[index]) for index in sets]
        assert sum(map(len, several)) == len(set.union(*several))


def test_data_without_copies_are_dealt_as_before():
  data = made("abcdefgh", ["p", "p", "q", "", "", "", "r", "r"])
  assert overlaps.tied(data) is data
  bare = Dataset(data.images, data.labels, data.label_names, data.groups)
  assert overlaps.tied(bare) is bare
  assert overlaps.between([bare, bare]) == overlaps.Overlap([], [])
