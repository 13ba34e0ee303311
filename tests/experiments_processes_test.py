"""`train_federated --placement=processes`: real processes, one of them killed, and the run started
again.
"""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from experiments_runs import FIXED, TINY, flags_of, train, trainer_of

from experiments import inputs, processes, running, settings
from primia_jax.privacy import accounting, ledger
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain
from primia_jax.secagg import exchange, keys

APART = settings.replace(TINY, rounds=2, placement="processes", validation_fraction=0.3)


@pytest.fixture
def path(monkeypatch):
  root = str(pathlib.Path(__file__).parents[1])
  monkeypatch.setenv(
    "PYTHONPATH", os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
  )
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def arguments(config, folder):
  return [*flags_of(config), f"--run_dir={folder}"]


def start(config, folder):
  running.open_run(config, str(folder))
  module, num_sites = "experiments.train_federated", config.hospitals.num_sites
  return processes.start(module, arguments(config, folder), num_sites, folder)


def rows(folder):
  lines = folder / "federated" / "rounds.jsonl"
  return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def test_a_process_a_site_trains_the_model_that_one_process_trains(tmp_path, path):
  folder = tmp_path / "run"
  children = start(APART, folder)
  expected = train(
    settings.replace(APART, placement="scan", secagg_threshold=3), tmp_path / "simulated"
  )
  assert processes.watch(children, folder) == []
  _, (trained,), _, _ = running.load_model(str(folder))
  for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(expected.models[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  got = rows(folder)
  assert [row["survivors"] for row in got] == [3, 3]
  for row, wanted in zip(got, expected.rows, strict=True):
    assert row["val_mcc"] == pytest.approx(wanted["val_mcc"])
    assert row["val_loss"] == pytest.approx(wanted["val_loss"], abs=1e-4)
  assert "no other process knows them" in (folder / "report.md").read_text()


def test_a_process_reads_the_images_of_its_own_site_only(tmp_path, monkeypatch):
  class Read(Exception):
    pass

  def read(config, only_site=None):
    raise Read(only_site)

  monkeypatch.setattr(inputs, "site_images", read)
  for seat, only in ((processes.Seat(1, "127.0.0.1:1", 1.0), 1), (None, None)):
    with pytest.raises(Read) as asked:
      running.run(APART, tmp_path, federated=True, seat=seat)
    assert asked.value.args == (only,)


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as probe:
    return probe.getsockname()[1]


def test_processes_that_are_started_one_by_one_pin_no_older_identity_and_go_on_from_equal_ledgers(
  tmp_path,
):
  """Site 1 is there first, in a folder with all that an earlier start has left."""
  known, config = tmp_path / "identities", settings.replace(APART, num_sites=2)
  known.mkdir()
  for name in (0, 1, exchange.SERVER):
    exchange.publish(known, name, keys.identity())
  plan = trainer_of(FIXED).privacy
  ledgers = [processes.home(tmp_path / "federated", i) / ledger.LEDGER for i in range(2)]
  ledgers[1].parent.mkdir(parents=True)
  begin = lambda path: ledger.Ledgers(plan, path, Chain(tmp_path / "ledger"), [None, None])
  begin(ledgers[1]).spend(plan.releases[0], [0, 1])
  places, address = {}, f"127.0.0.1:{free_port()}"

  def connect(i):
    places[i] = processes.connect(config, tmp_path, processes.Seat(i, address, 20.0))
    assert begin(ledgers[i]).ledgers == [plan.charge(Ledger("example", plan.delta))] * 2

  threads = [threading.Thread(target=connect, args=(i,), daemon=True) for i in (1, 0)]
  for thread in threads:
    thread.start()
    thread.join(0.3)
  for thread in threads:
    thread.join(30)
  exchanges = [places[i].exchange for i in range(2)]
  assert exchanges[0]._pinned[1:] == exchanges[1]._pinned[1:]
  assert [one._pinned.own.public for one in exchanges] == list(exchanges[0]._pinned.sites.values())
  for one in exchanges:
    one.close()


def test_an_address_that_is_none_or_nobodys_is_refused_by_name(tmp_path):
  config = settings.replace(APART, num_sites=2)
  for number, address in (
    (0, "127.0.0.1:99999"),
    (0, "127.0.0.1:0"),
    (0, "4567"),
    (2, "127.0.0.1:4567"),
  ):
    with pytest.raises(
      ValueError, match=f"coordinator='{address}' with process_id={number}: write HOST:PORT"
    ):
      processes.connect(config, tmp_path, processes.Seat(number, address, 1.0))
  with socket.create_server(("127.0.0.1", 0)) as taken:
    address = "{}:{}".format(*taken.getsockname())
    with pytest.raises(ValueError, match="the first process cannot listen there"):
      processes.connect(config, tmp_path, processes.Seat(0, address, 1.0))
  with pytest.raises(exchange.Lost, match=f"no server at {address}"):
    processes.connect(config, tmp_path, processes.Seat(1, address, 0.2))
  pinned = exchange.Pinned(keys.identity(), {}, b"")
  with pytest.raises(exchange.Lost, match=f"no server at {address}"):
    exchange.Exchange(("127.0.0.1", int(address.split(":")[1])), 1, pinned, b"run", 1.0)


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--process_id=1"], "process_id=1 starts a single process: give --coordinator"),
    (["--stage_timeout=0"], "stage_timeout=0.0 must be a positive number"),
    (
      ["--placement=scan", "--coordinator=127.0.0.1:1"],
      "coordinator=127.0.0.1:1 belongs to placement=processes",
    ),
  ],
)
@pytest.mark.slow
def test_flags_that_would_be_ignored_are_refused(tmp_path, path, flags, told):
  command = [
    sys.executable,
    "-m",
    "experiments.train_federated",
    *arguments(APART, tmp_path / "run"),
    *flags,
  ]
  run = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert run.returncode == 1
  assert told in run.stderr
  assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_processes_end_with_who_has_launched_them(tmp_path, path):
  folder = tmp_path / "run"
  command = [
    sys.executable,
    "-m",
    "experiments.train_federated",
    *arguments(settings.replace(APART, rounds=1000), folder),
  ]
  launcher = subprocess.Popen(command, start_new_session=True)
  try:
    wait_for(lambda: rows(folder))
    launcher.terminate()
    assert launcher.wait(60) == 128 + signal.SIGTERM
    lines = len(rows(folder))
    time.sleep(2)
    assert len(rows(folder)) == lines
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(launcher.pid, signal.SIGKILL)  # whoever is left


def wait_for(condition, seconds=120):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_process_is_a_lost_site_and_takes_part_again_when_all_start_anew(
  tmp_path, path, capfd
):
  folder = tmp_path / "run"
  config = settings.replace(
    APART,
    rounds=15,
    num_sites=4,
    dp="example",
    noise_multiplier=1.0,
    dp_count_noise=5.0,
    secagg_threshold=3,
  )
  children = start(config, folder)
  try:
    wait_for(lambda: len(rows(folder)) >= 2)
    children[3].send_signal(signal.SIGKILL)
    before = len(rows(folder))
    wait_for(lambda: rows(folder)[-1]["survivors"] == 3)
    children[0].send_signal(signal.SIGKILL)  # the host: the run ends, and can be started again
    with pytest.raises(RuntimeError, match="site 0, which hosts the server, failed"):
      processes.watch(children, folder)
  finally:
    for child in children:
      child.kill()
      child.wait()
  assert "site 3's process has ended, code -9" in capfd.readouterr().err
  got = rows(folder)
  assert {row["survivors"] for row in got[: before - 1]} == {4}
  assert 3 <= len(got) < 15
  processes.launch("experiments.train_federated", arguments(config, folder), 4, folder)
  after = rows(folder)
  assert after[: len(got) - 1] == got[:-1]  # the last may not have been saved yet
  assert [row["round"] for row in after] == list(range(1, 16))
  assert {row["survivors"] for row in after[len(got) :]} == {4}
  assert "sites lost" in (folder / "report.md").read_text()


def test_ledgers_of_several_processes_are_made_alike_with_the_most_that_any_has_charged(tmp_path):
  plan = trainer_of(FIXED).privacy
  (release,) = plan.releases
  paths = [tmp_path / f"{i}" / ledger.LEDGER for i in range(3)]
  begin = lambda path: ledger.Ledgers(plan, path, Chain(tmp_path / "ledger"), [None, None])
  for times, path in zip(((3, 1), (2, 2)), paths, strict=False):
    path.parent.mkdir()
    for site, count in enumerate(times):
      begin(path).spend(release._replace(times=count), [site])
  begin(paths[1]).keep_counts([1.0, 2.0, 3.0])
  said = [ledger.public(path) for path in paths]
  assert said[2] == b""
  for path in paths:
    ledger.reconcile(said, path)
  expected = [accounting.spend(Ledger("example", plan.delta), release, n) for n in (3, 2)]
  for _ in range(2):  # a second start finds nothing to add
    alike = [begin(path) for path in paths]
    assert [one.ledgers for one in alike] == [expected] * 3
    assert [one.counts for one in alike] == [[1.0, 2.0, 3.0]] * 3
  for wrong in (b"x", b"[]", b"{}", b'{"ledgers": [{}], "counts": null}'):
    with pytest.raises(ValueError, match=r"no ledger|Expecting value"):
      ledger.reconcile([said[0], wrong], paths[0])
