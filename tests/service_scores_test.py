"""A score between two institutions: the counts of one process, opened once, refused beforehand."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest
import service_institution as institution
from mpc_reference import normal
from service_institution import CLINIC, MODEL, WEIGHTS, deal, deliver, made, place

from primia_jax import mpc
from primia_jax.mpc import apart, clear, scoring
from primia_jax.mpc.roles import DataOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import folders, institutions, journal, publications
from primia_jax.service.channel import Limits
from primia_jax.service.errors import Malformed, PeerLost, Refused
from primia_jax.service.institutions import Served
from primia_jax.service.journal import Contract, Journal

BATCH, COUNT = 8, 21
ABOUT = dataclasses.replace(institution.ABOUT, images=BATCH, output="confusion", opened_to="both")
IMAGES = np.asarray(normal(7, COUNT, 4, 4, 1))
LABELS = np.arange(COUNT) % 3


def logits(weights, images):
  return jax.nn.relu(images.reshape(images.shape[0], -1) @ weights[0]) @ weights[1]


def parts(images=IMAGES, labels=LABELS):
  for start in range(0, len(images), BATCH):
    part, rows = images[start : start + BATCH], np.zeros((BATCH, 3), np.float32)
    rows[np.arange(len(part)), labels[start : start + BATCH]] = 1
    filled = np.concatenate([part, np.zeros((BATCH - len(part), 4, 4, 1), np.float32)])
    yield filled.astype(np.float32), rows


class World:
  """Vendor and hospital with a score's publication, and both programs compiled."""

  def __init__(self, root):
    self.plan = scoring.plan(
      scoring.confusion(logits), WEIGHTS, IMAGES, 3, BATCH, mpc.Config(32, 10, 14, margin=4.0)
    )
    self.roles = made(root, self.plan, about=ABOUT)
    deal(self.roles, 18)
    deliver(self.roles)
    each = (apart.online(self.plan, party, opens=False) for party in (MODEL_OWNER, DATA_OWNER))
    self.online = tuple(each)
    self.learnt = []
    self.received = publications.received(self.roles.clinic, MODEL, is_score=True)
    self.kept = publications.kept(self.roles.vendor, MODEL)

  def left(self):
    sides = place(self.roles.vendor) / CLINIC, place(self.roles.clinic)
    return [len(folders.unused(side)) for side in sides]

  @contextlib.contextmanager
  def session(self, opened_to="hospital", **contract):
    """A session of the hospital, and the vendor's journal."""
    audit = Journal(self.roles.vendor, Contract(**contract))
    kept, received = self.kept, self.received
    model = Served(
      MODEL, place(self.roles.vendor), kept.owner, kept.publication, self.online[0], BATCH,
      opened_to, lambda clinic, counts: self.learnt.append((clinic, counts)),
    )  # fmt: skip
    owner, limits = DataOwner(received.plan, received.publication), Limits(timeout=20.0)
    try:
      with (
        institutions.serve_models(self.roles.vendor, [model], audit, limits=limits) as port,
        institutions.ask(
          self.roles.clinic, owner, received.publication.publication, f"127.0.0.1:{port}",
          received.server, self.online[1], limits, place(self.roles.clinic),
        ) as session,
      ):  # fmt: skip
        yield session, audit
    finally:
      audit.close()


@pytest.fixture(scope="module")
def module_world(tmp_path_factory):
  return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(module_world):
  """With no queries yet."""
  (module_world.roles.vendor / journal.AUDIT).unlink(missing_ok=True)
  module_world.learnt.clear()
  return module_world


def wanted(world):
  """The integer model's counts, and those in the clear."""
  check = clear.checker(world.plan)
  integers = sum(np.asarray(check((WEIGHTS, *part)), np.float64) for part in parts())
  found = np.zeros((3, 3))
  np.add.at(found, (LABELS, np.asarray(logits(WEIGHTS, IMAGES)).argmax(1)), 1)
  return integers, found


@pytest.mark.parametrize("opened_to", ["hospital", "vendor", "both"])
def test_the_counts_are_opened_to_whom_both_agreed(world, opened_to):
  integers, expected = wanted(world)
  np.testing.assert_array_equal(integers, expected)
  before = world.left()
  with world.session(opened_to) as (session, audit):
    found = session.score(parts(), COUNT, opened_to)
    assert audit.left(CLINIC) == 100 - 24  # three runs of eight
  assert world.left() == [n - 3 for n in before]
  assert (found is None) == (opened_to == "vendor")
  assert len(world.learnt) == int(opened_to != "hospital")
  for counts in [found] * (found is not None) + [counts for _, counts in world.learnt]:
    np.testing.assert_array_equal(counts, expected)
  lines = [json.loads(line) for line in (world.roles.vendor / journal.AUDIT).open()]
  assert [line["event"] for line in lines] == ["session", "query", "end"]
  assert lines[1]["images"] == 24


@pytest.mark.parametrize(
  ("reason", "count", "opened_to", "contract"),
  [
    ("opens the result to: hospital", COUNT, "both", {}),
    ("is 20 images a day", COUNT, "hospital", {"daily": 20}),
    ("10 to .* images, not 9", 9, "hospital", {}),
  ],
)
def test_what_is_refused_costs_neither_queries_nor_correlations(
  world, monkeypatch, reason, count, opened_to, contract
):
  before, check, given = world.left(), institutions.scores.check_count, []
  # the hospital's own check is passed over
  second = lambda *args: check(*args) if given else given.append(args)
  monkeypatch.setattr(institutions.scores, "check_count", second)
  with world.session(**contract) as (session, audit):
    with pytest.raises(Refused, match=reason):
      session.score(parts(), count, opened_to)
    assert audit.left(CLINIC) == min(contract.get("daily", 100), 10000)
  assert world.left() == before


def test_a_hospital_without_enough_correlations_asks_for_nothing(world):
  before = world.left()
  with world.session() as (session, audit):
    with pytest.raises(LookupError, match="20 are needed"):
      session.score(parts(), 160, "hospital")
    assert audit.left(CLINIC) == 100
  assert world.left() == before


def test_a_score_takes_only_what_both_sides_hold(world):
  """The two halves of a delivery need not have arrived together."""
  held = place(world.roles.vendor) / CLINIC / folders.CORRELATIONS
  numbers, before = folders.unused(held.parent), world.left()
  away = folders.make(held.with_name("away"))
  move = lambda names, a, b: [(a / n).rename(b / n) for n in names]
  move(numbers[:-2], held, away)
  entered = []
  try:
    with world.session() as (session, audit):
      with pytest.raises(Refused, match=r"need 3 inferences; of \d+ that .* 2 may be used here"):
        session.score(parts(), COUNT, "hospital", lambda: entered.append(0))
      assert audit.left(CLINIC) == 100
      assert entered == []
    assert world.left() == [2, before[1]]
    move(numbers[-3:-2], away, held)
    with world.session() as (session, _):
      assert session.score(parts(), COUNT, "hospital") is not None
    assert world.left() == [0, before[1] - 3]
  finally:
    for path in away.iterdir():
      path.rename(held / path.name)
    away.rmdir()


def test_an_inference_that_was_not_agreed_on_is_refused(world, monkeypatch):
  """The hospital offers three, and proposes others."""
  drawn = institutions.scores.sessions.drawn
  other = lambda reserved, *args: drawn(
    folders.Reserved(reserved.folder, folders.unused(reserved.folder)[0]), *args
  )
  monkeypatch.setattr(institutions.scores.sessions, "drawn", other)
  before = world.left()
  with world.session() as (session, _), pytest.raises(Refused, match="agreed on for this score"):
    session.score(parts(), COUNT, "hospital")
  assert world.left()[0] == before[0]


def test_a_session_that_breaks_opens_nothing(world, monkeypatch):
  """The hospital stops after one of three runs, and asks for the sum."""
  before = world.left()
  with world.session("both") as (session, audit):
    with pytest.raises((Malformed, PeerLost, Refused)):
      session.score(list(parts())[:1], COUNT, "both")
    assert audit.left(CLINIC) == 100 - 24  # three runs of eight
  assert world.learnt == []
  assert world.left() == [n - 1 for n in before]  # what was not reached serves another time


def test_a_program_that_asks_for_answers_is_refused(world):
  """So nobody gets the counts of one run out of a publication that opens a sum."""
  answers = apart.online(world.plan, DATA_OWNER)
  assert sum(answers.sizes) == sum(world.online[1].sizes) + 4 * 9
  before, online = world.left(), world.online
  world.online = online[0], answers
  try:
    with pytest.raises(Refused, match="sizes differ"), world.session():
      pass
    lying = answers._replace(sizes=online[0].sizes)  # as the vendor wants them
    world.online = online[0], lying
    with pytest.raises(Refused, match="PREPARE where SCORE"), world.session() as (session, _):
      session.prepare()
  finally:
    world.online = online
  assert world.left()[0] == before[0]
