"""The processes of a trial of Flower on one machine; Flower itself is not started here."""

import json
import os
import subprocess
import sys
import time

import pytest

from experiments import trial

# A process whose child leads a session of its own, as Flower's do.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"],
                         start_new_session=bool(int(sys.argv[1])))
print(child.pid, flush=True)
time.sleep(60)
"""


def started(tmp_path, apart):
  """A deployment of one such process, and its child."""
  process = subprocess.Popen(
    [sys.executable, "-c", PARENT, str(int(apart))], stdout=subprocess.PIPE, text=True,
    start_new_session=True,
  )  # fmt: skip
  child = int(process.stdout.readline())
  return trial.Deployment(tmp_path, [], {"superlink": process}, 0), child


def is_gone(pid):
  end = time.monotonic() + 10
  while time.monotonic() < end:
    try:
      os.kill(pid, 0)
    except ProcessLookupError:
      return True
    with open(f"/proc/{pid}/stat") as status:
      if status.read().rpartition(")")[2].split()[0] == "Z":
        return True
    time.sleep(0.02)
  return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="this machine has no /proc")
def test_all_are_stopped_on_a_machine_without_ps(tmp_path, monkeypatch):
  """Also a child in a session of its own, which no process group holds."""

  def absent(*given, **named):
    raise FileNotFoundError("ps")

  deployment, child = started(tmp_path, True)
  monkeypatch.setattr(trial.subprocess, "run", absent)
  trial._stop(deployment)
  assert deployment.processes["superlink"].poll() is not None
  assert is_gone(child)


def test_without_proc_and_ps_all_of_a_process_s_own_group_are_stopped(tmp_path, monkeypatch):
  deployment, child = started(tmp_path, False)
  monkeypatch.setattr(trial, "_parents", dict)
  trial._stop(deployment)
  assert deployment.processes["superlink"].poll() is not None
  assert is_gone(child)


def test_ps_says_the_same_as_proc(monkeypatch):
  """On macOS there is no /proc."""
  mine = trial._parents()
  assert mine[os.getpid()] == os.getppid()
  monkeypatch.setattr(trial.pathlib.Path, "glob", lambda self, pattern: iter(()))
  if trial.shutil.which("ps"):
    assert trial._parents()[os.getpid()] == os.getppid()
  monkeypatch.setenv("PATH", "")
  assert trial._parents() == {}


def test_a_run_that_flower_ends_before_the_coordinator_begins_is_no_wait(tmp_path, monkeypatch):
  """As where the simulation engine does not start."""
  waiting = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
  made = trial.Deployment(tmp_path, [tmp_path / "site_0"], {"site 0": waiting}, 0)
  made.flower.mkdir()
  status = iter(["running", "finished:failed"])

  def flwr(deployment, command):
    if command[1] == "log":
      return f"what run {command[2]} said"
    return json.dumps({"success": True, "runs": [{"run-id": "7", "status": next(status)}]})

  monkeypatch.setattr(trial, "flwr", flwr)
  monkeypatch.setattr(trial, "_LOOK", 0.0)
  try:
    with pytest.raises(RuntimeError, match=r"Flower's run has ended.*run\.log"):
      trial.watch(made)
  finally:
    waiting.kill()
    waiting.wait()
  assert made.log("run").read_text() == "what run 7 said"
