"""The dealer of an encrypted inference: what it deals, and how a model owner checks it."""

from __future__ import annotations

import functools
import hmac
import os
from typing import Any

import jax

from primia_jax.mpc import committing, inference, protocol, tags
from primia_jax.mpc.circuit import CHECKED
from primia_jax.mpc.committing import Committed
from primia_jax.mpc.messages import Blind, Correlations
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands
from primia_jax.mpc.publications import bound, checked_tag
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER


class Dealer:
  """Deals for one plan and one publication. It sees neither weights nor images.

  Args:
    tag: the model owner's.
    secret: 32 uniform bytes that only this dealer has, to be the same dealer in its next process;
      None draws them.

  Raises:
    ValueError: the plan has arguments given as shares, the tag is none, or the secret is too short.
  """

  def __init__(self, plan: Plan, tag: str, secret: bytes | None = None):
    secret = os.urandom(32) if secret is None else secret
    if len(secret) < 32:
      raise ValueError(f"the secret has {len(secret)} bytes; use 32 from os.urandom")
    circuit, key = checked(plan).circuit, committing.key(secret, "blind")
    number = hmac.digest(secret, b"number", "sha256").hex()[:32]
    self.plan, self._publication = plan, f"{plan.digest}-{checked_tag(tag)}-{number}"
    self._blind = Blind(MODEL_OWNER, self._publication, "", key)
    with plan.config.scope():
      blinds = protocol.blinds(circuit, bound(key, self._publication), MODEL_OWNER)
      self._blinds = jax.block_until_ready(protocol.full(circuit, blinds))

  def blind(self) -> Blind:
    """The key of B for the model owner, which takes it once; the data owner must not have it."""
    return self._blind

  def deal(self) -> tuple[Correlations, Correlations]:
    """Fresh correlations of one inference: for the model owner, and for the data owner."""
    first, second = _parts(self.plan, self._blinds, os.urandom(committing.SEED_BYTES))
    new, number = self._publication, os.urandom(32).hex()
    return Correlations(MODEL_OWNER, new, number, first), Correlations(
      DATA_OWNER, new, number, second
    )

  def deal_committed(self, seed: bytes | None = None) -> tuple[Correlations, Correlations]:
    """The same, with a number that commits to all of it (`committing`).

    Args:
      seed: 32 uniform bytes for this inference alone; None draws them and keeps no copy, so that
        nobody can ever open it.
    """
    seed = os.urandom(committing.SEED_BYTES) if seed is None else seed
    parts = _parts(self.plan, self._blinds, seed)
    number, committed = _committed(self._publication, seed, parts)
    first, second = (
      Correlations(party, self._publication, number, part, committed)
      for party, part in enumerate(parts)
    )
    return first, second


def recomputed(plan: Plan, weights: Operands, published: Operands, name: str, seed: bytes) -> str:
  """The number that an honest dealer gives an inference of this seed.

  The model owner calls it for a seed that the dealer opened to it. With B = W - D it has everything
  that the dealer had.

  The dealer must never open the seed of an inference that was used, or will be: the masks follow
  from it, and with what the parties opened so does the image. The model owner must not show a seed
  to the data owner: party 0's share of a product with B, which follows from the seed, gives the
  data owner B and so the weights.

  Args:
    weights: the model owner's operands of linear layers, encoded.
    published: D, ring elements.
    name: of the publication.
    seed: as opened.
  """
  with plan.config.scope():
    blinds = {i: weights[i].elements - d for i, d in published.items()}
    whole = protocol.full(plan.circuit, blinds)
  return _committed(name, seed, _parts(plan, whole, seed))[0]


def _parts(plan: Plan, blinds: Operands, seed: bytes) -> tuple[Any, Any]:
  """What both parties receive for one inference; a function of the seed and of B alone."""
  circuit = plan.circuit
  key, own = (committing.key(seed, purpose) for purpose in ("correlations", "data owner's blind"))
  deal = plan.compiled("deal", functools.partial(protocol.deal, circuit))
  with plan.config.scope():
    fresh = protocol.full(circuit, protocol.blinds(circuit, own, DATA_OWNER))
    dealt = deal(key, blinds | fresh)
  second = protocol.part(dealt, DATA_OWNER)
  if plan.config.client == CHECKED:
    tag = plan.compiled("tag", functools.partial(tags.deal, circuit))
    with jax.enable_x64(True):
      second = second._replace(tags=tag(dealt))
  return protocol.part(dealt, MODEL_OWNER), (second, own)


def _committed(name: str, seed: bytes, parts: tuple[Any, Any]) -> tuple[str, Committed]:
  first, second = map(committing.digest, parts)
  committed = Committed(committing.commitment(name, seed), (first, second))
  return committing.number(name, committed), committed


# ---- checks


def checked(plan: Plan) -> Plan:
  """The plan, if roles can hold all that it needs; else raises ValueError."""
  inference.check_owners(plan)
  return plan
