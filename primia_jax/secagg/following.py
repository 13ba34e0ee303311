"""How a site that is not in a sum is told it: where a round takes some of the sites only.

Who learns what: such a site learns what those in the sum learn, which is the sum and who is in it.
It has the same grounds to believe it: a quorum of the sum's sites have signed the lists of
survivors and the digest of their inputs for these keys, and it opens the sum itself (`opening`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from primia_jax.secagg import keys, opening, rounds, server
from primia_jax.secagg import messages as msg
from primia_jax.secagg.errors import Refused
from primia_jax.secagg.rounds import Setup

_LARGEST = 2**31 - 2**20  # bytes of a message: gRPC's most, less its frame


def tell(state: server.Server, evidence: msg.Evidence) -> msg.Message:
  """The sum of a server that has opened it, for a site that is not in it."""
  signatures = {i: one.signature for i, one in sorted(state.received[3].items())}
  return msg.together(state.lists, msg.Consents(state.round, signatures), evidence)


def take(
  setup: Setup, round: int, number: int, told: Sequence[msg.Message], public: bytes
) -> tuple[tuple[np.ndarray, ...], tuple[int, ...]]:
  """Checks what a site is told of a sum that it is not in.

  Args:
    setup: of the sum, as this site has made it.
    round: of the sum.
    number: of this site.
    told: what came.
    public: the coordinator's pinned public key.

  Returns:
    (the sum, a vector for each of the setup's sizes; the sites in it).

  Raises:
    Refused: it is not the sum of this round, too few sites have signed who is in it, or as
      `opening.recompute`.
  """
  refuse = functools.partial(Refused, number, "total")
  if list(map(type, told)) != [msg.Survivors, msg.Consents, msg.Evidence]:
    raise refuse("malformed", f"{[type(one).__name__ for one in told]} of a sum of others")
  lists, consents, evidence = told
  assert isinstance(lists, msg.Survivors)
  assert isinstance(consents, msg.Consents)
  assert isinstance(evidence, msg.Evidence)
  if lists.round != round:
    raise refuse("another round", f"round {lists.round} instead of {round}")
  alive, dead = set(lists.survivors), set(lists.dropouts)
  if alive & dead:
    raise refuse("overlapping", f"sites {sorted(alive & dead)} are survivors and dropouts")
  if [*lists.survivors] != sorted(alive) or [*lists.dropouts] != sorted(dead):
    raise refuse("malformed", "a list is not in increasing order, or names a site twice")
  if unknown := (alive | dead) - set(setup.identities):
    raise refuse("unknown", f"sites {sorted(unknown)} do not belong to the sum")
  if unknown := set(consents.signatures) - alive:
    raise refuse("unknown", f"signatures of sites {sorted(unknown)}, which are no survivors")
  if min(len(alive), len(consents.signatures)) < setup.quorum:
    raise refuse(
      "too few", f"{len(consents.signatures)} sites signed the lists; the quorum is {setup.quorum}"
    )
  transcript = hashlib.sha256(evidence.roster).digest()
  context = rounds.context_of(transcript, lists)
  for i, signature in consents.signatures.items():
    text = rounds.signed_text(setup, msg.Consent(i, round, b""), context)
    if not keys.verify(setup.identities[i], text, signature):
      raise refuse("forged", f"site {i} did not sign the lists that this site was shown")
  vectors = opening.recompute(setup, round, number, transcript, lists, evidence, public)
  return vectors, lists.survivors


def check_size(setup: Setup) -> None:
  """Raises a ValueError where a sum needs a longer message than carriers take."""
  if (size := message_bytes(setup)) > _LARGEST:
    raise ValueError(
      f"a sum of {sum(setup.sizes)} numbers over {len(setup.identities)} sites needs messages of "
      f"{size} bytes, and {_LARGEST} are the most; take a smaller model, or fewer sites in a round"
    )


def message_bytes(setup: Setup) -> int:
  """An upper bound on the bytes of what such a site is told."""
  return opening.message_bytes(setup) + rounds.message_bytes(setup)  # and lists with consents
