"""What the clinic's programs ask under encryption: a run's model, with all roles in one process, or
a model owner's service.
"""

from __future__ import annotations

import dataclasses
import importlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax.clinic import asking
from primia_jax.clinic.asking import Answer, Ask, Model
from primia_jax.mpc import pricing, roles
from primia_jax.types import PyTree

from . import encrypted, model_files, registers, settings, versions
from .configs.data import Data
from .planned import OUTPUTS, Chosen, Connect, Infer


@dataclasses.dataclass(frozen=True)
class Clinic(Chosen):
  """Which model is asked, and by which protocol."""


@dataclasses.dataclass(frozen=True)
class Remote(Connect):
  """A model owner's service, in place of --checkpoint."""

  connect: str = settings.setting(
    "", "HOST:PORT of a model owner's server (primia-serve); with --folder and --model"
  )
  card: str = settings.setting(
    "", "file of a model owner's card, to share images between two servers; with --folder"
  )
  model: str = settings.setting("", "with --connect: name of the publication")
  timeout: float = settings.setting(60.0, "longest wait, in seconds, for a server")


class Ready(NamedTuple):
  """A model that can be asked.

  Attributes:
    model, ask: as the page and the node take them.
    learned: who learns what from a question, for people.
    warning: for people.
  """

  model: Model
  ask: Ask
  learned: Sequence[tuple[str, str]]
  warning: str


def check(s: Clinic, r: Remote, present: Sequence[str]) -> None:
  """Refuses wrong flags before any work.

  Args:
    s, r: the flags.
    present: names of the flags that were given.

  Raises:
    ValueError, FileNotFoundError, Refused: the message names the flag and the cure.
  """
  if r.connect and r.card:
    raise ValueError(f"connect={r.connect} with card={r.card}: a card names its servers; use one")
  remote = f"connect={r.connect}" if r.connect else f"card={r.card}" * bool(r.card)
  needed = ("folder", "timeout") + ("model", "session_seconds") * bool(r.connect)
  for name in ("folder", "model", "timeout", "session_seconds"):
    if name in present and (not remote or name not in needed):
      cure = (
        "it goes with --connect, and a card has its own; leave it out"
        if remote
        else "it goes with --connect or --card"
      )
      raise ValueError(f"{name}={getattr(r, name)} with {remote or 'neither'}: {cure}")
  if not remote:
    _check_local(s)
    return
  for field in dataclasses.fields(s):
    if field.name in present:
      raise ValueError(
        f"{field.name} with {remote}: the model owner has decided it with primia-publish; leave it "
        "out"
      )
  if r.connect:
    _service("asking").check(r)
  else:
    _service("sharing").check(_shared(r))


def _shared(r: Remote) -> Any:
  return _service("sharing").Shared(r.card, r.folder, r.timeout)


def _service(name: str) -> Any:
  """A module that needs gRPC, which only a clinic of a service has."""
  try:
    return importlib.import_module(f"{__package__}.{name}")
  except ImportError as error:
    raise ValueError(str(error)) from error


def _check_local(s: Clinic) -> None:
  encrypted.check_protocol(_with_batch(s))
  encrypted.choose("output", s.output, OUTPUTS)


def _with_batch(s: Clinic) -> Infer:
  return Infer(**vars(s), batch=1)


def load(s: Clinic, r: Remote) -> Ready:
  """The model and what asks it, after `check`; says what it does.

  Raises:
    ValueError, FileNotFoundError: the run, its calibration images or the ring is wrong; or what the
      model owner or the dealer gave.
    SessionEnded: a server is not there, or turns this clinic away.
  """
  if not (r.connect or r.card):
    print(f"{WARNING}\nCalibrating and compiling ...", flush=True)
    model, ask = local(s)
    return Ready(model, ask, learned(s), WARNING)
  module = _service("asking" if r.connect else "sharing")
  return Ready(*module.ready(r if r.connect else _shared(r)))


def local(s: Clinic) -> tuple[Model, Ask]:
  """A run's model, with all roles in this process; calibrates, compiles, and asks once.

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
    software=f"primia_jax {versions.found()['primia-jax']}",
  )
  ask = one_process(plan, weights)
  ask(calibration[0], lambda phase: None)
  return asked, ask


def one_process(plan: Any, weights: PyTree) -> Ask:
  """Asks a planned model of one image, with all three roles in this process."""
  model_owner = roles.ModelOwner(plan, weights)
  dealer = roles.Dealer(plan, model_owner.tag)
  data_owner = roles.DataOwner(plan, model_owner.publish(dealer.blind()))
  online = roles.online(plan)
  dealt, sent, rounds = pricing.total(plan.circuit)

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
