"""A question to a model, and its answer, whatever carries the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from primia_jax.data import decode

WARNING = "NOT FOR DIAGNOSIS: research software, no medical device"
LONGEST = 64 << 20  # bytes of an image file


class Model(NamedTuple):
  """What the clinic knows of a model: how it takes images, and what its answers mean.

  Attributes:
    name, version: for reports.
    label_names: of its L classes.
    size, channels: of its images.
    ct_window, grey_bits: as `data.decode` takes them.
    software: with its version.
  """

  name: str
  version: str
  label_names: tuple[str, ...]
  size: int
  channels: int
  ct_window: tuple[float, float] | None = None
  grey_bits: int = 0
  software: str = "primia_jax"


class Answer(NamedTuple):
  """What the clinic, and nobody else, learns of its image.

  Attributes:
    label: the class, 0..L-1.
    probabilities: [L] float; None where only the class is opened.
    seconds: by phase.
    num_bytes: by what was carried: "dealt" and "sent", each way.
    rounds: of communication.
  """

  label: int
  probabilities: np.ndarray | None
  seconds: Mapping[str, float]
  num_bytes: Mapping[str, int]
  rounds: int


# (image [H, W, C] uint8, told of each phase as it begins) -> its answer. It raises LookupError or
# `service.errors.SessionEnded` where there is none.
Ask = Callable[[np.ndarray, Callable[[str], None]], Answer]


def image(model: Model, data: bytes, name: str) -> np.ndarray:
  """An image file as the model takes it, uint8 [size, size, channels].

  Raises:
    ValueError: it is too large, no image, or damaged; the message names it.
  """
  if len(data) > LONGEST:
    raise ValueError(
      f"{name} has {len(data) / 2**20:.0f} MiB, more than the {LONGEST >> 20} that are taken; send "
      "single images"
    )
  return decode.decode(
    data, name, size=model.size, channels=model.channels, ct_window=model.ct_window,
    grey_bits=model.grey_bits,
  )  # fmt: skip
