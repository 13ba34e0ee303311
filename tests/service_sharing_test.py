"""A client that is no party: two servers, a client without JAX, and what a hostile one can do."""

import json
import threading

import jax
import numpy as np
import pytest
from mpc_reference import normal

from primia_jax import mpc
from primia_jax.attacks import extraction
from primia_jax.mpc import helping, multiprocess
from primia_jax.mpc.circuit import Apply
from primia_jax.mpc.lowering import lower
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import cards, sharing
from primia_jax.service import helping as servers
from primia_jax.service.errors import Malformed, PeerLate, Refused, SessionEnded

D, H, L = 6, 5, 3
W = {
  "hidden": normal(0, D, H),
  "hidden_bias": normal(1, H),
  "kernel": normal(2, H, L),
  "bias": normal(3, L),
}
IMAGES = normal(4, 40, D)
OWNERS = ("model_owner", "shared")
CONFIG = mpc.Config(32, 10, 14, margin=4.0, client="sharing")


def fn(w, x):
  return jax.nn.relu(x @ w["hidden"] + w["hidden_bias"]) @ w["kernel"] + w["bias"]


class World:
  """All roles of a plan whose client shares its image."""

  def __init__(self, config=CONFIG):
    ranges = mpc.calibrate(fn, OWNERS, [(W, x) for x in IMAGES])
    self.plan = mpc.plan(fn, OWNERS, (W, IMAGES[0]), config, ranges)
    self.model_owner = mpc.ModelOwner(self.plan, W)
    self.dealer = mpc.Dealer(self.plan, self.model_owner.tag)
    self.publication = self.model_owner.publish(self.dealer.blind())
    self.helper = helping.Helper(self.plan, self.publication)
    self.online = [multiprocess.online(self.plan, party) for party in (MODEL_OWNER, DATA_OWNER)]
    card = helping.card(self.plan, self.publication.publication)
    self.card = cards.Card(**json.loads(json.dumps(card)))

  def answer(self, both):
    """Both servers' answers to a client's two payloads, in this process."""
    first, second = self.dealer.deal()
    given = [helping.parsed(self.plan, payload) for payload in both]
    helped = self.helper.assist(self.helper.prepare(second), given[1])
    prepared = self.model_owner.prepare(first)
    question = mpc.messages.Question(prepared.inference, {})
    answered = self.model_owner.answer(prepared, question, given[0])
    shares = multiprocess.simulate(self.online[0].start(answered), self.online[1].start(helped))
    return [helping.packed([v[i] for v in shares]) for i in (0, 1)]

  def ask(self, image):
    return sharing.revealed(self.card, self.answer(sharing.shares(self.card, [image])))[0]


@pytest.fixture(scope="module")
def world():
  return World()


def test_answers_have_the_integer_models_bits(world):
  for image in IMAGES[:3]:
    np.testing.assert_array_equal(world.ask(image), mpc.check(world.plan, (W, image)))


def test_a_ring_of_64_bits_in_a_process_of_32_bit_integers():
  world = World(mpc.Config(64, 14, 18, margin=4.0, client="sharing"))
  with jax.enable_x64(False):
    np.testing.assert_array_equal(world.ask(IMAGES[0]), mpc.check(world.plan, (W, IMAGES[0])))
    assert helping.share_bytes(world.plan) == 8 * D


def test_each_server_alone_sees_uniform_numbers(world):
  counts = np.zeros((2, 16), int)
  for _ in range(2000):
    for i, share in enumerate(sharing.shares(world.card, [IMAGES[0]])):
      v = np.frombuffer(share, np.uint8)
      counts[i] += np.bincount(np.concatenate([v & 15, v >> 4]), minlength=16)
  expected = counts.sum(1, keepdims=True) / 16
  assert np.all(((counts - expected) ** 2 / expected).sum(1) < 60)  # 15 degrees: beyond 1e-6


def shifted(card, image, shifts):
  """A hostile client's payloads: shares of an image, with ring elements added to it."""
  first, second = sharing.shares(card, [image])
  words = np.asarray(shifts).astype(np.uint32)
  return first, (np.frombuffer(second, np.uint32) + words).tobytes()


def gate_of(plan):
  """The bits of what a plan's first ReLU takes: a number beyond them wraps around."""
  of = (op.gate for op in plan.circuit.operations if isinstance(op, Apply))
  return next(gate.range_bits for gate in of if gate.action == "relu")


def unmoved(answer, bits, subsets):
  """The attack: sets of pixels to which 2^bits can be added without changing an answer.

  Where nothing clamps them, each unit for which the sum of these pixels' weights is odd wraps
  around, so that the sets tell the weights' lowest bits, up to a change of units.

  Args:
    answer: shifts [D] of an image -> what the client gets.
    bits: of the gate.
    subsets: [S, D] of 0 and 1.
  """
  usual = answer(np.zeros_like(subsets[0]))
  return [np.array_equal(answer(row * 2**bits), usual) for row in subsets]


def even(subsets, hidden):
  """What the attack finds where it works: for which sets all units' sums of weights are even."""
  return list((subsets @ (np.asarray(hidden).astype(np.int64) & 1) % 2 == 0).all(1))


@pytest.mark.parametrize("is_clamped", [True, False])
def test_an_image_beyond_its_range_tells_weights_only_without_the_clamp(
  world, monkeypatch, is_clamped
):
  """The control takes the clamp out, and has the lowest bits of all weights of the first layer."""
  bits, subsets = gate_of(world.plan), np.array([*np.ndindex(*[2] * D)][1:])
  wanted = even(subsets, next(iter(world.model_owner._own.values())).elements)
  assert sum(wanted) < len(wanted) / 4
  if not is_clamped:
    monkeypatch.setattr(lower.clamping, "clamped", lambda circuit: circuit)
    world = World()
  ask = lambda shifts: sharing.revealed(
    world.card, world.answer(shifted(world.card, IMAGES[0], shifts))
  )[0]
  assert unmoved(ask, bits, subsets) == ([True] * len(wanted) if is_clamped else wanted)


def test_shifts_of_its_shares_shift_its_image_alone(world):
  """The attack of a party fails, since nobody but a party opens what a ReLU takes."""
  unit = world.card.images[0]["unit"]

  def ask(x, shifts):
    words = np.resize(np.rint(shifts / unit).astype(np.int64), D)
    return sharing.revealed(world.card, world.answer(shifted(world.card, x, words)))[0]

  found = extraction.by_shifts(ask, D, H, 8.0)
  for name in ("hidden", "kernel"):
    assert np.abs(getattr(found, name) - W[name]).max() > 0.5


@pytest.mark.parametrize("beyond", [2**13, 2**20 + 5, 2**31, 2**32 - 7])
def test_an_image_beyond_its_range_is_the_clamped_one(world, beyond):
  (image,) = world.card.images
  first, second = (np.frombuffer(v, np.uint32) for v in sharing.shares(world.card, [IMAGES[1]]))
  raised = second + np.uint32(beyond)
  got = sharing.revealed(world.card, world.answer((first.tobytes(), raised.tobytes())))[0]
  whole = np.rint(IMAGES[1].astype(np.float64) / image["unit"]).astype(np.int64) + beyond
  half = 2 ** (image["bits"] - 1)
  clamped = ((whole + half) % (2 * half) - half).astype(np.uint32)
  same = world.answer((first.tobytes(), (clamped - first).tobytes()))
  np.testing.assert_array_equal(got, sharing.revealed(world.card, same)[0])


def test_an_image_that_does_not_fit_is_refused(world):
  with pytest.raises(ValueError, match="is beyond"):
    sharing.shares(world.card, [IMAGES[0] * 1e4])
  most = world.card.images[0]["most"]
  sharing.shares(world.card, [np.full(D, most)])
  with pytest.raises(ValueError, match=f"is beyond {most:.4g}, for which the model was planned"):
    sharing.shares(world.card, [np.full(D, 1.02 * most)])  # the clamp would let it through
  with pytest.raises(ValueError, match="an image of shape"):
    sharing.shares(world.card, [IMAGES])
  with pytest.raises(ValueError, match="the plan takes shares"):
    world.model_owner.answer(*_prepared(world))


def _prepared(world):
  prepared = world.model_owner.prepare(world.dealer.deal()[0])
  return prepared, mpc.messages.Question(prepared.inference, {})


# ---- the model owner's desk


def test_a_request_that_came_to_one_server_only_is_refused():
  desk = servers.Desk(0.1)
  with pytest.raises(PeerLate, match="helper did not ask"):
    desk.submit(b"1", {})
  with pytest.raises(Refused, match="no client has sent"), desk.taken(b"1"):
    pass


def test_a_request_waits_for_the_helper_and_ends_with_its_session():
  desk, found = servers.Desk(5.0), []

  def submit():
    try:
      found.append(desk.submit(b"1", {0: 1}))
    except SessionEnded as error:
      found.append(error)

  for fails in (False, True):
    thread = threading.Thread(target=submit)
    thread.start()
    try:
      with desk.taken(b"1") as (shares, answer):
        assert shares == {0: 1}
        if fails:
          raise Malformed("x")
        answer(b"done")
    except Malformed:
      pass
    thread.join(5)
  assert found[0] == b"done"
  assert isinstance(found[1], Malformed)


def test_a_desk_holds_so_many_requests_and_no_more():
  desk = servers.Desk(5.0, most=1)
  thread = threading.Thread(target=desk.submit, args=(b"1", {0: 1}))
  thread.start()
  with desk.taken(b"1") as (_, answer):
    with pytest.raises(Refused, match="1 requests are at work"):
      desk.submit(b"2", {})
    answer(b"done")
  thread.join(5)
