"""The messages between sites and server in one round, and their encoding as bytes.

The encoding is canonical: two messages have the same bytes exactly if they are equal, so a
signature of the bytes is a signature of the message. It holds only integers, bytes and arrays, and
nothing in it is ever executed. `decode` takes any bytes and returns a well-typed message or raises
a ValueError.

Stages, and who speaks (Bonawitz et al., CCS 2017, figure 4):

  advertise     Advert       site to server     Roster     server to every site
  share_keys    Shares       site to server     Delivery   server to each site
  masked_input  MaskedInput  site to server     Survivors  server to every site
  consistency   Consent      site to server     Consents   server to every site
  unmask        Answer       site to server     Evidence   server to survivors, if they get the sum

A site that is not in a sum may be told it (`following`). The keys of the next sum can be agreed on
with the last messages of this one (`ahead`), which then are `Together`.

The coordinator, whose part the server plays, speaks first, with an `Invitation`. Each site answers
with what it wants next: `Hello` and then `Start`, which the coordinator shows to all as `Relayed`
(`meeting`); a `Proposal` for each sum; `Ended` when it leaves. A site that is lost is told so by
`Dismissed`, and may come back when it is `Recalled` (`returning`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import numpy as np

from primia_jax.secagg import encoding


class Advert(NamedTuple):
  """A site's public keys for this round.

  Attributes:
    site: the sender.
    round: the round.
    box_key: X25519, to seal shares to this site.
    mask_key: X25519, to agree on pairwise masks with it.
    commitment: to the seed of its self mask.
    signature: of all other fields, by the sender's pinned identity; so in every message of a site.
  """

  site: int
  round: int
  box_key: bytes
  mask_key: bytes
  commitment: bytes
  signature: bytes


class Roster(NamedTuple):
  """The sites that take part, with their keys."""

  round: int
  adverts: tuple[Advert, ...]


class Shares(NamedTuple):
  """A site's shares of its two secrets, sealed to each neighbour: boxes[recipient]."""

  site: int
  round: int
  boxes: dict[int, bytes]
  signature: bytes


class Delivery(NamedTuple):
  """The boxes for one site: boxes[sender]."""

  round: int
  boxes: dict[int, bytes]


class MaskedInput(NamedTuple):
  """Ring elements, uniform to whoever lacks the masks' keys."""

  site: int
  round: int
  vectors: tuple[np.ndarray, ...]
  signature: bytes


class Survivors(NamedTuple):
  """The sites whose masked input has arrived, and those that only shared keys, both in order.

  `inputs` is SHA-256 of the SHA-256 digests of the survivors' encoded `MaskedInput`, in order.
  """

  round: int
  survivors: tuple[int, ...]
  dropouts: tuple[int, ...]
  inputs: bytes


class Consent(NamedTuple):
  """A site's signature of the lists of `Survivors` that it was shown."""

  site: int
  round: int
  signature: bytes


class Consents(NamedTuple):
  """signatures[site]: they prove to each site that the others were shown the same lists."""

  round: int
  signatures: dict[int, bytes]


class Answer(NamedTuple):
  """A share of each surviving neighbour's seed, and one of each lost neighbour's mask key."""

  site: int
  round: int
  self_shares: dict[int, bytes]
  mask_shares: dict[int, bytes]
  signature: bytes


class Evidence(NamedTuple):
  """What opens a sum: the encoded `Roster`, and each site's encoded `MaskedInput` and `Answer`.

  The signature is the coordinator's, of the round, its keys and its lists, which fix the inputs; by
  it sites know that it is the pinned one. Answers are signed by their sites.
  """

  round: int
  roster: bytes
  masked: dict[int, bytes]
  answers: dict[int, bytes]
  signature: bytes


class Hello(NamedTuple):
  """A site's identity at the start of a run, in a message that it signs itself.

  Attributes:
    site: the sender.
    identity: its public key.
    server: that of the coordinator which has invited it.
    fresh: 32 bytes drawn for this start.
    told: what it tells all others.
    signature: of all other fields.
  """

  site: int
  identity: bytes
  server: bytes
  fresh: bytes
  told: bytes
  signature: bytes


class Start(NamedTuple):
  """The global state that a site starts from.

  Attributes:
    site: the sender.
    round: the last that is in the state.
    state: a digest of it.
    sites: of that round, if the sender has recorded this digest after it; else empty.
    told: what it tells all others.
    signature: of all other fields.
  """

  site: int
  round: int
  state: bytes
  sites: tuple[int, ...]
  told: bytes
  signature: bytes


class Word(NamedTuple):
  """What a site tells all others without a signature: nothing that they could not check later."""

  site: int
  told: bytes


class Invitation(NamedTuple):
  """The coordinator's first message: its public key, and 32 bytes drawn for this run."""

  identity: bytes
  fresh: bytes


class Relayed(NamedTuple):
  """What each site has said to all others: said[site], an encoded message that the site signed."""

  said: dict[int, bytes]


class Terms(NamedTuple):
  """What a `rounds.Setup` is made of; see there."""

  identities: dict[int, bytes]
  sizes: tuple[int, ...]
  session: bytes
  num_bits: int
  graph_key: bytes
  degree: int
  threshold: int
  quorum: int
  malicious_server: int
  purpose: int


class Proposal(NamedTuple):
  """A site's wish for a sum.

  Attributes:
    site: the sender.
    round: of the sum.
    terms: its encoded `Terms`.
    advert: its encoded `Advert`, which signs them; where keys were agreed on before, its encoded
      `Bond`. Empty where others form the sum, and the site wants to be told it.
    masked: with a bond, the encoded first message of the sum, else empty.
  """

  site: int
  round: int
  terms: bytes
  advert: bytes
  masked: bytes


class Bond(NamedTuple):
  """A site's signature of the sum in which it uses keys that were agreed on before; see `ahead`."""

  site: int
  round: int
  signature: bytes


class Bonds(NamedTuple):
  """signatures[site], of the survivors' bonds."""

  round: int
  signatures: dict[int, bytes]


class Part(NamedTuple):
  """An encoded message."""

  data: bytes


class Together(NamedTuple):
  """Several messages that travel as one: that of a sum first."""

  parts: tuple[Part, ...]


class Recalled(NamedTuple):
  """To a site that was lost: the run goes on, and it may come back.

  Attributes:
    identity, fresh: of the run's `Invitation`.
    hellos: what each site has said at the meeting, encoded.
  """

  identity: bytes
  fresh: bytes
  hellos: dict[int, bytes]


class Returning(NamedTuple):
  """To the sites that are left: those that are back, and which site is to give them the state."""

  sites: tuple[int, ...]
  giver: int


class Resumed(NamedTuple):
  """To a site that is back: the `Start` of each that is left, encoded, and the global state."""

  starts: dict[int, bytes]
  state: bytes


class Ended(NamedTuple):
  """A site leaves: it has finished, or cannot go on."""

  site: int
  reason: bytes


class Dismissed(NamedTuple):
  """The coordinator's last message to a site, with the reason in words."""

  reason: bytes


OfSites = Advert | Shares | MaskedInput | Consent | Answer
OfServer = Roster | Delivery | Survivors | Consents | Evidence
OfMeeting = Invitation | Hello | Word | Start | Relayed
OfRun = Terms | Proposal | Ended | Dismissed
OfReturn = Recalled | Returning | Resumed
OfAhead = Bond | Bonds | Together
Message = OfSites | OfServer | OfMeeting | OfRun | OfReturn | OfAhead
STAGES = ("advertise", "share_keys", "masked_input", "consistency", "unmask")
FROM_SITES: tuple[Any, ...] = get_args(OfSites)  # in the order of the stages
FROM_SERVER = (Roster, Delivery, Survivors, Consents, Evidence)  # what ends each stage
KINDS: tuple[Any, ...] = get_args(Message)


def encode(message: Message) -> bytes:
  """Encodes a message: a byte for its kind, then its fields in order, little-endian, with lengths.

  Raises:
    ValueError: for a number outside uint32, or an array that is not a vector of uint32 or uint64.
  """
  parts = [bytes([KINDS.index(type(message))])]
  encoding.put_fields(parts.append, message)
  return b"".join(parts)


def decode(data: bytes) -> Message:
  """The message with this encoding.

  Raises:
    ValueError: if no message has it.
  """
  source = encoding.Source(memoryview(data))
  (kind,) = source.take(1)
  if kind >= len(KINDS):
    raise ValueError(f"malformed message: there is no kind {kind}")
  message = encoding.take_fields(source, KINDS[kind])
  if source.left():
    raise ValueError(f"malformed message: {source.left()} bytes too many")
  return message


def together(*messages: Message | None) -> Message:
  """Messages as one; None stands for no message."""
  some = [one for one in messages if one is not None]
  return some[0] if len(some) == 1 else Together(tuple(Part(encode(one)) for one in some))


def apart(message: Message) -> list[Message]:
  """The messages that travel as one, or the message alone.

  Raises:
    ValueError: one of them is none, or several are in it again.
  """
  if not isinstance(message, Together):
    return [message]
  parts = [decode(part.data) for part in message.parts]
  if len(parts) < 2 or any(isinstance(one, Together) for one in parts):
    raise ValueError("malformed message: what travels together must be two messages or more")
  return parts
