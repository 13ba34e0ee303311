"""Robust aggregation: rules that bound the influence of a few bad sites.

A rule takes the messages of K sites, stacked on a leading axis, and returns one message. All sites
count the same. The server sees each site's message in the clear, so rules cannot be combined with
secure aggregation, where it sees only the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from primia_jax.types import Array, PyTree

Rule = Callable[[PyTree], PyTree]


def median() -> Rule:
  """The coordinate-wise median (Yin et al. 2018, definition 1). For even K it is the mean of the
  two middle values. NaN counts as the largest value.
  """

  def of(m: Array) -> Array:
    ordered = jnp.sort(m, axis=0)  # `jnp.median` would pass on one site's NaN
    return (ordered[(len(m) - 1) // 2] + ordered[len(m) // 2]) / 2

  return lambda messages: jax.tree.map(of, messages)


def trimmed_mean(fraction: float) -> Rule:
  """The coordinate-wise mean without the ceil(fraction K) largest and smallest values (Yin et al.
  2018, definition 2).

  Raises:
    ValueError: the fraction is outside [0, 1/2); or, when the rule is called, there are too few
      sites to keep any value.
  """
  if not 0 <= fraction < 0.5:
    raise ValueError(f"fraction={fraction} must lie in [0, 0.5)")

  def rule(messages: PyTree) -> PyTree:
    num_sites = jax.tree.leaves(messages)[0].shape[0]
    cut = math.ceil(fraction * num_sites)
    if 2 * cut >= num_sites:
      raise ValueError(
        f"fraction={fraction} removes {cut} of {num_sites} sites at each end, which leaves none; "
        "lower it"
      )
    return jax.tree.map(
      lambda m: jnp.mean(jnp.sort(m, axis=0)[cut : num_sites - cut], axis=0), messages
    )

  return rule


def krum(
  num_byzantine: int, num_kept: int = 1, part: Callable[[PyTree], PyTree] = lambda m: m["update"]
) -> Rule:
  """Krum, or Multi-Krum for num_kept > 1 (Blanchard et al. 2017, section 4).

  A site's score is the sum of the squared distances to its K - num_byzantine - 2 nearest
  neighbours. The result is the mean of the `num_kept` messages with the lowest scores.

  Args:
    num_byzantine: how many sites may send arbitrary messages.
    num_kept: how many messages are averaged.
    part: message -> the part whose distances are measured: by default the update, without training
      loss and counts.

  Raises:
    ValueError: an argument is out of range; or the rule is called on K <= 2 num_byzantine + 2
      sites, where it guarantees nothing.
  """
  if num_byzantine < 0 or num_kept < 1:
    raise ValueError(
      f"num_byzantine={num_byzantine} must be at least 0 and num_kept={num_kept} at least 1"
    )

  def rule(messages: PyTree) -> PyTree:
    num_sites = jax.tree.leaves(messages)[0].shape[0]
    if num_sites <= 2 * num_byzantine + 2 or num_kept > num_sites - num_byzantine:
      raise ValueError(
        f"Krum with num_byzantine={num_byzantine} and num_kept={num_kept} needs more than "
        f"{2 * num_byzantine + 2} sites and at least {num_byzantine + num_kept}; got {num_sites}"
      )
    flat = jnp.concatenate(
      [m.reshape(num_sites, -1) for m in jax.tree.leaves(part(messages))], axis=1
    )
    distances = jax.lax.map(lambda row: jnp.sum((flat - row[None]) ** 2, axis=1), flat)
    # From 1, since the nearest message is the site's own.
    near = jnp.sort(distances, axis=1)[:, 1 : num_sites - num_byzantine - 1]
    kept = jnp.argsort(jnp.sum(near, axis=1))[:num_kept]
    return jax.tree.map(lambda m: jnp.mean(m[kept], axis=0), messages)

  return rule
