"""The default recipe of training, which is made for the phantom."""

import pathlib

import pytest

from experiments import inputs, settings
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
