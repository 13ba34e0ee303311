"""What a model owner gives to clinics that only share their images: a JSON file without a secret.

A card says how both servers are reached and known, what images the model takes, and what its
answers mean. Anyone who can change a card can impersonate both servers, so clinics compare the
fingerprints with the institutions, as for any certificate. Reading it needs no JAX.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_FORMAT = 1
ROLES = "model owner", "helper"


@dataclasses.dataclass(frozen=True)
class About:
  """What a clinic must know of a model, besides the plan; public.

  Attributes:
    version: of the model, in its owner's words.
    image_size, channels: of the images that it takes.
    label_names: the classes, in order.
    output: "probabilities" (the clinic receives logits) or "label"; of a score, what is opened of
      many labelled images: "confusion" or "roc".
    images: in one run of the protocol.
    grey_bits, ct_window: how images are read, as in training.
    intended_use: in its owner's words.
    opened_to: of a score, whom it is opened to (`scores`); else empty.
    positive, bins: of a ROC, the class and the number of thresholds.
  """

  version: str
  image_size: int
  channels: int
  label_names: tuple[str, ...]
  output: str
  images: int
  grey_bits: int = 0
  ct_window: str = ""
  intended_use: str = "research only; not for diagnosis"
  opened_to: str = ""
  positive: str = ""
  bins: int = 0


class Card(NamedTuple):
  """What a client must know (`mpc.helping.card`).

  Attributes:
    publication: SHA-256 of the publication's name, hexadecimal.
    num_bits: k of the ring.
    images: for each its shape, its unit, its bits with the sign, and the largest magnitude that was
      planned for.
    outputs: for each its shape, its unit, and its dtype.
  """

  publication: str
  num_bits: int
  images: list[dict[str, Any]]
  outputs: list[dict[str, Any]]


class Server(NamedTuple):
  """One of both servers: host:port, its certificate in PEM, and the name in that."""

  address: str
  certificate: bytes
  name: str


class Issued(NamedTuple):
  """A model owner's card.

  Attributes:
    model: name of the publication.
    about: the model.
    mean, std: an image v of 0 to 255 is (v / 255 - mean) / std to the model.
    servers: the model owner's and the helper's.
    card: what images and outputs are like.
  """

  model: str
  about: About
  mean: float
  std: float
  servers: tuple[Server, Server]
  card: Card

  def encoded(self, images: np.ndarray) -> np.ndarray:
    """uint8 images as the model takes them."""
    return (np.asarray(images) / 255.0 - self.mean) / self.std


def fingerprint(certificate: bytes) -> str:
  """SHA-256 of a certificate in PEM, in hexadecimal.

  Raises:
    ValueError: it is none.
  """
  return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode("ascii"))).hexdigest()


def text(issued: Issued) -> str:
  """The file's content."""
  servers = [
    {
      "role": role, "name": s.name, "address": s.address,
      "fingerprint": fingerprint(s.certificate), "certificate": s.certificate.decode("ascii"),
    }
    for role, s in zip(ROLES, issued.servers, strict=True)
  ]  # fmt: skip
  content = {
    "format": _FORMAT,
    "model": issued.model,
    "about": dataclasses.asdict(issued.about),
    "encoder": {"mean": issued.mean, "std": issued.std},
    "servers": servers,
    "card": issued.card._asdict(),
  }
  return json.dumps(content, indent=2) + "\n"


def read(path: pathlib.Path) -> Issued:
  """The card in a file.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is no card, or names one institution for both servers.
  """
  if not path.is_file():
    raise FileNotFoundError(f"{path}: there is no such file; ask the model owner for its card")
  try:
    found = json.loads(path.read_bytes())
    if found["format"] != _FORMAT:
      raise ValueError(f"it is of format {found['format']}, not {_FORMAT}")
    servers = [_server(said, role) for said, role in zip(found["servers"], ROLES, strict=True)]
    encoder, about = found["encoder"], about_of(found["about"])
    card = _card(found["card"])
    mean, std = float(encoder["mean"]), float(encoder["std"])
    issued = Issued(str(found["model"]), about, mean, std, (servers[0], servers[1]), card)
    shape = [about.images, about.image_size, about.image_size, about.channels]
    if [v["shape"] for v in card.images] != [shape]:
      raise ValueError("its plan takes other images than it says")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is not a card of a model ({type(error).__name__}: {error}); ask the model "
      "owner again"
    ) from error
  first, second = servers
  if first.name == second.name or first.certificate == second.certificate:
    raise ValueError(
      f"{path} names {first.name} for both servers, which together read every image; ask for a "
      "card with another institution as helper"
    )
  return issued


def about_of(found: Mapping[str, Any]) -> About:
  """What a file says about a model.

  Raises:
    ValueError, KeyError, TypeError: it lacks something, or has something else.
  """
  about = About(**{**found, "label_names": tuple(map(str, found["label_names"]))})
  for field in dataclasses.fields(About):
    kind: Any = {"str": str, "int": int}.get(str(field.type), tuple)
    if not isinstance(getattr(about, field.name), kind):
      raise ValueError(f"its {field.name} is no {kind.__name__}")
  return about


def _server(said: Mapping[str, Any], role: str) -> Server:
  if said["role"] != role:
    raise ValueError(f"a server is the {said['role']} where the {role} was expected")
  certificate, address = said["certificate"].encode("ascii"), said["address"]
  host, _, port = address.rpartition(":")
  if not (host and port.isdecimal() and 0 < int(port) < 2**16):
    raise ValueError(f"the {role}'s address {address!r} is not HOST:PORT")
  if fingerprint(certificate) != said["fingerprint"]:
    raise ValueError(f"the {role}'s certificate does not have the fingerprint beside it")
  return Server(address, certificate, str(said["name"]))


def _card(found: Mapping[str, Any]) -> Card:
  card = Card(**found)
  if len(bytes.fromhex(card.publication)) != 32 or not 8 <= card.num_bits <= 64:
    raise ValueError(
      f"publication={card.publication!r} with num_bits={card.num_bits} is not valid: 32 bytes in "
      "hexadecimal, and 8 to 64 bits"
    )
  for each in (*card.images, *card.outputs):
    if not (all(isinstance(n, int) and n >= 0 for n in each["shape"]) and each["unit"] > 0):
      raise ValueError(f"shape={each['shape']} with unit={each['unit']} is not valid")
  for image in card.images:
    if not 1 < image["bits"] <= card.num_bits:
      raise ValueError("an image's bits are beyond the ring")
    if not image.get("most", 0.0) >= 0:
      raise ValueError(f"an image's largest magnitude {image['most']} is not valid")
  for output in card.outputs:
    np.dtype(output["dtype"].replace("bfloat16", "float32"))
  return card
