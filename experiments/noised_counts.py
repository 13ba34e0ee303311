"""An evaluation whose counts leave the hospitals under noise: its cost, and the ledger of each."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from primia_jax import prng, score_noise
from primia_jax.data.dataset import Dataset
from primia_jax.data.sites import Part
from primia_jax.privacy import ledger
from primia_jax.privacy.chain import Chain

from . import admission, folders, ledgers, processes
from .configs.privacy import Privacy
from .configs.scoring import Evaluate


def ledger_folder(config: Evaluate, run_dir: str, own: pathlib.Path, number: int) -> pathlib.Path:
  """The folder of a site's ledger in a trial: where a training on the same images has it.

  Args:
    config: of the trial.
    run_dir: of the model, whose images are scored where none are named.
    own: the site's own folder, for images that are synthetic.
    number: of the site.

  Raises:
    FileNotFoundError: there are no such images.
  """
  data = config.data
  if not (data.data or data.sources):
    data = folders.settings_of(run_dir).data
  return ledgers.folder(Privacy(), data, own, number)


def begin(
  config: Evaluate,
  num_classes: int,
  dataset: Dataset,
  seat: processes.Seat,
  folder: pathlib.Path,
  ledger_dir: pathlib.Path,
  has_patients: bool,
) -> ledger.Ledgers:
  """Opens the ledger of this site's images, or of an earlier start of the same evaluation.

  Args:
    config: of the evaluation.
    num_classes: of the model.
    dataset: the images that are scored.
    seat: of this process.
    folder: of the results.
    ledger_dir: of the images.
    has_patients: the site has named whose its images are. Where it has not, and no two images
      share a patient, each image is a unit.

  Raises:
    ValueError, FileNotFoundError: the ledger is damaged, or the evaluation began with other images.
  """
  chain, n = Chain(ledger_dir), config.scoring.num_sites
  is_known = has_patients or len(np.unique(dataset.groups)) < len(dataset)
  cost = config.scoring.cost(num_classes, "patient" if is_known else "example")
  rows = tuple(np.arange(len(dataset) if i == seat.number else 0) for i in range(n))
  units = ledgers.units(chain, Part(dataset, rows), seat.number)
  of_sites = [units if i == seat.number else None for i in range(n)]
  return ledger.Ledgers(cost, folder / ledger.LEDGER, chain, of_sites)


def check_budget(charges: ledger.Ledgers, seat: processes.Seat) -> None:
  """Refuses an evaluation that would cost this site more than is left of its budget; raises as
  `admission.check_budget`.
  """
  if seat.site is not None:
    of_run = seat.site, charges.plan, charges.chain
    admission.check_budget(*of_run, rounds=1, done=0, counted=True)


def charge(charges: ledger.Ledgers, seat: processes.Seat) -> None:
  """Charges this site's images, before their counts leave.

  A start that is killed before its sum is opened is charged, and so is the next one: each has noise
  of its own.
  """
  charges.spend_round([seat.number])
  if seat.site is not None:
    admission.note_charged(seat.site, charges.chain.last)


def statement(charges: ledger.Ledgers, number: int) -> dict[str, Any]:
  """What this site's own report says of its ledger."""
  only = f"; this is the ledger of site {number} alone"
  together = ledgers.together(charges.chain, only=only)
  return ledger.statement([charges.ledgers[number]]) | together


def counted(config: Evaluate, dataset: Dataset, probabilities: Any) -> dict[str, np.ndarray]:
  """This site's counts, with noise of a fresh secret."""
  s = config.scoring
  given = dataset.labels, probabilities, dataset.groups, s.score_bins, s.most_images
  return score_noise.noised(*given, s.dp_count_noise, prng.random_key())
