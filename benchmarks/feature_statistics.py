"""Mean and deviation of a frozen network's features over public images, as a file for
--feature_statistics. The one that comes with the programs, of the X-rays of adults in MedNIST:

  python -m benchmarks.feature_statistics --data=folder:MEDNIST --classes=CXR --num_images=300 \\
    --output=experiments/statistics/chest_xray.json --about="MedNIST's class CXR, ..."

The images must not be of the data set that is trained on under differential privacy.
"""

import pathlib

import jax
import numpy as np
from absl import app, flags

from experiments.configs import feature_statistics
from experiments.configs.data import Data
from experiments.configs.model import Model, of_stored
from primia_jax import models
from primia_jax.data.dataset import in_memory, take
from primia_jax.data.load import load

_DATA = flags.DEFINE_string("data", None, "The public images, as in primia-train.", required=True)
_CLASSES = flags.DEFINE_list("classes", [], "Which of their classes; empty takes all.")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 0, "How many, drawn evenly; 0 takes all.")
_OUTPUT = flags.DEFINE_string("output", None, "The file to write.", required=True)
_ABOUT = flags.DEFINE_string(
  "about", None, "Which images these are, of whom, and under which licence.", required=True
)
_MODEL = flags.DEFINE_string("model", "efficientnet_lite0", "The network, with ImageNet weights.")
_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels to which images are resized.")


def chosen(data: Data, classes: list[str], num_images: int) -> np.ndarray:
  """The images of some classes, uint8 [N, H, W, C].

  Raises:
    ValueError: a class that the source has not, or fewer images than are to be drawn.
  """
  splits = load(data.data, size=data.image_size, channels=data.channels, lazy=True)
  parts = []
  for dataset in splits.values():
    if unknown := set(classes) - set(dataset.label_names):
      raise ValueError(
        f"classes={sorted(unknown)}: the source has {', '.join(dataset.label_names)}"
      )
    wanted = [dataset.label_names.index(name) for name in classes or dataset.label_names]
    rows = np.flatnonzero(np.isin(dataset.labels, wanted))
    parts.append((dataset, rows))
  total = sum(len(rows) for _, rows in parts)
  if num_images > total:
    raise ValueError(f"num_images={num_images}, and there are {total}; take fewer, or 0 for all")
  drawn = np.zeros(total, bool)
  drawn[np.arange(num_images or total) * total // (num_images or total)] = True
  ends = np.cumsum([len(rows) for _, rows in parts])[:-1]
  of_parts = zip(parts, np.split(drawn, ends), strict=True)
  return np.concatenate([in_memory(take(d, rows[mine])).images for (d, rows), mine in of_parts])


def main(_):
  data = Data(data=_DATA.value, image_size=_SIZE.value)
  network = Model(model=_MODEL.value, pretrained="imagenet", first_trained="head")
  config = network.config(data, 2)
  compute = of_stored(config, network.frozen(config, jax.random.key(0)))
  images = chosen(data, _CLASSES.value, _NUM_IMAGES.value)
  found = models.statistics_of(compute(images))
  about = f"{_ABOUT.value} ({len(images)} images)"
  path = pathlib.Path(_OUTPUT.value)
  path.parent.mkdir(parents=True, exist_ok=True)
  feature_statistics.write(path, found, about, config.name, data.image_size)


if __name__ == "__main__":
  app.run(main)
