"""Tiny runs of the binaries' own code, for several test files."""

import functools
import json
import pathlib

import jax
import numpy as np

from experiments import arms, inputs, settings
from experiments.configs import Train
from experiments.processes import Place
from primia_jax import models, sites
from primia_jax.privacy import ledger

TINY = settings.replace(
  Train(),
  phantom_images=36,
  image_size=16,
  model="mlp",
  rounds=4,
  batch_size=4,
  augment="none",
  optimizer="momentum",
  learning_rate=0.01,
  keep_optimizer=True,
)
PRIVATE = settings.replace(
  TINY, rounds=3, optimizer="sgd", learning_rate=0.1, keep_optimizer=False, dp="example",
  noise_multiplier=1.0, dp_seed=1,
)  # fmt: skip
SITE = settings.replace(PRIVATE, dp="site", weighting="uniform", class_weights=False, delta=0.1)
MOVING = settings.replace(SITE, dp_clip_quantile=0.5, l2_clip_norm=0.7)  # the clip of updates
FIXED = settings.replace(PRIVATE, dp_noise="banded", batch_size=2)  # batches in a fixed order


@functools.cache
def images_of(data, hospitals, seed):
  return inputs.site_images(Train(seed=seed, data=data, hospitals=hospitals))


def cohort_of(config):
  images = images_of(config.data, config.hospitals, config.seed)
  mine = np.arange(config.hospitals.num_sites)
  return arms.Cohort("federated", images.train, images.validation, mine)


def make_trainer(config, cohort):
  model_config = config.model.config(config.data, 3)
  model = models.build(model_config)
  return arms.make_trainer(config, model, model_config, [cohort], Place(sites.scan()))


@functools.cache
def _compiled(config):
  return make_trainer(config, cohort_of(config))


def trainer_of(config):
  """A trainer that tests share, since it compiles; it holds no state, and dp_seed is not in it."""
  return _compiled(settings.replace(config, dp_seed=-1))


def train(config, folder: pathlib.Path, stop_after=None, trainer=None):
  """The federated arm; stopped after a round's line is written and before its checkpoint is."""

  def log(row):
    if row["round"] == stop_after:
      raise KeyboardInterrupt

  folder.mkdir(exist_ok=True)
  model_config, trainer = config.model.config(config.data, 3), trainer or trainer_of(config)
  return arms.train(config, cohort_of(config), trainer, model_config, folder, log)


def ledgers(folder):
  """What the ledger of a run folder says of each site."""
  saved = json.loads((folder / ledger.LEDGER).read_text())["ledgers"]
  return [ledger.from_json(json.dumps(one)) for one in saved]


def charged(folder):
  """(release, times) of the ledger of site 0, in order."""
  return [(release.what, release.times) for release in ledgers(folder)[0].releases]


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def flags_of(config) -> list[str]:
  """The flags that differ from the default."""
  changed = settings.differences(settings.flat(Train()), config)
  return [
    (f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    for name, (_, value) in changed.items()
  ]
