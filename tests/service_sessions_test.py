"""A session ends with the right answer or with a named error on both sides, and uses up its
correlations.
"""

import concurrent.futures
import contextlib
import shutil
import stat

import numpy as np
import pytest
import service_world
from service_world import CLINIC, Pipe, W, X, dealt, inference

from primia_jax import mpc
from primia_jax.mpc import saving
from primia_jax.service import certificates, folders, frames, institutions, sessions
from primia_jax.service.errors import PeerLost, PutBack, Refused


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
  for sent, first, last in ((pipe.sent[0], 3, 0), (pipe.sent[1], 3, 1)):
    got = [len(message) - frames.HEADER_BYTES for message in sent[first:]]
    assert got == list(world.online[0].sizes)[: len(world.online[0].sizes) - last]


@contextlib.contextmanager
def served(world, both):
  """A server over TLS; gives () -> a clinic's session with it."""
  server, clinic = both
  certificate = certificates.create(server, "model-owner").read_bytes()
  (server / institutions.CLINICS).mkdir()
  own = certificates.create(clinic, CLINIC)
  shutil.copy(own, server / institutions.CLINICS / f"{CLINIC}.pem")
  name, first, second = world.publication.publication, *world.online
  with institutions.serve(server, world.model_owner, name, online=first) as port:
    yield lambda: institutions.ask(
      clinic, world.data_owner, name, f"127.0.0.1:{port}", certificate, second
    )


def test_the_same_between_institutions_over_tls(world, tmp_path):
  with served(world, dealt(world, tmp_path, 3)) as connect:
    for images in ([X], [-X, X]):  # two sessions
      with connect() as session:
        for image in images:
          got = session.ask(image)
          np.testing.assert_array_equal(got, mpc.check(world.plan, (W, image)))
    with connect() as session, pytest.raises(LookupError, match="have the dealer deal more"):
      session.ask(X)


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


def test_what_ended_a_session_is_said_again_and_nothing_more_is_used(world, tmp_path):
  """The clinic's part of it, as `ask` between institutions uses it."""
  _, folder = dealt(world, tmp_path, 3)
  own = sessions.terms(world.plan, world.online[0], world.publication.publication)
  welcome = frames.encode(frames.Place(frames.WELCOME, bytes(range(16))), frames.encode_terms(own))
  pipe = Pipe()
  pipe.put(1, [welcome, PeerLost("the connection ended")])
  asking = sessions.Asking(
    world.data_owner, world.online[1], world.publication.publication,
    lambda message: None, lambda idle=False: pipe.receive(1, idle),
  )  # fmt: skip
  clinic = institutions.Clinic(folder, asking)
  for _ in range(3):
    with pytest.raises(PeerLost, match="the connection ended"):
      clinic.ask(X)
  assert len(folders.unused(folder)) == 2


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
  with pytest.raises(Refused, match="not a number"):
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


def test_after_an_image_that_does_not_fit_the_session_goes_on(world, tmp_path):
  """What was prepared for it serves the next image."""
  with served(world, dealt(world, tmp_path, 1)) as connect, connect() as session:
    with pytest.raises(ValueError, match="shapes"):
      session.ask(X[:2])
    np.testing.assert_array_equal(session.ask(X), mpc.check(world.plan, (W, X)))


# ---- a server that was put back to an earlier state


def put_back(both, root):
  """Copies of both folders, as they are before anything is used."""
  return tuple(shutil.copytree(folder, root / f"copy_of_{folder.name}") for folder in both)


def opened(pipe):
  """The sum of both sides' shares in the second round: a ReLU's masked input."""
  of = lambda party: [m for m in pipe.sent[party] if frames.kind_of(m) == frames.SHARES[party]][1]
  return sum(np.frombuffer(of(i), np.uint32, offset=frames.HEADER_BYTES) for i in (0, 1))


def test_a_clinic_that_kept_copies_learns_weights_from_a_server_that_was_put_back(world, tmp_path):
  """The attack that `receipts` is about: under one mask twice, the difference is that of x @ w."""
  both = dealt(world, tmp_path, 1)
  copies, pipes = put_back(both, tmp_path), (Pipe(), Pipe())
  assert inference(world, both, pipes[0])[0] is None
  ends = inference(world, copies, pipes[1], [X + np.eye(3, 6, dtype=np.float32)])
  assert ends[0] is None
  found = (opened(pipes[1]) - opened(pipes[0])).view(np.int32) / 2**21
  np.testing.assert_allclose(found.reshape(3, 5), W[:3], atol=2e-3)


def test_an_honest_clinic_ends_that_with_its_next_request(world, tmp_path):
  both = dealt(world, tmp_path, 3)
  server, _ = put_back(both, tmp_path)
  for _ in range(2):
    assert inference(world, both, Pipe())[0] is None
  ends = inference(world, (server, both[1]), Pipe())
  assert isinstance(ends[0], PutBack)
  assert len(folders.unused(server / CLINIC)) == 3  # `institutions` then discards them
