"""The least memory that a run needs, so that one which cannot fit is refused before any work.

Beyond the memory of the machine the system ends a process without a word.
"""

from __future__ import annotations

import os

from .configs import Train
from .configs.data import Data

# Numbers of a step for each pixel of an image: the least that these models keep for the backward
# pass, in float32. The others keep less.
_KEPT = 16
_KEEPS = ("cnn", "leaf_cnn", "resnet18", "vgg16")


def check_images(num_images: int, data: Data) -> None:
  """Refuses more images than memory holds.

  Raises:
    ValueError: naming the flag and the cure.
  """
  needed = num_images * data.image_size**2 * data.channels
  _check(
    needed, f"image_size={data.image_size}: {num_images:,} images of {data.data}",
    "use a smaller image_size, fewer images, or sites_in_memory=1",
  )  # fmt: skip


def check_step(config: Train) -> None:
  """Refuses a training step that is larger than memory; raises as `check_images`."""
  size, batch, model = config.data.image_size, config.training.batch_size, config.model.model
  if model in _KEEPS:
    _check(
      4 * batch * size**2 * _KEPT,
      f"image_size={size} with batch_size={batch}: a step of {model}",
      "use a smaller image_size or batch_size",
    )


def _check(needed: int, what: str, cure: str) -> None:
  has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if needed > has:
    raise ValueError(
      f"{what} needs at least {_gib(needed)} of memory, and this machine has {_gib(has)}; {cure}"
    )


def _gib(size: int) -> str:
  return f"{size / 2**30:,.0f} GiB"
