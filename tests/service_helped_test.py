"""Two servers and a client that shares its image, over TLS: budgets, logs, and what is refused."""

import contextlib
import io
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import service_institution as institution
import service_sharing_test as of_sharing
from service_helped_world import CLINIC, HELPER, World, identity
from service_institution import MODEL, WEIGHTS, every_file, place

from primia_jax import mpc
from primia_jax.service import (
  cards,
  certificates,
  channel,
  folders,
  helped,
  journal,
  publications,
  sharing,
)
from primia_jax.service.channel import Limits
from primia_jax.service.errors import Refused, SessionEnded
from primia_jax.service.journal import Contract, Journal

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return World(tmp_path_factory.mktemp("world"), 64)


@pytest.fixture
def world(made):
  """With no queries yet."""
  for folder in (made.vendor, made.helper):
    (folder / journal.AUDIT).unlink(missing_ok=True)
  return made


def ask(world, issued, image=None, folder=None, **options):
  image = institution.image() if image is None else image
  who = identity(folder or world.clinic)
  (found,) = sharing.ask(issued.card, [image], issued.servers, *who, **{"timeout": 20} | options)
  return found


CLIENT = """
import json, pathlib, sys
for name in ("jax", "jaxlib", "flax", "cryptography", "scipy"):
  sys.modules[name] = None  # cannot be imported
import numpy as np
from primia_jax.service import cards, sharing
root, card = map(pathlib.Path, sys.argv[1:])
issued = cards.read(card)
own = [(root / name).read_bytes() for name in ("key.pem", "certificate.pem")]
with sharing.connected(issued.servers, *own) as exchange:
  for image in np.load(root / "images.npy"):
    both = exchange(issued.card, sharing.shares(issued.card, [image]), lambda: print("told"))
    print(json.dumps(sharing.revealed(issued.card, both)[0].tolist()))
"""


def test_a_client_without_jax_has_the_bits_of_one_process(world):
  images = np.stack([institution.image(seed) for seed in (2, 3)])
  np.save(world.clinic / "images.npy", images)
  before = world.left()
  with world.serving():
    done = subprocess.run(
      [sys.executable, "-c", CLIENT, world.clinic, world.vendor / "outbox/cards/chest-1.json"],
      capture_output=True, text=True, timeout=120, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
  assert done.returncode == 0, done.stderr
  first, one, second, two = done.stdout.splitlines()
  assert first == second == "told"
  for line, image in zip((one, two), images, strict=True):
    np.testing.assert_array_equal(json.loads(line), mpc.check(world.plan, (WEIGHTS, image)))
  assert world.left() == (before[0] - 2, before[1] - 2)
  of_owner, of_helper = world.lines()
  kinds = [line["event"] for line in of_helper]
  assert kinds == ["session", "query", "inference", "answer"] * 2
  queries = [[line["inference"] for line in of if line["event"] == "query"]
             for of in (of_owner, of_helper)]  # fmt: skip
  used = [[line["inference"] for line in of if line["event"] == "inference"]
          for of in (of_owner, of_helper)]  # fmt: skip
  assert queries[0] == queries[1]
  assert used[0] == used[1]


def test_the_card_is_public_and_a_changed_one_is_refused(world, tmp_path):
  with world.serving() as issued:
    text = (world.vendor / "outbox/cards/chest-1.json").read_text()
  assert issued.about == institution.ABOUT
  for folder in (world.vendor, world.helper):
    secret = (folder / certificates.KEY).read_text().splitlines()[1]
    assert secret not in text
  weights = [str(float(v))[:8] for v in np.ravel(WEIGHTS[0])]
  assert not any(weight in text for weight in weights)
  found, path = json.loads(text), tmp_path / "card.json"

  def refused(match, **change):
    path.write_text(json.dumps(found | change))
    with pytest.raises(ValueError, match=match):
      cards.read(path)

  first, second = found["servers"]
  refused("names vendor-b for both servers", servers=[first, first | {"role": "helper"}])
  refused("not have the fingerprint", servers=[first | {"fingerprint": "0" * 64}, second])
  refused("is not HOST:PORT", servers=[first | {"address": "x"}, second])
  refused("of format 2", format=2)
  refused("takes other images", about=found["about"] | {"image_size": 8})
  refused("ValueError", servers=[first])
  refused("KeyError", about={})
  path.write_text("no card")
  with pytest.raises(ValueError, match="is not a card of a model"):
    cards.read(path)
  with pytest.raises(FileNotFoundError, match="ask the model owner for its card"):
    cards.read(tmp_path / "none.json")


@pytest.mark.parametrize("at", ["vendor", "helper"])
def test_a_used_up_budget_at_either_server_is_named_and_burns_nothing(world, at):
  limits = {"daily": 1} if at == "vendor" else {"at_helper": Contract(daily=1)}
  with world.serving(**limits) as issued:
    ask(world, issued)
    before = world.left()
    with pytest.raises(Refused, match=f"{at}.*budget of hospital-a is 1 images a day, and 1 are"):
      ask(world, issued)
  assert world.left() == before


def stopped():
  event = threading.Event()
  event.set()
  return event


def given_back(world, before):
  """The helper takes its mark back once it has told the client, so perhaps a moment later."""
  end = time.monotonic() + 20
  while world.left() != before and time.monotonic() < end:
    time.sleep(0.02)
  assert world.left() == before


@pytest.mark.parametrize(
  ("reason", "options"),
  [
    ("vendor.*server is stopping", {"stopping": (stopped(), None)}),
    ("helper.*server is stopping", {"stopping": (None, stopped())}),
    ("between helper and model owner.*was not checked", {"only_checked": True}),
    ("vendor.*is 0 images in all", {"total": 0}),
    ("helper.*is 0 images in all", {"at_helper": Contract(total=0)}),
    ("sessions open, as many as it may", {"at_helper": Contract(sessions=0)}),
  ],
)
def test_a_refusal_costs_neither_server_correlations(world, reason, options):
  before = world.left()
  with world.serving(limits=Limits(timeout=4.0), **options) as issued:
    for _ in range(2):
      with pytest.raises(Refused, match=reason):
        ask(world, issued)
    given_back(world, before)
  assert all(line["event"] != "inference" for of in world.lines() for line in of)


def test_what_the_model_owner_was_not_dealt_serves_later(world):
  held = place(world.vendor) / HELPER / folders.CORRELATIONS
  before, away = world.left(), held.with_name("away")
  with world.serving() as issued:
    held.rename(away)
    with pytest.raises(Refused, match="nothing was dealt"):
      ask(world, issued)
    away.rename(held)
    given_back(world, before)
    found = ask(world, issued)
  np.testing.assert_array_equal(found, institution.wanted(world.plan))
  assert world.left() == (before[0] - 1, before[1] - 1)


def test_what_the_model_owner_has_used_before_is_given_up(world, monkeypatch):
  """So that it does not stand in the way of the others."""
  lost = folders.take(place(world.vendor) / HELPER, folders.unused(place(world.helper))[0])
  before = world.left()
  monkeypatch.setattr(helped.secrets, "choice", min)
  with world.serving() as issued:
    with pytest.raises(Refused, match=f"{lost.inference} were used"):
      ask(world, issued)
    assert world.left() == (before[0], before[1] - 1)
    ask(world, issued)
  assert world.left() == (before[0] - 1, before[1] - 2)


def test_a_card_of_another_publication_is_refused_before_anything_is_counted(world):
  with world.serving() as issued:
    other = issued._replace(card=issued.card._replace(publication="0" * 64))
    with pytest.raises(Refused, match="card is of another publication"):
      ask(world, other)
  assert all(line["event"] != "query" for of in world.lines() for line in of)


def test_strangers_expired_and_other_institutions_get_nothing(world, tmp_path):
  expired = folders.make(tmp_path / "expired")
  certificates.create(expired, CLINIC, days=-1)
  before = world.left()
  with world.serving() as issued:
    for folder in (world.stranger, expired):
      with pytest.raises(Refused, match=r"turned this side's away|not known"):
        ask(world, issued, folder=folder)
    first, second = issued.servers
    swapped = issued._replace(servers=(first, second._replace(certificate=first.certificate)))
    with pytest.raises(Refused, match="another certificate than the card says"):
      ask(world, swapped)
  assert world.left() == before


def test_silent_clinics_leave_the_helper_its_room(world):
  """Of all models together, clinics take so many streams; the helper's are besides."""
  limits = Limits(timeout=20.0, sessions=1)

  def tried(wanted):
    """Asks until it ends as wanted, since a stream begins and ends a moment later."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
      try:
        found = ask(world, issued)
      except SessionEnded as error:
        found = error
      if isinstance(found, wanted):
        return found
    raise AssertionError(found)

  with world.serving(limits=limits) as issued:
    owner = issued.servers[0]
    with channel.connect(owner.address, certificates.load(world.clinic), owner.certificate, limits):
      assert "vendor-b: Refused: 1 requests are at work" in str(tried(Refused))
    tried(np.ndarray)


def test_shares_of_another_length_are_refused(world):
  with world.serving() as issued:
    both = [v[4:] for v in sharing.shares(issued.card, [institution.image()])]
    with (
      pytest.raises(Refused, match="REQUEST names"),
      sharing.connected(issued.servers, *identity(world.clinic), 20) as exchange,
    ):
      exchange(issued.card, both)


def test_a_server_that_is_not_there_is_named(world):
  before = world.left()
  with world.serving() as issued:
    for number, name in ((0, "vendor-b"), (1, HELPER)):
      gone = [*issued.servers]
      gone[number] = gone[number]._replace(address="127.0.0.1:1")
      with pytest.raises(SessionEnded, match=f"{name}: nobody listens at 127.0.0.1:1"):
        ask(world, issued._replace(servers=tuple(gone)))
  assert world.left() == before


def test_a_helper_without_correlations_says_so(world, monkeypatch):
  monkeypatch.setattr(folders, "unused", lambda folder: [])
  with world.serving() as issued, pytest.raises(Refused, match="have the dealer deal more"):
    ask(world, issued)


def secrets_of(world, both, answers):
  """Bytes that must be in no log, and texts of numbers."""
  numbers = (*np.ravel(institution.image()), *np.ravel(institution.wanted(world.plan)))
  words = [secret[:8].hex() for secret in (*both, *answers)]
  return [v.encode() for v in (*words, *(str(float(v))[:7] for v in numbers))]


def test_no_log_has_a_share_a_pixel_or_an_output(world):
  echo = io.StringIO()
  with world.serving(echo) as issued:
    both = sharing.shares(issued.card, [institution.image()])
    with sharing.connected(issued.servers, *identity(world.clinic)) as exchange:
      answers = exchange(issued.card, both)
  logs = [echo.getvalue().encode()]
  logs += [(folder / journal.AUDIT).read_bytes() for folder in (world.vendor, world.helper)]
  secrets = secrets_of(world, both, answers)
  assert all(CLINIC.encode() in log for log in logs)
  assert not [secret for secret in secrets for log in logs if secret in log]
  # the control: each of them is found where it is logged
  with contextlib.closing(Journal(world.helper)) as log:
    for secret in secrets:
      log.note("refusal", reason=f"it is {secret.decode()}")
  written = (world.helper / journal.AUDIT).read_bytes()
  assert all(secret in written for secret in secrets)


def test_a_helper_that_is_somebody_else_is_refused(world, tmp_path):
  for folder, what in ((world.vendor, "the model owner"), (world.clinic, "a clinic")):
    with pytest.raises(ValueError, match=f"name or certificate of {what}"):
      publications.check_helper(world.vendor, identity(folder)[1])
  same = shutil.copytree(world.helper, tmp_path / "same")
  for name in (certificates.KEY, certificates.CERTIFICATE):
    shutil.copy(world.vendor / name, same / name)
  with pytest.raises(ValueError, match="must be another institution"):
    helped.helped(same, MODEL)


def test_the_helper_holds_no_weight_and_the_model_owner_no_masked_weights_of_it(world):
  held = every_file(world.helper)
  assert not {name for name in held if name.endswith(("weights.npz", "secret", "blind", "tag"))}
  assert f"models/{MODEL}/publication" in held


def test_images_beyond_their_range_tell_no_weights_end_to_end(world):
  """Over TLS, with all that a hostile client has in its hand. `service_sharing_test` has the
  control: without the clamp these answers tell which sums of weights are even.
  """
  few = np.random.default_rng(0).integers(0, 2, (8, 16))
  subsets = np.concatenate([np.eye(16, dtype=int), few])
  hidden = next(iter(world.served.owner._own.values())).elements
  assert sum(of_sharing.even(subsets, hidden)) < len(subsets) / 4
  with (
    world.serving(daily=1000, at_helper=Contract(daily=1000)) as issued,
    sharing.connected(issued.servers, *identity(world.clinic)) as exchange,
  ):
    card, image = issued.card, institution.image()

    def answer(shifts):
      return sharing.revealed(card, exchange(card, of_sharing.shifted(card, image, shifts)))[0]

    found = of_sharing.unmoved(answer, of_sharing.gate_of(world.plan), subsets)
  assert all(found)
