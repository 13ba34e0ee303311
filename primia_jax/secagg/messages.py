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
  unmask        Answer       site to server     Total      server to survivors, if they get the sum

The coordinator, whose part the server plays, speaks first, with an `Invitation`. Each site answers
with what it wants next: `Hello` and then `Start`, which the coordinator shows to all as `Relayed`
(`meeting`); a `Proposal` for each sum; `Ended` when it leaves. A site that is lost is told so by
`Dismissed`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np


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
  """The sites whose masked input has arrived, and those that only shared keys, both in order."""

  round: int
  survivors: tuple[int, ...]
  dropouts: tuple[int, ...]


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


class Total(NamedTuple):
  """The opened sum over the survivors, signed by the server's pinned identity."""

  round: int
  vectors: tuple[np.ndarray, ...]
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
  """A site's wish for a sum: its encoded `Terms`, and its encoded `Advert`, which signs them."""

  site: int
  round: int
  terms: bytes
  advert: bytes


class Ended(NamedTuple):
  """A site leaves: it has finished, or cannot go on."""

  site: int
  reason: bytes


class Dismissed(NamedTuple):
  """The coordinator's last message to a site, with the reason in words."""

  reason: bytes


Message = (
  Advert
  | Roster
  | Shares
  | Delivery
  | MaskedInput
  | Survivors
  | Consent
  | Consents
  | Answer
  | Total
  | Hello
  | Start
  | Word
  | Invitation
  | Relayed
  | Terms
  | Proposal
  | Ended
  | Dismissed
)
STAGES = ("advertise", "share_keys", "masked_input", "consistency", "unmask")
FROM_SITES = (Advert, Shares, MaskedInput, Consent, Answer)  # in the order of the stages
FROM_SERVER = (Roster, Delivery, Survivors, Consents, Total)  # what ends each stage
KINDS: tuple[Any, ...] = get_args(Message)


def encode(message: Message) -> bytes:
  """Encodes a message: a byte for its kind, then its fields in order, little-endian, with lengths.

  Raises:
    ValueError: for a number outside uint32, or an array that is not a vector of uint32 or uint64.
  """
  parts = [bytes([KINDS.index(type(message))])]
  _put_fields(parts.append, message)
  return b"".join(parts)


def decode(data: bytes) -> Message:
  """The message with this encoding.

  Raises:
    ValueError: if no message has it.
  """
  source = _Source(memoryview(data))
  (kind,) = source.take(1)
  if kind >= len(KINDS):
    raise ValueError(f"malformed message: there is no kind {kind}")
  message = _take_fields(source, KINDS[kind])
  if source.left():
    raise ValueError(f"malformed message: {source.left()} bytes too many")
  return message


class _Source:
  """Bytes read from the front; an announced length is checked against the bytes that are left."""

  def __init__(self, data: memoryview):
    self._data, self._at = data, 0

  def left(self) -> int:
    return len(self._data) - self._at

  def take(self, size: int) -> memoryview:
    if size > self.left():
      raise ValueError(f"malformed message: {size} bytes announced, {self.left()} there")
    self._at += size
    return self._data[self._at - size : self._at]

  def number(self) -> int:
    return struct.unpack("<I", self.take(4))[0]


Put = Callable[[bytes], None]


def _put_number(put: Put, n: int) -> None:
  if not 0 <= n < 2**32:
    raise ValueError(f"{n} in a message; numbers must be in [0, 2^32)")
  put(struct.pack("<I", n))


def _put_bytes(put: Put, data: bytes) -> None:
  _put_number(put, len(data))
  put(data)


def _put_numbers(put: Put, numbers: tuple[int, ...]) -> None:
  _put_number(put, len(numbers))
  for n in numbers:
    _put_number(put, n)


def _put_boxes(put: Put, boxes: dict[int, bytes]) -> None:
  _put_number(put, len(boxes))
  for site in sorted(boxes):
    _put_number(put, site)
    _put_bytes(put, boxes[site])


def _take_boxes(source: _Source) -> dict[int, bytes]:
  boxes: dict[int, bytes] = {}
  last = -1
  for _ in range(source.number()):
    site = source.number()
    if site <= last:
      raise ValueError(f"malformed message: site {site} is out of order or repeated")
    boxes[site], last = bytes(source.take(source.number())), site
  return boxes


def _put_vectors(put: Put, vectors: tuple[np.ndarray, ...]) -> None:
  """Each number in as many whole bytes as the largest of its vector needs: k bits if masked."""
  _put_number(put, len(vectors))
  for v in vectors:
    if v.ndim != 1 or v.dtype not in (np.uint32, np.uint64):
      raise ValueError(
        f"{v.dtype}{list(v.shape)} in a message; arrays must be vectors of uint32 or uint64"
      )
    width = _bytes_of(v)
    _put_number(put, v.dtype.itemsize)
    _put_number(put, width)
    words = v.astype(v.dtype.newbyteorder("<"), copy=False)
    data = np.ascontiguousarray(words).view(np.uint8).reshape(-1, v.dtype.itemsize)
    _put_bytes(put, data[:, :width].tobytes())


def _take_vectors(source: _Source) -> tuple[np.ndarray, ...]:
  vectors = []
  for _ in range(source.number()):
    itemsize, width, size = source.number(), source.number(), source.number()
    if itemsize not in (4, 8) or not 1 <= width <= itemsize or size % width:
      raise ValueError(
        f"malformed message: {size} bytes are no {itemsize}-byte words in {width} bytes each"
      )
    data = source.take(size)  # before memory is allocated for a size that is only announced
    words = np.zeros((size // width, itemsize), np.uint8)
    words[:, :width] = np.frombuffer(data, np.uint8).reshape(-1, width)
    v = words.reshape(-1).view(f"<u{itemsize}").astype(f"u{itemsize}", copy=False)
    if width != _bytes_of(v):
      raise ValueError(f"malformed message: numbers of {_bytes_of(v)} bytes in {width} each")
    vectors.append(v)
  return tuple(vectors)


def _bytes_of(v: np.ndarray) -> int:
  """The number of bytes that holds any number of a vector; at least one."""
  return max(1, -(-int(v.max(initial=0)).bit_length() // 8))


def _put_adverts(put: Put, adverts: tuple[Advert, ...]) -> None:
  _put_number(put, len(adverts))
  for advert in adverts:
    _put_fields(put, advert)


_CODECS: dict[Any, tuple[Callable[[Put, Any], None], Callable[[_Source], Any]]] = {
  int: (_put_number, _Source.number),
  bytes: (_put_bytes, lambda source: bytes(source.take(source.number()))),
  tuple[int, ...]: (
    _put_numbers,
    lambda source: tuple(source.number() for _ in range(source.number())),
  ),
  dict[int, bytes]: (_put_boxes, _take_boxes),
  tuple[np.ndarray, ...]: (_put_vectors, _take_vectors),
  tuple[Advert, ...]: (
    _put_adverts,
    lambda s: tuple(_take_fields(s, Advert) for _ in range(s.number())),
  ),
}
_FIELDS = {kind: tuple(_CODECS[hint] for hint in get_type_hints(kind).values()) for kind in KINDS}


def _put_fields(put: Put, message: Any) -> None:
  for (put_field, _), value in zip(_FIELDS[type(message)], message, strict=True):
    put_field(put, value)


def _take_fields(source: _Source, kind: Any) -> Any:
  return kind(*[take_field(source) for _, take_field in _FIELDS[kind]])
