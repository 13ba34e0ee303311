"""Budgets of queries: counted on disk before anything is computed, across crashes and restarts."""

import contextlib
import errno
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from primia_jax.service import journal
from primia_jax.service.errors import Refused
from primia_jax.service.journal import Contract, Journal

ROOT = pathlib.Path(__file__).parents[1]
DAY = 86400.0


class Clock:
  def __init__(self, now=1e9):
    self.now = now

  def __call__(self):
    return self.now


def opened(folder, clock=None, **contract):
  return Journal(folder, Contract(**contract), now=clock or Clock())


def charge(one, count=1, clinic="a", images=1):
  for i in range(count):
    one.charge(clinic, "chest-1", f"{i:064x}", images)


@pytest.fixture
def clock():
  return Clock()


def test_a_budget_a_day_and_in_all_for_each_clinic_alone(tmp_path, clock):
  one = opened(tmp_path, clock, daily=3, total=5)
  charge(one, 3)
  with pytest.raises(Refused, match="budget of a is 3 images a day, and 3 are used"):
    charge(one)
  charge(one, 3, "b")
  clock.now += DAY
  assert one.left("a") == 2
  charge(one, 2)
  with pytest.raises(Refused, match="5 images in all"):
    charge(one)
  assert one.left("a") == 0


def test_images_of_a_run_count_each(tmp_path):
  one = opened(tmp_path, daily=10)
  charge(one, 2, images=4)
  with pytest.raises(Refused, match="8 are used"):
    charge(one, images=4)
  charge(one, images=2)


def test_a_rate_a_minute(tmp_path, clock):
  one = opened(tmp_path, clock, per_minute=2)
  charge(one, 2)
  clock.now += 59
  with pytest.raises(Refused, match="a minute"):
    charge(one)
  clock.now += 1
  charge(one, 2)


def test_a_budget_survives_a_restart_and_a_clock_that_is_set_back(tmp_path, clock):
  one = opened(tmp_path, clock, daily=3, total=10)
  charge(one, 3)
  one.close()
  for back in (0.0, -2 * DAY):
    clock.now += back
    again = opened(tmp_path, clock, daily=3, total=10)
    with pytest.raises(Refused, match="a day"):
      charge(again)
    again.close()
  clock.now += 3 * DAY
  again = opened(tmp_path, clock, daily=3, total=10)
  charge(again, 3)
  assert again.left("b") == 3


_CHARGING = """
import pathlib, sys
from primia_jax.service.journal import Contract, Journal
one = Journal(pathlib.Path(sys.argv[1]), Contract(10**6, 10**6))
for i in range(10**6):
  one.charge("a", "chest-1", f"{i:064x}", 1)
  print(i + 1, flush=True)
"""


def test_a_killed_server_has_counted_all_that_it_began(tmp_path):
  """What was charged before the process was killed is charged after it, too."""
  process = subprocess.Popen(
    [sys.executable, "-c", _CHARGING, str(tmp_path)], stdout=subprocess.PIPE, text=True,
    env=dict(os.environ, PYTHONPATH=str(ROOT)),
  )  # fmt: skip
  for _ in range(20):
    process.stdout.readline()
  process.kill()
  said = [20, *map(int, process.stdout.read().split())]
  process.wait()
  left = opened(tmp_path, daily=10**6, total=10**6).left("a")
  assert said[-1] <= 10**6 - left <= said[-1] + 1


def test_a_line_that_a_crash_cut_is_dropped_and_damage_is_refused(tmp_path):
  one = opened(tmp_path, total=5)
  charge(one, 2)
  one.close()
  path = tmp_path / journal.AUDIT
  path.write_bytes(path.read_bytes() + b'{"event": "query", "clin')
  again = opened(tmp_path, total=5)
  assert again.left("a") == 3
  charge(again)
  again.close()
  assert all(json.loads(line) for line in path.read_text().splitlines())
  path.write_bytes(path.read_bytes().replace(b'"images": 1', b'"imxges": 1', 1))
  with pytest.raises(ValueError, match=r"audit.jsonl, line 1 is damaged.*mend"):
    opened(tmp_path)


def test_two_servers_cannot_count_in_one_folder(tmp_path):
  one = opened(tmp_path)
  with pytest.raises(ValueError, match="another server is at work"):
    opened(tmp_path)
  one.close()
  opened(tmp_path).close()


def test_sessions_at_once(tmp_path):
  one = opened(tmp_path, sessions=1)
  with one.session("b"):
    with one.session("a"):
      assert one.sessions == 2
      with pytest.raises(Refused, match="a has 1 sessions open"), one.session("a"):
        pass
    with one.session("a"):
      pass
  assert one.sessions == 0


def test_attempts_to_open_a_session_have_a_rate_of_each_clinic(tmp_path, clock):
  one = opened(tmp_path, clock, sessions=1, attempts=3)

  def attempt(clinic="a"):
    with one.session(clinic):
      pass

  with one.session("a"):
    for _ in range(2):  # those that are refused count, too
      with pytest.raises(Refused, match="sessions open"):
        attempt()
  with pytest.raises(Refused, match="tried to open 3 sessions within a minute"):
    attempt()
  attempt("b")
  clock.now += 60
  attempt()


def test_refusals_cost_the_log_a_bounded_number_of_lines(tmp_path, clock):
  one, told = opened(tmp_path, clock), []
  one.listeners.append(lambda event, fields: told.append(event))
  for _ in range(1000):
    one.refused("a", Refused("no"))
  one.refused("b", Refused("no"))
  clock.now += 60
  one.refused("a", Refused("no"))
  one.close()
  lines = [json.loads(line) for line in (tmp_path / journal.AUDIT).open()]
  of = lambda event, clinic: [v for v in lines if (v["event"], v["clinic"]) == (event, clinic)]
  assert len(of("refusal", "a")) == journal._REFUSALS + 1
  assert len(of("refusal", "b")) == 1
  assert [v["sessions"] for v in of("refusals", "a")] == [1000 - journal._REFUSALS]
  assert told.count("refusal") == 1002  # and each is in the numbers on loopback


def test_a_full_disk_answers_no_query_and_damages_no_line(tmp_path, monkeypatch):
  echo = io.StringIO()
  one = Journal(tmp_path, Contract(), echo, Clock())
  charge(one)
  pwrite = os.pwrite

  def full(descriptor, data, offset):
    if len(data) > 40:
      return pwrite(descriptor, data[:40], offset)
    raise OSError(errno.ENOSPC, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(journal.os, "pwrite", full)
    with pytest.raises(Refused, match="disk takes no more queries"):
      charge(one)
    one.note("session", clinic="a")  # what nothing hangs on is said elsewhere
  assert "audit.jsonl lacks a line (session): No space left" in echo.getvalue()
  assert one.left("a") == 99
  charge(one)
  one.close()
  lines = [json.loads(line) for line in (tmp_path / journal.AUDIT).open()]
  assert [line["event"] for line in lines] == ["query", "query"]


def test_a_reader_of_the_log_that_has_gone_costs_no_query(tmp_path):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as echo:
    one = Journal(tmp_path, Contract(daily=3), echo, Clock())
    charge(one, 2)
    assert one.left("a") == 1
    one.close()
    with contextlib.suppress(OSError):
      echo.close()
  assert opened(tmp_path, daily=3).left("a") == 1


def test_only_known_fields_can_be_logged(tmp_path):
  one = opened(tmp_path)
  for fields in ({"seed": "0"}, {"clinic": b"key"}, {"images": [1, 2]}):
    with pytest.raises((TypeError, KeyError)):
      one.note("event", **fields)
  one.note("refusal", clinic="a", reason="x" * 10**5)
  assert len((tmp_path / journal.AUDIT).read_bytes()) < 1000
