"""Audits the real mechanism, and broken ones, with canaries of ten times the clip norm.

python -m benchmarks.audit --seeds=100

Every seed audits a run of many canaries, in small models of one parameter for each (together they
count as one mechanism), through the recipe that `local.train` runs. Full batches (two steps), where
the final model tells as much as the transcript, and Poisson batches of many steps. The broken
mechanisms are the plan's own code with half the noise, and with a clip of 20 C beside the noise of
C, so that canaries of 10 C pass unclipped. A claim counts as exceeded where the audit refutes it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from benchmarks import measuring
from primia_jax.attacks import audit, canaries
from primia_jax.attacks.audit import Audit
from primia_jax.privacy import accounting, plan
from primia_jax.privacy.plan import StepPlan

_SEEDS = flags.DEFINE_integer("seeds", 100, "Audits with full batches, of each mechanism.", 1)
_SAMPLED = flags.DEFINE_integer("sampled_seeds", 10, "The same with Poisson batches.", 0)
_MODELS = flags.DEFINE_integer("models", 256, "Models of one audit; a quarter for Poisson.", 4)
_WIDTH = flags.DEFINE_integer("canaries", 512, "Canaries, and parameters, of one model.", 2)

_DELTA = 1e-5
_LEAST, _MOST, _CAUGHT = 0.7, 0.05, 0.95  # of the claim, and of the seeds


def _plan(noise: float, clip: float = 1.0, rate: float = 1.0, steps: int = 2) -> StepPlan:
  return plan.dp_sgd(
    canaries.loss_fn, num_units=_WIDTH.value, sampling_rate=rate, steps=steps, rounds=1,
    delta=_DELTA, noise_multiplier=noise, l2_clip_norm=clip,
  )  # fmt: skip


def _audits(runs: StepPlan, claimed: StepPlan, seeds: int, models: int) -> list[Audit]:
  """Audits of one mechanism against the claim of another, with canaries of 10 times its clip."""
  watch = audit.watch(runs, 1)
  clip = runs.clipping.l2_clip_norm

  def one(seed: int) -> Audit:
    seen = watch(jax.random.key(seed), models, 10.0 / clip)
    by_claim = [np.asarray(a) * np.float32(clip) for a in seen[:2]]
    return audit.judge(canaries.Observed(*by_claim, seen.included), claimed, 1)

  return [one(seed) for seed in range(seeds)]


def _share(name: str, found: Sequence[Audit], target: float, at_least: bool) -> None:
  """Prints the share of seeds in which the claim is refuted."""
  of = lambda bound: [float(getattr(one, bound) >= one.claim) for one in found]
  values = of("epsilon")
  measuring.say(
    name,
    values,
    "share of seeds",
    target,
    value=statistics.mean(values),
    at_least=at_least,
    from_final_model=statistics.mean(of("final_epsilon")),
  )


def _compare(name: str, rate: float, steps: int, epsilon: float, seeds: int, models: int) -> None:
  noise = accounting.calibrate(epsilon, _DELTA, rate, steps)
  right = _plan(noise, 1.0, rate, steps)
  found = _audits(right, right, seeds, models)
  ratios = lambda bound: [getattr(one, bound) / one.claim for one in found]
  about: dict[str, Any] = {
    "claim": round(found[0].claim, 4),
    "canaries": found[0].num_canaries,
    "guesses": found[0].num_guesses,
    "limit": round(found[0].limit / found[0].claim, 4),
    "from_final_model": round(statistics.median(ratios("final_epsilon")), 4),
    "steinke": round(statistics.median(ratios("any_epsilon")), 4),
  }
  target = _LEAST if rate == 1 else None
  measuring.say(f"{name}: bound", ratios("epsilon"), "of the claim", target, at_least=True, **about)
  _share(f"{name}: right, refuted", found, _MOST, False)
  halved = _audits(_plan(noise / 2, 1.0, rate, steps), right, seeds, models)
  _share(f"{name}: half the noise, refuted", halved, _CAUGHT, True)
  unclipped = _audits(_plan(noise / 20, 20.0, rate, steps), right, seeds, models)
  _share(f"{name}: no clipping, refuted", unclipped, _CAUGHT, True)


def main(_: Sequence[str]) -> None:
  for epsilon in (1.0, 6.0):
    name = f"audit, epsilon {epsilon:g}, full batches"
    _compare(name, 1.0, 2, epsilon, _SEEDS.value, _MODELS.value)
  for epsilon in (1.0, 6.0) if _SAMPLED.value else ():
    name = f"audit, epsilon {epsilon:g}, 100 Poisson batches of a twentieth"
    _compare(name, 0.05, 100, epsilon, _SAMPLED.value, _MODELS.value // 4)


if __name__ == "__main__":
  app.run(main)
