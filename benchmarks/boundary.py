"""Seconds to audit a secret function: what crosses, as each party sees it.

  python -m benchmarks.boundary
  python -m benchmarks.boundary --case=resnet18_64 --ring=32

The plan is made before. JAX's caches of traces are emptied before each round, so each is a first
audit; nothing is compiled. Another ring or size of image changes little: the audit follows arrays,
not their elements.
"""

import jax
from absl import app, flags

from benchmarks import encrypted_work, measuring
from primia_jax import boundary
from primia_jax.mpc import planning
from primia_jax.mpc.circuit import Config

_CASE = flags.DEFINE_string("case", "resnet18_224", "resnet18_224, resnet18_64 or lenet28.")
_RING = flags.DEFINE_enum("ring", "64", ["32", "64"], "Bits of the ring.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Audits.")

_SECONDS = 5.0


def main(_):
  work = encrypted_work.network(_CASE.value)
  config = {"32": Config(32, 10), "64": Config(64, 16)}[_RING.value]
  ranges = planning.calibrate(work.fn, work.owners, [work.args])
  plan = planning.plan(work.fn, work.owners, work.args, config, ranges)
  found = []

  def audit():
    jax.clear_caches()
    found[:] = [boundary.audit_secret(plan)]
    return ()

  costs = measuring.alternate({"audit": measuring.timed(audit)}, _ROUNDS.value)["audit"]
  (report,) = found
  report.check()
  measuring.report(
    f"audit {_CASE.value}",
    costs,
    target=_SECONDS if _CASE.value.startswith("resnet18") else None,
    unit="s",
    ring=_RING.value,
    crossings=len(report.crossings),
    megabytes=round(sum(c.num_bytes for c in report.crossings) / 1e6, 1),
  )


if __name__ == "__main__":
  app.run(main)
