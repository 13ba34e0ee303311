"""The default recipe of training, which is made for the phantom."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import inputs, settings, study
from experiments.configs import Train, rehearse


def test_presets_do_not_rest_on_defaults_made_for_the_phantom():
  """These may change with it, and the presets' published results may not."""
  recipe = "image_size", "augment", "rounds", "sync_epochs", "keep_optimizer", "batch_size"
  for preset in (pathlib.Path(inputs.__file__).parent / "flags").glob("*.flags"):
    said = {line.lstrip("-").partition("=")[0] for line in preset.read_text().splitlines()}
    for name in (*recipe, "learning_rate", "optimizer", "model"):
      assert {name, f"no{name}"} & said, (preset.name, name)


def test_every_arm_takes_as_many_steps_by_default():
  steps = Train().training.build_steps
  assert {steps(sizes).max_steps for sizes in ((1000, 667, 333), (2000,), (333,))} == {20}
  assert settings.replace(Train(), sync_epochs=1).training.build_steps((320,)).max_steps == 40
  assert settings.replace(Train(), sync_batches=3).training.build_steps((320,)).max_steps == 3


def test_sites_without_a_state_need_not_say_that_they_keep_none():
  for algorithm in ("scaffold", "fednova"):
    rehearse(settings.replace(Train(), algorithm=algorithm, optimizer="sgd"))
  with pytest.raises(ValueError, match=r"fednova starts the sites' momentum anew.*--nokeep"):
    rehearse(settings.replace(Train(), algorithm="fednova", optimizer="momentum"))


TIMES = (0.0, 1.0, 2.0, 3.7, 11.0, 20.0, 25.0)  # the last is after the end


def rates(**changes):
  config = settings.replace(Train(), rounds=20, warmup_rounds=2.0, learning_rate=1e-4, **changes)
  return np.array([config.training.build_schedule()(np.float32(time)) for time in TIMES])


def test_the_learning_rate_falls_to_its_final_one():
  warm = np.minimum((np.array(TIMES) + 0.05) / 2, 1)
  done = np.clip((np.array(TIMES) - 2) / 18, 0, 1)
  cosine = 0.5 * (1 + np.cos(np.pi * done))
  expected = {
    ("constant", 0.0): 1e-4 * np.ones(len(TIMES)),
    ("cosine", 0.0): 1e-4 * cosine,
    ("cosine", 1e-5): 1e-5 + (1e-4 - 1e-5) * cosine,
    ("cosine", 1e-4): 1e-4 * np.ones(len(TIMES)),
    ("exponential", 1e-5): 10.0 ** (-4 - done),
  }
  for (schedule, final), falling in expected.items():
    found = rates(schedule=schedule, final_rate=final)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, warm * falling, rtol=2e-6, atol=1e-11)


def test_one_pretrained_recipe_at_two_sizes():
  name = "--preset=chest_xray_pretrained"
  small, large = (study.configured((name + size,)) for size in ("", "_224"))
  assert settings.differences(settings.flat(small), large) == {"image_size": (160, 224)}


def test_primia_s_learning_rate_falls_to_a_tenth():
  t = study.configured(("--preset=primia",)).training
  final = float(t.build_schedule()(np.float32(t.rounds)))
  assert (t.learning_rate, final) == (1e-4, pytest.approx(1e-5, rel=1e-6))


@jax.numpy_dtype_promotion("standard")  # optax's Adam needs it
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_the_last_layer_may_learn_faster(optimizer):
  params = {"conv1": {"kernel": jnp.ones(3)}, "head": {"kernel": jnp.full(2, 2.0)}}
  grads = jax.tree.map(lambda p: p / 4, params)

  def updates(factor):
    training = settings.replace(Train(), optimizer=optimizer, head_rate=factor).training
    made = training.build_optimizer()(jnp.float32(0.1))
    return made.update(grads, made.init(params), params)[0]

  plain, faster = updates(1.0), updates(5.0)
  np.testing.assert_array_equal(faster["conv1"]["kernel"], plain["conv1"]["kernel"])
  np.testing.assert_allclose(faster["head"]["kernel"], 5 * plain["head"]["kernel"], rtol=1e-6)
  assert bool((plain["head"]["kernel"] != 0).all())
