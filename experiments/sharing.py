"""A clinic that only shares its images between two servers; needs no JAX."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from primia_jax.clinic import asking
from primia_jax.clinic.asking import Answer, Ask, Model
from primia_jax.data import dicom
from primia_jax.service import cards, certificates, sharing
from primia_jax.service.cards import Issued
from primia_jax.service.certificates import Identity

from . import settings
from .folders import certified, positive_seconds


@dataclasses.dataclass(frozen=True)
class Shared:
  """Whom the clinic asks, and as whom."""

  card: str = settings.setting("", "file of the model owner's card, outbox/cards/NAME.json there")
  folder: str = settings.setting("", "the clinic's own folder, of mode 0700")
  timeout: float = settings.setting(60.0, "longest wait, in seconds, for the answer to a request")


class Holder(NamedTuple):
  """A clinic that may ask.

  Attributes:
    issued: the card.
    identity: its key and certificate.
    timeout: seconds for each request.
  """

  issued: Issued
  identity: Identity
  timeout: float


def check(s: Shared) -> Holder:
  """Refuses wrong flags, and expired certificates, before any work.

  Raises:
    ValueError, FileNotFoundError, Refused: the message names the flag or file and the cure.
  """
  if not s.card:
    raise ValueError("card is empty; name the model owner's card, such as --card=chest-1.json")
  positive_seconds("timeout", s.timeout)
  folder = certified(s.folder, "the model owner and the helper")
  try:
    issued = cards.read(pathlib.Path(s.card).expanduser())
  except (ValueError, FileNotFoundError) as error:
    raise type(error)(f"card={s.card}: {error}") from error
  for server in issued.servers:
    certificates.check_valid(server.certificate)
  return Holder(issued, certificates.load(folder), s.timeout)


def describe(holder: Holder) -> str:
  """Which servers and model are asked, and who learns what."""
  about = holder.issued.about
  lines = [
    f"{role.capitalize():<12} {s.name} at {s.address}, SHA-256 "
    f"{cards.fingerprint(s.certificate)[:16]}..."
    for role, s in zip(cards.ROLES, holder.issued.servers, strict=True)
  ]
  shape = f"{about.image_size} x {about.image_size} x {about.channels}"
  names = ", ".join(about.label_names)
  lines += [
    f"Model        {holder.issued.model}, version {about.version}, {shape}, {names}",
    f"             {about.intended_use}",
    "Who learns what, if no two of model owner, helper and dealer collude:",
    *(f"  {who:<12} {what}" for who, what in learned(holder)),
  ]
  return "\n".join(lines)


def ready(s: Shared) -> tuple[Model, Ask, tuple[tuple[str, str], ...], str]:
  """What the page and the node ask: the model, what asks, who learns what, and a warning.

  Raises:
    ValueError, FileNotFoundError: as `check`, or the model takes several images at a time.
    SessionEnded: nobody listens where a server should be, or a certificate has expired.
  """
  holder = check(s)
  warning = f"{asking.WARNING}. Its owner says: {holder.issued.about.intended_use}"
  print(f"{warning}\n{describe(holder)}", flush=True)
  ask = asks(holder)
  with connected(holder):
    pass  # both are there
  who = (*learned(holder), ("Assumed", "no two of model owner, helper and dealer collude"))
  return model(holder), ask, who, warning


def learned(holder: Holder) -> tuple[tuple[str, str], ...]:
  """Who learns what from one question, for people."""
  owner, helper = (server.name for server in holder.issued.servers)
  answer = "the class" if holder.issued.about.output == "label" else "the probabilities"
  when = "which clinic asks, when and how often; nothing about images or answers"
  return (
    ("this clinic", f"{answer}, and the shape of images and answers; nothing else of the model"),
    (owner, when),
    (helper, "the same, and the plan of the model"),
    ("dealer", "nothing; it is not online"),
  )


def model(holder: Holder) -> Model:
  """What the clinic knows of the model."""
  about = holder.issued.about
  return Model(
    name=holder.issued.model, version=about.version, label_names=about.label_names,
    size=about.image_size, channels=about.channels, ct_window=dicom.window(about.ct_window),
    grey_bits=about.grey_bits, software=f"primia_jax {importlib.metadata.version('primia-jax')}",
  )  # fmt: skip


def num_bytes(holder: Holder) -> tuple[int, int]:
  """Bytes of the shares that each server gets, and gives, in one request."""
  card, each = holder.issued.card, 4 if holder.issued.card.num_bits <= 32 else 8
  of = lambda arrays: each * sum(int(np.prod(v["shape"], dtype=np.int64)) for v in arrays)
  return of(card.images), of(card.outputs)


@contextlib.contextmanager
def connected(holder: Holder) -> Iterator[Callable[..., np.ndarray]]:
  """Connections to both servers: (images [N, H, W, C] uint8, told) -> outputs of these N images, N
  as planned; raises SessionEnded where there is no answer.
  """
  issued, (key, certificate) = holder.issued, holder.identity
  with sharing.connected(issued.servers, key, certificate, holder.timeout) as exchange:

    def ask(images: np.ndarray, told: Callable[[], None] = lambda: None) -> np.ndarray:
      both = sharing.shares(issued.card, [issued.encoded(images)])
      return sharing.revealed(issued.card, exchange(issued.card, both, told))[0]

    yield ask


def asks(holder: Holder) -> Ask:
  """Asks about one image at a time, each over connections of its own.

  Raises:
    ValueError: the model takes several images at a time.
  """
  if holder.issued.about.images != 1:
    raise ValueError(
      f"card: {holder.issued.model} takes {holder.issued.about.images} images at a time; ask for a "
      "publication of one (primia-publish --batch=1), or use primia-ask"
    )
  owner, helper = (server.name for server in holder.issued.servers)
  sent, got = num_bytes(holder)

  def ask(image: np.ndarray, told: Callable[[str], None]) -> Answer:
    begun: list[float] = []

    def both() -> None:
      begun.append(time.perf_counter())
      told("Both have their shares, and compute on masked values")

    told(f"Your image is split into two random shares: one for {owner}, one for {helper}")
    start = time.perf_counter()
    with connected(holder) as exchange:
      outputs = exchange(image[None], both)
      end = time.perf_counter()
    told("The answer is put together on this machine")
    seconds = {"connect and share": begun[0] - start, "compute": end - begun[0]}
    of: dict[str, Any] = {"sent to each server": sent, "received from each": got}
    return asking.answer_of(outputs, seconds, of, 1)

  return ask
