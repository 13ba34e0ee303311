"""Clinic: asks about images that it shares between two servers. It needs no JAX.

  primia-ask --card=chest-1.json --folder=hospital --images=PATH

The model owner and its helper each get a share of every image, which alone is random. Each answers
with a share of the outputs, and only this clinic can put both together. The model owner's card says
where the servers are (primia-publish --client=sharing); both must have let this clinic in. The
program ends with exit code 0 if each image was answered.
"""

import dataclasses
import json
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from primia_jax.service.errors import SessionEnded

from . import asked_images, predictions, progress, settings, sharing, starting
from .folders import check_images, private, to_write, write_private
from .settings import setting


@dataclasses.dataclass(frozen=True)
class Ask:
  """About which images."""

  images: str = setting(
    "", "an image file (PNG, JPEG, TIFF, BMP, DICOM), a folder or a tar of them"
  )
  ignore: str = setting("", "files and folders to leave out, as patterns separated by commas")
  grey_bits: int = setting(0, "bits that 16-bit grey PNG and TIFF use; 0 takes the model's")
  skip_bad_files: bool = setting(False, "go on without images that cannot be read, and name them")
  output_dir: str = setting(
    "", "folder for predictions.csv and costs.json, created if needed; empty writes no files"
  )


settings.define_flags(sharing.Shared)
settings.define_flags(Ask)
flags.adopt_module_key_flags(settings)


def main() -> None:
  s = settings.from_flags(Ask)
  holder = sharing.check(settings.from_flags(sharing.Shared))
  check_images(s.images)
  output = to_write(s.output_dir, ("predictions.csv", "costs.json")) if s.output_dir else None
  about = holder.issued.about
  images = asked_images.read(s, about)
  ids = [str(path) for path in images.columns["path"]]
  print(f"{sharing.describe(holder)}\nImages       {len(ids)}, {about.images} in a request")
  for what, text in images.notes.items():
    print(f"             {what}: {text}")
  start = time.perf_counter()
  outputs, seconds, error = _ask(holder, np.asarray(images.images[np.arange(len(ids))]))
  answered = ids[: len(outputs)]
  predictions.show(answered, outputs, about.label_names)
  sent, got = sharing.num_bytes(holder)
  print(
    f"\nA request took {float(np.median(seconds)):.2g} s (median of {len(seconds)}), "
    f"{sent:,} bytes to each server and {got:,} from each.\nIntended use: {about.intended_use}."
  )
  if output is not None:
    private(output)
    predictions.write(output / "predictions.csv", answered, outputs, about.label_names)
    costs = {
      "model_version": about.version, "intended_use": about.intended_use, "images": len(answered),
      "images_in_a_request": about.images, "seconds": list(seconds),
      "seconds_in_all": time.perf_counter() - start, "bytes_to_each_server": sent,
      "bytes_from_each_server": got,
    }  # fmt: skip
    write_private(output / "costs.json", json.dumps(costs, indent=2) + "\n")
    print(f"predictions.csv and costs.json are in {output}")
  if error is not None:
    raise RuntimeError(
      f"{len(answered)} of {len(ids)} images are answered; then there was no answer "
      f"({type(error).__name__}: {error}). Ask about the others again"
    )


def _ask(
  holder: sharing.Holder, images: np.ndarray
) -> tuple[np.ndarray, Sequence[float], SessionEnded | None]:
  """The outputs of the images that were answered, seconds of each request, and what ended it."""
  outputs: list[np.ndarray] = []
  seconds: list[float] = []
  each, count, ended = holder.issued.about.images, len(images), None
  bar = progress.bar(total=-(-count // each), desc=f"asking for {holder.issued.model}", unit="run")
  with progress.closing(bar):
    try:
      with sharing.connected(holder) as ask:
        for part in asked_images.runs(count, each):
          begun = time.perf_counter()
          outputs.append(ask(images[part]))
          seconds.append(time.perf_counter() - begun)
          bar.update()
    except SessionEnded as error:
      if not outputs:
        raise
      ended = error
  return np.concatenate(outputs)[:count], seconds, ended


if __name__ == "__main__":
  starting.start(main)
