"""Poisson sampling from a site's secret: units enter each step independently, in static shapes.

Amplification by sampling needs a secret batch, and for every unit a draw that is independent of
other units' and other steps' draws. Both hold for whoever lacks the secret, under the assumption
that ChaCha20 is a pseudorandom function. So the secret, the indices and the counts returned here
stay at the site. A unit is an example, or a patient with all of its rows. Rates are multiples of
2^-32, see `effective_rate`; a unit is drawn with exactly that probability.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from primia_jax import prng
from primia_jax.privacy import subkeys
from primia_jax.types import Array


class Drawn(NamedTuple):
  """The units of one step. Never leaves the site.

  Attributes:
    indices: [max_units] int32 into the site's units, or [max_units, rows_per_unit] into its rows:
      the drawn ones first, in rising order, then -1 for padding.
    overflow: int32, units that were drawn but found no place. The probability of any belongs in
      delta, see `overflow_probability`.
  """

  indices: Array
  overflow: Array


def effective_rate(sampling_rate: float) -> float:
  """The rate that `poisson` really has: `sampling_rate` rounded up to a multiple of 2^-32. Account
  for this one.

  Raises:
    ValueError: for a rate outside (0, 1].
  """
  if not 0 < sampling_rate <= 1:
    raise ValueError(f"sampling_rate={sampling_rate} must lie in (0, 1]")
  return math.ceil(sampling_rate * 2**32) / 2**32


def poisson(
  secret: Array,
  step: int | Array,
  num_units: int | Array,
  max_examples: int,
  sampling_rate: float,
  max_units: int,
) -> Drawn:
  """Draws each of a site's units independently.

  Args:
    secret: [8] uint32, known to the site alone.
    step: int32 or uint32 scalar, never used twice with this secret.
    num_units: int32 scalar n.
    max_examples: public bound on n, of any site.
    sampling_rate: q in (0, 1]; `effective_rate(q)` is what runs.
    max_units: rows of the result.

  Returns:
    Drawn, with indices [max_units]. Where more are drawn, the last are left out and counted.

  Raises:
    ValueError: for a rate outside (0, 1], a bound below 1, or a number of units that is known to be
      above its bound.
  """
  threshold = round(effective_rate(sampling_rate) * 2**32)
  if max_examples < 1 or max_units < 1:
    raise ValueError(f"max_examples={max_examples} and max_units={max_units} must be at least 1")
  if not isinstance(num_units, jax.core.Tracer) and not 0 <= int(num_units) <= max_examples:
    raise ValueError(
      f"num_units={num_units} is not in [0, max_examples={max_examples}]; raise max_examples"
    )
  nonce = jnp.stack([jnp.asarray(step).astype(jnp.uint32), jnp.uint32(0), jnp.uint32(0)])
  words = prng.bits(prng.derive(secret, subkeys.POISSON), nonce, (max_examples,))
  drawn = (words <= np.uint32(threshold - 1)) & (
    jnp.arange(max_examples, dtype=jnp.int32) < num_units
  )
  place = jnp.cumsum(drawn, dtype=jnp.int32) - 1
  place = jnp.where(drawn, place, max_units)  # beyond the last row: dropped
  empty = jnp.full(max_units, -1, jnp.int32)
  index = empty.at[place].set(jnp.arange(max_examples, dtype=jnp.int32), mode="drop")
  return Drawn(index, jnp.maximum(jnp.sum(drawn, dtype=jnp.int32) - max_units, 0))


def rows_of(unit_of_row: Array, units: Array, rows_per_unit: int) -> tuple[Array, Array]:
  """Lays the rows of some units side by side.

  Args:
    unit_of_row: [N] int32, the number of each row's unit, e.g. patient; -1 for rows that are
      padding.
    units: [U] int32 numbers of units, -1 for none.
    rows_per_unit: R, the most rows of one unit.

  Returns:
    index: [U, R] int32 into the rows, each unit's in rising order, -1 where it has fewer.
    left_out: int32, rows beyond the first R of their unit. Privacy does not depend on R, since
      clipping bounds the whole unit; but those rows are never learnt from, so take R from
      `max_rows`.
  """
  if rows_per_unit < 1:
    raise ValueError(f"rows_per_unit={rows_per_unit} must be at least 1")
  order = jnp.argsort(unit_of_row, stable=True).astype(jnp.int32)
  ranked = unit_of_row[order]
  first, last = (
    jnp.searchsorted(ranked, units, side=side).astype(jnp.int32) for side in ("left", "right")
  )
  position = first[:, None] + jnp.arange(rows_per_unit, dtype=jnp.int32)[None, :]
  used = (position < last[:, None]) & (units >= 0)[:, None]
  left_out = jnp.sum(
    jnp.where(units >= 0, jnp.maximum(last - first - rows_per_unit, 0), 0), dtype=jnp.int32
  )
  return jnp.where(used, order[jnp.minimum(position, len(order) - 1)], -1), left_out


def max_rows(unit_of_row: np.ndarray) -> int:
  """The most rows of one unit, counted on the host; rows of unit -1 are padding. It becomes public
  when sites share it.
  """
  real = np.asarray(unit_of_row)
  real = real[real >= 0]
  return int(np.bincount(real).max()) if real.size else 1


def poisson_patients(
  secret: Array,
  step: int | Array,
  unit_of_row: Array,
  num_units: int | Array,
  max_examples: int,
  sampling_rate: float,
  max_units: int,
  rows_per_unit: int,
) -> tuple[Drawn, Array]:
  """`poisson` over patients, each with its rows: (Drawn with indices [max_units, rows_per_unit],
  rows left out).

  Args:
    unit_of_row: as in `rows_of`; patients are numbered from 0 to num_units - 1.
    max_examples: public bound on the number of patients.
    rows_per_unit: as in `rows_of`.
  """
  drawn = poisson(secret, step, num_units, max_examples, sampling_rate, max_units)
  index, left_out = rows_of(unit_of_row, drawn.indices, rows_per_unit)
  return Drawn(index, drawn.overflow), left_out


def capacity(
  max_examples: int, sampling_rate: float, num_steps: int, failure: float = 1e-12
) -> int:
  """The smallest `max_units` with which all batches of a run fit with probability 1 - failure.

  Args:
    max_examples: the most units of any site.
    sampling_rate: q; `effective_rate(q)` counts.
    num_steps: of the run.
    failure: what the union bound over steps may reach; the accountant adds it to delta.

  Raises:
    ValueError: for a rate outside (0, 1], a failure outside (0, 1), or counts below 1.
  """
  _check_run(max_examples, num_steps)
  if not 0 < failure < 1:
    raise ValueError(f"failure={failure} must lie in (0, 1)")
  rate = effective_rate(sampling_rate)
  fits = lambda m: num_steps * scipy.stats.binom.sf(m, max_examples, rate) <= failure
  low, high = 0, max_examples  # the sampler draws at most `max_examples`, so `high` always fits
  while low < high:
    middle = (low + high) // 2
    low, high = (low, middle) if fits(middle) else (middle + 1, high)
  return max(high, 1)


def overflow_probability(
  max_units: int, max_examples: int, sampling_rate: float, num_steps: int
) -> float:
  """A bound on the probability that any step of a run draws more than `max_units`; the accountant
  adds it to delta.
  """
  _check_run(max_examples, num_steps)
  rate = effective_rate(sampling_rate)
  return min(1.0, num_steps * float(scipy.stats.binom.sf(max_units, max_examples, rate)))


def _check_run(max_examples: int, num_steps: int) -> None:
  if max_examples < 1 or num_steps < 1:
    raise ValueError(f"max_examples={max_examples} and num_steps={num_steps} must be at least 1")
