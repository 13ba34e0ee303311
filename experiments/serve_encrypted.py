"""Model owner, or its helper: answers clinics that ask about encrypted images.

  primia-serve --folder=vendor --address=0.0.0.0:7443

It serves every publication in the folder to the clinics whose certificates were let in
(primia-certificate --clinic). Each image costs its clinic a query of a budget that is kept on disk,
in audit.jsonl, with who asked when and how it ended. SIGTERM or Ctrl-C finishes the inferences at
work and begins no other.

  primia-serve --folder=helper --address=0.0.0.0:7443 --model_owner=vendor.example:7443

This is the helper of publications whose clinics only share their images (primia-publish
--client=sharing): the same server, with its own folder, clinics, budgets and log. Start both.
"""

import contextlib
import dataclasses
import datetime
import functools
import json
import pathlib
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
from absl import flags

from primia_jax import durable
from primia_jax.mpc import multiprocess
from primia_jax.mpc.sharing import MODEL_OWNER
from primia_jax.service import certificates, folders, helped, inbox, institutions, publications
from primia_jax.service.channel import Limits
from primia_jax.service.errors import Refused
from primia_jax.service.institutions import Served
from primia_jax.service.journal import Contract, Journal

from . import caching, running, settings
from .folders import host_and_port, role_folder

_OTHERS = "weights.npz", "tag"  # files of a model owner, and of a dealer, beside a publication


@dataclasses.dataclass(frozen=True)
class Serve:
  """What is served, and where."""

  folder: str = settings.setting("", "the model owner's or helper's own folder, of mode 0700")
  model_owner: str = settings.setting(
    "", "serve as the helper of the model owner whose server is at this HOST:PORT"
  )
  models: str = settings.setting("", "publications to serve, separated by commas; empty serves all")
  address: str = settings.setting("127.0.0.1:7443", "HOST:PORT to listen at; port 0 takes any")
  only_checked: bool = settings.setting(
    False, "use only dealings of which a share was checked (primia-publish --check_dealer)"
  )
  metrics_port: int = settings.setting(
    -1, "port on loopback for Prometheus at /metrics; 0 takes any, -1 none"
  )
  health_port: int = settings.setting(
    -1, "port on loopback for gRPC's health service; 0 takes any, -1 none"
  )


@dataclasses.dataclass(frozen=True)
class Clinics:
  """What each clinic may ask."""

  daily_images: int = settings.setting(100, "images that a clinic may ask about a day (UTC)")
  total_images: int = settings.setting(10_000, "images that a clinic may ask about in all")
  minute_images: int = settings.setting(0, "images in any minute; 0 sets no limit")
  clinic_sessions: int = settings.setting(2, "sessions of a clinic at once")
  clinic_attempts: int = settings.setting(
    600, "attempts of a clinic to open a session in any minute, refused ones too; 0 sets no limit"
  )
  sessions: int = settings.setting(8, "sessions of all clinics at once")
  session_seconds: float = settings.setting(3600.0, "longest session")
  idle_seconds: float = settings.setting(600.0, "longest pause between two inferences")
  timeout: float = settings.setting(60.0, "longest wait for a message within an inference")


settings.define_flags(Serve)
settings.define_flags(Clinics)
flags.adopt_module_key_flags(settings)


def _checked(s: Serve, clinics: Clinics) -> None:
  for name, value in settings.flat(clinics).items():
    least = 0 if name in ("minute_images", "clinic_attempts") else 1e-3
    if not least <= value < float("inf"):
      raise ValueError(f"{name}={value}; use a positive number")
  for name in ("metrics_port", "health_port"):
    if not -1 <= getattr(s, name) < 2**16:
      raise ValueError(f"{name}={getattr(s, name)}; use 0 to 65535, or -1 for none")
  host_and_port("address", s.address, 0)
  if s.model_owner:
    host_and_port("model_owner", s.model_owner)
    if s.only_checked:
      raise ValueError(
        "only_checked with model_owner: the model owner has dealings checked; leave it out here"
      )


def main() -> None:
  s, clinics = settings.from_flags(Serve), settings.from_flags(Clinics)
  folder = role_folder(s.folder)
  _checked(s, clinics)
  wrong = ""
  try:
    inbox.collect(folder, inbox.HELPER if s.model_owner else inbox.MODEL_OWNER)
  except ValueError as error:  # one wrong delivery stops no server
    wrong = str(error)
  names = settings.names(s.models) or tuple(publications.names(folder))
  pinned = certificates.clinics(folder)
  known = list(pinned)
  cure = "copy the model owner's outbox/helper into inbox/model_owner" if s.model_owner else ""
  cure = cure or "run primia-publish"
  if not names:
    raise FileNotFoundError(f"folder={s.folder} holds no publication; {cure}")
  if missing := [name for name in names if not publications.is_published(folder, name)]:
    raise FileNotFoundError(
      f"models: {', '.join(missing)} of folder={s.folder} are not published; {cure}, or name "
      "others with --models"
    )
  is_shared = _is_shared(s, folder, names)
  if not known:
    raise FileNotFoundError(
      f"folder={s.folder} lets no clinic in; run primia-certificate --folder={s.folder} "
      "--clinic=CERTIFICATE"
    )
  if is_shared and not s.model_owner:
    publications.helper_of(folder)
  certificates.load(folder)
  contract = Contract(
    clinics.daily_images, clinics.total_images, clinics.minute_images, clinics.clinic_sessions,
    clinics.clinic_attempts,
  )  # fmt: skip
  limits = Limits(clinics.timeout, clinics.idle_seconds, clinics.sessions, clinics.session_seconds)
  journal = Journal(folder, contract, sys.stderr)
  try:
    if wrong:
      journal.note("inbox", reason=wrong)
    for name, pem in pinned.items():
      try:
        certificates.check_valid(pem)
      except Refused as error:
        journal.note("expired", clinic=name, reason=str(error))
    _serve(s, folder, names, known, is_shared, journal, limits)
  finally:
    journal.close()


def _is_shared(s: Serve, folder, names) -> bool:
  """Whether clinics only share their images, between this server and another."""
  kinds = {name: publications.is_shared(folder, name) for name in names}
  of = lambda kind: ", ".join(name for name in names if kinds[name] == kind)
  if s.model_owner:
    if of(False):
      raise ValueError(
        f"models: {of(False)} of folder={s.folder} need no helper; name others with --models"
      )
    for name in names:
      if any((publications.model_folder(folder, name) / secret).exists() for secret in _OTHERS):
        raise ValueError(
          f"folder={s.folder} holds secrets of the model owner or the dealer of {name}; the helper "
          "must be another institution, with a folder of its own"
        )
  elif of(True) and of(False):
    raise ValueError(
      f"models: clinics only share their images with {of(True)}, and not with {of(False)}; serve "
      "each kind from a folder of its own, or name one kind with --models"
    )
  return bool(of(True))


def _serve(
  s: Serve, folder, names, known, is_shared: bool, journal: Journal, limits: Limits
) -> None:
  stopping = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopping.set())
  models: list[Any] = []
  own = certificates.name((folder / certificates.CERTIFICATE).read_bytes())
  of = known  # for whom the dealer dealt
  if is_shared:
    of = [own if s.model_owner else certificates.name(publications.helper_of(folder))]
  stocks = []
  load = _served if not s.model_owner else helped.helped
  for name in names:
    start = time.perf_counter()
    models.append(load(folder, name, caching.programs()))
    took = round(time.perf_counter() - start, 2)
    journal.note("ready", model=name, seconds=took)
    place = publications.model_folder(folder, name)
    for who in of:
      stocks.append((who, name, place if s.model_owner else place / who))
      left = len(folders.unused(stocks[-1][2])) * models[-1].images
      journal.note("stock", model=name, clinic=who, images=left)
  with contextlib.ExitStack() as stack:
    unwell = []
    if s.metrics_port >= 0 or s.health_port >= 0:
      from primia_jax.service import monitoring

      if s.metrics_port >= 0:
        port = stack.enter_context(monitoring.metrics(s.metrics_port, journal, known, stocks))
        journal.note("metrics", address=f"{monitoring.LOOPBACK}:{port}")
    serving = folder, models, journal, s.address, limits, stopping
    if s.model_owner:
      server = helped.assisting(*serving, s.model_owner)
    else:
      serve = helped.serve if is_shared else institutions.serve_models
      server = serve(*serving, s.only_checked)
    port = stack.enter_context(server)
    if s.health_port >= 0:
      at, say = stack.enter_context(monitoring.healthy(s.health_port))
      unwell.append(say)
      journal.note("health", address=f"{monitoring.LOOPBACK}:{at}")
    journal.note("serving", address=f"{s.address.rpartition(':')[0]}:{port}")
    stopping.wait()
    journal.note("stopping", sessions=journal.sessions)
    for say in unwell:
      say()
    end = time.monotonic() + limits.timeout
    while journal.sessions and time.monotonic() < end:
      time.sleep(0.05)
  journal.note("stopped")


def _served(folder: pathlib.Path, name: str, programs: pathlib.Path) -> Served:
  kept = publications.kept(folder, name)
  opened_to = kept.about.opened_to
  online = multiprocess.online(kept.owner.plan, MODEL_OWNER, opens=not opened_to, kept=programs)
  kept.owner.warm_up()
  place = publications.model_folder(folder, name)
  return Served(
    name, place, kept.owner, kept.publication, online, kept.about.images, opened_to,
    functools.partial(_keep_score, place),
  )  # fmt: skip


def _keep_score(place: pathlib.Path, clinic: str, counts: np.ndarray) -> None:
  """Keeps a score that is opened to the model owner, in a file of its own."""
  moment = datetime.datetime.now(datetime.UTC)
  content = {"clinic": clinic, "time": moment.isoformat(), "counts": counts.tolist()}
  path = folders.make(place / clinic / "scores") / f"{moment:%Y%m%dT%H%M%S%f}.json"
  durable.create(path, (json.dumps(content) + "\n").encode())
  durable.sync_folder(path.parent)


if __name__ == "__main__":
  running.start(main, keeps_small=True)
