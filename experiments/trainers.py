"""What trains an arm: its sites, and the compiled rounds that arms of one shape share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import algorithms, evaluation, federated, local, models, summation
from primia_jax.attacks import recording
from primia_jax.data.sites import Part
from primia_jax.privacy import plan
from primia_jax.types import Array, Key

from .configs import Train, tasks
from .configs.model import normalise, of_stored
from .configs.run import build_federation
from .configs.training import build_alone
from .processes import Place


class Cohort(NamedTuple):
  """Sites that train together; a single one for pooled and local training.

  Attributes:
    name: of the arm, as reports print it.
    train, validation: what each site holds.
    mine: numbers of the sites whose images this process may read.
    patients: (patients, the most images of one) of each site, for dp=patient.
    order: which of the run's arms it is, as its bar says before the name.
  """

  name: str
  train: Part
  validation: Part
  mine: np.ndarray
  patients: tuple[tuple[int, int], ...] = ()
  order: str = ""


class Trainer(NamedTuple):
  """The compiled side of training, which cohorts of one shape share.

  Attributes:
    algorithm, rounds: what is trained, and how.
    validate, count_classes: see `evaluation`; no validation for a run that uses no such images.
    schedule: learning rate by time in rounds.
    place: where the sites run.
    num_sampled: sites in a round.
    max_examples, max_validated: rows to which the sites' images are padded.
    privacy: of the sites' units, if any.
    features: applied to images once, when they are loaded; None leaves them as they are.
    frozen: the model as frozen and trained parts; None where all is trained.
    seen: where a recorded round leaves what it showed (`recording.recorded`); None in other runs.
  """

  algorithm: federated.Algorithm
  rounds: federated.FederatedAlgorithm
  validate: Callable[..., evaluation.Scores] | None
  count_classes: Callable[[federated.Sites], np.ndarray]
  schedule: Callable[[Array], Array | float]
  place: Place
  num_sampled: int
  max_examples: int
  max_validated: int
  privacy: plan.StepPlan | plan.SiteLevel | None
  features: Callable[[np.ndarray], np.ndarray] | None
  frozen: models.Frozen | None
  seen: list[recording.Seen] | None


def make_trainer(
  config: Train,
  model: models.Model,
  model_config: models.ModelConfig,
  cohorts: Sequence[Cohort],
  place: Place,
) -> Trainer:
  """Makes what trains any of the cohorts: all of several sites, or all of one.

  With privacy there is a single cohort.
  """
  num_classes, t = model_config.num_classes, config.training
  num_sites = len(cohorts[0].train.sites)
  together = num_sites > 1
  num_sampled = config.sites_in_round if together else 1
  sizes = [n for cohort in cohorts for n in cohort.train.sizes if n]  # others follow the sums
  max_validated = max(n for cohort in cohorts for n in cohort.validation.sizes)
  frozen = config.model.frozen(model_config, jax.random.key(config.seed))
  model = model if frozen is None else frozen.model
  features = of_stored(model_config, frozen) if config.augment.is_none else None
  task = tasks.of(model_config.name, config.data.is_multi)
  of_images, prepare = normalise, task.augment(config.augment)
  if features is not None:
    of_images, prepare = (lambda images: images), (lambda key, images, targets: (images, targets))
  elif frozen is not None:
    of_images = lambda images: frozen.lower(normalise(images))
    prepare = _lowered(prepare, frozen.lower)
  loss = task.loss(model.apply, prepare, num_classes, t.label_smoothing)

  seen: list[recording.Seen] | None = None
  privacy: plan.StepPlan | plan.SiteLevel | None = None
  recipe = local.Recipe(
    t.build_steps(sizes), local.gradients(loss), None, t.build_optimizer(), t.build_schedule()
  )
  if config.privacy.dp in ("example", "patient"):
    privacy = _step_plan(config, loss, cohorts, model_config)
    recipe = privacy.recipe(t.build_optimizer(), t.build_schedule())

  if together:
    built = build_federation(config, recipe, model, place.masked)
    algorithm, summed, privacy = built.algorithm, built.summation, built.privacy or privacy
    secure = functools.partial(config.aggregation.secure_sum, num_sites, num_sampled)
    counting = lambda most: place.masked(secure(config.in_processes, most))
    if config.record_transcript:
      seen = []
      summed = recording.recorded(summed, seen.append)
  else:
    algorithm, summed = build_alone(recipe, t.average_decay), summation.alone()
    counting = lambda most: summation.alone()
  if config.privacy.dp_average:
    algorithm = algorithms.averaged(algorithm, config.privacy.dp_average)
  algorithm = t.averaged(algorithm)
  count_noise = config.privacy.dp_count_noise if config.privacy.dp != "none" else 0.0
  most, validate = recipe.steps.max_examples, None
  if config.privacy.validates:
    summed_scores = counting(evaluation.MAX_LOSS * max_validated)
    validate = evaluation.validation(
      algorithm, model.apply, of_images, num_classes, summed_scores, place.placement,
      of_pixels=task.of_pixels, errors=task.errors,
    )  # fmt: skip
  return Trainer(
    algorithm,
    config.federation.join(algorithm, summed, place.placement, num_sites, loss),
    validate,
    evaluation.class_counting(  # the noise ends at 6.8 standard deviations
      num_classes, counting(most + 10 * count_noise), place.placement, count_noise
    ),
    recipe.schedule,
    place,
    num_sampled,
    most,
    max_validated,
    privacy,
    features,
    frozen,
    seen,
  )


def _lowered(prepare: Callable, lower: Callable[[Array], Array]) -> Callable:
  """Prepares images and passes them through the frozen parts."""

  def apply(key: Key, images: Array, targets: Array) -> tuple[Array, Array]:
    images, targets = prepare(key, images, targets)
    return lower(images), targets

  return apply


def _step_plan(
  config: Train, loss: Any, cohorts: Sequence[Cohort], model_config: models.ModelConfig
) -> plan.StepPlan:
  images = [n for cohort in cohorts for n in cohort.train.sizes if n]
  units, rows_per_unit = images, 1
  if config.privacy.by_patient:
    units = [n for cohort in cohorts for n, _ in cohort.patients if n]
    rows_per_unit = max(most for cohort in cohorts for _, most in cohort.patients)
  return config.privacy.build_steps(
    config.training,
    loss,
    units,
    max_examples=max(images),
    rows_per_unit=rows_per_unit,
    has_taps=models.has_taps(model_config),
  )
