"""What crosses in the federated presets, as the binaries build them: masked values only."""

import pathlib

import jax
import numpy as np
import pytest
from absl import flags

from experiments import inputs, settings
from experiments.configs import Train, tasks
from experiments.configs.model import normalise
from experiments.configs.run import build_federation
from primia_jax import boundary, local, models
from primia_jax.types import Site

PRESETS = (
  "chest_xray",
  "chest_xray_pretrained",
  "chest_xray_pretrained_224",
  "chest_xray_private",
  "chest_xray_private_pretrained",
  "lung_tumours",
  "mednist",
  "mnist_100_sites",
  "pneumoniamnist",
  "primia",
)
CLASSES, FOLDER = 3, pathlib.Path(inputs.__file__).parent / "flags"


def parsed(preset: str) -> Train:
  values = flags.FlagValues()
  settings.define_flags(Train, values)
  flags.DEFINE_list("baselines", [], "", flag_values=values)
  values(["program", f"--flagfile={FOLDER / preset}.flags"])
  return settings.from_flags(Train, values)


def test_every_federated_preset_is_audited():
  presets = [path.stem for path in FOLDER.glob("*.flags")]
  assert set(PRESETS) == {name for name in presets if parsed(name).hospitals.num_sites > 1}


@pytest.mark.parametrize("preset", PRESETS)
def test_only_masked_values_cross_in_a_preset(preset):
  config = parsed(preset)
  if config.privacy.dp != "none":  # any noise is masked alike; calibration takes seconds
    config = settings.replace(config, target_epsilon=0.0, noise_multiplier=1.0)
  model_config = config.model.config(config.data, CLASSES)
  model, t = models.build(model_config), config.training
  features = models.features(model_config) if config.augment.is_none else None
  as_they_are = lambda key, images, targets: (images, targets)
  task = tasks.of(config.model.model)
  prepare = as_they_are if features else task.augment(config.augment)
  loss = task.loss(model.apply, prepare, CLASSES, t.label_smoothing)
  num_examples = 2 * t.batch_size
  optimizer, schedule = t.build_optimizer(), t.build_schedule()
  if config.privacy.dp == "none":
    steps = t.build_steps((num_examples,))
    recipe = local.Recipe(steps, local.gradients(loss), None, optimizer, schedule)
  else:
    plan = config.privacy.build_steps(t, loss, (num_examples,))
    recipe = plan.recipe(optimizer, schedule)
  shape = jax.ShapeDtypeStruct
  stored = shape((num_examples, *model_config.image_shape), np.uint8)
  if features is not None:
    stored = jax.eval_shape(lambda images: features(normalise(images)), stored)
  of_labels = stored.shape[:3] if task.of_pixels else stored.shape[:1]
  site = Site(shape((), np.int32), stored, shape(of_labels, np.int32), shape((), np.int32))
  built = build_federation(config, recipe, model)
  params, model_state = jax.eval_shape(model.init, jax.random.key(0))
  with jax.numpy_dtype_promotion("standard"):  # optax's Adam needs it
    found = boundary.audit_round(
      built.algorithm, built.summation, params, model_state, site, config.sites_in_round
    )
  found.check()
  assert {c.status for c in found.crossings} == {"masked"}
