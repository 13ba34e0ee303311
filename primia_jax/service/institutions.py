"""The model owner's server and a clinic's session, each from a folder of its own.

| file in the model owner's folder | what |
| --- | --- |
| key.pem, certificate.pem | its identity |
| clinics/CLINIC.pem | the certificate of each clinic that may ask |
| audit.jsonl | who asked when; budgets are counted from it (`journal`) |
| models/NAME | each publication, and what the dealer gave for it (`publications`) |

| file in a clinic's folder | what |
| --- | --- |
| key.pem, certificate.pem | its identity |
| models/NAME | each publication, with correlations, used, and the last receipt (`receipts`) |

Both have an inbox and an outbox (`inbox`).
"""

from __future__ import annotations

import contextlib
import pathlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from primia_jax.mpc import multiprocess
from primia_jax.mpc.messages import Correlations
from primia_jax.mpc.roles import DataOwner, ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import (
  certificates,
  channel,
  folders,
  frames,
  inbox,
  receipts,
  scores,
  sessions,
)
from primia_jax.service.channel import Limits
from primia_jax.service.errors import PutBack, Refused, SessionEnded, UsedUp
from primia_jax.service.journal import Journal
from primia_jax.types import PyTree

CLINICS = certificates.CLINICS
_SPARE = 8  # correlations that a score offers besides twice what it needs


class Served(NamedTuple):
  """One publication that a server answers for.

  Attributes:
    name: of the publication.
    folder: where its correlations are, a folder for each clinic.
    owner: the model owner, which has published or resumed it.
    publication: its full name.
    online: `multiprocess.online(plan, MODEL_OWNER)`.
    images: in one inference.
    opened_to: whom a score is opened to (`scores`); empty where clinics get answers.
    learn: (clinic, a score) -> None, where it is opened to the model owner.
  """

  name: str
  folder: pathlib.Path
  owner: ModelOwner
  publication: str
  online: multiprocess.Online
  images: int = 1
  opened_to: str = ""
  learn: Callable[[str, np.ndarray], None] = lambda clinic, counts: None


@contextlib.contextmanager
def serve(
  folder: pathlib.Path,
  owner: ModelOwner,
  publication: str,
  address: str = "127.0.0.1:0",
  online: multiprocess.Online | None = None,
  limits: Limits = Limits(),  # noqa: B008
  ended: Callable[[str, SessionEnded], None] = lambda clinic, error: None,
) -> Iterator[int]:
  """Serves one publication, without budgets, for as long as the context lasts; gives the port.

  Args:
    folder: the model owner's.
    publication: which publication the clinics have.
    address: host:port; port 0 takes any free one.
    online: `multiprocess.online(plan, MODEL_OWNER)`, if it is compiled already.
    limits: what a session may take; the longest message follows from the plan.
    ended: is told of each session that ended early: the clinic, and why.
  """
  online = multiprocess.online(owner.plan, MODEL_OWNER) if online is None else online
  one = Served("model", folder, owner, publication, online)
  key = receipts.key(folder)

  def plain(model: Served, clinic: str, receive: channel.Receive) -> Iterator[bytes]:
    take = receipts.taking(key, clinic, model.folder / clinic)
    return sessions.serve(model.owner, model.online, model.publication, take, receive)

  with _listening(folder, [one], address, limits, plain, ended) as port:
    yield port


@contextlib.contextmanager
def serve_models(
  folder: pathlib.Path,
  models: Sequence[Served],
  journal: Journal,
  address: str = "127.0.0.1:0",
  limits: Limits = Limits(),  # noqa: B008
  stopping: threading.Event | None = None,
  only_checked: bool = False,
) -> Iterator[int]:
  """Serves publications side by side for as long as the context lasts; gives the port.

  A session is about the one that the clinic's first message names. Each query is counted before
  anything is computed for it, and each session and answer is in the journal.

  Args:
    folder: the model owner's.
    models: what is served.
    journal: the audit log, which keeps the budgets.
    address: host:port; port 0 takes any free one.
    limits: what a session may take; the longest message follows from the plans.
    stopping: once it is set, no inference is begun, and those at work are finished.
    only_checked: refuse correlations of a dealing from which none were checked (`supply`).
  """
  stop = threading.Event() if stopping is None else stopping
  collect = collecting(folder, inbox.MODEL_OWNER, journal)
  verify = verifying(folder, journal, collect)
  keys = {one.publication: receipts.key(one.folder) for one in models}

  def session(model: Served, clinic: str, receive: channel.Receive) -> Iterator[bytes]:
    place, begun, charged = model.folder / clinic, [(0.0, "")], set[str]()
    key = keys[model.publication]

    def check_open(shown: bytes) -> None:
      verify(model, key, clinic, shown)
      if stop.is_set():
        raise Refused("the server is stopping; ask again later")

    def check(inference: str, shown: bytes) -> None:
      check_open(shown)
      folders.check_unused(place, inference)
      if only_checked and inference not in folders.checked(place):
        raise Refused(f"the dealing of inference {inference} was not checked; have it checked")

    def take(inference: str, shown: bytes) -> tuple[Correlations, bytes]:
      check(inference, shown)
      journal.charge(clinic, model.name, inference, model.images)
      begun[0] = time.monotonic(), inference
      return folders.take(place, inference), receipts.issued(key, clinic, inference)

    def take_charged(inference: str, shown: bytes) -> tuple[Correlations, bytes]:
      check(inference, shown)
      if inference not in charged:
        raise Refused(f"inference {inference} is none of those that were agreed on for this score")
      return folders.take(place, inference), receipts.issued(key, clinic, inference)

    def begin(count: int, runs: int, offered: Sequence[str], shown: bytes) -> list[str]:
      check_open(shown)
      found = set(folders.unused(place))
      if only_checked:
        found &= folders.checked(place)
      chosen = [number for number in dict.fromkeys(offered) if number in found][:runs]
      if len(chosen) < runs:
        raise Refused(
          f"{count} images need {runs} inferences; of {len(offered)} that the hospital offers, "
          f"{len(chosen)} may be used here. Have both halves of the dealer's delivery arrived, and "
          "was it checked where it must be? Else have it deal more"
        )
      journal.charge(clinic, model.name, "", runs * model.images)  # what fills the last one, too
      charged.update(chosen)
      return chosen

    def messages() -> Iterator[bytes]:
      if not model.opened_to:
        return sessions.serve(model.owner, model.online, model.publication, take, receive)
      return scores.serve(
        model.owner, model.online, model.publication, model.opened_to, begin, take_charged,
        lambda counts: model.learn(clinic, counts), receive,
      )  # fmt: skip

    sent = 0
    collect()
    journal.note("session", clinic=clinic, model=model.name)
    for message in messages():
      yield message
      sent += len(message)
      if frames.kind_of(message) == frames.OUTPUT:
        since, inference = begun[0]
        journal.note(
          "answer", clinic=clinic, model=model.name, inference=inference, images=model.images,
          seconds=round(time.monotonic() - since, 4), bytes=sent,
        )  # fmt: skip
        sent = 0
    journal.note("end", clinic=clinic, model=model.name)

  with _listening(
    folder, models, address, limits, session, journal.refused, stop, journal.session
  ) as port:
    yield port


def collecting(folder: pathlib.Path, role: str, journal: Journal) -> Callable[[], None]:
  """What a server does before each session: it takes what others have sent since. What they may not
  send is for the operator to see, and is said once.
  """
  lock, said = threading.Lock(), [""]

  def collect() -> None:
    with lock:
      reason = ""
      try:
        inbox.collect(folder, role)
      except ValueError as error:
        reason = str(error)
      if reason and reason != said[0]:
        journal.note("inbox", reason=reason)
      said[0] = reason

  return collect


def verifying(
  folder: pathlib.Path, journal: Journal, collect: Callable[[], None]
) -> Callable[[Served, bytes, str, bytes], None]:
  """Checks the receipt that a clinic or helper shows; a server that was put back discards all.

  Args:
    folder: the model owner's.
    journal: says so.
    collect: takes what lies in the inbox.

  Returns:
    (model, the server's key, who shows it, the receipt) -> None; raises as `receipts.check`.
  """

  def verify(model: Served, key: bytes, who: str, shown: bytes) -> None:
    try:
      receipts.check(key, who, model.folder / who, shown)
    except PutBack as error:
      collect()  # or what was used since would come back from there
      count = folders.discard(folder)
      folders.destroy(model.folder / who, shown[: -receipts.BYTES].hex())  # it is found once
      reason = f"{error} ({count} inferences are destroyed)"
      journal.note("put back", clinic=who, model=model.name, reason=reason)
      raise

  return verify


def naming(models: Sequence[Served]) -> Callable[[channel.Receive], tuple[Served, channel.Receive]]:
  """receive -> (the model that a session's first message names, or the first model if it names
  none; what receives that message again and then the others).
  """
  known = {sessions.terms(one.owner.plan, one.online, one.publication): one for one in models}

  def named(receive: channel.Receive) -> tuple[Served, channel.Receive]:
    hello = receive()
    waiting, asked = [hello], sessions.asked(hello)
    again = lambda idle=False: waiting.pop() if waiting else receive(idle=idle)
    return (known.get(asked, models[0]) if asked else models[0]), again

  return named


@contextlib.contextmanager
def _listening(
  folder: pathlib.Path,
  models: Sequence[Served],
  address: str,
  limits: Limits,
  session: Callable[[Served, str, channel.Receive], Iterator[bytes]],
  ended: Callable[[str, SessionEnded], None],
  stopping: threading.Event | None = None,
  admit: channel.Admit = contextlib.nullcontext,
) -> Iterator[int]:
  largest = [sessions.largest_message(one.owner.plan, one.online) for one in models]
  limits = limits._replace(message=max(largest))
  clinics, named = certificates.clinics(folder), naming(models)

  def chosen(clinic: str, receive: channel.Receive) -> Iterator[bytes]:
    model, again = named(receive)
    yield from session(model, clinic, again)

  identity = certificates.load(folder)
  with channel.listen(address, identity, clinics, chosen, limits, ended, stopping, admit) as port:
    yield port


class Clinic:
  """A data owner's open session with a model owner's server: `ask`, again and again, or `score`."""

  def __init__(self, folder: pathlib.Path, session: sessions.Asking):
    self._folder, self._session = folder, session

  def prepare(self) -> None:
    """Takes some unused correlations, and does the work for one inference that needs no image.

    Raises:
      SessionEnded: as `ask`.
      LookupError: there are no unused correlations; the dealer must deal more.
    """
    if not self._session.is_prepared:
      self._session.prepare(self._reserve())

  def _reserve_many(self, runs: int) -> list[folders.Reserved]:
    """Correlations for so many runs, and as many again, where there are, for the server to choose
    from: the two halves of a delivery need not have arrived together.
    """
    found = folders.unused(self._folder)
    most, reserved = min(2 * runs + _SPARE, frames.MOST_OFFERED), list[folders.Reserved]()
    try:
      for number in secrets.SystemRandom().sample(found, min(most, len(found))):
        with contextlib.suppress(UsedUp):  # another process of this clinic has just taken it
          reserved.append(folders.Reserved(self._folder, number))
      if len(reserved) < runs:
        raise LookupError(
          f"{self._folder} has {len(reserved)} unused correlations, and {runs} are needed; have "
          "the dealer deal more"
        )
    except BaseException:
      for one in reserved:
        one.release()
      raise
    return reserved

  def _reserve(self) -> folders.Reserved:
    found = folders.unused(self._folder)
    if not found:
      raise LookupError(f"{self._folder} has no unused correlations; have the dealer deal more")
    # any, so that none that the server does not take stands in the others' way
    return folders.Reserved(self._folder, secrets.choice(found))

  def ask(self, *images: PyTree) -> PyTree:
    """fn's outputs for these images, which nobody else learns; raises as `Asking.ask` does."""
    self._session.check(*images)
    self.prepare()
    return self._session.ask(*images)

  def score(
    self,
    parts: Iterable[Sequence[PyTree]],
    count: int,
    opened_to: str,
    enter: Callable[[], object] = lambda: None,
  ) -> np.ndarray | None:
    """A sum over many images, opened once; arguments and result as in `scores.ask`.

    Raises:
      SessionEnded, LookupError: as `ask`; nothing is opened.
    """
    scores.check_count(self._session.plan, count)
    reserved = self._reserve_many(scores.runs_of(self._session.plan, count))
    return scores.ask(self._session, reserved, parts, count, opened_to, enter)


@contextlib.contextmanager
def ask(
  folder: pathlib.Path,
  owner: DataOwner,
  publication: str,
  address: str,
  server: bytes,
  online: multiprocess.Online | None = None,
  limits: Limits = Limits(),  # noqa: B008
  correlations: pathlib.Path | None = None,
) -> Iterator[Clinic]:
  """A session with a model owner's server for as long as the context lasts.

  Args:
    folder: the clinic's.
    publication: the name of the model owner's publication.
    address: host:port.
    server: the server's certificate, PEM.
    online: `multiprocess.online(plan, DATA_OWNER)`, to be compiled once for several sessions.
    limits: what the session may take.
    correlations: the folder that `folders.take` takes from; None for the clinic's own.

  Raises:
    SessionEnded: the sides do not agree, or there is no connection.
  """
  online = multiprocess.online(owner.plan, DATA_OWNER) if online is None else online
  limits = limits._replace(message=sessions.largest_message(owner.plan, online))
  identity = certificates.load(folder)
  with channel.connect(address, identity, server, limits) as (send, receive):
    session = sessions.Asking(owner, online, publication, send, receive)
    yield Clinic(correlations or folder, session)
