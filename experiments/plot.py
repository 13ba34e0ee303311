"""Draws the training curves of a run, finished or not: one picture for each trained model.

primia-plot --run_dir=runs/first
"""

import json
import pathlib

from absl import flags

from . import plots, running, settings

flags.DEFINE_string("run_dir", None, "folder of the training run", required=True)
flags.DEFINE_string("output_dir", "", "folder for the pictures; by default the run folder")
FLAGS = flags.FLAGS


def main() -> None:
  folder = pathlib.Path(FLAGS.run_dir)
  config = settings.load(folder / "config.json")
  output = pathlib.Path(FLAGS.output_dir or folder)
  output.mkdir(parents=True, exist_ok=True)
  files = sorted(folder.glob("*/rounds.jsonl"))
  if not files:
    raise FileNotFoundError(
      f"{folder} has no rounds.jsonl yet; wait until the run's first round has ended"
    )
  data = "synthetic phantom" if config["data"] == "phantom" else config["data"]
  for file in files:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    path = output / f"curves_{file.parent.name}.png"
    plots.curves(rows, path, f"{rows[0]['arm']}: {data}")
    print(path)


if __name__ == "__main__":
  running.start(main)
