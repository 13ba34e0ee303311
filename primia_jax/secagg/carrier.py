"""How the messages of sums reach the sites: what a carrier must do, and one within a process.

The coordinator asks, and each site answers. An `Ask` takes one request for each site and returns
the answers that came in time. A site has a `Carrier`: it hears a request and says its answer.
Messages are signed and shares are sealed, so a carrier is trusted with delivery only: it can end a
run, and sees the sums and who takes part. Between machines `primia_jax.flower` carries, over TLS.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from primia_jax.secagg import errors
from primia_jax.secagg import messages as msg

MEETING_BYTES = 2**30  # the most of a message before the first sum, which may hold a model


class Carrier(NamedTuple):
  """A site's end.

  Attributes:
    hear: the next request, of at most so many bytes. It raises TimeoutError when none comes in
      time, ValueError for a longer one, ConnectionError when the carrier has ended.
    say: answers the request heard last; an answer that nobody waits for is dropped.
    close: ends it; the coordinator is told so at once where it waits for an answer.
  """

  hear: Callable[[int], bytes]
  say: Callable[[bytes], None]
  close: Callable[[], None]


Ask = Callable[[Mapping[int, bytes], float], dict[int, bytes]]


def hear(carrier: Carrier, limit: int) -> msg.Message:
  """The coordinator's next message, of any type.

  Raises:
    ConnectionError: the coordinator has dismissed this site, or a run begins anew, or as `Carrier`.
    TimeoutError, ValueError: as `Carrier`; or what came is no message.
  """
  return known(msg.decode(carrier.hear(limit)))


def known(message: msg.Message) -> msg.Message:
  """The message, unless it ends the run for this site; raises a ConnectionError then."""
  if isinstance(message, msg.Dismissed):
    raise ConnectionError(errors.readable(message.reason) or "the coordinator has left")
  if isinstance(message, msg.Recalled):
    raise ConnectionError("the run goes on without this site; start again to come back")
  if isinstance(message, msg.Invitation):
    raise ConnectionError(
      "a coordinator invites to another run: it was started again, or there are two"
    )
  return message


def in_process(sites: Iterable[int], timeout: float) -> tuple[Ask, dict[int, Carrier]]:
  """A carrier between threads: the coordinator's end, and each site's.

  Args:
    sites: their numbers.
    timeout: seconds for which a site waits for a request.
  """
  ends = {i: _End(timeout) for i in sites}

  def ask(requests: Mapping[int, bytes], timeout: float) -> dict[int, bytes]:
    numbers = {i: ends[i].post(request) for i, request in requests.items()}
    end, answers = time.monotonic() + timeout, {}
    for i, number in numbers.items():
      answer = ends[i].collect(number, end)
      if answer is not None:
        answers[i] = answer
    return answers

  return ask, {i: Carrier(one.hear, one.say, one.close) for i, one in ends.items()}


class _End:
  """The queues between the coordinator and one site; requests are numbered."""

  def __init__(self, timeout: float):
    self.timeout, self.asked, self.heard, self.is_closed = timeout, 0, 0, False
    self.requests = queue.Queue[tuple[int, bytes]]()
    self.answers = queue.Queue[tuple[int, bytes | None]]()

  def post(self, request: bytes) -> int:
    self.asked += 1
    self.requests.put((self.asked, request))
    return self.asked

  def collect(self, number: int, end: float) -> bytes | None:
    while not (self.is_closed and self.answers.empty()):
      try:
        found, answer = self.answers.get(timeout=max(0.0, end - time.monotonic()))
      except queue.Empty:
        return None
      if found == number or answer is None:
        return answer
    return None

  def hear(self, limit: int) -> bytes:
    if self.is_closed:
      raise ConnectionError("this site has left the run")
    try:
      self.heard, request = self.requests.get(timeout=self.timeout)
    except queue.Empty:
      raise TimeoutError(f"the coordinator has sent nothing for {self.timeout:g} seconds") from None
    if len(request) > limit:
      raise ValueError(f"malformed message: {len(request)} bytes; the limit is {limit}")
    return request

  def say(self, answer: bytes) -> None:
    self.answers.put((self.heard, answer))

  def close(self) -> None:
    self.is_closed = True
    self.answers.put((0, None))
