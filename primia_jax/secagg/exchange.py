"""One sum after another over sites that each run in their own process: `protocol` over a carrier.

Only `messages` cross between processes; a coordinator, which is no site, passes them on
(`coordinator`). All sites open each sum, and learn it and who is in it. A sum is over all sites
that are left, or over some of them, and is told to the others (`following`). The sites that it has
lost are in no later one: all know them from the list of survivors, which is signed. So a lost site
costs the others one timeout. It stays out until it comes back (`returning`), or all start again.

A sum takes five messages to each site, and three where the sites of the one before it have agreed
on its keys (`ahead`).

Who learns what: see `protocol`. Its bounds hold for the K sites of the run, or of the round where
it takes some: however many are lost, no sum is over fewer than the quorum of these K. That is
more than two thirds of them, or more than half with a threshold between half and two thirds, which
assumes a server that follows the protocol.
The bounds cannot hide the difference of two sums of the same inputs, one with a site and one
without it: everyone learns that site's input. So a site is asked before it sends the message that
opens a sum (`Exchange.opens`), and can refuse the second one.

A coordinator that announced the sums could plant a model by a false one, or tell each site another
one and make them train different models, until only one site's update is left in a sum (Pasquini et
al. 2022, "Eluding secure aggregation in federated learning via model inconsistency"). So each site
opens a sum itself (`opening`). And every message of a sum is bound to the state that its sender
started from (`bind`) and to all sums since. Sites with different ones refuse each other in the next
sum, which then does not open.
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
from primia_jax.secagg import ahead, following, graph, keys, opening, protocol, rounds
from primia_jax.secagg import carrier as carrying
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
    bond: binds it to the sum, where its keys were agreed on before; nothing is said yet then.
    setup, round: of the sum.
    shapes: of its ring elements.
  """

  rows: Row | None
  site: protocol.Site | None
  bond: msg.Bond | None
  setup: rounds.Setup
  round: int
  shapes: PyTree


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
    self.opens: Callable[[opening.Opening], None] = lambda _: None
    self._number, self._pinned, self._carrier = number, pinned, carrier
    self._agreed: protocol.Site | None = None  # the keys of the next sum; taken once
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
    """Agrees on this sum's keys, before the site works, so that the others see if it is lost. Where
    they were agreed on before, nothing is said.

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
    agreed, self._agreed, bond = self._agreed, None, None
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
    if self._number not in sites:
      with self._explained(round):
        self._say(_proposal(self._number, round, setup, None))
      return Begun(None, None, None, setup, round, shapes)
    if agreed is not None and ahead.fits(agreed.setup, setup):
      site, bond = ahead.begin(agreed, setup, round)
    else:
      site, advert = protocol.advertise(setup, round, self._number, self._pinned.own)
      with self._explained(round):
        self._say(_proposal(self._number, round, setup, advert))
        site, shares = protocol.share_keys(site, *self._hear(site))
        self._say(shares)
    noise = jnp.asarray(keys.words(site.secrets.noise))[None]
    nobody = jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0, 8), jnp.uint32)
    rows = Row(jnp.full(1, self._number, jnp.int32), *nobody, None, noise)
    return Begun(rows, site, bond, setup, round, shapes)

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
      if begun.bond is None:
        site = protocol.take_shares(site, *self._hear(site))
      site, masked = protocol.mask_input(site, vectors)
      coming, advert = self._advertise(site)
      said = msg.together(masked, advert)
      if begun.bond is not None:
        said = _proposal(self._number, begun.round, begun.setup, begun.bond, said)
      self._say(said)
      lists, *rest = self._hear(site, begun.bond is not None, coming is not None)
      site, consent = protocol.consistency(site, lists)
      if begun.bond is not None:  # before it says that it consents
        ahead.check_bonds(site, rest.pop(0), lists)
      coming, shares = ahead.share(coming, rest[0]) if rest and coming else (None, None)
      self._say(msg.together(consent, shares))
      consents, *rest = self._hear(site, False, coming is not None)
      site, answer = protocol.unmask(site, consents)
      coming = ahead.take(coming, rest[0]) if rest and coming else None
    self.opens(opening.of(site, vectors))  # what it cannot write down is not a lost coordinator
    with self._explained(site.round):
      self._say(answer)
      (told,) = self._hear(site)
      total = opening.total(site, told, self._pinned.server)
    assert site.lists is not None
    self._agreed = coming
    return self._learn(begun, total, site.lists.survivors)

  def _advertise(self, site: protocol.Site) -> tuple[protocol.Site | None, msg.Advert | None]:
    """This site's keys for the next sum, which may be of all that are left, as this one."""
    if set(site.setup.identities) != set(self.sites):
      return None, None
    return ahead.advertise(site) or (None, None)

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

  def _hear(self, site: protocol.Site, bonds: bool = False, keys: bool = False) -> list[Any]:
    """The coordinator's next message, with all bonds, and perhaps with one for the next sum's keys;
    `protocol` and `ahead` check their types.
    """
    try:
      is_last = site.num_sent == len(msg.STAGES)
      limit = (opening if is_last else rounds).message_bytes(site.setup)
      heard = carrying.hear(self._carrier, limit)
      parts = [*map(carrying.known, msg.apart(heard))]
      if not 1 + bonds <= len(parts) <= 1 + bonds + keys:
        raise ValueError(f"malformed message: {len(parts)} travel together")
      return parts
    except ValueError as error:
      stage = (*msg.STAGES, "total")[site.num_sent]
      raise Refused(self._number, stage, "malformed", str(error)) from error

  def _hear_later(self, setup: rounds.Setup) -> list[msg.Message]:
    """What the coordinator says after a sum of others: it waits as long as all their stages may
    take.
    """
    limit, patience = following.message_bytes(setup), len(msg.STAGES)
    try:
      while True:
        patience -= 1
        try:
          return msg.apart(carrying.hear(self._carrier, limit))
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


def _proposal(
  number: int,
  round: int,
  setup: rounds.Setup,
  proof: msg.Advert | msg.Bond | None,
  masked: msg.Message | None = None,
) -> msg.Proposal:
  """A site's wish for a sum of this setup."""
  encoded = [b"" if one is None else msg.encode(one) for one in (proof, masked)]
  return msg.Proposal(number, round, msg.encode(rounds.terms(setup)), *encoded)


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
      a sum that needs too long messages, or as `rounds.setup`.
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
  setup = rounds.setup(
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
  following.check_size(setup)  # before a site trains
  return setup
