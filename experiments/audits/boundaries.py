"""What leaves a site in the run's sums, followed from their own code."""

from __future__ import annotations

import collections

import jax
import numpy as np

from primia_jax import boundary, federated
from primia_jax.boundary import Report
from primia_jax.data.sites import Part as Images
from primia_jax.sites import Placement
from primia_jax.types import Site

from .. import inputs, markdown, settings, trainers
from ..processes import Place
from .context import ARM, Context
from .parts import Part

_FILE = "boundary.txt"


def audit(context: Context) -> Part:
  """Follows training, class counting and validation, with the run's own settings."""
  found = {name: report for name, report in _reports(context).items() if report is not None}
  rows = []
  for name, report in found.items():
    grouped = collections.defaultdict(list)
    for crossing in report.crossings:
      grouped[crossing.status, crossing.line].append(crossing)
    for (status, line), crossings in grouped.items():
      total = sum(c.num_bytes for c in crossings)
      rows.append((name, str(len(crossings)), f"{total:,}", status, f"`{line or '–'}`"))
  table = markdown.table(("sum", "values", "bytes", "status", "source line"), rows)
  (context.output / _FILE).write_text("\n\n".join(map(str, found.values())) + "\n")
  failures = [
    f"{name}: {len(report.violations)} values would cross unmasked, the first at "
    f"{report.violations[0]}"
    for name, report in found.items()
    if report.violations
  ]
  text = (
    "The code of one site is traced, not run, and its data are followed to all that it sends. A "
    "value must be public, or hidden by each of the site's mask keys. Without secure aggregation "
    "all of it crosses unmasked. The recording of a transcript is left out here. What the analysis "
    "does not see stands in `primia_jax.boundary.rounds`.",
    table,
    f"Each value: [{_FILE}]({_FILE}).",
  )
  return Part("What crosses the boundary", text, (), tuple(failures))


def _reports(context: Context) -> dict[str, Report | None]:
  config = settings.replace(context.config, record_transcript=False)
  trained, images = context.trained, context.images
  everyone = np.arange(config.hospitals.num_sites)
  patients = inputs.count_patients(images.train) if config.privacy.by_patient else ()
  cohort = trainers.Cohort(ARM, images.train, images.validation, everyone, patients)
  key = jax.random.key(config.seed)
  ids = federated.sample_sites(key, 0, len(everyone), config.sites_in_round)

  def make(placement: Placement) -> trainers.Trainer:
    place = Place(placement)
    return trainers.make_trainer(config, trained.model, trained.config, [cohort], place)

  def sites_of(part: Images, trainer: trainers.Trainer, most: int, who: np.ndarray):
    by_patient = config.privacy.by_patient and part is images.train
    image = np.zeros((1, 1, *part.dataset.images.shape[1:]), np.uint8)
    one = image if trainer.features is None else trainer.features(image)

    def load(asked: np.ndarray) -> Site:
      shape = lambda dtype, *rest: jax.ShapeDtypeStruct((len(asked), *rest), dtype)
      units = shape(np.int32, most) if by_patient else None
      counts = shape(np.int32)
      stored = shape(one.dtype, most, *one.shape[2:])
      return Site(shape(np.int32), stored, shape(np.int32, most), counts, None, units)  # type: ignore[arg-type]

    return federated.Sites(who.astype(np.int32), load)

  initial = config.model.initial(trained.config, key)

  def train(placement: Placement) -> None:
    trainer = make(placement)
    given = sites_of(images.train, trainer, trainer.max_examples, ids)
    if config.training.class_weights:
      given = given._replace(class_weights=np.ones(len(trained.label_names), np.float32))
    trainer.rounds.step(key, trainer.rounds.init(*initial), given)

  def count(placement: Placement) -> None:
    trainer = make(placement)
    trainer.count_classes(sites_of(images.train, trainer, trainer.max_examples, everyone))

  def validate(placement: Placement) -> None:
    trainer = make(placement)
    assert trainer.validate is not None
    held = sites_of(images.validation, trainer, trainer.max_validated, everyone)
    trainer.validate(key, trainer.rounds.init(*initial), held)

  return {
    "training": boundary.audit(train, "training round"),
    "class counts": boundary.audit(count, "class counts")
    if config.training.class_weights
    else None,
    "validation": boundary.audit(validate, "validation") if config.privacy.validates else None,
  }
