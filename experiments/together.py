"""An evaluation by several hospitals, from its flags to its reports: a trial of all on this
machine, or this hospital alone.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import jax
from absl import flags

from . import (
  admission,
  approving,
  evaluating,
  evaluations,
  folders,
  model_files,
  noised_counts,
  pooled_report,
  processes,
  scored_images,
  settings,
  site_folders,
  trial,
)
from .configs.data import Data
from .configs.scoring import Evaluate, Scoring
from .seating import NAMES, Seating

FLOWER = "flower"  # as placement
_OF_IMAGES = "data", "site_data"


def score(values: flags.FlagValues, site: admission.Site | None, module: str) -> None:
  """Scores a model at several hospitals.

  Args:
    values: of the program's flags.
    site: whose folder it is, if `primia-site` has made one.
    module: of the program, which a trial starts for each site.

  Raises:
    ValueError, FileNotFoundError, NotApproved: before any image is read; or as `evaluating.run`.
  """
  for name in ("unlabelled", "overlays", "subgroups"):
    if values[name].value:
      raise ValueError(
        f"{name}={values[name].value} with placement=flower: hospitals sum counts of labelled "
        "images; leave it out"
      )
  seating = settings.from_flags(Seating, values)
  given = [name for name in NAMES if values[name].present]
  number = int(values.site)
  if site is not None:
    number = admission.number(site, number if "site" in given else None)
    model = evaluations.load(str(site.run))
    config = _configured(values, site)
  else:
    model = evaluations.load(values.run_dir, values.classes)
    config = _of_flags(values, model)
  is_site = site is not None or "site" in given
  seating.check(given, FLOWER, number, config.scoring.num_sites, is_site)
  seating.check_channel(None if site is None else site.folder)
  if number < 0:
    _start_trial(values, config, seating, module)
  else:
    _score_one(values, site, config, model, number, seating)


def _score_one(
  values: flags.FlagValues,
  site: admission.Site | None,
  config: Evaluate,
  model: evaluations.Model,
  number: int,
  seating: Seating,
) -> None:
  """This hospital's part."""
  if site is None:
    own = folders.role("output_dir", _output(values))
    own.mkdir(mode=0o700, parents=True, exist_ok=True)
    processes.check_own(own)
    folder, floor = own / processes.RUN, values.fewest_patients
    of = config, model.label_names, values.run_dir, number
    dataset, warnings = scored_images.of_trial(*of), scored_images.warnings(*of)
  else:
    admission.admit_scoring(site, config, model)
    own, folder = site.folder, site.run
    floor = site.member.limits.fewest_patients
    dataset, warnings = scored_images.of_source(config, model.label_names), {}
    admission.check_scored(site, dataset)
  evaluating.check(config, model, dataset)
  ledger_dir = None
  if config.scoring.dp_count_noise:
    of_trial = config, values.run_dir, own, number
    ledger_dir = noised_counts.ledger_folder(*of_trial) if site is None else site.ledger
  seat = processes.Seat(number, seating.patience, own, site, seating.channel)
  has_patients = bool(config.data.patient_column or config.data.patient_pattern)
  with folders.alone(own / "lock"):
    about_images = floor, has_patients, warnings, ledger_dir
    result = evaluating.run(config, model, dataset, seat, folder, *about_images)
  pooled_report.print_summary(result, folder)


def _configured(values: flags.FlagValues, site: admission.Site) -> Evaluate:
  """What the site is offered: what was approved, or what flags say instead, which `admission`
  refuses.
  """
  for name in (*approving.SITES_OWN, "output_dir", "fewest_patients", "classes"):
    if name in values and values[name].present:
      raise ValueError(
        f"{name}={values[name].value}: images and floors of this site are in "
        f"{site.folder / site_folders.SETTINGS}, and results go to {site.run}; leave {name} out"
      )
  config = evaluations.agreed(site.approved, site.member.own)
  shared = evaluations.names_of_shared()
  return settings.replace(config, **{n: values[n].value for n in shared if values[n].present})


def _of_flags(values: flags.FlagValues, model: evaluations.Model) -> Evaluate:
  """The configuration of a trial, or of one of its sites."""
  if any(values[name].value for name in _OF_IMAGES):
    model_files.take_form(values, values.run_dir, model.config)
    num_sites = len(settings.names(values.site_data))
  else:
    num_sites = scored_images.sites_of(values.run_dir)
    check_unnamed(values)
  scoring = settings.from_flags(Scoring, values)
  if num_sites and not values["num_sites"].present:
    scoring = dataclasses.replace(scoring, num_sites=num_sites)
  if scoring.model_sha256 not in ("", model.sha256):
    raise ValueError(
      f"model_sha256={scoring.model_sha256}: the model in {values.run_dir} has {model.sha256}; "
      "name the right one"
    )
  return Evaluate(values.seed, settings.from_flags(Data, values), scoring)


def check_unnamed(values: flags.FlagValues) -> None:
  """Raises a ValueError for flags of images, where none are named."""
  names = set(settings.flat(Data())) - {"image_size", "channels", "data"}
  if given := sorted(name for name in names if values[name].present):
    raise ValueError(
      f"{given[0]}={values[given[0]].value} without data: the run's own test images are taken as "
      "the run took them; name the images with --data"
    )


def _output(values: flags.FlagValues) -> str:
  """The folder for the results, which must be named where no site's own folder has a place."""
  found: Any = values.output_dir
  if not found:
    raise ValueError(
      "output_dir is empty; name a folder for the results, such as --output_dir=results"
    )
  return str(found)


def _start_trial(values: flags.FlagValues, config: Evaluate, seating: Seating, module: str) -> None:
  """Starts Flower and a process for each site on this machine, and waits for their end."""
  jax.config.update("jax_platforms", "cpu")  # leaves the accelerator to the processes
  folder, n = folders.to_write(_output(values), ()), config.scoring.num_sites
  sites = processes.sites_folder(folder, seating.sites_dir)
  for i in range(n):
    if (path := sites / f"site_{i}" / processes.RUN / "report.md").exists():
      raise ValueError(
        f"output_dir={values.output_dir}: {path} is of an earlier evaluation, which is never "
        "overwritten; name another folder"
      )
  scored_images.check_sources(config, values.run_dir)
  trial.check_installed(seating.flower_simulation)
  folder.mkdir(parents=True, exist_ok=True)
  trial.launch(
    module, sys.argv[1:], n, folder, sites, seating.stage_timeout, "output_dir",
    seating.flower_simulation,
  )  # fmt: skip
  print(f"each site's reports: {sites / 'site_N' / processes.RUN}")
