"""The clinic's side of `infer_encrypted --connect`: its own folder, images and session."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from primia_jax import models
from primia_jax.clinic import asking
from primia_jax.clinic.asking import Answer, Ask, Model
from primia_jax.data import dicom
from primia_jax.data.dataset import Dataset, take
from primia_jax.mpc import multiprocess, pricing
from primia_jax.mpc.roles import DataOwner
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import certificates, folders, inbox, institutions, publications
from primia_jax.service.channel import Limits
from primia_jax.service.errors import SessionEnded
from primia_jax.service.publications import Received

from . import asked_images, caching, found_masks, progress
from .folders import certified, check_images, host_and_port, positive_seconds, to_write
from .planned import Connect, Infer


class Opened(NamedTuple):
  """A session that a clinic has with a server.

  Attributes:
    received: the publication that it is about.
    sizes: bytes of each message of an inference.
    ask: [N, H, W, C] uint8, N as planned -> outputs; raises SessionEnded.
  """

  received: Received
  sizes: tuple[int, ...]
  ask: Any


def check(s: Connect) -> pathlib.Path:
  """Refuses wrong flags of a clinic before any work, and returns its folder.

  Raises:
    ValueError, FileNotFoundError: the message names the flag and the cure.
  """
  host_and_port("connect", s.connect)
  for name in ("timeout", "session_seconds"):
    positive_seconds(name, getattr(s, name))
  folder = certified(s.folder, "the model owner")
  inbox.collect(folder, inbox.CLINIC)
  place = publications.model_folder(folder, s.model)
  if not place.is_dir():
    there = ", ".join(publications.names(folder)) or "nothing"
    raise FileNotFoundError(f"model={s.model}: {folder / publications.MODELS} holds {there}")
  return folder


def unused(folder: pathlib.Path, model: str) -> int:
  """Inferences that the dealer has dealt for and this clinic has not used."""
  return len(folders.unused(publications.model_folder(folder, model)))


@contextlib.contextmanager
def opened(
  s: Connect, folder: pathlib.Path, received: Received, online: multiprocess.Online | None = None
) -> Iterator[Opened]:
  """A session for as long as the context lasts.

  Args:
    s: the flags.
    folder: from `check`.
    received: the publication.
    online: `multiprocess.online(received.plan, DATA_OWNER)`, if it is compiled already.

  Raises:
    SessionEnded: there is no connection, or the server refuses.
  """
  owner = DataOwner(received.plan, received.publication)
  if online is None:
    online = multiprocess.online(received.plan, DATA_OWNER, kept=caching.programs())
  place = publications.model_folder(folder, s.model)
  with institutions.ask(
    folder, owner, received.publication.publication, s.connect, received.server, online,
    Limits(timeout=s.timeout, session=s.session_seconds), place,
  ) as session:  # fmt: skip

    def ask(images: np.ndarray) -> np.ndarray:
      return np.asarray(session.ask(models.normalise(jnp.asarray(images))))

    yield Opened(received, online.sizes, ask)


def ready(s: Connect) -> tuple[Model, Ask, tuple[tuple[str, str], ...], str]:
  """What the page and the node ask: the model, what asks, who learns what, and a warning.

  Each question is a session of its own, since hours may lie between two.

  Raises:
    ValueError, FileNotFoundError: as `check`, or the model takes several images at a time.
    SessionEnded: the server is not there, turns this clinic away, or has another publication.
  """
  folder = check(s)
  received = publications.received(folder, s.model)
  about, owner = received.about, DataOwner(received.plan, received.publication)
  if _of_pixels(received):
    raise ValueError(
      f"model={s.model} gives masks, and this program shows classes; use primia-infer --connect"
    )
  if about.images != 1:
    raise ValueError(
      f"model={s.model} takes {about.images} images at a time; ask for a publication of one "
      "(primia-publish --batch=1), or use primia-infer"
    )
  warning = f"{asking.WARNING}. Its owner says: {about.intended_use}"
  server = certificates.name(received.server)
  print(
    f"{warning}\n{describe(s, received)}\n"
    f"Dealt    for {unused(folder, s.model)} images that are unused\nCompiling ...",
    flush=True,
  )
  online = multiprocess.online(received.plan, DATA_OWNER, kept=caching.programs())
  owner.warm_up()
  print(_run(received, online.sizes), flush=True)
  session = functools.partial(
    institutions.ask, folder, owner, received.publication.publication, s.connect, received.server,
    online, Limits(timeout=s.timeout), publications.model_folder(folder, s.model),
  )  # fmt: skip
  with session():
    pass  # both agree on what is asked
  dealt = sum(row.dealt for row in pricing.rows(received.plan.circuit))
  num_bytes = {"dealt beforehand": dealt, "sent, each way": sum(online.sizes)}

  def ask(image: np.ndarray, told: Callable[[str], None]) -> Answer:
    told(f"A session begins with {server}, at {s.connect}")
    start = time.perf_counter()
    with session() as clinic:
      seconds = {"connect": time.perf_counter() - start}
      run = lambda images: clinic.ask(models.normalise(jnp.asarray(images)))
      answer = asking.through(clinic.prepare, run, num_bytes, len(online.sizes))(image, told)
    return answer._replace(seconds=seconds | dict(answer.seconds))

  return _model(s, received), ask, (*learned(received), ASSUMED), warning


def _model(s: Connect, received: Received) -> Model:
  about = received.about
  return Model(
    name=s.model, version=about.version, label_names=about.label_names, size=about.image_size,
    channels=about.channels, ct_window=dicom.window(about.ct_window), grey_bits=about.grey_bits,
    software=f"primia_jax {importlib.metadata.version('primia-jax')}",
  )  # fmt: skip


class Answers(NamedTuple):
  """What a clinic has learnt.

  Attributes:
    ids: of the images that were answered.
    outputs: [N, L] logits or [N] classes; of masks [N, H, W, L] or [N, H, W].
    received: the publication.
    seconds: of each run of the protocol, from the image to the output.
    sizes: bytes of each message of a run.
    error: what ended the session before the last image; None if nothing did.
    asked: how many images were to be answered.
    images: those that were.
  """

  ids: list[str]
  outputs: np.ndarray
  received: Received
  seconds: list[float]
  sizes: tuple[int, ...]
  error: SessionEnded | None
  asked: int
  images: Dataset


def infer(s: Connect, infer: Infer) -> Answers:
  """Asks about all images, in one session.

  Raises:
    ValueError, FileNotFoundError: a flag is wrong, or the dealer has dealt too little.
    SessionEnded: the session ended before the first answer.
  """
  folder = check(s)
  check_images(infer.images)
  found_masks.check(infer)
  if infer.output_dir:
    to_write(infer.output_dir, ("predictions.csv", "costs.json", *found_masks.FILES))
  received = publications.received(folder, s.model)
  about = received.about
  form = about.image_size, about.channels, dicom.window(about.ct_window)
  images = found_masks.volume(infer, _of_pixels(received), about.label_names, *form)
  if images is None:
    images = asked_images.read(infer, about)
  ids = [str(path) for path in images.columns["path"]]
  parts = list(asked_images.runs(len(ids), about.images))
  if (left := unused(folder, s.model)) < len(parts):
    raise ValueError(
      f"images={infer.images} holds {len(ids)} images, and the dealer has dealt for "
      f"{left * about.images} that are unused; have it deal more (primia-deal)"
    )
  online = multiprocess.online(received.plan, DATA_OWNER, kept=caching.programs())
  _say(s, received, online.sizes, len(ids), images.notes)
  outputs: list[np.ndarray] = []
  seconds: list[float] = []
  error: SessionEnded | None = None
  sizes: tuple[int, ...] = ()
  with progress.closing(
    progress.bar(total=len(parts), desc=f"asking {s.connect}", unit="run")
  ) as bar:
    try:
      with opened(s, folder, received, online) as session:
        sizes = session.sizes
        for part in parts:
          start = time.perf_counter()
          outputs.append(session.ask(images.images[part]))
          seconds.append(time.perf_counter() - start)
          bar.update()
    except SessionEnded as ended:
      if not outputs:
        raise
      error = ended
  found = np.concatenate(outputs)[: len(ids)]
  answered = take(images, np.arange(len(found)))
  return Answers(ids[: len(found)], found, received, seconds, sizes, error, len(ids), answered)


def _say(s: Connect, received: Received, sizes: Sequence[int], count: int, notes: Any) -> None:
  print(f"{describe(s, received)}\nImages   {count}\n{_run(received, sizes)}")
  for what, text in notes.items():
    print(f"         {what}: {text}")
  print(
    "Who learns what, if all follow the protocol and the dealer colludes with neither party:",
    *(f"  {who:<12} {what}" for who, what in learned(received)),
    sep="\n",
    flush=True,
  )


ASSUMED = ("Assumed", "all follow the protocol, and the dealer colludes with neither side")


def learned(received: Received) -> tuple[tuple[str, str], ...]:
  """Who learns what from one question, for people."""
  is_label = received.about.output == "label"
  what = "of each pixel of its own images" if _of_pixels(received) else "of its own images"
  learns = f"the class {what}, no logits" if is_label else f"the logits {what}"
  server = certificates.name(received.server)
  return (
    ("this clinic", f"{learns}, and the plan"),
    (server, "which clinic asks, when and how often; nothing about images or answers"),
    ("dealer", "nothing; it is not online"),
  )


def _of_pixels(received: Received) -> bool:
  """Whether a publication gives a class for each pixel."""
  return len(received.plan.circuit.outputs[0].shape) > 2


def _run(received: Received, sizes: Sequence[int]) -> str:
  """What a run of the protocol takes; sizes are those of its messages."""
  images, sent = received.about.images, pricing.bytes_text(sum(sizes))
  return f"A run    {images} at a time, at most {sent} each way in {len(sizes)} rounds"


def describe(s: Connect, received: Received) -> str:
  """The server and the model."""
  about = received.about
  shape = f"{about.image_size} x {about.image_size} x {about.channels}"
  return (
    f"Server   {s.connect}, {certificates.name(received.server)}, SHA-256 "
    f"{certificates.fingerprint(received.server)[:16]}...\n"
    f"Model    {s.model}, version {about.version}, {shape}, {', '.join(about.label_names)}\n"
    f"         {about.intended_use}"
  )


def took(answers: Answers) -> str:
  """What a run took, for people."""
  seconds, sent = float(np.median(answers.seconds)), pricing.bytes_text(sum(answers.sizes))
  each = f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
  return (
    f"A run took {each} (median of {len(answers.seconds)}), {len(answers.sizes)} rounds and {sent} "
    "each way."
  )


def costs(answers: Answers, compiling: float) -> dict[str, Any]:
  """The content of `costs.json` of a clinic."""
  about = answers.received.about
  return {
    "model_version": about.version,
    "intended_use": about.intended_use,
    "images": len(answers.ids),
    "images_in_a_run": about.images,
    "seconds": answers.seconds,
    "seconds_in_all": compiling,
    "rounds": len(answers.sizes),
    "bytes_each_way": sum(answers.sizes),
  }


def ended_early(answers: Answers) -> str:
  """What a program says that has some answers, but not all; empty if it has all."""
  if answers.error is None:
    return ""
  name = type(answers.error).__name__
  return (
    f"{len(answers.ids)} of {answers.asked} images are answered; then the session ended "
    f"({name}: {answers.error}). Ask about the others again"
  )


def foreign(present: Sequence[str]) -> None:
  """Refuses flags that a model owner decides.

  Args:
    present: names of the flags that were given.

  Raises:
    ValueError: naming the first.
  """
  own = {"ignore", "grey_bits", "images", "skip_bad_files", "output_dir", "slices", "overlays"}
  of_owner = {field.name for field in dataclasses.fields(Infer)} - own
  for name in sorted(of_owner & set(present)):
    raise ValueError(
      f"{name} with connect: the model owner has decided it with primia-publish; leave it out"
    )
