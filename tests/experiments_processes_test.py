"""`train_federated --placement=processes`: real processes, one of them killed, and the run started
again.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from experiments_runs import FIXED, TINY, contents, flags_of, found, train, trainer_of

from experiments import arms, inputs, processes, running, settings, starts
from experiments.checkpoints import Best, Checkpoints
from primia_jax import models, secagg
from primia_jax.data import sites as data_sites
from primia_jax.privacy import accounting, ledger
from primia_jax.secagg import exchange, keys, meeting, subkeys, transport

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
  simulated = settings.replace(config, placement="scan", secagg_threshold=2)
  expected = train(simulated, tmp_path / "simulated")
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
    (["--network_is_protected"], "network_is_protected concerns a coordinator"),
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
# Momentum stays at the site.


def train_apart(root, rounds=2, arm_folders=None, timeout=20.0):
  """One start of all sites: (arms, errors), by site; each may read a checkpoint of its own."""
  config = APART
  folder, address = root / "run", f"127.0.0.1:{free_port()}"
  folder.mkdir(exist_ok=True)
  model_config = config.model.config(config.data, 3)
  model = models.build(model_config)

  def one(i):
    place, _ = processes.connect(config, folder, seat_of(root, i, address, timeout))
    try:
      images = inputs.site_images(config, i)
      cohort = arms.Cohort("federated", images.train, images.validation, np.array([i]))
      trainer = arms.make_trainer(config, model, model_config, [cohort], place)
      arm_folder = (arm_folders or {}).get(i, folder / "federated")
      arm_folder.mkdir(exist_ok=True)
      return arms.train(
        settings.replace(config, rounds=rounds), cohort, trainer, model_config, arm_folder
      )
    finally:
      place.exchange.close()

  return in_threads({i: functools.partial(one, i) for i in range(config.hospitals.num_sites)})


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run of one round, which tests copy and continue: its folder and all secrets that it drew."""
  root, drawn, draw = tmp_path_factory.mktemp("begun"), [], subkeys.draw

  def drawing(entropy):
    secrets = draw(entropy)
    drawn.extend((secrets.mask.private, secrets.seed, secrets.noise))
    return secrets

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(subkeys, "draw", drawing)
    _, errors = train_apart(root, rounds=1)
  assert errors == {}
  return root, drawn


def test_what_a_site_keeps_lies_in_its_own_folder_and_nothing_of_it_in_the_run_folder(begun):
  root, _ = begun
  shared = list(contents(root / "run"))
  for i in range(3):
    own = root / "own" / f"site_{i}"
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    kept = ocp.StandardCheckpointer().restore((own / "checkpoints" / "1" / "default").absolute())
    momentum = [np.asarray(a) for a in jax.tree.leaves(kept["state"])]
    assert sum(a.size > 100 and np.any(a) for a in momentum)
    secrets = [a.tobytes() for a in momentum if a.size > 100 and np.any(a)]
    for secret in (*secrets, (own / "identity").read_bytes()):
      assert not any(secret in data for data in shared)
  assert not list((root / "run").rglob("*site_*/**/*"))


def test_no_secret_of_noise_or_of_a_mask_is_in_any_folder(begun):
  root, drawn = begun
  assert len(drawn) == 3 * 3 * 3  # sites, sums, secrets
  assert found([keys.words(secret) for secret in drawn], root) == 0


def again(begun, root):
  """The run as it is to be continued, in folders of its own."""
  shutil.copytree(begun[0], root, dirs_exist_ok=True)
  return root / "run" / "federated"


def plant(source, folder, change, round_index=1):
  """Copies the global checkpoint and changes its parameters, and the round that it names."""
  trainer, nobody = trainer_of(TINY), folder / "nobody"
  start = TINY.model.initial(TINY.model.config(TINY.data, 3), jax.random.key(TINY.seed))
  state = trainer.rounds.init(*start)._replace(site_state=())
  before = Checkpoints(source, nobody, 0, False)
  state, best = before.restore(state, Best(*state[:-1], jnp.float32(-2), jnp.int32(0)))
  before.close()
  state = state._replace(params=jax.tree.map(change, state.params), round=jnp.int32(round_index))
  after = Checkpoints(folder, nobody, 0, False)
  after.save(1, state, best)
  after.close()
  return state


@pytest.fixture
def inputs_of_sums(monkeypatch):
  """What each site gives into each sum, and the sum, by site."""
  seen, finish = {}, transport.finish

  def finished(connection, site, vectors, server):
    seen.setdefault(site.number, []).append([vectors, None])
    joined = finish(connection, site, vectors, server)
    seen[site.number][-1][1] = joined.total
    return joined

  monkeypatch.setattr(transport, "finish", finished)
  return seen


def record_as_read(root, site, planted):
  """Makes a site's record say what it is given, as that of a colluding site may."""
  path = root / "own" / f"site_{site}" / "states.json"
  made = starts.digest(planted, processes.settings_of(APART)).hex()
  path.write_text(json.dumps(json.loads(path.read_text()) | {"1": [made, [0, 1, 2]]}))


@pytest.mark.parametrize("protection", ["records", "signatures", "none"])
def test_two_planted_checkpoints_do_not_single_out_a_site_s_update(
  begun, tmp_path, monkeypatch, inputs_of_sums, protection
):
  """Sites 0 and 2 get a state whose updates are NaN, and NaN is summed as zero. Without protection
  the sum is site 1's update, bit for bit. With records that agree with it, as if both colluded,
  site 1 sees that they start from another state.
  """
  folder = again(begun, tmp_path)
  planted = plant(folder, tmp_path / "planted", lambda a: np.full_like(a, np.nan))
  for i in (0, 2):
    if protection != "records":
      record_as_read(tmp_path, i, planted)
  if protection == "none":
    monkeypatch.setattr(meeting, "check", lambda *_: (0, 1, 2))
    monkeypatch.setattr(exchange.Exchange, "bind", lambda self, public: None)
  timeout = 20.0 if protection == "none" else 2.0
  bad = tmp_path / "planted"
  results, errors = train_apart(tmp_path, 2, {0: bad, 2: bad}, timeout)
  assert results == {}
  if protection == "none":
    (_, _), (given, total) = inputs_of_sums[1]  # of class counts and of training
    update = slice(0, len(jax.tree.leaves(planted.params)))
    assert sum(np.any(v) for v in given[update]) > 1
    for v, summed in zip(given[update], total[update], strict=True):
      np.testing.assert_array_equal(v, summed)
    return
  assert inputs_of_sums == {}
  wrong = {0: "is not the one in its record", 2: "is not the one in its record"}
  told = {1: r"sites \[0, 2\] start from another state"}
  for i, text in (wrong if protection == "records" else told).items():
    assert isinstance(errors[i], secagg.Refused)
    assert re.search(text, str(errors[i]))


@pytest.mark.parametrize(
  ("round_index", "told"), [(0, "not the one in its record"), (1, "no record")]
)
def test_at_the_first_start_no_site_takes_a_checkpoint(begun, tmp_path, round_index, told):
  """One that the host has put there: of a later round, or as if no round had been."""
  bad = tmp_path / "planted"
  plant(begun[0] / "run" / "federated", bad, lambda a: a + 1, round_index)
  _, errors = train_apart(tmp_path, 2, {0: bad, 1: bad, 2: bad}, 2.0)
  assert all(told in str(errors[i]) for i in range(3))


def test_a_site_that_was_lost_rejoins_on_what_all_others_have_recorded(begun, tmp_path):
  """And with it the run goes on; where another one lacks the record, too, it stops."""
  again(begun, tmp_path)
  known = {i: tmp_path / "own" / f"site_{i}" / "states.json" for i in range(3)}
  forget = lambda path: path.write_text(json.dumps({"0": json.loads(path.read_text())["0"]}))
  forget(known[1])
  forget(known[2])
  _, errors = train_apart(tmp_path, timeout=2.0)
  assert all("it has no record of round 1, and sites [0" in str(errors[i]) for i in (1, 2))
  shutil.copy(begun[0] / "own" / "site_1" / "states.json", known[1])
  results, errors = train_apart(tmp_path)
  assert errors == {}
  assert [row["survivors"] for row in results[0].rows] == [3, 3]
  of_sites = [json.loads(path.read_text()) for path in known.values()]
  assert of_sites[0] == of_sites[1] == of_sites[2]
  assert sorted(of_sites[0]) == ["0", "1", "2"]
