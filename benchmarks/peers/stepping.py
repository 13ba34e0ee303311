"""The peer's side of `benchmarks.measuring.peer`: runs a round for each line of input and prints
its cost.
"""

import os
import sys
import time

try:
  from importlib import metadata
except ImportError:  # Python 3.7
  import importlib_metadata as metadata

_TICKS = os.sysconf("SC_CLK_TCK")


def wait() -> None:
  """Waits until told to run the next round; ends the process when nobody is left to tell."""
  if not sys.stdin.readline():
    os._exit(1)


def ready(*packages, **more) -> None:
  """Says that rounds may be asked for, which versions of the packages will run, and what else is
  known of them.
  """
  more = {**{package: metadata.version(package) for package in packages}, **more}
  print("\nREADY", *(f"{name}={value}" for name, value in more.items()), flush=True)


def answer(seconds: float, cpu: float) -> None:
  """Says what a round took."""
  print(f"\nROUND {seconds} {cpu}", flush=True)


def run(num_rounds: int, one_round, *packages, **more) -> None:
  """Runs rounds when told to."""
  ready(*packages, **more)
  for index in range(num_rounds):
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    one_round(index)
    answer(time.perf_counter() - wall, time.process_time() - cpu)


def tree_cpu() -> float:
  """CPU seconds of all living processes that this one and its children started: those with its
  tag.
  """
  tag, total = f"PEER_TAG={os.environ['PEER_TAG']}".encode(), 0.0
  for process in filter(str.isdigit, os.listdir("/proc")):
    try:
      with open(f"/proc/{process}/environ", "rb") as file:
        if tag not in file.read():
          continue
      with open(f"/proc/{process}/stat") as file:
        fields = file.read().rsplit(")", 1)[1].split()
    except OSError:  # ended, or not ours to read
      continue
    total += sum(map(int, fields[11:15])) / _TICKS
  return total
