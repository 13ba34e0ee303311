"""Encrypted inference for a client that is no party: it shares its image between two servers.

The model owner is party 0 and a helper is party 1. The client learns the outputs from the shares of
both, and computes nothing else.

| role | learns |
| --- | --- |
| model owner | nothing about the image or the outputs |
| helper | nothing about the image, the outputs or the weights; the plan |
| client | the outputs, the shapes and scales of image and outputs |

Model owner, helper and dealer are semi-honest, and no two of them collude: with the helper, the
model owner reads the image, and the helper reads the weights with the dealer. The client may do
what it likes. All that it chooses is one ring element for each element of its image, and a clamp
takes each of these to one that an honest client could have chosen. So it can ask the model about
images of its choice, and do no more.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import numpy as np

from primia_jax.mpc import inference
from primia_jax.mpc.circuit import SHARING, Value
from primia_jax.mpc.messages import Correlations, Prepared, Publication, Side
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.protocol import Operands
from primia_jax.mpc.roles import DataOwner
from primia_jax.mpc.sharing import DATA_OWNER


class Helper:
  """Party 1 where the client only shares its image.

  Args:
    plan: the plan, of which the client is "sharing".
    publication: the model owner's.

  Raises:
    ValueError: the publication or the client are of another plan.
  """

  def __init__(self, plan: Plan, publication: Publication):
    if plan.config.client != SHARING:
      raise ValueError(f"client={plan.config.client!r} needs no helper; use a DataOwner")
    self.plan, self._party = plan, DataOwner(plan, publication)

  def prepare(self, correlations: Correlations) -> Prepared:
    """Its part of the work that needs no image; raises as `DataOwner.prepare` does."""
    return self._party.prepare(correlations)

  def warm_up(self) -> None:
    """Compiles what `prepare` runs, so that the first request need not wait."""
    self._party.warm_up()

  def assist(self, prepared: Prepared, shares: Operands) -> Side:
    """Its side of the online phase.

    Args:
      prepared: its own, unused.
      shares: its shares of the image, by number of the operand.

    Raises:
      ValueError: `prepared` is the model owner's or was used, or the shares do not fit the plan.
    """
    shares = inference.checked_shares(self.plan, shares)
    ready, *_ = prepared.take(DATA_OWNER)
    return Side(DATA_OWNER, prepared.inference, ready, shares)


def digest(publication: str) -> bytes:
  """SHA-256 of a publication's name, by which a client says what it asks about."""
  return hashlib.sha256(publication.encode()).digest()


def card(plan: Plan, publication: str) -> dict[str, Any]:
  """What a client must know of a plan, as JSON has it.

  Args:
    publication: the name of the model owner's publication of it.

  Returns:
    publication: `digest` of its name, hexadecimal; num_bits of the ring; images: for each, its
    shape, the real number that one unit stands for, its bits with the sign, and the largest
    magnitude that was planned for; outputs: for each, its shape, unit and dtype.

  Raises:
    ValueError: the client is not "sharing", or an output is public.
  """
  if plan.config.client != SHARING:
    raise ValueError(f"client={plan.config.client!r} is a party and needs the plan itself")
  if not all(isinstance(v, Value) for v in plan.circuit.outputs):
    raise ValueError("an output is public; return only what depends on the image")
  images = [o for o in plan.circuit.operands if o.owner is None]
  given = zip(plan.program.inputs, plan.owners, strict=True)
  bounds = [float(plan.bounds[v.number]) for v, owner in given if owner is None]  # type: ignore
  outputs = zip(plan.circuit.outputs, plan.program.out_dtypes, strict=True)
  return {
    "publication": digest(publication).hex(),
    "num_bits": plan.config.num_bits,
    "images": [
      {"shape": list(o.shape), "unit": o.scale, "bits": o.bits, "most": most}
      for o, most in zip(images, bounds, strict=True)
    ],
    "outputs": [
      {"shape": list(v.shape), "unit": v.scale, "dtype": np.dtype(dtype).name}
      for v, dtype in outputs
    ],
  }


def numbers(plan: Plan) -> list[int]:
  """The operands that stand for the client's images, in order."""
  return [i for i, o in enumerate(plan.circuit.operands) if o.owner is None]


def parsed(plan: Plan, payload: bytes | memoryview) -> Operands:
  """A server's shares of the images, from the bytes that a client sends."""
  found, start, dtype = {}, 0, _dtype(plan)
  for i in numbers(plan):
    shape = plan.circuit.operands[i].shape
    count = int(np.prod(shape, dtype=np.int64))
    found[i] = np.frombuffer(payload, dtype.newbyteorder("<"), count, start).reshape(shape)
    found[i], start = found[i].astype(dtype), start + count * dtype.itemsize
  return found


def share_bytes(plan: Plan) -> int:
  """Bytes of a server's shares of the images."""
  shapes = [plan.circuit.operands[i].shape for i in numbers(plan)]
  return sum(int(np.prod(s, dtype=np.int64)) for s in shapes) * _dtype(plan).itemsize


def _dtype(plan: Plan) -> np.dtype:
  """Of ring elements, in a process that has 64-bit integers only where a plan asks for them."""
  with plan.config.scope():
    return np.dtype(plan.config.dtype)


def packed(shares: list[jax.Array]) -> bytes:
  """A server's shares of the outputs, as it sends them to the client."""
  return b"".join(np.asarray(v).astype(v.dtype.newbyteorder("<")).tobytes() for v in shares)
