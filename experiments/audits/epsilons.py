"""Bounds from the ledger, and what canaries in the run's own mechanism prove of epsilon."""

from __future__ import annotations

import math

import jax
import numpy as np

from primia_jax import sites
from primia_jax.attacks import audit as canary_audit
from primia_jax.attacks import canaries, exact, one_run
from primia_jax.attacks.canaries import Observed
from primia_jax.attacks.evidence import Evidence
from primia_jax.privacy import accounting, reconstruction
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.plan import SiteLevel, StepPlan
from primia_jax.types import Key

from .. import inputs, markdown, settings, trainers
from ..processes import Place
from . import site_epsilons
from .context import ARM, Context
from .parts import Part
from .site_epsilons import REMADE

_CANDIDATES = (10, 100, 10_000)
_RATES = (0.001, 0.01, 0.1)
_IN_A_RUN = 64  # canaries
_FEW = 4  # units whose batches are looked at one by one
_SURE = 0.4  # of the control's canaries are guessed; half of them take part
_WEAKER = 16  # by which the control's noise is divided


def bounds(context: Context) -> Part:
  """What no attack on anything that the ledger lists can exceed."""
  title = "Bounds"
  if not context.ledgers:
    return Part(title, ("Without differential privacy there is none.",))
  worst = accounting.worst(context.ledgers)
  key = jax.random.key(context.effort.audit_seed)
  rows = []
  for number, count in enumerate(_CANDIDATES):
    context.note(f"bounds, {count:,} candidates")
    proved = reconstruction.reconstruction_bound(worst, count)
    sharper = "–"
    if not any(release.curve for release in worst.releases):
      drawn = reconstruction.estimate(worst, jax.random.fold_in(key, number), count, 50_000)
      sharper = f"{_percent(drawn.value)} [{_percent(drawn.low)}, {_percent(drawn.high)}]"
    rows.append(
      (f"{count:,}", _percent(1 / count), _percent(proved),
       _percent(reconstruction.renyi_bound(worst, count)), sharper)
    )  # fmt: skip
  head = ("candidates", "guess", "proved (Kaissis et al. 2023)", "Balle et al. 2022",
          "Monte Carlo (Hayes et al. 2023), 95 %")  # fmt: skip
  of_members = [
    (_percent(rate), _percent(reconstruction.max_true_positive_rate(worst, rate)))
    for rate in _RATES
  ]
  text = (
    f"The chance that anybody who knows all else names the {worst.unit} that was used, among N "
    "candidates:",
    markdown.table(head, rows),
    "And the most true positives of any test of membership:",
    markdown.table(("false positives", "true positives at most"), of_members),
    *_sibling(context, worst, key),
  )
  return Part(title, text)


def _sibling(context: Context, worst: Ledger, key: Key) -> tuple[str, ...]:
  """A mechanism of the same epsilon and delta, in which every unit is in every step."""
  if any(release.curve for release in worst.releases):
    return ()
  context.note("bounds, a mechanism of equal epsilon")
  claim = accounting.epsilon(worst)
  if not 0 < claim < math.inf or all(r.sampling_rate == 1 for r in worst.releases):
    return ()
  noise = accounting.calibrate(claim, worst.delta, 1.0, 1)
  release = accounting.gaussian("one step with all units", noise)
  other = accounting.spend(Ledger(worst.unit, worst.delta), release)
  here, there = (
    reconstruction.estimate(one, key, _CANDIDATES[0], 50_000) for one in (worst, other)
  )
  of = lambda e: f"{_percent(e.value)} [{_percent(e.low)}, {_percent(e.high)}]"
  return (
    f"Epsilon and delta do not say all. A single release of all units with noise {noise:.3g} has "
    f"the same epsilon {claim:.3g} at delta {worst.delta:.3g}. By the same estimate one of "
    f"{_CANDIDATES[0]} candidates is named with a chance of {of(here)} in this run, and of "
    f"{of(there)} there.",
  )


def proved(context: Context) -> Part:
  """One-run audit of the run's plan: canaries in place of its units."""
  title = "Empirical epsilon"
  rounds = context.config.training.rounds
  made = _plan(context)
  if made is None:
    return Part(title, ("Left out: without differential privacy there is no claim to test.",))
  weaker = _plan(context, made.noise_multiplier / _WEAKER)
  if isinstance(made, SiteLevel):
    assert isinstance(weaker, SiteLevel)  # it differs in its noise alone
    return site_epsilons.proved(context, title, made, weaker)
  assert isinstance(weaker, StepPlan)
  plan, bare = (canaries.plan_like(one, _IN_A_RUN, rounds) for one in (made, weaker))
  runs = max(1, context.effort.canaries // _IN_A_RUN)
  key = jax.random.key(context.effort.audit_seed)
  context.note("empirical epsilon, the run's mechanism")
  guesses = math.ceil(5 * math.sqrt(runs * _IN_A_RUN))  # the surest, however much is claimed
  right = canary_audit.judge(canary_audit.watch(plan, rounds)(key, runs), plan, rounds, guesses)
  context.note("empirical epsilon, control")
  wrong = _control(canary_audit.watch(bare, rounds)(key, runs), bare, plan, rounds)
  measure = f"epsilon proved at 95 %, of {right.claim:.3g} claimed"
  control = Evidence(
    f"a mechanism with 1/{_WEAKER} of the noise", "one-run f-DP audit", "", measure, wrong
  )
  said = "below the claim" if right.epsilon < right.claim else "ABOVE THE CLAIM"
  common = Evidence(
    "every noised gradient", "one-run f-DP audit", "the run's mechanism", measure, right.epsilon,
    control=control, note=said,
  )  # fmt: skip
  final = common._replace(
    threat="the final model only", value=right.final_epsilon, control=None, note=""
  )
  failures: tuple[str, ...] = ()
  if right.epsilon >= right.claim:
    failures = (
      f"the ledger claims epsilon {right.claim:.3g}, and canaries prove {right.epsilon:.3g}",
    )
  caught = "exceeds" if wrong > right.claim else "does not exceed"
  text = (
    REMADE,
    f"{right.num_canaries:,} canaries, {_IN_A_RUN} in each of {runs} runs, with gradients of ten "
    "times the clip norm, take part by coins of their own in this plan: its batches, clipping and "
    f"noise. An attacker guessed {right.num_guesses} coins and was right "
    f"{right.num_right} times (Mahloujifar et al. 2025). Without assumptions on the mechanism "
    f"(Steinke et al. 2023) that proves epsilon {right.any_epsilon:.3g}. So many guesses "
    f"prove {right.limit:.3g} at most. The control has 1/{_WEAKER} of the noise, as its attacker "
    f"knows, and {caught} the claim. Delta is {right.delta:.3g}.",
    *_exact(made, rounds, key),
  )
  return Part(title, text, (common, final), failures)


def _control(observed: Observed, bare: StepPlan, claimed: StepPlan, rounds: int) -> float:
  """What canaries prove against a claim where another mechanism ran, which the attacker knows."""
  included = np.asarray(observed.included)
  scores, _ = canaries.scores(bare, rounds, observed)
  guesses = round(_SURE * len(included))
  right = one_run.right_guesses(scores, included, guesses, _outs(bare))
  ledger = canary_audit.claim(claimed, rounds)
  return one_run.f_dp_bound(ledger, len(included), guesses, right)


def _outs(made: StepPlan) -> int | None:
  """Guesses that are "out": none where a canary that was never drawn looks as one that is out."""
  return 0 if made.strategy is None and made.sampling_rate < 1 else None


def _exact(made: StepPlan, rounds: int, key: Key) -> tuple[str, ...]:
  """Two faults that hardly move what canaries prove: batches that are not Poisson's, and a gradient
  divided by the batch that was drawn instead of the public one.
  """
  if made.strategy is not None or made.sampling_rate == 1:
    return ()
  few = canaries.plan_like(made, _FEW, rounds)
  steps = made.num_steps * rounds
  taken = exact.drawn(made, steps, jax.random.bits(key, (8,), jax.numpy.uint32))
  chance = exact.sampling_p_value(taken, made.sampling_rate)
  change = exact.largest_change(few, steps, key)
  return (
    f"Two exact checks. The plan's sampler drew batches for {steps} steps: draws as odd as these "
    f"have a chance of {chance:.2g} if every unit is drawn independently (below 0.001, it is not). "
    f"A unit moves a step's gradient by at most {change:.3f} of what the noise was computed for "
    "(above 1, the noise is too small).",
  )


def _plan(context: Context, noise_multiplier: float = 0.0) -> StepPlan | SiteLevel | None:
  """The run's plan, or one with this noise; None where there is none."""
  config, images = context.config, context.images
  if config.privacy.dp == "none":
    return None
  if noise_multiplier:
    config = settings.replace(config, noise_multiplier=noise_multiplier, target_epsilon=0.0)
  mine = range(config.hospitals.num_sites)
  patients = inputs.count_patients(images.train) if config.privacy.by_patient else ()
  cohort = trainers.Cohort(ARM, images.train, images.validation, np.asarray(mine), patients)
  trained, place = context.trained, Place(sites.loop())
  made = trainers.make_trainer(config, trained.model, trained.config, [cohort], place)
  return made.privacy


def _percent(chance: float) -> str:
  return f"{100 * chance:.3g} %"
