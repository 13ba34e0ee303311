"""A site's half of secure aggregation that survives dropouts and a lying server.

Bonawitz et al. 2017, figure 4, on the sparse graph of Bell et al. 2020: pure functions over two
states, a `Site` here and a `server.Server`; the messages between them are data (`messages`). A site
masks its input with one mask for each neighbour, which cancel in the sum, and with a mask of its
own. It shares the secrets behind both among its neighbours, who open exactly one of them: the seed
of its own mask if it survives, the key behind its pair masks if it drops out. `rounds` has what all
agree on beforehand, `subkeys` all secrets and keys.

Who learns what: the server learns the sum over the survivors, or nothing. Sites learn who takes
part, who survives, and the sum if the server passes on what opens it (`opening`). This holds
against a server and corrupt sites that lie, leave and collude, under these assumptions. Fewer than
K/3 of the K sites are corrupt (with `malicious_server` False: server and sites follow the protocol
and are at most curious). Fewer than t of any honest site's neighbours are corrupt, and the graph of
honest survivors is connected (see `graph`). X25519 with HKDF-SHA256, Ed25519, ChaCha20 and Poly1305
are secure. Identities are pinned. A corrupt site can spoil the sum by a false input or end the
round; it cannot make the server open a partly masked sum.

A state is a value: the caller must keep the newest and forget all others. A site that answers from
an old state answers twice, which the protocol cannot see.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.secagg import graph, keys, rounds, shamir, subkeys
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused
from primia_jax.secagg.rounds import Setup


class Site(NamedTuple):
  """One site's state in one round. It holds secrets and is never sent, stored or printed.

  Attributes:
    setup: what all agreed on.
    round: the round.
    number: this site.
    identity: its signing pair.
    num_sent: the number of messages that it has sent.
    neighbours: on the circle, in increasing order and including this site: the i-th of them holds
      share i of a secret.
    box: the pair that opens boxes.
    secrets: those behind its masks, and its noise.
    advert: its first message.
    roster: the adverts of the neighbours that take part, after `share_keys`.
    members: all sites that take part.
    transcript: a digest of the whole roster.
    shares: neighbour to its (mask-key share, seed share), after `take_shares`; of this site only
      the seed share.
    lists: the survivors and dropouts that it has signed, after `consistency`.
  """

  setup: Setup
  round: int
  number: int
  identity: keys.Identity
  num_sent: int
  neighbours: tuple[int, ...]
  box: keys.KeyPair
  secrets: subkeys.Secrets
  advert: msg.Advert
  roster: Mapping[int, msg.Advert]
  members: frozenset[int]
  transcript: bytes
  shares: Mapping[int, tuple[bytes, bytes]]
  lists: msg.Survivors | None

  def __repr__(self) -> str:
    return f"Site(number={self.number}, round={self.round}, num_sent={self.num_sent})"


def advertise(
  setup: Setup, round: int, number: int, identity: keys.Identity
) -> tuple[Site, msg.Advert]:
  """Stage 0: fresh keys for this round, signed.

  Args:
    setup: what all agreed on.
    round: the round.
    number: this site.
    identity: its signing pair.

  Raises:
    ValueError: if the identity is not the one pinned for this site.
  """
  if setup.identities.get(number) != identity.public:
    raise ValueError(
      f"site {number} has another identity than the one pinned in the setup, so its neighbours "
      f"would refuse it; give the pinned one"
    )
  secrets, box = subkeys.draw(os.urandom), keys.key_pair()
  commitment = keys.commit(secrets.seed)
  advert = msg.Advert(number, round, box.public, secrets.mask.public, commitment, b"")
  advert = advert._replace(signature=keys.sign(identity.private, rounds.signed_text(setup, advert)))
  around = rounds.neighbourhoods(setup, round)[number]
  told: tuple[Any, ...] = ({}, frozenset(), b"", {}, None)  # nothing yet
  return Site(setup, round, number, identity, 1, around, box, secrets, advert, *told), advert


def share_keys(site: Site, roster: msg.Roster) -> tuple[Site, msg.Shares]:
  """Stage 1: shares of both secrets, sealed for each neighbour that takes part.

  Only the neighbours' adverts are verified, since this site agrees on keys with no others. The
  digest of all adverts is in what all sites sign later.

  Raises:
    Refused: for unknown or too few sites, repeated keys, a neighbour's forged advert, or a change
      to this site's own.
  """
  refuse = _expect(site, 1, roster)
  setup, me = site.setup, site.number
  adverts = {advert.site: advert for advert in roster.adverts}
  if list(adverts) != sorted(a.site for a in roster.adverts):
    raise refuse("malformed", "the roster is not in increasing order of sites, or names one twice")
  if unknown := set(adverts) - set(setup.identities):
    raise refuse("unknown", f"sites {sorted(unknown)} have no pinned identity")
  if adverts.get(me) != site.advert:
    raise refuse("changed key", "its own advert in the roster is not what it sent")
  if len(adverts) < setup.quorum:
    raise refuse("too few", f"{len(adverts)} sites take part; the quorum is {setup.quorum}")
  public = [key for advert in adverts.values() for key in (advert.box_key, advert.mask_key)]
  if len(set(public)) < len(public):
    raise refuse("changed key", "the roster gives one key to two sites or uses")
  near = {v: adverts[v] for v in site.neighbours if v in adverts}
  for v, advert in near.items():
    signed = keys.verify(setup.identities[v], rounds.signed_text(setup, advert), advert.signature)
    if not signed or advert.round != site.round:
      raise refuse(
        "forged", f"site {v}'s advert is not signed by its pinned identity for this round"
      )
  if len(near) < setup.threshold:
    raise refuse(
      "too few", f"{len(near)} of its neighbourhood take part; the threshold is {setup.threshold}"
    )
  secrets = np.frombuffer(site.secrets.mask.private + site.secrets.seed, np.uint8).reshape(
    2, keys.KEY_BYTES
  )
  points = np.array([site.neighbours.index(v) + 1 for v in near])
  mask_shares, seed_shares = shamir.share(secrets, setup.threshold, points)
  dealt = {
    v: (a.tobytes(), b.tobytes()) for v, a, b in zip(near, mask_shares, seed_shares, strict=True)
  }
  site = site._replace(
    roster=near, members=frozenset(adverts), transcript=rounds.transcript_of(roster)
  )
  try:
    boxes = {
      v: keys.seal(_box_key(site, me, v), b"".join(dealt[v]), _box_text(site, me, v))
      for v in near
      if v != me
    }
  except ValueError as e:
    raise refuse("malformed", f"a neighbour's key: {e}") from e
  shares = msg.Shares(me, site.round, boxes, b"")
  return site._replace(num_sent=2, shares={me: (b"", dealt[me][1])}), _signed(site, shares)


def take_shares(site: Site, delivery: msg.Delivery) -> Site:
  """Stage 2: the state with the neighbours' shares, which it may have to tell in the last stage.

  Args:
    site: the state after `share_keys`.
    delivery: the neighbours' sealed shares.

  Raises:
    Refused: for boxes of strangers, too few boxes, or a box that its alleged sender did not seal
      for this site.
  """
  refuse = _expect(site, 2, delivery)
  setup, me = site.setup, site.number
  if unknown := set(delivery.boxes) - set(site.roster) | set(delivery.boxes) & {me}:
    raise refuse(
      "unknown", f"boxes of sites {sorted(unknown)}, which are no neighbours that take part"
    )
  if len(delivery.boxes) + 1 < setup.threshold:
    raise refuse(
      "too few",
      f"{len(delivery.boxes) + 1} of its neighbourhood shared keys, of {setup.threshold} needed",
    )
  shares = dict(site.shares)
  for v, box in delivery.boxes.items():
    try:
      opened = keys.open_box(_box_key(site, v, me), box, _box_text(site, v, me))
    except ValueError as e:
      raise refuse("forged", f"site {v}'s shares: {e}") from e
    if len(opened) != 2 * keys.KEY_BYTES:
      raise refuse("malformed", f"site {v}'s shares have {len(opened)} bytes")
    shares[v] = opened[: keys.KEY_BYTES], opened[keys.KEY_BYTES :]
  return site._replace(shares=shares)


def mask_input(site: Site, vectors: Sequence[np.ndarray]) -> tuple[Site, msg.MaskedInput]:
  """Still stage 2: the input under this site's mask and those of all neighbours that shared keys.

  Args:
    site: the state after `take_shares`.
    vectors: the input, elements of Z_2^k, of the agreed sizes.

  Raises:
    Refused: the input of this sum was sent before.
    ValueError: if the input does not have the agreed form.
  """
  setup, me = site.setup, site.number
  if site.num_sent != 2:
    raise _out_of_turn(site, msg.STAGES[2])
  if not rounds.legal_vectors(vectors, setup):
    raise ValueError(
      f"the input must be vectors of {setup.sizes} elements of Z_2^{setup.num_bits} in "
      f"{setup.dtype}"
    )
  public = {v: site.roster[v].mask_key for v in sorted(site.shares) if v != me}
  pair_keys = subkeys.pair_mask_keys(site.secrets.mask.private, public, site.round, me)
  signs = [1 if v > me else -1 for v in pair_keys]
  own_key = subkeys.self_mask_key(site.secrets.seed, site.round, me)
  masks = rounds.mask_total([*pair_keys.values(), own_key], [*signs, 1], site.round, setup)
  masked = tuple(rounds.reduce(v + mask, setup) for v, mask in zip(vectors, masks, strict=True))
  return site._replace(num_sent=3), _signed(site, msg.MaskedInput(me, site.round, masked, b""))


def consistency(site: Site, lists: msg.Survivors) -> tuple[Site, msg.Consent]:
  """Stage 3: signs the lists of survivors and dropouts, which the server must show to all alike.

  Raises:
    Refused: for overlapping lists, strangers, too few survivors, this site among the dropouts,
      lists that do not hold exactly the neighbours that shared keys, or survivors whose graph is
      not connected.
  """
  refuse = _expect(site, 3, lists)
  setup, alive, dead = site.setup, set(lists.survivors), set(lists.dropouts)
  if both := alive & dead:
    raise refuse(
      "overlapping",
      f"sites {sorted(both)} are listed as survivors and as dropouts, which asks for both secrets",
    )
  if [*lists.survivors] != sorted(alive) or [*lists.dropouts] != sorted(dead):
    raise refuse("malformed", "a list is not in increasing order, or names a site twice")
  if unknown := (alive | dead) - site.members:
    raise refuse("unknown", f"sites {sorted(unknown)} did not advertise keys")
  if site.number not in alive:
    raise refuse("declared dead", "it has sent its masked input but is not among the survivors")
  if (alive | dead) & set(site.neighbours) != set(site.shares):
    raise refuse(
      "inconsistent", "the lists do not hold exactly the neighbours whose shares were delivered"
    )
  for have, need, where in (
    (len(alive), setup.quorum, "all sites"),
    (len(alive & set(site.neighbours)), setup.threshold, "its neighbourhood"),
  ):
    if have < need:
      raise refuse("too few", f"{have} survivors among {where}; {need} are needed")
  present = np.isin(list(setup.identities), lists.survivors)
  circle = graph.neighbours(setup.graph_key, len(present), setup.degree, site.round)
  if np.any(graph.reached(circle, present) != present):
    raise refuse(
      "falls apart", "no masks join all survivors, so the sum over each part would lie open"
    )
  consent = _signed(
    site, msg.Consent(site.number, site.round, b""), rounds.context_of(site.transcript, lists)
  )
  return site._replace(num_sent=4, lists=lists), consent


def unmask(site: Site, consents: msg.Consents) -> tuple[Site, msg.Answer]:
  """Stage 4: a share of each surviving neighbour's seed and of each lost neighbour's mask key.

  Returns:
    The state without its secrets, and the answer, which is this site's last message.

  Raises:
    Refused: for fewer signatures than the quorum, signatures of sites that are no survivors, or a
      forged signature.
  """
  refuse = _expect(site, 4, consents)
  assert site.lists is not None
  setup, alive = site.setup, set(site.lists.survivors)
  if unknown := set(consents.signatures) - alive:
    raise refuse("unknown", f"signatures of sites {sorted(unknown)}, which are no survivors")
  if len(consents.signatures) < setup.quorum:
    raise refuse(
      "too few", f"{len(consents.signatures)} sites signed the lists; the quorum is {setup.quorum}"
    )
  context = rounds.context_of(site.transcript, site.lists)
  for v, signature in consents.signatures.items():
    if not keys.verify(
      setup.identities[v],
      rounds.signed_text(setup, msg.Consent(v, site.round, b""), context),
      signature,
    ):
      raise refuse("forged", f"site {v} did not sign the lists that this site was shown")
  seeds = {v: seed for v, (_, seed) in site.shares.items() if v in alive}
  masks = {v: mask for v, (mask, _) in site.shares.items() if v not in alive}
  answer = _signed(site, msg.Answer(site.number, site.round, seeds, masks, b""))
  gone = subkeys.FORGOTTEN
  return site._replace(num_sent=5, box=gone.mask, secrets=gone, shares={}), answer


def _expect(site: Site, num_sent: int, message: msg.Message):
  """Checks that the message is the next of this round; returns the exception for other reasons."""
  refuse = functools.partial(Refused, site.number, msg.STAGES[num_sent])
  if site.num_sent != num_sent:
    raise _out_of_turn(site, msg.STAGES[num_sent])
  if type(message) is not msg.FROM_SERVER[num_sent - 1]:
    raise refuse(
      "malformed", f"{type(message).__name__} instead of {msg.FROM_SERVER[num_sent - 1].__name__}"
    )
  if message.round != site.round:
    raise refuse("another round", f"round {message.round} instead of {site.round}")
  return refuse


def _out_of_turn(site: Site, stage: str) -> Refused:
  told = f"this site has sent {site.num_sent} messages; it answers each stage once, in order"
  return Refused(site.number, stage, "out of turn", told)


def _signed(site: Site, message, context: bytes = b""):
  text = rounds.signed_text(site.setup, message, context)
  return message._replace(signature=keys.sign(site.identity.private, text))


def _box_key(site: Site, sender: int, recipient: int) -> np.ndarray:
  other = site.roster[recipient if sender == site.number else sender]
  return subkeys.box_key(site.box.private, other.box_key, site.round, sender, recipient)


def _box_text(site: Site, sender: int, recipient: int) -> bytes:
  """The text to which a box is bound besides its key."""
  return site.setup.label + site.transcript + f"{site.round} {sender} {recipient}".encode()
