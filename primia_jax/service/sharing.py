"""A client that is no party: it shares its image between two servers and adds up what they answer.

It needs numpy and gRPC only: neither JAX, nor the model, nor the plan. A `Card` says what image and
outputs are like; the model owner gives it away as a small JSON file.

Each server alone sees uniform numbers. Both together, or one that has the other's, see the image:
model owner and helper must not collude (`mpc.helping` says who learns what).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# For TLS 1.3 only, as `channel` explains; gRPC reads it when it is loaded.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")

try:
  import grpc
except ImportError as e:
  raise ImportError("the client needs gRPC: pip install 'primia-jax[service]'") from e

from primia_jax.service import frames
from primia_jax.service.errors import PeerLate, PeerLost, Refused
from primia_jax.service.frames import Place

METHOD, PLAN_BYTES = "/primia_jax.EncryptedInference/Session", 32
_END = b""


class Card(NamedTuple):
  """What a client must know (`mpc.helping.card`).

  Attributes:
    plan: SHA-256 of the plan, hexadecimal.
    num_bits: k of the ring.
    images: for each its shape, its unit, and its bits with the sign.
    outputs: for each its shape, its unit, and its dtype.
  """

  plan: str
  num_bits: int
  images: list[dict[str, Any]]
  outputs: list[dict[str, Any]]


class Server(NamedTuple):
  """One of both servers: host:port, its certificate in PEM, and the name in that."""

  address: str
  certificate: bytes
  name: str


def read_card(path: pathlib.Path) -> Card:
  """The card in a JSON file.

  Raises:
    ValueError: it is none.
  """
  try:
    return Card(**json.loads(path.read_text()))
  except (TypeError, json.JSONDecodeError) as error:
    raise ValueError(f"{path} is no card of a plan: {error}") from error


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
    whole, most = np.rint(image / want["unit"]), 2 ** (want["bits"] - 1)
    if not np.all(np.abs(whole) < most):
      raise ValueError(
        f"a number of magnitude {np.abs(image).max():.4g} is beyond {most * want['unit']:.4g}, for "
        "which the model was planned; scale images as the model owner says"
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
  return revealed(card, exchange(card, shares(card, images), servers, key, certificate, timeout))


def exchange(
  card: Card,
  both: tuple[bytes, bytes],
  servers: tuple[Server, Server],
  key: bytes,
  certificate: bytes,
  timeout: float = 60.0,
) -> list[bytes]:
  """Sends each server its shares of the images and returns both shares of the outputs."""
  request = os.urandom(frames.SESSION_BYTES)
  size = sum(int(np.prod(v["shape"], dtype=np.int64)) for v in card.outputs)
  plan, num_bytes = bytes.fromhex(card.plan), size * _dtype(card).itemsize
  with contextlib.ExitStack() as stack:
    calls = [stack.enter_context(_call(s, key, certificate, timeout)) for s in servers]
    for (outbox, _), share in zip(calls, both, strict=True):
      outbox.put(frames.encode(Place(frames.REQUEST, request), plan + share))
    found = []
    for outbox, answers in calls:
      message = _received(answers)
      found.append(bytes(frames.decode(message, Place(frames.RESULT, request), num_bytes)))
      outbox.put(_END)
    return found


@contextlib.contextmanager
def _call(
  server: Server, key: bytes, certificate: bytes, timeout: float
) -> Iterator[tuple[queue.SimpleQueue, Any]]:
  credentials = grpc.ssl_channel_credentials(server.certificate, key, certificate)
  options = [("grpc.ssl_target_name_override", server.name), ("grpc.enable_retries", 0)]
  outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
  with grpc.secure_channel(server.address, credentials, options) as channel:
    call = channel.stream_stream(METHOD, None, None)(iter(outbox.get, None), timeout=timeout)
    try:
      yield outbox, call
    finally:
      outbox.put(None)
      call.cancel()


def _received(answers: Any) -> bytes:
  try:
    return next(answers)
  except StopIteration:
    raise PeerLost("a server ended the request without an answer") from None
  except grpc.RpcError as error:
    code, details = error.code(), error.details()
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
      raise PeerLate("a server took longer than the request may") from error
    if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED):
      raise Refused(details) from error
    raise PeerLost(f"a connection ended or could not be made ({code.name}: {details})") from error


def _dtype(card: Card) -> np.dtype:
  return np.dtype("<u4" if card.num_bits <= 32 else "<u8")
