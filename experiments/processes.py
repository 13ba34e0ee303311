"""A federated run with one operating-system process for each site: starting them and joining them.

A trial on one machine: what crosses between processes is signed, and updates are masked, but models
and sums are not encrypted. Each process holds its own keys and secrets. What it keeps lies in a
folder of its own, closed to all other users: identity, log, ledger, its site's state, and a record
of the global states that it has seen. In the run folder, which all processes read, are the messages
by which they meet (`secagg.meeting`) and what everybody may know: the global checkpoint and sums.
The process of site 0 also hosts the server, which learns sums only.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from primia_jax import sites
from primia_jax.secagg import exchange, meeting, transport
from primia_jax.secagg import messages as msg

from .configs import Train

MEETING = "meeting"  # in the run folder
_LOG = "log"
_PATIENCE = 60.0  # seconds for the others to end when the first process has


class Joined(NamedTuple):
  """What a process needs to agree with the others, where each site has one.

  Attributes:
    exchange: its end of all sums.
    pinned: the identities of all.
    settings: of the run, as bytes.
    own: the folder of its own.
    meeting: the folder of the messages by which all meet.
    timeout: seconds to wait for the others' messages there.
    num_colluding: sites that may collude with the server.
  """

  exchange: exchange.Exchange
  pinned: exchange.Pinned
  settings: bytes
  own: pathlib.Path
  meeting: pathlib.Path
  timeout: float
  num_colluding: int


class Place(NamedTuple):
  """Where the sites of an arm run.

  Attributes:
    placement: of the site axis.
    joined: where each site has a process; None where one process plays all.
    number: of this process's site; 0 where one process plays all.
  """

  placement: sites.Placement
  joined: Joined | None = None
  number: int = 0

  @property
  def exchange(self) -> exchange.Exchange | None:
    """Between processes of one site each."""
    return self.joined and self.joined.exchange

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
    own: the folder of its own, from `own_folder`.
    is_protected: whether the network between the processes is encrypted by other means.
  """

  number: int
  address: str
  timeout: float
  own: pathlib.Path
  is_protected: bool = False


def sites_folder(folder: pathlib.Path, named: str) -> pathlib.Path:
  """Where the sites' own folders lie: as named, or beside the run folder.

  Raises:
    ValueError: it is within the run folder, which all sites read.
  """
  folder = folder.resolve()
  place = pathlib.Path(named).resolve() if named else folder.with_name(f"{folder.name}.sites")
  if place.is_relative_to(folder):
    raise ValueError(
      f"sites_dir={named} is within the run folder, which all sites read; name another one"
    )
  return place


def own_folder(place: pathlib.Path, number: int) -> pathlib.Path:
  """A site's own folder, made where it is missing.

  Raises:
    ValueError: other users can read it, or it belongs to one of them.
  """
  own = place / f"site_{number}"
  place.mkdir(parents=True, exist_ok=True)
  own.mkdir(mode=0o700, exist_ok=True)
  found = own.stat()
  if found.st_mode & 0o077 or found.st_uid != os.getuid():
    raise ValueError(
      f"{own} holds the secrets of site {number}, and other users can read it or own it; chmod it "
      "to 700, or use another --sites_dir"
    )
  return own


def connect(
  config: Train, folder: pathlib.Path, seat: Seat, told: bytes = b""
) -> tuple[Place, dict[int, bytes]]:
  """Says hello to the others with this site's own identity, pins theirs and joins them.

  The process of site 0 removes the messages of an earlier start and only then listens. The others
  wait until it listens. So no process reads an old message, in whatever order they are started.

  Args:
    config: of the run.
    folder: of the run.
    seat: of this process.
    told: what all others may know of this site.

  Returns:
    (this process's place, what each site has told).

  Raises:
    Lost: the others do not join in time.
    Refused: a site shows another identity than at an earlier start.
    ValueError: the address is not HOST:PORT, or not an address of this machine.
  """
  num_sites, server = config.hospitals.num_sites, None
  address = check_address(seat.address, seat.number, num_sites, seat.is_protected)
  at = folder / MEETING
  if seat.number == 0:
    _clear(at)
    identity = meeting.own_identity(seat.own / "server_identity")
    try:
      listener = transport.listen(*address)
    except OSError as e:
      raise ValueError(
        f"coordinator={seat.address!r}: the first process cannot listen there ({e})"
      ) from e
    server = transport.Host(listener, num_sites, seat.timeout, identity)
  else:
    exchange.connect(address, seat.timeout, seat.timeout).close()
  own = meeting.own_identity(seat.own / "identity")
  hosted = identity.public if server else b""
  meeting.publish(at, meeting.hello(own, seat.number, told, hosted))
  settings = settings_of(config)
  try:
    hellos = meeting.gather(at, msg.Hello, num_sites, seat.timeout)
    pinned = meeting.pin(hellos, own, seat.number, seat.own / "identities.json")
    run = settings + b"".join(msg.encode(hellos[i]) for i in range(num_sites))
    sums = exchange.Exchange(address, seat.number, pinned, run, seat.timeout, server)
  except BaseException:
    if server:
      server.close()
    raise
  colluding = config.aggregation.num_colluding(num_sites)
  joined = Joined(sums, pinned, settings, seat.own, at, seat.timeout, colluding)
  place = Place(sites.own_process(seat.number), joined, seat.number)
  return place, {i: message.told for i, message in hellos.items()}


def settings_of(config: Train) -> bytes:
  """The settings of a run, as all sites agree on them."""
  return json.dumps(dataclasses.asdict(config), sort_keys=True).encode()


def check_address(text: str, number: int, num_sites: int, is_protected: bool) -> tuple[str, int]:
  """The server's address, as a number, so that no name is looked up twice; arguments as in `Seat`.

  Raises:
    ValueError: it is not HOST:PORT, or not an address of this machine.
  """
  host, _, port = text.rpartition(":")
  is_place = host and port.isdecimal() and 0 < int(port) < 2**16
  if not is_place or not 0 <= number < num_sites:
    raise ValueError(
      f"coordinator={text!r} with process_id={number}: write HOST:PORT, and a site's "
      f"number below {num_sites}"
    )
  try:
    found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
  except OSError as e:
    raise ValueError(f"coordinator={text!r}: there is no such host ({e})") from e
  if not ipaddress.ip_address(found).is_loopback and not is_protected:
    raise ValueError(
      f"coordinator={text!r} is no loopback address, and models and sums would travel in "
      "the clear. Use 127.0.0.1:PORT; or --network_is_protected if the network between the "
      "processes is encrypted by other means, such as a VPN"
    )
  return str(found), int(port)


def launch(
  module: str, arguments: Sequence[str], num_sites: int, folder: pathlib.Path, own: pathlib.Path
) -> None:
  """Starts the processes on this machine and waits for them; shows the output of site 0's.

  A site whose process ends is lost to the run. The run continues while enough sites are left.

  Args:
    module: of the binary.
    arguments: of each process.
    num_sites: how many to start.
    folder: of the run.
    own: where the sites' own folders lie.

  Raises:
    RuntimeError: the process of site 0 failed, or another one ended before it took part; the
      message names the log.
  """
  children = start(module, arguments, num_sites, folder, own)
  # so that no child is left behind
  before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  try:
    lost = watch(children, folder, own)
  finally:
    signal.signal(signal.SIGTERM, before)
    for child in children:
      child.kill()
      child.wait()
  if lost:
    print(
      f"warning: sites {lost} were lost and took no part in later rounds; see "
      f"{_logs(own, lost)}. They take part again when the run is started again",
      file=sys.stderr,
    )


def start(
  module: str, arguments: Sequence[str], num_sites: int, folder: pathlib.Path, own: pathlib.Path
) -> list[subprocess.Popen]:
  """Starts one process for each site, after removing older messages; arguments as `launch`."""
  _clear(folder / MEETING)  # earlier than site 0 does, since `watch` looks there
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  children = []
  for i in range(num_sites):
    place = f"--coordinator={address}", f"--process_id={i}"
    command = [sys.executable, "-m", module, *arguments, *place]
    output = (own_folder(own, i) / _LOG).open("w") if i else None
    children.append(subprocess.Popen(command, stdout=output, stderr=output and subprocess.STDOUT))
  return children


def _clear(at: pathlib.Path) -> None:
  shutil.rmtree(at, ignore_errors=True)
  at.mkdir(exist_ok=True)


def watch(
  children: Sequence[subprocess.Popen], folder: pathlib.Path, own: pathlib.Path
) -> list[int]:
  """Waits for the end of a run; returns the sites that were lost; raises as `launch`."""
  lost: list[int] = []
  while children[0].poll() is None:
    for i, child in enumerate(children):
      if i in lost or not child.poll():
        continue
      if not (folder / MEETING / meeting.file_name(msg.Start, i)).is_file():
        raise RuntimeError(
          f"the process of site {i} ended before it could take part; see {_logs(own, [i])}"
        )
      lost.append(i)
      print(
        f"\nsite {i}'s process has ended, code {child.returncode}; see {_logs(own, [i])}",
        file=sys.stderr,
      )
    time.sleep(0.1)
  end = time.monotonic() + _PATIENCE
  while any(child.poll() is None for child in children) and time.monotonic() < end:
    time.sleep(0.1)
  if children[0].returncode:
    others = _logs(own, range(1, len(children)))
    raise RuntimeError(
      f"the process of site 0, which hosts the server, failed; see above and {others}. Start again "
      "with the same --run_dir to continue from the last saved round"
    )
  return [i for i, child in enumerate(children) if child.poll() != 0]


def _logs(own: pathlib.Path, numbers: Sequence[int]) -> str:
  return ", ".join(str(own / f"site_{i}" / _LOG) for i in numbers)
