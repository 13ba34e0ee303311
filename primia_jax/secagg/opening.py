"""How a site opens a sum itself, from what the sites of the sum have signed, and what it writes
down before it sends the message that opens one.

The coordinator is not asked for a total. It passes on the keys, the masked inputs and the answers,
and each site computes the sum from them as the server does (`server.open_total`). The masked inputs
are those that the sites fixed, by a digest in the list of survivors that they signed, before any
share was told. So a coordinator cannot make sites go on from a sum that is not theirs, alike at all
sites or not. With a threshold above two thirds, sites that play together with it must choose their
inputs of a sum before it opens. They know more where a round is repeated: they know its sum.

Who learns what: each site learns what the server learns, which is the sum and no input. So what
holds against the server and t colluding sites holds against t colluding sites without it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from primia_jax.secagg import keys, protocol, rounds, server
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused, Rejected, RoundFailed
from primia_jax.secagg.rounds import Setup


class Opening(NamedTuple):
  """A sum that a site's next message opens.

  Attributes:
    round, purpose: of the sum.
    sites: number to public key, of all sites in it.
    digest: SHA-256 of this site's own ring elements, without masks.
  """

  round: int
  purpose: int
  sites: Mapping[int, bytes]
  digest: bytes


def of(site: protocol.Site, vectors: Sequence[np.ndarray]) -> Opening:
  """The record of a sum whose consents this site has seen, with its input."""
  assert site.lists is not None
  own = hashlib.sha256()
  for vector in vectors:
    own.update(vector.astype(vector.dtype.newbyteorder("<"), copy=False).tobytes())
  among = {i: site.setup.identities[i] for i in site.lists.survivors}
  return Opening(site.round, site.setup.purpose, among, own.digest())


def evidence(state: server.Server, identity: keys.Identity) -> msg.Evidence:
  """What opens a sum, signed for the sites: from the state after `server.open_total`."""
  assert state.roster is not None
  assert state.lists is not None
  masked, answers = (
    {i: msg.encode(state.received[stage][i]) for i in sorted(state.received[stage])}
    for stage in (2, 4)
  )
  text = _signed_text(state.setup, state.round, state.transcript, state.lists)
  signature = keys.sign(identity.private, text)
  return msg.Evidence(state.round, msg.encode(state.roster), masked, answers, signature)


def total(site: protocol.Site, told: msg.Message, public: bytes) -> tuple[np.ndarray, ...]:
  """The sum that a site has taken part in.

  Args:
    site: the state after `protocol.unmask`.
    told: what the coordinator passes on.
    public: the coordinator's pinned public key.

  Raises:
    Refused: it does not open the sum of the inputs that the survivors of this site's lists fixed.
  """
  if site.num_sent != len(msg.STAGES) or site.lists is None:
    detail = f"this site has sent {site.num_sent} messages of {len(msg.STAGES)}"
    raise Refused(site.number, "total", "out of turn", detail)
  held = site.setup, site.round, site.number, site.transcript, site.lists
  return recompute(*held, told, public)


def recompute(
  setup: Setup,
  round: int,
  number: int,
  transcript: bytes,
  lists: msg.Survivors,
  told: msg.Message,
  public: bytes,
) -> tuple[np.ndarray, ...]:
  """The sum over the survivors of lists that a quorum has signed, from what they have sent. The
  caller has checked the lists.

  Args:
    setup: of the sum, as this site has made it.
    round: of the sum.
    number: of this site, for its errors.
    transcript: the digest of the roster under which the lists were signed.
    lists: the survivors, the dropouts and the digest of the masked inputs.
    told: what the coordinator passes on.
    public: the coordinator's pinned public key.

  Returns:
    A vector for each of the setup's sizes.

  Raises:
    Refused: for other keys or inputs than those signed, a message that its alleged sender did not
      sign, or too few shares.
  """
  refuse = functools.partial(Refused, number, "total")
  if not isinstance(told, msg.Evidence):
    raise refuse("malformed", f"{type(told).__name__} instead of Evidence")
  if told.round != round:
    raise refuse("another round", f"round {told.round} instead of {round}")
  if hashlib.sha256(told.roster).digest() != transcript:  # as `rounds.transcript_of`
    raise refuse("forged", "the keys are not those of this sum")
  if not keys.verify(public, _signed_text(setup, round, transcript, lists), told.signature):
    raise refuse("forged", "it is not signed by the coordinator's pinned identity for this sum")
  alive, longest = set(lists.survivors), rounds.message_bytes(setup)
  if set(told.masked) != alive or not set(told.answers) <= alive:
    raise refuse("unknown", "the masked inputs or answers are not those of the survivors")
  if any(len(data) > longest for data in (*told.masked.values(), *told.answers.values())):
    raise refuse("malformed", f"a message in it is longer than {longest} bytes")
  if server.digest_of_inputs(told.masked[v] for v in lists.survivors) != lists.inputs:
    raise refuse("forged", "the masked inputs are not those that the sites of the sum have fixed")
  try:
    roster: Any = msg.decode(told.roster)
    if not isinstance(roster, msg.Roster):
      raise ValueError(f"{type(roster).__name__} instead of Roster")
    shared = dict.fromkeys(sorted(alive | set(lists.dropouts)))
    if unknown := set(shared) - {a.site for a in roster.adverts}:
      raise ValueError(f"sites {sorted(unknown)} have no keys")
    received: tuple[Any, ...] = {a.site: a for a in roster.adverts}, shared, {}, {}, {}
    state = server.start(setup, round)._replace(
      stage=2, roster=roster, transcript=transcript, received=received
    )
    state = _taken(state, told.masked)
    consented = *state.received[:3], dict.fromkeys(lists.survivors), {}
    state = _taken(state._replace(stage=4, lists=lists, received=consented), told.answers)
    return server.open_total(state)[1].total
  except RoundFailed as error:
    raise refuse("too few", str(error)) from error
  except ValueError as error:
    forged = isinstance(error, Rejected) and error.reason == "forged"
    raise refuse("forged" if forged else "malformed", str(error)) from error


def message_bytes(setup: Setup) -> int:
  """An upper bound on the bytes of what each site is told of a sum: an input of every site."""
  of_site = 2 * setup.degree * (2 * 4 + keys.KEY_BYTES)  # shares of its answer
  return (1 + len(setup.identities)) * (rounds.message_bytes(setup) + of_site)


def _signed_text(setup: Setup, round: int, transcript: bytes, lists: msg.Survivors) -> bytes:
  """What the coordinator signs: these fix the roster, the survivors and their inputs."""
  frame = msg.Evidence(round, b"", {}, {}, b"")
  return rounds.signed_text(setup, frame, rounds.context_of(transcript, lists))


def _taken(state: server.Server, said: Mapping[int, bytes]) -> server.Server:
  for site, data in said.items():
    message: Any = msg.decode(data)
    if getattr(message, "site", None) != site:
      raise ValueError(f"a message of site {site} names another sender")
    state = server.receive(state, message)
  return state
