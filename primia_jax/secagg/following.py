"""How a site that is not in a sum is told it: where a round takes some of the sites only.

Who learns what: such a site learns what those in the sum learn, which is the sum and who is in it.
It has the same grounds to believe it: a quorum of the sum's sites have signed the lists of
survivors for these keys, and the coordinator has signed the sum for both. A coordinator that signs
another sum for it than for the others is found out as `exchange` says: sites with different sums
cannot take part in one sum later.
"""

from __future__ import annotations

import functools

import numpy as np

from primia_jax.secagg import keys, rounds, server
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused
from primia_jax.secagg.rounds import Setup


def tell(state: server.Server, total: msg.Total) -> msg.Followed:
  """The sum of a server that has signed it (`server.sign_total`), for a site that is not in it."""
  assert state.lists is not None
  consents = {i: one.signature for i, one in sorted(state.received[3].items())}
  lists = state.lists.survivors, state.lists.dropouts
  return msg.Followed(
    state.round, state.transcript, *lists, consents, total.vectors, total.signature
  )


def take(
  setup: Setup, round: int, number: int, told: msg.Message, public: bytes
) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
  """Checks what a site is told of a sum that it is not in.

  Args:
    setup: of the sum, as this site has made it.
    round: of the sum.
    number: of this site.
    told: what came.
    public: the server's pinned public key.

  Returns:
    (the sum, a vector for each of the setup's sizes; the sites in it).

  Raises:
    Refused: it is not the sum of this round, too few sites have signed who is in it, or the server
      has not signed it for them.
  """
  refuse = functools.partial(Refused, number, "total")
  if not isinstance(told, msg.Followed):
    raise refuse("malformed", f"{type(told).__name__} instead of Followed")
  if told.round != round:
    raise refuse("another round", f"round {told.round} instead of {round}")
  alive, dead = set(told.survivors), set(told.dropouts)
  if alive & dead:
    raise refuse("overlapping", f"sites {sorted(alive & dead)} are survivors and dropouts")
  if [*told.survivors] != sorted(alive) or [*told.dropouts] != sorted(dead):
    raise refuse("malformed", "a list is not in increasing order, or names a site twice")
  if unknown := (alive | dead) - set(setup.identities):
    raise refuse("unknown", f"sites {sorted(unknown)} do not belong to the sum")
  if unknown := set(told.consents) - alive:
    raise refuse("unknown", f"signatures of sites {sorted(unknown)}, which are no survivors")
  if min(len(alive), len(told.consents)) < setup.quorum:
    raise refuse(
      "too few", f"{len(told.consents)} sites signed the lists; the quorum is {setup.quorum}"
    )
  lists = msg.Survivors(round, told.survivors, told.dropouts)
  context = rounds.context_of(told.transcript, lists)
  for i, signature in told.consents.items():
    text = rounds.signed_text(setup, msg.Consent(i, round, b""), context)
    if not keys.verify(setup.identities[i], text, signature):
      raise refuse("forged", f"site {i} did not sign the lists that this site was shown")
  total = msg.Total(round, told.vectors, b"")
  if not keys.verify(public, rounds.signed_text(setup, total, context), told.signature):
    raise refuse(
      "forged",
      "the sum is not signed by the server's pinned identity for this round's keys and survivors",
    )
  if not rounds.legal_vectors(told.vectors, setup):
    raise refuse(
      "malformed", f"a sum must be vectors of {setup.sizes} elements of Z_2^{setup.num_bits}"
    )
  return told.vectors, told.survivors


def message_bytes(setup: Setup) -> int:
  """An upper bound on the bytes of what such a site is told."""
  return 2 * rounds.message_bytes(setup)  # a sum, and less of each site than a roster has
