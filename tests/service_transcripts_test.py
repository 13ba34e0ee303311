"""What crosses between the parties is uniform in every message; nothing serves a second time."""

import jax
import numpy as np
import pytest
import scipy.stats
import service_world
from service_world import CLINIC, KEY, Pipe, dealt, inference

from primia_jax.mpc.messages import Prepared
from primia_jax.service import folders, frames, receipts, sessions
from primia_jax.service.errors import Malformed

SESSIONS = 64
LEVEL = 1e-6  # of each test; there are some 50
MASKED = (frames.QUESTION, *frames.SHARES, frames.OUTPUT, *frames.TOTALS)


@pytest.fixture(scope="module")
def world():
  return service_world.world()


def gathered(sessions):
  """By sender and number of the message, its masked payload in each session; from their pipes."""
  found = {}
  for pipe in sessions:
    for sender, sent in enumerate(pipe.sent):
      for number, message in enumerate(sent):
        payload = np.frombuffer(message, np.uint8, offset=frames.HEADER_BYTES)
        if frames.kind_of(message) in MASKED and payload.size:
          found.setdefault((sender, number), []).append(payload)
  return {place: np.stack(payloads) for place, payloads in found.items()}


def transcript(world, root):
  """Of fresh sessions of one image."""
  both, pipes = dealt(world, root, SESSIONS), [Pipe() for _ in range(SESSIONS)]
  for pipe in pipes:
    assert inference(world, both, pipe) is not None
  found = gathered(pipes)
  assert len(found) == 2 * len(world.online[0].sizes)  # a QUESTION, and no OUTPUT, of party 1
  return found


def unmasked(prepared):
  """What a party prepares, without its masks: the control."""

  def without(owner, correlations):
    party = correlations.party
    secret = jax.tree.map(np.zeros_like, prepared(owner, correlations).take(party))
    return Prepared(party, correlations.publication, correlations.inference, secret)

  return without


def nibbles(payloads):
  """The p-value of half bytes [sessions, bytes] as equally frequent, all together."""
  counts = np.bincount(np.concatenate([payloads & 15, payloads >> 4], None), minlength=16)
  return scipy.stats.chisquare(counts).pvalue


def positions(payloads):
  """The p-value of each bit as fair in these sessions: the same value in all is found here."""
  bits = np.unpackbits(payloads, axis=1)
  ones, num = bits.sum(0), len(bits)
  return scipy.stats.chi2.sf(np.sum((ones - num / 2) ** 2 / (num / 4)), bits.shape[1])


def check_uniform(found):
  """Raises AssertionError unless all messages look uniform, and alike in no two sessions."""
  for place, payloads in found.items():
    assert nibbles(payloads) > LEVEL, place
    assert positions(payloads) > LEVEL, place


def test_every_message_of_fresh_sessions_of_one_image_is_uniform(world, tmp_path):
  check_uniform(transcript(world, tmp_path))


def test_the_same_test_rejects_every_message_without_masks(world, tmp_path, monkeypatch):
  monkeypatch.setattr(sessions, "prepared_by", unmasked(sessions.prepared_by))
  for place, payloads in transcript(world, tmp_path).items():
    assert nibbles(payloads) < LEVEL, place
    assert positions(payloads) < LEVEL, place


def test_a_session_that_is_played_again_gets_a_welcome_and_nothing_else(world, tmp_path):
  both, pipe = dealt(world, tmp_path, 2), Pipe()
  assert inference(world, both, pipe)[0] is None
  recorded, left = iter(pipe.sent[1]), folders.unused(both[0] / CLINIC)
  take = receipts.taking(KEY, CLINIC, both[0] / CLINIC)
  server = sessions.serve(
    world.model_owner, world.online[0], world.publication.publication, take,
    lambda idle=False: next(recorded),
  )  # fmt: skip
  assert frames.kind_of(next(server)) == frames.WELCOME
  with pytest.raises(Malformed, match="PREPARE of another session"):
    next(server)
  assert folders.unused(both[0] / CLINIC) == left
