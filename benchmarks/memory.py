"""Peak memory of federated rounds with streamed data, each setting in a process of its own.

  python -m benchmarks.memory --chunks=4
  python -m benchmarks.memory --chunks=16

It must grow with the chunk, not with the number of sites: the figures are the peak for each setting
(target: 24 GiB) and, for each chunk, that of the most sites over that of the fewest.
"""

import json
import resource
import subprocess
import sys
import time

import jax
from absl import app, flags, logging

from benchmarks import measuring, work
from primia_jax import sites

_MODEL = flags.DEFINE_enum("model", "leaf_cnn", ["leaf_cnn", "mlp"], "What the sites train.")
_SITES = flags.DEFINE_list("sites", "100,1000", "Numbers of sites, all of which take part.")
_CHUNKS = flags.DEFINE_list("chunks", "16", "Sites in a chunk.")
_SUMMATION = flags.DEFINE_string("summation", "masked", "clear, encoded or masked.")
_ONE = flags.DEFINE_bool(
  "one", False, "Run one round here, with the first number of sites and of the chunk."
)

_GIB, _GROWTH = 24.0, 1.1


def one_round(num_sites: int, chunk: int) -> dict[str, float]:
  """Runs a round; returns the peak memory of this process, and before the round, in GiB, and the
  seconds it took.
  """
  how, everybody = work.summed(_SUMMATION.value, num_sites), work.streamed(num_sites, chunk)
  run = work.rounds(_MODEL.value, num_sites, how, sites.chunked(chunk), everybody)
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  before, start = peak(), time.perf_counter()
  jax.block_until_ready(run())
  return {
    "peak": peak(),
    "before": before,
    "seconds": time.perf_counter() - start,
    "cpu": time.process_time(),
  }


def main(_):
  settings = [
    (num_sites, chunk) for chunk in map(int, _CHUNKS.value) for num_sites in map(int, _SITES.value)
  ]
  if _ONE.value:
    print(json.dumps(one_round(*settings[0])))
    return
  peaks = {}
  for num_sites, chunk in settings:
    command = [
      sys.executable,
      "-m",
      "benchmarks.memory",
      "--one",
      f"--sites={num_sites}",
      f"--chunks={chunk}",
    ]
    command += [f"--model={_MODEL.value}", f"--summation={_SUMMATION.value}"]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    costs = json.loads(out.splitlines()[-1])
    peaks[num_sites, chunk] = costs["peak"]
    name = (
      f"peak memory: {_MODEL.value}, {num_sites} sites, chunk={chunk}, {_SUMMATION.value}, streamed"
    )
    more = {key: round(costs[key], 3) for key in ("before", "seconds", "cpu")}
    measuring.say(name, [costs["peak"]], "GiB", _GIB, **more)
  few, many = min(s for s, _ in settings), max(s for s, _ in settings)
  for chunk in sorted({c for _, c in settings}) if few < many else []:
    ratio = peaks[many, chunk] / peaks[few, chunk]
    measuring.say(
      f"peak memory at {many} over {few} sites: chunk={chunk}", [ratio], "ratio", _GROWTH
    )


if __name__ == "__main__":
  logging.set_verbosity(logging.ERROR)
  app.run(main)
