"""What the roles of an encrypted inference give each other, and which of it serves once."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax

from primia_jax.mpc import committing
from primia_jax.mpc.committing import Committed
from primia_jax.mpc.protocol import Operands, Ready
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

NAMES = {MODEL_OWNER: "model owner", DATA_OWNER: "data owner"}


class Once:
  """A secret that serves once; the base of what is single-use.

  Attributes:
    party: whom it is for.
    publication: which publication it belongs to: digest of the plan, tag of the weights, number of
      the dealer; public.
    inference: which inference it belongs to, or empty; public.
  """

  def __init__(self, party: int, publication: str, inference: str, secret: Any):
    self.party, self.publication, self.inference = party, publication, inference
    self._secret, self._process = [secret], os.getpid()

  def take(self, party: int) -> Any:
    """The secret, for its party, once.

    Raises:
      ValueError: it is for the other party, was used, or was made before this process was forked.
    """
    kind = type(self).__name__
    if os.getpid() != self._process:
      raise ValueError(
        f"this {kind} was made before this process was forked and may be used in the other one; "
        "the dealer must make a new one"
      )
    if party != self.party:
      raise ValueError(f"this {kind} is for the {NAMES[self.party]}, not the {NAMES[party]}")
    try:
      return self._secret.pop()
    except IndexError:
      raise ValueError(f"this {kind} was used; the dealer must make a new one") from None

  def block_until_ready(self) -> Once:
    """Waits until its arrays are computed, as arrays do."""
    jax.block_until_ready(self._secret)
    return self

  def __reduce_ex__(self, protocol: Any) -> Any:
    raise TypeError(f"a {type(self).__name__} serves once and cannot be copied or pickled")

  def __repr__(self) -> str:
    return f"{type(self).__name__}(for the {NAMES[self.party]}, used={not self._secret})"


class Blind(Once):
  """The key of B, from the dealer to the model owner, for one publication."""


class Correlations(Once):
  """One party's part of the correlated randomness of one inference.

  Attributes:
    committed: what stands behind the number of the inference; None where the number is drawn and
      nothing is committed to, as within one process.
  """

  def __init__(
    self, party: int, publication: str, inference: str, secret: Any,
    committed: Committed | None = None,
  ):  # fmt: skip
    super().__init__(party, publication, inference, secret)
    self.committed = committed

  def check_committed(self) -> None:
    """Checks, without using it up, that this part is the one that the number commits to.

    Raises:
      ValueError: it is another, there is no commitment, or it was used.
    """
    if self.committed is None or not self._secret:
      raise ValueError(f"{self} commits to nothing; take it from the dealer's outbox, unused")
    is_this = committing.digest(self._secret[0]) == self.committed.parts[self.party]
    if not is_this or committing.number(self.publication, self.committed) != self.inference:
      raise ValueError(
        f"the dealer committed to other correlations than these of inference {self.inference}; "
        "do not use what this dealer deals, and say so to the other party"
      )


class Prepared(Once):
  """What a party has ready for one inference before the image exists."""


class Publication(NamedTuple):
  """D = W - B for the weights of linear layers: uniform without B.

  Attributes:
    publication: which one: the plan's digest and the model owner's tag.
    arrays: by number of the operand, ring elements.
  """

  publication: str
  arrays: Operands


class Question(NamedTuple):
  """D = x - B' for the data owner's operands of linear layers: uniform without B'.

  Attributes:
    inference: which one.
    arrays: by number of the operand, ring elements; mostly empty.
  """

  inference: str
  arrays: Operands


class Side(NamedTuple):
  """What one party brings to the online phase of one inference; it stays with this party.

  Attributes:
    party: which.
    inference: which one.
    ready: its correlations, prepared.
    operands: its own values, encoded.
    tags: what it checks openings by, or shows for its own; None where nothing is checked.
  """

  party: int
  inference: str
  ready: Ready
  operands: Operands
  tags: Any = None
