"""A message is decoded at its own place, as it was sent, and nowhere else."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_frames
from primia_jax.service import frames
from primia_jax.service.errors import Malformed

SESSION = st.binary(min_size=frames.SESSION_BYTES, max_size=frames.SESSION_BYTES)
PLACES = st.builds(
  frames.Place, st.sampled_from(list(frames.NAMES)), SESSION, st.integers(0, 2**32 - 1)
)
PAYLOADS = st.binary(max_size=300)


@given(PLACES, PAYLOADS)
def test_what_is_encoded_is_decoded_at_its_place(place, payload):
  message = frames.encode(place, payload)
  assert len(message) == frames.HEADER_BYTES + len(payload)
  assert bytes(frames.decode(message, place, len(payload))) == payload
  assert (frames.kind_of(message), frames.session_of(message)) == (place.kind, place.session)


@given(PLACES, PLACES, PAYLOADS)
def test_no_message_is_decoded_at_another_place(place, other, payload):
  alike = other.kind == frames.WELCOME and other._replace(session=place.session) == place
  if other != place and not alike:
    with pytest.raises(Malformed):
      frames.decode(frames.encode(place, payload), other, len(payload))
  with pytest.raises(Malformed):
    frames.decode(frames.encode(place, payload), place, len(payload) + 1)


@given(st.binary(max_size=400), PLACES, st.integers(0, 400))
def test_random_bytes_are_malformed(message, place, num_bytes):
  with pytest.raises(Malformed):
    frames.decode(message, place, num_bytes)


@settings(max_examples=30)
@given(PLACES, st.binary(max_size=40))
def test_every_flipped_bit_is_malformed(place, payload):
  message = frames.encode(place, payload)
  for bit in range(8 * len(message)):
    spoiled = bytearray(message)
    spoiled[bit // 8] ^= 1 << bit % 8
    with pytest.raises(Malformed):
      frames.decode(bytes(spoiled), place, len(payload))


@given(st.integers(0, 2**32))
def test_damaged_messages_are_malformed_or_what_was_encoded(seed):
  rng = random.Random(seed)
  assert {fuzz_frames.execute(rng) for _ in range(20)} <= {"decoded", "malformed"}


def test_the_fuzzer_reaches_both_outcomes_and_finds_a_decoder_without_achecksum(monkeypatch):
  rng = random.Random(0)
  found = [fuzz_frames.execute(rng) for _ in range(2000)]
  assert 200 < found.count("decoded") < 1800
  decode = frames.decode

  def careless(message, place, num_bytes):
    header, payload = message[: fuzz_frames._HEADER], message[frames.HEADER_BYTES :]
    return decode(header + frames.checksum(header, payload) + payload, place, num_bytes)

  monkeypatch.setattr(frames, "decode", careless)
  with pytest.raises(AssertionError, match="not what encode makes"):
    [fuzz_frames.execute(rng) for _ in range(2000)]


def test_messages_are_numbered_through_a_session():
  ours, theirs = frames.Numbered(), frames.Numbered()
  sent = [ours.encode(frames.HELLO, b"1"), ours.encode(frames.HELLO, b"2")]
  assert bytes(theirs.decode(sent[0], frames.HELLO, 1)) == b"1"
  with pytest.raises(Malformed, match="message 0 where message 1, HELLO"):
    theirs.decode(sent[0], frames.HELLO, 1)
