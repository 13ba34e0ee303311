"""What the clinic's programs ask: a run's model under encryption, all roles in one process."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from primia_jax.clinic import asking
from primia_jax.clinic.asking import Answer, Ask, Model
from primia_jax.mpc import pricing, roles
from primia_jax.types import PyTree

from . import encrypted, model_files, registers, report
from .configs.data import Data


def _same(name: str) -> Any:
  """A flag that `infer_encrypted` has, too."""
  field = encrypted.Infer.__dataclass_fields__[name]
  return dataclasses.field(default=field.default, metadata=field.metadata)


@dataclasses.dataclass(frozen=True)
class Clinic:
  """Which model is asked, and by which protocol."""

  checkpoint: str = _same("checkpoint")
  classes: str = _same("classes")
  output: str = _same("output")
  comparison: str = _same("comparison")
  ring_bits: int = _same("ring_bits")
  fraction_bits: int = _same("fraction_bits")
  target_error: float = _same("target_error")
  exact: bool = _same("exact")
  margin: float = _same("margin")
  calibration: str = _same("calibration")
  calibration_images: int = _same("calibration_images")
  grey_bits: int = _same("grey_bits")


def check(s: Clinic) -> None:
  """Refuses wrong flags before any work.

  Raises:
    ValueError, FileNotFoundError: the message names the flag and the cure.
  """
  encrypted.check_protocol(_with_batch(s))
  encrypted.choose("output", s.output, encrypted.OUTPUTS)


def _with_batch(s: Clinic) -> encrypted.Infer:
  return encrypted.Infer(**vars(s), batch=1)


def load(s: Clinic) -> tuple[Model, Ask]:
  """The model and what asks it; calibrates, compiles, and asks once to be ready.

  Raises:
    ValueError, FileNotFoundError: the run, its calibration images or the ring is wrong.
  """
  model, weights, names, config = encrypted.load_model(s.checkpoint, s.classes)
  size, _, channels = config.image_shape
  given = _with_batch(s)
  calibration, _ = encrypted.calibration_images(given, config, names)
  plan = encrypted.make_plan(given, model, weights, calibration)
  window = Data(data=f"folder:{s.checkpoint}", ct_window=model_files.ct_window(s.checkpoint))
  asked = Model(
    name=config.name,
    version=registers.model_digest(weights)[:12],
    label_names=tuple(names),
    size=size,
    channels=channels,
    ct_window=window.hounsfield,
    grey_bits=s.grey_bits or model_files.grey_bits(s.checkpoint),
    software=f"primia_jax {report.versions()['primia-jax']}",
  )
  ask = one_process(plan, weights)
  ask(calibration[0], lambda phase: None)
  return asked, ask


def one_process(plan: Any, weights: PyTree) -> Ask:
  """Asks a planned model of one image, with all three roles in this process."""
  model_owner = roles.ModelOwner(plan, weights)
  dealer = roles.Dealer(plan, model_owner.tag)
  data_owner = roles.DataOwner(plan, model_owner.publish(dealer.blind()))
  online, rows = roles.online(plan), pricing.rows(plan.circuit)
  dealt, sent, rounds = (
    sum(getattr(row, name) for row in rows) for name in ("dealt", "sent", "rounds")
  )

  def ask(image: np.ndarray, told: Callable[[str], None]) -> Answer:
    seconds: dict[str, float] = {}

    def timed(name: str, said: str, fn: Callable[[], Any]) -> Any:
      told(said)
      start = time.perf_counter()
      out = jax.block_until_ready(fn())
      seconds[name] = time.perf_counter() - start
      return out

    first, second = timed("deal the masks", "The dealer deals fresh masks", dealer.deal)
    prepare = lambda: (model_owner.prepare(first), data_owner.prepare(second))
    left, right = timed("prepare", "Both sides prepare, without the image", prepare)
    asks = lambda: data_owner.ask(right, encrypted.normalised(image[None]))
    asked, question = timed("mask the image", "Your image is masked on this machine", asks)
    run = lambda: online(model_owner.answer(left, question), asked)
    shares = timed("compute", f"Both sides compute on masked values, in {rounds} rounds", run)
    opens = lambda: np.asarray(data_owner.reveal(shares))
    found = timed("open the answer", "The answer is put together on this machine", opens)
    num_bytes = {"dealt beforehand": dealt, "sent, each way": sent}
    return asking.answer_of(found, seconds, num_bytes, rounds)

  return ask


def learned(s: Clinic) -> Sequence[tuple[str, str]]:
  """Who learns what from one question, for people."""
  answer = {"probabilities": "the probabilities above", "label": "the class above"}[s.output]
  return (
    ("You", f"{answer}, and the plan of the model: its layers and ranges, not its weights"),
    ("The model's owner", "that one more image was asked about; nothing of it or of the answer"),
    ("The dealer", "nothing: it dealt masks before the image was there"),
    ("Assumed", "all follow the protocol, and the dealer colludes with neither side"),
  )


WARNING = (
  f"{asking.WARNING}. Model owner, clinic and dealer all run in this one process, which is a "
  "trial: it protects nothing by itself."
)


def wait() -> None:
  """Until the program is told to end, by Ctrl-C or SIGTERM."""
  ended = threading.Event()
  for name in (signal.SIGINT, signal.SIGTERM):
    signal.signal(name, lambda *_: ended.set())
  ended.wait()
