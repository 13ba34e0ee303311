"""Draws the training curves of a run, finished or not: one picture for each trained model.

python -m experiments.plot --run_dir=runs/first
"""

import pathlib

from absl import flags

from . import lines, refusals, running, settings

flags.DEFINE_string("run_dir", None, "folder of the training run", required=True)
flags.DEFINE_string("output_dir", "", "folder for the pictures; by default the run folder")
FLAGS = flags.FLAGS


def main() -> None:
  folder = pathlib.Path(FLAGS.run_dir).expanduser()
  config = settings.load(folder / "config.json")
  output = refusals.folder("output_dir", FLAGS.output_dir or FLAGS.run_dir)
  files = sorted(folder.glob("*/rounds.jsonl"))
  if not files:
    raise FileNotFoundError(
      f"{folder} has no rounds.jsonl yet; wait until the run's first round has ended"
    )
  from . import plots  # here, because the import takes a second

  data = "synthetic phantom" if config["data"] == "phantom" else config["data"]
  output.mkdir(parents=True, exist_ok=True)
  for file in files:
    rows = lines.rows(file)
    path = output / f"curves_{file.parent.name}.png"
    plots.curves(rows, path, f"{rows[0]['arm']}: {data}")
    print(path)


if __name__ == "__main__":
  running.start(main)
