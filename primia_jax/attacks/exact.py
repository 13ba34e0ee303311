"""Exact tests of what canaries hardly see: how units are drawn, and by what a sum is divided.

Batches of a fixed or shuffled size, charged as Poisson samples, and sums divided by the size that
was drawn leave a canary's score almost as it was. Both break the claim. The first shows in who is
drawn; the second in how far one unit moves a step of a tiny site, for every batch that it has.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from primia_jax import local
from primia_jax.attacks import canaries
from primia_jax.privacy.plan import StepPlan
from primia_jax.types import Array, Key, Site


def drawn(made: StepPlan, num_steps: int, secret: Array) -> np.ndarray:
  """[num_steps, n] bool, the units that the steps of a plan's own sampler take.

  Args:
    made: a plan of `plan.dp_sgd` for n examples, one image each.
    num_steps: from step 0.
    secret: [8] uint32, of the site.
  """
  num = made.num_units
  empty = jnp.zeros((num, 1, 1, 1)), jnp.zeros(num, jnp.int32)
  units = jnp.arange(num, dtype=jnp.int32) if made.unit == "patient" else None
  site = Site(jnp.int32(0), *empty, jnp.int32(num), secret, units)

  def one(number: Array) -> Array:
    now = local.Round(number, jax.random.key(0), jax.random.key(0))
    index = jax.lax.map(
      lambda t: made.steps.begin(site, now)[1](t, ()), jnp.arange(made.num_steps, dtype=jnp.int32)
    ).reshape(made.num_steps, -1)
    places = jnp.where(index < 0, num, index)
    taken = jnp.zeros((made.num_steps, num), bool)
    return taken.at[jnp.arange(made.num_steps)[:, None], places].set(True, mode="drop")

  rounds = jnp.arange(-(-num_steps // made.num_steps), dtype=jnp.int32)
  return np.asarray(jax.jit(lambda: jax.lax.map(one, rounds))()).reshape(-1, num)[:num_steps]


def sampling_p_value(taken: np.ndarray, sampling_rate: float) -> float:
  """How likely draws as odd as these are if every unit enters every step independently.

  The total is binomial. Sizes of batches, and how often a unit comes, are binomial, too: the sum of
  their squared deviations over their variance is chi-squared, nearly. Batches of one size, and
  units that come equally often, have far too little of it. Six tails are looked at, and paid for.

  Args:
    taken: [T, n] bool, as from `drawn`.
    sampling_rate: q.

  Raises:
    ValueError: for a rate outside (0, 1], or draws too few for the approximation: 30 expected in
      all, taken and not.
  """
  if not 0 < sampling_rate <= 1:
    raise ValueError(f"sampling_rate={sampling_rate} must lie in (0, 1]")
  if sampling_rate == 1:
    return float(np.all(taken))
  variance = sampling_rate * (1 - sampling_rate)
  if taken.size * variance < 30:
    raise ValueError(
      f"{taken.size} draws at sampling_rate={sampling_rate:g} are too few; take more"
    )
  total = int(np.sum(taken))
  tails = [special.bdtr(total, taken.size, sampling_rate)]
  tails.append(special.bdtrc(total - 1, taken.size, sampling_rate) if total else 1.0)
  for axis in (0, 1):
    count = taken.shape[axis]
    deviation = np.sum((np.sum(taken, axis=axis) - count * sampling_rate) ** 2)
    freedom, excess = taken.shape[1 - axis], deviation / (count * variance)
    tails += [special.chdtr(freedom, excess), special.chdtrc(freedom, excess)]
  return float(min(1.0, len(tails) * min(tails)))


def largest_change(made: StepPlan, num_steps: int, key: Key, norm: float = 10.0) -> float:
  """How far a unit's presence moves a step's gradient, at most, over C / (q n): 1 or less if right.

  Every unit of the site in turn is blanked, and steps run with the same secret, so that batch and
  noise are the same and what is left is what the unit changes. With few units, the steps take all
  batches there are.

  Args:
    made: a plan of `plan.dp_sgd` with `canaries.loss_fn`, of few units.
    num_steps: from step 0.
    key: of the site's secret.
    norm: of a unit's gradient, over the clip norm.
  """
  everybody = jnp.ones(made.num_units, bool)
  alone = jnp.concatenate([everybody[None], ~jnp.eye(made.num_units, dtype=bool)])
  rounds = -(-num_steps // made.num_steps)
  run = jax.vmap(lambda included: canaries.train(made, rounds, included, key, norm)[0])
  released = np.asarray(jax.jit(run)(alone), np.float64)  # [1 + n, T, n]
  return float(np.max(np.linalg.norm(released[1:] - released[:1], axis=-1)))
