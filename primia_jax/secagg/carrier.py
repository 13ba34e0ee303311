"""How the messages of sums reach the sites: what a carrier must do.

The coordinator asks, and each site answers. An `Ask` takes one request for each site and returns
the answers that came in time. A site has a `Carrier`: it hears a request and says its answer.
Messages are signed and shares are sealed, so a carrier is trusted with delivery only: it can end a
run, and sees the sums and who takes part. Between machines `primia_jax.flower` carries, over TLS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
