"""Makes the table of operations and networks that encrypted inference accepts or refuses.

  python -m benchmarks.conformance --output=docs/conformance.md
  python -m benchmarks.conformance --kinds=norms,activations
  python -m benchmarks.conformance --plans

`--plans` plans the networks of `benchmarks.networks` at full size from shapes alone, and prints the
seconds. Haiku and Equinox are used where they are installed.
"""

import pathlib
import time

import jax
from absl import app, flags, logging

from benchmarks import measuring, networks
from benchmarks.conformance import cases, measure, table
from primia_jax import mpc

_OUTPUT = flags.DEFINE_string("output", None, "File to write; the table is printed without it.")
_KINDS = flags.DEFINE_list("kinds", [], "Kinds of cases to run; all without it.")
_PLANS = flags.DEFINE_bool("plans", False, "Time plans at full size instead.")

_TARGET = 60.0  # seconds to print a plan at full size


def main(_):
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
  plans() if _PLANS.value else conformance()


def conformance() -> None:
  chosen = [case for case in cases.CASES if not _KINDS.value or case.kind in _KINDS.value]
  if unknown := set(_KINDS.value) - {case.kind for case in chosen}:
    kinds = dict.fromkeys(case.kind for case in cases.CASES)
    raise app.UsageError(f"--kinds={','.join(sorted(unknown))}; known are {', '.join(kinds)}")
  results = []
  for case in chosen:
    start = time.perf_counter()
    results.append(measure.measure(case))
    seconds = time.perf_counter() - start
    logging.info("%s: %.1f s, %s", case.kind, seconds, table.row(results[-1]))
  text = table.markdown(results)
  if _OUTPUT.value is None:
    print(text)
  else:
    pathlib.Path(_OUTPUT.value).write_text(text)


def plans() -> None:
  for name, network in networks.NETWORKS.items():
    variables, x = networks.shapes(network)
    with measure.as_users_have_it():
      start, cpu = time.perf_counter(), time.process_time()
      lines = str(mpc.plan(network.module().apply, measure.OWNERS, (variables, x))).splitlines()
      cost = measuring.Cost(time.perf_counter() - start, time.process_time() - cpu)
    total = " ".join(next(line for line in lines if line.split()[:1] == ["total"]).split())
    measuring.report(f"plan: {name}", [cost], target=_TARGET, unit="s", plan=total)


if __name__ == "__main__":
  app.run(main)
