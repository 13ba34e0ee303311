"""Privacy plans: what protects the units of a run, what a step does for it, and what that costs.

`dp_sgd`, `dp_ftrl` and `site_level` each make one frozen object that holds everything: the batches,
the clipped gradients and the noise of a step, and the releases that a ledger is charged for it. The
step, the ledger and a forecast read that one object, so that they cannot disagree.

Who learns what: an observer of a site's updates, or of sums and models computed from them, learns
no more about any unit than the ledger's epsilon and delta say. Two data sets are adjacent when one
has a unit more than the other (its gradients, or its update, are zeros in the other); the number of
units is public. This assumes that each site's secret is fresh, drawn from the operating system and
known to nobody else (then ChaCha20's output stands for true randomness), that no step number
occurs twice with one secret, and that the rows of one unit are of one patient. The site itself sees
its images.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from primia_jax import local
from primia_jax.privacy import (
  accounting,
  adaptive,
  batches,
  correlated,
  distributed_cost,
  grid,
  privatizers,
  sampling,
  strategies,
)
from primia_jax.privacy import noise as sampler
from primia_jax.privacy.accounting import Ledger, Release
from primia_jax.privacy.adaptive import Clip
from primia_jax.privacy.clipping import Clipping, clipped_gradients
from primia_jax.privacy.distributed import DistributedNoise
from primia_jax.types import Array, LossFn, Params, PyTree

_FAILURE = 1e-12  # probability that any batch of a run overflows; taken from delta


@dataclasses.dataclass(frozen=True)
class Plan:
  """What every plan costs.

  Attributes:
    unit: whose presence is hidden: "example", "patient" or "site".
    delta: of the claim.
    num_units: public: of the largest site, or of sites.
    target_epsilon: at which training stops; infinite without a target.
    num_steps: of a round, the same at all sites; 1 for sites as units.
    releases: what one round of a site releases, each with its number of times.
    before: what is released once, before training, such as class counts.
    whole_run: the releases are those of all rounds together, charged before a site's first round.
  """

  unit: str
  delta: float
  num_units: int
  target_epsilon: float
  num_steps: int
  releases: tuple[Release, ...]
  before: tuple[Release, ...]
  whole_run: bool

  def charge(self, ledger: Ledger, rounds: int = 1) -> Ledger:
    """The ledger after that many more rounds; a whole run counts once."""
    times = min(rounds, 1) if self.whole_run else rounds
    return functools.reduce(lambda a, b: accounting.spend(a, b, times), self.releases, ledger)

  def spent(self, rounds: int) -> Ledger:
    """A site's ledger after the releases before training, and that many rounds."""
    start = functools.reduce(accounting.spend, self.before, Ledger(self.unit, self.delta))
    return self.charge(start, rounds)

  def epsilon(self, rounds: int, accountant: str | None = None) -> float:
    """The epsilon of `spent`; see `accounting.epsilon`."""
    return accounting.epsilon(self.spent(rounds), accountant)

  def rounds_within(self, most: int) -> int:
    """How many rounds fit into the target, at most `most`."""
    return accounting.steps_within(self.target_epsilon, self.spent, most)


@dataclasses.dataclass(frozen=True)
class StepPlan(Plan):
  """A plan of private steps at each site; made by `dp_sgd` or `dp_ftrl`.

  Attributes:
    noise_multiplier: sigma: of each step's Gaussian mechanism, or of the one that a whole run is.
    clipping: of units' gradients.
    sampling_rate: q, the rate that runs; 1 for batches in a fixed order.
    batch_size: the most units of a step.
    strategy: of noise that is correlated over steps; None for fresh noise.
    steps, grad_fn, privatizer: of a `local.Recipe`, which takes them together only.
  """

  noise_multiplier: float
  clipping: Clipping
  sampling_rate: float
  batch_size: int
  strategy: strategies.Config | None
  steps: local.Steps = dataclasses.field(repr=False, compare=False)
  grad_fn: local.GradFn = dataclasses.field(repr=False, compare=False)
  privatizer: local.Privatizer = dataclasses.field(repr=False, compare=False)

  def __post_init__(self):
    charged = self.releases[0].noise_multiplier
    if self.privatizer.goes_with != (self.steps, self.grad_fn) or self.noise_multiplier != charged:
      raise ValueError("dp_sgd and dp_ftrl make a plan whole; make another one for other settings")

  def recipe(
    self, optimizer: local.Optimizer, schedule: Callable[[Array], Array | float]
  ) -> local.Recipe:
    """How a site trains under this plan; see `local.Recipe`."""
    return local.Recipe(self.steps, self.grad_fn, self.privatizer, optimizer, schedule)


@dataclasses.dataclass(frozen=True)
class SiteLevel(Plan):
  """A plan of whole sites; made by `site_level`, carried out by `site_privacy`.

  Attributes:
    noise_multiplier: of each site's update and its clip's bit together; where sites make noise
      together, of the sum of updates alone.
    clip: of updates, fixed or moving.
    noise: of a sum of updates, where sites make it together; None where each site adds its own.
  """

  noise_multiplier: float
  clip: Clip
  noise: DistributedNoise | None


def dp_sgd(
  loss_fn: LossFn,
  *,
  num_units: int,
  sampling_rate: float,
  steps: int,
  rounds: int,
  delta: float,
  target_epsilon: float | None = None,
  noise_multiplier: float | None = None,
  l2_clip_norm: float = 1.0,
  clipping: str = "flat",
  unit: str = "example",
  rows_per_unit: int = 1,
  max_examples: int | None = None,
  augmentations: int = 1,
  microbatch: int | None = None,
  has_taps: Callable[[Params], PyTree] | None = None,
  before: Sequence[Release] = (),
) -> StepPlan:
  """DP-SGD (Abadi et al. 2016): Poisson batches, clipped gradients and fresh noise at each step.

  A step's gradient is the sum of clipped gradients plus noise of standard deviation sigma C, over q
  n. Each step costs one release of the Poisson-subsampled Gaussian mechanism; the probability that
  a batch overflows and the sampler's error are taken from delta.

  Args:
    loss_fn: the mean over rows of non-zero weight; it is called with one unit, or several, at a
      time. Class weights scale a row's loss before its unit is clipped.
    num_units: public bound on the units of any site.
    sampling_rate: q, with which each unit enters each step; rounded up to a multiple of 2^-32.
    steps: of a round, the same at all sites.
    rounds: of the run, for which noise is calibrated.
    delta: at most 1 / num_units.
    target_epsilon: of the whole run, `before` included; None for no target.
    noise_multiplier: sigma; None for the least that meets the target.
    l2_clip_norm: C.
    clipping, augmentations, microbatch, has_taps: see `clipping.clipped_sum`.
    unit: "example" or "patient".
    rows_per_unit: the most images of one patient at any site, where patients are the unit.
    max_examples: public bound on the images of one site; by default num_units x rows_per_unit.
    before: what is released once, before training.

  Raises:
    ValueError: for a target that nothing can meet, neither target nor noise, or numbers out of
      range.
  """
  target = _target(target_epsilon, noise_multiplier)
  accounting.ledger(unit, delta, num_units)  # checks delta
  total, rate = steps * rounds, sampling.effective_rate(sampling_rate)
  max_units = sampling.capacity(num_units, rate, total, _FAILURE)
  overflow = sampling.overflow_probability(max_units, num_units, rate, total) / total
  wrong = overflow + sampler.error_of_release()
  sigma = noise_multiplier or accounting.calibrate(target, delta, rate, total, before, wrong)
  release = accounting.gaussian("gradients", sigma, rate, wrong)
  clipped = Clipping(l2_clip_norm, clipping, augmentations, microbatch, has_taps)
  images = max_examples or num_units * rows_per_unit
  drawn = batches.poisson(steps, rate, max_units, images, unit=unit, rows_per_unit=rows_per_unit)
  base = Plan(
    unit, delta, num_units, target, steps, (release._replace(times=steps),), tuple(before), False
  )
  adds = privatizers.gaussian(sigma, rate, num_units)
  return _step_plan(loss_fn, base, clipped, drawn, adds, sigma, rate, None)


def dp_ftrl(
  loss_fn: LossFn,
  *,
  num_units: int,
  batch_size: int,
  steps: int,
  rounds: int,
  delta: float,
  min_units: int | None = None,
  kind: str = "banded",
  bands: int | None = None,
  target_epsilon: float | None = None,
  noise_multiplier: float | None = None,
  l2_clip_norm: float = 1.0,
  clipping: str = "flat",
  unit: str = "example",
  rows_per_unit: int = 1,
  max_examples: int | None = None,
  augmentations: int = 1,
  microbatch: int | None = None,
  has_taps: Callable[[Params], PyTree] | None = None,
  before: Sequence[Release] = (),
) -> StepPlan:
  """DP-FTRL (Kairouz et al. 2021): batches in a fixed order, and noise that cancels over steps.

  A step's gradient is the sum of clipped gradients plus `correlated.next_noise`, over B. The whole
  run is one Gaussian release of noise_multiplier, for a site of any number of units from min_units
  on; with fewer the noise is NaN. A run that is continued from a checkpoint, or a refused round
  that is repeated, releases steps a second time under other noise, and costs at most another whole
  release: given the first, the rows of C X + Z that are drawn anew are a Gaussian mechanism of no
  larger sensitivity.

  Args:
    batch_size: B, units of a step.
    min_units: of the smallest site, for which noise is calibrated; by default num_units.
    kind: "banded" or "tree", see `strategies`.
    bands: of "banded"; None for as many as batches allow, up to 16.
    loss_fn, num_units, steps, rounds, delta, target_epsilon, noise_multiplier, l2_clip_norm,
    clipping, unit, rows_per_unit, max_examples, augmentations, microbatch, has_taps, before: as in
      `dp_sgd`.

  Raises:
    ValueError: as `dp_sgd`; for noise and a target that do not go together, bands that reach beyond
      a unit's next use, or a run of 2^32 places and more.
  """
  target = _target(target_epsilon, noise_multiplier)
  start = functools.reduce(accounting.spend, before, accounting.ledger(unit, delta, num_units))
  total, fewest = steps * rounds, min_units or num_units
  if min(steps, rounds, batch_size) < 1 or total * batch_size >= 2**32:
    raise ValueError(
      f"steps={steps}, rounds={rounds} and batch_size={batch_size} must be at least 1, and the "
      f"places of the whole run, {total} x {batch_size}, fewer than 2^32"
    )
  sigma, wrong = noise_multiplier, 2 * total * sampler.error_of_release()  # trees draw twice
  if sigma is None:
    sigma = accounting.calibrate(target, delta, 1.0, 1, before, wrong)
  release = accounting.gaussian("gradients", sigma, extra_delta=wrong)
  whole = lambda: accounting.epsilon(accounting.spend(start, release))
  if noise_multiplier is not None and target < math.inf and (epsilon := whole()) > target:
    raise ValueError(
      f"noise_multiplier={sigma:g} costs epsilon {epsilon:.4g} for the whole run, more than "
      f"target_epsilon={target:g}; leave one of them out"
    )
  separation, times = batches.participation(total, batch_size, fewest)
  strategy = strategies.make(kind, total, separation, times, sigma, l2_clip_norm, bands)
  clipped = Clipping(l2_clip_norm, clipping, augmentations, microbatch, has_taps)
  images = max_examples or num_units * rows_per_unit
  drawn = batches.cyclic(steps, batch_size, images, unit=unit, rows_per_unit=rows_per_unit)
  base = Plan(unit, delta, num_units, target, steps, (release,), tuple(before), True)
  adds = privatizers.correlate(strategy, batch_size)
  return _step_plan(loss_fn, base, clipped, drawn, adds, sigma, 1.0, strategy)


def _step_plan(
  loss_fn: LossFn,
  base: Plan,
  clipped: Clipping,
  drawn: local.Steps,
  adds: local.Privatizer,
  sigma: float,
  rate: float,
  strategy: strategies.Config | None,
) -> StepPlan:
  """Ties the batches, the clipped gradients and the noise of a plan together."""
  size = drawn.batch_size
  fresh = lambda dim, max_units=1: grid.choose(dim, sigma, max_units)
  grid_of = fresh if strategy is None else correlated.grid_of(strategy)
  grad_fn = clipped_gradients(loss_fn, clipped, base.unit, size, grid_of)
  priced: list[Any] = [getattr(base, field.name) for field in dataclasses.fields(Plan)]
  own = sigma, clipped, rate, size, strategy, drawn, grad_fn, adds.bound_to(drawn, grad_fn)
  return StepPlan(*priced, *own)  # type: ignore[call-arg]


def site_level(
  *,
  num_sites: int,
  rounds: int,
  delta: float,
  target_epsilon: float | None = None,
  noise_multiplier: float | None = None,
  l2_clip_norm: float = 1.0,
  target_quantile: float | None = None,
  clip_rate: float = 0.2,
  together: DistributedNoise | None = None,
) -> SiteLevel:
  """Privacy of whole sites: updates are clipped and noised, by each site or by all together.

  A round costs one release. Where the clip moves, it includes the bits that move the clip.

  Args:
    num_sites: public number of sites.
    rounds: of the run, for which noise is calibrated.
    delta: at most 1 / num_sites.
    target_epsilon: of the whole run; None for no target.
    noise_multiplier: of a round, bits included; None for the least that meets the target.
    l2_clip_norm: the largest norm of an update, or that of the first round.
    target_quantile: the share of sites whose norm should be within the clip; None fixes it.
    clip_rate: `Clip.learning_rate` of a clip that moves.
    together: how sites make noise together. Its l2_clip_norm and noise_multiplier are ignored:
      they follow from this function's. None for noise that each site adds by itself.

  Raises:
    ValueError: for a target that nothing can meet, neither target nor noise, or numbers out of
      range.
  """
  target = _target(target_epsilon, noise_multiplier)
  start, noise = accounting.ledger("site", delta, num_sites), None
  moves = target_quantile is not None
  what = "updates, and whether they were within the clip" if moves else "updates"

  def clip_of(sigma: float, num_together: int = 0) -> Clip:
    """Of one noise multiplier for both, bits get twice that or more, so that updates get at most
    1.16 times it. Many sites together give bits num_sites / 20 (Andrew et al. 2021), which costs
    next to nothing.
    """
    if not moves:
      return Clip(l2_clip_norm)
    return Clip(l2_clip_norm, target_quantile, clip_rate, max(sigma, num_together / 20))

  if together is None:
    sigma, wrong = noise_multiplier, 2 * sampler.error_of_release()  # update and bit
    if sigma is None:
      sigma = accounting.calibrate(target, delta, 1.0, rounds, extra_delta=wrong)
    moving, release = clip_of(sigma), accounting.gaussian(what, sigma, extra_delta=wrong)
  else:
    template = dataclasses.replace(together, l2_clip_norm=1.0 if moves else l2_clip_norm)

    def split(sigma: float) -> tuple[DistributedNoise, Clip]:
      """One noise multiplier, between updates and the bits that move their clip."""
      moving = clip_of(sigma, template.num_sites)
      left = adaptive.update_noise_multiplier(sigma, moving)
      return dataclasses.replace(template, noise_multiplier=left), moving

    def released(noise: DistributedNoise, moving: Clip) -> Release:
      """What a round opens: sums of updates and of bits, whose divergences add up."""
      noises = (noise, adaptive.bit_noise(noise, moving)) if moves else (noise,)
      curve = np.sum([distributed_cost.rdp(n, accounting.ORDERS)[1] for n in noises], axis=0)
      return accounting.renyi(what, curve, math.fsum(n.sampler_error for n in noises))

    sigma = noise_multiplier
    if sigma is None:
      sigma = distributed_cost.calibrate(template, target, delta, rounds).noise_multiplier
      # The ledger knows whole orders only, so it claims a little more than `calibrate` does.
      cost = lambda z: accounting.epsilon(accounting.spend(start, released(*split(z)), rounds))
      while cost(sigma) > target:
        sigma *= 1.001
    noise, moving = split(sigma)
    sigma, release = noise.noise_multiplier, released(noise, moving)
  return SiteLevel(
    unit="site",
    delta=delta,
    num_units=num_sites,
    target_epsilon=target,
    num_steps=1,
    releases=(release,),
    before=(),
    whole_run=False,
    noise_multiplier=sigma,
    clip=moving,
    noise=noise,
  )


def _target(target_epsilon: float | None, noise_multiplier: float | None) -> float:
  if target_epsilon is None and noise_multiplier is None:
    raise ValueError(
      "give target_epsilon (noise follows) or noise_multiplier; without noise nothing is private"
    )
  if noise_multiplier is not None and not 0 < noise_multiplier < math.inf:
    raise ValueError(
      f"noise_multiplier={noise_multiplier} must be finite and positive: without noise nothing is "
      f"private"
    )
  return math.inf if target_epsilon is None else target_epsilon
