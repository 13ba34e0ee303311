"""Times `import primia_jax`, and its first use, each in a fresh process.

python -m benchmarks.importing --repeats=7
"""

import os
import subprocess
import sys
import time

from absl import app, flags

from benchmarks import measuring

_REPEATS = flags.DEFINE_integer("repeats", 7, "Processes of each, after one to warm up.", 1)

_TARGET = 1.0  # seconds, for the import alone
_CODE = {
  "python without imports": "pass",
  "import primia_jax": "import primia_jax",
  "import primia_jax; primia_jax.federate": "import primia_jax; primia_jax.federate",
}


def _fresh(code: str) -> measuring.Contestant:
  while True:
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", code], check=True)
    seconds, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    yield measuring.Cost(seconds, cpu)


def main(_):
  costs = measuring.alternate({name: _fresh(code) for name, code in _CODE.items()}, _REPEATS.value)
  for name, cost in costs.items():
    target = _TARGET if name == "import primia_jax" else None
    measuring.report(name, cost, target=target, unit="s")


if __name__ == "__main__":
  app.run(main)
