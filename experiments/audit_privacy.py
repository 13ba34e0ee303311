"""Attacks a finished run, bounds what attacks can do, and says where protection fails.

  primia-train --record_transcript --run_dir=runs/first
  primia-audit --run_dir=runs/first --output_dir=runs/first_audit

It writes privacy_report.md with pictures: what the ledger says, each attack at each threat point
beside a control, the same attack without protection, and a verdict. Images are loaded by the
run's own settings. What an adversary saw is in the transcript, which a simulation keeps with
--record_transcript; without one, the parts that need it are left out.

Each part is kept when it is done, so that an interrupted audit continues with the next when it is
started again with the same flags. --parts chooses; further parts may be added to a finished audit.
"""

import pathlib

from absl import flags

from . import folders, running, settings
from .audits import auditing
from .audits.context import Effort

settings.define_flags(Effort)
flags.DEFINE_string("run_dir", None, "folder of the finished training run", required=True)
flags.DEFINE_string("output_dir", None, "folder for the report; created", required=True)
flags.DEFINE_list(
  "parts",
  ["auto"],
  f"which parts: {', '.join(auditing.PARTS)}; auto takes all but {auditing.GRID}, and without a "
  "transcript only those that need none",
)
flags.DEFINE_bool(
  "grid",
  False,
  "also reconstruct by images at a site, batch size and secure aggregation, cell after cell",
)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  effort = settings.from_flags(Effort)
  output = folders.to_write(FLAGS.output_dir, ())
  parts = [*FLAGS.parts, *([auditing.GRID] if FLAGS.grid else [])]
  running.prepare_devices("auto")  # shadow models are trained one on each core
  said = auditing.audit(pathlib.Path(FLAGS.run_dir).expanduser(), output, effort, parts)
  print(said.replace("**", ""))
  print(f"Report: {output / auditing.REPORT}")


if __name__ == "__main__":
  running.start(main)
