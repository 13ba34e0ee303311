"""Sums over sites that each run in a process of their own: `protocol` over `transport`, one sum
after another.

What crosses between processes is `messages`, and nothing else. One process is host to the server
and is a site like all others; all of them learn each sum, and who is in it. The sites of a sum are
the survivors of the one before, whose list all have signed, so that a site that is lost costs its
timeout once. It stays out until all start again.

Who learns what: see `protocol`. The bounds there are kept for the K sites that have begun: however
many are lost, no sum is over fewer than the quorum of K, which is more than two thirds of them, or
more than half under a threshold between half and two thirds, which takes a server that follows the
protocol. What these bounds cannot hide is the difference of two sums of the same inputs, one with a
site and one without it: all learn such a site's input.

The server tells the sums, so it could tell each site another and have them train different models,
until one site's update is all that is left in a sum (Pasquini et al. 2022, "Eluding secure
aggregation in federated learning via model inconsistency"). Here every message of a sum is bound to
all sums that its sender was told before: sites that were told different ones refuse each other from
the next sum on, which then does not open.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import pathlib
import socket
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import ring
from primia_jax.secagg import graph, keys, protocol, rounds, transport
from primia_jax.types import PyTree

SERVER = "server"  # whose identity this is


class Lost(RuntimeError):
  """This site is out of the run, or there is none any more."""


class Terms(NamedTuple):
  """What a sum is for, and how it is masked.

  Attributes:
    round, purpose: of the sum.
    num_bits: k, of the ring.
    num_peers: P, of each site.
    threshold: t of the P + 1 holders of a site's shares; None for the least above two thirds.
    min_survivors: no sum is opened over fewer.
  """

  round: int
  purpose: int
  num_bits: int
  num_peers: int
  threshold: int | None
  min_survivors: int


class Pinned(NamedTuple):
  """Who is who in a run.

  Attributes:
    own: this site's pair.
    sites: number to public key, of all sites.
    server: the server's public key.
  """

  own: keys.Identity
  sites: Mapping[int, bytes]
  server: bytes


class Exchange:
  """One process's end of all sums of a run; see `sites.Exchange`. It changes as sites are lost.

  Attributes:
    sites: the survivors of the last sum, who are to be in the next.
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
      address: the server's.
      number: of this process's site.
      pinned: all identities.
      run: names the run and its configuration; sites with different ones refuse each other's
        messages.
      timeout: seconds that a stage may take; a site's work between `begin` and `finish` is within
        one.
      host: the server, in the one process that has it.

    Raises:
      Lost: nobody listens there.
    """
    self.sites = tuple(sorted(pinned.sites))
    self._number, self._pinned, self._host = number, pinned, host
    everybody = [*(pinned.sites[i] for i in self.sites), pinned.server]
    self._run = hashlib.sha256(b"".join(everybody) + run).digest()
    # Of all identities, so that nobody but who publishes the last can choose among circles of
    # neighbours; for all sums.
    self._graph_key = np.frombuffer(self._run, "<u4").astype(np.uint32)
    self._connection = connect(address, 2 * timeout, patience=0)  # the server's patience ends first
    self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

  def begin(self, shapes: PyTree, terms: Terms) -> tuple[protocol.Site, transport.Pending | None]:
    """This site's part up to its shares, so that the server knows it for one that works.

    Args:
      shapes: of the ring elements.
      terms: of the sum.

    Raises:
      Lost: the server has closed the connection, or too few sites are left for this sum.
      RoundFailed: in the host's process, where too few sites are left.
    """
    setup = agree(
      {i: self._pinned.sites[i] for i in self.sites},
      len(self._pinned.sites),
      shapes,
      terms,
      self._run,
      self._graph_key,
    )
    pending = self._host.serve(setup, terms.round) if self._host else None
    begin = lambda: transport.begin(
      self._connection, setup, terms.round, self._number, self._pinned.own
    )
    return self._saying(begin, terms.round, pending), pending

  def finish(
    self, begun: tuple[protocol.Site, transport.Pending | None], elements: PyTree
  ) -> PyTree:
    """The sum over the survivors, as jax arrays; raises as `begin`."""
    (site, pending), (leaves, structure) = begun, jax.tree.flatten(elements)
    vector = rounds.reduce(np.concatenate([np.asarray(a).reshape(-1) for a in leaves]), site.setup)
    finish = lambda: transport.finish(self._connection, site, [vector], self._pinned.server)
    joined = self._saying(finish, site.round, pending)
    if pending:
      pending.result()  # until all survivors have been told the sum
    self.sites = joined.lists.survivors
    (total,) = joined.total
    self._run = hashlib.sha256(
      self._run + total.astype(total.dtype.newbyteorder("<"), copy=False).tobytes()
    ).digest()
    parts = np.split(total, np.cumsum([a.size for a in leaves])[:-1])
    return jax.tree.unflatten(
      structure, [jnp.asarray(v.reshape(a.shape)) for v, a in zip(parts, leaves, strict=True)]
    )

  def close(self) -> None:
    """Leaves; what is left of the others goes on without this site, unless it is the host."""
    self._connection.close()
    if self._host:
      self._host.close()

  def _saying(self, step, round: int, pending: transport.Pending | None):
    """Runs a step; says what a broken connection means, and in the host's process why the server
    broke it.
    """
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
        f"server's process says "
        "which. Start again to take part from the last round that was saved"
      ) from e


def agree(
  identities: Mapping[int, bytes],
  num_sites: int,
  shapes: PyTree,
  terms: Terms,
  run: bytes,
  graph_key: np.ndarray,
) -> rounds.Setup:
  """What the sites that are left, of num_sites, agree on for a sum.

  Raises:
    ValueError: as `rounds.setup`, and for a ring that jax arrays cannot hold.
  """
  ring.storage(terms.num_bits)
  holders = terms.num_peers + 1
  least = graph.smallest_threshold(holders, malicious_server=True)
  threshold = least if terms.threshold is None else terms.threshold
  malicious = threshold >= least
  quorum = max(graph.smallest_threshold(num_sites, malicious), threshold, terms.min_survivors)
  if len(identities) < min(quorum, num_sites):
    raise Lost(
      f"{len(identities)} of {num_sites} sites are left, and the next sum is over {quorum} at "
      f"least. Start again to "
      "take all back from the last round that was saved"
    )
  size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
  return rounds.setup(
    identities,
    [size],
    run,
    num_bits=terms.num_bits,
    graph_key=graph_key,
    threshold=threshold,
    quorum=quorum,
    degree=min(terms.num_peers, len(identities) - 1),
    malicious_server=malicious,
    purpose=terms.purpose,
  )


def connect(address: tuple[str, int], timeout: float, patience: float) -> socket.socket:
  """A connection to the server, for which it waits so many seconds.

  Raises:
    Lost: nobody listens there.
  """
  end = time.monotonic() + patience
  while True:
    try:
      return socket.create_connection(address, timeout)
    except OSError as e:
      if time.monotonic() >= end or isinstance(e, socket.gaierror):
        raise Lost(
          f"no server at {address[0]}:{address[1]} ({e}); has the first process started?"
        ) from e
    time.sleep(0.1)


def publish(folder: pathlib.Path, name: int | str, identity: keys.Identity) -> None:
  """Writes the public half of an identity where the others look for it."""
  path = folder / file_name(name)
  part = path.with_suffix(".part")
  part.write_bytes(identity.public)
  part.replace(path)


def pin(folder: pathlib.Path, own: keys.Identity, num_sites: int, timeout: float) -> Pinned:
  """Waits for all identities and pins them: trust on first use, of whoever can write to the folder.

  Raises:
    Lost: some are missing.
    ValueError: one is no public key.
  """
  end, names = time.monotonic() + timeout, [*range(num_sites), SERVER]
  while missing := [name for name in names if not (folder / file_name(name)).is_file()]:
    if time.monotonic() > end:
      raise Lost(
        f"no identity of {missing} in {folder} after {timeout:g} seconds; have their processes "
        f"started?"
      )
    time.sleep(0.02)
  public = {name: (folder / file_name(name)).read_bytes() for name in names}
  if wrong := [name for name, key in public.items() if len(key) != keys.KEY_BYTES]:
    raise ValueError(
      f"the identities of {wrong} in {folder} are no public keys of {keys.KEY_BYTES} bytes"
    )
  return Pinned(own, {i: public[i] for i in range(num_sites)}, public[SERVER])


def file_name(name: int | str) -> str:
  """Of an identity, a site's or the server's."""
  return f"{name}.pub" if name == SERVER else f"site_{name}.pub"
