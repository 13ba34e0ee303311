"""Random and damaged messages for the decoder of `service.frames`, for as long as one likes.

  python -m benchmarks.fuzz_frames --minutes=10

Each execution encodes a message for a random place, mostly changes it (flips bits, cuts, repeats
and inserts bytes, sets fields of the header to extreme values, with a checksum that fits or not),
and decodes it for the same or another place. The decoder may only say that a message is malformed,
or give the payload of a message that `encode` would have made. The first other outcome ends the
program with the message in hexadecimal.
"""

import json
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Callable

from absl import app, flags

from primia_jax.service import frames
from primia_jax.service.errors import Malformed

FLAGS = flags.FLAGS

_EXTREME = (0, 1, 2**7, 2**8 - 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_HEADER = frames.HEADER_BYTES - 8  # without the checksum


def place(rng: random.Random) -> frames.Place:
  """A place in a session."""
  session = rng.choice((frames.NO_SESSION, rng.randbytes(frames.SESSION_BYTES)))
  number = rng.choice((0, rng.getrandbits(32)))
  return frames.Place(rng.choice(list(frames.NAMES)), session, number)


def flip(rng: random.Random, message: bytearray) -> None:
  for _ in range(rng.choice((1, 1, 2, 20))):
    if message:
      message[rng.randrange(len(message))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, message: bytearray) -> None:
  start = rng.randint(0, len(message))
  del message[start : start + rng.choice((1, 8, 64, 2**20))]


def insert(rng: random.Random, message: bytearray) -> None:
  start = rng.randint(0, len(message))
  message[start:start] = rng.randbytes(rng.choice((1, 8, 64)))


def repeat(rng: random.Random, message: bytearray) -> None:
  start = rng.randint(0, len(message))
  message += message[start : start + 2**16]


def extreme(rng: random.Random, message: bytearray) -> None:
  """Sets some bytes of the header to an extreme number."""
  if len(message) >= _HEADER:
    size = rng.choice((1, 4, 8))
    start = rng.randint(0, _HEADER - size)
    number = rng.choice(_EXTREME) % 2 ** (8 * size)
    message[start : start + size] = number.to_bytes(size, rng.choice(("little", "big")))


def fit(rng: random.Random, message: bytearray) -> None:
  """Gives the message a length and a checksum that fit what it is now."""
  if len(message) >= frames.HEADER_BYTES:
    payload = bytes(message[frames.HEADER_BYTES :])
    struct.pack_into("<Q", message, _HEADER - 8, len(payload))
    message[_HEADER : frames.HEADER_BYTES] = frames.checksum(bytes(message[:_HEADER]), payload)


MUTATIONS: tuple[Callable, ...] = (flip, cut, insert, repeat, extreme, fit)


def execute(rng: random.Random) -> str:
  """One execution: "decoded" or "malformed".

  Raises:
    AssertionError: neither, with the message.
  """
  expected, payload = place(rng), rng.randbytes(rng.choice((0, 1, 16, 113, 1000)))
  message = bytearray(frames.encode(expected, payload))
  if rng.random() < 0.02:
    message = bytearray(rng.randbytes(rng.randint(0, 200)))
  for _ in range(rng.choice((0, 1, 1, 2, 4))):
    rng.choice(MUTATIONS)(rng, message)
  if rng.random() < 0.1:
    expected = place(rng)
  num_bytes = rng.choice((len(payload), len(payload), max(0, len(message) - frames.HEADER_BYTES)))
  sent = bytes(message)
  try:
    found = bytes(frames.decode(sent, expected, num_bytes))
    if expected.kind == frames.WELCOME:
      expected = expected._replace(session=frames.session_of(sent))
    assert len(found) == num_bytes
    assert frames.encode(expected, found) == sent, "it is not what encode makes"
    if num_bytes == frames.TERMS_BYTES:
      terms = frames.decode_terms(memoryview(found))
      assert frames.encode_terms(terms) == found
    return "decoded"
  except Malformed:
    return "malformed"
  except Exception as error:
    raise AssertionError(f"{error!r} at {expected}, {num_bytes} bytes: {sent.hex()}") from error


def main(_):
  seed = FLAGS.seed if FLAGS.seed is not None else int.from_bytes(os.urandom(4))
  rng, counts, start = random.Random(seed), Counter(), time.monotonic()
  while time.monotonic() - start < 60 * FLAGS.minutes:
    counts.update(execute(rng) for _ in range(1000))
  row = {"name": "messages decoded without a crash", "value": counts.total(), **counts}
  print(json.dumps(row | {"minutes": FLAGS.minutes, "seed": seed}))


if __name__ == "__main__":  # not for the test that imports this file
  flags.DEFINE_float("minutes", 10.0, "How long.", lower_bound=0.0)
  flags.DEFINE_integer("seed", None, "Of the random numbers; a new one by default.")
  app.run(main)
