"""Many sessions of encrypted inference with one server, for `benchmarks.service --case=load`.

The model owner's server is a process of its own. The benchmark plays the dealer and eight clinics,
each with a certificate, a folder, correlations and images of its own. Every answer is compared, bit
for bit, with the integer model of the clinic's own image.
"""

from __future__ import annotations

import concurrent.futures
import pathlib
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks import measuring
from primia_jax import mpc
from primia_jax.mpc import clear, multiprocess, planning
from primia_jax.mpc.sharing import DATA_OWNER
from primia_jax.service import certificates, folders, institutions
from primia_jax.service.channel import Limits
from primia_jax.service.errors import SessionEnded

CLINICS = tuple(f"clinic-{i}" for i in range(8))
IN_A_ROW, AT_ONCE, EACH = 100, 8, 25  # sessions; clinics, and requests of each
_MEMORY_AT = (10, IN_A_ROW)
_GROWTH = 1.05  # of the server's memory between these two


class Load(NamedTuple):
  """What the clinics need to ask.

  Attributes:
    root: the folder of the roles' folders.
    owner: the data owner's part, the same for all clinics but for their correlations.
    address: of the server.
    images: [clinics, images, ...] each clinic's own.
    want: the integer model's answer to each.
  """

  root: pathlib.Path
  owner: mpc.DataOwner
  online: multiprocess.Online
  publication: str
  address: str
  images: np.ndarray
  want: np.ndarray

  def session(self, clinic: int) -> Any:
    """A session of a clinic, as a context."""
    server = (self.root / "model_owner" / certificates.CERTIFICATE).read_bytes()
    return institutions.ask(
      self.root / CLINICS[clinic], self.owner, self.publication, self.address, server,
      self.online, Limits(idle=3600.0),
    )  # fmt: skip

  def right(self, session: institutions.Clinic, clinic: int, number: int) -> bool:
    """Asks about one of a clinic's images: whether the answer is that of this image."""
    which = number % self.images.shape[1]
    got = np.asarray(session.ask(self.images[clinic, which]))
    return bool(np.array_equal(got, self.want[clinic, which]))


def admit(root: pathlib.Path) -> None:
  """Makes each clinic's folder and certificate, and gives the certificate to the model owner."""
  for name in CLINICS:
    own = certificates.create(folders.make(root / name), name)
    shutil.copy(own, root / "model_owner" / institutions.CLINICS / f"{name}.pem")


def deal(dealer: mpc.Dealer, root: pathlib.Path) -> None:
  """Correlations for every request of `run`."""
  for name in CLINICS:
    count = -(-IN_A_ROW // len(CLINICS)) + 1 + EACH
    folders.deal(dealer, count, root / "model_owner" / name, root / name)


def run(
  what: str,
  plan: planning.Plan,
  weights: Any,
  shape: tuple[int, ...],
  root: pathlib.Path,
  port: int,
  server: subprocess.Popen,
) -> None:
  """Prints lost and mixed-up sessions, the server's memory, and requests a second."""
  publication, images = mpc.read(root / "publication"), _images(shape)
  check = clear.checker(plan)
  want = np.stack([np.stack([check((weights, x)) for x in own]) for own in images])
  each = want.reshape(-1, *want.shape[3:])
  assert len(np.unique(each, axis=0)) == len(each), "two images have one answer"
  load = Load(
    root, mpc.DataOwner(plan, publication), multiprocess.online(plan, DATA_OWNER),
    publication.publication, f"127.0.0.1:{port}", images, want,
  )  # fmt: skip
  with load.session(0) as session:  # compiles
    load.right(session, 0, 0)
  memory, seconds, ends = {}, [], []
  for number in range(IN_A_ROW):
    clinic, start = number % len(CLINICS), time.perf_counter()
    ends.append(_ended(lambda c=clinic, n=number: [_one_session(load, c, n)]))
    seconds.append(time.perf_counter() - start)
    if number + 1 in _MEMORY_AT:
      memory[number + 1] = _resident(server)
  _say_ends(f"of {IN_A_ROW} sessions in a row: {what}", ends)
  measuring.say(f"a session with one request, in a row: {what}", seconds, "s", None)
  start = time.perf_counter()
  with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
    each = [pool.submit(_ended, lambda c=c: _requests(load, c)) for c in range(AT_ONCE)]
    ends = [one.result() for one in each]
  took = time.perf_counter() - start
  _say_ends(f"of {AT_ONCE} sessions at once, {EACH} requests each: {what}", ends)
  measuring.say(
    f"requests a second of {AT_ONCE} clinics at once: {what}", [AT_ONCE * EACH / took], "1/s", None
  )
  first, last = (memory[at] for at in _MEMORY_AT)
  measuring.say(
    f"the server's memory after session {_MEMORY_AT[1]} over session {_MEMORY_AT[0]}: {what}",
    [last / first], "ratio", _GROWTH, mib=[round(v / 2**20) for v in (first, last)],
    after_all=round(_resident(server) / 2**20),
  )  # fmt: skip


def _images(shape: tuple[int, ...]) -> np.ndarray:
  """[clinics, 4, *shape] random images, all different."""
  rng = np.random.default_rng(7)
  return rng.standard_normal((len(CLINICS), 4, *shape)).clip(-3, 3).astype(np.float32)


def _one_session(load: Load, clinic: int, number: int) -> bool:
  with load.session(clinic) as session:
    return load.right(session, clinic, number)


def _requests(load: Load, clinic: int) -> list[bool]:
  with load.session(clinic) as session:
    return [load.right(session, clinic, number) for number in range(EACH)]


def _ended(fn: Callable[[], list[bool]]) -> list[bool] | SessionEnded:
  try:
    return fn()
  except SessionEnded as error:
    return error


def _say_ends(what: str, ends: list[list[bool] | SessionEnded]) -> None:
  lost = [str(end) for end in ends if isinstance(end, SessionEnded)]
  mixed = sum(not right for end in ends if isinstance(end, list) for right in end)
  measuring.say(f"lost {what}", [len(lost)], "sessions", 0, why=sorted(set(lost)))
  measuring.say(f"answers of another image {what}", [mixed], "answers", 0)


def _resident(process: subprocess.Popen) -> int:
  """Bytes that a process holds in memory."""
  pages = int(pathlib.Path(f"/proc/{process.pid}/statm").read_text().split()[1])
  return pages * 4096
