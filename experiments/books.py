"""The ledgers of a cohort in a file, and what a report says of them and of what they are charged
for.

Every site spends alike, since all draw with the same probability and add the same noise; so one
ledger stands for each site that took part in a round, and the worst is what is claimed.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.private import Privacy
from experiments.settings import Train
from primia_jax.privacy import accounting, correlated
from primia_jax.privacy.accounting import Ledger, Release

LEDGER = "ledger.json"
_LARGE_DELTA = 0.01


class Book:
  """The ledgers of a cohort in a file, written before anything is released, so that a crash counts
  twice and not never.

  A run with correlated noise is charged whole to a site before its first round, and whole again by
  every start that goes on with training: steps after the checkpoint are then released a second
  time, under other noise, and two releases of the whole run tell more than that
  (`privacy.training.correlated_noise`).

  Attributes:
    ledgers: one for each site.
    counts: the noised class counts, released once however often a run is started; None before.
  """

  def __init__(self, privacy: Privacy, num_sites: int, path: pathlib.Path):
    self._privacy, self._path = privacy, path
    self.ledgers = [Ledger(privacy.unit, privacy.delta)] * num_sites
    self.counts: list[float] | None = None
    self._begun: set[int] = set()  # sites that this start has charged for the whole run
    if path.is_file():
      saved = json.loads(path.read_text())
      self.ledgers = [accounting.from_json(json.dumps(one)) for one in saved["ledgers"]]
      self.counts = saved["class_counts"]
      if len(self.ledgers) != num_sites:
        raise ValueError(
          f"{path} has ledgers of {len(self.ledgers)} sites, not {num_sites}; use another --run_dir"
        )

  def spend(self, release: Release, site_ids: Sequence[int], count: int = 1) -> None:
    for i in site_ids:
      self.ledgers[i] = accounting.spend(self.ledgers[i], release, count)
    self.save()

  def save(self) -> None:
    ledgers = [json.loads(accounting.to_json(one)) for one in self.ledgers]
    _write(self._path, {"ledgers": ledgers, "class_counts": self.counts})

  @property
  def epsilon(self) -> float:
    return accounting.of_sites(self.ledgers)

  def within_budget(self, site_ids: Sequence[int]) -> bool:
    """Whether one more round keeps within the target."""
    privacy = self._privacy
    if math.isinf(privacy.target):
      return True
    after = {
      accounting.spend(self.ledgers[i], privacy.release, self._in_round(i)) for i in site_ids
    }
    return accounting.of_sites(list(after)) <= privacy.target

  def spend_round(self, site_ids: Sequence[int]) -> None:
    """Charges a round to its sites; before anything is released."""
    for i in site_ids:
      self.ledgers[i] = accounting.spend(self.ledgers[i], self._privacy.release, self._in_round(i))
    self._begun |= set(site_ids)
    self.save()

  def _in_round(self, site: int) -> int:
    """How many releases one more round is."""
    return (
      self._privacy.num_steps if self._privacy.correlated is None else int(site not in self._begun)
    )


def reconcile(paths: Sequence[pathlib.Path]) -> None:
  """Makes the books of processes that each keep their own alike, before they go on: of each site
  the largest epsilon.

  A process that was killed may have booked a round that no other has begun. Books hold nothing that
  is not public.
  """
  books = [json.loads(path.read_text()) for path in paths if path.is_file()]
  if not books:
    return
  worst = lambda one: accounting.epsilon(accounting.from_json(json.dumps(one)))
  ledgers = [
    max(rows, key=worst) for rows in zip(*(book["ledgers"] for book in books), strict=True)
  ]
  counts = next((book["class_counts"] for book in books if book["class_counts"] is not None), None)
  for path in paths:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, {"ledgers": ledgers, "class_counts": counts})


def _write(path: pathlib.Path, book: dict[str, Any]) -> None:
  part = path.with_suffix(".part")
  part.write_text(json.dumps(book, indent=2) + "\n")
  part.replace(path)


_OUTSIDE = (
  "whoever sees updates, sums or models: server, other sites, users of the model; not the "
  "site itself"
)


def _clipping(kind: str, l2_clip_norm: float, augmentations: int) -> str:
  copies = (
    f"{augmentations} augmented copies of an image counting as one"
    if augmentations > 1
    else "one copy an image"
  )
  return f"{kind}, norm {l2_clip_norm:g}, {copies}"


def _facts_of_run(s: Train, noises: correlated.Config) -> dict[str, Any]:
  strategy = "binary trees"
  if isinstance(noises, correlated.BandedNoise):
    strategy = f"{len(noises.coefficients)} bands, Choquette-Choo et al. 2023"
  error = math.sqrt(float(np.mean(correlated.squared_errors(noises))))
  return {
    "mechanism": f"DP-FTRL at each site (Kairouz et al. 2021; {strategy}): per-unit gradients "
    f"clipped and summed, "
    "noise that cancels from step to step added by the site before its optimiser steps; epsilon is "
    "of the whole run "
    "from its first round on, and a run that is started again is charged again",
    "clipping": _clipping(s.dp_clipping, noises.l2_clip_norm, s.dp_augmentations),
    "sampler": f"none: batches of {s.batch_size} in one fixed order, at least "
    f"{noises.min_separation} steps between "
    f"two uses of {'an image' if s.dp == 'example' else 'a patient'}, at most "
    f"{noises.max_participations} uses in "
    f"{noises.num_steps} steps",
    "noise in the sum of all gradients so far": f"standard deviation {error:.4g} (root mean square "
    f"over steps)",
    "noise on disk": "checkpoints hold noise that is yet to cancel: whoever reads them can take it "
    "off; keep them as "
    "the images are kept",
  }


def _clipped(privacy: Privacy) -> str:
  assert privacy.clip is not None  # there is one for sites
  moves = privacy.clip.target_quantile is not None
  return f"clipped to {'a norm that moves' if moves else f'norm {privacy.clip.l2_clip_norm:g}'}"


def _facts_of_clip(privacy: Privacy) -> dict[str, Any]:
  """Where the clip moves: how, and what of the noise its bits take."""
  c = privacy.clip
  if c is None or c.target_quantile is None:
    return {}
  where = (
    "each site's bit"
    if privacy.noise is None
    else f"their sum, from at least {privacy.noise.num_honest} sites"
  )
  return {
    "clipping norm": f"begins at {c.l2_clip_norm:g} and follows the {c.target_quantile:g} quantile "
    f"of the norms of "
    f"updates, rate {c.learning_rate:g} (Andrew et al. 2021); each round's stands in its log as "
    f"l2_clip_norm",
    "noise of the clip": f"standard deviation {c.count_stddev:.6g} in {where}: whether an update "
    f"was within the clip, "
    "charged together with the updates",
  }


def facts(settings: Train, privacy: Privacy, ledgers: Sequence[Ledger]) -> dict[str, Any]:
  """What the report says, of ledgers at the run's end."""
  out: dict[str, Any] = {}
  if settings.dp_seed >= 0:
    out["NOT PRIVATE"] = (
      f"noise and batches come from dp_seed={settings.dp_seed}, which anybody can repeat"
    )
  out |= accounting.statement(ledgers)
  if privacy.delta > _LARGE_DELTA:
    out["WEAK"] = (
      f"delta={privacy.delta:.3g} is the probability of giving a unit away altogether; set a small "
      f"--delta"
    )
  if privacy.mechanism is not None:
    m = privacy.mechanism
    out |= {
      "mechanism": "DP-SGD at each site (Abadi et al. 2016): per-unit gradients clipped and "
      "summed, noise added by the "
      "site before its optimiser steps",
      "clipping": _clipping(m.clipping, m.l2_clip_norm, m.augmentations),
      "sampler": f"Poisson, rate {m.sampling_rate:.6g}, at most {m.max_units} units in a batch",
    }
    protected = _OUTSIDE
  elif privacy.correlated is not None:
    out |= _facts_of_run(settings, privacy.correlated)
    protected = _OUTSIDE
  elif privacy.noise is None:
    out["mechanism"] = f"Gaussian noise added by each site to its update, {_clipped(privacy)}"
    out |= _facts_of_clip(privacy)
    protected = "everybody outside the site, the server included"
  else:
    n = privacy.noise
    out |= {
      "mechanism": f"distributed {n.kind.replace('_', ' ')}: each site adds a share of the noise "
      f"before masking, "
      f"updates {_clipped(privacy)} and rounded in Z_2^{n.num_bits}",
      "noise in a sum": f"{n.noise_multiplier:.6g} times the clipping norm, from at least "
      f"{n.num_honest} sites, "
      "besides one that is curious and knows its own share",
      "encoding": f"rotated in chunks of {n.chunk:,}, rounded to multiples of {1 / n.scale:.4g}; a "
      f"number of a sum "
      f"wraps around with probability {n.wrap_probability:.2g} at most",
      "sensitivity multiplied by rounding": round(n.sensitivity_inflation, 4),
      "bytes of a masked update": n.size * -(-n.num_bits // 8),
      **_facts_of_clip(privacy),
    }
    protected = (
      "whoever sees sums and models, any one site included, while secure aggregation hides "
      "single updates"
    )
  return out | {
    "protected from": protected,
    "not covered": "validation images: their counts leave each site as exact sums under secure "
    "aggregation, and choose "
    "the round that is kept; other arms of a report and other runs on the same images, tuning "
    "included, add up",
  }
