"""Questions: through a session over TLS with a model owner's server, and what outputs mean."""

import shutil

import jax
import numpy as np
import pytest
from mpc_reference import normal
from service_world import CLINIC, dealt
from service_world import World as Roles

from primia_jax import mpc
from primia_jax.clinic import asking
from primia_jax.mpc import multiprocess
from primia_jax.service import certificates, institutions

SIZE = 4
W = normal(0, SIZE * SIZE, 3)


def fn(weights, images):
  return jax.nn.relu(images).reshape(1, -1) @ weights


def as_float(images):
  return images.astype(np.float32) / 255


@pytest.fixture(scope="module")
def world():
  example = np.full((1, SIZE, SIZE, 1), 1, np.float32)
  owners = ("model_owner", "data_owner")
  ranges = mpc.calibrate(fn, owners, [(W, example)])
  plan = mpc.plan(fn, owners, (W, example), mpc.Config(32, 10, 14), ranges)
  model_owner = mpc.ModelOwner(plan, W)
  dealer = mpc.Dealer(plan, model_owner.tag)
  publication = model_owner.publish(dealer.blind())
  online = tuple(multiprocess.online(plan, party) for party in (0, 1))
  return Roles(plan, model_owner, mpc.DataOwner(plan, publication), dealer, publication, online)


def test_a_question_goes_through_a_session_with_a_server(world, tmp_path):
  server, clinic = dealt(world, tmp_path, 1)
  certificate = certificates.create(server, "model-owner").read_bytes()
  (server / institutions.CLINICS).mkdir()
  own = certificates.create(clinic, CLINIC)
  shutil.copy(own, server / institutions.CLINICS / f"{CLINIC}.pem")
  name, first, second = world.publication.publication, *world.online
  image = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE, 1) * 15
  said = []
  with (
    institutions.serve(server, world.model_owner, name, online=first) as port,
    institutions.ask(
      clinic, world.data_owner, name, f"127.0.0.1:{port}", certificate, second
    ) as session,
  ):
    rounds = len(second.sizes)
    ask = asking.through(
      session.prepare, lambda images: session.ask(as_float(images)), {"sent": 1}, rounds
    )
    answer = ask(image, said.append)
    with pytest.raises(LookupError, match="have the dealer deal more"):
      ask(image, said.append)
  logits = np.asarray(mpc.check(world.plan, (W, as_float(image[None]))), np.float64)
  expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
  np.testing.assert_allclose(answer.probabilities, expected, rtol=1e-6)
  assert answer.label == expected.argmax()
  assert set(answer.seconds) == {"prepare", "compute"}
  assert said[1] == f"Both sides compute on masked values, in {rounds} rounds"


def test_outputs_are_logits_or_a_class():
  answer = asking.answer_of(np.array([[1000.0, 1001.0]]), {}, {}, 3)
  np.testing.assert_allclose(answer.probabilities, [1 / (1 + np.e), np.e / (1 + np.e)])
  assert answer.label == 1
  assert asking.answer_of(np.array([2.0]), {}, {}, 3) == asking.Answer(2, None, {}, {}, 3)


def test_files_that_are_too_long_are_named(monkeypatch):
  monkeypatch.setattr(asking, "LONGEST", 2 << 20)
  model = asking.Model("cnn", "1", ("a", "b"), 8, 1)
  with pytest.raises(ValueError, match=r"scan\.png has 3 MiB, more than the 2 that are taken"):
    asking.image(model, bytes(3 << 20), "scan.png")
