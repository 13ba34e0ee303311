"""Trains a network on all images in one place: what federated training is measured against.

  python -m experiments.train_pooled --run_dir=runs/pooled

It runs the same code as federated training, with one site. Flags about sites decide only which
images are held out for validation; flags about algorithms and aggregation have no effect.
"""

from absl import flags

from . import inputs, running, settings
from .configs import Train, rehearse

settings.define_flags(Train)
flags.DEFINE_string(
  "run_dir", None, "folder of the run: a new one, or that of an interrupted run", required=True
)
flags.DEFINE_boolean("tensorboard", False, "also write TensorBoard event files to the run folder")
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  config = settings.from_flags(Train)
  rehearse(config, is_federated=False)
  inputs.check_sources(config)
  folder = running.open_run(config, FLAGS.run_dir)
  log = running.tensorboard(folder) if FLAGS.tensorboard else lambda row: None
  result = running.run(config, folder, federated=False, log=log)
  running.print_summary(result, folder)


if __name__ == "__main__":
  running.start(main)
