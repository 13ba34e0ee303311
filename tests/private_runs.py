"""Small private runs, which several test files make and train."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from experiments import inputs, learning, private, settings, training
from primia_jax import models, sites
from primia_jax.types import Metrics

TINY = settings.Train(
  phantom_images=36,
  image_size=16,
  model="mlp",
  rounds=3,
  batch_size=4,
  augment="none",
  optimizer="sgd",
  learning_rate=0.1,
  dp="example",
  noise_multiplier=1.0,
  dp_seed=1,
)
SITE = dataclasses.replace(TINY, dp="site", weighting="uniform", class_weights=False, delta=0.1)
MOVING = dataclasses.replace(SITE, dp_clip_quantile=0.5, l2_clip_norm=0.7)  # the clip of updates
FIXED = dataclasses.replace(TINY, dp_noise="banded", batch_size=2)  # batches in a fixed order
SIZES = (18, 12, 6)


def loss_fn(params, model_state, batch, key):
  count = jnp.sum(batch.weights)
  return jnp.sum(params) * count, (model_state, Metrics(count, count, count))


def make(config, sizes=SIZES, num_sites=3, num_parameters=100, threshold=None):
  return private.plan(config, loss_fn, sizes, num_sites, num_parameters, threshold)


def train(config, folder, stop_after=None):
  images = inputs.site_images(config)
  model_config = learning.model_config(config, 3)
  cohort = training.Cohort(
    "federated", images.train, images.validation, np.arange(config.num_sites)
  )
  trainer = training.make_trainer(
    config, models.build(model_config), model_config, [cohort], sites.Placement("scan")
  )

  def log(row):
    if row["round"] == stop_after:
      raise KeyboardInterrupt

  folder.mkdir(exist_ok=True)
  return training.train(config, cohort, trainer, model_config, folder, log)
