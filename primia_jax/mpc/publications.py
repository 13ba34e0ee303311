"""What names a publication: the plan, a secret tag of the weights, and the dealing."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from primia_jax.mpc.messages import Correlations, Publication
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands
from primia_jax.types import Array


def tag_of(plan: Plan, operands: Operands, secret: bytes) -> str:
  """HMAC of the plan and the encoded weights under a secret of the model owner.

  Without the secret, the tag of a guess of the weights cannot be computed.
  """
  if len(secret) < 32:
    raise ValueError(f"the secret has {len(secret)} bytes; use 32 from os.urandom")
  found = hmac.new(secret, plan.digest.encode(), hashlib.sha256)
  for i, operand in sorted(operands.items()):
    elements = np.ascontiguousarray(getattr(operand, "elements", operand))
    found.update(f"{i} {plan.circuit.operands[i].scale.hex()} {elements.shape}".encode())
    found.update(elements.tobytes())
  return found.hexdigest()


def checked_tag(tag: str) -> str:
  """The tag, if it can be one."""
  if not (isinstance(tag, str) and len(tag) == 64 and set(tag) <= set("0123456789abcdef")):
    raise ValueError(f"tag={tag!r}; take the model owner's `tag`, 64 hexadecimal digits")
  return tag


def bound(key: Array, publication: str) -> Array:
  """The key of B: HMAC-SHA256(the dealer's key, the publication), [8] uint32."""
  found = hmac.digest(np.asarray(key).tobytes(), publication.encode(), "sha256")
  return jnp.asarray(np.frombuffer(found, "<u4").astype(np.uint32))


def check_plan(publication: str, plan: Plan) -> None:
  """Raises a ValueError if a publication is of another plan."""
  if publication.split("-")[0] != plan.digest:
    raise ValueError("this message was made for another plan; give all roles the same plan")


def check_publication(
  message: Correlations | Publication, plan: Plan, known: Collection[str]
) -> None:
  """Raises a ValueError if a message is of none of the known publications."""
  check_plan(message.publication, plan)
  if message.publication not in known:
    raise ValueError(
      "these correlations belong to another publication; take them from the dealer whose blind it "
      "used"
    )
