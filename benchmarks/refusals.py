"""Measures how long users wait for refusals that flags alone can show: eleven bad invocations, each
in a new process.

python -m benchmarks.refusals --repeats=5
"""

import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from benchmarks import measuring

_REPEATS = flags.DEFINE_integer("repeats", 5, "Starts of each, after one to warm up.", 1)

_TARGET = 2.0  # seconds
_ROOT = pathlib.Path(__file__).parents[1]
_INVOCATIONS = (
  "train_federated --run_dir=new --roundz=3",
  "train_federated --run_dir=new --rounds=0",
  "train_federated --run_dir=new --optimizer=lion",
  "train_federated --run_dir=new --dp=example",
  "train_pooled --run_dir=new --image_size=100000",
  "train_pooled --run_dir=new --flagfile=missing.flags",
  "evaluate --run_dir=missing --output_dir=new",
  "infer_encrypted --checkpoint=missing --images=missing.png",
  "evaluate_encrypted --checkpoint=missing --data=phantom --vendor_dir=v --hospital_dir=h",
  "account --target_epsilon=3 --num_units=0",
  "plot --run_dir=missing",
)


def _start(invocation: str, folder: str) -> measuring.Cost:
  """Starts a program in an empty folder.

  Raises:
    RuntimeError: it did not refuse.
  """
  program, *arguments = invocation.split()
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  start = time.perf_counter()
  command = [sys.executable, "-m", f"experiments.{program}", *arguments]
  environment = {"PYTHONPATH": str(_ROOT), "JAX_PLATFORMS": "cpu", "HOME": folder}
  done = subprocess.run(
    command, cwd=folder, env=environment, capture_output=True, text=True, check=False
  )
  took = time.perf_counter() - start
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  if done.returncode != 1 or not done.stderr.startswith("error: "):
    raise RuntimeError(f"{invocation} ended with {done.returncode}: {done.stderr[-500:]}")
  return measuring.Cost(took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main(_):
  with tempfile.TemporaryDirectory() as folder:
    everything = []
    for invocation in _INVOCATIONS:
      _start(invocation, folder)
      costs = [_start(invocation, folder) for _ in range(_REPEATS.value)]
      measuring.report(f"refusal: {invocation}", costs, target=_TARGET, unit="s")
      everything += costs
    measuring.report("refusal: all ten", everything, target=_TARGET, unit="s")


if __name__ == "__main__":
  app.run(main)
