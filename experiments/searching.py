"""Trials of a search: each is a federated run on the same images, scored by the best MCC on the
sites' validation images, which they sum as in any run. Test images are never scored.

The study lies in `search.db` of the search's folder (SQLite), and the rounds of trial N in
`trials/N`. A trial that was killed is continued, from its last checkpoint, as a new one.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from primia_jax import models, sites

from . import arms, image_facts, inputs, lines, search_space, trainers
from .configs import Train, tasks
from .processes import Place
from .search_space import Space

STUDY, TRIALS = "search.db", "trials"
PRUNERS = ("median", "none")
TENTHS = 10  # a trial's progress is compared at every tenth of its rounds
_SPACE, _FOLDER, _WHY = "space", "folder", "why"
_SAVE_EVERY = 5.0  # seconds


class Pruned(Exception):
  """A trial is worse than the median of earlier ones after as many steps."""


def open_study(folder: pathlib.Path, space: Space, pruner: str, startup: int) -> optuna.Study:
  """Opens the study of a folder, or makes it.

  Raises:
    ValueError: its space is another.
  """
  optuna.logging.set_verbosity(optuna.logging.WARNING)
  prunes = optuna.pruners.MedianPruner(startup, n_warmup_steps=1)
  study = optuna.create_study(
    storage=f"sqlite:///{(folder / STUDY).absolute()}",
    study_name="search",
    direction="maximize",
    pruner=prunes if pruner == "median" else optuna.pruners.NopPruner(),
    load_if_exists=True,
  )
  now = {name: str(range_) for name, range_ in space.items()}
  before = study.user_attrs.get(_SPACE, now)
  if before != now:
    raise ValueError(
      f"space: the search in {folder} varies {', '.join(f'{n}={r}' for n, r in before.items())}; "
      "give the same, or use another --run_dir"
    )
  study.set_user_attr(_SPACE, now)
  return study


def ended(study: optuna.Study) -> list[FrozenTrial]:
  """The trials that ended by themselves: finished, pruned, diverged or refused."""
  return [
    trial
    for trial in study.get_trials(deepcopy=False)
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
    or (trial.state == TrialState.FAIL and _WHY in trial.user_attrs)
  ]


def take_up(study: optuna.Study, names: set[str]) -> None:
  """Trials that were killed are queued again, first of all; the others' figures are kept."""
  for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
    if set(trial.params) == names:
      folder = trial.user_attrs.get(_FOLDER, trial.number)
      study.enqueue_trial(trial.params, {_FOLDER: folder})
    study.tell(trial.number, state=TrialState.FAIL)


def search(
  config: Train,
  space: Space,
  study: optuna.Study,
  folder: pathlib.Path,
  num_trials: int,
  after: Callable[[optuna.Study], None] = lambda study: None,
) -> None:
  """Runs trials until `num_trials` have ended; calls `after` once they have, and after each."""
  take_up(study, set(space))
  if len(ended(study)) >= num_trials:
    after(study)
    return
  images = inputs.site_images(config)
  image_facts.check_sizes(config, images.train)
  tasks.check(config.model.model, images.train.dataset, config.data.is_multi)
  first = search_space.given(space, config)
  if first is not None and not study.get_trials(deepcopy=False):
    study.enqueue_trial(first)
  while len(done := ended(study)) < num_trials:
    # A search that was stopped draws as one that was not: what is drawn depends on what has ended.
    study.sampler = optuna.samplers.TPESampler(seed=(config.seed * 10_007 + len(done)) % 2**32)
    trial = study.ask()
    values = search_space.draw(trial, space, config)
    place = folder / TRIALS / str(trial.user_attrs.setdefault(_FOLDER, trial.number))
    trial.set_user_attr(_FOLDER, int(place.name))
    label = f"trial {len(done) + 1} of {num_trials}: "
    try:
      of_trial = search_space.trial_settings(config, values)
    except ValueError as error:  # settings that do not go together
      trial.set_user_attr(_WHY, str(error))
      study.tell(trial, state=TrialState.FAIL)
      after(study)
      continue
    try:
      score = _run(of_trial, images, place, trial, label)
    except Pruned:
      study.tell(trial, state=TrialState.PRUNED)
    except RuntimeError as error:  # training diverged, or no round changed the model
      trial.set_user_attr(_WHY, str(error).partition(". ")[0])
      study.tell(trial, state=TrialState.FAIL)
    else:
      study.tell(trial, score)
    shutil.rmtree(place / "checkpoints", ignore_errors=True)
    after(study)


def _run(
  config: Train, images: inputs.Inputs, folder: pathlib.Path, trial: optuna.Trial, label: str
) -> float:
  """The best MCC on validation images of a federated run; raises Pruned."""
  num_sites, names = config.hospitals.num_sites, images.train.dataset.label_names
  model_config = config.model.config(config.data, len(names))
  mine = np.arange(num_sites, dtype=np.int32)
  cohort = trainers.Cohort("federated", images.train, images.validation, mine, order=label)
  place = Place(sites.parse_placement(config.federation.placement))
  trainer = trainers.make_trainer(config, models.build(model_config), model_config, [cohort], place)
  told: set[int] = set()

  def tell(row: dict[str, Any]) -> None:
    tenth = TENTHS * row["round"] // config.training.rounds
    if tenth in told or "val_mcc" not in row:
      return
    told.add(tenth)
    trial.report(row["val_mcc"], tenth)
    if row["round"] < config.training.rounds and trial.should_prune():
      raise Pruned

  folder.mkdir(parents=True, exist_ok=True)
  path = folder / "rounds.jsonl"
  for row in lines.rows(path) if path.is_file() else []:  # of the trial that was killed
    tell(row)
  arm = arms.train(config, cohort, trainer, model_config, folder, None, tell, _SAVE_EVERY)
  return float(arm.facts["validation MCC"])
