"""`train_federated --placement=processes`: real processes, one of them killed, and the run started
again.
"""

import contextlib
import functools
import json
import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys
import time

import jax
import numpy as np
import PIL.Image
import pytest
from experiments_apart import APART, free_port, in_threads, seat_of
from experiments_runs import FIXED, flags_of, train, trainer_of

from experiments import inputs, model_files, processes, running, settings
from primia_jax.data import sites as data_sites
from primia_jax.privacy import accounting, ledger
from primia_jax.privacy.accounting import Ledger
from primia_jax.privacy.chain import Chain
from primia_jax.secagg import exchange, keys

pytestmark = pytest.mark.optimised  # the bits of one process and of many are compared


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


AUDIT = """
import os, sys
if "--process_id" in " ".join(sys.orig_argv):
  number = next(a for a in sys.orig_argv if a.startswith("--process_id")).partition("=")[2]
  log = os.open(os.path.dirname(__file__) + f"/opened_{number}", os.O_CREAT | os.O_WRONLY)
  def audit(event, args):
    if event in ("open", "os.listdir", "os.scandir"):
      os.write(log, f"{args[0]}\\n".encode())
  sys.addaudithook(audit)
"""


def write_sources(folder):
  """A source for each of three sites: npz files, one of them unsplit, and a folder of images."""
  part = data_sites.phantom_part((12, 12, 16), size=16)
  label_names, sources = part.dataset.label_names, []
  for i, rows in enumerate(part.sites):
    (own := folder / f"site_{i}").mkdir(parents=True)
    images, labels = part.dataset.images[rows, ..., 0], part.dataset.labels[rows]
    if i < 2:
      splits = {"train": slice(0, 9), "test": slice(9, 12)} if i else {"train": slice(0, 12)}
      arrays = {
        f"{split}_{name}": a[of_split]
        for split, of_split in splits.items()
        for name, a in (("images", images), ("labels", labels))
      }
      np.savez(own / "images.npz", **arrays)
      sources.append(f"npz:{own / 'images.npz'}")
      continue
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
      (own / label_names[label]).mkdir(exist_ok=True)
      PIL.Image.fromarray(image).save(own / label_names[label] / f"{n}.png")
    sources.append(f"folder:{own}")
  return ",".join(sources), ",".join(label_names)


def test_a_process_a_site_trains_what_one_process_trains_and_opens_no_other_site_s_file(
  tmp_path, path, monkeypatch
):
  """Each process has a source and a folder of its own; an audit hook sees every file it opens."""
  site_data, label_names = write_sources(tmp_path / "data")
  config = settings.replace(APART, site_data=site_data, label_names=label_names)
  (hook := tmp_path / "hook").mkdir()
  (hook / "sitecustomize.py").write_text(AUDIT)
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), os.environ["PYTHONPATH"]]))
  folder = tmp_path / "run"
  children, own = start(config, folder)
  simulated = settings.replace(config, placement="scan", secagg_threshold=3)
  expected = train(simulated, tmp_path / "simulated")
  assert processes.watch(children, folder, own) == []
  _, (trained,), _, _ = model_files.load_model(str(folder))
  for a, b in zip(jax.tree.leaves(trained), jax.tree.leaves(expected.models[0]), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  got = rows(folder)
  assert [row["survivors"] for row in got] == [3, 3]
  for row, wanted in zip(got, expected.rows, strict=True):
    assert row["val_mcc"] == pytest.approx(wanted["val_mcc"])
    assert row["val_loss"] == pytest.approx(wanted["val_loss"], abs=1e-4)
  assert "no other process knows them" in (folder / "report.md").read_text()
  for i in range(3):
    opened = {pathlib.Path(line) for line in (hook / f"opened_{i}").read_text().splitlines()}
    for root in (tmp_path / "data", own):
      within = {one.relative_to(root).parts[0] for one in opened if one.is_relative_to(root)}
      assert within == {f"site_{i}"}


def test_a_process_is_given_the_sizes_of_the_others_and_none_of_their_images(tmp_path):
  site_data, label_names = write_sources(tmp_path)
  config = settings.replace(APART, site_data=site_data, label_names=label_names)
  everything = inputs.site_images(config)
  own = [inputs.site_images(config, i) for i in range(3)]
  said = {i: inputs.told(one, i) for i, one in enumerate(own)}
  for i, one in enumerate(own):
    known = inputs.with_others(one, i, said)
    assert known.train.sizes == everything.train.sizes
    assert known.validation.sizes == everything.validation.sizes
    assert known.patients == inputs.count_patients(everything.train)
    for part, whole in zip(known[:2], everything[:2], strict=True):
      np.testing.assert_array_equal(
        data_sites.stack(part, [i]).images, data_sites.stack(whole, [i]).images
      )
      with pytest.raises(ValueError, match=r"images are not in this process"):
        data_sites.stack(part, [(i + 1) % 3])
  for wrong, text in (
    (b"[]", "site 1 has not told how many images it has"),
    (b'[4, 2, 6, 1, "a", "b"]', r"site 1 has the classes \['a', 'b'\], and site 0"),
    (b"[0," + said[1].partition(b",")[2], r"sites \[1\] have no images to train on"),
  ):
    with pytest.raises(ValueError, match=text):
      inputs.with_others(own[0], 0, said | {1: wrong})


def test_processes_that_are_started_one_by_one_read_no_older_message(tmp_path):
  """Site 1 is there first, in a folder with all that an earlier start has left."""
  config = settings.replace(APART, num_sites=2)
  for _ in range(2):
    address = f"localhost:{free_port()}"
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
    processes.connect(APART, tmp_path, seat_of(tmp_path, 0, "192.0.2.1:4567", is_protected=True))


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
    (["--network_is_protected"], "network_is_protected=True concerns a coordinator"),
    (["--stage_timeout=0"], "stage_timeout=0.0 must be a positive number"),
    (
      ["--placement=scan", "--coordinator=127.0.0.1:1"],
      "coordinator=127.0.0.1:1 belongs to placement=processes",
    ),
  ],
)
@pytest.mark.slow
def test_flags_that_would_be_ignored_are_refused(tmp_path, path, flags, told):
  command = [sys.executable, "-m", MODULE, *arguments(APART, tmp_path / "run"), *flags]
  run = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert run.returncode == 1
  assert told in run.stderr
  assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_processes_end_with_who_has_launched_them(tmp_path, path):
  folder = tmp_path / "run"
  command = [sys.executable, "-m", MODULE, *arguments(settings.replace(APART, rounds=1000), folder)]
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


# A run whose sites are threads of this process, with all arrays of each sum in hand.
# Momentum stays at the site.
