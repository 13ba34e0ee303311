"""Canaries in the mechanism that really trains: what a run with them releases, and what it tells.

The site of an audit holds nothing but canaries. Canary i is a unit whose gradient is one number, at
coordinate i of a model of as many parameters, ten times the clip norm: the loss is linear, so the
gradient is the same at every step. A canary that does not take part is blank, as in the definition
of adjacent data. `local.train` then runs the plan's own recipe: its batches, its clipping, its
noise. No canary's coordinate is another's, and noise is independent over coordinates, so the score
of each is the best there is.

Two attackers: one sees every noised gradient (the transcript), the other the final model only, here
the sum of the gradients.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import special

from primia_jax import local
from primia_jax.privacy import correlated, plan, strategies
from primia_jax.privacy.plan import StepPlan
from primia_jax.types import Array, Batch, Key, Metrics, ModelState, Params, PyTree, Site

_POINTS = 4001  # at which the likelihood ratio of the final model is computed


class Observed(NamedTuple):
  """What one run with canaries released, in units of the clip norm.

  Attributes:
    transcript: [T, m] float32, of each step the sum of clipped canaries and noise.
    final: [m] float32, the same of the model's change: the sum over steps.
    included: [m] bool, which canaries took part.
  """

  transcript: Array
  final: Array
  included: Array


def loss_fn(
  params: Params, model_state: ModelState, batch: Batch, key: Key
) -> tuple[Array, tuple[ModelState, Metrics]]:
  """A loss whose gradient is the canary: image x params[label], over the rows of a batch.

  Args:
    params: [m] float32.
    model_state: {}.
    batch: images [B, 1, 1, 1] float32, the gradient's size; labels [B], its coordinate.
    key: ignored.
  """
  del key
  chosen = jax.nn.one_hot(batch.labels, params.shape[0], dtype=jnp.float32) @ params
  loss = jnp.sum(batch.weights * batch.images[:, 0, 0, 0] * chosen)
  count = jnp.sum((batch.weights > 0).astype(jnp.float32))
  metrics = Metrics(loss, jnp.zeros((), jnp.float32), count)
  return loss / jnp.maximum(count, 1.0), (model_state, metrics)


def plan_like(made: StepPlan, num_canaries: int, rounds: int) -> StepPlan:
  """The mechanism of a run's plan over canaries: a plan with `loss_fn`, for `audit.audit`.

  Rate or separation, steps, noise, clip and unit are the run's; the number of units is not. Delta
  is the run's, or 1 / num_canaries where that is smaller.

  Args:
    made: the run's plan.
    num_canaries: m.
    rounds: of the run.

  Raises:
    ValueError: for numbers that no plan of this kind can have.
  """
  clipping = made.clipping
  common: dict[str, Any] = {
    "num_units": num_canaries,
    "steps": made.num_steps,
    "rounds": rounds,
    "delta": min(made.delta, 1 / num_canaries),
    "noise_multiplier": made.noise_multiplier,
    "l2_clip_norm": clipping.l2_clip_norm,
    "clipping": clipping.kind,
    "unit": made.unit,
  }
  if made.strategy is None:
    return plan.dp_sgd(loss_fn, sampling_rate=made.sampling_rate, **common)
  size = num_canaries // made.strategy.min_separation
  if isinstance(made.strategy, strategies.TreeNoise):
    return plan.dp_ftrl(loss_fn, batch_size=size, kind="tree", **common)
  bands = len(made.strategy.coefficients)
  return plan.dp_ftrl(loss_fn, batch_size=size, kind="banded", bands=bands, **common)


def observe(made: StepPlan, rounds: int, key: Key, norm: float | Array = 10.0) -> Observed:
  """One run of a plan with canaries, each in or out by a fair coin; traceable.

  Args:
    made: a plan with `loss_fn`; as many canaries as it has units.
    rounds: how many run.
    key: of the coins, and of the site's secret: an audit has nothing to hide.
    norm: of a canary before clipping, over the clip norm.
  """
  coins, secret = jax.random.split(key)
  included = jax.random.bernoulli(coins, 0.5, (made.num_units,))
  return Observed(*train(made, rounds, included, secret, norm), included)


def train(
  made: StepPlan, rounds: int, included: Array, key: Key, norm: float | Array = 10.0
) -> tuple[Array, Array]:
  """The transcript and the final model of `local.train` with these canaries; see `Observed`.

  Args:
    made, rounds, norm: see `observe`.
    included: [m] bool.
    key: of the site's secret.
  """
  num, clip = made.num_units, made.clipping.l2_clip_norm
  number = jnp.arange(num, dtype=jnp.int32)
  site = Site(
    id=jnp.int32(0),
    images=(included.astype(jnp.float32) * norm * np.float32(clip)).reshape(num, 1, 1, 1),
    labels=number,
    num_examples=jnp.int32(num),
    secret=secret_of(key),
    units=number if made.unit == "patient" else None,
  )
  recipe = made.recipe(_recorder, lambda time: 1.0)
  run = local.train(recipe)

  def one(carry: tuple[Array, PyTree], index: Array):
    params, noise = carry
    now = local.Round(index, jax.random.key(0), jax.random.key(0))
    kept = _Kept(jnp.int32(0), jnp.zeros((made.num_steps, num), jnp.float32))
    trained = run(params, {}, kept, noise, site, now)
    return (trained.params, trained.noise), trained.opt_state.gradients

  params = jnp.zeros(num, jnp.float32)
  start = params, local.init_noise(recipe, params)
  (params, _), kept = jax.lax.scan(one, start, jnp.arange(rounds, dtype=jnp.int32))
  divisor = made.sampling_rate * num if made.strategy is None else made.batch_size
  scale = np.float32(divisor / clip)
  return scale * kept.reshape(-1, num), -scale * params


def secret_of(key: Key) -> Array:
  """[8] uint32, the secret of the site that `train` makes with this key."""
  return jax.random.bits(key, (8,), jnp.uint32)


class _Kept(NamedTuple):
  step: Array
  gradients: Array  # [T, m]


def _recorder(rate: Array) -> optax.GradientTransformation:
  """Gradient descent whose state keeps every gradient that it is given."""

  def update(grads, state: _Kept, params=None):
    kept = _Kept(state.step + 1, state.gradients.at[state.step].set(grads))
    return -rate * grads, kept

  return optax.GradientTransformation(lambda params: None, update)


def scores(made: StepPlan, rounds: int, observed: Observed) -> tuple[np.ndarray, np.ndarray]:
  """[m] the log likelihood ratio of in to out, from the transcript and from the final model, of one
  run or several with their canaries side by side.

  The plan is the claimed one: with another, scores say less, and the bounds hold as they do. For
  noise of trees, scores are sums, which are not the best.
  """
  released, final = (np.asarray(a, np.float64) for a in observed[:2])
  if made.strategy is not None:
    taken = np.tile(_participation(made, rounds), len(final) // made.num_units)
    return _matched(made.strategy, taken, released, final)
  total, variance = len(released), made.noise_multiplier**2
  gain = (released - 0.5) / variance
  if made.sampling_rate == 1:
    return np.sum(gain, axis=0), (final - total / 2) / variance
  rate = made.sampling_rate
  by_step = np.sum(np.logaddexp(math.log1p(-rate), math.log(rate) + gain), axis=0)
  times = np.arange(total + 1)
  chances = special.gammaln(total + 1) - special.gammaln(times + 1)
  chances += special.xlogy(times, rate) + special.xlog1py(total - times, -rate)
  chances -= special.gammaln(total - times + 1)
  likely = chances > -60
  times, chances = times[likely], chances[likely]
  points = np.linspace(final.min(), final.max(), _POINTS)
  gains = (points[:, None] * times - times**2 / 2) / (total * variance)
  return by_step, np.interp(final, points, special.logsumexp(chances + gains, axis=1))


def _participation(made: StepPlan, rounds: int) -> np.ndarray:
  """[T, m] bool, which canaries each step of a fixed order takes."""
  num, total = made.num_units, made.num_steps * rounds
  site = Site(
    jnp.int32(0), jnp.zeros((num, 1, 1, 1)), jnp.arange(num, dtype=jnp.int32), jnp.int32(num)
  )
  if made.unit == "patient":
    site = site._replace(units=site.labels)
  now = local.Round(jnp.int32(0), jax.random.key(0), jax.random.key(0))
  _, draw = made.steps.begin(site, now)
  one = lambda t: draw(jnp.int32(0), correlated.NoiseState(t, {})).reshape(-1)
  taken = np.asarray(jax.lax.map(one, jnp.arange(total, dtype=jnp.uint32)))
  found = np.zeros((total, num), bool)
  found[np.arange(total)[:, None], taken] = True
  return found


def _matched(
  strategy: strategies.Config, taken: np.ndarray, released: np.ndarray, final: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """What is released is X + C^-1 Z, so C times it is C X in white noise."""
  middle = np.sum(taken, axis=0) / 2
  if isinstance(strategy, strategies.TreeNoise):
    return np.sum(np.where(taken, released, 0.0), axis=0) - middle, final - middle
  variance = (strategies.stddev(strategy) / strategy.l2_clip_norm) ** 2

  def mixed(rows: np.ndarray) -> np.ndarray:  # C times them
    lags = enumerate(strategy.coefficients)
    return np.sum([c * np.pad(rows, [(j, 0), (0, 0)])[: len(rows)] for j, c in lags], axis=0)

  pattern = mixed(taken.astype(np.float64))
  ratio = np.sum(pattern * (mixed(released) - pattern / 2), axis=0) / variance
  return ratio, final - middle
