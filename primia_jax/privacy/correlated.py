"""Correlated noise (DP-FTRL) step by step, for sites that cannot sample: units take part at steps
that are known to lie apart.

A model learns from prefix sums of its gradients, so noise that cancels from step to step costs less
accuracy than fresh noise. The noise of step t is row t of C^-1 Z, with Gaussian Z and the matrix C
of one of the `strategies`. Its state is b - 1 earlier vectors for `banded`, and for `tree` a vector
for each level (log2 of the steps of a tree).

All of it is integers, and all that is released is a function of C X + Z, to the last bit. X, the
sums of rounded gradients, and Z (`noise`) lie on one grid. For `tree`, C holds zeros and ones, and
a node's estimate is its children's plus the rounded share of what it differs from them. For
`banded`, C holds multiples of 1/64, Z lies on a grid 64 times as fine as X, and what step t
releases is Y_t = round(V_t - sum_j c_j Y_(t-j)) with V = C X + Z. This is X_t plus the integer
round(Z_t - sum_j c_j N_(t-j)), which is drawn here, where N = Y - X is the noise of earlier steps.

Who learns what: whoever sees every noisy sum of the run learns about one unit what a single
Gaussian mechanism of `noise_multiplier` tells. The ledger is charged for that: once for the run,
nothing for a step. Adjacent data have a unit, or zeros in place of its gradients; for replaced
units double the sensitivity. This assumes that a unit's gradient is clipped to `l2_clip_norm`, and
that its steps are at least `min_separation` apart and at most `max_participations`. Batches in one
fixed order satisfy that; shuffling each epoch anew does NOT. No amplification by sampling is
claimed. No step may be released twice, as by two runs from one checkpoint, unless the ledger is
charged again. The state holds noise and must never leave the site.

The secret may change from step to step: each step draws fresh numbers from it, and the state alone
holds what later steps need of earlier draws.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from primia_jax import prng
from primia_jax.privacy import grid, noise, subkeys
from primia_jax.privacy.grid import Grid
from primia_jax.privacy.strategies import (
  FRACTION,
  BandedNoise,
  Config,
  TreeNoise,
  largest_noise,
  level_variances,
  stddev,
)
from primia_jax.types import Array, PyTree

# (key [8] uint32, step uint32, like, level) -> the two digits of independent noise of like's
# shapes, never the same for another step
NoiseFn = Callable[[Array, Array, PyTree, int], tuple[PyTree, PyTree]]


class NoiseState(NamedTuple):
  """What one step hands to the next; secret.

  Attributes:
    step: uint32, the step that comes next.
    rows: the gradient's pytree with a leading axis, int32 in grid steps: the noise of the last b -
      1 steps in a ring, or one vector for each level.
  """

  step: Array
  rows: PyTree


def fraction(config: Config) -> int:
  """How much finer the grid of Z is than that of the sums."""
  return FRACTION if isinstance(config, BandedNoise) else 1


def grid_of(config: Config) -> Callable[..., Grid]:
  """`grid.choose` for this noise: (dim, max_units=1) -> Grid."""
  multiplier, finer = stddev(config) / config.l2_clip_norm, fraction(config)
  return lambda dim, max_units=1: grid.choose(
    dim, multiplier, max_units, fraction=finer, num_draws=largest_noise(config)
  )


def init(config: Config, like: PyTree) -> NoiseState:
  """The state before the first step.

  Args:
    config: the noise.
    like: arrays of the gradient's shapes.
  """
  num_rows = (
    len(config.coefficients) - 1
    if isinstance(config, BandedNoise)
    else config.restart_every.bit_length()
  )
  num_rows = max(1, num_rows)  # one band needs none, but checkpoints hold no empty arrays
  zeros = lambda leaf: jnp.zeros((num_rows, *leaf.shape), jnp.int32)
  return NoiseState(jnp.zeros((), jnp.uint32), jax.tree.map(zeros, like))


def next_noise(
  config: Config,
  state: NoiseState,
  secret: Array,
  step: int | Array,
  level: int,
  noise_fn: NoiseFn = noise.digits_like,
) -> tuple[PyTree, NoiseState]:
  """The noise to add to this step's sum of clipped gradients (to the sum, not to the mean).

  Steps come once each, in order, from 0 to num_steps - 1; the ledger is charged for these.

  Args:
    config: the noise; static under jit.
    state: from `init` or the step before.
    secret: [8] uint32; it may also serve `sampling` and `noise`, which derive other subkeys
      (`subkeys`). No step comes twice with one secret.
    step: uint32 scalar, equal to that of the state.
    level: that of the sums' grid, from `grid_of`; static.
    noise_fn: independent Gaussian noise from a cryptographic generator, see `NoiseFn`.

  Returns:
    int32 noise of the gradient's shapes, in grid steps, and the next state.

  Raises:
    ValueError: for a step out of turn, where neither it nor the state is traced.
  """
  step = jnp.asarray(step, jnp.uint32)
  known = not any(isinstance(a, jax.core.Tracer) for a in (step, state.step))
  if known and not int(step) == int(state.step) < config.num_steps:
    raise ValueError(f"step={step} out of turn: step {state.step} of {config.num_steps} comes next")
  like = jax.tree.map(lambda rows: rows[0], state.rows)
  draw = lambda of_level: noise_fn(
    prng.derive(secret, subkeys.CORRELATED, of_level), step, like, level
  )
  shift = noise.shift(level)
  if isinstance(config, BandedNoise):
    drawn, rows = _next_banded(config, draw, shift, state.rows, step)
  else:
    drawn, rows = _next_tree(config, draw, shift, state.rows, step)
  return drawn, NoiseState(state.step + np.uint32(1), rows)


def _next_banded(
  config: BandedNoise, draw: Callable, shift: int, rows: PyTree, step: Array
) -> tuple[PyTree, PyTree]:
  """Forward substitution: n_t = round(z_t - sum_j c_j n_(t-j)), in two digits of integers."""
  width, bits = len(config.coefficients) - 1, FRACTION.bit_length() - 1
  ring = np.uint32(max(width, 1))
  slot = step % ring  # where n_(t - width) makes place for n_t
  age = (slot + ring - np.uint32(1) - jnp.arange(width, dtype=jnp.uint32)) % ring
  by_age = np.rint(np.array(config.coefficients[1:]) * FRACTION).astype(np.int32)
  weights = jnp.asarray(by_age)[age.astype(jnp.int32)]

  def new(high: Array, low: Array, earlier: Array) -> Array:
    """The digits of 64 times z_t less the earlier noise, and their rounded 64th."""
    for j in range(width):
      high = high - weights[j] * (earlier[j] >> shift)
      low = low - weights[j] * (earlier[j] & (2**shift - 1))
    if shift < bits:  # coarse noise, whose digits fit one number together
      return ((high << shift) + low + FRACTION // 2) >> bits
    return (high << (shift - bits)) + ((low + FRACTION // 2) >> bits)

  drawn = jax.tree.map(new, *draw(0), rows)
  if width:
    rows = jax.tree.map(lambda u, a: u.at[slot.astype(jnp.int32)].set(a), rows, drawn)
  return drawn, rows


def _next_tree(
  config: TreeNoise, draw: Callable, shift: int, rows: PyTree, step: Array
) -> tuple[PyTree, PyTree]:
  """The nodes that a prefix is made of after this step, less those before it.

  The subtrees of a prefix of n steps are the ones in the binary digits of n. Step n completes one
  node at each level up to the number of trailing ones of n, and the top one takes the place of
  those below.
  """
  within = step % np.uint32(config.restart_every)
  top = lax.population_count(within & ~(within + np.uint32(1))).astype(jnp.int32)
  variances = jnp.asarray(level_variances(config), jnp.float32)
  whole = lambda of_level: jax.tree.map(lambda high, low: (high << shift) + low, *draw(of_level))

  def merge(level: Array, carry):
    node, replaced = carry
    left = jax.tree.map(lambda u: u[level], rows)
    if (
      config.honaker
    ):  # by inverse variance; a node's own share is then the variance of the estimate
      own = variances[level + 1]

      def mix(z: Array, a: Array, b: Array) -> Array:
        below = a + b  # any function of the difference is one of what the tree would release
        return below + jnp.rint(own * (z - below).astype(jnp.float32)).astype(jnp.int32)

      node = jax.tree.map(mix, whole((level + 1).astype(jnp.uint32)), left, node)
    return node, jax.tree.map(jnp.add, replaced, left)

  leaf = whole(jnp.uint32(0)) if config.honaker else whole(top.astype(jnp.uint32))
  node, replaced = lax.fori_loop(0, top, merge, (leaf, jax.tree.map(jnp.zeros_like, leaf)))
  rows = jax.tree.map(lambda u, a: u.at[top].set(a), rows, node)
  return jax.tree.map(jnp.subtract, node, replaced), rows
