"""Draws pictures from the folders of runs: one kind at a time.

  primia-plot --run_dir=runs/first                    training curves, also while it trains
  primia-plot --run_dir=runs/first --kind=roc         ROC curves, with a reader where known
  primia-plot --run_dir=runs/first --kind=confusion   confusion matrices
  primia-plot --run_dir=runs/e1,runs/e6 --kind=epsilon --output_dir=out    MCC against epsilon
  primia-plot --run_dir=out/a,out/b --kind=latency --output_dir=out        times by kind of link

latency takes output folders of primia-infer. In the run's own folder its pictures are drawn anew
each time; in another nothing is overwritten.
"""

import pathlib

from absl import flags

from . import folders, refusals, run_plots, running, settings

flags.DEFINE_string(
  "run_dir",
  None,
  "folder of the training run; for epsilon and latency several, separated by commas",
  required=True,
)
flags.DEFINE_string("kind", "curves", f"what to draw: {', '.join(run_plots.KINDS)}")
flags.DEFINE_string("output_dir", "", "folder for the pictures; by default the run folder")
FLAGS = flags.FLAGS


def main() -> None:
  settings.choose("kind", FLAGS.kind, tuple(run_plots.KINDS))
  several = FLAGS.kind in run_plots.OF_SEVERAL
  given = [part.strip() for part in FLAGS.run_dir.split(",")] if several else [FLAGS.run_dir]
  runs = [pathlib.Path(part).expanduser() for part in given if part]
  if not runs:
    raise ValueError(f"run_dir={FLAGS.run_dir!r} names no folder; name one, such as runs/first")
  if several and not FLAGS.output_dir:
    raise ValueError(
      f"output_dir is empty, and kind={FLAGS.kind} draws several runs in one picture; name a "
      "folder for it, such as --output_dir=pictures"
    )
  pictures = run_plots.of(FLAGS.kind, runs)
  output = refusals.folder("output_dir", FLAGS.output_dir or FLAGS.run_dir)
  if several or not output.exists() or not output.samefile(runs[0]):
    folders.to_write(FLAGS.output_dir, [picture.name for picture in pictures])
  output.mkdir(parents=True, exist_ok=True)
  print(run_plots.drawn(output, pictures))


if __name__ == "__main__":
  running.start(main)
