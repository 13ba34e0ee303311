"""What may leave a site, and the floors of what a report tells."""

from __future__ import annotations

import dataclasses

from primia_jax import disclosure

from ..settings import setting


@dataclasses.dataclass(frozen=True)
class Disclosure:
  """Floors of what leaves a site and of what the report tells."""

  fewest_patients: int = setting(
    0,
    "fewest patients in a count of the report (images where patients are unknown); smaller counts, "
    "and scores and pictures that would tell them, are suppressed; 0 shows all",
  )
  fewest_sites: int = setting(
    0, "fewest sites in a sum; a run whose sums could be of fewer is refused"
  )
  fewest_images: int = setting(
    0, "fewest training images at each site; a site with fewer is refused"
  )

  def __post_init__(self):
    self.policy()

  def policy(self) -> disclosure.Policy:
    """The floors as the library takes them."""
    floors = self.fewest_patients, self.fewest_sites, self.fewest_images
    return disclosure.Policy(disclosure.KINDS, *floors)
