"""Model owner: answers clinics that ask about encrypted images.

  primia-serve --folder=vendor --address=0.0.0.0:7443

It serves every publication in the folder to the clinics whose certificates were let in
(primia-certificate --clinic). Each image costs its clinic a query of a budget that is kept on disk,
in audit.jsonl, with who asked when and how it ended. SIGTERM or Ctrl-C finishes the inferences at
work and begins no other.
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

import numpy as np
from absl import flags

from primia_jax import durable
from primia_jax.mpc import apart
from primia_jax.mpc.sharing import MODEL_OWNER
from primia_jax.service import certificates, folders, inbox, institutions, publications
from primia_jax.service.channel import Limits
from primia_jax.service.institutions import Served
from primia_jax.service.journal import Contract, Journal

from . import running, settings
from .folders import role_folder


@dataclasses.dataclass(frozen=True)
class Serve:
  """What is served, and where."""

  folder: str = settings.setting("", "the model owner's own folder, of mode 0700")
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
  sessions: int = settings.setting(8, "sessions of all clinics at once")
  session_seconds: float = settings.setting(3600.0, "longest session")
  idle_seconds: float = settings.setting(600.0, "longest pause between two inferences")
  timeout: float = settings.setting(60.0, "longest wait for a message within an inference")


settings.define_flags(Serve)
settings.define_flags(Clinics)
flags.adopt_module_key_flags(settings)


def _checked(s: Serve, clinics: Clinics) -> None:
  for name, value in settings.flat(clinics).items():
    least = 0 if name == "minute_images" else 1e-3
    if not least <= value < float("inf"):
      raise ValueError(f"{name}={value}; use a positive number")
  for name in ("metrics_port", "health_port"):
    if not -1 <= getattr(s, name) < 2**16:
      raise ValueError(f"{name}={getattr(s, name)}; use 0 to 65535, or -1 for none")
  check_address("address", s.address, 0)


def check_address(name: str, value: str, least: int = 1) -> None:
  """Raises ValueError unless a flag's value is HOST:PORT."""
  host, _, port = value.rpartition(":")
  if not host or not port.isdecimal() or not least <= int(port) < 2**16:
    raise ValueError(f"{name}={value!r}; use HOST:PORT, such as 127.0.0.1:7443")


def main() -> None:
  s, clinics = settings.from_flags(Serve), settings.from_flags(Clinics)
  folder = role_folder(s.folder)
  _checked(s, clinics)
  inbox.collect(folder, inbox.MODEL_OWNER)
  names = settings.names(s.models) or tuple(publications.names(folder))
  known = [path.stem for path in sorted((folder / institutions.CLINICS).glob("*.pem"))]
  if not names:
    raise FileNotFoundError(f"folder={s.folder} holds no publication; run primia-publish")
  if missing := [name for name in names if not publications.is_published(folder, name)]:
    raise FileNotFoundError(
      f"models: {', '.join(missing)} of folder={s.folder} are not published; run primia-publish, "
      "or name others with --models"
    )
  if not known:
    raise FileNotFoundError(
      f"folder={s.folder} lets no clinic in; run primia-certificate --folder={s.folder} "
      "--clinic=CERTIFICATE"
    )
  certificates.load(folder)
  contract = Contract(
    clinics.daily_images, clinics.total_images, clinics.minute_images, clinics.clinic_sessions
  )
  limits = Limits(clinics.timeout, clinics.idle_seconds, clinics.sessions, clinics.session_seconds)
  journal = Journal(folder, contract, sys.stderr)
  try:
    _serve(s, folder, names, known, journal, limits)
  finally:
    journal.close()


def _serve(s: Serve, folder, names, known, journal: Journal, limits: Limits) -> None:
  stopping = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopping.set())
  models = []
  for name in names:
    start = time.perf_counter()
    kept = publications.kept(folder, name)
    opened_to = kept.about.opened_to
    online = apart.online(kept.owner.plan, MODEL_OWNER, opens=not opened_to)
    kept.owner.warm_up()
    place = publications.model_folder(folder, name)
    models.append(
      Served(
        name, place, kept.owner, kept.publication, online, kept.about.images, opened_to,
        functools.partial(_keep_score, place),
      )
    )  # fmt: skip
    took = round(time.perf_counter() - start, 2)
    journal.note("ready", model=name, seconds=took)
    for clinic in known:
      left = len(folders.unused(place / clinic)) * kept.about.images
      journal.note("stock", model=name, clinic=clinic, images=left)
  with contextlib.ExitStack() as stack:
    unwell = []
    if s.metrics_port >= 0 or s.health_port >= 0:
      from primia_jax.service import monitoring

      if s.metrics_port >= 0:
        port = stack.enter_context(monitoring.metrics(s.metrics_port, journal, models, known))
        journal.note("metrics", address=f"{monitoring.LOOPBACK}:{port}")
    port = stack.enter_context(
      institutions.serve_models(
        folder, models, journal, s.address, limits, stopping, s.only_checked
      )
    )
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


def _keep_score(place: pathlib.Path, clinic: str, counts: np.ndarray) -> None:
  """Keeps a score that is opened to the model owner, in a file of its own."""
  moment = datetime.datetime.now(datetime.UTC)
  content = {"clinic": clinic, "time": moment.isoformat(), "counts": counts.tolist()}
  path = folders.make(place / clinic / "scores") / f"{moment:%Y%m%dT%H%M%S%f}.json"
  durable.create(path, (json.dumps(content) + "\n").encode())
  durable.sync_folder(path.parent)


if __name__ == "__main__":
  running.start(main, keeps_small=True)
