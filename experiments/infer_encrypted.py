"""Classifies one party's images with another party's model, or finds masks in them. Neither party
shows the other its data.

  primia-infer --checkpoint=runs/first --images=xray.png

This process simulates both parties and the dealer, so it protects nothing by itself. It prints the
classes, and the time, bytes and rounds of each phase and layer. With --output_dir it writes
predictions.csv, plan.txt and costs.json; of a model of masks these as NIfTI or PNG, and a picture.

  primia-infer --connect=HOST:PORT --folder=hospital --model=chest-1 --images=xray.png

This is a clinic: it asks a model owner's server (primia-serve) over TLS, sends no image and no
answer to anybody, and ends with exit code 0 if each image was answered.
"""

import json
import pathlib
import time

from absl import flags

from . import caching, found_masks, predictions, settings, starting
from .folders import private, write_private
from .planned import Connect, Infer, check_connect

settings.define_flags(Infer)
settings.define_flags(Connect)
FLAGS = flags.FLAGS
flags.adopt_module_key_flags(settings)


def main() -> None:
  config, connect = settings.from_flags(Infer), settings.from_flags(Connect)
  if connect.connect:
    _ask(connect, config)
    return
  check_connect(FLAGS)
  from . import simulated  # here, because a clinic needs neither models nor what trains them

  simulated.infer(config)


def _ask(connect: Connect, config: Infer) -> None:
  """A clinic asks a server."""
  try:
    from . import asking  # here, because only a clinic needs gRPC
  except ImportError as error:
    raise ValueError(str(error)) from error
  asking.foreign([name for name in FLAGS if FLAGS[name].present])
  start = time.perf_counter()
  answers = asking.infer(connect, config)
  label_names = answers.received.about.label_names
  masks = found_masks.of(answers.outputs) if answers.outputs.ndim > 2 else None
  if masks is None:
    predictions.show(answers.ids, answers.outputs, label_names)
  else:
    found_masks.show(answers.ids, masks, label_names)
  summary = asking.costs(answers, time.perf_counter() - start)
  print(f"\n{asking.took(answers)}\nIntended use: {answers.received.about.intended_use}.")
  if config.output_dir:
    folder = private(pathlib.Path(config.output_dir).expanduser())
    write_private(folder / "costs.json", json.dumps(summary, indent=2) + "\n")
    if masks is None:
      predictions.write(folder / "predictions.csv", answers.ids, answers.outputs, label_names)
      print(f"predictions.csv and costs.json are in {folder}")
    else:
      made = found_masks.write(folder, config, answers.images, masks, config.overlays)
      print("\n".join([*made, f"costs.json is in {folder}"]))
  if said := asking.ended_early(answers):
    raise RuntimeError(said)


if __name__ == "__main__":
  starting.start(main, caching.keep_all)
