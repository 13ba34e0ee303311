"""`train_federated --placement=processes`: real processes, one of them killed, and the run started
again.
"""

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from experiments_runs import FIXED, TINY, flags_of, train, trainer_of

from experiments import arms, inputs, processes, running, settings
from experiments.checkpoints import Best, Checkpoints
from primia_jax import models
from primia_jax.privacy import accounting, ledger
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


MODULE = "experiments.train_federated"


def start(config, folder):
  running.open_run(config, str(folder))
  num_sites, own = config.hospitals.num_sites, processes.sites_folder(folder, "")
  return processes.start(MODULE, arguments(config, folder), num_sites, folder, own), own


def rows(folder):
  lines = folder / "federated" / "rounds.jsonl"
  return [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []


def test_a_process_a_site_trains_the_model_that_one_process_trains(tmp_path, path):
  folder = tmp_path / "run"
  children, own = start(APART, folder)
  expected = train(
    settings.replace(APART, placement="scan", secagg_threshold=2), tmp_path / "simulated"
  )
  assert processes.watch(children, folder, own) == []
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
  for seat, only in ((seat_of(tmp_path, 1, "127.0.0.1:1", 1.0), 1), (None, None)):
    with pytest.raises(Read) as asked:
      running.run(APART, tmp_path, federated=True, seat=seat)
    assert asked.value.args == (only,)


def free_port():
  with socket.create_server(("127.0.0.1", 0)) as probe:
    return probe.getsockname()[1]


def seat_of(root, number, address, timeout=20.0, **more):
  return processes.Seat(
    number, address, timeout, processes.own_folder(root / "own", number), **more
  )


def in_threads(calls):
  """Results and errors of calls, each in a thread."""
  results, errors = {}, {}

  def one(i, call):
    try:
      results[i] = call()
    except Exception as e:
      errors[i] = e

  threads = {i: threading.Thread(target=one, args=(i, c), daemon=True) for i, c in calls.items()}
  for thread in threads.values():
    thread.start()
    thread.join(0.3)  # each is there before the next
  for thread in threads.values():
    thread.join(60)
    assert not thread.is_alive()
  return results, errors


def test_processes_that_are_started_one_by_one_read_no_older_message(tmp_path):
  """Site 1 is there first, in a folder with all that an earlier start has left."""
  config = settings.replace(APART, num_sites=2)
  for _ in range(2):
    address = f"127.0.0.1:{free_port()}"
    connect = lambda i, address=address: processes.connect(
      config, tmp_path, seat_of(tmp_path, i, address), b"%d" % i
    )
    results, errors = in_threads({i: functools.partial(connect, i) for i in (1, 0)})
    assert errors == {}
    (first, told), (second, same) = results[0], results[1]
    assert told == same == {0: b"0", 1: b"1"}
    assert first.joined.pinned[1:] == second.joined.pinned[1:]
    assert first.exchange.label == second.exchange.label
    for place in (first, second):
      place.exchange.close()


def test_a_site_s_own_folder_is_closed_to_others(tmp_path):
  folder = tmp_path / "run"
  assert processes.sites_folder(folder, "") == tmp_path / "run.sites"
  with pytest.raises(ValueError, match="within the run folder, which all sites read"):
    processes.sites_folder(folder, str(folder / "sites"))
  own = processes.own_folder(tmp_path / "run.sites", 1)
  assert stat.S_IMODE(own.stat().st_mode) == 0o700
  own.chmod(0o750)
  with pytest.raises(ValueError, match=r"site_1 holds the secrets of site 1, and other users"):
    processes.own_folder(tmp_path / "run.sites", 1)


def test_an_address_beyond_this_machine_is_refused_unless_its_network_is_protected(tmp_path):
  for address in ("192.0.2.1:4567", "0.0.0.0:4567"):
    with pytest.raises(ValueError, match=f"'{address}' is no loopback .* --network_is_protected"):
      processes.connect(APART, tmp_path, seat_of(tmp_path, 0, address))
  with pytest.raises(ValueError, match=r"the first process cannot listen there"):
    processes.connect(
      APART, tmp_path, seat_of(tmp_path, 0, "192.0.2.1:4567", is_protected=True)
    )


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
      processes.connect(config, tmp_path, seat_of(tmp_path, number, address, 1.0))
  with socket.create_server(("127.0.0.1", 0)) as taken:
    address = "{}:{}".format(*taken.getsockname())
    with pytest.raises(ValueError, match="the first process cannot listen there"):
      processes.connect(config, tmp_path, seat_of(tmp_path, 0, address, 1.0))
  with pytest.raises(exchange.Lost, match=f"no server at {address}"):
    processes.connect(config, tmp_path, seat_of(tmp_path, 1, address, 0.2))
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
    MODULE,
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
    MODULE,
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
  children, own = start(config, folder)
  try:
    wait_for(lambda: len(rows(folder)) >= 2)
    children[3].send_signal(signal.SIGKILL)
    before = len(rows(folder))
    wait_for(lambda: rows(folder)[-1]["survivors"] == 3)
    children[0].send_signal(signal.SIGKILL)  # the host: the run ends, and can be started again
    with pytest.raises(RuntimeError, match="site 0, which hosts the server, failed"):
      processes.watch(children, folder, own)
  finally:
    for child in children:
      child.kill()
      child.wait()
  assert "site 3's process has ended, code -9" in capfd.readouterr().err
  got = rows(folder)
  assert {row["survivors"] for row in got[: before - 1]} == {4}
  assert 3 <= len(got) < 15
  processes.launch(MODULE, arguments(config, folder), 4, folder, own)
  after = rows(folder)
  assert after[: len(got) - 1] == got[:-1]  # the last may not have been saved yet
  assert [row["round"] for row in after] == list(range(1, 16))
  assert {row["survivors"] for row in after[len(got) :]} == {4}
  assert "sites lost" in (folder / "report.md").read_text()


def test_books_of_several_processes_are_made_alike_with_the_largest_epsilon_of_each_site(tmp_path):
  plan = trainer_of(FIXED).privacy
  (release,) = plan.releases
  paths = [tmp_path / f"{i}" / ledger.LEDGER for i in range(3)]
  for path in paths:
    path.parent.mkdir()
  for times, path in zip(((3, 1), (2, 2)), paths, strict=False):
    book = ledger.Book(plan, 2, path)
    for site, count in enumerate(times):
      book.spend(release, [site], count)
  for path in paths:
    ledger.reconcile([one.read_bytes() if one.is_file() else b"" for one in paths], path)
  alike = [ledger.Book(plan, 2, path) for path in paths]
  assert alike[0].ledgers == alike[1].ledgers == alike[2].ledgers
  expected = [
    accounting.spend(accounting.Ledger("example", plan.delta), release, n) for n in (3, 2)
  ]
  assert [accounting.epsilon(one) for one in alike[0].ledgers] == [
    accounting.epsilon(one) for one in expected
  ]


# A run whose sites are threads of this process, with all arrays of each sum in hand.
KEPT = settings.replace(APART, num_sites=3, rounds=1)  # momentum stays at the site


def train_apart(config, root, arms_of=None):
  """One start of all sites: (arms, errors), by site; `arms_of` site 1's folder of the arm."""
  folder, address = root / "run", f"127.0.0.1:{free_port()}"
  folder.mkdir(exist_ok=True)
  model_config = config.model.config(config.data, 3)
  model = models.build(model_config)

  def one(i):
    place, _ = processes.connect(config, folder, seat_of(root, i, address))
    try:
      images = inputs.site_images(config, i)
      cohort = arms.Cohort("federated", images.train, images.validation, np.array([i]))
      trainer = arms.make_trainer(config, model, model_config, [cohort], place)
      arm_folder = (arms_of or {}).get(i, folder / "federated")
      arm_folder.mkdir(exist_ok=True)
      return arms.train(config, cohort, trainer, model_config, arm_folder)
    finally:
      place.exchange.close()

  return in_threads({i: functools.partial(one, i) for i in range(config.hospitals.num_sites)})


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run of one round, that others copy and continue."""
  root = tmp_path_factory.mktemp("begun")
  results, errors = train_apart(KEPT, root)
  assert errors == {}
  return root, results


def again(begun, to):
  shutil.copytree(begun[0], to, dirs_exist_ok=True)
  return settings.replace(KEPT, rounds=2)


def plant(folder, change):
  """Replaces the last global checkpoint by one with other parameters."""
  trainer = trainer_of(TINY)
  config = TINY.model.config(TINY.data, 3)
  state = trainer.rounds.init(*TINY.model.initial(config, jax.random.key(TINY.seed)))
  state = state._replace(site_state=())
  best = Best(*state[:-1], np.float32(-2), np.int32(0))
  saved = Checkpoints(folder, folder / "nobody", 0, False)
  state, best = saved.restore(state, best)
  saved.close()
  shutil.rmtree(folder / "checkpoints")
  saved = Checkpoints(folder, folder / "nobody", 0, False)
  saved.save(int(state.round), state._replace(params=jax.tree.map(change, state.params)), best)
  saved.close()


def test_x(begun, tmp_path):
  root, results = begun
  print([p for p in root.rglob("*")])
  print(results[0].rows)
