"""Flower's own processes are killed, started twice, or have another clock; and what they open.

Sites are threads that sum vectors (`flower_world`); all else is Flower's own, on loopback. So
`.ci/run` runs this file once.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys
import threading
import time

import numpy as np
import pytest

pytest.importorskip("flwr")

from flower_events import DOCS, OVER_FLOWER, RIGHT, row
from flower_world import expected, records, site

from experiments import processes, trial, trial_keys
from primia_jax.flower import channel
from primia_jax.secagg import Lost, carrier, meeting

pytestmark = pytest.mark.flower

TIMEOUT, PATIENCE = 40.0, 90.0  # of a stage, and of a site
LONGEST = 600.0  # seconds until something hangs
HOOK = """
import os, sys
log = f"{os.environ['OPENED']}/{os.getpid()}"
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
os.write(out, f"{os.environ.get('FLWR_HOME')}\\n{' '.join(sys.orig_argv)}\\n".encode())
def hook(event, given):
  if event in ("open", "os.listdir", "os.scandir", "sqlite3.connect") and given:
    if isinstance(given[0], str | bytes | os.PathLike):
      path = os.path.abspath(os.fsdecode(given[0]))
      if path.startswith(os.environ["OPENED_BELOW"]):
        os.write(out, os.fsencode(path) + b"\\n")
sys.addaudithook(hook)
"""


class Start:
  """One start of all sites, each with its channel, and of one run of Flower's, for more rounds."""

  def __init__(self, deployment, more):
    self.deployment, self.results, self.errors = deployment, {}, {}
    self.sums = deployment.folder / trial.COORDINATOR / "sums.jsonl"
    self.begun = len(self.lines())  # rounds, which have a sum each
    rounds = self.begun + more
    numbers = range(len(deployment.sites))
    self.threads = [
      threading.Thread(target=self.one, args=(i, rounds), daemon=True) for i in numbers
    ]
    for thread in self.threads:
      thread.start()
    trial.start_run(deployment, TIMEOUT)

  def one(self, i, rounds):
    own = self.deployment.sites[i]
    try:
      end = carrier.Carrier(*channel.serve(own, PATIENCE))
      self.results[i] = site(own.parents[1], i, end, rounds)
    except BaseException as error:
      self.errors[i] = error
    with contextlib.suppress(OSError):
      end.close()

  def lines(self):
    return self.sums.read_text().splitlines() if self.sums.is_file() else []

  def wait(self, is_there):
    until = time.monotonic() + LONGEST
    while not is_there():
      assert time.monotonic() < until, "a hang"
      time.sleep(0.1)

  def wait_for_sums(self, number):
    self.wait(lambda: len(self.lines()) >= self.begun + number or self.errors)
    assert self.errors == {}

  def end(self):
    """How the sites end, in words."""
    for thread in self.threads:
      thread.join(LONGEST)
      assert not thread.is_alive(), "a hang"
    named = lambda i: type(self.errors[i]).__name__ if i in self.errors else RIGHT
    ends = [named(i) for i in range(len(self.threads))]
    alike = len(set(ends)) == 1
    return ends[0] if alike else ", ".join(f"{i}: {end}" for i, end in enumerate(ends))

  def ending(self):
    """How the coordinator ends."""
    path = self.sums.with_name("ending.json")
    self.wait(path.is_file)
    return json.loads(path.read_text())["failed"] or RIGHT

  def check_right(self):
    """All end well, in one state, which is that of the sums."""
    assert (self.end(), self.ending()) == (RIGHT, RIGHT), self.errors
    root = self.deployment.sites[0].parents[1]
    for i in range(len(self.threads)):
      np.testing.assert_array_equal(self.results[i], expected(records(root, 0)))
    return RIGHT


def kill(deployment, name):
  process = deployment.processes.pop(name)
  below = trial._below({process.pid})
  for pid in (process.pid, *below):
    with contextlib.suppress(ProcessLookupError):
      os.kill(pid, signal.SIGKILL)
  process.wait()


def runs(deployment):
  listed = trial.flwr(deployment, ["flwr", "list", "trial", "--format", "json"])
  return json.loads(listed)["runs"]


@pytest.fixture(scope="module")
def hooked(tmp_path_factory):
  """Three SuperNodes and a SuperLink, in which an audit hook sees each file that is opened."""
  root = tmp_path_factory.mktemp("hooked").resolve()
  (root / "hook").mkdir()
  (root / "opened").mkdir()
  (root / "run").mkdir()
  (root / "hook" / "sitecustomize.py").write_text(HOOK)
  with pytest.MonkeyPatch.context() as patch:
    path = os.pathsep.join(filter(None, [str(root / "hook"), os.environ.get("PYTHONPATH")]))
    for name, value in (("PYTHONPATH", path), ("OPENED", root / "opened"), ("OPENED_BELOW", root)):
      patch.setenv(name, str(value))
    with trial.deployed(3, root / "run", root / "own") as deployment:
      trial_keys.introduce(root / "run" / trial.COORDINATOR, deployment.sites)
      yield deployment


def check(name, *ends):
  assert ends == OVER_FLOWER[name]
  assert row(name) in DOCS.read_text().splitlines()


def test_flower_s_processes_may_be_killed_and_a_second_run_takes_nothing(hooked):
  first = Start(hooked, 2)
  first.wait_for_sums(1)
  kill(hooked, "supernode 1")
  ends = first.ending(), first.end()
  assert isinstance(first.errors[1], Lost)
  trial.start_supernode(hooked, 1)
  time.sleep(5.0)  # it is there again before the next run

  second = Start(hooked, 3)  # the next start, and during it another run
  second.wait_for_sums(1)
  ended = lambda: [one for one in runs(hooked) if str(one["status"]) == "finished:failed"]
  before = len(ended())
  settings = f'folder="{hooked.folder / trial.COORDINATOR}" num-sites=3 timeout={TIMEOUT!r}'
  trial.flwr(hooked, ["flwr", "run", str(trial.APP), "trial", "--run-config", settings])
  check("site 1's SuperNode is killed", *ends, second.check_right())
  second.wait(lambda: len(ended()) > before)
  (failed,) = ended()[-1:]
  log = trial.flwr(hooked, ["flwr", "log", str(failed["run-id"]), "trial", "--show"])
  assert "another run is under way in" in " ".join(log.split()), log

  third = Start(hooked, 2)
  third.wait_for_sums(1)
  name = "a second run is started while one goes on"
  kill(hooked, "superlink")
  assert third.end() == "Lost"
  assert not (hooked.folder / trial.COORDINATOR / "ending.json").exists()
  for i in range(3):
    kill(hooked, f"supernode {i}")
  trial._start_superlink(hooked)
  for i in range(3):
    trial.register(hooked, i)
    trial.start_supernode(hooked, i)
  last = Start(hooked, 1).check_right()
  check(name, "second: ValueError, first: right", RIGHT, last)
  check("the SuperLink is killed", "killed", third.end(), last)


def test_neither_the_coordinator_nor_a_client_app_opens_a_site_s_files(hooked):
  """Nor does a ClientApp open another's; of its own site's folder it needs Flower's part alone."""
  root = hooked.folder.parent
  seen = {"flower-superlink": 0, "flwr-serverapp": 0, "flower-supernode": 0, "flwr-clientapp": 0}
  of_coordinator = set()
  for path in (root / "opened").iterdir():
    home, command, *opened = path.read_text().splitlines()
    within = {pathlib.Path(one).relative_to(root) for one in opened}
    for name in (name for name in seen if name in command):
      seen[name] += 1
    if pathlib.Path(home).is_relative_to(root / "run"):
      of_coordinator |= within
      assert [
        one for one in within if one.parts[:1] == ("own",) and one.name != "node_key.pub"
      ] == []
      continue
    mine = pathlib.Path(home).relative_to(root)
    assert mine.parts[::2] == ("own", "flower")
    others = {one for one in within if one.parts[:1] != ("hook",) and not one.is_relative_to(mine)}
    assert others <= {pathlib.Path("run/flower/authority.pem")}
  assert all(seen.values()), seen
  assert {pathlib.Path("run/coordinator") / name for name in ("identity", "sums.jsonl")} <= (
    of_coordinator
  )


@pytest.mark.parametrize("ahead", [86400.0, 6.0])
def test_a_node_whose_clock_is_ahead_is_refused_and_its_hospital_is_told(tmp_path, ahead):
  own = processes.own_folder(tmp_path / "own", 1).resolve()
  made = trial.Deployment(tmp_path / "run", [own, own], {}, trial.free_port())
  made.flower.mkdir(parents=True)
  start = trial.start

  def shifted(deployment, name, command, home):
    wrapper = str(pathlib.Path(__file__).with_name("flower_shifted.py"))
    start(deployment, name, [sys.executable, wrapper, str(ahead), *command[1:]], home)

  try:
    trial._start_superlink(made)
    trial.register(made, 1)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(trial, "start", shifted)
      trial.start_supernode(made, 1)
    end = carrier.Carrier(*channel.serve(own, 20.0))
    with pytest.raises(
      Lost, match=r"clocks here and at the coordinator differ by 5 s: keep both by"
    ):
      meeting.invited(end)
    end.close()
    listed = lambda: trial.flwr(made, ["flwr", "supernode", "list", "trial"])
    assert "online" not in listed().lower()
    assert "401" in made.log("supernode 1").read_text() + made.log("superlink").read_text()
    kill(made, "supernode 1")
    trial.start_supernode(made, 1)
    until = time.monotonic() + 60
    while "online" not in listed().lower():
      assert time.monotonic() < until, listed()
      time.sleep(0.5)
  finally:
    trial._stop(made)
  check("site 1's clock is a day ahead, or six seconds", "no node of site 1", "1: Lost", RIGHT)
