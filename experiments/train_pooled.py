"""Trains a network on all images in one place: what federated training is measured against.

  primia-pooled --run_dir=runs/pooled

It runs the same code as federated training, with one site. Flags about sites decide only which
images are held out for validation; flags about algorithms and aggregation have no effect, nor has
--baselines, so that presets of train_federated serve here, too.
"""

from absl import flags

from . import inputs, presets, report, running, settings
from .configs import Train, rehearse

settings.define_flags(Train)
presets.define_flag()
flags.DEFINE_string(
  "run_dir", None, "folder of the run: a new one, or that of an interrupted run", required=True
)
flags.DEFINE_list("baselines", [], "ignored; presets of train_federated may set it")
flags.DEFINE_boolean("tensorboard", False, "also write TensorBoard event files to the run folder")
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  config = settings.from_flags(Train)
  rehearse(config, is_federated=False)
  inputs.check_sources(config)
  if any(FLAGS.baselines):
    print(f"baselines={','.join(FLAGS.baselines)} is ignored: train_pooled trains one model")
  folder = running.open_run(config, FLAGS.run_dir, "train_pooled")
  log = running.tensorboard(folder) if FLAGS.tensorboard else lambda row: None
  result = running.run(config, folder, federated=False, log=log)
  report.print_summary(result, folder)


if __name__ == "__main__":
  running.start(main)
