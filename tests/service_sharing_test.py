"""A client that is no party: two servers, a client without JAX, and what a hostile one can do."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from mpc_reference import normal

from primia_jax import mpc
from primia_jax.attacks import extraction
from primia_jax.mpc import apart, helping
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import certificates, folders, sharing
from primia_jax.service import helping as servers
from primia_jax.service.channel import Limits
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
ROOT = pathlib.Path(__file__).parents[1]


def fn(w, x):
  return jax.nn.relu(x @ w["hidden"] + w["hidden_bias"]) @ w["kernel"] + w["bias"]


class World:
  """All roles of a plan whose client shares its image."""

  def __init__(self):
    ranges = mpc.calibrate(fn, OWNERS, [(W, x) for x in IMAGES])
    self.plan = mpc.plan(fn, OWNERS, (W, IMAGES[0]), CONFIG, ranges)
    self.model_owner = mpc.ModelOwner(self.plan, W)
    self.dealer = mpc.Dealer(self.plan, self.model_owner.tag)
    self.publication = self.model_owner.publish(self.dealer.blind())
    self.helper = helping.Helper(self.plan, self.publication)
    self.online = [apart.online(self.plan, party) for party in (MODEL_OWNER, DATA_OWNER)]
    self.card = sharing.Card(**json.loads(json.dumps(helping.card(self.plan))))

  def answer(self, both):
    """Both servers' answers to a client's two payloads, in this process."""
    first, second = self.dealer.deal()
    given = [helping.parsed(self.plan, payload) for payload in both]
    helped = self.helper.assist(self.helper.prepare(second), given[1])
    prepared = self.model_owner.prepare(first)
    question = mpc.messages.Question(prepared.inference, {})
    answered = self.model_owner.answer(prepared, question, given[0])
    shares = apart.simulate(self.online[0].start(answered), self.online[1].start(helped))
    return [helping.packed([v[i] for v in shares]) for i in (0, 1)]

  def ask(self, image):
    return sharing.revealed(self.card, self.answer(sharing.shares(self.card, [image])))[0]


@pytest.fixture(scope="module")
def world():
  return World()


def test_answers_have_the_integer_models_bits(world):
  for image in IMAGES[:3]:
    np.testing.assert_array_equal(world.ask(image), mpc.check(world.plan, (W, image)))


def test_each_server_alone_sees_uniform_numbers(world):
  counts = np.zeros((2, 16), int)
  for _ in range(2000):
    for i, share in enumerate(sharing.shares(world.card, [IMAGES[0]])):
      v = np.frombuffer(share, np.uint8)
      counts[i] += np.bincount(np.concatenate([v & 15, v >> 4]), minlength=16)
  expected = counts.sum(1, keepdims=True) / 16
  assert np.all(((counts - expected) ** 2 / expected).sum(1) < 60)  # 15 degrees: beyond 1e-6


def test_the_extraction_attack_fails(world):
  """A client can shift its image and nothing else, and a shift beyond its range wraps around."""
  unit = world.card.images[0]["unit"]

  def ask(x, shifts):
    """What a hostile client has in its hand: any shares of any ring elements."""
    both = sharing.shares(world.card, [x])
    words = np.rint(shifts / unit).astype(np.int64).astype(np.uint32)
    falsified = np.frombuffer(both[1], np.uint32) + np.resize(words, D)
    answers = world.answer((both[0], falsified.tobytes()))
    return sharing.revealed(world.card, answers)[0]

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
  with pytest.raises(ValueError, match="an image of shape"):
    sharing.shares(world.card, [IMAGES])
  with pytest.raises(ValueError, match="the plan takes shares"):
    world.model_owner.answer(*_prepared(world))


def _prepared(world):
  prepared = world.model_owner.prepare(world.dealer.deal()[0])
  return prepared, mpc.messages.Question(prepared.inference, {})


# ---- over TLS


CLIENT = """
import json, pathlib, sys
for name in ("jax", "jaxlib", "flax", "cryptography", "scipy"):
  sys.modules[name] = None  # cannot be imported
import numpy as np
from primia_jax.service import sharing
root = pathlib.Path(sys.argv[1])
servers = [
  sharing.Server(address, (root / f"{name}.pem").read_bytes(), name)
  for address, name in zip(sys.argv[2:], ("model-owner", "helper"))
]
own = [(root / "clinic" / name).read_bytes() for name in ("key.pem", "certificate.pem")]
for image in np.load(root / "images.npy"):
  (found,) = sharing.ask(sharing.read_card(root / "card.json"), [image], servers, *own)
  print(json.dumps(found.tolist()))
"""


@pytest.fixture(scope="module")
def network(world, tmp_path_factory):
  """Both servers on loopback: their root folder and addresses, and who ended how."""
  root, ended = tmp_path_factory.mktemp("network"), []
  for name in ("model-owner", "helper", "clinic", "stranger"):
    folders.make(root / name)
    shutil.copy(certificates.create(root / name, name), root / f"{name}.pem")
  for name in ("model-owner", "helper"):
    (root / name / servers.CLINICS).mkdir()
    shutil.copy(root / "clinic.pem", root / name / servers.CLINICS / "clinic.pem")
  shutil.copy(root / "helper.pem", root / "model-owner" / "helper.pem")
  folders.deal(world.dealer, 4, root / "model-owner" / servers.HELPER, root / "helper")
  (root / "card.json").write_text(json.dumps(helping.card(world.plan)))
  name, note = world.publication.publication, lambda who, error: ended.append((who, error))
  limits = Limits(timeout=20)
  with (
    servers.serve(
      root / "model-owner", world.model_owner, name,
      online=world.online[0], limits=limits, ended=note,
    ) as one,
    servers.help(
      root / "helper", world.helper, name,
      (f"127.0.0.1:{one}", (root / "model-owner.pem").read_bytes()),
      online=world.online[1], limits=limits, ended=note,
    ) as two,
  ):  # fmt: skip
    yield root, (f"127.0.0.1:{one}", f"127.0.0.1:{two}"), ended


def servers_of(network):
  root, addresses, _ = network
  names = ("model-owner", "helper")
  return tuple(
    sharing.Server(address, (root / f"{name}.pem").read_bytes(), name)
    for address, name in zip(addresses, names, strict=True)
  )


def identity(network, name):
  return [(network[0] / name / part).read_bytes() for part in ("key.pem", "certificate.pem")]


def test_a_client_without_jax_asks_over_tls(world, network):
  root, addresses, _ = network
  np.save(root / "images.npy", IMAGES[:2])
  (root / "client.py").write_text(CLIENT)
  done = subprocess.run(
    [sys.executable, str(root / "client.py"), str(root), *addresses],
    capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": ""},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  for line, image in zip(done.stdout.splitlines(), IMAGES[:2], strict=True):
    np.testing.assert_array_equal(json.loads(line), mpc.check(world.plan, (W, image)))


def test_a_stranger_gets_nothing(world, network):
  with pytest.raises(SessionEnded):
    sharing.ask(
      world.card, [IMAGES[0]], servers_of(network), *identity(network, "stranger"), timeout=20
    )


def test_another_plan_is_refused(world, network):
  other = world.card._replace(plan="0" * 64)
  with pytest.raises(Refused, match="card is of another plan"):
    sharing.ask(other, [IMAGES[0]], servers_of(network), *identity(network, "clinic"))


def test_shares_of_another_length_are_refused(world, network):
  both = tuple(v[4:] for v in sharing.shares(world.card, [IMAGES[0]]))
  with pytest.raises(Refused, match="REQUEST names"):
    sharing.exchange(world.card, both, servers_of(network), *identity(network, "clinic"))


def test_a_request_that_came_to_one_server_only_is_refused():
  desk = servers.Desk(0.1)
  with pytest.raises(PeerLate, match="helper did not ask"):
    desk.submit(b"1", {})
  with pytest.raises(Refused, match="no client has sent"), desk.taken(b"1"):
    pass


def test_a_request_waits_for_the_helper_and_ends_with_its_session():
  import threading

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
  assert isinstance(found[1], SessionEnded)
