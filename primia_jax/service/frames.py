"""The messages of a session: a header of fixed length, and a payload of the length that it names.

| kind | from | payload |
| --- | --- | --- |
| HELLO | data owner | what this session is about: `Terms` |
| WELCOME | model owner | its own `Terms` |
| PREPARE | data owner | the number of an inference, and the last `receipts` that it has |
| ACCEPTED | model owner | a receipt: it serves this inference, and the other side may draw, too |
| READY | model owner | nothing |
| QUESTION | data owner | D = x - B' of the operands that need it, mostly nothing |
| SHARES_0 | model owner | its shares of masked values, in each round |
| SHARES_1 | data owner | the same |
| OUTPUT | model owner | its shares of the outputs |
| SCORE | data owner | what sum is opened, its last receipt, and numbers of inferences (`scores`) |
| TOTAL_0, TOTAL_1 | model owner, data owner, where it is opened to the other | shares of that sum |
| REQUEST | client, to each of two servers | the plan's SHA-256, and shares of its image |
| RESULT | each of them | its shares of the outputs |

Where a client only shares its image (`sharing`), the helper is the data owner of a session. Its
QUESTION is the number of the client's request and follows HELLO at once, and OUTPUT is empty. Each
server tells the client with READY that it has its share (`helping`). The ACCEPTED that answers a
SCORE names the inferences that serve it.

A message is decoded for the place at which it is expected. Anything else is `Malformed`: another
kind, session, number or length, or a message that is not as it was encoded. Each side numbers what
it sends through the whole session, so no message stands for another, not for one of an earlier
inference and not for the other side's of the same round. The checksum is no protection against a
peer that means harm, which TLS keeps out or which is the other party. It finds what went wrong
between a party and TLS: any flipped bit, and other damage but for a chance of 2^-64.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

try:
  import xxhash
except ImportError as e:
  raise ImportError("the service needs xxhash: pip install 'primia-jax[service]'") from e

from primia_jax.service.errors import Malformed

HELLO, WELCOME, PREPARE, READY, QUESTION, SHARES_0, SHARES_1, OUTPUT, REQUEST, RESULT = range(1, 11)
ACCEPTED, SCORE, TOTAL_0, TOTAL_1 = 11, 12, 13, 14
NAMES = {
  HELLO: "HELLO", WELCOME: "WELCOME", PREPARE: "PREPARE", READY: "READY", QUESTION: "QUESTION",
  SHARES_0: "SHARES_0", SHARES_1: "SHARES_1", OUTPUT: "OUTPUT", REQUEST: "REQUEST",
  RESULT: "RESULT", ACCEPTED: "ACCEPTED", SCORE: "SCORE", TOTAL_0: "TOTAL_0", TOTAL_1: "TOTAL_1",
}  # fmt: skip
SHARES, TOTALS = (SHARES_0, SHARES_1), (TOTAL_0, TOTAL_1)  # by party
VERSION = 4
SESSION_BYTES, INFERENCE_BYTES = 16, 32
MOST_OFFERED = 4096  # inferences that one SCORE can name
MOST_SCORE_BYTES = 128 + MOST_OFFERED * INFERENCE_BYTES
NO_SESSION = bytes(SESSION_BYTES)
_MAGIC = b"PMIS"
_HEADER = struct.Struct("<4sBB16sIQ")  # magic, version, kind, session, number, bytes of the payload
_CHECKSUM = struct.Struct("<Q")  # of header and payload, which it stands between
HEADER_BYTES = _HEADER.size + _CHECKSUM.size
_TERMS = struct.Struct("<B32s32s32s16s")


class Place(NamedTuple):
  """Where in a session a message stands: what it is, and the how manyeth from its sender."""

  kind: int
  session: bytes
  number: int = 0


class Terms(NamedTuple):
  """What both sides must agree on before anything is computed.

  Attributes:
    num_bits: of the ring.
    plan: SHA-256 of the plan.
    rounds: SHA-256 of the sizes of all messages.
    tag: of the model owner's weights.
    number: of the dealer's publication.
  """

  num_bits: int
  plan: bytes
  rounds: bytes
  tag: bytes
  number: bytes


def encode(place: Place, payload: bytes = b"") -> bytes:
  """A message."""
  header = _HEADER.pack(_MAGIC, VERSION, place.kind, place.session, place.number, len(payload))
  return b"".join([header, checksum(header, payload), payload])


def decode(message: bytes, place: Place, num_bytes: int) -> memoryview:
  """The payload of a message that must stand at a place and have a length.

  In a WELCOME, the session is the model owner's to choose (`session_of`).

  Raises:
    Malformed: it is another message, or none at all.
  """
  view, name = memoryview(message), NAMES[place.kind]
  if len(view) < HEADER_BYTES:
    raise Malformed(f"a message of {len(view)} bytes is shorter than a header; expected {name}")
  header, payload = view[: _HEADER.size], view[HEADER_BYTES:]
  magic, version, kind, session, number, count = _HEADER.unpack(header)
  if magic != _MAGIC:
    raise Malformed(f"no message of this protocol where {name} was expected")
  if version != VERSION:
    raise Malformed(f"the other side speaks version {version} of the protocol, not {VERSION}")
  if kind != place.kind:
    raise Malformed(f"{NAMES.get(kind, f'kind {kind}')} where {name} was expected")
  if session != place.session and kind != WELCOME:
    raise Malformed(f"{name} of another session")
  if number != place.number:
    raise Malformed(f"message {number} where message {place.number}, {name}, was expected")
  if not count == num_bytes == len(payload):
    raise Malformed(
      f"{name} names {count} bytes and has {len(payload)}, where {num_bytes} were expected"
    )
  if view[_HEADER.size : HEADER_BYTES] != checksum(header, payload):
    raise Malformed(f"{name} is not as it was sent: its checksum is wrong")
  return payload


def checksum(header: bytes | memoryview, payload: bytes | memoryview) -> bytes:
  """XXH3 of a message without its checksum, 8 bytes."""
  found = xxhash.xxh3_64(header)
  found.update(payload)
  return _CHECKSUM.pack(found.intdigest())


class Numbered:
  """Encodes what one side sends, and decodes what it receives, in the order of a session.

  Args:
    session: which one; a side sets it once it knows it.
  """

  def __init__(self, session: bytes = NO_SESSION):
    self.session, self._sent, self._received = session, 0, 0

  def encode(self, kind: int, payload: bytes = b"") -> bytes:
    """The next message that this side sends."""
    self._sent += 1
    return encode(Place(kind, self.session, self._sent - 1), payload)

  def decode(self, message: bytes, kind: int, num_bytes: int) -> memoryview:
    """The payload of the next message that the other side sends; raises as `decode` does."""
    self._received += 1
    return decode(message, Place(kind, self.session, self._received - 1), num_bytes)


def kind_of(message: bytes) -> int:
  """The kind that a message claims, or 0."""
  return message[5] if len(message) >= HEADER_BYTES else 0


def session_of(message: bytes) -> bytes:
  """The session that a message claims; only for a WELCOME that was decoded."""
  return bytes(message[6 : 6 + SESSION_BYTES])


def encode_terms(terms: Terms) -> bytes:
  """The payload of HELLO and WELCOME."""
  return _TERMS.pack(*terms)


def decode_terms(payload: memoryview) -> Terms:
  """The inverse of `encode_terms`."""
  return Terms(*_TERMS.unpack(payload))


TERMS_BYTES = _TERMS.size
