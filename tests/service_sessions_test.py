"""A session ends with the right answer or with a named error on both sides, and uses up its
correlations.
"""

import concurrent.futures
import functools
import shutil
import stat

import numpy as np
import pytest
import scipy.stats
import service_world
from service_world import CLINIC, Pipe, W, X, dealt, inference

from primia_jax import mpc
from primia_jax.mpc import saving
from primia_jax.service import certificates, folders, frames, institutions, sessions
from primia_jax.service.errors import Malformed, PeerLate, PeerLost, Refused, SessionEnded


@pytest.fixture(scope="module")
def world():
  return service_world.world()


def test_answers_have_the_integer_models_bits(world, tmp_path):
  images = [X, -X]
  pipe = Pipe()
  error, answers = inference(world, dealt(world, tmp_path, 2), pipe, images)
  assert error is None
  for image, answer in zip(images, answers, strict=True):
    np.testing.assert_array_equal(answer, mpc.check(world.plan, (W, image)))
  assert not np.array_equal(*answers)
  largest = max(len(message) for sent in pipe.sent for message in sent)
  assert largest == sessions.largest_message(world.plan, world.online[0])


def test_the_sizes_on_the_wire_are_those_of_the_plan(world, tmp_path):
  pipe = Pipe()
  inference(world, dealt(world, tmp_path, 1), pipe)
  for sent, first, last in ((pipe.sent[0], 2, 0), (pipe.sent[1], 3, 1)):
    got = [len(message) - frames.HEADER_BYTES for message in sent[first:]]
    assert got == list(world.online[0].sizes)[: len(world.online[0].sizes) - last]


def test_no_message_shows_what_the_next_session_with_the_same_image_shows(world, tmp_path):
  """Every round of two inferences of one image differs, since every mask is fresh."""
  pipe = Pipe()
  inference(world, dealt(world, tmp_path, 2), pipe, [X, X])
  num = len(world.online[0].sizes) - 1
  for sent in pipe.sent:
    rounds = [m[frames.HEADER_BYTES :] for m in sent if frames.kind_of(m) == frames.ROUND]
    assert len(rounds) == 2 * num
    assert all(a != b for a, b in zip(rounds[:num], rounds[num:], strict=True))


def test_what_crosses_is_uniform(world, tmp_path):
  """Bytes of every round of 30 inferences of one image, by chi-square at a level of 1e-6."""
  pipe = Pipe()
  inference(world, dealt(world, tmp_path, 30), pipe, [X] * 30)
  for sent in pipe.sent:
    messages = [m for m in sent if frames.kind_of(m) == frames.ROUND]
    for number in range(len(world.online[0].sizes) - 1):
      place = [
        m[frames.HEADER_BYTES :] for m in messages if int.from_bytes(m[22:26], "little") == number
      ]
      assert len(place) == 30
      nibbles = np.frombuffer(b"".join(place), np.uint8)
      counts = np.bincount(np.concatenate([nibbles & 15, nibbles >> 4]), minlength=16)
      assert scipy.stats.chisquare(counts).pvalue > 1e-6
      assert len(set(place)) == 30 or len(place[0]) <= 2


def test_the_same_between_institutions_over_tls(world, tmp_path):
  server, clinic = dealt(world, tmp_path, 3)
  certificate = certificates.create(server, "model-owner").read_bytes()
  (server / institutions.CLINICS).mkdir()
  own = certificates.create(clinic, CLINIC)
  shutil.copy(own, server / institutions.CLINICS / f"{CLINIC}.pem")
  name, first, second = world.publication.publication, *world.online
  with institutions.serve(server, world.model_owner, name, online=first) as port:
    for images in ([X], [-X, X]):  # two sessions
      with institutions.ask(
        clinic, world.data_owner, name, f"127.0.0.1:{port}", certificate, second
      ) as session:
        for image in images:
          got = session.ask(image)
          np.testing.assert_array_equal(got, mpc.check(world.plan, (W, image)))
    with (
      institutions.ask(
        clinic, world.data_owner, name, f"127.0.0.1:{port}", certificate, second
      ) as session,
      pytest.raises(LookupError, match="have the dealer deal more"),
    ):
      session.ask(X)


# ---- a network that does not do what it should

FAULTS = {
  "cut": lambda message: [message[:-1]],
  "longer": lambda message: [message + b"\0"],
  "empty": lambda message: [b""],
  "twice": lambda message: [message, message],
  "other kind": lambda message: [message[:5] + b"\x63" + message[6:]],
  "other session": lambda message: [message[:6] + bytes(16) + message[22:]],
  "other round": lambda message: [message[:22] + b"\xff" + message[23:]],
  "no magic": lambda message: [b"HTTP" + message[4:]],
  "other version": lambda message: [message[:4] + b"\x63" + message[5:]],
  "ended": lambda message: [None],
}


def spoil(fault, where, sender, number, message):
  return fault(message) if (sender, number) == where else [message]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_message_is_named_and_burns_the_correlations(world, tmp_path, fault):
  """Every message of either side in turn; only a fault after the last one goes unseen."""
  messages = len(world.online[0].sizes) + 2
  both = dealt(world, tmp_path, 2 * messages)
  for party in (0, 1):
    for at in range(messages):
      left = folders.unused(both[1])
      change = functools.partial(spoil, FAULTS[fault], (party, at))
      ends = inference(world, both, Pipe(change))
      spoiled = isinstance(ends[1], SessionEnded)
      if not spoiled:
        np.testing.assert_array_equal(ends[1][0], mpc.check(world.plan, (W, X)))
      last = at == messages - 1 and fault == "twice"
      assert spoiled or last or (fault, at) in {("other session", 0)}, (fault, party, at)
      assert all(isinstance(e, SessionEnded | list | None) for e in ends)
      taken = set(left) - set(folders.unused(both[1]))
      assert len(taken) <= 1
      for number in taken:
        with pytest.raises(Refused, match="were used"):
          folders.take(both[1], number)


def test_a_peer_that_stalls_is_named(world, tmp_path):
  stall = lambda sender, i, message: [] if sender == 0 and i >= 4 else [message]
  ends = inference(world, dealt(world, tmp_path, 1), Pipe(stall, timeout=0.5))
  assert all(isinstance(end, PeerLate | PeerLost) for end in ends)


# ---- what is agreed, and what serves once


def test_each_difference_is_refused_before_anything_is_computed(world):
  own = sessions.terms(world.plan, world.online[0], world.publication.publication)
  sessions.agree(own, own)
  for name, reason in {
    "num_bits": "rings differ",
    "plan": "plans differ",
    "rounds": "sizes differ",
    "tag": "other weights",
    "number": "another dealing",
  }.items():
    value = getattr(own, name)
    other = own._replace(**{name: value + 1 if name == "num_bits" else bytes(len(value))})
    with pytest.raises(Refused, match=reason):
      sessions.agree(own, other)


def test_a_server_refuses_another_plan_and_says_so(world, tmp_path):
  both = dealt(world, tmp_path, 1)
  own = sessions.terms(world.plan, world.online[0], world.publication.publication)
  other = frames.encode_terms(own._replace(plan=bytes(32)))
  hello = lambda sender, i, message: [message[: frames.HEADER_BYTES] + other if not i else message]
  ends = inference(world, both, Pipe(lambda s, i, m: hello(s, i, m) if s else [m]))
  assert isinstance(ends[0], Refused)
  assert isinstance(ends[1], PeerLost)
  assert len(folders.unused(both[1])) == 1  # nothing was taken


def test_a_used_inference_is_refused_even_from_a_backup(world, tmp_path):
  both = dealt(world, tmp_path, 1)
  backup = shutil.copytree(both[0] / CLINIC / "correlations", tmp_path / "backup")
  clinics = shutil.copytree(both[1], tmp_path / "clinic_backup")
  assert inference(world, both, Pipe())[0] is None
  shutil.copytree(backup, both[0] / CLINIC / "correlations", dirs_exist_ok=True)
  ends = inference(world, (both[0], clinics), Pipe())
  assert isinstance(ends[0], Refused)
  assert "were used" in str(ends[0])


def test_of_many_readers_at_once_one_gets_the_correlations(world, tmp_path):
  _, clinic = dealt(world, tmp_path, 4)
  for number in folders.unused(clinic):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      tries = [pool.submit(folders.take, clinic, number) for _ in range(4)]
    errors = [one.exception() for one in tries]
    assert sorted(isinstance(e, Refused) for e in errors) == [False, True, True, True]
  assert folders.unused(clinic) == []


def test_a_crash_while_reading_loses_the_correlations(world, tmp_path, monkeypatch):
  def crash(path):
    raise KeyboardInterrupt

  _, clinic = dealt(world, tmp_path, 1)
  (number,) = folders.unused(clinic)
  monkeypatch.setattr(saving, "read", crash)
  with pytest.raises(KeyboardInterrupt):
    folders.take(clinic, number)
  monkeypatch.undo()
  assert folders.unused(clinic) == []
  with pytest.raises(Refused, match="were used"):
    folders.take(clinic, number)


def test_the_model_owner_is_dealt_a_seed_alone(world, tmp_path):
  server, clinic = dealt(world, tmp_path, 1)
  size = lambda folder: sum(p.stat().st_size for p in (folder / "correlations").iterdir())
  assert size(server / CLINIC) < 2000 < size(clinic)
  folder = tmp_path / "model_owner" / CLINIC / "correlations"
  assert {stat.S_IMODE(p.stat().st_mode) for p in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("number", ["", "../../key.pem", "A" * 64, "0" * 63])
def test_a_number_that_is_none_is_refused(number, tmp_path):
  with pytest.raises(Refused, match="no number"):
    folders.take(tmp_path, number)


def test_one_clinic_cannot_use_up_anothers(world, tmp_path):
  both = dealt(world, tmp_path, 1)
  folders.deal(world.dealer, 1, both[0] / "clinic-b", tmp_path / "other")
  ends = inference(world, (both[0], tmp_path / "other"), Pipe())
  assert "nothing was dealt" in str(ends[0])


def test_a_model_owner_resumes_only_with_its_weights_and_secret(world):
  secret = bytes(range(32))
  first = mpc.ModelOwner(world.plan, W, secret=secret)
  name = first.publish(mpc.Dealer(world.plan, first.tag).blind()).publication
  mpc.ModelOwner(world.plan, W, secret=secret).resume(name)
  for weights, other in ((W + 1, secret), (W, bytes(32))):
    with pytest.raises(ValueError, match="other weights"):
      mpc.ModelOwner(world.plan, weights, secret=other).resume(name)
  with pytest.raises(ValueError, match="32"):
    mpc.ModelOwner(world.plan, W, secret=b"short")


def test_an_image_that_does_not_fit_uses_nothing_of_the_session(world, tmp_path):
  with pytest.raises(ValueError, match="shapes"):
    inference(world, dealt(world, tmp_path, 1), Pipe(), [X[:2]])


def test_decoding_refuses_random_bytes():
  place = frames.Place(frames.ROUND, bytes(16), 3)
  good = frames.encode(place, b"abc")
  assert bytes(frames.decode(good, place, 3)) == b"abc"
  rng = np.random.default_rng(0)
  for _ in range(3000):
    spoiled = bytearray(good)
    for i in rng.integers(0, frames.HEADER_BYTES, 1 + rng.integers(3)):
      spoiled[i] ^= 1 + rng.integers(255)
    if spoiled != good:
      with pytest.raises(Malformed):
        frames.decode(bytes(spoiled), place, 3)
  for _ in range(300):
    with pytest.raises(Malformed):
      frames.decode(rng.bytes(rng.integers(80)), place, 3)
