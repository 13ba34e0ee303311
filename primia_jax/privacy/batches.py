"""Which units a private step takes: Poisson batches from the site's secret, or one fixed cycle.

Units are examples, or patients with all of their rows. Poisson sampling amplifies privacy, and the
accountant knows no other sampling. A fixed cycle amplifies nothing, but bounds how often and how
close together a unit takes part, which correlated noise needs.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from primia_jax import local, prng
from primia_jax.privacy import sampling, subkeys
from primia_jax.types import Array, PyTree, Site

UNITS = ("example", "patient")
# Public: an order that mixes the classes of sorted images, the same at every start.
_ORDER = np.zeros(8, np.uint32)


def poisson(
  num_steps: int,
  sampling_rate: float,
  max_units: int,
  max_examples: int,
  *,
  unit: str = "example",
  rows_per_unit: int = 1,
) -> local.Steps:
  """Each unit enters each step independently (see `sampling`).

  Who learns what: nobody but the site learns which units a step takes, or how many, under the
  assumption that its secret is fresh and known to it alone.

  Args:
    num_steps: of a round, the same at all sites.
    sampling_rate: q; `sampling.effective_rate(q)` is what runs.
    max_units: the most units of a step; further ones are left out.
    max_examples: public bound on the examples of one site.
    unit: "example" or "patient".
    rows_per_unit: the most images of one patient at any site; more are left out.

  Raises:
    ValueError: for another unit, numbers below 1, or a rate outside (0, 1]; from `begin`, for a
      site without a secret, or without units where patients are the unit.
  """
  _check(unit, num_steps=num_steps, max_units=max_units, rows_per_unit=rows_per_unit)
  rate = sampling.effective_rate(sampling_rate)

  def begin(site: Site, now: local.Round) -> tuple[int, Callable[[Array, PyTree], Array]]:
    _check_units(unit, site)
    key = subkeys.of_sampling(site.secret)
    num_units, how = local.num_units(site), (site.images.shape[0], rate, max_units)

    def draw(t: Array, state: PyTree) -> Array:
      step = local.number_of(steps, now, t)
      if unit == "example":
        return sampling.poisson(key, step, num_units, *how).indices
      patients = _patients(site)
      drawn, _ = sampling.poisson_patients(key, step, patients, num_units, *how, rows_per_unit)
      return drawn.indices

    return num_steps, draw

  steps = local.Steps(num_steps, max_units, max_examples, begin)
  return steps


def cyclic(
  num_steps: int,
  batch_size: int,
  max_examples: int,
  *,
  unit: str = "example",
  rows_per_unit: int = 1,
) -> local.Steps:
  """Step t of a site takes the units at places t B, ..., t B + B - 1 of a public order that never
  changes, modulo its number of units.

  Steps are counted by the privatizer's state (`correlated.NoiseState`), so that a site that missed
  a round, or was lost in it, continues where it stopped.

  Args:
    num_steps: of a round, the same at all sites.
    batch_size: B.
    max_examples, unit, rows_per_unit: as in `poisson`.

  Raises:
    ValueError: for another unit or numbers below 1; while tracing, for a site without units where
      patients are the unit.
  """
  _check(unit, num_steps=num_steps, batch_size=batch_size, rows_per_unit=rows_per_unit)

  def begin(site: Site, now: local.Round) -> tuple[int, Callable[[Array, PyTree], Array]]:
    _check_units(unit, site)
    num_units, size = local.num_units(site), site.images.shape[0]

    def draw(t: Array, state: PyTree) -> Array:
      place = state.step * np.uint32(batch_size) + jnp.arange(batch_size, dtype=jnp.uint32)
      place = (place % jnp.maximum(num_units, 1).astype(jnp.uint32)).astype(jnp.int32)
      real = jnp.arange(size, dtype=jnp.int32) < num_units
      words = prng.bits(jnp.asarray(_ORDER), jnp.zeros(3, jnp.uint32), (size,))
      chosen = jnp.lexsort((words, ~real)).astype(jnp.int32)[place]
      if unit == "example":
        return chosen
      return sampling.rows_of(_patients(site), chosen, rows_per_unit)[0]

    return num_steps, draw

  return local.Steps(num_steps, batch_size, max_examples, begin)


def participation(num_steps: int, batch_size: int, min_units: int) -> tuple[int, int]:
  """How often `cyclic` takes a unit: the fewest steps between two uses, and the most uses.

  Args:
    num_steps: T, of the whole run.
    batch_size: B, units of a step.
    min_units: n, of the smallest site; larger sites use a unit less often.

  Returns:
    floor(n / B) and ceil(T B / n), which `strategies.banded` and `tree` take.

  Raises:
    ValueError: for a site that is smaller than a batch, or numbers below 1.
  """
  if min(num_steps, batch_size) < 1:
    raise ValueError(f"num_steps={num_steps} and batch_size={batch_size} must be at least 1")
  if min_units < batch_size:
    raise ValueError(
      f"the smallest site has {min_units} units, less than batch_size={batch_size}: a step would "
      f"take one of them twice; use batch_size={max(min_units, 1)} or less"
    )
  return min_units // batch_size, -(-num_steps * batch_size // min_units)


def _patients(site: Site) -> Array:
  if site.units is None:
    raise ValueError("unit='patient' needs the patient of each image: give Site.units")
  return site.units


def _check_units(unit: str, site: Site) -> None:
  if unit == "example" and site.units is not None:
    raise ValueError(
      "unit='example' and a site with units: its patients would be counted as its examples; leave "
      "Site.units None, or use unit='patient'"
    )


def _check(unit: str, **numbers: int) -> None:
  if unit not in UNITS:
    raise ValueError(f"unit={unit!r} is not one of {UNITS}")
  for name, value in numbers.items():
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
