"""Where a run's ledger lies, whose images it charges, and a report's rows on plan and ledgers."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from primia_jax.data.sites import Part
from primia_jax.privacy import accounting, histories, ledger, strategies
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain
from primia_jax.privacy.clipping import Clipping
from primia_jax.privacy.plan import Plan, SiteLevel, StepPlan

from . import inputs
from .configs.data import Data
from .configs.privacy import Privacy

OF_PHANTOM = "ledger"  # in the run folder
_LARGE_DELTA = 0.01
_SHORT = 12  # digits of a hash that name a run
_AT_ONCE = 256  # images that are read at a time
_OUTSIDE = (
  "whoever sees updates, sums or models: server, other sites, users of the model; not the "
  "site itself"
)


def folder(
  privacy: Privacy, data: Data, own: pathlib.Path, site: int | None = None
) -> pathlib.Path:
  """The folder of the ledger that all runs on the same data share.

  It is `ledger_dir`, or else beside the data: PATH.ledger for images in PATH. The phantom is
  synthetic, so that its ledger lies in the run folder, or in the site's own. Processes with a
  source each have a ledger each: beside their source, or in `ledger_dir`/site_N.

  Args:
    privacy, data: settings.
    own: the run folder, or where each site has a process the folder of its own.
    site: of this process; None where one process plays all.

  Raises:
    FileNotFoundError: the data do not exist.
    ValueError: one process plays sites of several sources, and no ledger is named for them.
  """
  if privacy.ledger_dir:
    named = pathlib.Path(privacy.ledger_dir).expanduser()
    return named if site is None or not data.sources else named / f"site_{site}"
  if data.sources and site is None:
    raise ValueError(
      "site_data with dp: one process charges the images of all sources in one ledger; name its "
      "folder with --ledger_dir"
    )
  if data.sources:
    data = data.of(data.sources[site or 0])
  source = inputs.source(data)
  return own / OF_PHANTOM if source is None else source.with_name(f"{source.name}.ledger")


def begin(
  privacy: Plan,
  part: Part,
  mine: Sequence[int],
  path: pathlib.Path,
  ledger_dir: pathlib.Path,
  is_private: bool,
  last_entry: str,
) -> ledger.Ledgers:
  """Begins the ledgers of an arm, or continues those that its checkpoint belongs to.

  Args:
    privacy: what is charged.
    part: training images; validation images are charged in no ledger.
    mine: numbers of the sites whose images this process has.
    path: of the arm's own small file.
    ledger_dir: of the data.
    is_private: see `ledger.Ledgers`.
    last_entry: the hash that the checkpoint holds; empty without a checkpoint.

  Raises:
    ValueError: the ledger is damaged, or has lost what the arm was charged.
  """
  if last_entry and not path.is_file():
    raise ValueError(
      f"{path} is missing: it says where the ledger holds what this arm has spent; restore it from "
      "a backup, or use another --run_dir"
    )
  chain, everyone = Chain(ledger_dir), range(len(part.sites))
  records = [units(chain, part, i) if i in mine else None for i in everyone]
  charges = ledger.Ledgers(privacy, path, chain, records, is_private)
  if last_entry:
    charges.check(last_entry)
  return charges


def units(chain: Chain, part: Part, site: int) -> set[bytes]:
  """The records of a site's images, by which other runs' are compared.

  Args:
    chain: of the data.
    part: the images.
    site: whose images this process has.
  """
  found = set()
  index, groups = part.sites[site], np.asarray(part.dataset.groups)
  for start in range(0, len(index), _AT_ONCE):
    rows = index[start : start + _AT_ONCE]
    images = part.dataset.images[rows]
    found |= {
      ledger.record(chain, str(group), image)
      for group, image in zip(groups[rows], images, strict=True)
    }
  return found


def spent(chain: Chain) -> float:
  """The epsilon that all runs have cost a unit together, the worst one; infinite where the noise of
  one can be repeated.
  """
  known = histories.histories(chain)
  return histories.worst(known).epsilon if known else 0.0


def together(chain: Chain, delta: float | None = None, only: str = "") -> dict[str, Any]:
  """Rows on all runs that the ledger holds, and on its last entry; `only` says whose it is."""
  known = histories.histories(chain, delta)
  rows: dict[str, Any] = {}
  if known:
    one = histories.worst(known)
    total = sum(history.num_units for history in known)
    bare = sum(history.num_units for history in known if not history.is_private)
    repeatable = f"; {bare:,} were in a run with dp_seed, whose noise anyone can repeat"
    rows = {
      "all private runs on these data: epsilon": ledger.claim(one.epsilon),
      "all private runs on these data: delta": one.ledger.delta,
      "all private runs on these data: who": f"the worst of {total:,} units, which was in "
      f"{len(one.runs)} of {len(histories.runs(chain))} runs (each arm, and each site's process, "
      f"counts as one){repeatable if bare else ''}{only}. Adjacent data lack what each run "
      "protects: an image of the unit, its patient, or its site",
    }
  return rows | {"ledger": str(chain.path), "last entry of the ledger": chain.last}


def summary(chain: Chain, delta: float | None = None) -> dict[str, Any]:
  """What `account` tells of a ledger: rows as `together`; its runs; its units by what they were
  charged, the worst first.
  """
  known = [(one.epsilon, one) for one in histories.histories(chain, delta)]
  return {
    "statement": together(chain, delta),
    "runs": [
      {
        "run": name[:_SHORT],
        "begun": begin["at"],
        "unit": begin["unit"],
        "sites": len(begin["groups"]),
        "delta": begin["delta"],
        "epsilon": ledger.claim(accounting.of_sites(ledger.replayed(chain, name)[0]))
        if begin["private"]
        else "NOT PRIVATE",
      }
      for name, begin in histories.runs(chain).items()
    ],
    "units": [
      {
        "units": one.num_units,
        "epsilon": ledger.claim(epsilon),
        "runs": [name[:_SHORT] for name in one.runs],
      }
      for epsilon, one in sorted(known, key=lambda pair: -pair[0])
    ],
  }


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
