"""A server of several publications: answers, budgets, its log, its numbers, and how it stops."""

import contextlib
import io
import json
import shutil
import threading
import time
import urllib.request

import numpy as np
import pytest
import service_institution as institution
from service_institution import CLINIC, MODEL, deal, deliver, made, place, wanted

from primia_jax.mpc import multiprocess
from primia_jax.mpc.roles import DataOwner
from primia_jax.mpc.sharing import DATA_OWNER, MODEL_OWNER
from primia_jax.service import (
  certificates,
  channel,
  folders,
  inbox,
  institutions,
  journal,
  monitoring,
  publications,
)
from primia_jax.service.channel import Limits
from primia_jax.service.errors import PutBack, Refused, SessionEnded, UsedUp
from primia_jax.service.institutions import Served
from primia_jax.service.journal import Contract, Journal
from primia_jax.service.monitoring import grpc, health_pb2, health_pb2_grpc

LIMITS = Limits(timeout=20.0)


class World:
  """Two publications of one plan, with inferences dealt for each, and both programs compiled."""

  def __init__(self, root, client="trusted"):
    self.plan = institution.planned(client)
    self.roles = made(root, self.plan)
    about, plan, weights = publications.copy_of(self.roles.vendor, MODEL)
    publications.begin(self.roles.vendor, "chest-2", about, plan, [-w for w in weights])
    deal(self.roles, 24)
    institution.send(
      self.roles.vendor, "dealer", self.roles.dealer, inbox.MODEL_OWNER, inbox.DEALER
    )
    deal(self.roles, 2, model="chest-2")
    deliver(self.roles)
    parties = MODEL_OWNER, DATA_OWNER
    self.online = tuple(multiprocess.online(self.plan, party) for party in parties)
    self.models = [self.served(name) for name in (MODEL, "chest-2")]

  def served(self, name):
    kept = publications.kept(self.roles.vendor, name)
    folder = place(self.roles.vendor, name)
    return Served(name, folder, kept.owner, kept.publication, self.online[0], kept.about.images)

  @contextlib.contextmanager
  def serving(self, echo=None, stopping=None, vendor=None, models=None, **options):
    vendor = vendor or self.roles.vendor
    contract = {k: options.pop(k) for k in Contract._fields if k in options}
    audit = Journal(vendor, Contract(**contract), echo)
    try:
      with institutions.serve_models(
        vendor, models or self.models, audit, limits=LIMITS, stopping=stopping, **options
      ) as port:
        yield f"127.0.0.1:{port}", audit
    finally:
      audit.close()

  @contextlib.contextmanager
  def asking(self, address, name=MODEL):
    received = publications.received(self.roles.clinic, name)
    owner = DataOwner(received.plan, received.publication)
    with institutions.ask(
      self.roles.clinic, owner, received.publication.publication, address, received.server,
      self.online[1], LIMITS, place(self.roles.clinic, name),
    ) as session:  # fmt: skip
      yield session

  def ask(self, address, count=1):
    """The answers about one image, in one session."""
    with self.asking(address) as session:
      return [session.ask(institution.image()) for _ in range(count)]

  def stocks(self):
    return [(CLINIC, one.name, one.folder / CLINIC) for one in self.models]

  def lines(self):
    return [json.loads(line) for line in (self.roles.vendor / journal.AUDIT).open()]


@pytest.fixture(scope="module")
def module_world(tmp_path_factory):
  return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(module_world):
  """With no queries yet."""
  (module_world.roles.vendor / journal.AUDIT).unlink(missing_ok=True)
  return module_world


def test_two_publications_side_by_side_have_the_bits_of_one_process(world):
  with world.serving() as (address, _):
    with world.asking(address) as session:
      for seed in (2, 3):
        np.testing.assert_array_equal(
          session.ask(institution.image(seed)), wanted(world.plan, seed)
        )
    with world.asking(address, "chest-2") as session:
      other = session.ask(institution.image())
  assert not np.array_equal(other, wanted(world.plan))
  events = [(line["event"], line.get("model")) for line in world.lines()]
  of = lambda name, times: [("session", name), *[("query", name), ("answer", name)] * times]
  assert events == [*of(MODEL, 2), ("end", MODEL), *of("chest-2", 1), ("end", "chest-2")]


@pytest.mark.slow
def test_clinics_that_are_checked_are_served_from_the_same_folders(tmp_path):
  world = World(tmp_path, "checked")
  with world.serving() as (address, _), world.asking(address) as session:
    np.testing.assert_array_equal(session.ask(institution.image()), wanted(world.plan))


def test_a_used_up_budget_is_named_at_the_clinic_and_nothing_is_computed(world, monkeypatch):
  prepared, prepare = [], publications.ModelOwner.prepare
  monkeypatch.setattr(
    publications.ModelOwner, "prepare",
    lambda self, correlations: prepared.append(0) or prepare(self, correlations),
  )  # fmt: skip
  left = len(folders.unused(place(world.roles.vendor) / CLINIC))
  for _ in range(2):  # and after a restart
    with (
      world.serving(daily=1) as (address, audit),
      pytest.raises(Refused, match="budget of hospital-a is 1 images a day, and 1 are used"),
    ):
      world.ask(address, 2)
    assert audit.left(CLINIC) == 0
  assert len(prepared) == 1
  assert len(folders.unused(place(world.roles.vendor) / CLINIC)) == left - 1
  refusal = world.lines()[-1]
  assert (refusal["event"], refusal["error"], refusal["clinic"]) == ("refusal", "Refused", CLINIC)


def left(world):
  """The unused correlations of both sides."""
  sides = place(world.roles.vendor) / CLINIC, place(world.roles.clinic)
  return [set(folders.unused(side)) for side in sides]


def stopped():
  event = threading.Event()
  event.set()
  return event


@pytest.mark.parametrize(
  ("reason", "options"),
  [
    ("is 0 images a day", {"daily": 0}),
    ("is 0 images in all", {"total": 0}),
    ("sessions open, as many as it may", {"sessions": 0}),
    ("was not checked", {"only_checked": True}),
    ("the server is stopping", {"stopping": stopped()}),
  ],
)
def test_a_refusal_costs_neither_side_correlations(world, reason, options):
  before = left(world)
  with world.serving(**options) as (address, audit):
    for _ in range(2):
      with pytest.raises(Refused, match=reason):
        world.ask(address)
    assert audit.left(CLINIC) == min(options.get("daily", 100), options.get("total", 100))
  assert left(world) == before


def test_a_rate_that_is_reached_costs_no_correlations(world):
  before = left(world)
  with world.serving(per_minute=1) as (address, _), pytest.raises(Refused, match="images a minute"):
    world.ask(address, 2)
  assert [len(old - new) for old, new in zip(before, left(world), strict=True)] == [1, 1]


def test_what_the_server_was_not_dealt_costs_no_query_and_serves_later(world):
  held = place(world.roles.vendor) / CLINIC / "correlations"
  before, away = left(world), held.with_name("away")
  held.rename(away)
  with world.serving() as (address, audit):
    with pytest.raises(Refused, match="nothing was dealt"):
      world.ask(address)
    away.rename(held)
    assert (left(world), audit.left(CLINIC)) == (before, 100)
    (got,) = world.ask(address)
  np.testing.assert_array_equal(got, wanted(world.plan))


def test_what_the_server_has_used_before_is_given_up(world, monkeypatch):
  """So that it does not stand in the way of the others."""
  before = left(world)
  lost = folders.take(place(world.roles.vendor) / CLINIC, min(before[1])).inference
  monkeypatch.setattr(institutions.secrets, "choice", min)
  with world.serving() as (address, audit):
    with pytest.raises(UsedUp, match="were used"):
      world.ask(address)
    assert audit.left(CLINIC) == 100
  assert left(world) == [old - {lost} for old in before]


def test_another_plan_or_certificate_costs_no_correlations(world, tmp_path):
  received = publications.received(world.roles.clinic, MODEL)
  owner, name = DataOwner(received.plan, received.publication), received.publication.publication
  stranger, before = folders.make(tmp_path / "stranger"), left(world)
  certificates.create(stranger, CLINIC)
  other = world.online[1]._replace(sizes=world.online[1].sizes[1:])
  number = name[:-32] + 32 * "0"
  with world.serving() as (address, audit):
    for reason, folder, publication, online in (
      ("turned this side's away", stranger, name, world.online[1]),
      ("another dealing", world.roles.clinic, number, world.online[1]),
      ("sizes differ", world.roles.clinic, name, other),
    ):
      with (
        pytest.raises(Refused, match=reason),
        institutions.ask(
          folder, owner, publication, address, received.server, online, LIMITS,
          place(world.roles.clinic),
        ) as session,
      ):  # fmt: skip
        session.ask(institution.image())
    assert audit.left(CLINIC) == 100
  assert left(world) == before


def test_an_image_that_does_not_fit_costs_no_correlations(world):
  before = left(world)
  with (
    world.serving() as (address, _),
    world.asking(address) as session,
    pytest.raises(ValueError, match="shapes"),
  ):
    session.ask(institution.image()[:, :3])
  assert left(world) == before


def test_further_sessions_of_a_clinic_are_refused_by_name(world):
  with world.serving(sessions=1) as (address, _), world.asking(address) as session:
    session.prepare()
    with pytest.raises(Refused, match="has 1 sessions open"):
      world.ask(address)
    np.testing.assert_array_equal(session.ask(institution.image()), wanted(world.plan))


def test_sessions_count_before_they_say_anything(world):
  """One clinic that opens many and is silent takes no more than its part."""
  identity, server = certificates.load(world.roles.clinic), world.roles.vendor / "certificate.pem"
  with (
    world.serving(sessions=1) as (address, audit),
    channel.connect(address, identity, server.read_bytes(), LIMITS),
  ):
    end = time.monotonic() + 20
    while not audit.sessions and time.monotonic() < end:
      time.sleep(0.02)
    with pytest.raises(Refused, match="has 1 sessions open"):
      world.ask(address)


def test_dealings_that_nobody_checked_can_be_refused(world):
  with (
    world.serving(only_checked=True) as (address, _),
    pytest.raises(Refused, match="was not checked"),
  ):
    world.ask(address)


def test_an_answer_that_is_being_computed_is_finished_and_the_next_is_refused(world, monkeypatch):
  """The stop comes after the question."""
  stopping, answer = threading.Event(), publications.ModelOwner.answer

  def then_stop(self, prepared, question):
    stopping.set()
    time.sleep(0.5)
    return answer(self, prepared, question)

  monkeypatch.setattr(publications.ModelOwner, "answer", then_stop)
  with world.serving(stopping=stopping) as (address, audit):
    with contextlib.suppress(SessionEnded), world.asking(address) as session:
      got = session.ask(institution.image())
      with pytest.raises(Refused, match="stopping"):
        session.prepare()
    np.testing.assert_array_equal(got, wanted(world.plan))
    with pytest.raises(Refused, match="stopping"):
      world.ask(address)
    end = time.monotonic() + 20
    while audit.sessions and time.monotonic() < end:
      time.sleep(0.02)
    assert audit.sessions == 0
  assert [line["event"] for line in world.lines()].count("answer") == 1


def test_a_server_that_was_put_back_destroys_all_and_says_so(world, tmp_path):
  """With what lies in its inbox; and the clinic keeps what it proposed as used."""
  put_back = shutil.copytree(world.roles.vendor, tmp_path / "put_back")
  models = [one._replace(folder=put_back / "models" / one.name) for one in world.models]
  with world.serving() as (address, _):
    world.ask(address)
  before = left(world)
  late = put_back / "inbox" / "dealer" / "models" / "chest-2" / CLINIC / "correlations" / ("0" * 64)
  late.parent.mkdir(parents=True, exist_ok=True)
  late.write_bytes(b"x")
  with world.serving(vendor=put_back, models=models) as (address, audit):
    with pytest.raises(PutBack, match="put back to an earlier state"):
      world.ask(address)
    assert audit.left(CLINIC) == 100
  assert not [*put_back.rglob("correlations/*")]
  lines = map(json.loads, (put_back / journal.AUDIT).open())
  assert any("inferences are destroyed" in line.get("reason", "") for line in lines)
  assert [len(old - new) for old, new in zip(before, left(world), strict=True)] == [0, 1]


def secrets_of(world, image):
  """Bytes that must be in no log, each also in hexadecimal and Base64's alphabet's own text."""
  vendor, clinic = world.roles.vendor, world.roles.clinic
  found = [(vendor / certificates.KEY).read_bytes(), (clinic / certificates.KEY).read_bytes()]
  found = [line for pem in found for line in pem.splitlines() if b"-----" not in line]
  for name in (MODEL, "chest-2"):
    found += [(place(vendor, name) / folders.SECRET).read_bytes()]
    found += [np.asarray(w).tobytes()[:64] for w in institution.WEIGHTS]
    kept = publications.kept(vendor, name)
    found += [np.asarray(v).tobytes()[:32] for v in kept.published.arrays.values()]
  numbers = [*np.asarray(institution.WEIGHTS[0]).ravel()[:20], *np.asarray(image).ravel()]
  texts = [str(float(v))[:7].encode() for v in numbers if abs(v) > 1e-3]
  outputs = [str(float(v))[:7].encode() for v in np.ravel(wanted(world.plan))]
  raw = [*found, np.asarray(image).tobytes()]
  return [*raw, *(v.hex().encode() for v in raw), *texts, *outputs]


def test_no_log_has_a_key_a_weight_a_pixel_or_an_output(world):
  echo, image = io.StringIO(), institution.image()
  with world.serving(echo, daily=2) as (address, audit):
    world.ask(address)
    with pytest.raises(SessionEnded):
      world.ask(address, 2)
    with monitoring.metrics(0, audit, [CLINIC], world.stocks()) as port:
      shown = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read()
  logs = (world.roles.vendor / journal.AUDIT).read_bytes(), echo.getvalue().encode(), shown
  for secret in secrets_of(world, image):
    assert len(secret) >= 4
    assert not any(secret in log for log in logs), secret
  assert all(b"hospital-a" in log for log in logs)


def test_the_search_finds_a_secret_that_is_logged(world):
  """The control."""
  weight = float(np.asarray(institution.WEIGHTS[0]).ravel()[0])
  with world.serving() as (_, audit):
    audit.note("refusal", reason=f"a weight is {weight}")
  log = (world.roles.vendor / journal.AUDIT).read_bytes()
  assert any(secret in log for secret in secrets_of(world, institution.image()))


def test_numbers_on_loopback(world):
  with (
    world.serving(daily=5) as (address, audit),
    monitoring.metrics(0, audit, [CLINIC], world.stocks()) as port,
  ):
    left = len(folders.unused(place(world.roles.vendor) / CLINIC))
    world.ask(address)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
  numbers = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
  event = f'primia_events_total{{clinic="{CLINIC}",event="answer",model="{MODEL}"}}'
  assert float(numbers[event]) == 1
  assert float(numbers[f'primia_budget_images{{clinic="{CLINIC}"}}']) == 4
  unused = f'primia_correlations{{clinic="{CLINIC}",model="{MODEL}"}}'
  assert float(numbers[unused]) == left - 1
  assert float(numbers[f'primia_answer_seconds_count{{model="{MODEL}"}}']) == 1
  assert float(numbers[f'primia_sent_bytes_total{{model="{MODEL}"}}']) > sum(world.online[0].sizes)


def test_health_by_grpc():
  status = health_pb2.HealthCheckResponse
  with monitoring.healthy(0) as (port, stop), grpc.insecure_channel(f"127.0.0.1:{port}") as line:
    stub = health_pb2_grpc.HealthStub(line)
    ask = lambda: stub.Check(health_pb2.HealthCheckRequest(), timeout=10).status
    assert ask() == status.SERVING
    stop()
    assert ask() == status.NOT_SERVING
