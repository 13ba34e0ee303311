"""Draws the training curves of a run, finished or not: one picture for each trained model.

primia-plot --run_dir=runs/first

In the run's own folder its pictures are drawn anew each time; in another nothing is overwritten.
"""

import pathlib

from absl import flags

from . import folders, lines, refusals, running, settings

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
  pictures = {file: f"curves_{file.parent.name}.png" for file in files}
  if not output.exists() or not output.samefile(folder):
    folders.to_write(FLAGS.output_dir, pictures.values())
  from . import plots  # here, because the import takes a second

  output.mkdir(parents=True, exist_ok=True)
  data = config.get("site_data") or config["data"]
  data = "synthetic phantom" if data == "phantom" else data
  for file, picture in pictures.items():
    rows = lines.rows(file)
    path = output / picture
    plots.curves(rows, path, f"{rows[0]['arm']}: {data}")
    print(path)


if __name__ == "__main__":
  running.start(main)
