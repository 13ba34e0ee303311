"""The messages of a session: a header of fixed length, and a payload of the length that it names.

| kind | from | payload |
| --- | --- | --- |
| HELLO | data owner | what this session is about: `Terms` |
| WELCOME | model owner | its own `Terms` |
| PREPARE | data owner | the number of an inference, 32 bytes |
| READY | model owner | nothing |
| QUESTION | data owner | D = x - B' of the operands that need it, mostly nothing |
| ROUND | both | shares of masked values |
| OUTPUT | model owner | its shares of the outputs |
| SHARE | client, to each of two servers | the plan's SHA-256, and shares of its image |
| RESULT | each of them | its shares of the outputs |

Where a client only shares its image (`sharing`), the helper is the data owner of a session. Its
QUESTION is the number of the client's request, and OUTPUT is empty.

A message is decoded for the place at which it is expected. Anything else is `Malformed`: another
kind, session, round or length.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from primia_jax.service.errors import Malformed

HELLO, WELCOME, PREPARE, READY, QUESTION, ROUND, OUTPUT, SHARE, RESULT = range(1, 10)
NAMES = {
  HELLO: "HELLO", WELCOME: "WELCOME", PREPARE: "PREPARE", READY: "READY", QUESTION: "QUESTION",
  ROUND: "ROUND", OUTPUT: "OUTPUT", SHARE: "SHARE", RESULT: "RESULT",
}  # fmt: skip
VERSION = 2  # of the frames; 1 had numbers of 16 bytes
SESSION_BYTES, INFERENCE_BYTES = 16, 32
NO_SESSION = bytes(SESSION_BYTES)
_MAGIC = b"PMIS"
_HEADER = struct.Struct("<4sBB16sIQ")  # magic, version, kind, session, round, bytes of the payload
HEADER_BYTES = _HEADER.size
_TERMS = struct.Struct("<B32s32s32s16s")


class Place(NamedTuple):
  """Where in a session a message stands."""

  kind: int
  session: bytes
  round: int = 0


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
  header = _HEADER.pack(_MAGIC, VERSION, place.kind, place.session, place.round, len(payload))
  return b"".join([header, payload])


def decode(message: bytes, place: Place, num_bytes: int) -> memoryview:
  """The payload of a message that must stand at a place and have a length.

  In a WELCOME, the session is the model owner's to choose (`session_of`).

  Raises:
    Malformed: it is another message, or none at all.
  """
  view, name = memoryview(message), NAMES[place.kind]
  if len(view) < HEADER_BYTES:
    raise Malformed(f"a message of {len(view)} bytes is shorter than a header; expected {name}")
  magic, version, kind, session, number, count = _HEADER.unpack_from(view)
  if magic != _MAGIC:
    raise Malformed(f"no message of this protocol where {name} was expected")
  if version != VERSION:
    raise Malformed(f"the other side speaks version {version} of the protocol, not {VERSION}")
  if kind != place.kind:
    raise Malformed(f"{NAMES.get(kind, f'kind {kind}')} where {name} was expected")
  if session != place.session and kind != WELCOME:
    raise Malformed(f"{name} of another session")
  if number != place.round:
    raise Malformed(f"{name} of round {number} where round {place.round} was expected")
  if not count == num_bytes == len(view) - HEADER_BYTES:
    raise Malformed(
      f"{name} names {count} bytes and has {len(view) - HEADER_BYTES}, where {num_bytes} were "
      "expected"
    )
  return view[HEADER_BYTES:]


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
