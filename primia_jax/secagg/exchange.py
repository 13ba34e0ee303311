"""One sum after another over sites that each run in their own process: `protocol` over a carrier.

Only `messages` cross between processes; a coordinator, which is no site, opens the sums
(`coordinator`). All sites learn each sum and who is in it. A sum is over all sites that are left,
or over some of them, and is told to the others (`following`). The sites that it has lost are in no
later one: all know them from the list of survivors, which is signed. So a lost site costs the
others one timeout. It stays out until it comes back (`returning`), or all start again.

Who learns what: see `protocol`. Its bounds hold for the K sites of the run, or of the round where
it takes some: however many are lost, no sum is over fewer than the quorum of these K. That is
more than two thirds of them, or more than half with a threshold between half and two thirds, which
assumes a server that follows the protocol.
The bounds cannot hide the difference of two sums of the same inputs, one with a site and one
without it: everyone learns that site's input. So a site is asked before it sends the message that
opens a sum (`Exchange.opens`), and can refuse the second one.

The coordinator announces the sums, so it could tell each site another one and make them train
different models, until only one site's update is left in a sum (Pasquini et al. 2022, "Eluding
secure aggregation in federated learning via model inconsistency"). Here every message of a sum is
bound to the state that its sender started from (`bind`) and to all sums that it was told since.
Sites with different ones refuse each other in the next sum, which then does not open.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from primia_jax import ring
from primia_jax.secagg import carrier as carrying
from primia_jax.secagg import following, graph, keys, protocol, rounds
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import Carrier
from primia_jax.secagg.errors import Lost, Refused, RoundAborted
from primia_jax.secagg.masking import Row, SecureSum
from primia_jax.types import PyTree


class Pinned(NamedTuple):
  """The identities of a run.

  Attributes:
    own: this site's signing pair.
    sites: number to public key, of all sites.
    server: the coordinator's public key.
  """

  own: keys.Identity
  sites: Mapping[int, bytes]
  server: bytes


class Begun(NamedTuple):
  """One sum that has begun, as this site has it.

  Attributes:
    rows: [1, ...], this site's number and the key of its noise, and no peers: the exchange masks.
    site: its state in the protocol, which holds its other keys. Both are None where the site is not
      in the sum, and follows it.
    setup, round: of the sum.
    shapes: of its ring elements.
  """

  rows: Row | None
  site: protocol.Site | None
  setup: rounds.Setup
  round: int
  shapes: PyTree


class Opening(NamedTuple):
  """A sum that a site's next message opens.

  Attributes:
    round, purpose: of the sum.
    sites: number to public key, of all sites in it.
    digest: SHA-256 of this site's own ring elements, without masks.
  """

  round: int
  purpose: int
  sites: Mapping[int, bytes]
  digest: bytes


class Exchange:
  """One site's end of all sums of a run. It changes as sites are lost.

  Attributes:
    label: names this start of the run; the same at all sites.
    sites: those that are left: all but those that were lost and are not back.
    survivors: the sites in the last sum.
    opens: called before this site sends the message that opens a sum; raises to refuse it.
  """

  def __init__(self, carrier: Carrier, number: int, pinned: Pinned, run: bytes):
    """Makes a site's end, over a carrier whose last request is not yet answered.

    Args:
      carrier: to the coordinator.
      number: of this site.
      pinned: all identities.
      run: names the run and its configuration; sites with different ones refuse each other's
        messages.
    """
    self.sites = self.survivors = tuple(sorted(pinned.sites))
    self.opens: Callable[[Opening], None] = lambda opening: None
    self._number, self._pinned, self._carrier = number, pinned, carrier
    everybody = [*(pinned.sites[i] for i in self.sites), pinned.server]
    self.label = self._run = hashlib.sha256(b"".join(everybody) + run).digest()
    # One for all sums, made of all identities: only the site that publishes the last identity can
    # choose among circles of neighbours.
    self._graph_key = np.frombuffer(self._run, "<u4").astype(np.uint32)

  def bind(self, public: bytes) -> None:
    """Binds all later sums to what this site continues from: only sites that bind the same bytes,
    in the same order, can take part in one sum.
    """
    self._run = hashlib.sha256(self._run + hashlib.sha256(public).digest()).digest()

  @property
  def chain(self) -> bytes:
    """What the next sum is bound to: 32 bytes."""
    return self._run

  def resume(self, chain: bytes, sites: Sequence[int]) -> None:
    """Goes on where the others are, after `returning` has checked what they have signed.

    Args:
      chain: theirs.
      sites: those that are left.
    """
    self._run, self.sites = chain, tuple(sorted(sites))

  def admit(self, start: msg.Start) -> None:
    """Takes a site back that was lost, and binds all later sums to what it has signed."""
    self.sites = tuple(sorted({*self.sites, start.site}))
    self.bind(msg.encode(start))

  def begin(
    self,
    shapes: PyTree,
    round: int,
    purpose: int,
    config: SecureSum,
    min_survivors: int = 1,
    sites: Sequence[int] | None = None,
  ) -> Begun:
    """Agrees on this sum's keys, before the site works, so that the others see if it is lost.

    Args:
      shapes: of the ring elements that `finish` will be given.
      round, purpose: of the sum, the same at all sites.
      config: of the sum. Without a threshold, the least above two thirds of a site and its peers is
        taken.
      min_survivors: the fewest sites over which the sum may be opened.
      sites: of this sum, the same at all sites; None for all of the run. A site that is not among
        them follows the sum.

    Raises:
      RoundAborted: too few of these sites are left, and they are not all of the run. Every site
        raises it alike, and may go on with the next sum.
      ValueError: for a config without masks, as `agree`, or as `rounds.setup`.
      Lost: the coordinator has dismissed this site or sends nothing, or too few sites are left.
      Refused: the coordinator's message would make it unsafe to continue.
    """
    everyone = tuple(sorted(self._pinned.sites))
    sites = everyone if sites is None else tuple(sorted(sites))
    try:
      setup = agree(
        {i: self._pinned.sites[i] for i in sites if i in self.sites},
        len(sites),
        [leaf.size for leaf in jax.tree.leaves(shapes)],
        purpose,
        config,
        min_survivors,
        self._run,
        self._graph_key,
      )
    except Lost as error:
      if sites == everyone:
        raise
      lost = sorted(set(sites) - set(self.sites))
      raise RoundAborted(f"round aborted: of its sites {[*sites]}, {lost} are lost") from error
    terms = msg.encode(rounds.terms(setup))
    if self._number not in sites:
      with self._explained(round):
        self._say(msg.Proposal(self._number, round, terms, b""))
      return Begun(None, None, setup, round, shapes)
    site, advert = protocol.advertise(setup, round, self._number, self._pinned.own)
    with self._explained(round):
      self._say(msg.Proposal(self._number, round, terms, msg.encode(advert)))
      site, shares = protocol.share_keys(site, self._hear(site))
      self._say(shares)
    noise = jnp.asarray(keys.words(site.secrets.noise))[None]
    nobody = jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0, 8), jnp.uint32)
    rows = Row(jnp.full(1, self._number, jnp.int32), *nobody, None, noise)
    return Begun(rows, site, setup, round, shapes)

  def finish(self, begun: Begun, elements: PyTree) -> PyTree:
    """Masks this site's ring elements, sends them, and returns the sum over the survivors.

    Args:
      begun: from `begin`.
      elements: ring elements of the shapes given there, reduced or not, without masks; not looked
        at where this site follows the sum.

    Returns:
      The sum in Z_2^k, as jax arrays; `survivors` are then the sites in it.

    Raises:
      Lost, Refused: as `begin`.
    """
    if begun.site is None:
      with self._explained(begun.round):
        told = self._hear_later(begun.setup)
        key = self._pinned.server
        followed = following.take(begun.setup, begun.round, self._number, told, key)
      return self._learn(begun, *followed)
    site = begun.site
    vectors = [
      rounds.reduce(np.asarray(a).reshape(-1), site.setup) for a in jax.tree.leaves(elements)
    ]
    with self._explained(site.round):
      site, masked = protocol.masked_input(site, self._hear(site), vectors)
      self._say(masked)
      site, consent = protocol.consistency(site, self._hear(site))
      self._say(consent)
      site, answer = protocol.unmask(site, self._hear(site))
    self.opens(_opening(site, vectors))  # what it cannot write down is not a lost coordinator
    with self._explained(site.round):
      self._say(answer)
      total = protocol.take_total(site, self._hear(site), self._pinned.server)
    assert site.lists is not None
    return self._learn(begun, total, site.lists.survivors)

  def _learn(
    self, begun: Begun, total: tuple[np.ndarray, ...], survivors: tuple[int, ...]
  ) -> PyTree:
    """Takes over a sum: who is left, and what all later sums are bound to."""
    lost = set(begun.setup.identities) - set(survivors)
    self.sites = tuple(i for i in self.sites if i not in lost)
    self.survivors = survivors
    told = [v.astype(v.dtype.newbyteorder("<"), copy=False).tobytes() for v in total]
    self._run = hashlib.sha256(b"".join([self._run, *told])).digest()
    leaves, structure = jax.tree.flatten(begun.shapes)
    totals = zip(total, leaves, strict=True)
    return jax.tree.unflatten(structure, [jnp.asarray(v.reshape(a.shape)) for v, a in totals])

  def close(self, reason: str = "") -> None:
    """Leaves the run, and tells the coordinator why; the other sites continue without this one."""
    with contextlib.suppress(OSError):
      self._say(msg.Ended(self._number, reason.encode()))
    self._carrier.close()

  def _say(self, message: msg.Message) -> None:
    self._carrier.say(msg.encode(message))

  def _hear(self, site: protocol.Site) -> Any:
    """The coordinator's next message; the stages of `protocol` check its type."""
    try:
      return carrying.hear(self._carrier, rounds.message_bytes(site.setup))
    except ValueError as error:
      stage = (*msg.STAGES, "total")[site.num_sent]
      raise Refused(self._number, stage, "malformed", str(error)) from error

  def _hear_later(self, setup: rounds.Setup) -> msg.Message:
    """What the coordinator says after a sum of others: it waits as long as all their stages may
    take.
    """
    limit, patience = following.message_bytes(setup), len(msg.STAGES)
    try:
      while True:
        patience -= 1
        try:
          return carrying.hear(self._carrier, limit)
        except TimeoutError:
          if not patience:
            raise
    except ValueError as error:
      raise Refused(self._number, "total", "malformed", str(error)) from error

  @contextlib.contextmanager
  def _explained(self, round: int) -> Iterator[None]:
    """Says what it means that the coordinator sends nothing more."""
    try:
      yield
    except OSError as error:
      raise Lost(
        f"site {self._number} is out of the run in round {round}: {error}. Start again to take "
        "part from the last round that was saved"
      ) from error


def _opening(site: protocol.Site, vectors: Sequence[np.ndarray]) -> Opening:
  assert site.lists is not None
  own = hashlib.sha256()
  for vector in vectors:
    own.update(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes())
  among = {i: site.setup.identities[i] for i in site.lists.survivors}
  return Opening(site.round, site.setup.purpose, among, own.digest())


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
