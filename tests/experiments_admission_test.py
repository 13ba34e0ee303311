"""What a hospital's process refuses before it works, by its own folder; and an approved run."""

import dataclasses
import json
import pathlib
import shutil
import threading

import jax
import numpy as np
import pytest
from experiments_apart import in_threads
from experiments_runs import NAMES, SITE, flags_of, write_untrained

from experiments import (
  admission,
  approving,
  joining,
  model_files,
  offering,
  processes,
  report,
  running,
  settings,
  site_folders,
  starts,
  suppression,
)
from experiments.configs.model import Model
from experiments.configs.run import build_site_level
from experiments.joining import Approve, Init, Join
from experiments.offering import Offer
from experiments.site_folders import Limits, Own
from primia_jax import approval, models
from primia_jax.approval import NotApproved
from primia_jax.attacks import detection
from primia_jax.privacy import accounting
from primia_jax.privacy.chain import Chain
from primia_jax.secagg import roster

SITES = range(3)
RUN = settings.replace(
  SITE, rounds=2, dp_seed=-1, placement="flower", validation_fraction=0.3,
  label_names=",".join(NAMES), data="folder:x", noise_multiplier=2.0,
)  # fmt: skip
ORDINARY = Limits(fewest_patients=3, max_epsilon=50.0)
HIDING = dataclasses.replace(ORDINARY, fewest_patients=4, fewest_sites=3)  # site 2's


def flags_for(config):
  return " ".join(f"'{flag}'" for flag in flags_of(config) if not flag.startswith("--data="))


def change(folder, **parts):
  """Edits `site.toml`, as the operator may."""
  member = site_folders.read(folder)
  site_folders.write(folder, dataclasses.replace(member, **parts))


def approve(root, site, config=RUN):
  path = root / f"offered_{site}.json"
  settings.save(offering.configuration(flags_for(config), 3), path)
  joining.approve(str(root / f"site_{site}"), Approve(str(path)))


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
  """Three hospitals and a coordinator that have all approved one run; tests copy it."""
  root = tmp_path_factory.mktemp("federation")
  for i in SITES:
    kinds = np.arange(12) % 3
    images = np.random.default_rng(i).integers(0, 256, (12, 16, 16)).astype(np.uint8)
    np.savez(root / f"images_{i}.npz", train_images=images, train_labels=kinds)
    at, own = str(root / f"site_{i}"), Own(f"npz:{root / f'images_{i}.npz'}")
    joining.init(at, Init(i, f"hospital-{i}"), own, HIDING if i == 2 else ORDINARY)
  at = root / "coordinating"
  joining.init(str(at), Init(-1, "coordinator", "coordinator"), Own(), Limits())
  parts = ",".join(str(root / f"site_{i}" / "public.json") for i in SITES)
  joining.rosters(str(at), Join("lungs", parts))
  file = at / "roster.json"
  digest = roster.spoken(roster.digest(roster.decode(file.read_bytes())))
  offering.offer(str(at), Offer(flags_for(RUN)))
  for i in SITES:
    joining.rosters(str(root / f"site_{i}"), Join(accept=str(file), digest=digest))
    joining.approve(str(root / f"site_{i}"), Approve(str(at / "config.json")))
  (root / "own").mkdir()
  shutil.copyfile(at / "identity", root / "own" / "coordinator")
  return root


@pytest.fixture
def copied(federation, tmp_path):
  return again(federation, tmp_path)


def again(root, new):
  shutil.copytree(root, new, dirs_exist_ok=True)
  for i in SITES:
    (new / f"site_{i}").chmod(0o700)
  return new


def admitted(root, i, given=()):
  """A site's process up to its first message."""
  site = admission.of(str(root / f"site_{i}"))
  config = admission.configured(site, dict(given))
  admission.admit(site, config)
  return site, config


def run_apart(root, patch):
  """A start of all three processes, as threads, without their reports: (results, errors)."""
  held = {}

  def one(i, carriers):
    held["carriers"] = carriers
    site, config = admitted(root, i)
    seat = processes.Seat(i, 300.0, site.folder, site)
    return running.run(config, running.open_run(config, str(site.run)), federated=True, seat=seat)

  connect = lambda config, seat, told: processes.meet(
    config, held["carriers"][seat.number], seat, told
  )
  alone, save = threading.Lock(), model_files.save_model
  of_round, floors = suppression.of_round, set()

  def of_lines(row, policy, *rest):
    floors.add(policy.fewest_patients)
    return of_round(row, policy, *rest)

  def write_report(*args, facts, **options):
    return facts.privacy | {"policy": facts.policy, "floors of lines": set(floors)}

  def save_in_turn(*args):  # orbax's saves share state within a process
    with alone:
      save(*args)

  with patch.context() as patched:
    patched.setattr(model_files, "save_model", save_in_turn)
    patched.setattr(report, "write_report", write_report)
    patched.setattr(suppression, "of_round", of_lines)
    patched.setattr(processes, "connect", connect)
    return in_threads(one, SITES, root)


@pytest.fixture(scope="module")
def trained(federation, tmp_path_factory):
  root = again(federation, tmp_path_factory.mktemp("trained"))
  with pytest.MonkeyPatch.context() as patch:
    results, errors = run_apart(root, patch)
  assert errors == {}
  return root, results


def did(root, i):
  return [one["did"] for one in site_folders.notes(root / f"site_{i}")]


def test_an_approved_run_trains_in_the_site_s_own_folder(trained, capsys):
  root, results = trained
  digests = set()
  for i in SITES:
    site, _ = admitted(root, i)
    rounds = ["charged", "round"] * 2
    assert did(root, i) == ["init", "roster", "approve", "start", *rounds]
    *_, start, _, first, _, last = site_folders.notes(site.folder)
    assert start["approval"] == approval.digest(site.approved).hex()
    assert [(one["round"], one["survivors"]) for one in (first, last)] == [(1, 3), (2, 3)]
    chain = Chain(site.ledger, read_only=True)
    assert results[i]["ledger"] == str(chain.path)
    assert 0 < first["epsilon"] < last["epsilon"]
    digests.add(site.run.name)
    assert (site.run / "model").is_dir()
    joining.status(str(site.folder))
    said = capsys.readouterr().out
    assert "2 rounds" in said
    assert f"epsilon {last['epsilon']:.4g} of 50 spent" in said
  assert len(digests) == 1


def test_the_largest_floor_of_all_sites_holds_in_what_each_writes(trained):
  root, results = trained
  for i in SITES:
    assert results[i]["policy"].fewest_patients == 4
    assert results[i]["floors of lines"] == {4}
    assert results[i]["policy"].fewest_sites == (3 if i == 2 else 2)  # its own
    assert not list((root / f"site_{i}").rglob(running.PREDICTIONS))


def test_a_site_looks_at_models_whatever_the_configuration_says(copied, monkeypatch):
  site, config = admitted(copied, 0)
  assert not config.federation.refuse_suspicious_models
  blind = dataclasses.replace(site.member, limits=Limits(looks_at_models=False))
  assert admission.looking(site._replace(member=blind), config) is config

  def refuse(scores, limits, number):
    raise ValueError(f"site {number} has looked")

  monkeypatch.setattr(detection, "refuse", refuse)
  _, errors = run_apart(copied, monkeypatch)
  assert any(f"site {i} has looked" in str(errors[i]) for i in SITES)
  assert not any("round" in did(copied, i) for i in SITES)


def test_what_its_operator_has_not_approved_is_refused_before_work(copied, monkeypatch):
  refused = lambda words, **given: pytest.raises(NotApproved, match=words)
  with refused("rounds=9 where 2 was approved"):
    admitted(copied, 0, {"rounds": 9})
  with pytest.raises(
    ValueError, match=r"data='phantom': this site's images are named in .*site\.toml"
  ):
    admitted(copied, 0, {"data": "phantom"})
  at = copied / "site_0"
  assert site_folders.notes(at)[-1]["did"] == "refused"
  with monkeypatch.context() as patch:
    patch.setattr(approving, "code", lambda: "1 another")
    with refused("other code: 1 another where .* was approved"):
      admitted(copied, 0)
  initial = Model.initial

  def with_imprint(self, config, key):
    params, state = initial(self, config, key)
    return {"imprint": np.zeros((4, 4), np.float32), **params}, state

  with monkeypatch.context() as patch:
    patch.setattr(Model, "initial", with_imprint)
    with refused(r"architecture: .*imprint.* is float32\[4, 4\] where no such parameter was appro"):
      admitted(copied, 0)
  (at / "approval.json").unlink()
  with refused("nothing is approved at this site.*primia-site approve --site_dir"):
    admitted(copied, 0)
  assert not (at / "runs").exists()


def test_other_starting_parameters_are_refused(copied):
  """The configuration names a model's folder; somebody replaces the model in it."""
  (weights := copied / "weights").mkdir()
  write_untrained(weights, NAMES)
  approve(copied, 0, settings.replace(RUN, pretrained=str(weights)))
  _, config = admitted(copied, 0)
  other = models.build(config.model.config(config.data, 3)).init(jax.random.key(1))
  model_files.save_model(weights / "model", [other])
  with pytest.raises(NotApproved, match=r"other starting parameters: \w+ where \w+ was approved"):
    admitted(copied, 0)


def test_a_folder_that_does_not_fit_the_roster_is_refused(copied):
  at = copied / "site_0"
  change(at, number=1)
  with pytest.raises(ValueError, match=r"number=1 in .*roster 1 does not have this folder's key"):
    admitted(copied, 0)
  change(at, number=0)
  change(at, own=Own("none"))
  with pytest.raises(ValueError, match=r"data=none in .*has nothing to score"):
    admission.of(str(at), approving.EVALUATION)
  (copied / "site_1" / "roster.json").unlink()
  with pytest.raises(FileNotFoundError, match="no roster was accepted"):
    admitted(copied, 1)
  with pytest.raises(ValueError, match="is the coordinator's folder, which trains nothing"):
    admission.of(str(copied / "coordinating"))
  with pytest.raises(ValueError, match=r"site=2, and number=0 in .*site\.toml"):
    admission.number(admission.Site(at, site_folders.Member(0, "a"), None), 2)
  assert admission.of(str(copied)) is None


@pytest.mark.parametrize(
  ("limits", "words"),
  [
    (Limits(fewest_patients=50), "fewest_patients=50 of this site: it would tell the others"),
    (Limits(fewest_patients=4, fewest_images=99), "fewer than fewest_images=99 images"),
    (Limits(fewest_patients=4, max_epsilon=0.5), "would cost with this one epsilon .* 0 is spent"),
  ],
)
def test_a_run_beyond_a_site_s_limits_is_refused_before_it_trains(
  copied, monkeypatch, limits, words
):
  change(copied / "site_1", limits=limits)
  results, errors = run_apart(copied, monkeypatch)
  assert results.keys() <= {"coordinator"}
  with pytest.raises(ValueError, match=words):
    raise errors[1]
  assert not any("round" in did(copied, i) for i in SITES)
  assert did(copied, 1)[-1] == "refused"
  assert "start" not in did(copied, 1)
  chain = Chain(copied / "site_1" / "ledger", read_only=True)
  assert not [entry for entry in chain.entries if entry["kind"] == "charge"]


def test_what_is_spent_counts_together_with_what_a_run_will_cost(trained, tmp_path):
  root = again(trained[0], tmp_path)
  at = root / "site_0"
  plan = build_site_level(RUN, 3)
  of_rounds = lambda n: accounting.epsilon(plan.spent(n))
  site, _ = admitted(root, 0)
  for limit, done, left in ((2, 2, 0), (5, 0, 3), (4, 0, 3), (2, 0, 1)):
    bound = 1.001 * of_rounds(limit)
    member = dataclasses.replace(site.member, limits=Limits(max_epsilon=bound))
    check = lambda site, done=done, left=left: admission.check_budget(
      site, plan, Chain(at / "ledger"), done + left, done, counted=False
    )
    if 2 + left <= limit:
      check(site._replace(member=member))
      continue
    with pytest.raises(ValueError, match=rf"epsilon {of_rounds(2 + left):.4g}, of which"):
      check(site._replace(member=member))
  change(at, limits=Limits(fewest_patients=4, max_epsilon=0.999 * of_rounds(2)))
  admitted(root, 0)  # the run that has spent it can still be started, e.g. to write its report
  approve(root, 0, settings.replace(RUN, rounds=1))
  with pytest.raises(ValueError, match=r"have cost epsilon .*; it trains nothing"):
    admitted(root, 0)


def test_a_ledger_that_was_deleted_or_put_back_is_missed(trained, tmp_path):
  path = again(trained[0], tmp_path) / "site_0" / "ledger" / "ledger.jsonl"
  first, *_ = path.read_bytes().splitlines(keepends=True)
  journal, whole = tmp_path / "site_0" / "journal.jsonl", path.read_bytes()
  *noted, _ = journal.read_bytes().splitlines(keepends=True)  # killed before its round is noted
  assert json.loads(noted[-1])["did"] == "charged"
  journal.write_bytes(b"".join(noted))
  path.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
  with pytest.raises(ValueError, match=r"ledger\.jsonl has lost entries: the journal"):
    admitted(tmp_path, 0)
  path.write_bytes(first)
  with pytest.raises(ValueError, match=r"ledger\.jsonl has lost entries: the journal"):
    admitted(tmp_path, 0)
  path.unlink()
  with pytest.raises(FileNotFoundError, match="this site's ledger is missing; restore it"):
    admitted(tmp_path, 0)


def test_sites_that_approved_different_things_are_in_no_sum(copied, monkeypatch):
  approve(copied, 1, settings.replace(RUN, rounds=3))

  def call(i, carriers):
    site, config = admitted(copied, i)
    place, _ = processes.meet(config, carriers[i], processes.Seat(i, 300.0, site.folder, site))
    place.joined.exchange.close()
    return place.joined.exchange.label

  results, errors = in_threads(call, SITES, copied)
  assert results.keys() <= {"coordinator"}
  assert "site 1 has approved" in str(errors[0])
  assert "site 0 has approved" in str(errors[1])
  monkeypatch.setattr(processes, "_check_approved", lambda *_: None)
  results, errors = in_threads(call, SITES, copied)
  assert errors == {}
  assert results[0] == results[2] != results[1]


def test_a_state_that_is_not_finite_is_not_taken_up(copied, monkeypatch):
  """What site 1 would continue from holds NaN, as a colluding majority may have signed it."""
  catch_up = starts.catch_up

  def planted(joined, number, initial, checkpoints):
    kept = catch_up(joined, number, initial, checkpoints)
    if number != 1:
      return kept
    spoilt = jax.tree.map(lambda a: a * np.nan, kept.state.params)
    return kept._replace(state=kept.state._replace(params=spoilt))

  monkeypatch.setattr(starts, "catch_up", planted)
  results, errors = run_apart(copied, monkeypatch)
  assert results.keys() <= {"coordinator"}
  assert isinstance(errors[1], NotApproved)
  assert "not finite" in str(errors[1])
  assert all("start" not in did(copied, i) for i in SITES)


def test_the_coordinator_offers_what_sites_approve(copied, capsys):
  offer = lambda text: offering.offer(str(copied / "coordinating"), Offer(text))
  capsys.readouterr()
  offer(flags_for(RUN))
  first, second = capsys.readouterr().out.splitlines()
  assert "mlp, 2 rounds, dp=site, for 3 sites" in first
  assert roster.spoken(approval.digest(site_folders.approved(copied / "site_2"))) in second
  saved = json.loads((copied / "coordinating" / "config.json").read_text())["settings"]
  assert saved["federation"]["placement"] == "flower"
  for text, words in (
    ("", "settings is empty"),
    ("--rounds=3", "label_names is empty in the configuration"),
    ("--label_names=a,b --placement=scan", "placement=scan of the configuration"),
    ("--label_names=a,b --num_sites=4", "num_sites=4 in settings, and the roster has 3"),
    ("--label_names=a,b --round=4", "--round is not a flag"),
    ("--label_names='a", "close the quotes"),
    ("--label_names=a,b --preset=chest_xray", "partition=dirichlet"),
  ):
    with pytest.raises(ValueError, match=words):
      offer(text)
  with pytest.raises(ValueError, match="is the folder of a site; the coordinator offers"):
    offering.offer(str(copied / "site_0"), Offer("--rounds=2"))
  comma = Own("folder:/a,b")
  with pytest.raises(ValueError, match="a comma ends the name of a source"):
    approving.multiprocess({}, comma)
  assert pathlib.Path(copied / "coordinating" / "config.json").stat().st_mode & 0o077 == 0
