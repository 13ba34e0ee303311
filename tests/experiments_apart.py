"""Sites of a run as threads of one process, and their coordinator: what tests of them share."""

import threading

import numpy as np
import secagg_carried
from experiments_runs import TINY

from experiments import arms, inputs, processes, settings, trainers
from primia_jax import models
from primia_jax.secagg import coordinator, meeting

APART = settings.replace(TINY, rounds=2, placement="flower", validation_fraction=0.3)


def seat_of(root, number, timeout=300.0):
  return processes.Seat(number, timeout, processes.own_folder(root / "own", number))


def meeting_of(config, root, number, carriers, told=b""):
  """A site's place, over one of the carriers of `in_threads`."""
  return processes.meet(config, carriers[number], seat_of(root, number), told)


def in_threads(call, numbers, root, timeout=300.0):
  """call(site, carriers) for each site in a thread, beside a coordinator whose identity is kept.

  Returns:
    Results and errors by site; the coordinator's error, or what it reported of each sum, is
    under "coordinator".
  """
  results, errors, reports = {}, {}, []
  ask, carriers = secagg_carried.in_process(numbers, max(2 * timeout, 4.0))
  (root / "own").mkdir(parents=True, exist_ok=True)
  identity = meeting.own_identity(root / "own" / "coordinator")

  def one(i):
    try:
      results[i] = call(i, carriers)
    except Exception as e:
      errors[i] = e
    carriers[i].close()

  def coordinate():
    try:
      coordinator.coordinate(ask, numbers, identity, timeout, reports.append)
      results["coordinator"] = reports
    except Exception as e:
      errors["coordinator"] = e

  calls = [(coordinate,), *[(one, i) for i in numbers]]
  threads = [threading.Thread(target=f, args=args, daemon=True) for f, *args in calls]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(600)
    assert not thread.is_alive()
  return results, errors


def train_site(root, i, end, rounds, config=APART):
  """One start of a site: its arm. It has a folder and a run of its own."""
  model_config = config.model.config(config.data, 3)
  place, _ = processes.meet(config, end, seat_of(root, i))
  images = inputs.site_images(config, i)
  cohort = trainers.Cohort("federated", images.train, images.validation, np.array([i]))
  trainer = trainers.make_trainer(config, models.build(model_config), model_config, [cohort], place)
  with place.together():
    return arms.train(
      settings.replace(config, rounds=rounds),
      cohort,
      trainer,
      model_config,
      arm_of(root, i),
      root / "own" / f"site_{i}" / "ledger",
    )


def train_apart(root, rounds=2, timeout=300.0, config=APART):
  """One start of all sites: (arms, errors, the coordinator's reports), the first two by site."""
  one = lambda i, carriers: train_site(root, i, carriers[i], rounds, config)
  results, errors = in_threads(one, range(config.hospitals.num_sites), root, timeout)
  reports = results.pop("coordinator", None)
  return results, errors, reports


def arm_of(root, site):
  """A site's own folder of its arm."""
  folder = root / "own" / f"site_{site}" / "run" / "federated"
  folder.mkdir(parents=True, exist_ok=True)
  return folder
