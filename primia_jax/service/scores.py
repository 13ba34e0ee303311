"""A session in which a hospital scores a vendor's model: only a sum over many images is opened.

It is `mpc.scoring` between two institutions. The hospital says of how many images the sum shall be
and to whom it is opened, and the vendor accepts or refuses, before either draws correlations. Then
come as many inferences as the images need, in which neither side sends its shares of the outputs.
Each adds its own up. At last the sums' shares are sent to whom the result is opened: first the
hospital's, then the vendor's.

| who | learns |
| --- | --- |
| hospital | the result if it is opened to it, and the plan |
| vendor | the result if it is opened to it, the number of images, and when |

Both are semi-honest. The vendor counts each image as a query. It cannot see what the hospital puts
into a run: that labels are true, that no class is of few images, and that an image was in no
earlier result are the hospital's word, for which the hospital keeps a register.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from primia_jax.mpc import scoring
from primia_jax.mpc.apart import Online
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.roles import ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import frames, sessions
from primia_jax.service.errors import Refused
from primia_jax.service.folders import Reserved
from primia_jax.types import Array

HOSPITAL, VENDOR, BOTH = "hospital", "vendor", "both"
RECEIVERS = (HOSPITAL, VENDOR, BOTH)
_SCORE = struct.Struct("<QB")  # images, and the number of the receiver in RECEIVERS


def serve(
  owner: ModelOwner,
  online: Online,
  publication: str,
  opened_to: str,
  begin: Callable[[int, int], None],
  take: sessions.Take,
  learn: Callable[[np.ndarray], None],
  receive: sessions.Receive,
) -> Iterator[bytes]:
  """The vendor's side of a session; yields what it sends.

  Args:
    owner: the vendor, with its publication.
    online: its program, which opens nothing.
    publication: which publication it serves.
    opened_to: one of RECEIVERS.
    begin: (images, runs) -> None once they are charged; raises Refused before anything is drawn.
    take: gives the correlations of an inference, once.
    learn: is given the result if it is opened to the vendor.
    receive: waits for the next message.

  Raises:
    SessionEnded: whatever ends it early; then nothing is opened, but to the vendor if the
      hospital's share of the sum has come.
  """
  frame = yield from sessions.welcomed(sessions.terms(owner.plan, online, publication), receive)
  asked = frame.decode(sessions.some(receive(idle=True)), frames.SCORE, _SCORE.size)
  count, to = _SCORE.unpack(asked)
  if to >= len(RECEIVERS) or RECEIVERS[to] != opened_to:
    raise Refused(f"the model owner opens the result to: {opened_to}; agree on the same")
  check_count(owner.plan, count)
  runs = runs_of(owner.plan, count)
  begin(count, runs)
  yield frame.encode(frames.ACCEPTED)
  total = scoring.Total(owner.plan, MODEL_OWNER)
  for _ in range(runs):
    message = sessions.some(receive(idle=True))
    prepared = yield from sessions.accepted(owner, take, frame, message)
    message = sessions.some(receive(idle=True))
    total.add((yield from sessions.answered(owner, online, frame, receive, prepared, message)))
  own = total.take()
  if opened_to != HOSPITAL:
    payload = frame.decode(sessions.some(receive()), frames.TOTAL, _num_bytes(own))
    learn(scoring.opened_apart(owner.plan, own, _like(own, payload)))
  if opened_to != VENDOR:
    yield frame.encode(frames.TOTAL, _packed(own))


def ask(
  asking: sessions.Asking,
  reserve: Callable[[], Reserved],
  parts: Iterable[Sequence[Any]],
  count: int,
  opened_to: str,
  enter: Callable[[], object] = lambda: None,
) -> np.ndarray | None:
  """The hospital's side, in an open session: the result, or None if only the vendor gets it.

  Args:
    asking: the session, whose program opens nothing.
    reserve: gives correlations for one run.
    parts: (images, labels) of each run, as planned.
    count: of images, without what fills the last run.
    opened_to: one of RECEIVERS.
    enter: keeps the hospital's register; it is called once the vendor has accepted.

  Raises:
    SessionEnded: what was charged stays charged, and nothing is opened to the hospital; the vendor
      may have the result if the hospital's share of it was sent.
  """
  asking.tell(frames.SCORE, _SCORE.pack(count, RECEIVERS.index(opened_to)))
  asking.hear(frames.ACCEPTED, 0)
  enter()
  total = scoring.Total(asking.plan, DATA_OWNER)
  for part in parts:
    asking.prepare(reserve())
    total.add(asking.shares(*part))
  own = total.take()
  if opened_to != HOSPITAL:
    asking.tell(frames.TOTAL, _packed(own))
  if opened_to == VENDOR:
    return None
  return scoring.opened_apart(
    asking.plan, _like(own, asking.hear(frames.TOTAL, _num_bytes(own))), own
  )


def check_count(plan: Plan, count: int) -> None:
  """Raises Refused for a number of images that tells single ones, or does not fit the ring."""
  most = scoring.most_images(plan)
  if not scoring.FEWEST <= count <= most:
    raise Refused(f"a result may be of {scoring.FEWEST} to {most} images, not {count}")


def runs_of(plan: Plan, count: int) -> int:
  """Runs of the protocol for so many images."""
  owned = zip(plan.owners, plan.program.avals, strict=True)
  batch = next(aval.shape[0] for owner, aval in owned if owner == DATA_OWNER)
  return -(-count // batch)


def _packed(shares: Sequence[Array]) -> bytes:
  return b"".join(np.asarray(v).tobytes() for v in shares)


def _num_bytes(shares: Sequence[Array]) -> int:
  return sum(np.asarray(v).nbytes for v in shares)


def _like(shares: Sequence[Array], payload: memoryview) -> list[Any]:
  found: list[Any] = []
  start = 0
  for v in map(np.asarray, shares):
    found.append(np.frombuffer(payload, v.dtype, v.size, start).reshape(v.shape))
    start += v.nbytes
  return found
