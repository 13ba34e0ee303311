"""What sites apart tell each other of their images: how many there are, and of which classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from primia_jax.data.sites import Part

from .inputs import Inputs, check_sizes, count_patients

_MOST_IMAGES = 10_000_000  # that a site may say it has


def told(inputs: Inputs, site: int) -> bytes:
  """What a site's process tells all others of its images."""
  ((patients, most),) = count_patients(Part(inputs.train.dataset, (inputs.train.sites[site],)))
  sizes = inputs.train.sizes[site], inputs.validation.sizes[site]
  return json.dumps([*sizes, patients, most, *inputs.train.dataset.label_names]).encode()


def with_others(
  inputs: Inputs, site: int, said: Mapping[int, bytes], validates: bool = True
) -> Inputs:
  """The inputs of a process that has read its own site only, with the sizes that the others have
  told; their images stay out of reach. Sites need validation images if the run `validates`.

  Raises:
    ValueError: a site has other classes, or no images, or has told something else.
  """
  names_here, told_sizes, patients = list(inputs.train.dataset.label_names), [], []
  for i in sorted(said):
    try:
      told_here = json.loads(said[i])
      train, validation, units, most = counts = [int(n) for n in told_here[:4]]
      if not 0 <= min(counts) <= max(counts) <= _MOST_IMAGES:  # others make room for as many
        raise ValueError(f"it says {counts}")
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
      raise ValueError(f"site {i} has not told how many images it has ({error})") from error
    if told_here[4:] != names_here:
      raise ValueError(
        f"site {i} has the classes {told_here[4:]}, and site {site} {names_here}; give all of them "
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
  check_sizes(out, validates)
  return out
