"""A clinic whose openings are checked, through files and sessions: served, or refused by name."""

import jax
import numpy as np
import pytest
import service_transcripts_test as transcripts
from mpc_reference import OWNERS, normal
from service_world import Pipe, World, dealt, inference

from primia_jax import mpc
from primia_jax.attacks import extraction
from primia_jax.mpc import checks, multiprocess, tags
from primia_jax.service import frames
from primia_jax.service.errors import PeerLost, Refused, SessionEnded

W, X = np.abs(normal(0, 6, 5)), np.abs(normal(1, 3, 6))
CONFIG = mpc.Config(32, 10, 14, client="checked")


def fn(w, x):

  return jax.nn.relu(x @ w - 1)


@pytest.fixture(scope="module")
def world():
  plan = mpc.plan(fn, OWNERS, (W, X), CONFIG, mpc.calibrate(fn, OWNERS, [(W, X)]))
  model_owner = mpc.ModelOwner(plan, W)
  dealer = mpc.Dealer(plan, model_owner.tag)
  publication = model_owner.publish(dealer.blind())
  online = tuple(multiprocess.online(plan, party) for party in (0, 1))
  return World(plan, model_owner, mpc.DataOwner(plan, publication), dealer, publication, online)


def test_an_honest_clinic_is_served(world, tmp_path):
  pipe = Pipe()
  error, answers = inference(world, dealt(world, tmp_path, 2), pipe, [X, X / 2])
  assert error is None
  for image, answer in zip([X, X / 2], answers, strict=True):
    np.testing.assert_array_equal(answer, mpc.check(world.plan, (W, image)))
  sizes = [len(m) - frames.HEADER_BYTES for m in pipe.sent[1] if frames.kind_of(m) in frames.SHARES]
  assert sizes[: len(sizes) // 2] == list(world.online[1].sizes[:-1])


def test_every_message_of_fresh_sessions_is_uniform(world, tmp_path):
  """Those of the checks, too; `service_transcripts_test` has the control."""
  count = transcripts.SESSIONS
  both, pipes = dealt(world, tmp_path, count), [Pipe() for _ in range(count)]
  for pipe in pipes:
    assert inference(world, both, pipe)[0] is None
  found = transcripts.gathered(pipes)
  (nothing,) = [place for place, payloads in found.items() if not payloads.any()]
  assert nothing[0] == 0
  assert found.pop(nothing).shape[1] == checks.SIZES[1]  # what the response is answered with
  response = 1, nothing[1]
  sums, digest = np.split(found.pop(response), [8 * tags.SUBSETS], axis=1)
  above = sums.reshape(count, tags.SUBSETS, 8)  # of 32 bits, in 64
  assert not above[..., 4:].any()
  found |= {"sums": above[..., :4].reshape(count, -1), "digest": digest}
  transcripts.check_uniform(found)


def test_one_that_deviates_is_refused_by_name_and_gets_no_output(world, tmp_path):
  start = world.online[1].start
  shift = {4: np.array([2**20], np.uint32)}  # the first ReLU's input
  hostile = world.online[1]._replace(start=lambda side: extraction.shifted(start(side), shift))
  pipe = Pipe()
  ends = inference(
    world._replace(online=(world.online[0], hostile)), dealt(world, tmp_path, 1), pipe
  )
  assert isinstance(ends[0], Refused)
  assert "do not carry the dealer's tags" in str(ends[0])
  assert isinstance(ends[1], SessionEnded | PeerLost)
  assert frames.OUTPUT not in {frames.kind_of(m) for m in pipe.sent[0]}


def test_the_model_owner_resumes_with_the_whole_publication(world):
  secret = bytes(range(32))
  first = mpc.ModelOwner(world.plan, W, secret=secret)
  dealer = mpc.Dealer(world.plan, first.tag)
  publication = first.publish(dealer.blind())
  again = mpc.ModelOwner(world.plan, W, secret=secret)
  with pytest.raises(ValueError, match="needs the whole publication"):
    again.resume(publication.publication)
  again.resume(publication)
  data_owner = mpc.DataOwner(world.plan, publication)
  one, two = dealer.deal()
  asked, question = data_owner.ask(data_owner.prepare(two), X)
  answered = again.answer(again.prepare(one), question)
  parties = world.online[0].start(answered), world.online[1].start(asked)
  got = data_owner.reveal(multiprocess.simulate(*parties))
  np.testing.assert_array_equal(got, mpc.check(world.plan, (W, X)))


def test_a_side_without_tags_is_refused(world):
  data_owner = world.data_owner
  _, second = world.dealer.deal()
  asked, _ = data_owner.ask(data_owner.prepare(second), X)
  with pytest.raises(ValueError, match="has no tags"):
    world.online[1].start(asked._replace(tags=None))
  assert checks.SIZES == (32, 352)
