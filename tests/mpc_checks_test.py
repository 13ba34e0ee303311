"""A data owner that opens anything else than the protocol says gets no output."""

import contextlib

import jax
import numpy as np
import pytest
import scipy.stats
from mpc_reference import OWNERS, normal

from primia_jax import mpc
from primia_jax.attacks import extraction
from primia_jax.mpc import checks, multiprocess, pricing, protocol, replay, segments, tags
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER

W = {"in": np.abs(normal(0, 4, 3)), "out": normal(1, 3, 2)}
X = np.abs(normal(2, 4))
CONFIG = mpc.Config(32, 10, 14, client="checked")


def fn(w, x):
  return jax.nn.relu(x @ w["in"] - 1) @ w["out"]


def planned(config, fn=fn, args=(W, X)):
  return mpc.plan(fn, OWNERS, args, config, mpc.calibrate(fn, OWNERS, [args]))


class World:
  """All roles of a plan, its programs, and what one inference was dealt; a test uses it again."""

  def __init__(self, plan, args=(W, X)):
    self.plan, self.args = plan, args
    self.model_owner = mpc.ModelOwner(plan, args[0])
    self.dealer = mpc.Dealer(plan, self.model_owner.tag)
    self.data_owner = mpc.DataOwner(plan, self.model_owner.publish(self.dealer.blind()))
    self.online = [multiprocess.online(plan, party) for party in (MODEL_OWNER, DATA_OWNER)]
    self.answered, self.asked = self.sides(args[1])

  def sides(self, image):
    first, second = self.dealer.deal()
    asked, question = self.data_owner.ask(self.data_owner.prepare(second), image)
    return self.model_owner.answer(self.model_owner.prepare(first), question), asked

  def run(self, shifts={}, sides=None):  # noqa: B006
    answered, asked = sides or (self.answered, self.asked)
    parties = self.online[0].start(answered), self.online[1].start(asked)
    shares = multiprocess.simulate(parties[0], extraction.shifted(parties[1], shifts))
    return np.asarray(self.data_owner.reveal(shares))


@pytest.fixture(scope="module")
def world():
  return World(planned(CONFIG))


def test_as_many_messages_and_bytes_cross_as_the_plan_says(world):
  sides = world.sides(X)
  parties = [online.start(side) for online, side in zip(world.online, sides, strict=True)]
  sent, crossed = [next(party) for party in parties], []
  while sent[0]:
    crossed.append(sent)
    arrived, sent = sent[::-1], [b"", b""]
    for i, party in enumerate(parties):
      with contextlib.suppress(StopIteration):
        sent[i] = party.send(arrived[i])
  total = pricing.total(world.plan.circuit)
  assert [len(first) for first, _ in crossed] == list(world.online[0].sizes)
  assert (len(crossed), sum(len(first) for first, _ in crossed)) == (total.rounds, total.sent)
  assert f"{total.rounds:>6}" in next(v for v in str(world.plan).splitlines() if "total" in v)


def openings():
  """Every opening of the tiny network: its round, its place and length in bytes, and its kind."""
  traced, kinds = _traced(planned(CONFIG))
  found, filled = [], {}
  for kind, aval, (level, _) in zip(
    kinds, segments.exchanged(traced), segments.places(traced), strict=True
  ):
    size, start = segments.num_bytes([aval]), filled.get(level, 0)
    found.append((level, start, size, kind))
    filled[level] = start + size
  return found


def _traced(plan):
  wire = replay.noting(plan.config.num_bits)
  traced = jax.make_jaxpr(
    lambda ready, operands: protocol.run(plan.circuit, wire, ready, operands),
    axis_env=[("party", 2)],
  )(*multiprocess.inputs(plan))
  return traced, wire.kinds


def test_an_honest_data_owner_gets_the_integer_models_bits(world):
  exact = mpc.check(world.plan, world.args)
  np.testing.assert_array_equal(world.run(), exact)
  np.testing.assert_array_equal(
    world.run(sides=world.sides(X / 2)), mpc.check(world.plan, (W, X / 2))
  )
  assert np.abs(exact).max() > 0.1
  assert world.online[0].sizes[-3:-1] == checks.SIZES == (32, 352)


@pytest.mark.parametrize("opening", openings(), ids=lambda o: f"round{o[0]}-{o[1]}-{o[3]}")
def test_each_single_deviation_is_caught(world, opening):
  """One change at a time: of each bit of a word, of each element by 1 and by half of the ring."""
  level, start, size, kind = opening
  if kind == replay.WORD:
    changes = [np.eye(1, size, i // 8, dtype=np.uint8)[0] << i % 8 for i in range(8 * size)]
    shifts = [np.concatenate([np.zeros(start, np.uint8), c.astype(np.uint8)]) for c in changes]
  else:
    num, before = size // 4, start // 4
    shifts = [
      np.eye(1, before + num, before + i, dtype=np.uint32)[0] * np.uint32(by)
      for i in range(num)
      for by in (1, 2**31, 0xDEADBEEF)
    ]
  for shift in shifts:
    if kind == replay.FREE:  # it is another image
      assert world.run({level: shift}).shape == (2,)
    else:
      with pytest.raises(checks.Deviated, match="do not carry the dealer's tags"):
        world.run({level: shift})


def test_every_kind_of_opening_is_there():
  kinds = [kind for *_, kind in openings()]
  assert kinds.count(replay.FREE) == 1
  assert kinds.count(replay.ELEMENT) == 4
  assert kinds.count(replay.WORD) > 8


@pytest.mark.parametrize("message", [-3, -2])
def test_a_forged_answer_to_the_check_is_refused(world, message):
  number = len(world.online[0].sizes) + message
  for i in (0, world.online[0].sizes[message] - 1):
    with pytest.raises(checks.Deviated):
      world.run({number: np.eye(1, i + 1, i, dtype=np.uint8)[0]})


def test_nothing_is_sent_after_a_deviation(world):
  party = world.online[0].start(world.answered)
  other = extraction.shifted(world.online[1].start(world.asked), {1: np.ones(1, np.uint8)})
  first, second = next(party), next(other)
  for _ in world.online[0].sizes[:-2]:
    first, second = party.send(second), other.send(first)
  with pytest.raises(checks.Deviated):  # in the place of the outputs' shares
    party.send(second)


@pytest.mark.parametrize("beyond", [1, 2**10 + 3, 2**20, 2**31])
def test_an_image_beyond_its_range_is_the_clamped_one(world, beyond):
  """The image's own opening is free, so a data owner can put in any ring element."""
  got = world.run({0: np.array([0, beyond], np.uint32)})
  unit = world.plan.config.unit
  (bits,) = [o.bits for o in world.plan.circuit.operands if o.owner == DATA_OWNER]
  whole = np.rint(X.astype(np.float64) / unit).astype(np.int64)
  whole[1] += beyond
  clamped = (whole + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
  if np.abs(clamped).max() * unit < 2 * X.max():  # else inner gates would wrap in the clear, too
    exact = mpc.check(world.plan, (W, (clamped * unit).astype(np.float32)))
    np.testing.assert_array_equal(got, exact)
  again = world.run({0: np.array([0, (clamped - whole)[1] + beyond], np.int64).astype(np.uint32)})
  np.testing.assert_array_equal(got, again)


@pytest.mark.parametrize("num_subsets", [1, 3])
def test_a_deviation_passes_as_often_as_is_stated(monkeypatch, num_subsets):
  """With few subsets: half of the ring, at one element, passes where no subset has it."""
  monkeypatch.setattr(tags, "SUBSETS", num_subsets)
  rng = np.random.default_rng(0)
  words = lambda *shape: rng.integers(0, 2**64, shape, np.uint64)
  passed, num = 0, 800
  for _ in range(num):
    challenge, alpha = rng.bytes(32), int(rng.integers(2**32))
    shares, keys = words(5), words(5)
    held = np.uint64(alpha) * shares + keys
    response = tags.respond(challenge, 32, [shares], [held])
    assert tags.check(challenge, response, 32, alpha, [shares.astype(np.uint32)], [keys])
    sent = shares + np.eye(1, 5, 2, dtype=np.uint64)[0] * np.uint64(2**31)
    # its best answer: the upper bits that make the sum's error 0, where that can be
    forged = tags.respond(challenge, 32, [shares], [held])
    passed += tags.check(challenge, forged, 32, alpha, [sent.astype(np.uint32)], [keys])
  want = 2.0**-num_subsets
  assert abs(passed / num - want) < 5 * np.sqrt(want * (1 - want) / num)


def test_what_the_check_shows_is_uniform(world):
  """The sums of upper bits over 24 inferences of one image, by chi-square at a level of 1e-6."""
  payloads = []

  def recorded(party):
    message = next(party)
    while True:
      if len(message) == tags.RESPONSE_BYTES:
        payloads.append(message)
      try:
        message = party.send((yield message))
      except StopIteration as end:
        return end.value

  for _ in range(24):
    answered, asked = world.sides(X)
    multiprocess.simulate(world.online[0].start(answered), recorded(world.online[1].start(asked)))
  sums = np.stack([np.frombuffer(v, "<u8", 4) for v in payloads])
  assert sums.shape == (24, 4)
  assert not np.any(sums >> np.uint64(32))
  assert _p_value(sums) > 1e-6
  # without the masks' upper bits, what is left are carries
  rng = np.random.default_rng(0)
  carries = rng.integers(0, 2**32, (24, 4, 20), np.uint64).sum(-1) >> np.uint64(32)
  assert _p_value(carries) < 1e-6


def _p_value(sums):
  low = np.ascontiguousarray(sums.astype("<u4")).view(np.uint8)
  counts = np.bincount(np.concatenate([low & 15, low >> 4], axis=None), minlength=16)
  return scipy.stats.chisquare(counts).pvalue


def test_who_knows_the_secret_passes():
  """So it is the secret that stops others."""
  rng = np.random.default_rng(1)
  shares, keys, alpha = (
    rng.integers(0, 2**64, 5, np.uint64),
    rng.integers(0, 2**64, 5, np.uint64),
    77,
  )
  sent, challenge = shares + np.uint64(3), b"c" * 32
  forged = tags.respond(challenge, 32, [sent], [np.uint64(alpha) * sent + keys])
  assert tags.check(challenge, forged, 32, alpha, [sent.astype(np.uint32)], [keys])
  assert not tags.check(challenge, forged, 32, alpha + 1, [sent.astype(np.uint32)], [keys])


def many(w, x):
  """Convolution, pooling, public factors, a product of shared values, and a choice."""
  y = jax.lax.conv(x, w["conv"], (1, 1), "SAME")
  y = jax.nn.relu(y).reshape(2, 2, 2, 2, 2).max((2, 4))
  y = y.reshape(-1) * np.linspace(-1, 1, 8, dtype=np.float32)
  y = y @ np.cos(np.arange(24, dtype=np.float32)).reshape(8, 3)
  return jax.nn.relu(y) * y, np.float32(0.5) - y


@pytest.mark.slow
@pytest.mark.parametrize("num_bits", [32, 29])
def test_every_kind_of_step_keeps_its_tags(num_bits):
  args = {"conv": normal(0, 2, 1, 3, 3)}, normal(1, 1, 1, 4, 4)
  world = World(planned(mpc.Config(num_bits, 7, 9, client="checked"), many, args), args)
  parties = world.online[0].start(world.answered), world.online[1].start(world.asked)
  got = world.data_owner.reveal(multiprocess.simulate(*parties))
  for a, b in zip(got, mpc.check(world.plan, args), strict=True):
    np.testing.assert_array_equal(a, b)
  for level in range(1, len(world.online[0].sizes) - 1):
    party = extraction.shifted(world.online[1].start(world.asked), {level: np.ones(1, np.uint8)})
    with pytest.raises(checks.Deviated):
      multiprocess.simulate(world.online[0].start(world.answered), party)
