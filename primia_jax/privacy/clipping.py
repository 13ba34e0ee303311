"""The sum of per-unit gradients, each clipped first, in the memory of one gradient and with XLA's
fast convolutions.

A loop runs over the units that a step really has, a few at a time, and adds each clipped gradient
to a running sum. Padding after the last unit so costs nothing. (Whoever can time the site learns
roughly the number of units from how long a step takes.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import local
from primia_jax.privacy import grid
from primia_jax.privacy.bookkeeping import bookkept, explicit
from primia_jax.privacy.grid import Grid, Rounded
from primia_jax.types import Array, Batch, Key, LossFn, Metrics, ModelState, Params, PyTree

CLIPPINGS = ("flat", "per_layer", "automatic")
_STABILITY = 0.01  # gamma of automatic clipping
_NORMS = (1e-6, 1e6)  # clip norms whose squares float32 holds with room to spare


@dataclasses.dataclass(frozen=True)
class Clipping:
  """How units' gradients are clipped; see `clipped_sum`.

  Attributes:
    l2_clip_norm: C, from 1e-6 to 1e6.
    kind: "flat", "per_layer" or "automatic".
    augmentations: of each row, averaged before its unit is clipped once.
    microbatch: units whose gradients are formed at once; None chooses by the model's size.
    has_taps: marks kernels whose gradients need not be formed; None for none.
  """

  l2_clip_norm: float = 1.0
  kind: str = "flat"
  augmentations: int = 1
  microbatch: int | None = None
  has_taps: Callable[[Params], PyTree] | None = dataclasses.field(
    default=None, repr=False, compare=False
  )

  def __post_init__(self):
    if not _NORMS[0] <= self.l2_clip_norm <= _NORMS[1]:
      raise ValueError(f"l2_clip_norm={self.l2_clip_norm} must lie in [{_NORMS[0]}, {_NORMS[1]}]")


def clipped_sum(
  loss_fn: LossFn,
  *,
  l2_clip_norm: float = 1.0,
  clipping: str = "flat",
  augmentations: int = 1,
  microbatch: int | None = None,
  has_taps: Callable[[Params], PyTree] | None = None,
  grid_of: Callable[[int, int], Grid] = lambda dim, max_units: grid.choose(dim),
) -> Callable[[Params, ModelState, Batch, Key], tuple[Rounded, Metrics, Array]]:
  """Makes the function that sums clipped gradients over units.

  The gradient g of a unit is that of the mean loss over its rows, each row `augmentations` times
  under random augmentation (De et al. 2022, section 3.2; `loss_fn` augments, row by row). One
  unit's rows never meet another's. What is added up:

    flat: g min(1, C / |g|) (Abadi et al. 2016, algorithm 1). per_layer: each leaf of the parameters
    so, with C / sqrt(number of leaves) (McMahan et al. 2018, section 3.1). automatic: C g / (|g| +
    0.01) (Bu et al. 2022, equation 4.1), of norm below C with nothing to tune.

  Each unit's result is rounded to integers on a grid (`grid`) before it is added, and its norm is
  bounded from above with all that float32 may have lost. So one unit, whatever is in it, changes
  the sum by a vector of norm at most C, exactly, and changes nothing of what other units add. (This
  assumes that the numbers of one unit do not depend on its place in a group, nor on the others in
  it, as holds for layers that work row by row.) C is at most half a percent less for it. A gradient
  that is not finite, or whose norm exceeds float32's range, counts as exactly 0.

  Args:
    loss_fn: a mean over rows of non-zero weight, without model state.
    l2_clip_norm: C.
    clipping: see above.
    augmentations: see above.
    microbatch: the most units that are worked on at once. It changes time and memory, and never the
      result (with taps, up to rounding). None takes as many as are fast in moderate memory.
    has_taps: parameters -> bools in their structure; True for kernels that the model gives to
      `conv` or `tapped.dense` once and to nothing else. Most of their gradients are then never
      formed unit by unit, which takes a fraction of the time (`bookkeeping`). None marks no kernel
      and suits any model.
    grid_of: (numbers of a gradient, most units of a step) -> the grid, which is made for the noise
      that will be added.

  Returns:
    (params, model_state, Batch, key) -> (sum, Metrics, share of the units that were scaled down).
    The batch has leading axes [U] or, where units have several rows, [U, R]; a row of weight 0 is
    padding and becomes a blank image, a unit whose weights are all 0 is padding too, and loops end
    after the last that is not. `key` is for augmentation and dropout, not secret; each unit's is
    folded from its number (`Batch.numbers`; its place in the batch where these are None). Metrics
    are per row, of finite units; like the share they are NOT private. It raises a ValueError for a
    model with state, or parameters that are not float32.

  Raises:
    ValueError: for another clipping, or numbers out of range.
  """
  if clipping not in CLIPPINGS:
    raise ValueError(f"clipping={clipping!r} is not one of {CLIPPINGS}")
  if not 0 < l2_clip_norm < math.inf:
    raise ValueError(f"l2_clip_norm={l2_clip_norm} must be positive and finite")
  for name, value in (("augmentations", augmentations), ("microbatch", microbatch)):
    if value is not None and value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  per_unit = explicit(loss_fn) if has_taps is None else bookkept(loss_fn, has_taps)
  augmented = lambda rows, axis: jax.tree.map(lambda a: jnp.repeat(a, augmentations, axis), rows)

  def run(params: Params, model_state: ModelState, batch: Batch, key: Key):
    if jax.tree.leaves(model_state):
      raise ValueError(
        "the model has a state that gradients of single units would share (BatchNorm mixes the "
        "examples of a batch, which clipping cannot bound); use norm=group"
      )
    for leaf in jax.tree.leaves(params):
      if leaf.dtype != jnp.float32:
        raise ValueError(
          f"parameters are {leaf.dtype}; the bounds of rounding hold for float32: use that"
        )
    num_units, together = batch.weights.shape[0], microbatch
    numbers = jnp.arange(num_units, dtype=jnp.int32) if batch.numbers is None else batch.numbers
    # Whoever made the batch: of padding, no label or pixel of a unit may come near another's sum.
    batch = jax.tree.map(lambda a: local.blank(batch.weights != 0, a), batch._replace(numbers=None))
    if batch.weights.ndim == 1:
      batch = jax.tree.map(lambda a: a[:, None], batch)
    if together is None:
      rows = augmented(jax.tree.map(lambda a: a[0], batch), 0)
      together = per_unit.fitting(params, model_state, rows, key)
    together = -(-num_units // -(-num_units // together))  # groups of equal size
    padding = -num_units % together
    batch, numbers = jax.tree.map(
      lambda a: jnp.pad(a, [(0, padding)] + [(0, 0)] * (a.ndim - 1)), (batch, numbers)
    )
    used = jnp.any(batch.weights != 0, axis=1)
    rank = jnp.arange(1, num_units + padding + 1, dtype=jnp.int32)
    last = jnp.max(jnp.where(used, rank, 0))
    on = grid_of(grid.size(params), num_units)
    unclipped = np.float32(on.steps / l2_clip_norm)

    def body(i: Array, carry):
      total, metrics, num_clipped, sound = carry
      first = i * together
      rows, own = jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, first, together), (batch, numbers)
      )
      keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(own)
      rows = augmented(rows, 1)
      units = per_unit.gradients(params, model_state, rows, keys)
      counts = jnp.any(rows.weights != 0, axis=1) & jnp.isfinite(jnp.sum(units.squares, axis=1))
      factors = jax.vmap(lambda squares: _factors(squares, on, unclipped, clipping))(units.squares)
      total = units.add(total, factors, counts, on)
      new = jax.tree.map(lambda m: jnp.where(counts, m, 0.0) / augmentations, units.metrics)
      metrics = jax.tree.map(lambda a, b: a + jnp.sum(b), metrics, new)
      scaled = counts & jnp.any(factors < unclipped, axis=1)
      num_clipped = num_clipped + jnp.sum(scaled, dtype=jnp.float32)
      return total, metrics, num_clipped, sound * units.sound

    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.int32), params)
    carry = (nothing, Metrics(zero, zero, zero), zero, one)
    if together == num_units:  # without a loop XLA sees more at once
      total, metrics, num_clipped, sound = body(jnp.int32(0), carry)
    else:
      total, metrics, num_clipped, sound = jax.lax.fori_loop(0, -(-last // together), body, carry)
    step = sound * np.float32(l2_clip_norm / on.steps)
    share = num_clipped / jnp.maximum(jnp.sum(used, dtype=jnp.float32), 1.0)
    return Rounded(total, step, on), metrics, share

  return run


def clipped_gradients(
  loss_fn: LossFn, config: Clipping, unit: str, max_units: int, grid_of: Callable[[int, int], Grid]
) -> Callable[[Params, ModelState, Batch, Key], tuple[Rounded, tuple[ModelState, Metrics]]]:
  """`clipped_sum` as the grad_fn of a `local.Recipe`, whose privatizer noises and divides the sum.

  Args:
    loss_fn: see `clipped_sum`.
    config: how to clip.
    unit: "example", for batches [max_units], or "patient", for batches [max_units, rows].
    max_units: the most units of a step, as many as a batch has places.
    grid_of: see `clipped_sum`.

  Returns:
    (params, model_state, batch, key) -> (sum, (model_state, Metrics)). The metrics are 0, since the
    true ones are not private. It raises a ValueError for a batch of another form, or without the
    numbers of its units.

  Raises:
    ValueError: as `clipped_sum`.
  """
  summed = clipped_sum(
    loss_fn,
    l2_clip_norm=config.l2_clip_norm,
    clipping=config.kind,
    augmentations=config.augmentations,
    microbatch=config.microbatch,
    has_taps=config.has_taps,
    grid_of=grid_of,
  )
  wanted = {"example": 1, "patient": 2}[unit]

  def grad_fn(params: Params, model_state: ModelState, batch: Batch, key: Key):
    if batch.weights.ndim != wanted or batch.weights.shape[0] != max_units:
      raise ValueError(
        f"weights {list(batch.weights.shape)} do not fit unit={unit!r}, max_units={max_units}; "
        f"give a batch of {'[max_units]' if wanted == 1 else '[max_units, rows]'}, padded with "
        f"weight 0"
      )
    if batch.numbers is None:
      raise ValueError(
        "the batch has no numbers of its units, so keys would be of their places, and a unit that "
        "is left out would change the augmentation of others; take the batch from local.gather, or "
        "give Batch.numbers"
      )
    total, metrics, _ = summed(params, model_state, batch, key)
    return total, (model_state, jax.tree.map(jnp.zeros_like, metrics))

  grad_fn.needs_noise = True  # type: ignore[attr-defined]  # `local.train` looks for it
  return grad_fn


def _factors(squares: Array, on: Grid, unclipped: np.float32, clipping: str) -> Array:
  """What each leaf [L] of one unit's gradient is multiplied by, in grid steps, from bounds of the
  squared norms of the leaves.
  """
  if clipping == "per_layer":
    most = np.float32(on.limit / math.sqrt(len(squares)))
    return jnp.minimum(unclipped, most / grid.norm(squares[:, None]))
  norm = grid.norm(squares)
  if clipping == "automatic":
    factor = np.float32(on.limit) / (norm + np.float32(_STABILITY))
  else:
    factor = jnp.minimum(unclipped, np.float32(on.limit) / norm)
  return jnp.broadcast_to(factor, squares.shape)
