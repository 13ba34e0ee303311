"""What sites apart tell each other of their images: how many there are, and of which classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from primia_jax.data.sites import Part

from .inputs import Inputs, check_validation, count_patients


def told(inputs: Inputs, site: int, most_images: int, fewest_patients: int = 0) -> bytes:
  """What a site's process tells all others of its images, and of its floor of patients in a count.

  Raises:
    ValueError: they are more than agreed, so that the others would refuse this site.
  """
  ((patients, most),) = count_patients(Part(inputs.train.dataset, (inputs.train.sites[site],)))
  sizes = inputs.train.sizes[site], inputs.validation.sizes[site]
  if max(sizes) > most_images:
    raise ValueError(
      f"most_images={most_images}: this site has {sizes[0]} images to train on and {sizes[1]} to "
      "validate on; raise it at all sites, or give this one fewer"
    )
  floor = min(fewest_patients, most_images)  # above it every count is hidden, too
  return json.dumps([*sizes, patients, most, floor, *inputs.train.dataset.label_names]).encode()


def largest_floor(said: Mapping[int, bytes]) -> int:
  """The largest floor of patients of all sites, of what `with_others` has taken."""
  return max(int(json.loads(one)[4]) for one in said.values())


def with_others(
  inputs: Inputs, site: int, said: Mapping[int, bytes], most_images: int, validates: bool = True
) -> Inputs:
  """The inputs of a process that has read its own site only, with the sizes that the others have
  told; their images stay out of reach. Sites need validation images if the run `validates`.

  What a site tells decides how much room and work each step is at all sites, and what its update
  weighs. So no number may be beyond what all have agreed, and they must go together.

  Raises:
    ValueError: a site has other classes or more than `most_images`, or tells what cannot be.
  """
  names_here, told_sizes, patients = list(inputs.train.dataset.label_names), [], []
  for i in sorted(said):
    try:
      told_here = json.loads(said[i])
      train, validation, units, most, floor = counts = [int(n) for n in told_here[:5]]
      if min(counts) < 0 or not bool(train) == bool(units) == bool(most):
        raise ValueError(f"it says {counts}")
      if train and not max(units, most) + min(units, most) - 1 <= train <= units * most:
        raise ValueError(f"it says {train} images, of {units} patients with {most} at most")
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
      raise ValueError(f"site {i} has not told how many images it has ({error})") from error
    if (largest := max(train, validation)) > most_images:
      raise ValueError(
        f"site {i} says that it has {largest} images, and most_images={most_images}; raise it at "
        "all sites if that is true, or have the coordinator make a roster without that site"
      )
    if floor > most_images:
      raise ValueError(
        f"site {i} says that it hides counts of fewer than {floor} patients, and "
        f"most_images={most_images}; that would hide every count"
      )
    if told_here[5:] != names_here:
      raise ValueError(
        f"site {i} has the classes {told_here[5:]}, and site {site} {names_here}; give all of them "
        "in --label_names"
      )
    told_sizes.append((train, validation))
    patients.append((units, most))

  def known(part: Part, sizes: Sequence[int]) -> Part:
    beyond = lambda n: len(part.dataset) + np.arange(n)
    rows = [part.sites[site] if i == site else beyond(n) for i, n in enumerate(sizes)]
    return Part(part.dataset, tuple(rows))

  of_training, of_validation = zip(*told_sizes, strict=True)
  parts = known(inputs.train, of_training), known(inputs.validation, of_validation)
  out = Inputs(*parts, inputs.test, tuple(patients))
  check_validation(out, validates)
  return out
