"""A stopped run goes on: every algorithm and placement, with sites that devices do not divide."""

import functools

import jax
import numpy as np
import pytest
from experiments_runs import FIXED, MOVING, PRIVATE, TINY, assert_equal, cohort_of, train
from jax.sharding import Mesh

from experiments import running, settings, trainers
from experiments.processes import Place
from primia_jax import models, sites

SHORT = settings.replace(TINY, rounds=3, phantom_images=24)
PLAIN = settings.replace(SHORT, keep_optimizer=False, optimizer="sgd")
KINDS = {
  "fedavg": SHORT,
  "fedprox": settings.replace(SHORT, algorithm="fedprox", optimizer="adam"),
  "fedavgm": settings.replace(SHORT, algorithm="fedavgm"),
  "fedadam": settings.replace(PLAIN, algorithm="fedadam"),
  "fedyogi": settings.replace(PLAIN, algorithm="fedyogi"),
  "fedadagrad": settings.replace(PLAIN, algorithm="fedadagrad"),
  "scaffold": settings.replace(PLAIN, algorithm="scaffold"),
  "fednova": settings.replace(PLAIN, algorithm="fednova", optimizer="momentum"),
  "fedbn": settings.replace(SHORT, algorithm="fedbn", model="cnn", norm="batch", width=0.25),
  "some of the sites": settings.replace(SHORT, num_sites=5, sites_per_round=3, average_decay=0.9),
  "private": settings.replace(PRIVATE, optimizer="momentum", keep_optimizer=True),
  "private sites": settings.replace(MOVING, optimizer="momentum", keep_optimizer=True),
}


def on_devices(number):
  return sites.on_mesh(Mesh(np.asarray(jax.devices()[:number]), ("site",)))


def trainer_on(config, placement):
  cohort, model_config = cohort_of(config), config.model.config(config.data, 3)
  model = models.build(model_config)
  return trainers.make_trainer(config, model, model_config, [cohort], Place(placement))


def stop(config, folder, trainer):
  """Trains a round, and is stopped in the second before that is saved."""
  with pytest.raises(KeyboardInterrupt):
    train(config, folder, 2, trainer)


def assert_goes_on(config, placement, folder):
  with jax.numpy_dtype_promotion("standard"):  # optax's Adam and Yogi need it
    trainer = trainer_on(config, placement)
    whole = train(config, folder / "whole", trainer=trainer)
    stop(config, folder / "stopped", trainer)
    resumed = train(config, folder / "stopped", trainer=trainer)
  assert_equal(resumed.models, whole.models)
  told = lambda arm: [{**row, "seconds": 0, "epsilon": 0} for row in arm.rows]
  assert told(resumed) == told(whole)


FAST = ("fedavg", "scaffold", "some of the sites")
kinds = [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", kinds)
def test_every_algorithm_goes_on_with_three_sites_on_two_devices(kind, tmp_path):
  assert_goes_on(KINDS[kind], on_devices(2), tmp_path)


PLACEMENTS = {
  "loop": sites.loop,
  "scan": sites.scan,
  "vmap": sites.vmapped,
  "chunk": functools.partial(sites.chunked, 2),
  "mesh": functools.partial(on_devices, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_goes_on(name, tmp_path):
  assert_goes_on(SHORT, PLACEMENTS[name](), tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
  trainers = [trainer_on(SHORT, place) for place in (sites.scan(), on_devices(2), on_devices(3))]
  for i, first in enumerate(trainers):
    for j, second in enumerate(trainers):
      if i != j:
        stop(SHORT, tmp_path / f"{i}{j}", first)
        assert len(train(SHORT, tmp_path / f"{i}{j}", trainer=second).rows) == 3


@pytest.mark.slow
def test_noise_in_a_fixed_order_goes_on_with_sites_that_devices_do_not_divide(tmp_path):
  """It is charged again in full, and its noise begins anew."""
  trainer = trainer_on(FIXED, on_devices(2))
  stop(FIXED, tmp_path, trainer)
  assert len(train(FIXED, tmp_path, trainer=trainer).rows) == 3


@pytest.mark.slow
def test_a_whole_run_that_is_stopped_in_every_arm_goes_on(tmp_path):
  """On all devices, as a program places it."""
  stops = ["federated", "pooled", "local: site 1"]

  def log(row):
    if stops and (row["arm"], row["round"]) == (stops[0], 2):
      raise KeyboardInterrupt(stops.pop(0))

  def run(name, log):
    folder = running.open_run(PLAIN, str(tmp_path / name))
    both = ("pooled", "local")
    return running.run(PLAIN, folder, federated=True, baselines=both, log=log)["arms"]

  for arm in tuple(stops):
    with pytest.raises(KeyboardInterrupt, match=arm):
      run("stopped", log)
  assert run("stopped", log) == run("whole", lambda row: None)
