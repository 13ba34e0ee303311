"""Makes the table of a user's first run, with several seeds: what `make train` does, with defaults.

python -m benchmarks.first_run --seeds=0,1,2,3,4
"""

import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from absl import app, flags

from benchmarks import measuring

_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2", "3", "4"], "Seeds of the runs.")
_FLAGS = flags.DEFINE_list("train_flags", [], "Further flags of the runs, such as --rounds=10.")
_OUT = flags.DEFINE_string("out", "", "Folder that keeps the runs; by default none does.")


class Run(NamedTuple):
  """Accuracies in percent by arm, and what a run took."""

  accuracy: dict[str, float]
  cost: measuring.Cost

  @property
  def best_alone(self) -> float:
    return max(value for arm, value in self.accuracy.items() if arm.startswith("local"))


def run(seed: int, folder: pathlib.Path) -> Run:
  """One run in a process of its own; its time is that of the command, installation apart.

  Compiled programs of earlier runs are not used, as on a fresh machine.
  """
  command = [sys.executable, "-m", "experiments.train_federated", f"--run_dir={folder / 'run'}"]
  env = dict(os.environ, XDG_CACHE_HOME=str(folder / "cache"))
  before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
  command += [f"--seed={seed}", *_FLAGS.value]
  subprocess.run(command, check=True, env=env, stdout=sys.stderr)
  seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
  cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
  arms = json.loads((folder / "run" / "metrics.json").read_text())["arms"]
  accuracy = {name: 100 * scores["accuracy"]["value"] for name, scores in arms.items()}
  return Run(accuracy, measuring.Cost(seconds, cpu))


def table(runs: dict[int, Run]) -> str:
  """The runs as Markdown, and their means."""
  names = [name for name in next(iter(runs.values())).accuracy if name.startswith("local")]
  head = ["seed", "federated", "pooled", "best alone", *names]
  head += ["minus pooled", "minus best alone", "s", "CPU s"]
  lines, rows = [], []
  for seed, (accuracy, cost) in runs.items():
    ours, pooled, best = accuracy["federated"], accuracy["pooled"], runs[seed].best_alone
    margins = ours - pooled, ours - best
    alone = [accuracy[name] for name in names]
    rows.append([ours, pooled, best, *alone, *margins, cost.seconds, cost.cpu])
    lines.append([seed, *rows[-1]])
  lines.append(["mean", *map(statistics.mean, zip(*rows, strict=True))])
  text = lambda cell: f"{cell:.1f}" if isinstance(cell, float) else str(cell)
  cells = [head, ["---"] * len(head), *([text(cell) for cell in line] for line in lines)]
  return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main(_):
  runs = {}
  for seed in map(int, _SEEDS.value):
    with tempfile.TemporaryDirectory() as scratch:
      folder = pathlib.Path(_OUT.value or scratch) / str(seed)
      folder.mkdir(parents=True, exist_ok=True)
      runs[seed] = run(seed, folder)
  behind = [r.accuracy["pooled"] - r.accuracy["federated"] for r in runs.values()]
  ahead = [r.accuracy["federated"] - r.best_alone for r in runs.values()]
  seconds, cpu = zip(*(r.cost for r in runs.values()), strict=True)
  mean = statistics.mean
  measuring.say("first run: pooled minus federated", behind, "points", 3.0, value=mean(behind))
  more = {"value": mean(ahead), "at_least": True}
  measuring.say("first run: federated minus best alone", ahead, "points", 3.0, **more)
  measuring.say("first run: least of it", [min(ahead)], "points", 0.0, at_least=True)
  measuring.say("first run", seconds, "s", 80.0, cpu=round(statistics.median(cpu), 1))
  print(table(runs))


if __name__ == "__main__":
  app.run(main)
