"""How a site that was lost comes back while the others go on.

Where a site is missing at the beginning of a round, those that are left say a signed `Start` each:
the state that they go on from, who is left, and the digest to which all their later sums are bound.
The coordinator looks whether a program of the missing site waits. It is given what all have said at
the meeting, these messages, and the state from one site, in each round another one. It says the
same `Start`, which the others are shown; from then on it is in their sums.

Who learns what: the site that is back, and the coordinator that relays it, learn the global state,
which follows from the sums that all sites have opened. The site trusts a state whose digest more
sites have signed than may collude with the coordinator, and two at least: one of them is honest,
and signs only what it goes on from itself. Sites that were shown other returns are bound to other
digests, and refuse each other in the next sum, as `exchange` says.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from primia_jax.secagg import carrier as carrying
from primia_jax.secagg import encoding, meeting
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import MEETING_BYTES, Carrier
from primia_jax.secagg.errors import Lost, Refused
from primia_jax.secagg.exchange import Exchange, Pinned

_Taken = TypeVar("_Taken")


class Standing(NamedTuple):
  """What `Start.told` holds: what a site tells besides the digest of the state.

  Attributes:
    chain: the digest to which its later sums are bound, 32 bytes.
    common: bytes that are the same at all sites, and that a site which is back needs.
    own: bytes about this site, such as what its ledger holds.
  """

  chain: bytes
  common: bytes
  own: bytes


class Back(NamedTuple):
  """What the sites of a run go on from, as those that are left have signed it.

  Attributes:
    round: the rounds begun so far.
    state: a digest of the global state.
    common: see `Standing`.
    own: `Standing.own` of each site that has signed, by its number.
  """

  round: int
  state: bytes
  common: bytes
  own: Mapping[int, bytes]


def start(
  sums: Exchange, pinned: Pinned, number: int, back: Back, own: bytes, sites: tuple[int, ...]
) -> msg.Start:
  """The signed message of a site that goes on from here, with what it has of its own.

  Args:
    sums: its end of all sums, whose chain is told.
    pinned: the identities.
    number: of this site.
    back: what it goes on from.
    own: see `Standing`.
    sites: those that are left.
  """
  parts: list[bytes] = []
  encoding.put_fields(parts.append, Standing(sums.chain, back.common, own))
  told = b"".join(parts)
  return meeting.start(pinned.own, _label(sums), number, back.round, back.state, sites, told)


def roll_call(
  carrier: Carrier, sums: Exchange, pinned: Pinned, own: msg.Start, give: Callable[[], bytes]
) -> tuple[int, ...]:
  """Says that this site goes on, and takes back those that were lost and are there again.

  Args:
    carrier: to the coordinator.
    sums: this site's end of all sums; the sites that are back are in the next one.
    pinned: the identities.
    own: from `start`.
    give: the global state as bytes, asked for if this site is to give it.

  Returns:
    The sites that are back.

  Raises:
    Lost: the coordinator has dismissed this site, or sends nothing.
    Refused: what it sends is malformed.
  """
  refuse = functools.partial(Refused, own.site, "start")
  hear = functools.partial(_hear, carrier, own.site)
  carrier.say(msg.encode(own))
  returning = hear()
  if not isinstance(returning, msg.Returning):
    raise refuse("malformed", f"{type(returning).__name__} instead of who is back")
  if not returning.sites:
    return ()
  given = give() if returning.giver == own.site else b""
  carrier.say(msg.encode(msg.Word(own.site, given)))
  relayed = hear()
  if not isinstance(relayed, msg.Relayed):
    raise refuse("malformed", f"{type(relayed).__name__} instead of what they say")
  return _admitted(relayed, sums, pinned, own)


def giver_of(starts: Mapping[int, msg.Start]) -> int:
  """The site that gives the state in a round; in the next round it is another one, so that one that
  gives what is not the state delays a return and does not prevent it.

  Args:
    starts: of those that go on, by site; the round is the one that most of them name.
  """
  (round, _), *_ = collections.Counter(one.round for one in starts.values()).most_common(1)
  return sorted(starts)[round % len(starts)]


def met(
  recalled: msg.Recalled, number: int, num_sites: int
) -> tuple[msg.Invitation, dict[int, msg.Hello]]:
  """What was said at the meeting of a run that goes on, for `meeting.pin` to check.

  Raises:
    Refused: it is not one message of each site.
  """
  try:
    said = {i: msg.decode(data) for i, data in recalled.hellos.items()}
  except ValueError as error:
    raise Refused(number, "hello", "malformed", str(error)) from error
  hellos = {i: one for i, one in said.items() if isinstance(one, msg.Hello) and one.site == i}
  if sorted(hellos) != list(range(num_sites)):
    what = f"it was said by sites {sorted(hellos)} of {num_sites}"
    raise Refused(number, "hello", "too few", what)
  return msg.Invitation(recalled.identity, recalled.fresh), hellos


def come_back(
  carrier: Carrier,
  sums: Exchange,
  pinned: Pinned,
  number: int,
  colluding: int,
  take: Callable[[Back, bytes], _Taken],
  own: bytes = b"",
  tell: Callable[[str], object] = lambda what: None,
) -> tuple[Back, _Taken]:
  """Takes part again in a run that goes on. Its `Recalled` is not yet answered.

  Args:
    carrier: to the coordinator.
    sums: this site's end of all sums, as at the start; afterwards as that of the others.
    pinned: the identities.
    number: of this site.
    colluding: how many sites may collude with the coordinator.
    take: checks the state given, as bytes, against its digest, and returns what is made of it.
    own: see `Standing`.
    tell: is told of each site that gave what `take` refused.

  Returns:
    (what it goes on from, what `take` has made of the state).

  Raises:
    Refused: too few sites have signed the state, or not alike; or as `take`, once each of the sites
      was to give the state, and `take` refused it.
    Lost: the coordinator sends nothing.
  """
  refuse = functools.partial(Refused, number, "start")
  carrier.say(msg.encode(msg.Word(number, b"")))
  wrong = set[int]()
  while True:
    message = _hear(carrier, number, can_be_recalled=True)
    if isinstance(message, msg.Recalled):  # what it has said came too late
      carrier.say(msg.encode(msg.Word(number, b"")))
      continue
    if not isinstance(message, msg.Resumed):
      raise refuse("malformed", f"{type(message).__name__} instead of what the others go on from")
    signed, standing, back = _agreed(message.starts, sums, pinned, number, colluding)
    giver = giver_of(dict.fromkeys(message.starts, signed))
    try:
      taken = take(back, message.state)
    except Refused as error:
      wrong.add(giver)
      tell(f"{error}; site {giver} was to give it")
      if wrong >= {i for i in message.starts if i != number}:
        detail = f"sites {sorted(wrong)} were to give the state, one after another: {error}"
        raise refuse(error.reason, detail) from error
      carrier.say(msg.encode(msg.Word(number, b"")))  # in the next round another one gives it
      continue
    sums.resume(standing.chain, signed.sites)
    made = start(sums, pinned, number, back, own, signed.sites)
    carrier.say(msg.encode(made))
    message = _hear(carrier, number, can_be_recalled=True)
    if isinstance(message, msg.Recalled):
      carrier.say(msg.encode(msg.Word(number, b"")))
      continue
    if not isinstance(message, msg.Relayed):
      raise refuse("malformed", f"{type(message).__name__} instead of who is back")
    if number not in _admitted(message, sums, pinned, made):
      raise refuse("forged", "its own message was changed")
    return back, taken


def _agreed(
  said: Mapping[int, bytes], sums: Exchange, pinned: Pinned, number: int, colluding: int
) -> tuple[msg.Start, Standing, Back]:
  """What enough sites have signed alike."""
  refuse = functools.partial(Refused, number, "start")
  starts = {i: _checked(i, data, sums, pinned) for i, data in said.items() if i != number}
  known = [one for one in starts.values() if one is not None]
  if len(known) < len(said):
    raise refuse("forged", "a site's message is not signed for this run")
  least = max(2, colluding + 1)
  if len(known) < least:
    raise refuse("too few", f"{len(known)} sites have signed the state; at least {least} must")
  standings = [_standing(one) for one in known]
  alike = {
    (one.round, one.state, one.sites, what.chain, what.common)
    for one, what in zip(known, standings, strict=True)
  }
  if len(alike) > 1 or number in known[0].sites:
    raise refuse("inconsistent", f"sites {sorted(starts)} do not go on from one state without it")
  own = {one.site: what.own for one, what in zip(known, standings, strict=True)}
  back = Back(known[0].round, known[0].state, standings[0].common, own)
  return known[0], standings[0], back


def _admitted(
  relayed: msg.Relayed, sums: Exchange, pinned: Pinned, own: msg.Start
) -> tuple[int, ...]:
  """Takes back the sites whose messages agree with this site's own."""
  back, mine = [], _standing(own)
  for i, data in sorted(relayed.said.items()):
    one = _checked(i, data, sums, pinned)
    if one is None or i in own.sites or (one.round, one.state) != (own.round, own.state):
      continue
    if one.sites == own.sites and _standing(one)[:2] == mine[:2]:
      back.append(one)
  for one in back:
    sums.admit(one)
  return tuple(one.site for one in back)


def _checked(site: int, data: bytes, sums: Exchange, pinned: Pinned) -> msg.Start | None:
  """A site's message, or None where it is not one that the site has signed."""
  try:
    message = msg.decode(data)
    if not isinstance(message, msg.Start) or message.site != site or site not in pinned.sites:
      return None
    _standing(message)
  except ValueError:
    return None
  return message if meeting.is_signed(message, pinned.sites[site], _label(sums)) else None


def _standing(message: msg.Start) -> Standing:
  source = encoding.Source(memoryview(message.told))
  found: Standing = encoding.take_fields(source, Standing)
  if source.left() or len(found.chain) != 32:
    raise ValueError("malformed message: it does not tell where the site stands")
  return found


def _label(sums: Exchange) -> bytes:
  """Of these messages, which no other of this start can then stand for."""
  return hashlib.sha256(b"primia_jax returning" + sums.label).digest()


def _hear(carrier: Carrier, number: int, can_be_recalled: bool = False) -> msg.Message:
  try:
    if not can_be_recalled:
      return carrying.hear(carrier, MEETING_BYTES)
    message = msg.decode(carrier.hear(MEETING_BYTES))
    return message if isinstance(message, msg.Recalled) else carrying.known(message)
  except OSError as error:
    raise Lost(f"site {number} is out of the run: {error}") from error
  except ValueError as error:
    raise Refused(number, "start", "malformed", str(error)) from error
