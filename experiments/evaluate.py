"""Tests a trained model on images.

  primia-evaluate --run_dir=runs/first --data=folder:PATH --output_dir=out

For labelled images (a folder for each class, npz or TFDS) it writes predictions.csv, metrics.json,
report.md, a confusion matrix and ROC curves: of the test split, or of all images where there is
none. Without --data it takes the test images of the run's own report. With --unlabelled it takes a
folder of any images and writes predictions.csv only. --subgroups=sex,age:0:18:65:200 compares the
scores of images by columns of their CSV. The model sets the image size, the classes and
the CT window; --label_names names the source's labels in their order, and classes are matched by
name. --run_dir takes a checkpoint of PriMIA, too. Of a model that learns masks it writes
masks.npz, and Dice of each case for images with masks; --overlays draws some.

With --placement=flower hospitals score the model together, and no image moves: each scores its own
in a process and a folder of its own, and only sums over all of them are opened. Without --site that
is a trial on this machine. A hospital whose folder primia-site has made scores the model that its
operator has approved, and needs no other flag:

  primia-evaluate --run_dir=/srv/primia/a --channel_dir=/srv/primia/a-channel
"""

from typing import Any

import numpy as np
from absl import flags

from primia_jax.data.dataset import Dataset
from primia_jax.disclosure import Policy

from . import (
  admission,
  approving,
  folders,
  inputs,
  model_files,
  multilabel_report,
  report,
  running,
  scored_images,
  segmentation_report,
  settings,
  site_log,
  subgroup_tables,
  together,
)
from .configs import tasks
from .configs.comparison import Comparison
from .configs.data import Data
from .configs.scoring import Scoring
from .seating import NAMES, Seating

settings.define_flags(Data)
settings.define_flags(Comparison)
settings.define_flags(Scoring)
settings.define_flags(Seating)
flags.DEFINE_string(
  "run_dir",
  None,
  "folder of the training run, or a checkpoint of PriMIA (.pt); or a hospital's own folder",
  required=True,
)
flags.DEFINE_string(
  "classes",
  "",
  "classes of a checkpoint of PriMIA, in the order of its outputs; empty takes normal, "
  "bacterial, viral for three",
)
flags.DEFINE_string(
  "output_dir", "", "folder for the results; created. A hospital's own folder has a place for them"
)
flags.DEFINE_string(
  "placement",
  "",
  "flower: hospitals score the model together, each its own images; empty scores all images in "
  "this process",
)
flags.DEFINE_integer("seed", 0, "seed of the phantom's images and of the bootstrap", 0, 2**32 - 1)
flags.DEFINE_integer(
  "overlays",
  0,
  "segmentation: draw this many test images with the outlines of the truth and of the model's "
  "mask; they are IMAGES OF PATIENTS",
  0,
  100,
)
flags.DEFINE_integer(
  "fewest_patients",
  0,
  "fewest patients in a count of the report (images where patients are unknown); smaller counts, "
  "and scores and pictures that would tell them, are suppressed, and no predictions.csv is "
  "written; 0 shows all",
  0,
)
flags.DEFINE_boolean("unlabelled", False, "only predict, for a folder of images without classes")
FLAGS = flags.FLAGS
FLAGS.set_default("data", "")  # the test images of the run's own report
flags.adopt_module_key_flags(settings)


def own_images() -> tuple[Dataset, Data]:
  """The test images of the run's own report, and its settings of data."""
  together.check_unnamed(FLAGS)
  try:
    run = folders.settings_of(FLAGS.run_dir)
    return inputs.tested_images(run), run.data
  except (FileNotFoundError, ValueError) as error:
    raise ValueError(
      f"{error} (the data of the run in {FLAGS.run_dir}; name other images with --data)"
    ) from error


def main() -> None:
  site_log.keep(FLAGS.run_dir)
  site = admission.of(FLAGS.run_dir, approving.EVALUATION)
  settings.choose("placement", FLAGS.placement, ("", together.FLOWER))
  if site is not None or FLAGS.placement:
    together.score(FLAGS, site, f"{__package__}.evaluate")
    return
  given = [name for name in NAMES if FLAGS[name].present]
  settings.from_flags(Seating).check(given, FLAGS.placement, -1, 1, is_site=False)
  if given := [name for name in settings.flat(Scoring()) if FLAGS[name].present]:
    raise ValueError(
      f"{given[0]}={FLAGS[given[0]].value} belongs to placement=flower; set that, or leave it out"
    )
  score_here()


def score_here() -> None:
  """Scores all images in this process."""
  if not FLAGS.output_dir:
    raise ValueError(
      "output_dir is empty; name a folder for the results, such as --output_dir=results"
    )
  output = folders.to_write(
    FLAGS.output_dir,
    (
      "predictions.csv",
      "masks.npz",
      *report.FILES,
      *segmentation_report.FILES,
      *multilabel_report.PICTURES,
    ),
  )
  if FLAGS.unlabelled and not FLAGS["data"].present:
    raise ValueError("unlabelled without data; name the images, such as --data=folder:PATH")
  for name in ("label_names", "patient_column", "patient_pattern"):
    if FLAGS.unlabelled and FLAGS[name].value:
      raise ValueError(f"{name}={FLAGS[name].value} says what unlabelled images lack; leave it out")
  if FLAGS.site_data:
    raise ValueError(
      f"site_data={FLAGS.site_data}: one source is tested at a time; name it with --data, or use "
      "--placement=flower"
    )
  model, trained, label_names, model_config = model_files.load_model(FLAGS.run_dir, FLAGS.classes)
  is_multi = model_files.is_multi(FLAGS.run_dir)
  task = tasks.of(model_config.name, is_multi)
  if FLAGS.fewest_patients and (task.of_pixels or is_multi or FLAGS.unlabelled):
    raise ValueError(
      f"fewest_patients={FLAGS.fewest_patients}: masks, findings and predictions are of single "
      "patients; leave it out"
    )
  comparison = settings.from_flags(Comparison)
  comparison.check(task.of_pixels, is_multi)
  if FLAGS.subgroups and FLAGS.unlabelled:
    raise ValueError(f"subgroups={FLAGS.subgroups}: unlabelled images have no scores; leave it out")
  if FLAGS.overlays and not task.of_pixels:
    raise ValueError(f"overlays={FLAGS.overlays}: {model_config.name} gives no masks; leave it out")
  model_files.take_form(FLAGS, FLAGS.run_dir, model_config)
  facts: dict[str, Any] = {}
  if is_multi and not FLAGS.unlabelled and not FLAGS.label_columns:
    FLAGS["multi_label"].value = True
  if FLAGS["data"].present:
    config = settings.from_flags(Data)
    inputs.source(config)
    if FLAGS.unlabelled:
      dataset = inputs.unlabelled_images(config, label_names)
    else:
      dataset, has_test = inputs.images_to_test(config, FLAGS.seed, label_names)
      facts = {} if has_test else scored_images.trained_on(FLAGS.run_dir, config)
  else:
    dataset, config = own_images()
  if not FLAGS.unlabelled:
    tasks.check(model_config.name, dataset, is_multi)
  is_scored = not (FLAGS.unlabelled or task.of_pixels or is_multi)
  compared = subgroup_tables.of_images(comparison.columns(), dataset) if is_scored else {}
  folders.private(output)
  predictions = task.predictor(model.apply)(trained, dataset.images)
  about = {
    "run_dir": FLAGS.run_dir,
    "data": config.site_data or config.data,
    "model": model_config.name,
    "image_size": model_config.image_shape[0],
    **facts,
  }
  if task.of_pixels:
    np.savez_compressed(output / "masks.npz", masks=predictions)
    print(f"{len(dataset)} masks are in {output / 'masks.npz'}")
    if not FLAGS.unlabelled:
      said = report.Facts(about, dataset.notes)
      result = segmentation_report.write(
        output, "Evaluation", dataset, {"trained": predictions}, "trained", FLAGS.seed, said,
        FLAGS.overlays,
      )  # fmt: skip
      report.print_summary(result, output)
    return
  ids = inputs.names_of(dataset)
  if is_multi:
    if not FLAGS.unlabelled:
      said = report.Facts(about, dataset.notes)
      result = multilabel_report.write(
        output, "Evaluation", dataset, {"trained": predictions}, "trained", FLAGS.seed, said
      )
      report.print_summary(result, output)
      return
    multilabel_report.probabilities_csv(output / "predictions.csv", ids, predictions, label_names)
    print(f"{len(dataset)} predictions are in {output / 'predictions.csv'}")
    return
  labels = None if FLAGS.unlabelled else dataset.labels
  if not FLAGS.fewest_patients:
    report.predictions_csv(output / "predictions.csv", ids, labels, predictions, label_names)
  if labels is None:
    print(f"{len(dataset)} predictions are in {output / 'predictions.csv'}")
    for what, text in dataset.notes.items():
      print(f"  {what}: {text}")
    return
  result = report.write_report(
    output,
    title="Evaluation",
    data_name=dataset.name,
    arms={"trained": report.Arm(labels, predictions)},
    label_names=label_names,
    facts=report.Facts(about, dataset.notes, policy=Policy(fewest_patients=FLAGS.fewest_patients)),
    patients=dataset.groups,
    compared=compared,
    groups=dataset.groups if config.patient_column or config.patient_pattern else None,
    main_arm="trained",
    seed=FLAGS.seed,
  )
  report.print_summary(result, output)


if __name__ == "__main__":
  running.start(main)
