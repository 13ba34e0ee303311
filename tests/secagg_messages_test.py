import struct
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from primia_jax.secagg import messages as msg

ADVERT = msg.Advert(3, 7, b"b" * 32, b"m" * 32, b"c" * 32, b"s" * 64)
EXAMPLES = [
  ADVERT,
  msg.Roster(7, (ADVERT, ADVERT._replace(site=4))),
  msg.Roster(0, ()),
  msg.Shares(3, 7, {0: b"", 2**32 - 1: b"box"}, b"s"),
  msg.Delivery(7, {}),
  msg.MaskedInput(
    3,
    7,
    (np.arange(5, dtype=np.uint32), np.zeros(0, np.uint64), np.array([2**63], np.uint64)),
    b"s",
  ),
  msg.Survivors(7, (0, 1, 5), (2,), b"d" * 32),
  msg.Consent(3, 7, b"s" * 64),
  msg.Consents(7, {1: b"s", 2: b"t"}),
  msg.Answer(3, 7, {0: b"x" * 32}, {}, b"s"),
  msg.Evidence(7, b"roster", {0: b"m", 1: b"n"}, {1: b"a"}, b"s" * 64),
  msg.Proposal(3, 7, b"terms", b"bond", b"masked"),
  msg.Bond(3, 7, b"s" * 64),
  msg.Bonds(7, {0: b"s", 3: b"t"}),
  msg.Together((msg.Part(msg.encode(ADVERT)), msg.Part(b""))),
  msg.Recalled(b"i" * 32, b"f" * 32, {0: b"h", 1: b"g"}),
  msg.Returning((1, 3), 0),
  msg.Resumed({0: b"s"}, b"state"),
  msg.Hello(3, b"i" * 32, b"", b"f" * 32, b"told", b"s" * 64),
  msg.Start(3, 7, b"d" * 32, (0, 2), b"", b"s" * 64),
]

ROSTER, DELIVERY, MASKED = (
  msg.encode(m)[:1]
  for m in (msg.Roster(0, ()), msg.Delivery(0, {}), msg.MaskedInput(0, 0, (), b""))
)


def plain(value):
  """Arrays as what can be compared."""
  if isinstance(value, np.ndarray):
    return str(value.dtype), value.tolist()
  if isinstance(value, tuple):
    return type(value).__name__, *map(plain, value)
  return value


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_as_it_was(message):
  data = msg.encode(message)
  assert plain(msg.decode(data)) == plain(message)
  assert msg.encode(msg.decode(data)) == data


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_vectors_take_the_bytes_of_their_ring(num_bits, size, seed):
  dtype = np.uint32 if num_bits <= 32 else np.uint64
  v = np.random.default_rng(seed).integers(0, 2**num_bits, size, dtype, endpoint=False)
  data = msg.encode(msg.MaskedInput(3, 7, (v[::2], v), b"s"))
  assert plain(msg.decode(data)) == plain(msg.MaskedInput(3, 7, (v[::2], v), b"s"))
  numbers = size + len(v[::2])
  assert len(data) <= len(msg.encode(msg.MaskedInput(3, 7, (v[:0], v[:0]), b"s"))) + numbers * -(
    -num_bits // 8
  )


def test_every_kind_of_message_is_tried():
  others = {msg.Hello, msg.Start, msg.Proposal}
  others |= {*get_args(msg.OfReturn), *get_args(msg.OfAhead)}
  assert {type(m) for m in EXAMPLES} == {*msg.FROM_SITES, *msg.FROM_SERVER, *others}
  assert len({msg.encode(m) for m in EXAMPLES}) == len(EXAMPLES)


def accepts(data):
  """Whether the bytes are a message, whose one encoding they must then be."""
  try:
    message = msg.decode(data)
  except ValueError as e:
    if "malformed" not in str(e):
      raise
    return False
  assert msg.encode(message) == data
  return True


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_cut_prolonged_and_altered_bytes_are_malformed_or_another_message(message):
  data = msg.encode(message)
  assert not any(accepts(data[:size]) for size in range(len(data)))
  assert not accepts(data + b"\0")
  for i in range(len(data)):
    for flip in (1, 0x80, 0xFF):
      accepts(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 9))
def test_no_bytes_do_harm(data, kind):
  accepts(data)
  accepts(bytes([kind]) + data)


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"\x0a",
    b"\xff",
    ROSTER + struct.pack("<II", 7, 2**32 - 1),  # a roster of 2^32 - 1 adverts
    DELIVERY + struct.pack("<II", 7, 2**32 - 1),
    b"\5" + struct.pack("<II", 7, 2**32 - 1),
    DELIVERY + struct.pack("<IIIIII", 7, 2, 5, 0, 5, 0),  # site 5 twice
    DELIVERY + struct.pack("<IIIIII", 7, 2, 5, 0, 4, 0),  # out of order
    MASKED + struct.pack("<IIIIII", 3, 7, 1, 8, 8, 12) + b"\1" * 12 + bytes(4),  # half a word
    MASKED + struct.pack("<IIIIII", 3, 7, 1, 2, 2, 4) + b"\1" * 4 + bytes(4),  # words of two bytes
    MASKED
    + struct.pack("<IIIIII", 3, 7, 1, 4, 5, 5)
    + b"\1" * 5
    + bytes(4),  # five bytes of words of four
    MASKED + struct.pack("<IIIIII", 3, 7, 1, 4, 0, 0) + bytes(4),
    MASKED
    + struct.pack("<IIIIII", 3, 7, 1, 4, 2, 4)
    + b"\1\0\1\0"
    + bytes(4),  # two bytes where one does
  ],
)
def test_lengths_and_orders_that_cannot_be_are_malformed(data):
  with pytest.raises(ValueError, match="malformed"):
    msg.decode(data)


@pytest.mark.parametrize(
  ("message", "told"),
  [
    (ADVERT._replace(site=-1), "-1 in a message"),
    (ADVERT._replace(round=2**32), "4294967296 in a message"),
    (msg.MaskedInput(0, 0, (np.zeros((2, 2), np.uint32),), b""), r"uint32\[2, 2\]"),
    (msg.MaskedInput(0, 0, (np.zeros(2, np.int32),), b""), "int32"),
  ],
)
def test_what_has_no_encoding_is_named(message, told):
  with pytest.raises(ValueError, match=told):
    msg.encode(message)


def test_messages_that_travel_as_one_are_two_or_more_and_no_deeper():
  other = msg.Survivors(7, (0, 1), (), b"")
  assert msg.apart(ADVERT) == [ADVERT]
  assert msg.together(ADVERT, None) == ADVERT
  both = msg.together(other, None, ADVERT)
  assert msg.apart(msg.decode(msg.encode(both))) == [other, ADVERT]
  parts = [msg.Part(msg.encode(one)) for one in (other, both)]
  for wrong in ((), parts[:1], parts, [parts[0], msg.Part(b"\xff")]):
    with pytest.raises(ValueError, match="malformed message"):
      msg.apart(msg.Together(tuple(wrong)))
