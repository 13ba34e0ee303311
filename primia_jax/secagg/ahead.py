"""Keys for the next sum, agreed on with the last messages of this one: a sum then takes three
messages instead of five.

  with MaskedInput    Advert     of the next sum
  with Survivors      Roster     if every site of this sum is a survivor and has advertised
  with Consent        Shares
  with Consents       Delivery   if every site has shared its keys

The next sum has the same sites, each a peer of all others, and begins with the masked input. Where
anything is missing, or the next sum has other sites or another threshold, these keys are forgotten,
and it takes its five messages. A site that is lost once its keys are agreed on has dropped out of
the next sum as any other that has shared its keys: the others open what hides its masks.

Who learns what: as `protocol` says. Keys are fresh for each sum and used for one only, since a
state with them is taken once. Their adverts and shares are bound to the sum before (`setup`), to
its keys and so to all totals opened before it, but not to that sum's total, which is not known yet.
Without more, a lying server could take the masked input of a site that goes on from another total,
and learn by the sum what that site makes of another model (see `exchange`). So each site signs a
`Bond` under the label of the sum that it takes part in, which has that total in it. Each site is
shown the bond of every survivor before it sends its signature of their list, and refuses if one
is missing. No share is told before a quorum has signed, so such a sum is not opened. The site with
another total can only be a dropout of the others' sum: then its own mask, which is not opened,
hides its input.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from primia_jax.secagg import keys, protocol, rounds, server
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused, Rejected
from primia_jax.secagg.protocol import Site
from primia_jax.secagg.rounds import Setup
from primia_jax.secagg.server import Server


def setup(now: Setup, transcript: bytes) -> Setup:
  """What the keys of the next sum are agreed on under, from this sum's setup and its roster."""
  session = hashlib.sha256(b"primia_jax keys ahead" + now.label + transcript).digest()
  return rounds.of_terms(rounds.terms(now)._replace(session=session))


def fits(agreed: Setup, now: Setup) -> bool:
  """Whether keys that were agreed on under one setup can be used for a sum of another.

  Each site must hold the same share of each other's secrets in both.
  """
  same = lambda s: (dict(s.identities), s.degree, s.threshold, s.malicious_server)
  return same(agreed) == same(now) and now.degree == len(now.identities) - 1


# ---- a site's part


def advertise(now: Site) -> tuple[Site, msg.Advert] | None:
  """The keys of the next sum, while a site sends its masked input in this one.

  Returns:
    The state that `share` takes, and the advert; None where not all sites are peers.
  """
  if now.setup.degree < len(now.setup.identities) - 1:
    return None
  agreed = setup(now.setup, now.transcript)
  return protocol.advertise(agreed, now.round, now.number, now.identity)


def share(coming: Site, roster: msg.Message) -> tuple[Site, msg.Shares]:
  """Shares for each other site; raises as `protocol.share_keys`, or where a site is missing."""
  if not isinstance(roster, msg.Roster):
    raise _refuse(coming, "malformed", f"{type(roster).__name__} instead of Roster")
  coming, shares = protocol.share_keys(coming, roster)
  if coming.members != set(coming.setup.identities):
    missing = sorted(set(coming.setup.identities) - coming.members)
    raise _refuse(coming, "too few", f"keys for the next sum without sites {missing}")
  return coming, shares


def take(coming: Site, delivery: msg.Message) -> Site:
  """The others' shares; raises as `protocol.take_shares`, or where one is missing."""
  if not isinstance(delivery, msg.Delivery):
    raise _refuse(coming, "malformed", f"{type(delivery).__name__} instead of Delivery")
  coming = protocol.take_shares(coming, delivery)
  if set(coming.shares) != set(coming.setup.identities):
    raise _refuse(coming, "too few", "shares of the next sum's keys are missing")
  return coming


def begin(agreed: Site, now: Setup, round: int) -> tuple[Site, msg.Bond]:
  """The state with which a site sends its masked input, and what binds it to this sum.

  Args:
    agreed: the state after `take`, to be used once.
    now: the sum's setup, which `fits`.
    round: of the sum.
  """
  site = agreed._replace(setup=now, round=round)
  text = rounds.signed_text(now, msg.Bond(site.number, round, b""), site.transcript)
  return site, msg.Bond(site.number, round, keys.sign(site.identity.private, text))


def check_bonds(site: Site, bonds: msg.Message, lists: msg.Survivors) -> None:
  """Checks that every survivor takes part in the same sum, before this site consents to it.

  Raises:
    Refused: a survivor's bond is missing, or is of another sum, keys or site.
  """
  refuse = functools.partial(Refused, site.number, msg.STAGES[3])
  if not isinstance(bonds, msg.Bonds):
    raise refuse("malformed", f"{type(bonds).__name__} instead of Bonds")
  for v in lists.survivors:
    if v not in site.setup.identities or v not in bonds.signatures:
      raise refuse("unknown", f"there is no bond of site {v}")
    text = rounds.signed_text(site.setup, msg.Bond(v, site.round, b""), site.transcript)
    if not keys.verify(site.setup.identities[v], text, bonds.signatures[v]):
      raise refuse("forged", f"site {v} is not bound to this sum: it may go on from another one")


def _refuse(coming: Site, reason: str, detail: str) -> Refused:
  return Refused(coming.number, msg.STAGES[coming.num_sent], reason, detail)


# ---- the server's part


def gather(
  coming: Server | None, said: Mapping[int, Any], rejected: list[Rejected]
) -> Server | None:
  """The state with one message of every site for the next sum's keys; None if one is missing."""
  if coming is None or set(said) != set(coming.setup.identities):
    return None
  try:
    for site, message in said.items():
      if getattr(message, "site", None) != site:
        what = f"{type(message).__name__} is no message of this site"
        raise Rejected(site, msg.STAGES[coming.stage], "malformed", what)
      coming = server.receive(coming, message)
  except Rejected as error:
    rejected.append(error.with_traceback(None))
    return None
  return coming


def serve(agreed: Server, now: Setup, round: int) -> Server:
  """The state of a server that waits for masked inputs under keys that were agreed on before."""
  state = server.start(now, round)
  received = (*agreed.received[:2], *state.received[2:])
  return state._replace(
    stage=2, received=received, roster=agreed.roster, transcript=agreed.transcript
  )


def check_bond(state: Server, site: int, data: bytes) -> bytes:
  """The signature of a site's encoded bond to the sum of this state.

  Raises:
    Rejected: it is none, or of another sum, or not signed by that site.
  """
  reject = functools.partial(Rejected, site, msg.STAGES[state.stage])
  try:
    bond = msg.decode(data)
  except ValueError as error:
    raise reject("malformed", str(error)) from error
  if not isinstance(bond, msg.Bond) or bond.site != site or site not in state.setup.identities:
    raise reject("malformed", "it is bound to no sum")
  text = rounds.signed_text(state.setup, msg.Bond(site, state.round, b""), state.transcript)
  if not keys.verify(state.setup.identities[site], text, bond.signature):
    raise reject("forged", "its bond is not of this sum, or not signed by its pinned identity")
  return bond.signature
