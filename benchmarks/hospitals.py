"""Seconds a round by hospitals apart (Flower on loopback) beside the same round in one process, and
where the time goes.

  python -m benchmarks.hospitals
  python -m benchmarks.hospitals --train_flags=--preset=chest_xray,--data=folder:XRAYS

Needs the extra `flower`.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags

from benchmarks import measuring, timed_site
from experiments import processes, trial

_SITES = flags.DEFINE_integer("sites", 3, "Hospitals.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Rounds measured, after one to warm up.", lower_bound=1)
_FLAGS = flags.DEFINE_list("train_flags", [], "Further flags of primia-train, such as --preset=X.")

_MORE = 30.0  # seconds that a round apart may cost more than in one process
_TIMEOUT = 600.0
_MODULE = "experiments.train_federated"
_NEXT = "evidence, and the next masked input, with training"
_STAGES = {  # by the messages of a sum: where its keys were agreed on in the one before, or not
  3: ("consistency", "unmask", _NEXT),
  5: ("share_keys", "masked_input, with training", "consistency", "unmask", _NEXT),
}


def of_rounds(run: pathlib.Path) -> list[float]:
  """Seconds of each round of a run, without the first, which compiles."""
  return [line["seconds"] for line in lines(run / "federated" / "rounds.jsonl")][1:]


def lines(path: pathlib.Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def in_one_process(folder: pathlib.Path, arguments: list[str]) -> list[float]:
  command = [sys.executable, "-m", _MODULE, "--placement=scan", f"--run_dir={folder}"]
  subprocess.run([*command, "--baselines=", *arguments], check=True, stdout=sys.stderr)
  return of_rounds(folder)


def apart(folder: pathlib.Path, arguments: list[str]) -> list[pathlib.Path]:
  """A trial whose sites write down what messages cost them; the sites' folders."""
  folder.mkdir()
  with trial.deployed(_SITES.value, folder, folder.with_name("sites")) as deployment:
    trial.start_sites(deployment, "benchmarks.timed_site", ["--placement=flower", *arguments])
    trial.start_run(deployment, _TIMEOUT)
    if lost := trial.watch(deployment):
      raise RuntimeError(f"sites {lost} were lost; see {deployment.log(f'site {lost[0]}')}")
  return deployment.sites


def starts_of_flower() -> list[float]:
  """Seconds until as many processes as sites, started together, have imported the ClientApp."""
  command, found = [sys.executable, "-c", "import primia_jax.flower.bridging"], []
  for _ in range(3):
    begun = time.perf_counter()
    started = [subprocess.Popen(command, env=dict(os.environ)) for _ in range(_SITES.value)]
    if any(process.wait() for process in started):
      raise RuntimeError(f"{' '.join(command)} failed; is the extra flower installed?")
    found.append(time.perf_counter() - begun)
  return found


def main(_):
  trial.check_installed()
  arguments = [f"--num_sites={_SITES.value}", *_FLAGS.value, f"--rounds={_ROUNDS.value + 1}"]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    one = in_one_process(folder / "one", arguments)
    own = apart(folder / "apart", arguments)
    rounds = of_rounds(own[0] / processes.RUN)
    sums = lines(folder / "apart" / trial.COORDINATOR / "sums.jsonl")
    times = [lines(site / timed_site.FILE) for site in own]
  per_round = len(sums) // (_ROUNDS.value + 1)
  measuring.say("a round in one process", one, "s", None)
  first = len(sums) - _ROUNDS.value * per_round
  lengths = [len(one["seconds"]) for one in sums]
  per_sum = sum(lengths[first:]) / len(lengths[first:])
  measuring.say("a round apart", rounds, "s", None, sums=per_round, messages_a_sum=per_sum)
  pairs = [a - b for a, b in zip(rounds, one, strict=True)]
  measuring.say("a round apart less one in one process", pairs, "s", _MORE)
  before = len(times[0]) - sum(lengths)  # answers before the first sum
  found: dict[str, list[tuple[float, list[dict[str, Any]]]]] = {}
  for n in range(first, len(sums)):
    for at, stage in enumerate(_STAGES[lengths[n]]):
      row = [site[before + sum(lengths[:n]) + at] for site in times]
      found.setdefault(stage, []).append((sums[n]["seconds"][at], row))
  for stage, messages in found.items():
    seconds, rows = [one for one, _ in messages], [row for _, row in messages]
    ours = [max(row["answered"] for row in each) for each in rows]
    worked = [max(row["worked"] for row in each) for each in rows]
    more = {"site_work": round(max(worked), 4), "megabytes": rows[0][0]["bytes"] / 1e6}
    measuring.say(f"message: {stage}", seconds, "s", None, **more)
    flower = [whole - answered for whole, answered in zip(seconds, ours, strict=True)]
    measuring.say(f"of it Flower, and waiting for others: {stage}", flower, "s", None)
  measuring.say("start of a ClientApp, all sites at once", starts_of_flower(), "s", None)


if __name__ == "__main__":
  app.run(main)
