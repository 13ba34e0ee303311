"""Searches settings over a federation: PriMIA's space, or your own.

  primia-search --preset=chest_xray --trials=30 --run_dir=runs/search
  primia-train --flagfile=runs/search/best.flags --run_dir=runs/best

Each trial is a federated run with the flags that you give, in which some are drawn anew: learning
rate, Adam's betas, weight decay (optimizer=adamw or adam_l2), augmentation, MixUp and the batches
between synchronisations, as far as they have an effect. Optuna proposes them (TPE). A trial is
scored by the best MCC on the sites' validation images, in the same secure sums as in any run; test
images are never scored. Trials that are worse than the median of earlier ones after as many steps
end early.

The folder holds search.md with pictures, best.flags, and the study (search.db). A search that was
stopped goes on when it is started again with the same flags; more --trials lengthen it.

With dp a search is refused: every trial would be charged in full, and its scores are not protected.
Search on public or synthetic images, and train privately with what you found.
"""

from absl import flags

from . import inputs, presets, running, search_space, settings
from .configs import Train, rehearse
from .folders import alone

settings.define_flags(Train)
presets.define_flag()
flags.DEFINE_string(
  "run_dir", None, "folder of the search: a new one, or that of one to go on with", required=True
)
flags.DEFINE_integer("trials", 20, "trials in all, those of earlier starts included", 1)
flags.DEFINE_string(
  "space",
  "",
  "what is varied, separated by commas: NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A|B|C, such as "
  "learning_rate=1e-5:1e-3:log,augment=none|light; empty takes PriMIA's space",
)
flags.DEFINE_string(
  "pruner", "median", "which trials end early: median (those worse than it), or none"
)
flags.DEFINE_integer("startup_trials", 4, "trials before any ends early", 1)
flags.DEFINE_list("baselines", [], "ignored; presets of train_federated may set it")
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def check(config: Train) -> None:
  """Refuses what cannot be searched.

  Raises:
    ValueError: naming the flag and the cure.
  """
  if config.hospitals.num_sites < 2:
    raise ValueError(
      f"num_sites={config.hospitals.num_sites}: one site is not a federation; use 2 or more"
    )
  if config.privacy.dp != "none":
    raise ValueError(
      f"dp={config.privacy.dp}: every trial would be charged in full to the same images, and the "
      "validation scores that choose among trials are not protected. Search with dp=none on public "
      "or synthetic images, and train privately with what you found"
    )
  if not config.privacy.validates:
    raise ValueError(
      f"validation={config.privacy.validation}: trials are compared on validation images; use "
      "validation=exact or auto"
    )
  if config.in_processes:
    raise ValueError("placement=flower: a search runs in one process; use placement=auto")
  if floor := config.disclosure.fewest_patients:
    raise ValueError(
      f"fewest_patients={floor}: a search compares trials by their validation scores and lists "
      "them, which a floor may suppress; use 0"
    )
  if config.comparison.subgroups:
    raise ValueError(
      f"subgroups={config.comparison.subgroups}: a search has no test images to compare; leave it "
      "out, and name it to primia-train"
    )
  if config.record_transcript:
    raise ValueError("record_transcript=True: a search keeps no transcripts; leave it out")
  rehearse(config)


def main() -> None:
  try:
    from . import search_report, searching  # here, because Optuna is an extra
  except ImportError as error:
    raise ValueError(
      f"primia-search needs Optuna ({error}): pip install 'primia-jax[search]'"
    ) from error
  config = settings.from_flags(Train)
  settings.choose("pruner", FLAGS.pruner, searching.PRUNERS)
  running.prepare_devices(config.federation.placement)
  check(config)
  space = search_space.parse(FLAGS.space, config)
  inputs.check_sources(config)
  folder = running.open_run(config, FLAGS.run_dir, "search")
  with alone(folder / "search.lock"):
    study = searching.open_study(folder, space, FLAGS.pruner, FLAGS.startup_trials)
    write = lambda study: search_report.write(folder, study, config, space)
    searching.search(config, space, study, folder, FLAGS.trials, write)
  search_report.print_summary(study, folder)


if __name__ == "__main__":
  running.start(main)
