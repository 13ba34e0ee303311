"""Sites of a run as threads of one process, and their coordinator: what tests of them share."""

import threading

from experiments_runs import TINY

from experiments import processes, settings
from primia_jax.secagg import carrier, coordinator, meeting

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
  ask, carriers = carrier.in_process(numbers, max(2 * timeout, 4.0))
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
