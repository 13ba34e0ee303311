"""Both servers of clients that share their images, each from a folder of its own.

| file in the model owner's folder | what |
| --- | --- |
| as in `institutions` | its identity, its clinics' certificates, its log |
| helper.pem | the helper's certificate |
| models/NAME/HELPER/correlations, used | from the dealer, by the helper's name |

| file in the helper's folder | what |
| --- | --- |
| key.pem, certificate.pem, clinics/NAME.pem | its identity, and clinics' certificates |
| audit.jsonl | who asked when; budgets are counted from it |
| models/NAME | each publication as the model owner gave it, with correlations and used |

Both servers know a clinic by its certificate, and count its requests: a query costs the budget at
each. A request is answered only where the same number is at both at the same time; numbers are not
remembered, since an answer to the same shares tells nothing new and costs a query.
"""

from __future__ import annotations

import contextlib
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from primia_jax.mpc import helping, multiprocess
from primia_jax.mpc.helping import Helper
from primia_jax.mpc.messages import Correlations
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import certificates, channel, folders, inbox, publications, receipts
from primia_jax.service.channel import Limits, Receive
from primia_jax.service.errors import Refused, SessionEnded
from primia_jax.service.helping import Asked, Desk, assist, largest_message, serve_client
from primia_jax.service.helping import serve_helper as answer_helper
from primia_jax.service.institutions import Served, collecting, naming, verifying
from primia_jax.service.journal import Journal

_DOOR = 4  # streams besides, so that a clinic can be told that it is turned away


class Helped(NamedTuple):
  """One publication that a helper assists with.

  Attributes:
    name: of the publication.
    folder: where its correlations are.
    owner: the helper's part.
    publication: its full name.
    online: `multiprocess.online(plan, DATA_OWNER)`.
    images: in one inference.
    server: the model owner's certificate, PEM.
  """

  name: str
  folder: pathlib.Path
  owner: Helper
  publication: str
  online: multiprocess.Online
  images: int
  server: bytes


def helped(folder: pathlib.Path, name: str, kept: pathlib.Path | None = None) -> Helped:
  """A publication that a helper has received, compiled.

  Args:
    folder: the helper's.
    name: of the publication.
    kept: as in `multiprocess.online`.

  Raises:
    FileNotFoundError: a file of it is missing.
    ValueError: a file is damaged, its clinics need no helper, or this is the model owner itself.
  """
  found = publications.received(folder, name)
  try:
    owner = Helper(found.plan, found.publication)
  except ValueError as error:
    raise ValueError(f"model={name}: {error}") from error
  own = (folder / certificates.CERTIFICATE).read_bytes()
  facts = lambda pem: {certificates.name(pem), certificates.fingerprint(pem)}
  if facts(own) & facts(found.server):
    raise ValueError(
      f"folder={folder} has the name or certificate of the model owner of {name}; an institution "
      "that is both can read every image, so the helper must be another institution"
    )
  online = multiprocess.online(found.plan, DATA_OWNER, kept=kept)
  owner.warm_up()
  place = publications.model_folder(folder, name)
  full = found.publication.publication
  return Helped(name, place, owner, full, online, found.about.images, found.server)


@contextlib.contextmanager
def serve(
  folder: pathlib.Path,
  models: Sequence[Served],
  journal: Journal,
  address: str = "127.0.0.1:0",
  limits: Limits = Limits(),  # noqa: B008
  stopping: threading.Event | None = None,
  only_checked: bool = False,
) -> Iterator[int]:
  """The model owner's server for as long as the context lasts; gives the port.

  Args:
    folder: the model owner's.
    models: what is served.
    journal: the audit log, which keeps the budgets.
    address: host:port; port 0 takes any free one.
    limits: what a session may take; the longest message follows from the plans.
    stopping: once it is set, no request is accepted, and those at work are finished.
    only_checked: refuse correlations of a dealing from which none were checked (`supply`).

  Raises:
    FileNotFoundError, ValueError: the helper's certificate is missing, or is another's.
  """
  pem = publications.helper_of(folder)
  helper = certificates.name(pem)
  desks = {
    one.publication: Desk(limits.timeout / 2, limits.session, limits.sessions) for one in models
  }
  keys = {one.publication: receipts.key(one.folder) for one in models}
  collect, named = collecting(folder, inbox.MODEL_OWNER, journal), naming(models)
  verify = verifying(folder, journal, collect)

  def assisted(receive: Receive) -> Iterator[bytes]:
    model, again = named(receive)
    place, key = model.folder / helper, keys[model.publication]

    def take(inference: str, shown: bytes) -> tuple[Correlations, bytes]:
      verify(model, key, helper, shown)
      if only_checked and inference not in folders.checked(place):
        raise Refused(f"the dealing of inference {inference} was not checked; have it checked")
      found = folders.take(place, inference)
      journal.note("inference", clinic=helper, model=model.name, inference=inference)
      return found, receipts.issued(key, helper, inference)

    collect()
    yield from answer_helper(
      model.owner, model.online, model.publication, take, desks[model.publication], again
    )

  def submit(model: Served, asked: Asked, left: threading.Event) -> bytes:
    return desks[model.publication].submit(asked.number, asked.shares, left)

  of_clinic = _of_clinic(models, journal, submit, collect, stopping)
  session = lambda who, receive: assisted(receive) if who == helper else of_clinic(who, receive)
  peers = certificates.clinics(folder) | {helper: pem}
  room = threading.BoundedSemaphore(limits.sessions)

  @contextlib.contextmanager
  def admit(who: str) -> Iterator[None]:
    """Clinics, of whatever model, take no more than their part, so that the helper has room."""
    if who == helper:
      yield
      return
    with journal.session(who):
      if not room.acquire(blocking=False):
        raise Refused(f"{limits.sessions} requests are at work, as many as may be; ask again later")
      try:
        yield
      finally:
        room.release()

  # a clinic's and the helper's for each, and for those that are turned away
  doubled = _fitting(models, limits._replace(sessions=2 * limits.sessions + _DOOR))
  listening = address, certificates.load(folder), peers, session, doubled
  with channel.listen(*listening, journal.refused, stopping, admit) as port:
    yield port


@contextlib.contextmanager
def assisting(
  folder: pathlib.Path,
  models: Sequence[Helped],
  journal: Journal,
  address: str,
  limits: Limits,
  stopping: threading.Event | None,
  model_owner: str,
) -> Iterator[int]:
  """The helper's server for as long as the context lasts; gives the port.

  Args:
    folder: the helper's.
    models: what it assists with.
    journal, address, limits, stopping: as in `serve`.
    model_owner: host:port of the model owner's server.
  """
  identity, one = certificates.load(folder), threading.Lock()

  def answer(model: Helped, asked: Asked, left: threading.Event) -> bytes:
    def reserve() -> folders.Reserved:
      with one:
        if not (found := folders.unused(model.folder)):
          raise Refused("the helper has no unused correlations; have the dealer deal more")
        # any, so that none that the model owner does not take stands in the others' way
        return folders.Reserved(model.folder, secrets.choice(found))

    used = lambda inference: journal.note("inference", model=model.name, inference=inference)
    inner = limits._replace(message=largest_message(model.owner.plan, model.online))
    try:
      with channel.connect(model_owner, identity, model.server, inner) as (send, receive):
        return assist(
          model.owner, model.online, model.publication, reserve, used, asked, send, receive
        )
    except SessionEnded as error:
      raise type(error)(f"between helper and model owner: {error}") from error

  collect = collecting(folder, inbox.HELPER, journal)
  session = _of_clinic(models, journal, answer, collect, stopping)
  listening = address, identity, certificates.clinics(folder), session, _fitting(models, limits)
  with channel.listen(*listening, journal.refused, stopping, journal.session) as port:
    yield port


def _of_clinic(
  models: Sequence[Any],
  journal: Journal,
  answer: Callable[[Any, Asked, threading.Event], bytes],
  collect: Callable[[], None],
  stopping: threading.Event | None,
) -> channel.Session:
  """What either server does in a clinic's session: it counts the query, and then answers."""
  by_digest: Mapping[bytes, Any] = {helping.digest(one.publication): one for one in models}
  plans = {digest: one.owner.plan for digest, one in by_digest.items()}

  def session(clinic: str, receive: Receive) -> Iterator[bytes]:
    def accept(asked: Asked) -> None:
      if stopping is not None and stopping.is_set():
        raise Refused("the server is stopping; ask again later")
      model = by_digest[asked.publication]
      journal.charge(clinic, model.name, asked.number.hex(), model.images)
      at_work.append((model, asked.number.hex(), time.monotonic()))

    at_work: list[tuple[Any, str, float]] = []
    sent, give = 0, lambda asked, left: answer(by_digest[asked.publication], asked, left)
    collect()
    journal.note("session", clinic=clinic)
    for message in serve_client(plans, accept, give, receive):
      yield message
      sent += len(message)
    ((model, number, since),) = at_work
    journal.note(
      "answer", clinic=clinic, model=model.name, inference=number, images=model.images,
      seconds=round(time.monotonic() - since, 4), bytes=sent,
    )  # fmt: skip

  return session


def _fitting(models: Sequence[Any], limits: Limits) -> Limits:
  """The limits, with room for the longest message about any of the models."""
  return limits._replace(message=max(largest_message(m.owner.plan, m.online) for m in models))
