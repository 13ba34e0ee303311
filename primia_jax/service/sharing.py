"""A client that is no party: it shares its image between two servers and adds up what they answer.

It needs numpy and gRPC only: neither JAX, nor the model, nor the plan. A `Card` says what image and
outputs are like; `cards` reads it from the file that the model owner gives away.

Each server alone sees uniform numbers. Both together, or one that has the other's, see the image:
model owner and helper must not collude (`mpc.helping` says who learns what).
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from primia_jax.service import ciphers

ciphers.permit_tls_1_3_only()

try:
  import grpc
except ImportError as e:
  raise ImportError("the client needs gRPC: pip install 'primia-jax[service]'") from e

from primia_jax.service import frames  # noqa: E402
from primia_jax.service.cards import Card, Server  # noqa: E402
from primia_jax.service.errors import PeerLate, PeerLost, Refused, SessionEnded  # noqa: E402
from primia_jax.service.frames import Place  # noqa: E402

METHOD, PUBLICATION_BYTES = "/primia_jax.EncryptedInference/Session", 32
_END = b""
_PARTING = 2.0  # seconds for a server that has answered to end the call
REFUSALS = (
  grpc.StatusCode.UNAUTHENTICATED,
  grpc.StatusCode.FAILED_PRECONDITION,
  grpc.StatusCode.RESOURCE_EXHAUSTED,
)


# Sends each server its share, and returns both answers; `told` when both are at work.
Exchange = Callable[..., list[bytes]]


def shares(card: Card, images: Sequence[np.ndarray]) -> tuple[bytes, bytes]:
  """Both servers' shares of the images; each alone is uniform.

  Raises:
    ValueError: an image has another shape, or a number beyond the planned range.
  """
  if len(images) != len(card.images):
    raise ValueError(f"{len(images)} images; the plan takes {len(card.images)}")
  parts: tuple[list[bytes], list[bytes]] = ([], [])
  for image, want in zip(images, card.images, strict=True):
    image = np.asarray(image, np.float64)
    if list(image.shape) != want["shape"]:
      raise ValueError(f"an image of shape {list(image.shape)}; the plan takes {want['shape']}")
    whole, limit = np.rint(image / want["unit"]), 2 ** (want["bits"] - 1)
    most = min(want.get("most", math.inf), limit * want["unit"])  # cards of old tell no most
    if not (np.all(np.abs(whole) < limit) and np.all(np.abs(image) <= most)):
      raise ValueError(
        f"a number of magnitude {np.abs(image).max():.4g} is beyond {most:.4g}, for which the "
        "model was planned; scale images as the model owner says"
      )
    elements = whole.astype(np.int64).astype(_dtype(card))
    first = np.frombuffer(secrets.token_bytes(elements.nbytes), _dtype(card))
    parts[0].append(first.tobytes())
    parts[1].append((elements - first.reshape(elements.shape)).tobytes())
  return b"".join(parts[0]), b"".join(parts[1])


def revealed(card: Card, payloads: Sequence[bytes | memoryview]) -> list[np.ndarray]:
  """The outputs, from both servers' shares of them."""
  found, start, dtype = [], 0, _dtype(card)
  for want in card.outputs:
    count = int(np.prod(want["shape"], dtype=np.int64))
    each = [np.frombuffer(v, dtype, count, start) for v in payloads]
    start += count * dtype.itemsize
    whole = (each[0] + each[1]) << dtype.type(8 * dtype.itemsize - card.num_bits)
    signed = whole.view(f"<i{dtype.itemsize}") >> (8 * dtype.itemsize - card.num_bits)
    numbers = signed.reshape(want["shape"]).astype(np.float64) * want["unit"]
    real = want["dtype"].startswith(("float", "bfloat"))
    found.append(numbers.astype(np.float32) if real else np.rint(numbers).astype(want["dtype"]))
  return found


def ask(
  card: Card,
  images: Sequence[np.ndarray],
  servers: tuple[Server, Server],
  key: bytes,
  certificate: bytes,
  timeout: float = 60.0,
) -> list[np.ndarray]:
  """The model's outputs for images, which neither server learns.

  Args:
    card: the plan's.
    images: the secret arguments, in order.
    servers: the model owner and the helper.
    key, certificate: the client's, PEM.
    timeout: seconds for the whole.

  Raises:
    ValueError: an image does not fit the card.
    SessionEnded: there is no answer.
  """
  with connected(servers, key, certificate, timeout) as exchange:
    return revealed(card, exchange(card, shares(card, images)))


@contextlib.contextmanager
def connected(
  servers: Sequence[Server], key: bytes, certificate: bytes, timeout: float = 60.0
) -> Iterator[Exchange]:
  """Connections to both servers for as long as the context lasts.

  Gives exchange(card, both shares of the images, told=...) -> both shares of the outputs. `told` is
  called once both servers have taken their share. It raises SessionEnded as soon as either server
  gives no answer.

  Args:
    servers: the model owner and the helper.
    key, certificate: the client's, PEM.
    timeout: seconds for each exchange.

  Raises:
    PeerLost: nobody listens at one of the addresses.
  """
  with contextlib.ExitStack() as stack:
    channels = []
    for server in servers:
      host, _, port = server.address.rpartition(":")
      try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
      except OSError as error:
        raise PeerLost(f"{server.name}: nobody listens at {server.address}: {error}") from error
      credentials = grpc.ssl_channel_credentials(server.certificate, key, certificate)
      options = [("grpc.ssl_target_name_override", server.name), ("grpc.enable_retries", 0)]
      channels.append(
        stack.enter_context(grpc.secure_channel(server.address, credentials, options))
      )

    def exchange(
      card: Card, both: Sequence[bytes], told: Callable[[], None] = lambda: None
    ) -> list[bytes]:
      return _exchange(card, both, servers, channels, timeout, told)

    yield exchange


def _exchange(
  card: Card,
  both: Sequence[bytes],
  servers: Sequence[Server],
  channels: Sequence[Any],
  timeout: float,
  told: Callable[[], None],
) -> list[bytes]:
  request = os.urandom(frames.SESSION_BYTES)
  size = sum(int(np.prod(v["shape"], dtype=np.int64)) for v in card.outputs)
  publication, num_bytes = bytes.fromhex(card.publication), size * _dtype(card).itemsize
  places = (Place(frames.READY, request), 0), (Place(frames.RESULT, request, 1), num_bytes)
  got: queue.SimpleQueue[tuple[int, bytes | SessionEnded]] = queue.SimpleQueue()
  calls, outboxes, listeners, is_told = [], [], [], False

  def listen(number: int, call: Any) -> None:
    for place, length in places:
      try:
        message = _received(call, servers[number].name, place.kind == frames.RESULT)
        got.put((number, bytes(frames.decode(message, place, length))))
      except SessionEnded as error:
        got.put((number, error))
        return
    with contextlib.suppress(grpc.RpcError, StopIteration):  # so that it can end the call itself
      next(call)

  try:
    for number, (channel, share) in enumerate(zip(channels, both, strict=True)):
      outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
      call = channel.stream_stream(METHOD, None, None)(iter(outbox.get, None), timeout=timeout)
      outbox.put(frames.encode(Place(frames.REQUEST, request), publication + share))
      calls.append(call)
      outboxes.append(outbox)
      listeners.append(threading.Thread(target=listen, args=(number, call), daemon=True))
      listeners[-1].start()
    found: list[list[bytes]] = [[], []]
    while min(map(len, found)) < len(places):
      number, message = got.get()
      if isinstance(message, SessionEnded):
        raise _reason(message, got)
      found[number].append(message)
      if all(found) and not is_told:
        told()
        is_told = True
    for outbox in outboxes:
      outbox.put(_END)
    for listener in listeners:
      listener.join(_PARTING)
    return [messages[-1] for messages in found]
  finally:
    for outbox in outboxes:
      outbox.put(None)
    for call in calls:
      call.cancel()


def _reason(error: SessionEnded, got: queue.SimpleQueue) -> SessionEnded:
  """What one server says, or where it only lost the other, what that says soon after."""
  words = "PeerLost", "PeerLate", "connection to"
  end = time.monotonic() + _PARTING
  while any(word in f"{type(error).__name__} {error}" for word in words):
    try:
      _, other = got.get(timeout=max(0.0, end - time.monotonic()))
    except queue.Empty:
      break
    if isinstance(other, SessionEnded):
      return other if isinstance(other, Refused) else error
  return error


def _received(answers: Any, who: str, begun: bool) -> bytes:
  try:
    return next(answers)
  except StopIteration:
    raise PeerLost(f"{who} ended the request without an answer") from None
  except grpc.RpcError as error:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
      raise PeerLate(f"{who} took longer than a request may") from error
    if code in REFUSALS:
      raise Refused(f"{who}: {details}") from error
    if code == grpc.StatusCode.UNAVAILABLE and not begun:  # somebody listens, but TLS failed
      raise Refused(
        f"{who} has another certificate than the card says, or turned this side's away as unknown "
        f"or expired ({details})"
      ) from error
    raise PeerLost(f"the connection to {who} ended ({code.name}: {details})") from error


def _dtype(card: Card) -> np.dtype:
  return np.dtype("<u4" if card.num_bits <= 32 else "<u8")
