"""Times contestants in turns, runs peers in their own processes, and prints each measurement as one
line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import jax

T = TypeVar("T")
_PEERS = pathlib.Path(__file__).parent / "peers"
_PATIENCE = 150.0  # seconds


class Cost(NamedTuple):
  """The time of one round.

  Attributes:
    seconds: wall-clock time.
    cpu: CPU seconds of all its processes and threads; steadier on a busy machine.
  """

  seconds: float
  cpu: float


Contestant = Iterator[Cost]  # each `next` runs one round


class Peer(NamedTuple):
  """A contestant in another process, and the versions that it reports."""

  rounds: Contestant
  versions: str


def timed(run: Callable[[], Any]) -> Contestant:
  """A contestant in this process: `run` does one round and returns arrays; the time ends when they
  are ready.
  """
  while True:
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(run())
    yield Cost(time.perf_counter() - wall, time.process_time() - cpu)


@contextlib.contextmanager
def peer(
  python: str, script: str, num_rounds: int, *arguments: object, patience: float = _PATIENCE
) -> Iterator[Peer]:
  """A contestant in another process and environment: `benchmarks/peers/<script>`, which runs a
  round on request.

  Args:
    python: the interpreter of the environment where the peer is installed.
    script: name of the file.
    num_rounds: how many rounds will be requested, including warm-up.
    *arguments: passed to the script.
    patience: seconds that it may take to start, or for one round.

  Raises:
    RuntimeError: the peer failed or took longer than `patience`. The message holds the end of its
      output.
  """
  command = [python, str(_PEERS / script), str(num_rounds), *map(str, arguments)]
  with tempfile.TemporaryFile("w+") as errors:
    process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      bufsize=1,
      cwd=_PEERS,
      env=dict(os.environ, PEER_TAG=uuid.uuid4().hex, PYTHONPATH=str(_PEERS)),
    )
    assert process.stdin is not None
    assert process.stdout is not None
    to, out = process.stdin, process.stdout

    def answer(word: str) -> list[str]:
      timer = threading.Timer(patience, process.kill)
      timer.start()
      for line in out:
        if line.startswith(word):
          timer.cancel()
          return line.split()[1:]
      timer.cancel()
      errors.seek(0)
      raise RuntimeError(
        f"{' '.join(command)} failed or took over {patience} s:\n{errors.read()[-2000:]}"
      )

    def rounds() -> Contestant:
      while True:
        to.write("go\n")
        to.flush()
        seconds, cpu = answer("ROUND")
        yield Cost(float(seconds), float(cpu))

    try:
      yield Peer(rounds(), " ".join(answer("READY")))
    finally:
      to.close()  # the peer exits when its input ends
      try:
        process.wait(20)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def alternate(
  contestants: Mapping[T, Contestant], num_rounds: int, limit: float = math.inf
) -> dict[T, list[Cost]]:
  """Runs the contestants' rounds in turn, so that other load on the machine affects all of them
  alike.

  Args:
    contestants: name -> contestant.
    num_rounds: how many rounds each runs, after a warm-up round.
    limit: seconds after which no further round starts. `n` in the printed lines says how many
      rounds ran.
  """
  end = time.perf_counter() + limit
  for contestant in contestants.values():
    next(contestant)
  costs: dict[T, list[Cost]] = {name: [] for name in contestants}
  for done in range(num_rounds):
    if done and time.perf_counter() > end:
      break
    for name, contestant in contestants.items():
      costs[name].append(next(contestant))
  return costs


def report(
  name: str,
  costs: Sequence[Cost],
  *,
  target: float | None = None,
  unit: str = "s/round",
  scale: float = 1.0,
  **more: Any,
) -> None:
  """Prints the median time with its spread, and the median CPU time."""
  more = {"cpu": _short(scale * statistics.median(c.cpu for c in costs)), **more}
  say(name, [scale * c.seconds for c in costs], unit, target, **more)


def report_ratio(
  name: str, ours: Sequence[Cost], theirs: Sequence[Cost], *, target: float | None, **more: Any
) -> None:
  """Prints the ratio of two medians. Its spread is that of the ratios of neighbouring rounds."""
  pairs = [a.seconds / b.seconds for a, b in zip(ours, theirs, strict=True)]
  medians = [statistics.median(c.seconds for c in costs) for costs in (ours, theirs)]
  cpus = [statistics.median(c.cpu for c in costs) for costs in (ours, theirs)]
  more = {"cpu": _short(cpus[0] / max(cpus[1], 1e-9)), **more}
  say(name, pairs, "ratio", target, value=medians[0] / medians[1], **more)


def report_difference(
  name: str, more_work: Sequence[Cost], less: Sequence[Cost], *, target: float | None, **more
) -> None:
  """Prints the difference of two medians, in seconds. Its spread is that of the differences of
  neighbouring rounds.
  """
  pairs = [a.seconds - b.seconds for a, b in zip(more_work, less, strict=True)]
  value, cpu = (
    statistics.median(get(c) for c in more_work) - statistics.median(get(c) for c in less)
    for get in (lambda c: c.seconds, lambda c: c.cpu)
  )
  say(name, pairs, "s/round", target, value=value, **{"cpu": _short(cpu), **more})


def say(
  name: str,
  values: Sequence[float],
  unit: str,
  target: float | None,
  *,
  value: float | None = None,
  at_least: bool = False,
  **more: Any,
) -> None:
  """Prints one measurement as a line of JSON.

  Args:
    name: of the figure.
    values: the individual measurements.
    unit: of all numbers.
    target: the value to reach; None if the figure is only for comparison.
    value: the published value, if it is not the median of `values`.
    at_least: the target is a lower bound, not an upper one.
    **more: further entries.
  """
  value = statistics.median(values) if value is None else value
  reached = None if target is None else bool(value >= target if at_least else value <= target)
  row = {
    "name": name,
    "value": _short(value),
    "min": _short(min(values)),
    "max": _short(max(values)),
    "n": len(values),
    "unit": unit,
    "target": target,
    "reached": reached,
    **more,
    "versions": versions(),
    "device": device(),
    "load": _short(os.getloadavg()[0]),
  }
  print(json.dumps(row), flush=True)


def skip(name: str, reason: str) -> None:
  """Prints, in a line of the same form, that something was not measured."""
  print(json.dumps({"name": name, "value": None, "skipped": reason}), flush=True)


def versions() -> dict[str, str]:
  names = ("jax", "jaxlib", "flax", "optax", "numpy")
  return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def device() -> str:
  """Names the devices that JAX runs on, the machine's processor and its widest vectors."""
  lines = (
    pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    if pathlib.Path("/proc/cpuinfo").is_file()
    else []
  )
  models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
  flags = next((line.split() for line in lines if line.startswith("flags")), [])
  vectors = next((f", {name}" for name in ("avx512dq", "avx2", "sse2") if name in flags), "")
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  kind = jax.devices()[0].device_kind
  return (
    f"{jax.device_count()} x {kind}; {cores} cores {(models or [platform.processor()])[0]}{vectors}"
  )


def _short(number: float) -> float:
  return float(f"{number:.4g}")
