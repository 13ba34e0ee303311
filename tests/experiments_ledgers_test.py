"""Ledgers of the binaries: where they lie, which attacks are refused, and that runs add up."""

import json
import pathlib
import shutil

import numpy as np
import pytest
from experiments_programs import call
from experiments_runs import PRIVATE, cohort_of, ledgers, train, trainer_of

from experiments import inputs, running, settings
from experiments import ledgers as rows
from primia_jax.data import phantom
from primia_jax.privacy import accounting, chain, histories, ledger
from primia_jax.privacy.chain import Chain

SHORT = settings.replace(PRIVATE, rounds=1, class_weights=False)


def ledger_of(config, run_dir):
  return rows.folder(config.privacy, config.data, run_dir)


# ---- where they lie


def test_processes_with_a_source_each_have_a_ledger_each(tmp_path):
  names = [f"npz:{tmp_path / one}" for one in ("a.npz", "b.npz")]
  for one in ("a.npz", "b.npz"):
    (tmp_path / one).touch()
  config = settings.replace(PRIVATE, num_sites=2, site_data=",".join(names))
  folder = lambda config, site: rows.folder(config.privacy, config.data, tmp_path / "own", site)
  assert folder(config, 0) == (tmp_path / "a.npz.ledger").resolve()
  assert folder(config, 1) == (tmp_path / "b.npz.ledger").resolve()
  assert folder(PRIVATE, 1) == tmp_path / "own" / rows.OF_PHANTOM
  with pytest.raises(ValueError, match="name its folder with --ledger_dir"):
    folder(config, None)
  named = settings.replace(config, ledger_dir=str(tmp_path / "named"))
  assert folder(named, None) == tmp_path / "named"
  assert folder(named, 1) == tmp_path / "named" / "site_1"


def test_a_ledger_lies_beside_the_data_under_their_real_name(tmp_path):
  """So that another run folder, and another path to the same data, finds it again."""
  run_dir, images = pathlib.Path("runs/a"), tmp_path / "xray.tar"
  images.touch()
  (tmp_path / "link").symlink_to(images)
  of = lambda **changes: ledger_of(settings.replace(PRIVATE, **changes), run_dir)
  beside = tmp_path.resolve() / "xray.tar.ledger"
  assert of(data=f"folder:{images}") == beside
  assert of(data=f"folder:{tmp_path}/../{tmp_path.name}/link") == beside
  assert of(data=f"npz:{images}", ledger_dir=str(tmp_path / "own")) == tmp_path / "own"
  assert of() == run_dir / "ledger"  # the phantom's
  with pytest.raises(FileNotFoundError, match="data=npz:none: there is no none"):
    of(data="npz:none")


def test_a_data_set_of_tfds_has_one_ledger_by_its_name_and_by_its_path(tmp_path):
  prepared = tmp_path / "scans" / "1.0.0"
  prepared.mkdir(parents=True)
  (prepared / "dataset_info.json").touch()
  of = lambda data: ledger_of(
    settings.replace(PRIVATE, data=data, data_dir=str(tmp_path)), pathlib.Path("run")
  )
  assert of("tfds:scans") == of(f"tfds:{prepared}") == tmp_path.resolve() / "scans/1.0.0.ledger"


def test_a_ledger_that_cannot_be_written_is_refused_before_any_image_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, "site_images", lambda *_: pytest.fail("images were read"))
  (tmp_path / "file").touch()
  config = settings.replace(PRIVATE, ledger_dir=str(tmp_path / "file" / "ledger"))
  with pytest.raises(ValueError, match=r"ledger_dir=.* is a file; name a folder"):
    running.open_run(config, str(tmp_path / "run"))
  folder = running.open_run(settings.replace(config, ledger_dir=""), str(tmp_path / "run"))
  with pytest.raises(ValueError, match=r"cannot be written.*set --ledger_dir"):
    running.run(config, folder, federated=True)
  with pytest.raises(ValueError, match="ledger_dir=x: dp=none is charged in no ledger"):
    settings.replace(config, dp="none", noise_multiplier=0.0, ledger_dir="x")


# ---- attacks on the ledger of a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run of one round, with its ledger below it."""
  folder = tmp_path_factory.mktemp("finished") / "run"
  train(SHORT, folder)
  return folder


def _rewrite(folder, change):
  path = folder / "ledger" / chain.FILE
  path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))


ATTACKS = {
  "deleted": (lambda folder: shutil.rmtree(folder / "ledger"), "does not hold the run of"),
  "emptied": (
    lambda folder: (folder / "ledger" / chain.FILE).write_bytes(b""),
    "begun with another key",
  ),
  "cut off": (lambda folder: _rewrite(folder, lambda old: old[:-1]), "has lost entries"),
  "torn": (
    lambda folder: _rewrite(folder, lambda old: [*old[:-1], old[-1][:-1]]),
    "has lost entries",
  ),
  "last entry edited": (
    lambda folder: _rewrite(
      folder, lambda old: [*old[:-1], old[-1].replace(b'"sites":[0,1,2]', b'"sites":[2]')]
    ),
    "has lost entries",
  ),
  "entry edited": (
    lambda folder: _rewrite(
      folder,
      lambda old: [*old[:-2], old[-2].replace(b'"unit":"example"', b'"unit":"site"'), old[-1]],
    ),
    "the chain is broken at line",
  ),
  "key deleted": (lambda folder: (folder / "ledger" / "key").unlink(), "key is missing"),
  "name damaged": ((lambda folder: (folder / ledger.LEDGER).write_text("{")), "is damaged"),
  "name deleted": (lambda folder: (folder / ledger.LEDGER).unlink(), "is missing: it says where"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_ledger_that_has_lost_anything_is_refused_while_a_checkpoint_is_left(
  attack, finished, tmp_path
):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  before = ledgers(folder)
  assert accounting.of_sites(before) > 0
  spoil, told = ATTACKS[attack]
  spoil(folder)
  trainer = trainer_of(SHORT)
  released = trainer._replace(count_classes=pytest.fail, validate=pytest.fail)
  with pytest.raises(ValueError, match=told):
    train(SHORT, folder, trainer=released)


def test_a_checkpoint_of_another_run_is_not_taken(finished, tmp_path):
  """One that a run of lower cost has saved, in one ledger."""
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  train(SHORT, tmp_path / "other", ledger_dir=folder / "ledger")
  name = (tmp_path / "other" / ledger.LEDGER).read_text()
  (folder / ledger.LEDGER).write_text(name)
  with pytest.raises(ValueError, match="has lost entries"):
    train(SHORT, folder)


def test_images_that_have_changed_since_the_run_began_are_refused(finished, tmp_path, monkeypatch):
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  record = ledger.record
  changed = lambda chain, group, image: record(chain, group + "!", image + np.uint8(1))
  monkeypatch.setattr(ledger, "record", changed)
  with pytest.raises(ValueError, match="began with other groups"):
    train(SHORT, folder)


def test_a_run_that_is_stopped_between_charge_and_release_has_been_charged(tmp_path):
  def stop(*_):
    raise KeyboardInterrupt

  trainer = trainer_of(SHORT)
  stopped = trainer._replace(rounds=trainer.rounds._replace(step=stop))
  for starts in (1, 2):
    with pytest.raises(KeyboardInterrupt):
      train(SHORT, tmp_path, trainer=stopped)
    assert [sum(r.times for r in one.releases) for one in ledgers(tmp_path)] == [
      starts * trainer.privacy.num_steps
    ] * 3


# ---- runs on the same data


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """An npz file of 40 training and 4 test images."""
  dataset = phantom.phantom(44, size=16, seed=0)
  path = tmp_path_factory.mktemp("images") / "scans.npz"
  pixels, labels = np.asarray(dataset.images), dataset.labels
  np.savez(
    path,
    train_images=pixels[:40],
    train_labels=labels[:40],
    test_images=pixels[40:],
    test_labels=labels[40:],
  )
  return path


def test_runs_on_the_same_images_add_up_whatever_folder_seed_and_sites_they_have(images, tmp_path):
  """The composition of both, and not the dearer of the two, is what each image was charged."""
  shared = settings.replace(
    SHORT, data=f"npz:{images}", partition="iid", dp_seed=-1, delta=1e-3, aggregation="clear"
  )
  first = settings.replace(shared, num_sites=3)
  second = settings.replace(shared, num_sites=4, seed=7, noise_multiplier=1.5)
  folder = ledger_of(first, tmp_path)
  train(first, tmp_path / "first", ledger_dir=folder)
  alone = rows.together(Chain(folder, read_only=True))

  run_dir = running.open_run(second, str(tmp_path / "second"))
  result = running.run(second, run_dir, federated=True)["privacy"]
  spent = [trainer_of(config).privacy.spent(1) for config in (first, second)]
  both = spent[0]._replace(releases=spent[0].releases + spent[1].releases)
  singly = [ledger.claim(accounting.epsilon(one)) for one in spent]
  name = "all private runs on these data: epsilon"
  assert alone[name] == singly[0]
  assert result[name] == ledger.claim(accounting.epsilon(both)) > max(singly)
  assert result["epsilon (of a unit of any one site, the worst)"] == singly[1]
  assert result["ledger"] == str(folder / chain.FILE)
  assert result["last entry of the ledger"] == Chain(folder, read_only=True).last
  assert name in (run_dir / "report.md").read_text()
  images = [set(np.concatenate(cohort_of(config).train.sites)) for config in (first, second)]
  known = histories.histories(Chain(folder, read_only=True))
  one = histories.worst(known)
  counts = {tuple(spent.runs): spent.num_units for spent in known}
  assert len(one.runs) == 2
  assert counts == {
    one.runs: len(images[0] & images[1]),
    one.runs[:1]: len(images[0] - images[1]),
    one.runs[1:]: len(images[1] - images[0]),
  }
  assert_account_sums(folder, tmp_path / "account", one, singly)


def assert_account_sums(folder, output, one, singly):
  done = call("account", f"--ledger_dir={folder}", f"--output_dir={output}")
  assert done.returncode == 0, done.stderr
  summary = json.loads((output / "account.json").read_text())
  assert [row["epsilon"] for row in summary["runs"]] == singly
  assert [row["sites"] for row in summary["runs"]] == [3, 4]
  runs = [row["run"] for row in summary["runs"]]
  expected = {"units": one.num_units, "epsilon": ledger.claim(one.epsilon), "runs": runs}
  assert summary["units"][0] == expected
  assert f"{ledger.claim(one.epsilon)}" in done.stdout


def test_a_run_with_dp_seed_leaves_no_claim_on_its_images(finished):
  told = rows.together(Chain(finished / "ledger", read_only=True))
  assert told["all private runs on these data: epsilon"] == "infinite"
  total = sum(cohort_of(SHORT).train.sizes)  # validation images are not used
  assert f"the worst of {total} units" in told["all private runs on these data: who"]
  assert f"{total} were in a run with dp_seed" in told["all private runs on these data: who"]
