"""Sites of a run as threads of one process: what tests of processes share."""

import socket
import threading

from experiments_runs import TINY

from experiments import processes, settings

APART = settings.replace(TINY, rounds=2, placement="processes", validation_fraction=0.3)


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as probe:
    return probe.getsockname()[1]


def seat_of(root, number, address, timeout=20.0, **more):
  return processes.Seat(
    number, address, timeout, processes.own_folder(root / "own", number), **more
  )


def in_threads(calls):
  """Results and errors of calls, each in a thread."""
  results, errors = {}, {}

  def one(i, call):
    try:
      results[i] = call()
    except Exception as e:
      errors[i] = e

  threads = {i: threading.Thread(target=one, args=(i, c), daemon=True) for i, c in calls.items()}
  for thread in threads.values():
    thread.start()
    thread.join(0.3)  # each is there before the next
  for thread in threads.values():
    thread.join(60)
    assert not thread.is_alive()
  return results, errors
