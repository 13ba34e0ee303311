"""The clip of site updates: fixed, or following a quantile of their norms (Andrew et al. 2021,
"Differentially private learning with adaptive clipping", algorithm 1).

Each site reports, beside its clipped update, whether its norm was within the clip. The noised sum
of those bits moves the clip. Who learns what: the bits are a second release. Their noise must be
drawn where that of the updates is, e.g. by `distributed.encode` with `bit_noise`, and
`update_noise_multiplier` splits one noise multiplier between the two. What the server computes from
the noised sum, the clip included, costs nothing more.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.types import Array, PyTree

# A sum of bits that wrapped around would move the clip far; one number costs no room.
_STDDEVS_OF_BIT = 8.0


@dataclasses.dataclass(frozen=True)
class Clip:
  """How the clip begins and moves.

  Attributes:
    l2_clip_norm: of the first round.
    target_quantile: the share of sites whose norm shall be within the clip; None for a fixed clip.
    learning_rate: a round multiplies the clip by exp(-learning_rate * (share within -
      target_quantile)).
    count_stddev: sigma_b, of the noise in the sum of bits, or in each bit where sites add noise
      each by itself; num_sites / 20 in the sum is what Andrew et al. use, for hundreds of sites.
  """

  l2_clip_norm: float
  target_quantile: float | None = None
  learning_rate: float = 0.2
  count_stddev: float | None = None

  def __post_init__(self):
    if not 0 < self.l2_clip_norm < math.inf:
      raise ValueError(f"l2_clip_norm={self.l2_clip_norm} must be positive and finite")
    if self.target_quantile is None:
      return
    if not 0 < self.target_quantile < 1:
      raise ValueError(
        f"target_quantile={self.target_quantile} must lie between 0 and 1, e.g. 0.5; None for a "
        f"fixed clip"
      )
    if not 0 < self.learning_rate < math.inf:
      raise ValueError(f"learning_rate={self.learning_rate} must be positive and finite, e.g. 0.2")
    if self.count_stddev is None or not 0 < self.count_stddev < math.inf:
      raise ValueError(
        f"count_stddev={self.count_stddev}: the number of sites within the clip is released too "
        f"and needs noise; give a positive number, e.g. num_sites / 20"
      )


class ClipState(NamedTuple):
  """The clip of the next round; public.

  Attributes:
    l2_clip_norm: float32 scalar.
  """

  l2_clip_norm: Array


def init(config: Clip) -> ClipState:
  """The state before the first round."""
  return ClipState(jnp.asarray(config.l2_clip_norm, jnp.float32))


def clip_update(tree: PyTree, l2_clip_norm: Array | float) -> tuple[PyTree, Array]:
  """Scales an update down to a norm of at most l2_clip_norm (up to 1e-4 of it: mechanisms clip
  again, strictly).

  Args:
    tree: a pytree of float arrays.
    l2_clip_norm: positive, may be traced.

  Returns:
    The update, and whether its norm was within the clip: a bool scalar, as secret as the update. An
    update that is not finite becomes 0, and counts as beyond the clip.
  """
  squares = [jnp.sum(jnp.square(a.astype(jnp.float32))) for a in jax.tree.leaves(tree)]
  norm, clip = jnp.sqrt(jnp.sum(jnp.stack(squares))), jnp.asarray(l2_clip_norm, jnp.float32)
  factor = jnp.minimum(1.0, clip / jnp.where(norm > 0, norm, 1.0))
  finite = jnp.isfinite(norm)
  clipped = jax.tree.map(
    lambda a: jnp.where(finite, a * factor.astype(a.dtype), jnp.zeros_like(a)), tree
  )
  return clipped, norm <= clip


def centred(was_below: Array) -> Array:
  """The bit less 1/2, float32: a site then changes the sum by 1/2 at most, against a report of 0 in
  its place.
  """
  return was_below.astype(jnp.float32) - np.float32(0.5)


def update(config: Clip, state: ClipState, noised_sum: Array, num_sites: int | Array) -> ClipState:
  """The clip after a round.

  Args:
    config: see `Clip`.
    state: of this round.
    noised_sum: float32 scalar, the sum over sites of `centred` bits plus noise of standard
      deviation count_stddev; not looked at where the clip is fixed.
    num_sites: in the sum.

  Returns:
    The next state: l2_clip_norm * exp(-learning_rate * (b - target_quantile)), with the noised
    share b taken as it is.
  """
  if config.target_quantile is None:
    return state
  share = noised_sum / jnp.asarray(num_sites, jnp.float32) + np.float32(0.5)
  step = np.float32(config.learning_rate) * (share - np.float32(config.target_quantile))
  return ClipState(state.l2_clip_norm * jnp.exp(-step))


def update_noise_multiplier(noise_multiplier: float, config: Clip) -> float:
  """What is left for the updates, z_D = (z^-2 - (2 sigma_b)^-2)^(-1/2), so that both releases cost
  z together.

  Andrew et al. 2021, theorem 1. A fixed clip leaves all.

  Raises:
    ValueError: where the bits alone cost more than z.
  """
  if config.target_quantile is None:
    return noise_multiplier
  assert config.count_stddev is not None
  if 2 * config.count_stddev <= noise_multiplier:
    raise ValueError(
      f"count_stddev={config.count_stddev} must be more than noise_multiplier / 2 = "
      f"{noise_multiplier / 2}: the bits alone would cost more than is allowed"
    )
  return (noise_multiplier**-2 - (2 * config.count_stddev) ** -2) ** -0.5


def bit_noise(config: DistributedNoise, clip: Clip) -> DistributedNoise:
  """The noise of the bits that move a clip, beside that of updates: of the same sites, in the same
  ring.

  Its standard deviation in a sum of the fewest sites is `Clip.count_stddev`.

  Raises:
    ValueError: for a clip that is fixed, or updates' noise that is not made for updates divided by
      the clip.
  """
  if clip.target_quantile is None or clip.count_stddev is None:
    raise ValueError("a fixed clip sends no bits; give Clip a target_quantile")
  if config.l2_clip_norm != 1:
    raise ValueError(
      f"l2_clip_norm={config.l2_clip_norm} of the noise: updates are divided by a clip that moves; "
      f"use l2_clip_norm=1"
    )
  return dataclasses.replace(
    config,
    dim=1,
    l2_clip_norm=0.5,
    noise_multiplier=2 * clip.count_stddev,
    num_stddevs=_STDDEVS_OF_BIT,
  )
