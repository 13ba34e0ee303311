"""Which of its patients a hospital shares with another: a private set intersection of their ids.

Diffie-Hellman intersection (Meadows 1986; Huberman, Franklin and Hogg 1999) in the prime-order
subgroup of edwards25519, with PyNaCl's points. Each site hashes its ids to points, raises them to a
fresh secret and sends them in random order; the other raises them to its own secret and sends them
back. Points of one id, raised to both secrets, are equal:

  a, b = Site(ids_a, context), Site(ids_b, context)
  back_to_a, back_to_b = b.answer(a.blinded), a.answer(b.blinded)
  a.finish(back_to_a)  # the ids of a that b has, too

Who learns what: each site learns how many ids the other has, and which of its own are among them.
A carrier of the messages learns both sizes. This assumes that decisional Diffie-Hellman is hard in
the group, that SHA-512 is a random oracle, and that both sites follow the protocol. Nobody else can
find an id by hashing all that there are (`tests/intersection_test.py`). A site that lies can put in
ids that it guesses, and learns of each whether the other has it: `max_ids` bounds how many. It can
also give back wrong points, so that the other misses patients. The messages are not authenticated;
sign them with the sites' identities (`secagg.roster`).
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import unicodedata
from collections.abc import Iterable, Sequence

from nacl import bindings, exceptions

MAX_IDS = 1_000_000
_VERSION = 1
_DOMAIN = b"primia_jax intersection v1"


class Site:
  """One site's end of one intersection; every step can be taken once.

  Attributes:
    blinded: the first message: a point of 32 bytes for each id, in random order.
  """

  def __init__(self, ids: Iterable[str], context: bytes, max_ids: int = MAX_IDS):
    """Draws the secret.

    Args:
      ids: of the site's patients; spaces around them do not count, and nor do repetitions. Both
        sites must write ids in one form.
      context: what both sites agree on, such as the digest of the roster and the two numbers; ids
        of other contexts do not match.
      max_ids: the most that the other site may have.

    Raises:
      ValueError: an id is empty.
    """
    self._ids = sorted({_normalised(one) for one in ids})
    random.SystemRandom().shuffle(self._ids)
    self._context, self._max_ids = context, max_ids
    self._secret: bytes | None = _secret()
    self._theirs: frozenset[bytes] | None = None
    self.blinded = [_raised(point_of(one, context), self._secret) for one in self._ids]

  def __repr__(self) -> str:
    return f"Site({len(self._ids)} ids)"

  def is_of(self, context: bytes) -> bool:
    """Whether this end was made for a context."""
    return self._context == context

  def encode(self) -> bytes:
    """This end as a file, for steps that are days apart. It holds ids and secret: keep it where the
    site's user alone can read it, write it anew after each step before a message goes out, and
    never go back to an older one.
    """
    listed = lambda points: [point.hex() for point in points]
    fields = {
      "version": _VERSION,
      "ids": self._ids,
      "context": self._context.hex(),
      "max_ids": self._max_ids,
      "secret": self._secret and self._secret.hex(),
      "theirs": None if self._theirs is None else listed(sorted(self._theirs)),
      "blinded": listed(self.blinded),
    }
    return json.dumps(fields).encode()

  @classmethod
  def decode(cls, data: bytes, where: str = "the intersection") -> Site:
    """The end in a file of `encode`.

    Raises:
      ValueError: it is none.
    """
    try:
      found = json.loads(data)
      if found["version"] != _VERSION:
        raise ValueError(f"version {found['version']!r}; this code reads {_VERSION}")
      points = lambda listed: [bytes.fromhex(point) for point in listed]
      made = cls.__new__(cls)
      made._ids, made._max_ids = list(map(str, found["ids"])), int(found["max_ids"])
      made._context = bytes.fromhex(found["context"])
      made._secret = found["secret"] and bytes.fromhex(found["secret"])
      theirs = found["theirs"]
      made._theirs = None if theirs is None else frozenset(points(theirs))
      made.blinded = points(found["blinded"])
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"{where} is damaged ({error!r}); begin another intersection") from error
    return made

  def answer(self, theirs: Sequence[bytes]) -> list[bytes]:
    """The second message: the other's first one, raised to this site's secret, in its order.

    Raises:
      ValueError: too many points, one that repeats or is not a point of the group, or a message was
        answered before: a second one would let the other test more ids. The secret is gone then.
    """
    if (secret := self._secret) is None:
      raise ValueError("this site has answered already; begin another intersection")
    self._secret = None
    if len(theirs) > self._max_ids:
      raise ValueError(f"the other site sends {len(theirs):,} ids, more than {self._max_ids:,}")
    if len(set(theirs)) < len(theirs):
      raise ValueError("the other site sends an id twice; it does not follow the protocol")
    _check(theirs)
    raised = [_raised(point, secret) for point in theirs]
    self._theirs = frozenset(raised)
    return raised

  def finish(self, returned: Sequence[bytes]) -> frozenset[str]:
    """This site's ids that the other has, too.

    Args:
      returned: the other's answer to `blinded`.

    Raises:
      ValueError: there is not one point for each id, one is none of the group, or `answer` has not
        come first.
    """
    if self._theirs is None:
      raise ValueError("answer the other site's message first")
    if len(returned) != len(self._ids) or len(set(returned)) < len(returned):
      raise ValueError(
        f"the other site gives back {len(set(returned))} different points for {len(self._ids)} ids"
      )
    _check(returned)
    theirs, self._theirs = self._theirs, None
    return frozenset(one for one, p in zip(self._ids, returned, strict=True) if p in theirs)


def point_of(one: str, context: bytes) -> bytes:
  """The point of an id, 32 bytes, of unknown discrete logarithm: the sum of two images under
  Elligator 2 (Brier et al. 2010), which is indifferentiable from a random oracle.

  Raises:
    ValueError: the id is empty.
  """
  lead = _DOMAIN + hashlib.sha256(context).digest()
  digest = hashlib.sha512(lead + _normalised(one).encode()).digest()
  half = bindings.crypto_core_ed25519_from_uniform
  return bindings.crypto_core_ed25519_add(half(digest[:32]), half(digest[32:]))


def _normalised(one: str) -> str:
  if not (text := unicodedata.normalize("NFC", one).strip()):
    raise ValueError("a patient's id is empty; leave these patients out, or give them one")
  return text


def _secret() -> bytes:
  """A secret scalar, uniform but for 2^-256 or so."""
  scalar = bindings.crypto_core_ed25519_scalar_reduce(secrets.token_bytes(64))
  return scalar if any(scalar) else _secret()


def _raised(point: bytes, secret: bytes) -> bytes:
  return bindings.crypto_scalarmult_ed25519_noclamp(secret, point)


def _check(points: Sequence[bytes]) -> None:
  """Raises a ValueError for what is no point of the prime-order subgroup, which could tell bits of
  the secret.
  """
  for number, point in enumerate(points):
    try:
      is_point = bindings.crypto_core_ed25519_is_valid_point(point)
    except (TypeError, exceptions.CryptoError):
      is_point = False
    if not is_point:
      raise ValueError(f"what the other site sends for id {number} is not a point of the group")
