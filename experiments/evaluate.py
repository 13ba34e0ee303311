"""Tests a trained model on images.

  python -m experiments.evaluate --run_dir=runs/first --data=folder:PATH --output_dir=out

For labelled images (a folder for each class, npz or TFDS) it writes predictions.csv, metrics.json,
report.md, a confusion matrix and ROC curves. With --unlabelled it takes a folder of any images and
writes predictions.csv only. The model sets the image size and the classes.
"""

from absl import flags

from primia_jax import evaluation

from . import inputs, refusals, report, running, settings
from .configs.data import Data
from .configs.model import normalise

settings.define_flags(Data)
flags.DEFINE_string("run_dir", None, "folder of the training run", required=True)
flags.DEFINE_string("output_dir", None, "folder for the results; created", required=True)
flags.DEFINE_integer("seed", 0, "seed of the phantom's images and of the bootstrap", 0, 2**32 - 1)
flags.DEFINE_boolean("unlabelled", False, "only predict, for a folder of images without classes")
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  model, trained, label_names, model_config = running.load_model(FLAGS.run_dir)
  size, _, channels = model_config.image_shape
  for name, value in (("image_size", size), ("channels", channels)):
    if FLAGS[name].present and FLAGS[name].value != value:
      raise ValueError(f"{name}={FLAGS[name].value}: the model takes {value}; omit the flag")
    FLAGS[name].value = value
  config = settings.from_flags(Data)
  if config.site_data:
    raise ValueError(f"site_data={config.site_data}: images are tested from one source; use data")
  output = refusals.folder("output_dir", FLAGS.output_dir)
  inputs.source(config)
  if FLAGS.unlabelled:
    dataset = inputs.unlabelled_images(config, label_names)
  else:
    dataset = inputs.images_to_test(config, FLAGS.seed, label_names)
  output.mkdir(parents=True, exist_ok=True)
  probabilities = evaluation.predictor(model.apply, normalise)(trained, dataset.images)
  ids = [
    str(path) for path in dataset.columns.get("path", [f"image {i}" for i in range(len(dataset))])
  ]
  labels = None if FLAGS.unlabelled else dataset.labels
  report.predictions_csv(output / "predictions.csv", ids, labels, probabilities, label_names)
  if labels is None:
    print(f"{len(dataset)} predictions are in {output / 'predictions.csv'}")
    return
  result = report.write_report(
    output,
    title="Evaluation",
    data_name=dataset.name,
    arms={"model": report.Arm(labels, probabilities)},
    label_names=label_names,
    config={
      "run_dir": FLAGS.run_dir,
      "data": config.data,
      "model": model_config.name,
      "image_size": size,
    },
    versions=report.versions(),
    groups=dataset.groups if config.patient_column or config.patient_pattern else None,
    main_arm="model",
    seed=FLAGS.seed,
  )
  running.print_summary(result, output)


if __name__ == "__main__":
  running.start(main)
