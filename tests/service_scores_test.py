"""A score between two institutions: the counts of one process, opened once, refused beforehand."""

import contextlib
import dataclasses
import functools
import json
import threading

import jax
import numpy as np
import pytest
import service_faults_test as faults
import service_institution as institution
import service_transcripts_test as transcripts
from mpc_reference import normal
from service_institution import CLINIC, MODEL, WEIGHTS, deal, deliver, made, place
from service_world import KEY, Pipe

from primia_jax import mpc
from primia_jax.mpc import clear, multiprocess, scoring
from primia_jax.mpc.roles import DataOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import (
  folders,
  institutions,
  journal,
  publications,
  receipts,
  scores,
  sessions,
)
from primia_jax.service.channel import Limits
from primia_jax.service.errors import Malformed, PeerLost, Refused, SessionEnded
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
    self.dealer = deal(self.roles, 18)
    deliver(self.roles)
    parties = MODEL_OWNER, DATA_OWNER
    self.online = tuple(multiprocess.online(self.plan, party, opens=False) for party in parties)
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
  answers = multiprocess.online(world.plan, DATA_OWNER)
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


# ---- over a pipe: faults, and what crosses

FEW = 10  # images, in two runs
ABOUT_FEW = list(parts(IMAGES[:FEW], LABELS[:FEW]))


def scored(world, both, pipe):
  """One session of both sides: what hospital and vendor end with, errors or counts."""
  name, ends, chosen = world.received.publication.publication, [None, None], []

  def begin(count, runs, offered, shown):
    chosen[:] = offered[:runs]
    return chosen

  def serve():
    take, learn = receipts.taking(KEY, CLINIC, both[0] / CLINIC), lambda v: ends.__setitem__(0, v)
    of = world.kept.owner, world.online[0], name, "both", begin, take, learn
    if error := pipe.serve(functools.partial(scores.serve, *of)):
      ends[0] = error

  thread = threading.Thread(target=serve, daemon=True)
  thread.start()
  owner, error = DataOwner(world.received.plan, world.received.publication), None
  try:
    asking = sessions.Asking(
      owner, world.online[1], name,
      lambda message: pipe.send(1, message), lambda idle=False: pipe.receive(1, idle),
    )  # fmt: skip
    reserved = [folders.Reserved(both[1], number) for number in folders.unused(both[1])[:3]]
    ends[1] = scores.ask(asking, reserved, ABOUT_FEW, FEW, "both")
  except SessionEnded as e:
    ends[1] = error = e
  pipe.end(1, error)
  thread.join(60)
  assert not thread.is_alive()
  return ends


def dealt(world, root, sessions):
  """Folders of both sides for so many sessions, and one inference to choose from."""
  both = folders.make(root / "vendor"), folders.make(root / "hospital")
  folders.deal(world.dealer, 2 * sessions + 1, both[0] / CLINIC, both[1])
  return both


# column of the table -> who sends this message, and which of its messages it is
PLACES = {"SCORE": (1, 1), "ACCEPTED": (0, 1), "TOTAL_1": (1, -1), "TOTAL_0": (0, -1)}
FAULTS = [
  name for name in faults.FAULTS if name not in ("that of the inference before", "of another plan")
]


def outcome(world, both, name, place, before):
  """What the receiver of a message and its sender end with."""
  left = [set(folders.unused(folder)) for folder in (both[0] / CLINIC, both[1])]
  pipe = faults.Faulty(name, place, before)
  ends = scored(world, both, pipe)
  found = np.zeros((3, 3))
  np.add.at(found, (LABELS[:FEW], np.asarray(logits(WEIGHTS, IMAGES[:FEW])).argmax(1)), 1)
  words = []
  for end in ends:
    if end is not None and not isinstance(end, SessionEnded):
      np.testing.assert_array_equal(end, found)
    words.append(type(end).__name__ if isinstance(end, SessionEnded) else "right")
  taken = [
    old - set(folders.unused(folder))
    for old, folder in zip(left, (both[0] / CLINIC, both[1]), strict=True)
  ]
  assert taken[0] <= taken[1]
  assert len(taken[1] - taken[0]) <= 1  # what was at work; the others are released
  return words[1 - place[0]], words[place[0]]


def row(world, root, name):
  """By column: what the message's receiver and its sender end with."""
  pipe = Pipe()
  scored(world, dealt(world, root / "before", 1), pipe)
  both, found = dealt(world, root / "now", len(PLACES)), {}
  for column, (sender, number) in PLACES.items():
    place = sender, number % len(pipe.sent[sender])
    found[column] = {outcome(world, both, name, place, pipe.sent)}
  return found


def line(name, found):
  """A line of the table."""
  return f"| {name} | {' | '.join(faults.cell(found[column]) for column in PLACES)} |"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_a_message_of_a_score_ends_as_the_table_says(world, tmp_path, name):
  """No count is wrong, both sides end, and all but what was at work serves again."""
  assert line(name, row(world, tmp_path, name)) in faults.DOCS.read_text().splitlines()


@pytest.mark.parametrize("is_masked", [True, False])
def test_every_message_of_fresh_scores_of_the_same_images_is_uniform(
  world, tmp_path, monkeypatch, is_masked
):
  """Also the shares of the sum; and none is without masks."""
  if not is_masked:
    monkeypatch.setattr(sessions, "prepared_by", transcripts.unmasked(sessions.prepared_by))
  count = 32 if is_masked else 8
  both, pipes = dealt(world, tmp_path, count), [Pipe() for _ in range(count)]
  for pipe in pipes:
    scored(world, both, pipe)
  found = transcripts.gathered(pipes)
  assert len(found) == 2 * (2 * len(world.online[0].sizes) + 1) + 2  # a QUESTION, of labels, a run
  if is_masked:
    transcripts.check_uniform(found)
    return
  assert all(transcripts.positions(payloads) < transcripts.LEVEL for payloads in found.values())
