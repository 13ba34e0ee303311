"""How the sites of a run meet before its first sum: who they are, and from which state they start.

Each site says two signed messages to all others, `Hello` and `Start`, which the coordinator relays.
It can keep sites apart. A site that has accepted a roster (`pinning`) takes the identities in it
and no others. Without one they are pinned at the first meeting, at which the coordinator could take
the place of a site; from then on every site refuses another identity by name. All sites must have
been invited by one coordinator.

A run that continues starts from a global state that somebody saved. Who saves it could give each
site another one, or one of their own making, and learn a single site's update from the next sum
(see `exchange`). So each site records a digest of the state after each round, in a place of its
own, and `check` compares. A site without that record, because it was lost in that round, takes the
digest that all other sites of the round have signed, provided that those which have signed it are
more than the sites that may collude.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from primia_jax import durable
from primia_jax.secagg import carrier as carrying
from primia_jax.secagg import errors, keys, pinning
from primia_jax.secagg import messages as msg
from primia_jax.secagg.carrier import MEETING_BYTES, Carrier
from primia_jax.secagg.errors import Lost, Refused, Rejected
from primia_jax.secagg.exchange import Pinned

_Said = TypeVar("_Said", msg.Hello, msg.Word, msg.Start)


def own_identity(path: pathlib.Path) -> keys.Identity:
  """The identity in a file; a fresh one is kept there at the first call.

  Raises:
    ValueError: the file holds no private key.
  """
  if not path.is_file():
    durable.replace(path, keys.identity().private)
  return pinning.kept(path)


def invited(carrier: Carrier) -> msg.Invitation | msg.Recalled:
  """Waits for the coordinator's invitation, or to be recalled to a run that goes on, and leaves
  unanswered what an earlier run asks for.

  Raises:
    Lost: none comes in time.
  """
  try:
    while True:
      with contextlib.suppress(ValueError):
        message = msg.decode(carrier.hear(MEETING_BYTES))
        if (
          isinstance(message, msg.Invitation | msg.Recalled)
          and len(message.identity) == keys.KEY_BYTES
        ):
          return message
      carrier.say(b"")
  except OSError as error:
    raise Lost(f"no invitation of a coordinator has come ({error}); start it, too") from error


def hello(
  own: keys.Identity, site: int, invitation: msg.Invitation, told: bytes = b""
) -> msg.Hello:
  """A site's first message, which answers an invitation."""
  made = msg.Hello(site, own.public, invitation.identity, os.urandom(keys.KEY_BYTES), told, b"")
  return made._replace(signature=keys.sign(own.private, _text(invitation.fresh, made)))


def answered(
  data: bytes, invitation: msg.Invitation, members: Mapping[int, bytes] | None = None
) -> msg.Hello:
  """The hello with which a site has answered an invitation; the coordinator then knows who it is.

  It is signed for this invitation, whose 32 bytes are fresh, so that nobody can say it again.

  Args:
    data: from whoever answered.
    invitation: that was sent there.
    members: number to public key, of a roster; without one any key is taken.

  Raises:
    Rejected: it is no hello, no member has its number, or that member has not signed it.
  """
  reject = lambda site, reason, detail: Rejected(site, "hello", reason, detail)
  try:
    message = msg.decode(data)
  except ValueError as error:
    raise reject(None, "malformed", str(error)) from error
  site = getattr(message, "site", None)
  if not isinstance(message, msg.Hello):
    said = errors.readable(message.reason) if isinstance(message, msg.Ended) else ""
    what = f"it is no hello but {type(message).__name__} {said}".strip()
    raise reject(site, "malformed", what)
  if members is not None and message.site not in members:
    raise reject(site, "unknown", f"the roster has the sites {sorted(members)}")
  if members is not None and message.identity != members[message.site]:
    raise reject(site, "unknown", "the roster has another key at that number")
  if not keys.verify(message.identity, _text(invitation.fresh, message), message.signature):
    raise reject(site, "forged", "the key in it has not signed it for this invitation")
  if message.server != invitation.identity:
    raise reject(site, "unknown", "it was invited by another coordinator")
  return message


def start(
  own: keys.Identity,
  label: bytes,
  site: int,
  round: int,
  state: bytes,
  sites: tuple[int, ...],
  told: bytes = b"",
) -> msg.Start:
  """A site's second message; see `messages.Start`. `label` is that of its `Exchange`, so that the
  message holds for this start only.
  """
  made = msg.Start(site, round, state, sites, told, b"")
  return made._replace(signature=keys.sign(own.private, _text(label, made)))


def tell_all(carrier: Carrier, own: _Said, num_sites: int) -> dict[int, _Said]:
  """Says a message to all other sites, and returns those of all, by site.

  Raises:
    Lost: the coordinator ends the run, or sends nothing in time.
    Refused: it does not relay one message of each site, or changes this site's own.
  """
  carrier.say(msg.encode(own))
  kind, refuse = type(own), functools.partial(Refused, own.site, type(own).__name__.lower())
  try:
    relayed = carrying.hear(carrier, MEETING_BYTES)
    if not isinstance(relayed, msg.Relayed):
      raise refuse("malformed", f"{type(relayed).__name__} instead of what the sites say")
    said: dict[int, Any] = {i: msg.decode(data) for i, data in relayed.said.items()}
  except OSError as error:
    raise Lost(f"site {own.site} has met no others: {error}") from error
  except ValueError as error:
    raise refuse("malformed", str(error)) from error
  if sorted(said) != list(range(num_sites)):
    raise refuse("too few", f"sites {sorted(said)} of {num_sites} are said to be there")
  for i, one in said.items():
    if type(one) is not kind or one.site != i:
      raise refuse("malformed", f"what is relayed is no {kind.__name__.lower()} of site {i}")
  if said[own.site] != own:
    raise refuse("forged", "its own message was changed")
  return said


def pin(
  hellos: Mapping[int, msg.Hello],
  invitation: msg.Invitation,
  own: keys.Identity,
  number: int,
  known: pathlib.Path | Pinned,
) -> Pinned:
  """Pins the identities of all sites, and that of the coordinator.

  Args:
    hellos: by site.
    invitation: the coordinator's.
    own: this site's identity.
    number: this site.
    known: the identities of a roster that it has accepted; or its file of those that it pinned at
      the first meeting, made there.

  Raises:
    Refused: a message is not signed by its identity, or an identity is not the one known.
    ValueError: the file of known identities is damaged.
  """
  for i, message in hellos.items():
    if not keys.verify(message.identity, _text(invitation.fresh, message), message.signature):
      raise Refused(number, "hello", "forged", f"site {i}'s is not signed by the identity in it")
    if message.server != invitation.identity:
      raise Refused(number, "hello", "inconsistent", f"site {i} was invited by another coordinator")
  said = Pinned(own, {i: message.identity for i, message in hellos.items()}, invitation.identity)
  if hellos[number].identity != own.public:
    raise Refused(number, "hello", "changed key", "another identity stands in its own place")
  found, where = _named(said), "in the roster"
  if isinstance(known, Pinned):
    before = _named(known)
  else:
    where = f"at the first meeting ({known})"
    if not known.is_file():
      durable.replace(known, json.dumps(found, indent=2).encode())
    try:
      before = dict(json.loads(known.read_text()))
    except (TypeError, ValueError) as error:
      raise ValueError(f"{known} is damaged ({error}); restore it") from error
  if changed := [who for who in {**before, **found} if before.get(who) != found.get(who)]:
    raise Refused(
      number,
      "hello",
      "changed key",
      f"{', '.join(changed)} shows another identity than {where}: somebody takes its place, or its "
      "own folder was lost. Ask there for the key, and correct what is known only if it is right",
    )
  return said


def _named(pinned: Pinned) -> dict[str, str]:
  of_sites = {f"site {i}": public.hex() for i, public in pinned.sites.items()}
  return of_sites | {"the coordinator": pinned.server.hex()}


def check(
  starts: Mapping[int, msg.Start], pinned: Pinned, label: bytes, number: int, colluding: int
) -> tuple[int, ...]:
  """Checks that all sites start from one state, and that this site has a reason to trust it.

  A site that has recorded the state needs nobody's word. Any other needs that of every other site
  of that round, and of at least max(2, colluding + 1) sites, in the round or following it: one of
  them is honest and has recorded it.

  Args:
    starts: by site, of all.
    pinned: the identities.
    label: of this start.
    number: this site.
    colluding: how many sites may collude with the server.

  Returns:
    The sites of the last round.

  Raises:
    Refused: for a forged message, other states elsewhere, or too few who have signed this one.
  """
  own = starts[number]
  for i, one in starts.items():
    if not is_signed(one, pinned.sites[i], label):
      raise Refused(
        number,
        "start",
        "forged",
        f"site {i}'s message is not signed for this start; it may have other settings, another "
        "roster or another version",
      )
  same = [i for i, one in starts.items() if (one.round, one.state) == (own.round, own.state)]
  if others := sorted(set(starts) - set(same)):
    raise Refused(
      number,
      "start",
      "inconsistent",
      f"sites {others} start from another state than this one, which is that of round {own.round}",
    )
  if own.sites:
    return own.sites
  recorded = {i: one.sites for i, one in starts.items() if one.sites}
  lists, least = set(recorded.values()), max(2, colluding + 1)
  sites = lists.pop() if lists else ()
  needed = set(sites) - {number}
  if lists or len(set(recorded) - {number}) < least or not needed <= set(recorded):
    raise Refused(
      number,
      "start",
      "too few",
      f"it has no record of round {own.round}, and sites {sorted(recorded)} have signed its state. "
      f"All other sites of that round must have, and at least {least}. To continue from the round "
      "before it, take the last checkpoint away; or begin a new run",
    )
  return sites


def is_signed(message: msg.Start, public: bytes, label: bytes) -> bool:
  """Whether `start` made a message, with this label, by the owner of this key."""
  return keys.verify(public, _text(label, message), message.signature)


def _text(label: bytes, message: msg.Hello | msg.Start) -> bytes:
  body = msg.encode(message._replace(signature=b""))
  return b"primia_jax meeting" + label + hashlib.sha256(body).digest()
