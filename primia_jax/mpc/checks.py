"""The end of an inference whose client is "checked": no output before all openings are verified.

Two messages come before the model owner's shares of the outputs, each of one length in both
directions: its challenge and the data owner's hash of its bits' tags; then nothing and the data
owner's response. `tags` has the protocol and its proof.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from primia_jax.mpc import replay, segments, tags
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.replay import ELEMENT, WORD
from primia_jax.mpc.sharing import MODEL_OWNER
from primia_jax.types import Array

SIZES = (tags.CHALLENGE_BYTES, tags.RESPONSE_BYTES)
# Of each round, what this party sent and what the other one sent, in the message's order.
Crossed = list[tuple[Sequence[Array], Sequence[np.ndarray]]]
# The openings; then this party's shares of the outputs, and what crossed.
Rounds = Generator[bytes, bytes | memoryview, tuple[list[Array], Crossed]]


class Deviated(RuntimeError):
  """The data owner opened what does not follow from what it was dealt; it learns no output."""


def compiled(
  plan: Plan, traced: core.ClosedJaxpr, kinds: Sequence[str]
) -> Callable[[int, Any, Rounds], Rounds]:
  """Compiles what both parties do with tags and keys.

  Args:
    traced: the protocol of one party, as it is cut.
    kinds: of each opening in it (`replay`).

  Returns:
    (party, its `tags.Keys` or `tags.Holding`, its openings) -> the openings and the check.
  """
  places, bits = segments.places(traced), plan.config.num_bits
  program = replay.compiled(plan.circuit, segments.exchanged(traced))

  def ordered(crossed: Crossed, side: int) -> list[np.ndarray]:
    return [np.asarray(crossed[level][side][i]) for level, i in places]

  def opened(crossed: Crossed) -> list[np.ndarray]:
    pairs = zip(kinds, ordered(crossed, 0), ordered(crossed, 1), strict=True)
    limit = np.uint32(2**bits - 1)
    return [a ^ b if kind == WORD else (a + b) & limit for kind, a, b in pairs]

  def shown(holding: tags.Holding, rounds: Rounds) -> Rounds:
    shares, crossed = yield from rounds
    values = opened(crossed)
    words = program.bits(holding.tags.bits, values)
    challenge = yield tags.digest_bits(words)
    lifted, tagged = (program.elements(v.elements, values) for v in (holding.shares, holding.tags))
    yield tags.respond(bytes(challenge), bits, lifted, tagged)
    return shares, crossed

  def verified(keys: tags.Keys, rounds: Rounds) -> Rounds:
    shares, crossed = yield from rounds
    values, theirs = opened(crossed), ordered(crossed, 1)
    sent = {
      what: [v for k, v in zip(kinds, theirs, strict=True) if k == what] for what in (ELEMENT, WORD)
    }
    challenge = os.urandom(tags.CHALLENGE_BYTES)
    digest = yield challenge
    response = yield bytes(tags.RESPONSE_BYTES)
    of_words = program.bits(keys.keys.bits, values)
    of_elements = program.elements(keys.keys.elements, values)
    good = tags.check_bits(digest, np.asarray(keys.delta), sent[WORD], of_words)
    alpha = int(keys.alpha)
    good &= tags.check(challenge, response, bits, alpha, sent[ELEMENT], of_elements)
    if not good:
      raise Deviated("the data owner's openings do not carry the dealer's tags; it gets no output")
    return shares, crossed

  def checking(party: int, side: Any, rounds: Rounds) -> Rounds:
    return verified(side, rounds) if party == MODEL_OWNER else shown(side, rounds)

  return checking
