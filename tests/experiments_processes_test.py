"""`train_federated --placement=processes`: real processes, one of them killed, and the run started again."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from experiments import inputs, learning, processes, running, settings, training
from primia_jax import models, sites

TINY = settings.Train(
  phantom_images=36, image_size=16, model="mlp", rounds=2, batch_size=4, augment="none", optimizer="momentum",
  learning_rate=0.01, keep_optimizer=True, placement="processes", validation_fraction=0.3,
)  # fmt: skip
FLAGS = [
  f"--{'' if value is not False else 'no'}{name}" + ("" if isinstance(value, bool) else f"={value}")
  for name, value in dataclasses.asdict(TINY).items()
  if value != getattr(settings.Train(), name)
]


@pytest.fixture
def path(monkeypatch):
  root = str(pathlib.Path(__file__).parents[1])
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])))
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def simulated(config, folder):
  """The same run by one process."""
  config = dataclasses.replace(config, placement="scan", secagg_threshold=2)
  images = inputs.site_images(config)
  model_config = learning.model_config(config, 3)
  cohort = training.Cohort("federated", images.train, images.validation, np.arange(config.num_sites))
  trainer = training.make_trainer(config, models.build(model_config), model_config, [cohort], sites.Placement("scan"))
  folder.mkdir()
  return training.train(config, cohort, trainer, model_config, folder)


def start(folder, *more, num_sites=3):
  config = dataclasses.replace(TINY, **dict(more), num_sites=num_sites)
  flags = [*FLAGS, f"--run_dir={folder}", f"--num_sites={num_sites}", *(f"--{name}={value}" for name, value in more)]
  running.open_run(config, str(folder))
  return processes.start("experiments.train_federated", flags, num_sites, folder)


def rows(folder):
  lines = folder / "federated" / "rounds.jsonl"
  return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def test_a_process_a_site_trains_the_model_that_one_process_trains(tmp_path, path):
  folder = tmp_path / "run"
  children = start(folder)
  expected = simulated(TINY, tmp_path / "simulated")
  assert processes.watch(children, folder) == []
  _, (trained,), _, _ = running.load_model(str(folder))
  for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(expected.models[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  got = rows(folder)
  assert [row["survivors"] for row in got] == [3, 3]
  for row, wanted in zip(got, expected.rows, strict=True):
    assert row["val_mcc"] == pytest.approx(wanted["val_mcc"])
    assert row["val_loss"] == pytest.approx(wanted["val_loss"], abs=1e-4)
  assert "no other process knows them" in (folder / "report.md").read_text()
