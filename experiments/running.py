"""A training run from its flags to its report: arms, run folder, processes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

from primia_jax import evaluation, models, sites
from primia_jax.data import patient_ids
from primia_jax.data import sites as data_sites
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain
from primia_jax.types import ModelState, Params

from . import arms, hospitals, inputs, ledgers, markdown, processes, report, settings, sums
from .configs import Train
from .configs.model import normalise

FLAGS = flags.FLAGS
_POOLED, _LOCAL = "pooled", "local"
_SAVE_EVERY = 5.0  # seconds; a checkpoint may take longer than a short round


def prepare_devices(placement: str) -> None:
  """Gives a CPU one JAX device for each core, where sites may run on a mesh.

  Call it before anything uses JAX.
  """
  if placement in ("auto", "mesh"):
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)  # no effect on accelerators


def open_run(config: Train, run_dir: str) -> pathlib.Path:
  """Creates the run folder, or finds in it the same run, to be continued.

  Settings may still change as long as nothing has been trained.

  Raises:
    ValueError: the folder holds a run with other settings, or something else.
  """
  if not run_dir:
    raise ValueError("run_dir is empty; name a folder for the run, such as --run_dir=runs/first")
  folder = pathlib.Path(run_dir)
  saved = folder / "config.json"
  if saved.is_file():
    changed = settings.differences(settings.load(saved), config)
    if changed and not _has_begun(folder):
      settings.save(config, saved)
    elif changed:
      listed = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
      raise ValueError(
        f"{folder} holds a run with other settings ({listed}); use another --run_dir"
      )
  elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise ValueError(
      f"{folder} is not empty and holds no run (no config.json); use another --run_dir"
    )
  folder.mkdir(parents=True, exist_ok=True)
  if not saved.is_file():
    settings.save(config, saved)
  return folder


def _has_begun(folder: pathlib.Path) -> bool:
  """Whether an arm has written a file; a run with refused settings has not."""
  others = processes.MEETING, ledgers.OF_PHANTOM
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
      f"baselines={chosen} with placement=processes: baselines need all sites' images in one "
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
    What `metrics.json` holds; empty in all processes but the first.

  Raises:
    ValueError: another process is at work on this run, or on this site of it.
  """
  with contextlib.ExitStack() as locks:
    locks.enter_context(alone(folder / f"process_{seat.number if seat else 0}.lock"))
    if seat is not None:
      locks.enter_context(alone(seat.own / "lock"))
    return _run(config, folder, federated, baselines, log, seat)


@contextlib.contextmanager
def alone(path: pathlib.Path) -> Iterator[None]:
  """Keeps a second process out while this one works on a run.

  Two would overwrite each other's checkpoints and lines.

  Raises:
    ValueError: another process holds the lock.
  """
  with path.open("w") as file:
    try:
      fcntl.flock(
        file, fcntl.LOCK_EX | fcntl.LOCK_NB
      )  # it ends with the process, even a killed one
    except BlockingIOError:
      raise ValueError(
        f"another process is at work in {path.parent}; wait for it or stop it"
      ) from None
    yield


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
    Chain(ledger_dir)  # refused before any work, if it cannot be written or is broken
  images = inputs.site_images(config, process)
  label_names = images.train.dataset.label_names
  model_config = config.model.config(config.data, len(label_names))
  model = models.build(model_config)
  everyone = tuple(range(config.hospitals.num_sites))
  if seat is None:
    place = processes.Place(sites.parse_placement(config.federation.placement))
  else:
    said = inputs.told(images, seat.number) if config.data.site_data else b""
    place, told = processes.connect(config, folder, seat, said)
    if config.data.site_data:
      images = inputs.with_others(images, seat.number, told, config.privacy.validates)

  plan: list[tuple[str, tuple[int, ...], bool]] = (
    [("federated", everyone, True)] if federated else []
  )
  if _POOLED in baselines or not federated:
    plan.append((_POOLED, everyone, False))
  if _LOCAL in baselines:
    plan += [(f"local: site {site}", (site,), False) for site in everyone]

  cohorts: dict[str, arms.Cohort] = {}
  for number, (name, members, together) in enumerate(plan, start=1):
    parts = images.train, images.validation
    train, validation = (p if together else data_sites.merge(p, members) for p in parts)
    mine = np.asarray(everyone if together else (0,), np.int32)
    mine = mine if process is None else mine[process : process + 1]
    patients = images.patients
    if config.privacy.by_patient and not patients:
      patients = inputs.count_patients(train)
    which = f"arm {number} of {len(plan)}: " if len(plan) > 1 else ""
    cohorts[name] = arms.Cohort(name, train, validation, mine, patients, which)
  predict = evaluation.predictor(model.apply, normalise)
  # One trainer for the federation and one that all single cohorts share; privacy depends on a
  # cohort's own size.
  kind = lambda cohort: (len(cohort.train.sites) > 1, cohort.name if is_private else "")
  trainers = {}
  for key in dict.fromkeys(map(kind, cohorts.values())):
    alike = [cohort for cohort in cohorts.values() if kind(cohort) == key]
    where = place if key[0] else processes.Place(sites.loop())
    trainers[key] = arms.make_trainer(config, model, model_config, alike, where)

  probabilities, trained = {}, {}
  for name, cohort in cohorts.items():
    trainer = trainers[kind(cohort)]
    arm_folder = folder / name.replace(": ", "_").replace(" ", "_")
    arm_folder.mkdir(exist_ok=True)
    trained[name] = arms.train(
      config, cohort, trainer, model_config, arm_folder, ledger_dir, log, _SAVE_EVERY
    )
    if not process:
      probabilities[name] = predict(trained[name].models, images.test.images)
  if place.exchange is not None:
    place.exchange.close()
  if process:
    return {}
  main_arm = plan[0][0]
  main = trained[main_arm]
  facts = {
    f"{name}: {what}": value for name, arm in trained.items() for what, value in arm.facts.items()
  }
  facts["patients of training images"] = patient_ids.described(images.train.dataset)
  save_model(folder / "model", main.models)
  about = {"label_names": list(label_names), "model": dataclasses.asdict(model_config)}
  (folder / "model.json").write_text(json.dumps(about, indent=2) + "\n")
  radiologist = {}
  is_kermany = label_names == ("normal", "bacterial", "viral") and len(images.test) == 624
  if is_kermany and config.data.data != "phantom":  # Kaissis et al. 2021
    radiologist = {"radiologist (PriMIA)": [[189, 3, 42], [67, 85, 90], [13, 11, 124]]}
  title = f"Federated training, {len(everyone)} sites" if federated else "Pooled training"
  spent = {name: _by_site(trained[name].ledgers, members) for name, members, _ in plan}
  secure = sums.facts(config, images, main.models[0]) if federated else None
  order, privacy = _report_order(trained), main.privacy
  if privacy is not None and ledger_dir is not None:
    is_alone = seat is not None and (bool(config.data.sources) or ledger_dir.is_relative_to(own))
    only = "; this is the ledger of site 0 alone, and each other site has its own" * is_alone
    all_runs = ledgers.together(Chain(ledger_dir), privacy["delta"], only)
    privacy = ledgers.of_arms(spent) | privacy | all_runs
  return report.write_report(
    folder,
    title=title,
    data_name=images.test.name,
    arms={name: report.Arm(images.test.labels, probabilities[name]) for name in order},
    label_names=label_names,
    config=settings.flat(config) | facts,
    versions=report.versions(),
    rounds=main.rows,
    secure_aggregation=secure,
    privacy=privacy,
    references=radiologist,
    hospitals=hospitals.of_phantom(config, images.train.sizes, images.test),
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


def save_model(folder: pathlib.Path, trained: list[tuple[Params, ModelState]]) -> None:
  """Saves models for `evaluate`, replacing older ones; called by the first process alone."""
  alone = ocp.options.MultiprocessingOptions(
    primary_host=0, active_processes={0}, barrier_sync_key_prefix="model"
  )
  with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer:
    tree = [{"params": params, "model_state": model_state} for params, model_state in trained]
    checkpointer.save(folder.absolute(), {"models": tree}, force=True)


def load_model(
  run_dir: str,
) -> tuple[models.Model, list[tuple[Params, ModelState]], tuple[str, ...], models.ModelConfig]:
  """Loads what `save_model` saved.

  Returns:
    (model, its parameters and state, one pair for each site where FedBN was used, label names, its
    configuration).

  Raises:
    FileNotFoundError: the folder holds no finished run.
  """
  about = settings.read_json(pathlib.Path(run_dir) / "model.json")
  config = models.ModelConfig(
    **about["model"] | {"image_shape": tuple(about["model"]["image_shape"])}
  )
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore((pathlib.Path(run_dir) / "model").absolute())
  trained = [(m["params"], m["model_state"] or {}) for m in tree["models"]]
  return models.build(config), trained, tuple(about["label_names"]), config


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


def print_summary(result: dict[str, Any], folder: pathlib.Path) -> None:
  """Prints the arms' scores and where the report is."""
  print(f"\n{result['title']} on {result['data']}: {result['num_examples']} test images")
  for what, why in markdown.warnings(result):
    print(f"  {what}: {why}")
  for name, scores in result["arms"].items():
    show = lambda field, scores=scores: "{value:.3f} [{low:.3f}, {high:.3f}]".format(
      **scores[field]
    )
    print(f"  {name:16} accuracy {show('accuracy')}   MCC {show('mcc')}")
  if said := markdown.learnt(result):
    print(said)
  print(f"Report: {folder / 'report.md'}")


def _cache_dir() -> pathlib.Path:
  home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(home) / "primia_jax" / "xla"


def start(main: Callable[[], None]) -> None:
  """Runs a binary: bad settings and failed runs end it with their reason, not with a traceback."""

  def guarded(arguments: list[str]) -> None:
    if len(arguments) > 1:
      raise app.UsageError(f"unexpected arguments {arguments[1:]}; flags are written --name=value")
    if not FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_compilation_cache_dir", str(_cache_dir()))
    try:
      main()
    except KeyboardInterrupt:
      sys.exit(
        "\nstopped; start again with the same --run_dir to continue from the last saved round"
      )
    except (ValueError, FileNotFoundError, RuntimeError) as error:
      logging.debug("traceback:", exc_info=True)  # shown with --verbosity=1
      sys.exit(f"error: {error}")

  app.run(guarded)
