"""Correlated noise (DP-FTRL) step by step, for sites that cannot sample: units take part at steps
that are known to lie apart.

A model learns from prefix sums of its gradients, so noise that cancels from step to step costs less
accuracy than fresh noise. The noise of step t is row t of C^-1 Z, with standard normal Z and the
matrix C of one of the `strategies`. Its state is b - 1 earlier vectors for `banded`, and for `tree`
a vector for each level (log2 of the steps of a tree).

Who learns what: whoever sees every noisy sum of the run learns about one unit what a single
Gaussian mechanism of `noise_multiplier` tells. The ledger is charged for that: once for the run,
nothing for a step. Adjacent data have a unit, or zeros in place of its gradients; for replaced
units double the sensitivity. This assumes that a unit's gradient is clipped to `l2_clip_norm`, and
that its steps are at least `min_separation` apart and at most `max_participations`. Batches in one
fixed order satisfy that; shuffling each epoch anew does NOT. No amplification by sampling is
claimed. No step may be released twice, as by two runs from one checkpoint, unless the ledger is
charged again. The state holds noise and must never leave the site. The noise is rounded to float32;
the claim is that of real numbers.

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
from primia_jax.privacy import noise, subkeys
from primia_jax.privacy.strategies import (
  BandedNoise,
  Config,
  TreeNoise,
  level_variances,
  shortened_norms,
  stddev,
)
from primia_jax.types import Array, PyTree

# (key [8] uint32, step uint32, like, stddev) -> independent Gaussians of like's shapes, never the
# same for another step
NoiseFn = Callable[[Array, Array, PyTree, float], PyTree]


class NoiseState(NamedTuple):
  """What one step hands to the next; secret.

  Attributes:
    step: uint32, the step that comes next.
    rows: the gradient's pytree with a leading axis, float32: the last b - 1 vectors in a ring, or
      one for each level.
  """

  step: Array
  rows: PyTree


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
  zeros = lambda leaf: jnp.zeros((num_rows, *leaf.shape), jnp.float32)
  return NoiseState(jnp.zeros((), jnp.uint32), jax.tree.map(zeros, like))


def next_noise(
  config: Config,
  state: NoiseState,
  secret: Array,
  step: int | Array,
  noise_fn: NoiseFn = noise.gaussian_like,
) -> tuple[PyTree, NoiseState]:
  """The noise to add to this step's sum of clipped gradients (to the sum, not to the mean).

  Steps come once each, in order, from 0 to num_steps - 1; the ledger is charged for these. Out of
  turn the noise is NaN, so that a mistake releases nothing.

  Args:
    config: the noise; static under jit.
    state: from `init` or the step before.
    secret: [8] uint32; it may also serve `sampling` and `noise`, which derive other subkeys
      (`subkeys`). No step comes twice with one secret.
    step: uint32 scalar.
    noise_fn: independent Gaussian noise from a cryptographic generator, see `NoiseFn`.

  Returns:
    float32 noise of the gradient's shapes, and the next state.

  Raises:
    ValueError: for a step out of turn, where neither it nor the state is traced.
  """
  step = jnp.asarray(step, jnp.uint32)
  known = not any(isinstance(a, jax.core.Tracer) for a in (step, state.step))
  if known and not int(step) == int(state.step) < config.num_steps:
    raise ValueError(f"step={step} out of turn: step {state.step} of {config.num_steps} comes next")
  like = jax.tree.map(lambda rows: jnp.zeros(rows.shape[1:], jnp.float32), state.rows)
  draw = lambda level: noise_fn(
    prng.derive(secret, subkeys.CORRELATED, level), step, like, stddev(config)
  )
  if isinstance(config, BandedNoise):
    drawn, rows = _next_banded(config, draw, state.rows, step)
  else:
    drawn, rows = _next_tree(config, draw, state.rows, step)
  in_turn = (step == state.step) & (step < np.uint32(config.num_steps))
  drawn = jax.tree.map(lambda n: jnp.where(in_turn, n, jnp.nan), drawn)
  return drawn, NoiseState(state.step + np.uint32(1), rows)


def _next_banded(
  config: BandedNoise, draw: Callable, rows: PyTree, step: Array
) -> tuple[PyTree, PyTree]:
  """Forward substitution: u_t = (z_t - sum_j c_j u_(t-j)) / c_0, and the noise is u_t times the
  norm of column t.
  """
  c, width = np.array(config.coefficients), len(config.coefficients) - 1
  below = jnp.minimum(
    np.uint32(config.num_steps - 1) - step, np.uint32(width)
  )  # entries of the column
  norm = jnp.asarray(shortened_norms(config.coefficients), jnp.float32)[below.astype(jnp.int32)]
  z = jax.tree.map(lambda a: a / np.float32(c[0]), draw(0))
  if not width:
    return jax.tree.map(lambda a: a * norm, z), rows
  slot = step % np.uint32(width)  # where u_(t - width) makes place for u_t
  age = (slot + np.uint32(width - 1) - jnp.arange(width, dtype=jnp.uint32)) % np.uint32(width)
  weights = jnp.asarray(c[1:] / c[0], jnp.float32)[age.astype(jnp.int32)]
  earlier = lambda u: jnp.tensordot(weights, u, 1, precision=lax.Precision.HIGHEST)
  new = jax.tree.map(lambda a, u: a - earlier(u), z, rows)
  rows = jax.tree.map(lambda u, a: u.at[slot.astype(jnp.int32)].set(a), rows, new)
  return jax.tree.map(lambda a: a * norm, new), rows


def _next_tree(
  config: TreeNoise, draw: Callable, rows: PyTree, step: Array
) -> tuple[PyTree, PyTree]:
  """The nodes that a prefix is made of after this step, less those before it.

  The subtrees of a prefix of n steps are the ones in the binary digits of n. Step n completes one
  node at each level up to the number of trailing ones of n, and the top one takes the place of
  those below.
  """
  within = step % np.uint32(config.restart_every)
  top = lax.population_count(within & ~(within + np.uint32(1))).astype(jnp.int32)
  variances = jnp.asarray(level_variances(config), jnp.float32)

  def merge(level: Array, carry):
    node, replaced = carry
    left = jax.tree.map(lambda u: u[level], rows)
    if (
      config.honaker
    ):  # by inverse variance; a node's own share is then the variance of the estimate
      own = variances[level + 1]
      mix = lambda z, a, b: own * z + (1 - own) * (a + b)
      node = jax.tree.map(mix, draw((level + 1).astype(jnp.uint32)), left, node)
    return node, jax.tree.map(jnp.add, replaced, left)

  leaf = draw(jnp.uint32(0)) if config.honaker else draw(top.astype(jnp.uint32))
  node, replaced = lax.fori_loop(0, top, merge, (leaf, jax.tree.map(jnp.zeros_like, leaf)))
  rows = jax.tree.map(lambda u, a: u.at[top].set(a), rows, node)
  return jax.tree.map(jnp.subtract, node, replaced), rows
