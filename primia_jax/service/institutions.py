"""The model owner's server and a clinic's session, each from a folder of its own.

| file in the model owner's folder | what |
| --- | --- |
| key.pem, certificate.pem | its identity |
| secret | for the tag of its weights, so that it can resume |
| clinics/NAME.pem | the certificate of each clinic that may ask |
| NAME/correlations, NAME/used | for each clinic, from the dealer |

| file in a clinic's folder | what |
| --- | --- |
| key.pem, certificate.pem | its identity |
| correlations, used | from the dealer |
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

from primia_jax.mpc import apart
from primia_jax.mpc.messages import Correlations
from primia_jax.mpc.roles import DataOwner, ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import certificates, channel, folders, sessions
from primia_jax.service.channel import Limits
from primia_jax.service.errors import SessionEnded
from primia_jax.types import PyTree

CLINICS = "clinics"


@contextlib.contextmanager
def serve(
  folder: pathlib.Path,
  owner: ModelOwner,
  publication: str,
  address: str = "127.0.0.1:0",
  online: apart.Online | None = None,
  limits: Limits = Limits(),  # noqa: B008
  ended: Callable[[str, SessionEnded], None] = lambda clinic, error: None,
) -> Iterator[int]:
  """Serves clinics for as long as the context lasts; gives the port.

  Args:
    folder: the model owner's.
    owner: the model owner.
    publication: which publication the clinics have.
    address: host:port; port 0 takes any free one.
    online: `apart.online(plan, MODEL_OWNER)`, if it is compiled already.
    limits: what a session may take; the longest message follows from the plan.
    ended: is told of each session that ended early: the clinic, and why.
  """
  online = apart.online(owner.plan, MODEL_OWNER) if online is None else online
  limits = limits._replace(message=sessions.largest_message(owner.plan, online))
  clinics = {path.stem: path.read_bytes() for path in (folder / CLINICS).glob("*.pem")}

  def session(clinic: str, receive: channel.Receive) -> Iterator[bytes]:
    take = lambda inference: folders.take(folder / clinic, inference)
    return sessions.serve(owner, online, publication, take, receive)

  identity = certificates.load(folder)
  with channel.listen(address, identity, clinics, session, limits, ended) as port:
    yield port


class Clinic:
  """A data owner's open session with a model owner's server: `ask`, any number of times."""

  def __init__(self, folder: pathlib.Path, session: sessions.Asking):
    self._folder, self._session = folder, session

  def prepare(self) -> None:
    """Takes the next correlations, and does the work for one inference that needs no image.

    Raises:
      SessionEnded: as `ask`.
      LookupError: there are no unused correlations; the dealer must deal more.
    """
    if self._session.is_prepared:
      return
    found = folders.unused(self._folder)
    if not found:
      raise LookupError(f"{self._folder} has no unused correlations; have the dealer deal more")
    correlations: Correlations = folders.take(self._folder, found[0])
    self._session.prepare(correlations)

  def ask(self, *images: PyTree) -> PyTree:
    """fn's outputs for these images, which nobody else learns; raises as `Asking.ask` does."""
    self.prepare()
    return self._session.ask(*images)


@contextlib.contextmanager
def ask(
  folder: pathlib.Path,
  owner: DataOwner,
  publication: str,
  address: str,
  server: bytes,
  online: apart.Online | None = None,
  limits: Limits = Limits(),  # noqa: B008
) -> Iterator[Clinic]:
  """A session with a model owner's server for as long as the context lasts.

  Args:
    folder: the clinic's.
    owner: the data owner.
    publication: the name of the model owner's publication.
    address: host:port.
    server: the server's certificate, PEM.
    online: `apart.online(plan, DATA_OWNER)`, to be compiled once for several sessions.
    limits: what the session may take.

  Raises:
    SessionEnded: the sides do not agree, or there is no connection.
  """
  online = apart.online(owner.plan, DATA_OWNER) if online is None else online
  limits = limits._replace(message=sessions.largest_message(owner.plan, online))
  identity = certificates.load(folder)
  with channel.connect(address, identity, server, limits) as (send, receive):
    yield Clinic(folder, sessions.Asking(owner, online, publication, send, receive))
