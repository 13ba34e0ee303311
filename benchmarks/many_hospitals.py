"""Twenty rounds of ten hospitals over Flower on loopback, of which two are lost and come back: who
is in each sum, and the memory of the coordinator's processes, which must not grow with the rounds.

  python -m benchmarks.many_hospitals

Needs the extra `flower`, Linux and 16 GiB of memory. The hospitals train the small CNN on phantom
images; the two are killed, and their programs are started again rounds later.
"""

import json
import os
import pathlib
import signal
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import measuring
from experiments import trial, trial_keys

_SITES = flags.DEFINE_integer("sites", 10, "Hospitals.", lower_bound=7)
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Rounds.", lower_bound=8)

_MODULE, _TIMEOUT = "experiments.train_federated", 900.0
_MOST = 1.1  # growth of memory from the first quarter of the rounds to the last


def descendants(root: int) -> dict[int, str]:
  """Process to command line, of a process and all that it has started."""
  parents, commands = dict[int, int](), dict[int, str]()
  for entry in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      fields = (entry / "stat").read_text().rpartition(")")[2].split()
      commands[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
      parents[int(entry.name)] = int(fields[1])
    except OSError:  # it has ended
      continue
  found = {root}
  while more := {i for i, parent in parents.items() if parent in found} - found:
    found |= more
  return {i: commands.get(i, "") for i in found}


def megabytes(processes: dict[int, str]) -> float:
  """Resident memory of processes, in 10^6 bytes."""
  total = 0
  for i in processes:
    try:
      text = pathlib.Path(f"/proc/{i}/status").read_text()
    except OSError:
      continue
    total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS"))
  return total * 1024 / 1e6


def played(folder: pathlib.Path) -> tuple[list[dict], list[tuple[int, float, float]]]:
  """(a line for each sum, (sums so far, ServerApp's and SuperLink's megabytes) over time)."""
  more = [
    *("--placement=flower", f"--num_sites={_SITES.value}", f"--rounds={_ROUNDS.value}"),
    *("--model=cnn", "--validation=none", f"--phantom_images={40 * _SITES.value}"),
  ]
  sums, sizes = folder / "run" / trial.COORDINATOR / "sums.jsonl", []
  # site: (sums after which it is killed, after which its program is started again)
  quarter = _ROUNDS.value // 4
  lost = {_SITES.value - 1: (quarter - 1, 2 * quarter), _SITES.value // 2: (quarter, 3 * quarter)}
  (folder / "run").mkdir()
  with trial.deployed(_SITES.value, folder / "run", folder / "sites") as deployment:
    trial_keys.introduce(deployment.folder / trial.COORDINATOR, deployment.sites)
    trial.start_sites(deployment, _MODULE, more)
    trial.start_run(deployment, _TIMEOUT)
    superlink = deployment.processes["superlink"].pid
    while not (deployment.folder / trial.COORDINATOR / "ending.json").is_file():
      done = len(sums.read_text().splitlines()) if sums.is_file() else 0
      of_link = descendants(superlink)
      of_app = {i: c for i, c in of_link.items() if "flwr-serverapp" in c or "runner" in c}
      link = {i: c for i, c in of_link.items() if i not in of_app}
      sizes.append((done, megabytes(of_app), megabytes(link)))
      for site, (killed, back) in lost.items():
        process = deployment.processes[f"site {site}"]
        if killed <= done < back and process.poll() is None:
          os.killpg(process.pid, signal.SIGKILL)
          process.wait()
        if done >= back and process.poll() is not None and process.returncode:
          trial.start_site(deployment, site, _MODULE, more)
      if deployment.processes["superlink"].poll() is not None:
        raise RuntimeError(f"the SuperLink has ended; see {deployment.log('superlink')}")
      time.sleep(1.0)
    if why := json.loads((deployment.folder / trial.COORDINATOR / "ending.json").read_text()).get(
      "failed"
    ):
      raise RuntimeError(f"the run has failed: {why}")
  return [json.loads(line) for line in sums.read_text().splitlines()], sizes


def main(_):
  trial.check_installed()
  with tempfile.TemporaryDirectory() as name:
    rows, sizes = played(pathlib.Path(name))
  for row in rows:
    print(f"sum {row['round']}: sites {row['survivors']}", file=sys.stderr)
  measuring.say("a sum", [sum(row["seconds"]) for row in rows], "s", None, sums=len(rows))
  quarter = len(rows) // 4
  for what, column in (("the coordinator's app", 1), ("SuperLink", 2)):
    early = [row[column] for row in sizes if 1 <= row[0] <= quarter]
    late = [row[column] for row in sizes if row[0] >= len(rows) - quarter]
    measuring.say(f"memory of {what}, first quarter", early, "MB", None)
    measuring.say(f"memory of {what}, last quarter", late, "MB", None)
    growth = sorted(late)[len(late) // 2] / sorted(early)[len(early) // 2]
    measuring.say(f"growth of {what}", [growth], "x", _MOST)


if __name__ == "__main__":
  app.run(main)
