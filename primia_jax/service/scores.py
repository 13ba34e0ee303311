"""A session in which a hospital scores a vendor's model: only a sum over many images is opened.

It is `mpc.scoring` between two institutions. The hospital says of how many images the sum shall be,
to whom it is opened, and which inferences it offers. The vendor refuses, or charges all images and
names the inferences that serve, before either draws correlations. Then come these inferences, in
which neither side sends its shares of the outputs. What a session that ends early has not reached,
neither side has drawn, and it serves another time.
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
from primia_jax.mpc.multiprocess import Online
from primia_jax.mpc.planning import Plan
from primia_jax.mpc.roles import ModelOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import frames, receipts, sessions
from primia_jax.service.errors import Malformed, Refused
from primia_jax.service.folders import Reserved
from primia_jax.types import Array

HOSPITAL, VENDOR, BOTH = "hospital", "vendor", "both"
RECEIVERS = (HOSPITAL, VENDOR, BOTH)
_SCORE = struct.Struct(f"<QB{receipts.SHOWN_BYTES}s")  # images, receiver in RECEIVERS, a receipt

# (images, runs, numbers that are offered, receipt that is shown) -> those that serve, charged
Begin = Callable[[int, int, Sequence[str], bytes], Sequence[str]]


def serve(
  owner: ModelOwner,
  online: Online,
  publication: str,
  opened_to: str,
  begin: Begin,
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
    begin: chooses inferences and charges the images; raises Refused before anything is drawn.
    take: gives the correlations of an inference, once.
    learn: is given the result if it is opened to the vendor.
    receive: waits for the next message.

  Raises:
    SessionEnded: whatever ends it early; then nothing is opened, but to the vendor if the
      hospital's share of the sum has come.
  """
  frame = yield from sessions.welcomed(sessions.terms(owner.plan, online, publication), receive)
  message = sessions.some(receive(idle=True))
  asked = frame.decode(message, frames.SCORE, _score_bytes(message))
  count, to, shown = _SCORE.unpack(asked[: _SCORE.size])
  if to >= len(RECEIVERS) or RECEIVERS[to] != opened_to:
    raise Refused(f"the model owner opens the result to: {opened_to}; agree on the same")
  check_count(owner.plan, count)
  runs = runs_of(owner.plan, count)
  offered = [number.hex() for number in _numbers(asked[_SCORE.size :])]
  chosen = begin(count, runs, offered, shown)
  yield frame.encode(frames.ACCEPTED, bytes.fromhex("".join(chosen)))
  total = scoring.Total(owner.plan, MODEL_OWNER)
  for _ in range(runs):
    message = sessions.some(receive(idle=True))
    prepared = yield from sessions.accepted(owner, take, frame, message)
    message = sessions.some(receive(idle=True))
    total.add((yield from sessions.answered(owner, online, frame, receive, prepared, message)))
  own = total.take()
  if opened_to != HOSPITAL:
    payload = frame.decode(sessions.some(receive()), frames.TOTAL_1, _num_bytes(own))
    learn(scoring.opened_apart(owner.plan, own, _like(own, payload)))
  if opened_to != VENDOR:
    yield frame.encode(frames.TOTAL_0, _packed(own))


def ask(
  asking: sessions.Asking,
  reserved: Sequence[Reserved],
  parts: Iterable[Sequence[Any]],
  count: int,
  opened_to: str,
  enter: Callable[[], object] = lambda: None,
) -> np.ndarray | None:
  """The hospital's side, in an open session: the result, or None if only the vendor gets it.

  Args:
    asking: the session, whose program opens nothing.
    reserved: correlations for the runs, and some more from which the vendor can choose; those that
      are not drawn are released.
    parts: (images, labels) of each run, as planned.
    count: of images, without what fills the last run.
    opened_to: one of RECEIVERS.
    enter: keeps the hospital's register; it is called once the vendor has accepted.

  Raises:
    SessionEnded: what was charged stays charged, and nothing is opened to the hospital; the vendor
      may have the result if the hospital's share of it was sent.
    ValueError: there are more parts than the images need.
  """
  left = {bytes.fromhex(one.inference): one for one in reserved}
  total = scoring.Total(asking.plan, DATA_OWNER)
  try:
    shown = receipts.shown(reserved[0].folder)
    terms = _SCORE.pack(count, RECEIVERS.index(opened_to), shown)
    asking.tell(frames.SCORE, terms + b"".join(left))
    runs = runs_of(asking.plan, count)
    chosen = _numbers(asking.hear(frames.ACCEPTED, runs * frames.INFERENCE_BYTES))
    if len(set(chosen) & left.keys()) < runs:
      raise Malformed("the vendor chose other inferences than were offered")
    for number in left.keys() - set(chosen):
      left.pop(number).release()
    enter()
    for part in parts:
      if not chosen:
        raise ValueError(f"there are more than {runs} parts of {count} images")
      asking.prepare(left.pop(chosen.pop(0)))
      total.add(asking.shares(*part))
  finally:
    for one in left.values():
      one.release()
  own = total.take()
  if opened_to != HOSPITAL:
    asking.tell(frames.TOTAL_1, _packed(own))
  if opened_to == VENDOR:
    return None
  return scoring.opened_apart(
    asking.plan, _like(own, asking.hear(frames.TOTAL_0, _num_bytes(own))), own
  )


def check_count(plan: Plan, count: int) -> None:
  """Raises Refused for a number of images that tells single ones, or does not fit the ring."""
  most = min(scoring.most_images(plan), frames.MOST_OFFERED * _batch(plan))
  if not scoring.FEWEST <= count <= most:
    raise Refused(f"a result may be of {scoring.FEWEST} to {most} images, not {count}")


def runs_of(plan: Plan, count: int) -> int:
  """Runs of the protocol for so many images."""
  return -(-count // _batch(plan))


def _batch(plan: Plan) -> int:
  owned = zip(plan.owners, plan.program.avals, strict=True)
  return next(aval.shape[0] for owner, aval in owned if owner == DATA_OWNER)


def _score_bytes(message: bytes) -> int:
  """What the payload of such a SCORE must have: it names 1 to MOST_OFFERED inferences."""
  rest = len(message) - frames.HEADER_BYTES - _SCORE.size
  return _SCORE.size + frames.INFERENCE_BYTES * min(
    max(1, rest // frames.INFERENCE_BYTES), frames.MOST_OFFERED
  )


def _numbers(payload: memoryview) -> list[bytes]:
  size = frames.INFERENCE_BYTES
  return [bytes(payload[i : i + size]) for i in range(0, len(payload), size)]


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
