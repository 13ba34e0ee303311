"""One sum after another over sites that each run in their own process: `protocol` over `transport`.

Only `messages` cross between processes. One process hosts the server and is a site like all others;
all sites learn each sum and who is in it. The sites of a sum are the survivors of the one before,
whose list all have signed, so a lost site costs the others one timeout. It stays out until all
processes start again.

Who learns what: see `protocol`. Its bounds hold for the K sites that have begun: however many are
lost, no sum is over fewer than the quorum of K. That is more than two thirds of them, or more than
half with a threshold between half and two thirds, which assumes a server that follows the protocol.
The bounds cannot hide the difference of two sums of the same inputs, one with a site and one
without it: everyone learns that site's input.

The server announces the sums, so it could tell each site another one and make them train different
models, until only one site's update is left in a sum (Pasquini et al. 2022, "Eluding secure
aggregation in federated learning via model inconsistency"). Here every message of a sum is bound to
the state that its sender started from (`bind`) and to all sums that it was told since. Sites with
different ones refuse each other in the next sum, which then does not open.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import socket
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import ring
from primia_jax.secagg import graph, keys, protocol, rounds, transport
from primia_jax.secagg.errors import Lost
from primia_jax.secagg.masking import Row, SecureSum
from primia_jax.types import PyTree


class Pinned(NamedTuple):
  """The identities of a run.

  Attributes:
    own: this site's signing pair.
    sites: number to public key, of all sites.
    server: the server's public key.
  """

  own: keys.Identity
  sites: Mapping[int, bytes]
  server: bytes


class Begun(NamedTuple):
  """One sum that has begun, as this site has it.

  Attributes:
    rows: [1, ...], this site's number and the key of its noise, and no peers: the exchange masks.
    site: its state in the protocol, which holds its other keys.
    pending: the server's part, in the host's process.
  """

  rows: Row
  site: protocol.Site
  pending: transport.Pending | None


class Exchange:
  """One site's end of all sums of a run. It changes as sites are lost.

  Attributes:
    label: names this start of the run; the same at all sites.
    sites: the survivors of the last sum, which are the sites of the next.
  """

  def __init__(
    self,
    address: tuple[str, int],
    number: int,
    pinned: Pinned,
    run: bytes,
    timeout: float = 600.0,
    host: transport.Host | None = None,
  ):
    """Connects to the server.

    Args:
      address: the server's host and port.
      number: of this site.
      pinned: all identities.
      run: names the run and its configuration; sites with different ones refuse each other's
        messages.
      timeout: seconds that a stage may take; a site's work between `begin` and `finish` is part of
        one stage.
      host: the server, in the one process that hosts it.

    Raises:
      Lost: no server listens there.
    """
    self.sites = tuple(sorted(pinned.sites))
    self._number, self._pinned, self._host = number, pinned, host
    everybody = [*(pinned.sites[i] for i in self.sites), pinned.server]
    self.label = self._run = hashlib.sha256(b"".join(everybody) + run).digest()
    # One for all sums, made of all identities: only the site that publishes the last identity can
    # choose among circles of neighbours.
    self._graph_key = np.frombuffer(self._run, "<u4").astype(np.uint32)
    self._connection = connect(address, 2 * timeout, patience=0)  # the server's patience ends first
    self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def bind(self, public: bytes) -> None:
    """Binds all later sums to what this site continues from: only sites that bind the same bytes,
    in the same order, can take part in one sum.
    """
    self._run = hashlib.sha256(self._run + hashlib.sha256(public).digest()).digest()

  def begin(
    self, shapes: PyTree, round: int, purpose: int, config: SecureSum, min_survivors: int = 1
  ) -> Begun:
    """Agrees on this sum's keys, before the site works, so that the others see if it is lost.

    Args:
      shapes: of the ring elements that `finish` will be given.
      round, purpose: of the sum, the same at all sites.
      config: of the sum. Without a threshold, the least above two thirds of a site and its peers is
        taken.
      min_survivors: the fewest sites over which the sum may be opened.

    Raises:
      ValueError: for a config without masks, as `agree`, or as `rounds.setup`.
      Lost: the server has closed the connection, or too few sites are left for this sum.
      RoundFailed: in the host's process, where too few sites are left.
    """
    setup = agree(
      {i: self._pinned.sites[i] for i in self.sites},
      len(self._pinned.sites),
      [leaf.size for leaf in jax.tree.leaves(shapes)],
      purpose,
      config,
      min_survivors,
      self._run,
      self._graph_key,
    )
    pending = self._host.serve(setup, round) if self._host else None
    begin = lambda: transport.begin(self._connection, setup, round, self._number, self._pinned.own)
    site = self._saying(begin, round, pending)
    noise = jnp.asarray(keys.words(site.secrets.noise))[None]
    nobody = jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0, 8), jnp.uint32)
    rows = Row(jnp.full(1, self._number, jnp.int32), *nobody, None, noise)
    return Begun(rows, site, pending)

  def finish(self, begun: Begun, elements: PyTree) -> PyTree:
    """Masks this site's ring elements, sends them, and returns the sum over the survivors.

    Args:
      begun: from `begin`.
      elements: ring elements of the shapes given there, reduced or not, without masks.

    Returns:
      The sum in Z_2^k, as jax arrays; `sites` are then the survivors.

    Raises:
      Lost, RoundFailed: as `begin`.
      Refused: the server's message would make it unsafe to continue.
    """
    (_, site, pending), (leaves, structure) = begun, jax.tree.flatten(elements)
    vectors = [rounds.reduce(np.asarray(a).reshape(-1), site.setup) for a in leaves]
    finish = lambda: transport.finish(self._connection, site, vectors, self._pinned.server)
    joined = self._saying(finish, site.round, pending)
    if pending:
      pending.result()  # until all survivors have been told the sum
    self.sites = joined.lists.survivors
    told = [v.astype(v.dtype.newbyteorder("<"), copy=False).tobytes() for v in joined.total]
    self._run = hashlib.sha256(b"".join([self._run, *told])).digest()
    totals = zip(joined.total, leaves, strict=True)
    return jax.tree.unflatten(structure, [jnp.asarray(v.reshape(a.shape)) for v, a in totals])

  def close(self) -> None:
    """Leaves the run; the other sites continue without this one, unless it is the host."""
    self._connection.close()
    if self._host:
      self._host.close()

  def _saying(self, step, round: int, pending: transport.Pending | None):
    """Runs a step; explains a broken connection, in the host's process by the server's error."""
    try:
      return step()
    except OSError as e:
      if (
        pending
        and concurrent.futures.wait([pending], timeout=10).done
        and (error := pending.exception())
      ):
        raise error from e
      raise Lost(
        f"site {self._number} was declared lost in round {round}, or the round failed ({e}); the "
        f"server's process tells which. Start again to take part from the last round that was saved"
      ) from e


def agree(
  identities: Mapping[int, bytes],
  num_sites: int,
  sizes: Sequence[int],
  purpose: int,
  config: SecureSum,
  min_survivors: int,
  run: bytes,
  graph_key: np.ndarray,
) -> rounds.Setup:
  """The setup of a sum of vectors of these sizes, over the sites left of num_sites.

  Raises:
    ValueError: for a config without masks or for fewer sites, a ring that jax arrays cannot hold,
      or as `rounds.setup`.
    Lost: too few sites are left.
  """
  if not config.masked:
    raise ValueError("config.masked is False, and sites send masked elements only; set masked=True")
  if num_sites > config.num_sites:
    raise ValueError(
      f"config.num_sites={config.num_sites} for a run of {num_sites} sites, whose sum could "
      f"overflow; give secure_sum the number of sites"
    )
  ring.storage(config.fixed.num_bits)
  least = graph.smallest_threshold(config.num_peers + 1, malicious_server=True)
  threshold = least if config.threshold is None else config.threshold
  malicious = threshold >= least
  quorum = max(graph.smallest_threshold(num_sites, malicious), threshold, min_survivors)
  if len(identities) < min(quorum, num_sites):
    raise Lost(
      f"{len(identities)} of {num_sites} sites are left, and the next sum needs at least {quorum}. "
      f"Start all processes again to take every site back from the last round that was saved"
    )
  return rounds.setup(
    identities,
    sizes,
    run,
    num_bits=config.fixed.num_bits,
    graph_key=graph_key,
    threshold=threshold,
    quorum=quorum,
    degree=min(config.num_peers, len(identities) - 1),
    malicious_server=malicious,
    purpose=purpose,
  )


def connect(address: tuple[str, int], timeout: float, patience: float) -> socket.socket:
  """Connects to the server.

  Args:
    address: its host and port.
    timeout: of the connection, in seconds.
    patience: seconds for which to retry.

  Raises:
    Lost: no server listens there.
  """
  end = time.monotonic() + patience
  while True:
    try:
      return socket.create_connection(address, timeout)
    except OSError as e:
      if time.monotonic() >= end or isinstance(e, socket.gaierror):
        raise Lost(
          f"no server at {address[0]}:{address[1]} ({e}); start the first process, which hosts it"
        ) from e
    time.sleep(0.1)
