"""A report's rows on a privacy plan and the ledgers charged for it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.configs.privacy import Privacy
from primia_jax.privacy import accounting, ledger, strategies
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.clipping import Clipping
from primia_jax.privacy.plan import SiteLevel, StepPlan

_LARGE_DELTA = 0.01
_OUTSIDE = (
  "whoever sees updates, sums or models: server, other sites, users of the model; not the "
  "site itself"
)


def _clipping(clipping: Clipping) -> str:
  copies = (
    f"{clipping.augmentations} augmented copies of an image counting as one"
    if clipping.augmentations > 1
    else "one copy an image"
  )
  return f"{clipping.kind}, norm {clipping.l2_clip_norm:g}, {copies}"


def _facts_of_run(plan: StepPlan, noises: strategies.Config) -> dict[str, Any]:
  strategy = "binary trees"
  if isinstance(noises, strategies.BandedNoise):
    strategy = f"{len(noises.coefficients)} bands, Choquette-Choo et al. 2023"
  error = math.sqrt(float(np.mean(strategies.squared_errors(noises))))
  return {
    "mechanism": f"DP-FTRL at each site (Kairouz et al. 2021; {strategy}): per-unit gradients are "
    "clipped and summed, and the site adds noise that cancels from step to step before its "
    "optimiser steps. The whole run is charged at its first round, and once more at every further "
    "start",
    "clipping": _clipping(plan.clipping),
    "sampler": f"none: batches of {plan.batch_size} in one fixed order, at least "
    f"{noises.min_separation} steps between two uses of "
    f"{'an image' if plan.unit == 'example' else 'a patient'}, at most {noises.max_participations} "
    f"uses in {noises.num_steps} steps",
    "noise in the sum of all gradients so far": f"standard deviation {error:.4g} (root mean square "
    f"over steps)",
    "noise on disk": "checkpoints hold noise that has yet to cancel, and whoever reads them can "
    "subtract it; protect them as you protect the images",
  }


def _clipped(plan: SiteLevel) -> str:
  moves = plan.clip.target_quantile is not None
  return f"clipped to {'a norm that moves' if moves else f'norm {plan.clip.l2_clip_norm:g}'}"


def _facts_of_clip(plan: SiteLevel) -> dict[str, Any]:
  """Rows on a clip that moves: how it moves, and the noise of its bits."""
  c = plan.clip
  if c.target_quantile is None:
    return {}
  where = (
    "each site's bit"
    if plan.noise is None
    else f"their sum, from at least {plan.noise.num_honest} sites"
  )
  return {
    "clipping norm": f"begins at {c.l2_clip_norm:g} and follows the {c.target_quantile:g} quantile "
    f"of the norms of updates, rate {c.learning_rate:g} (Andrew et al. 2021); each round's is in "
    f"its log as l2_clip_norm",
    "noise of the clip": f"standard deviation {c.count_stddev:.6g} in {where}: whether an update "
    f"was within the clip, charged together with the updates",
  }


def _facts_of_steps(plan: StepPlan) -> dict[str, Any]:
  if plan.strategy is not None:
    return _facts_of_run(plan, plan.strategy)
  return {
    "mechanism": "DP-SGD at each site (Abadi et al. 2016): per-unit gradients are clipped and "
    "summed, and the site adds noise before its optimiser steps",
    "clipping": _clipping(plan.clipping),
    "sampler": f"Poisson, rate {plan.sampling_rate:.6g}, at most {plan.batch_size} units in a "
    f"batch",
  }


def _facts_of_sites(plan: SiteLevel) -> dict[str, Any]:
  n = plan.noise
  if n is None:
    mechanism = f"Gaussian noise added by each site to its update, {_clipped(plan)}"
    return {"mechanism": mechanism, **_facts_of_clip(plan)}
  return {
    "mechanism": f"distributed {n.kind.replace('_', ' ')}: each site adds a share of the noise "
    f"before masking, updates {_clipped(plan)} and rounded in Z_2^{n.num_bits}",
    "noise in a sum": f"{n.noise_multiplier:.6g} times the clipping norm, from at least "
    f"{n.num_honest} sites, besides {n.num_colluding} that may collude and know their own shares",
    "encoding": f"rotated in chunks of {n.chunk:,}, rounded to multiples of {1 / n.scale:.4g}; a "
    f"number of a sum wraps around with probability {n.wrap_probability:.2g} at most",
    "sensitivity multiplied by rounding": round(n.sensitivity_inflation, 4),
    "bytes of a masked update": n.size * -(-n.num_bits // 8),
    **_facts_of_clip(plan),
  }


def facts(config: Privacy, plan: StepPlan | SiteLevel, ledgers: Sequence[Ledger]) -> dict[str, Any]:
  """What the report says, of ledgers at the run's end."""
  out: dict[str, Any] = {}
  if config.dp_seed >= 0:
    out["NOT PRIVATE"] = (
      f"noise and batches come from dp_seed={config.dp_seed}, which anyone can repeat"
    )
  if config.validates:
    out["NOT PROTECTED"] = (
      "validation images: their exact counts and losses, in sums over sites, left after each round "
      "and chose the model, and no ledger was charged"
    )
  out |= ledger.statement(ledgers)
  if not config.validates:
    out["validation images"] = "not used; the last round's model is kept"
  if plan.delta > _LARGE_DELTA:
    out["WEAK"] = (
      f"delta={plan.delta:.3g} allows that with this probability a unit is disclosed entirely; set "
      f"a smaller --delta"
    )
  if isinstance(plan, StepPlan):
    out |= _facts_of_steps(plan)
    protected = _OUTSIDE
  else:
    out |= _facts_of_sites(plan)
    protected = (
      "everybody outside the site, the server included"
      if plan.noise is None
      else f"whoever sees sums and models, {plan.noise.num_colluding} colluding sites included, "
      "while secure aggregation hides single updates"
    )
  return out | {
    "protected from": protected,
    "not covered": "test images, whose exact scores are in this report. Other runs on the same "
    "images, tuning included, cost privacy in addition",
  }


def of_arms(spent: Mapping[str, Mapping[int, Ledger] | None]) -> dict[str, Any]:
  """What all arms of a report cost, since they are trained on the same images.

  Args:
    spent: arm -> site -> the ledger of the site's images there; None for an arm without privacy.
      The first arm is the one whose claim the report makes, and gives delta.

  Returns:
    The epsilon of each arm and of all together, infinite where one has no privacy; nothing for a
    single arm.
  """
  if len(spent) == 1:
    return {}
  private = {name: of_sites for name, of_sites in spent.items() if of_sites is not None}
  out: dict[str, Any] = {}
  if bare := [name for name in spent if name not in private]:
    out["NOT PRIVATE"] = (
      f"{', '.join(bare)}: trained on the same images without privacy, so that epsilon of this "
      "report is infinite"
    )
  for name in spent:
    alone = accounting.of_sites([*private[name].values()]) if name in private else math.inf
    out[f"epsilon of the arm {name!r}"] = ledger.claim(alone)
  every: dict[int, Ledger] = {}
  for of_sites in private.values():
    for site, one in of_sites.items():
      before = every.get(site, one._replace(releases=()))
      every[site] = functools.reduce(accounting.spend, one.releases, before)
  together = math.inf if bare else accounting.of_sites([*every.values()])
  out["epsilon of all arms together, a unit of any one site"] = ledger.claim(together)
  return out
