"""A question to a model, and its answer, whatever carries the protocol."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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


def answer_of(
  outputs: Any, seconds: Mapping[str, float], num_bytes: Mapping[str, int], rounds: int
) -> Answer:
  """An answer from a model's outputs for one image: logits [1, L], or the class [1]."""
  found = np.asarray(outputs)[0]
  if found.ndim == 0:
    return Answer(int(np.rint(found)), None, seconds, num_bytes, rounds)
  scores = np.exp(found.astype(np.float64) - float(found.max()))
  likely = scores / scores.sum()
  return Answer(int(likely.argmax()), likely, seconds, num_bytes, rounds)


def through(
  prepare: Callable[[], None],
  ask: Callable[[np.ndarray], Any],
  num_bytes: Mapping[str, int],
  rounds: int,
) -> Ask:
  """Asks in an open session with a model owner's server, such as `service.institutions.ask` gives.

  Args:
    prepare: takes the next correlations, and does what needs no image.
    ask: uint8 images [1, H, W, C] -> the outputs. It may encode them for the plan.
    num_bytes, rounds: of the plan.
  """

  def asks(image: np.ndarray, told: Callable[[str], None]) -> Answer:
    told("Both sides prepare, without the image")
    start = time.perf_counter()
    prepare()
    prepared = time.perf_counter()
    told(f"Both sides compute on masked values, in {rounds} rounds")
    outputs = np.asarray(ask(image[None]))
    seconds = {"prepare": prepared - start, "compute": time.perf_counter() - prepared}
    return answer_of(outputs, seconds, num_bytes, rounds)

  return asks
