"""Tiny runs of the binaries' own code, for several test files."""

import pathlib

import jax
import numpy as np

from experiments import arms, inputs, settings
from experiments.configs import Train
from experiments.processes import Place
from primia_jax import models, sites

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


def cohort(config, images):
  return arms.Cohort(
    "federated", images.train, images.validation, np.arange(config.hospitals.num_sites)
  )


def trainer(config, cohort, place=None):
  model_config = config.model.config(config.data, 3)
  model = models.build(model_config)
  return arms.make_trainer(config, model, model_config, [cohort], place or Place(sites.scan()))


def train(config, folder: pathlib.Path, stop_after=None, place=None):
  """The federated arm; stopped after a round's line is written and before its checkpoint is."""
  everyone = cohort(config, inputs.site_images(config))

  def log(row):
    if row["round"] == stop_after:
      raise KeyboardInterrupt

  folder.mkdir(exist_ok=True)
  model_config = config.model.config(config.data, 3)
  made = trainer(config, everyone, place)
  return arms.train(config, everyone, made, model_config, folder, log)


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def flags_of(config) -> list[str]:
  """The flags that differ from the default."""
  changed = settings.differences(settings.flat(Train()), config)
  return [
    (f"--{'' if value else 'no'}{name}" if isinstance(value, bool) else f"--{name}={value}")
    for name, (_, value) in changed.items()
  ]
