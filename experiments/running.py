"""A training run from its flags to its report: arms, run folder, processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from primia_jax import models, sites
from primia_jax.data import scan
from primia_jax.data import sites as data_sites
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain

from . import (
  admission,
  arms,
  caching,
  crossings,
  folders,
  hospitals,
  image_facts,
  imageless,
  inputs,
  ledgers,
  markdown,
  model_files,
  multilabel_report,
  others,
  processes,
  refusals,
  report,
  segmentation_report,
  settings,
  starting,
  subgroup_tables,
  sums,
  trainers,
  transcripts,
  trial,
)
from .configs import Train, tasks

FLAGS = flags.FLAGS
PREDICTIONS = "predictions.npz"  # of test images: their labels, and [N, L] by each arm
_POOLED, _LOCAL = "pooled", "local"
_SAVE_EVERY = 5.0  # seconds; a checkpoint may take longer than a short round


def prepare_devices(placement: str) -> None:
  """Gives a CPU one JAX device for each core, where sites may run on a mesh.

  Call it before anything uses JAX.
  """
  if placement in ("auto", "mesh"):
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)  # no effect on accelerators


def open_run(config: Train, run_dir: str, program: str = "train_federated") -> pathlib.Path:
  """Creates the run folder, or finds in it the same run, to be continued.

  Settings may still change as long as nothing has been trained.

  Raises:
    ValueError: the folder holds a run with other settings or of another program, or something else.
  """
  if not run_dir:
    raise ValueError("run_dir is empty; name a folder for the run, such as --run_dir=runs/first")
  folder = pathlib.Path(run_dir).expanduser()
  saved = folder / "config.json"
  if saved.is_file():
    changed = settings.differences(settings.load(saved), config)
    begun_by = settings.read_json(saved).get("program") or program
    if not _has_begun(folder):
      if changed or begun_by != program:
        settings.save(config, saved, program)
    elif begun_by != program:
      raise ValueError(
        f"run_dir={run_dir} holds a run of {begun_by}, whose report and model {program} would "
        "replace; use another --run_dir"
      )
    elif changed:
      listed = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
      raise ValueError(
        f"run_dir={folder} holds a run with other settings ({listed}); use another --run_dir"
      )
  elif folder.is_dir() and any(folder.iterdir()):
    raise ValueError(
      f"run_dir={folder} is not empty and holds no run (no config.json); use another --run_dir"
    )
  refusals.folder("run_dir", run_dir)
  if config.privacy.ledger_dir:
    refusals.folder("ledger_dir", config.privacy.ledger_dir)
  folder.mkdir(parents=True, exist_ok=True)
  if not saved.is_file():
    settings.save(config, saved, program)
  return folder


def _has_begun(folder: pathlib.Path) -> bool:
  """Whether an arm has written a file; a run with refused settings has not."""
  others = trial.COORDINATOR, trial.FLOWER, ledgers.OF_PHANTOM
  arms = [path for path in folder.iterdir() if path.is_dir() and path.name not in others]
  return any(path.is_file() for arm in arms for path in arm.rglob("*"))


def baselines(names: Sequence[str], config: Train) -> list[str]:
  """What a federated run is compared with, from the flag.

  Raises:
    ValueError: for other names, or baselines where each site has a process.
  """
  if [*names] == ["auto"]:
    alone = config.in_processes or config.privacy.dp != "none"
    return [] if alone else [_POOLED, _LOCAL]
  chosen = [name for name in names if name]
  if unknown := set(chosen) - {_POOLED, _LOCAL}:
    raise ValueError(f"baselines={sorted(unknown)}; there are pooled and local, or auto alone")
  if chosen and config.in_processes:
    raise ValueError(
      f"baselines={chosen} with placement=flower: baselines need all sites' images in one "
      "place; leave baselines out"
    )
  return chosen


def run(
  config: Train,
  folder: pathlib.Path,
  *,
  federated: bool,
  baselines: Sequence[str] = (),
  log: Callable[[dict[str, Any]], None] = lambda row: None,
  seat: processes.Seat | None = None,
) -> dict[str, Any]:
  """Trains all arms, tests them on the same images and writes the report.

  Args:
    config: the settings.
    folder: the run folder, from `open_run`.
    federated: whether sites train together (then that is the main arm); else the pooled model is.
    baselines: further arms, of "pooled" and "local".
    log: called with each round's line.
    seat: this process's place among the processes, where each site has one.

  Returns:
    What `metrics.json` holds.

  Raises:
    ValueError: another process is at work on this run, or on this site of it.
  """
  with contextlib.ExitStack() as locks:
    locks.enter_context(folders.alone(folder / "process.lock"))
    if seat is not None:
      locks.enter_context(folders.alone(seat.own / "lock"))
    return _run(config, folder, federated, baselines, log, seat)


def _run(
  config: Train,
  folder: pathlib.Path,
  federated: bool,
  baselines: Sequence[str],
  log: Callable[[dict[str, Any]], None],
  seat: processes.Seat | None,
) -> dict[str, Any]:
  """`run`, alone in the folder."""
  process = None if seat is None else seat.number
  is_private = config.privacy.dp != "none"
  ledger_dir, own = None, folder if seat is None else seat.own
  if is_private:
    ledger_dir = ledgers.folder(config.privacy, config.data, own, process)
    if seat is not None and seat.site is not None:
      ledger_dir = seat.site.ledger
    Chain(ledger_dir)  # refused before any work, if it cannot be written or is broken
  images = inputs.site_images(config, process)
  image_facts.check_sizes(config, images.train)
  if seat is not None and seat.site is not None:
    admission.check_images(seat.site, images)
  compared = subgroup_tables.of_images(config.comparison.columns(), images.test)
  label_names = images.train.dataset.label_names
  tasks.check(config.model.model, images.train.dataset, config.data.is_multi)
  task = tasks.of(config.model.model, config.data.is_multi)
  model_config = config.model.config(config.data, len(label_names))
  model = models.build(model_config)
  everyone, policy = tuple(range(config.hospitals.num_sites)), config.disclosure.policy()
  if seat is not None and seat.site is not None:
    policy = admission.own_policy(seat.site, config)
  if seat is None:
    place = processes.Place(sites.parse_placement(config.federation.placement))
  else:
    most, floor = config.hospitals.most_images, policy.fewest_patients
    said = others.told(images, seat.number, most, floor) if config.data.site_data else b""
    place, told = processes.connect(config, seat, said)
    if config.data.site_data:
      images = others.with_others(images, seat.number, told, most, config.privacy.validates)
      floor = others.largest_floor(told)
      config = imageless.sums_of_others(config, images.train.sizes)
    config = settings.replace(config, fewest_patients=floor)
    policy = dataclasses.replace(policy, fewest_patients=floor)
    if seat.site is not None:
      admission.check_sums(seat.site, config)
      config = admission.looking(seat.site, config)
  without = [i for i, size in enumerate(images.train.sizes) if not size]
  if without:
    print(f"sites without images: {without}; sums of updates are of {config.sites_in_round} sites")

  plan: list[tuple[str, tuple[int, ...], bool]] = (
    [("federated", everyone, True)] if federated else []
  )
  if _POOLED in baselines or not federated:
    plan.append((_POOLED, everyone, False))
  if _LOCAL in baselines:  # a site that holds no image out cannot choose its best round
    able = [i for i in everyone if images.validation.sizes[i] or not config.privacy.validates]
    plan += [(f"local: site {site}", (site,), False) for site in able]

  cohorts: dict[str, trainers.Cohort] = {}
  for number, (name, members, together) in enumerate(plan, start=1):
    parts = images.train, images.validation
    train, validation = (p if together else data_sites.merge(p, members) for p in parts)
    mine = np.asarray(everyone if together else (0,), np.int32)
    mine = mine if process is None else mine[process : process + 1]
    patients = images.patients
    if config.privacy.by_patient and not patients:
      patients = inputs.count_patients(train)
    which = f"arm {number} of {len(plan)}: " if len(plan) > 1 else ""
    cohorts[name] = trainers.Cohort(name, train, validation, mine, patients, which)
  predict = task.predictor(model.apply)
  # One trainer for the federation and one that all single cohorts share; privacy depends on a
  # cohort's own size.
  kind = lambda cohort: (len(cohort.train.sites) > 1, cohort.name if is_private else "")
  shared: dict[Any, trainers.Trainer] = {}
  for key in dict.fromkeys(map(kind, cohorts.values())):
    alike = [cohort for cohort in cohorts.values() if kind(cohort) == key]
    where = place if key[0] else processes.Place(sites.loop())
    shared[key] = trainers.make_trainer(config, model, model_config, alike, where)

  predictions, trained = {}, {}
  for name, cohort in cohorts.items():
    trainer = shared[kind(cohort)]
    arm_folder = folder / name.replace(": ", "_").replace(" ", "_")
    arm_folder.mkdir(exist_ok=True)
    with place.together():
      trained[name] = arms.train(
        config, cohort, trainer, model_config, arm_folder, ledger_dir, log, _SAVE_EVERY
      )
    if len(images.test):
      predictions[name] = predict(trained[name].models, images.test.images)
  main_arm = plan[0][0]
  main = trained[main_arm]
  facts = {
    f"{name}: {what}": value for name, arm in trained.items() for what, value in arm.facts.items()
  }
  if config.record_transcript:
    facts[markdown.NOT_PRIVATE] = transcripts.why(config, folder / main_arm)
  of_images = image_facts.facts(config, images.train, images.validation, images.test)
  if without:
    of_images["sites without images"] = f"{without}, in no sum of updates"
  if _LOCAL in baselines:
    for site in (i for i in everyone if f"local: site {i}" not in trained):
      of_images[f"site {site}"] += "; so this site is not trained alone"
  model_files.save_model(folder / "model", main.models)
  about = {
    "label_names": list(label_names),
    "model": dataclasses.asdict(model_config),
    "ct_window": config.data.ct_window,
    "grey_bits": config.data.grey_bits or scan.bits(images.train.dataset),
    "multi_label": config.data.is_multi,
  }
  (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")
  radiologist = {}
  is_kermany = label_names == ("normal", "bacterial", "viral") and len(images.test) == 624
  if is_kermany and config.data.data != "phantom":  # Kaissis et al. 2021
    radiologist = {"radiologist (PriMIA)": [[189, 3, 42], [67, 85, 90], [13, 11, 124]]}
  title = f"Federated training, {len(everyone)} sites" if federated else "Pooled training"
  spent = {name: _by_site(trained[name].ledgers, members) for name, members, _ in plan}
  shown = settings.flat(config) | facts
  if seat is not None and seat.site is not None:
    shown["site_data"] = seat.site.member.own.data  # which stands there for all sites
  secure = sums.facts(config, images, main.sent) if federated else None
  about_run = main.rows, main.sent, len(label_names), len(images.test)
  crossed = (crossings.of_run(config, *about_run) if federated else []) + place.crossed()
  order, privacy = _report_order(trained), main.privacy
  if privacy is not None and ledger_dir is not None:
    is_alone = seat is not None and (bool(config.data.sources) or ledger_dir.is_relative_to(own))
    only = f"; this is the ledger of site {process} alone; each other site has its own" * is_alone
    all_runs = ledgers.together(Chain(ledger_dir), privacy["delta"], only)
    privacy = ledgers.of_arms(spent) | privacy | all_runs
  of_run = report.Facts(shown, of_images, main.rows, secure, privacy, policy, crossed)
  if not len(images.test):
    return report.write_unscored(folder, title, label_names, of_run)
  if task.of_pixels or task.is_multi:
    arms_found = {name: predictions[name] for name in order}
    writer = segmentation_report if task.of_pixels else multilabel_report
    return writer.write(folder, title, images.test, arms_found, main_arm, config.seed, of_run)
  found = {name: predictions[name] for name in order}
  (folder / PREDICTIONS).unlink(missing_ok=True)
  if not config.disclosure.fewest_patients:  # it is of single patients
    np.savez_compressed(folder / PREDICTIONS, labels=images.test.labels, **found)
  return report.write_report(
    folder,
    title=title,
    data_name=images.test.name,
    arms={name: report.Arm(images.test.labels, of_arm) for name, of_arm in found.items()},
    label_names=label_names,
    facts=of_run,
    references=radiologist,
    hospitals=hospitals.of_phantom(config, images.train.sizes, images.test),
    patients=images.test.groups,
    compared=compared,
    main_arm=main_arm,
    seed=config.seed,
  )


def _by_site(charged: Sequence[Ledger] | None, sites: Sequence[int]) -> dict[int, Ledger] | None:
  """The ledger of each site's images in an arm, which has one for each site or one for all."""
  if charged is None:
    return None
  return {site: charged[i if len(charged) > 1 else 0] for i, site in enumerate(sites)}


def _report_order(arms: dict[str, Any]) -> list[str]:
  order = *(a for a in arms if a.startswith(_LOCAL)), _POOLED, "federated"
  return [name for name in order if name in arms]


def tensorboard(folder: pathlib.Path) -> Callable[[dict[str, Any]], None]:
  """Returns a log that writes TensorBoard event files.

  Raises:
    ValueError: tensorboardX is not installed.
  """
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise ValueError(
      "--tensorboard needs tensorboardX: pip install 'primia-jax[tensorboard]'"
    ) from error
  writers: dict[str, Any] = {}

  def log(row: dict[str, Any]) -> None:
    arm = row["arm"].replace(": ", "_").replace(" ", "_")
    if arm not in writers:
      writers[arm] = SummaryWriter(str(folder / "tensorboard" / arm))
    for name, value in row.items():
      if isinstance(value, float):
        writers[arm].add_scalar(name, value, row["round"])
    writers[arm].flush()

  return log


def start(
  main: Callable[..., None], keeps_small: bool = False, commands: Sequence[str] = ()
) -> None:
  """Runs a binary, as `starting.start` does, with compiled programs kept on disk.

  Args:
    main: the binary's work.
    keeps_small: keep on disk also compiled programs that took less than a second, for work that
      has many of them.
    commands: the first argument is one of these words, which `main` is given.
  """
  starting.start(main, caching.keep_all if keeps_small else caching.keep, commands)
