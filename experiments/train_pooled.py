"""Trains a network on all images in one place: what federated training is measured against.

  python -m experiments.train_pooled --run_dir=runs/pooled

Takes the flags of train_federated; those of sites decide only how validation images are chosen. It
is the same code as federated training, with one site.
"""

import sys

from absl import flags

from experiments import running, settings
from experiments.configs import Train, rehearse

settings.define_flags(Train)
flags.DEFINE_string("run_dir", None, "folder of the run; created, or gone on with", required=True)
flags.DEFINE_boolean("tensorboard", False, "also write TensorBoard event files to the run folder")
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(sys.modules["experiments.settings"])


def main() -> None:
  config = settings.from_flags(Train)
  rehearse(config, is_federated=False)
  folder = running.open_run(config, FLAGS.run_dir)
  log = running.tensorboard(folder) if FLAGS.tensorboard else lambda row: None
  result = running.run(config, folder, federated=False, log=log)
  running.print_summary(result, folder)


if __name__ == "__main__":
  running.start(main)
