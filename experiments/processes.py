"""A federated run with one operating-system process for each site: starting them and joining them.

Each process reads its own site's images only and holds its own keys and secrets. Only messages of
the protocol of `primia_jax.secagg` cross between processes. The process of site 0 also hosts the
server, which learns sums only. Processes find each other's public keys in the run folder, under
`identities`, and pin them on first use. So a person who can write there while a run starts can
impersonate a site that has not joined yet.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from experiments.configs import Train
from primia_jax import sites
from primia_jax.privacy import ledger
from primia_jax.secagg import exchange, keys, transport

IDENTITIES = "identities"
_PATIENCE = 60.0  # seconds for the others to end when the first process has


class Place(NamedTuple):
  """Where the sites of an arm run.

  Attributes:
    placement: of the site axis.
    exchange: between processes of one site each; None where one process plays all.
    number: of this process's site; 0 where one process plays all.
  """

  placement: sites.Placement
  exchange: exchange.Exchange | None = None
  number: int = 0

  @property
  def is_first(self) -> bool:
    """Whether this process writes what all share."""
    return self.number == 0


class Seat(NamedTuple):
  """A process's place in a run.

  Attributes:
    number: of its site.
    address: HOST:PORT of the server.
    timeout: seconds that the others wait for a site in each stage of a sum; its training must fit
      in.
  """

  number: int
  address: str
  timeout: float


def connect(config: Train, folder: pathlib.Path, seat: Seat) -> Place:
  """Makes this process's identity, pins the others' and joins them.

  The process of site 0 removes the identities of an earlier start, makes all sites' ledgers equal,
  and only then listens. The others wait until it listens. So no process pins an old identity or
  continues from another ledger, in whatever order they are started.

  Raises:
    Lost: the others do not join in time.
    ValueError: the address is not HOST:PORT, or not an address of this machine.
  """
  host, _, port = seat.address.rpartition(":")
  is_place = host and port.isdecimal() and 0 < int(port) < 2**16
  if not is_place or not 0 <= seat.number < config.hospitals.num_sites:
    raise ValueError(
      f"coordinator={seat.address!r} with process_id={seat.number}: write HOST:PORT, and a site's "
      f"number below {config.hospitals.num_sites}"
    )
  address, known, server = (host, int(port)), folder / IDENTITIES, None
  if seat.number == 0:
    _clear(known)
    paths = [
      home(folder / "federated", i) / ledger.LEDGER for i in range(config.hospitals.num_sites)
    ]
    said = [ledger.public(path) for path in paths]
    for path in paths:
      ledger.reconcile(said, path)
    identity = keys.identity()
    try:
      listener = transport.listen(*address)
    except OSError as e:
      raise ValueError(
        f"coordinator={seat.address!r}: the first process cannot listen there ({e})"
      ) from e
    server = transport.Host(listener, config.hospitals.num_sites, seat.timeout, identity)
    exchange.publish(known, exchange.SERVER, identity)
  else:
    exchange.connect(address, seat.timeout, seat.timeout).close()
  own = keys.identity()
  exchange.publish(known, seat.number, own)
  pinned = exchange.pin(known, own, config.hospitals.num_sites, seat.timeout)
  run = json.dumps(dataclasses.asdict(config), sort_keys=True).encode()
  joined = exchange.Exchange(address, seat.number, pinned, run, seat.timeout, server)
  return Place(sites.own_process(seat.number), joined, seat.number)


def launch(module: str, arguments: Sequence[str], num_sites: int, folder: pathlib.Path) -> None:
  """Starts the processes on this machine and waits for them; shows the output of site 0's.

  A site whose process ends is lost to the run. The run continues while enough sites are left.

  Raises:
    RuntimeError: the process of site 0 failed, or another one ended before it took part; the
      message names the log.
  """
  children = start(module, arguments, num_sites, folder)
  # so that no child is left behind
  before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  try:
    lost = watch(children, folder)
  finally:
    signal.signal(signal.SIGTERM, before)
    for child in children:
      child.kill()
      child.wait()
  if lost:
    print(
      f"warning: sites {lost} were lost and took no part in later rounds; see "
      f"{_logs(folder, lost)}. They take part again when the run is started again",
      file=sys.stderr,
    )


def start(
  module: str, arguments: Sequence[str], num_sites: int, folder: pathlib.Path
) -> list[subprocess.Popen]:
  """Starts one process for each site, after removing older identities from the run folder."""
  _clear(folder / IDENTITIES)  # earlier than site 0 does, since `watch` looks there
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  children = []
  for i in range(num_sites):
    place = f"--coordinator={address}", f"--process_id={i}"
    command = [sys.executable, "-m", module, *arguments, *place]
    output = (folder / f"process_{i}.log").open("w") if i else None
    children.append(subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT))
  return children


def _clear(identities: pathlib.Path) -> None:
  shutil.rmtree(identities, ignore_errors=True)
  identities.mkdir(exist_ok=True)


def watch(children: Sequence[subprocess.Popen], folder: pathlib.Path) -> list[int]:
  """Waits for the end of a run; returns the sites that were lost; raises as `launch`."""
  lost: list[int] = []
  while children[0].poll() is None:
    for i, child in enumerate(children):
      if i in lost or not child.poll():
        continue
      if not (folder / IDENTITIES / exchange.file_name(i)).is_file():
        raise RuntimeError(
          f"the process of site {i} ended before it could take part; see {_logs(folder, [i])}"
        )
      lost.append(i)
      print(
        f"\nsite {i}'s process has ended, code {child.returncode}; see {_logs(folder, [i])}",
        file=sys.stderr,
      )
    time.sleep(0.1)
  end = time.monotonic() + _PATIENCE
  while any(child.poll() is None for child in children) and time.monotonic() < end:
    time.sleep(0.1)
  if children[0].returncode:
    others = _logs(folder, range(1, len(children)))
    raise RuntimeError(
      f"the process of site 0, which hosts the server, failed; see above and {others}. Start again "
      "with the same --run_dir to continue from the last saved round"
    )
  return [i for i, child in enumerate(children) if child.poll() != 0]


def home(folder: pathlib.Path, number: int) -> pathlib.Path:
  """Where a site's process keeps its own files: site 0 in the arm's folder, others below it."""
  return folder / f"site_{number}" if number else folder


def _logs(folder: pathlib.Path, numbers: Sequence[int]) -> str:
  return ", ".join(str(folder / f"process_{i}.log") for i in numbers)
