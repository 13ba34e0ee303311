"""A training run from its flags to its report: arms, run folder, processes."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import app, flags, logging

from experiments import arms, inputs, processes, report, settings
from experiments.configs import Train
from experiments.configs.model import normalise
from primia_jax import evaluation, models, secagg, sites
from primia_jax.data import patient_ids
from primia_jax.data import sites as data_sites
from primia_jax.types import ModelState, Params

FLAGS = flags.FLAGS
_POOLED, _LOCAL = "pooled", "local"


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
  arms = [path for path in folder.iterdir() if path.is_dir() and path.name != processes.MEETING]
  return any(path.is_file() for arm in arms for path in arm.rglob("*"))


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

  Locks the run: two processes that write one ledger would overwrite each other's charges.

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
      images = inputs.with_others(images, seat.number, told)

  plan: list[tuple[str, tuple[int, ...], bool]] = (
    [("federated", everyone, True)] if federated else []
  )
  if _POOLED in baselines or not federated:
    plan.append((_POOLED, everyone, False))
  if _LOCAL in baselines:
    plan += [(f"local: site {site}", (site,), False) for site in everyone]

  cohorts: dict[str, arms.Cohort] = {}
  for name, members, together in plan:
    parts = images.train, images.validation
    train, validation = (p if together else data_sites.merge(p, members) for p in parts)
    mine = np.asarray(everyone if together else (0,), np.int32)
    mine = mine if process is None else mine[process : process + 1]
    patients = images.patients
    if config.privacy.by_patient and not patients:
      patients = inputs.count_patients(train)
    cohorts[name] = arms.Cohort(name, train, validation, mine, patients)
  predict = evaluation.predictor(model.apply, normalise)
  # One trainer for the federation and one that all single cohorts share; privacy depends on a
  # cohort's own size.
  is_private = config.privacy.dp != "none"
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
    trained[name] = arms.train(config, cohort, trainer, model_config, arm_folder, log)
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
  secure = secure_aggregation_facts(config, images, main.models[0]) if federated else None
  order = _report_order(trained)
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
    privacy=main.privacy,
    references=radiologist,
    main_arm=main_arm,
    seed=config.seed,
  )


def _report_order(arms: dict[str, Any]) -> list[str]:
  order = *(a for a in arms if a.startswith(_LOCAL)), _POOLED, "federated"
  return [name for name in order if name in arms]


def secure_aggregation_facts(
  config: Train, images: inputs.Inputs, model: tuple[Params, ModelState]
) -> dict[str, Any] | None:
  """What the report says of the protection of updates; None where they went in the clear."""
  if not config.aggregation.is_secure:
    return None
  n = config.sites_in_round
  secure = config.aggregation.secure_sum(n, n, config.in_processes)
  numbers = sum(np.size(a) for a in jax.tree.leaves(model))
  encoding = {
    "ring": f"integers modulo 2^{secure.fixed.num_bits}, {secure.fixed.fraction_bits} fraction "
    f"bits",
    "largest magnitude of a number in an update": secure.max_abs,
    # Rounded down, and up by at most 1 %, so that both claims hold.
    "largest magnitude of a sum before overflow": math.floor(1e3 * secure.fixed.max_abs) / 1e3,
    "largest quantisation error of a sum": float(f"{1.005 * secure.error_bound:.3g}"),
    "bytes of a masked update": numbers * secagg.bytes_per_number(secure),
  }
  if config.privacy.dp_noise == "distributed":  # which has an encoding of its own
    encoding = {
      "ring": f"integers modulo 2^{secure.fixed.num_bits}; their encoding stands under privacy"
    }
  return {
    "sites in a sum": secure.num_sites,
    "peers of each site (pairwise masks by ChaCha20)": secure.num_peers,
    "of a site and its peers, who must answer": secure.threshold or "all: no site may drop out",
    **encoding,
    "who learns what": "the server sees sums only; " + _whose_keys(config, secure) + _of_two(n),
    "known to all": (
      f"sizes of the smallest and largest site: {min(images.train.sizes)} and "
      f"{max(images.train.sizes)} training images"
      + "; each site has told all others how many images and patients it has"
      * bool(images.patients)
    ),
  }


def _whose_keys(config: Train, secure: secagg.SecureSum) -> str:
  if config.in_processes:
    keys = (
      "each site's process agrees on keys with the others anew for each sum, and no other "
      "process knows them"
    )
    return f"{keys}; all sites see the sums, too"
  keys = (
    "keys are agreed and shared anew for each sum"
    if secure.threshold
    else "pair keys come from a trusted dealer"
  )
  return f"{keys}. This run was a simulation: one process played the server and all sites"


def _of_two(num_sites: int) -> str:
  if num_sites > 2:
    return ""
  return ". Each of two sites can subtract its own update from the sum and learns the other's"


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
  if "NOT PRIVATE" in (result["privacy"] or {}):
    print(f"  NOT PRIVATE: {result['privacy']['NOT PRIVATE']}")
  for name, scores in result["arms"].items():
    show = lambda field, scores=scores: "{value:.3f} [{low:.3f}, {high:.3f}]".format(
      **scores[field]
    )
    print(f"  {name:16} accuracy {show('accuracy')}   MCC {show('mcc')}")
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
