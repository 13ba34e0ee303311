"""Publications as folders: what a model owner keeps of each and gives to dealer and clinics.

| in the model owner's `models/NAME` | what |
| --- | --- |
| about.json | what a clinic must know of the model: size of images, classes, version |
| plan | what is computed |
| weights.npz, secret | the weights; the secret of their tag |
| blind | from the dealer; it is gone once the publication is made |
| publication | the masked weights D = W - B |
| CLINIC/correlations, CLINIC/used | from the dealer, for each clinic, or the helper |

What goes to others lies in `outbox/dealer` (plan and tag, from which nobody can confirm a guess of
the weights) and `outbox/clinics` (about.json, plan, publication and the server's certificate). Each
is copied into the receiver's `inbox/model_owner` as it is (`inbox`). Where clinics only share their
images, `outbox/helper` holds these four, and clinics get `outbox/cards/NAME.json` (`cards`).

A new publication is a new name: its tag, blind and correlations are its own, also where plan and
weights are those of an old one, so keys and dealers are rotated by publishing anew.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from primia_jax import durable
from primia_jax.mpc import helping, saving
from primia_jax.mpc.circuit import SHARING
from primia_jax.mpc.messages import Publication
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.roles import ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import cards, certificates, folders
from primia_jax.service.cards import About, Card, Issued, Server
from primia_jax.types import PyTree

MODELS, OUTBOX, HELPER = "models", "outbox", "helper"
SERVER = "server.pem"
_FORMAT = 1


class Kept(NamedTuple):
  """A publication as its model owner keeps it."""

  name: str
  about: About
  owner: ModelOwner
  publication: str
  published: Publication

  def recomputed(self, seed: bytes) -> str:
    """The number that an honest dealer gives a seed; see `mpc.dealer.recomputed`."""
    return self.owner.recomputed(self.published, seed)


class Received(NamedTuple):
  """A publication as a clinic or helper received it."""

  about: About
  plan: Plan
  publication: Publication
  server: bytes


def model_folder(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Where a role keeps what belongs to one publication.

  Raises:
    ValueError: the name is not of the form that folders have.
  """
  certificates.check_form(name, "model")
  return folder / MODELS / name


def names(folder: pathlib.Path) -> list[str]:
  """The publications that a role's folder holds something of."""
  return sorted(p.name for p in (folder / MODELS).glob("*") if certificates.NAME.fullmatch(p.name))


# ---- the model owner


def begin(
  folder: pathlib.Path, name: str, about: About, plan: Plan, weights: Sequence[Any]
) -> pathlib.Path:
  """Keeps plan and weights under a new name, and puts plan and tag into the dealer's outbox.

  Args:
    folder: the model owner's.
    name: of the publication.
    about: for the clinics.
    plan: of (weights, images).
    weights: the model owner's arrays, as `jax.tree.leaves` orders them.

  Returns:
    The outbox.

  Raises:
    FileExistsError: there is a publication of that name.
  """
  place = model_folder(folder, name)
  if place.exists():
    raise FileExistsError(f"model={name} is published or begun already; choose another name")
  part = _fresh(folders.make(folder / MODELS) / f".{name}.part")
  saving.write(part / "plan", plan)
  arrays = io.BytesIO()
  np.savez(arrays, *map(np.asarray, weights))
  durable.create(part / "weights.npz", arrays.getvalue())
  durable.create(part / "about.json", _json(about), 0o600)
  owner = ModelOwner(plan, list(weights), secret=folders.secret(part))
  part.rename(place)
  durable.sync_folder(place.parent)
  outbox = _outbox(folder, "dealer", name)
  shutil.copyfile(place / "plan", outbox / "plan")
  durable.replace(outbox / "tag", owner.tag.encode())
  return outbox


def copy_of(folder: pathlib.Path, name: str) -> tuple[About, Plan, list[np.ndarray]]:
  """What `begin` takes to publish the same weights under another name.

  Raises:
    FileNotFoundError: there is no such publication.
  """
  place = _existing(folder, name)
  return _about(place), saving.read(place / "plan"), _weights(place)


def is_published(folder: pathlib.Path, name: str) -> bool:
  """Whether `finish` has been."""
  return (model_folder(folder, name) / "publication").exists()


def finish(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Masks the weights with the dealer's blind, and fills the clinics' outbox, or the helper's where
  clinics only share their images; returns it.

  Raises:
    FileNotFoundError: the dealer's blind or the server's certificate is missing.
    ValueError: the blind is of another plan or other weights.
  """
  place = _existing(folder, name)
  server = folder / certificates.CERTIFICATE
  if not server.exists():
    raise FileNotFoundError(f"{server}: the server has no certificate; run primia-certificate")
  plan = saving.read(place / "plan")
  if not is_published(folder, name):
    if not (place / "blind").exists():
      raise FileNotFoundError(
        f"{place / 'blind'}: the dealer has not answered yet; give it what is in "
        f"{folder / OUTBOX / 'dealer'}, and copy its outbox/model_owner into {folder}/inbox/dealer"
      )
    owner = ModelOwner(plan, _weights(place), secret=folders.secret(place))
    publication = owner.publish(saving.read(place / "blind"))
    saving.write(place / "publication", publication)
  outbox = _outbox(folder, HELPER if plan.config.client == SHARING else "clinics", name)
  for file in ("plan", "publication", "about.json"):
    shutil.copyfile(place / file, outbox / file)
  shutil.copyfile(server, outbox / SERVER)
  return outbox


def is_shared(folder: pathlib.Path, name: str) -> bool:
  """Whether its clinics only share their images, between its model owner and a helper."""
  return saving.read(model_folder(folder, name) / "plan").config.client == SHARING


def helper_of(folder: pathlib.Path) -> bytes:
  """The certificate of a model owner's helper.

  Raises:
    FileNotFoundError: it has none.
    ValueError: it is the model owner's own, or a clinic's.
  """
  path = folder / f"{HELPER}.pem"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path}: there is no helper; let one in: primia-certificate --folder={folder} "
      "--helper=CERTIFICATE"
    )
  pem = path.read_bytes()
  check_helper(folder, pem)
  return pem


def check_helper(folder: pathlib.Path, pem: bytes) -> None:
  """Raises ValueError if a model owner's helper is the model owner itself, or a clinic."""
  own, others = folder / certificates.CERTIFICATE, (folder / certificates.CLINICS).glob("*.pem")
  facts = lambda of: {certificates.name(of), certificates.fingerprint(of)}
  for what, path in (("the model owner", own), *(("a clinic", path) for path in others)):
    if path.is_file() and facts(path.read_bytes()) & facts(pem):
      raise ValueError(
        f"the helper, {certificates.name(pem)}, has the name or certificate of {what} ({path}); "
        "together they see what each alone must not, so take another institution as helper"
      )


def issue(
  folder: pathlib.Path, name: str, addresses: tuple[str, str], mean: float, std: float
) -> pathlib.Path:
  """Writes the card of a publication whose clinics only share their images; returns its path.

  Args:
    folder: the model owner's.
    name: of the publication.
    addresses: host:port of the model owner's server and of the helper's.
    mean, std: as in `cards.Issued`.

  Raises:
    FileNotFoundError: it is not published, or there is no helper.
  """
  place, helper = _existing(folder, name), helper_of(folder)
  pems = (folder / certificates.CERTIFICATE).read_bytes(), helper
  servers = [
    Server(address, pem, certificates.name(pem))
    for address, pem in zip(addresses, pems, strict=True)
  ]
  plan, publication = saving.read(place / "plan"), saving.read(place / "publication").publication
  card = Card(**helping.card(plan, publication))
  issued = Issued(name, _about(place), mean, std, (servers[0], servers[1]), card)
  path = folders.make(folder / OUTBOX / "cards") / f"{name}.json"
  durable.replace(path, cards.text(issued).encode())
  return path


def kept(folder: pathlib.Path, name: str) -> Kept:
  """A publication to be served, by the process that has its weights.

  Raises:
    FileNotFoundError: it is not published.
  """
  place = _existing(folder, name)
  if not is_published(folder, name):
    raise FileNotFoundError(f"model={name} is not published yet; run primia-publish again")
  plan = saving.read(place / "plan")
  owner = ModelOwner(plan, _weights(place), secret=folders.secret(place))
  published = saving.read(place / "publication")
  owner.resume(published)
  return Kept(name, _about(place), owner, published.publication, published)


# ---- a clinic, or a helper


def received(folder: pathlib.Path, name: str, is_score: bool = False) -> Received:
  """A publication that was copied into a clinic's or helper's folder.

  Args:
    folder: the clinic's or helper's.
    name: of the publication.
    is_score: whether it shall open a score of many images, or answer about each.

  Raises:
    FileNotFoundError: a file of it is missing.
    ValueError: a file is damaged, they do not belong together, or it does the other thing.
  """
  place = _existing(folder, name)
  missing = [f for f in ("about.json", "plan", "publication", SERVER) if not (place / f).is_file()]
  if missing:
    raise FileNotFoundError(
      f"{place} lacks {', '.join(missing)}; copy the model owner's outbox/clinics into "
      f"{folder}/inbox/model_owner"
    )
  about, plan = _about(place), saving.read(place / "plan")
  if images_shape(plan) != (about.images, about.image_size, about.image_size, about.channels):
    raise ValueError(f"{place}: about.json and the plan do not belong together; copy both again")
  if bool(about.opened_to) != is_score:
    does = (
      "opens a score of labelled images: primia-score"
      if about.opened_to
      else ("answers about single images: primia-infer")
    )
    raise ValueError(f"model={name} {does} --connect asks it")
  publication = saving.read(place / "publication")
  return Received(about, plan, publication, (place / SERVER).read_bytes())


def images_shape(plan: Plan) -> tuple[int, ...]:
  """Of the images of one run of the protocol: N, H, W, C; labels come after them."""
  secret = DATA_OWNER, None  # None: given as shares
  of = [a.shape for by, a in zip(plan.owners, plan.program.avals, strict=True) if by in secret]
  return of[0] if of else ()


# ---- files


def _existing(folder: pathlib.Path, name: str) -> pathlib.Path:
  place = model_folder(folder, name)
  if not place.is_dir():
    there = ", ".join(names(folder)) or "nothing"
    raise FileNotFoundError(f"model={name}: {folder / MODELS} holds {there}; check the name")
  return place


def _weights(place: pathlib.Path) -> list[np.ndarray]:
  with np.load(place / "weights.npz", allow_pickle=False) as found:
    return [found[f"arr_{i}"] for i in range(len(found.files))]


def _json(about: About) -> bytes:
  return (json.dumps({"format": _FORMAT} | dataclasses.asdict(about), indent=2) + "\n").encode()


def _about(place: pathlib.Path) -> About:
  path = place / "about.json"
  try:
    found = json.loads(path.read_bytes())
    if found.pop("format") != _FORMAT:
      raise ValueError("it is of another format")
    about = cards.about_of(found)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is damaged ({error}); copy it again") from error
  return about


def _fresh(path: pathlib.Path) -> pathlib.Path:
  shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
  path.mkdir(0o700)
  return path


def _outbox(folder: pathlib.Path, peer: str, name: str) -> pathlib.Path:
  return folders.make(folder / OUTBOX / peer / MODELS / name)


def leaves(weights: PyTree) -> list[Any]:
  """A model owner's arrays in the order in which `begin` takes them."""
  return jax.tree.leaves(weights)
