"""Hospitals that score a finished model together: approvals, sums, reports and what is refused."""

import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
import scoring_world
from absl import flags
from experiments_apart import in_threads
from experiments_runs import NAMES, TINY, write_untrained
from scoring_world import BINS, FLOORLESS, IMAGES, SITES, again, approve, offer, pooled

from experiments import (
  admission,
  approving,
  binned_plots,
  evaluating,
  joining,
  model_files,
  plots,
  processes,
  report,
  settings,
  site_folders,
  together,
)
from experiments.configs.comparison import Comparison
from experiments.configs.data import Data
from experiments.configs.scoring import Scoring
from experiments.joining import Approve
from experiments.seating import Seating
from experiments.site_folders import Limits, Own
from primia_jax import approval, metrics, models
from primia_jax.approval import NotApproved
from primia_jax.secagg import roster
from primia_jax.secagg.errors import Aborted, Refused


def values_of(**given):
  """The flags of `primia-evaluate`, given and by default."""
  values = flags.FlagValues()
  for kind in (Data, Comparison, Scoring, Seating):
    settings.define_flags(kind, values)
  for name in ("run_dir", "output_dir", "classes"):
    flags.DEFINE_string(name, "", "", flag_values=values)
  for name in ("seed", "fewest_patients", "overlays"):
    flags.DEFINE_integer(name, 0, "", flag_values=values)
  flags.DEFINE_boolean("unlabelled", False, "", flag_values=values)
  values.set_default("data", "")
  values(["program", *(f"--{name}={value}" for name, value in given.items())])
  return values


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
  """Three hospitals and a coordinator that have approved one evaluation; tests copy it."""
  root = scoring_world.make(tmp_path_factory.mktemp("federation"))
  (root / "own").mkdir()
  shutil.copyfile(root / "coordinator" / "identity", root / "own" / "coordinator")
  return root


@pytest.fixture
def copied(federation, tmp_path):
  return again(federation, tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
  """Pictures are empty files, and the intervals rough."""
  touch = lambda *args: next(a for a in args if hasattr(a, "touch")).touch()
  for module, name in ((plots, "confusion_matrix"), (plots, "roc"), (binned_plots, "roc"),
                       (binned_plots, "reliability")):  # fmt: skip
    monkeypatch.setattr(module, name, touch)
  monkeypatch.setattr(report, "NUM_RESAMPLES", 20)


def start(root, i, **given):
  """A site's process, up to its reports; its folder of results."""
  at = str(root / f"site_{i}")
  site = admission.of(at, approving.EVALUATION)
  together.score(values_of(**{"run_dir": at, "same_user": True} | given), site, "no module")
  return site.run


def run_all(root, patch, one=start):
  """A start of all processes, as threads: (results, errors)."""
  held = {}

  def call(i, carriers):
    held["carriers"] = carriers
    return one(root, i)

  meet = lambda config, seat, told: processes.meet(
    config, held["carriers"][seat.number], seat, told
  )
  with patch.context() as patched:
    patched.setattr(processes, "connect", meet)
    return in_threads(call, SITES, root)


def test_sums_of_hospitals_are_the_scores_of_all_images_in_one_place(
  copied, monkeypatch, no_pictures
):
  """To the last count, and each site's own report is in its own folder alone."""
  results, errors = run_all(copied, monkeypatch)
  assert errors == {}
  labels, probabilities, patients = pooled(copied)
  want = metrics.score_counts(labels, probabilities, patients, BINS, 15)
  texts = set()
  for i in SITES:
    found = json.loads((results[i] / "metrics.json").read_text())
    np.testing.assert_array_equal(found["scores in bins"], want.table)
    np.testing.assert_array_equal(found["confusion_matrix"], want.confusion)
    np.testing.assert_array_equal(found["calibration in bins"][:2], want.calibration[:2])
    np.testing.assert_allclose(found["calibration in bins"][2], want.calibration[2], atol=1e-2)
    assert (found["num_examples"], found["num_patients"]) == (72, 36)
    said = (labels == probabilities.argmax(1)).mean()
    assert found["scores"]["accuracy"]["value"] == pytest.approx(said)
    area = found["scores"]["macro_roc_auc"]
    assert abs(area["value"] - metrics.macro_roc_auc(labels, probabilities)) <= area["error"]
    ece = found["expected_calibration_error"]
    exact = metrics.expected_calibration_error(labels, probabilities)
    assert abs(ece["value"] - exact) <= ece["error"]
    alike = found["variance of accuracy by patients over that by images"]
    assert alike == pytest.approx(72 * metrics.clustered_deviation(want) ** 2 / (said * (1 - said)))
    assert found["sites"] == [0, 1, 2]
    texts.add((results[i] / "report.md").read_text().partition("## Versions")[0])
    own = json.loads((results[i] / "own" / "metrics.json").read_text())
    assert own["num_examples"] == IMAGES[i]
    assert len((results[i] / "own" / "predictions.csv").read_text().splitlines()) == IMAGES[i] + 1
    assert site_folders.notes(copied / f"site_{i}")[-1]["did"] == "scored"
    assert oct((results[i] / "own").stat().st_mode)[-3:] == "700"
  assert len(texts) == 1  # the pooled report has nothing of one site
  disclosed = (results[0] / "disclosure.md").read_text()
  assert "| counts of scores | each site | coordinator and sites | 3 |" in disclosed
  assert "counts are exact" in texts.pop()


def test_a_sum_is_opened_once_and_a_restart_reports_from_it(
  copied, monkeypatch, no_pictures, capsys
):
  results, errors = run_all(copied, monkeypatch)
  assert errors == {}
  before = (results[1] / "report.md").read_text()
  (results[1] / "report.md").unlink()
  monkeypatch.setattr(processes, "connect", lambda *args: pytest.fail("another sum was begun"))
  start(copied, 1)
  assert (results[1] / "report.md").read_text() == before
  assert "the sum was opened before" in capsys.readouterr().out
  (results[1] / evaluating.SUMS).write_text("{")
  with pytest.raises(ValueError, match=r"sums\.json is damaged .*; restore it"):
    start(copied, 1)


def lose_site_1(monkeypatch):
  """Its program ends before it counts; returns what it would have run."""
  held = evaluating.agreed

  def agreed(number, *given):
    if number == 1:
      raise OSError("its machine is gone")
    return held(number, *given)

  monkeypatch.setattr(evaluating, "agreed", agreed)
  return held


def test_a_site_that_is_lost_is_in_no_count(copied, monkeypatch, no_pictures):
  """Of three, where two are enough: the sum is that of the others, and says so."""
  offer(copied, "--score_bins=16 --secagg_threshold=2 --secagg_colluding=0")
  for i in SITES:
    approve(copied, i)
  lose_site_1(monkeypatch)
  results, errors = run_all(copied, monkeypatch)
  assert set(errors) == {1}
  found = json.loads((results[0] / "metrics.json").read_text())
  assert found["sites"] == [0, 2]
  assert found["num_examples"] == IMAGES[0] + IMAGES[2]


def test_the_same_images_are_not_scored_again_without_a_site(copied, monkeypatch, no_pictures):
  """Another approval, of other bins, and site 1 is lost: its counts would be the difference."""
  weak = "--secagg_threshold=2 --secagg_colluding=0"
  offer(copied, f"--score_bins=16 {weak}")
  for i in SITES:
    approve(copied, i)
  assert run_all(copied, monkeypatch)[1] == {}
  offer(copied, f"--score_bins=8 {weak}")
  for i in SITES:
    approve(copied, i)
  held = lose_site_1(monkeypatch)
  _, errors = run_all(copied, monkeypatch)
  for i in (0, 2):
    with pytest.raises(Refused, match=r"counted with this model before.*\['hospital-1'\] besides"):
      raise errors[i]
  monkeypatch.setattr(evaluating, "agreed", held)
  assert run_all(copied, monkeypatch)[1] == {}  # with it, they are


def test_the_largest_floor_of_all_sites_holds_in_every_report(copied, monkeypatch, no_pictures):
  """Of one hospital with a floor, also in the reports of the others; without it counts are told."""
  floor = Limits(fewest_patients=9)
  member = site_folders.read(copied / "site_1")
  site_folders.write(copied / "site_1", dataclasses.replace(member, limits=floor))
  results, errors = run_all(copied, monkeypatch)
  assert errors == {}
  labels, probabilities, patients = pooled(copied)
  counts = metrics.score_counts(labels, probabilities, patients, BINS).patients
  small = counts < 9
  assert small.any()
  for i in SITES:
    found = json.loads((results[i] / "metrics.json").read_text())
    cells = np.array(found["confusion_matrix"], object)
    assert all(cell == "suppressed (<9)" for cell in cells[small])
    assert found["scores"]["accuracy"] == found["scores"]["mcc"] == "suppressed (<9)"
    assert set(found["scores"]["sensitivity"].values()) == {"suppressed (<9)"}
    assert found["scores in bins"] is found["calibration in bins"] is None
    assert "suppressed (<9)" in (results[i] / "report.md").read_text()
    assert not list(results[i].glob("*.png"))


def test_what_a_site_approves_is_one_model_with_its_classes_in_one_order(copied, capsys):
  (copied / "other").mkdir()
  write_untrained(copied / "other", NAMES)
  about = json.loads((copied / "other" / "model.json").read_text())
  config = TINY.model.config(TINY.data, 3)
  model_files.save_model(copied / "other" / "model", [models.build(config).init(jax.random.key(9))])
  with pytest.raises(
    ValueError, match=r"other parameters: model_sha256=\w+, and the coordinator of"
  ):
    approve(copied, 0, model="other")
  shutil.copytree(copied / "model", copied / "turned")
  turned = about | {"label_names": ["dog", "cat", "owl"]}
  (copied / "turned" / "model.json").write_text(json.dumps(turned))
  with pytest.raises(ValueError, match=r"another order of them: label_names=dog,cat,owl, and the"):
    approve(copied, 0, model="turned")
  with pytest.raises(ValueError, match="model is empty"):
    joining.approve(str(copied / "site_0"), Approve(str(copied / "coordinator/config.json")))
  capsys.readouterr()
  approve(copied, 1)
  first, second = capsys.readouterr().out.splitlines()
  assert "approved the evaluation of mlp, model " in first
  assert (
    "in 16 bins, by 3 sites, exact counts, no privacy; a sum opens once 3 of 3 sites answer, at "
    "most 1 site may collude; here 18 images; none of owl, which is allowed" in first
  )
  digest = approval.digest(site_folders.approved(copied / "site_2"))
  assert roster.spoken(digest) in second
  joining.status(str(copied / "site_1"))
  said = capsys.readouterr().out
  assert "18 images of 9 patients: cat" in said
  assert "approved evaluation of mlp (" in said


def test_a_site_without_images_or_beyond_its_limits_approves_nothing(copied):
  at, member = copied / "site_0", site_folders.read(copied / "site_0")
  change = lambda own, limits: site_folders.write(
    at, dataclasses.replace(member, own=own, limits=limits)
  )
  before = (at / "approval.json").read_bytes()
  empty = Own(f"folder:{copied / 'empty'}")
  (copied / "empty").mkdir()
  for own, limits, words in (
    (empty, FLOORLESS, "holds no images to score"),
    (Own("none"), FLOORLESS, "holds no images to score"),
    (member.own, Limits(fewest_images=99), "fewer than fewest_images=99 images"),
    (member.own, Limits(fewest_colluding=2), "fewest_colluding=2 of this site, and sums of"),
    (member.own, Limits(fewest_sites=4), "a sum over 3 sites; this site's policy needs at least 4"),
    (member.own, Limits(leaves="noised counts,metrics"),
     "exact counts may not leave this site.* offer one with --dp_count_noise"),
  ):  # fmt: skip
    change(own, limits)
    with pytest.raises(ValueError, match=words):
      approve(copied, 0)
  assert (at / "approval.json").read_bytes() == before
  change(member.own, Limits(fewest_patients=50))
  approve(copied, 0)
  with pytest.raises(ValueError, match="fewest_patients=50 of this site: it has fewer patients"):
    start(copied, 0)
  assert site_folders.notes(at)[-1]["did"] == "refused"
  change(Own("none"), FLOORLESS)
  with pytest.raises(ValueError, match=r"data=none in .*has nothing to score"):
    start(copied, 0)


def test_what_was_not_approved_is_refused_before_the_others_are_met(copied, monkeypatch):
  monkeypatch.setattr(processes, "connect", lambda *args: pytest.fail("it met the others"))
  refused = lambda words, **given: pytest.raises(NotApproved, match=words)
  with refused("score_bins=32 where 16 was approved"):
    start(copied, 0, score_bins=32)
  with pytest.raises(ValueError, match=r"channel_dir='': the channel would lie in .*--same_user"):
    start(copied, 0, same_user=False)
  own = copied / "site_0"
  Seating(channel_dir=str(copied)).check_channel(own)
  with pytest.raises(ValueError, match=r"channel_dir=.*would lie in"):
    Seating(channel_dir=str(own / "runs")).check_channel(own)
  with pytest.raises(ValueError, match=r"data=phantom: images and floors of this site are in"):
    start(copied, 0, data="phantom")
  with pytest.raises(ValueError, match="overlays=3 with placement=flower"):
    start(copied, 0, overlays=3)
  site = admission.of(str(copied / "site_0"), approving.EVALUATION)
  config = TINY.model.config(TINY.data, 3)
  model_files.save_model(site.run / "model", [models.build(config).init(jax.random.key(9))])
  with refused("other starting parameters"):
    start(copied, 0)
  with refused(r"this site has approved a run of primia-evaluate; start that"):
    admission.of(str(copied / "site_0"))
  with pytest.raises(ValueError, match="is the coordinator's folder, which scores nothing"):
    admission.of(str(copied / "coordinator"), approving.EVALUATION)


def test_sites_that_score_different_things_refuse_each_other():
  own = {"model": "aa", "classes": ["x", "y"], "fewest_patients": 3}
  told = lambda **change: json.dumps(own | change).encode()
  both = lambda theirs: evaluating.agreed(0, own, {0: told(), 1: theirs}, 100)
  assert both(told(fewest_patients=7)) == 7
  for theirs, words in (
    (told(model="bb"), "site 1 scores the model bb, and this site aa"),
    (told(classes=["y", "x"]), r"site 1 has the classes \['y', 'x'\], and this site \['x', 'y'\]"),
    (told(fewest_patients=-1), "site 1 has not told what it scores"),
    (told(fewest_patients=101), "site 1 has not told what it scores .*most_images=100"),
    (b"[" * 9999, "site 1 has not told what it scores"),
    (b"3", "site 1 has not told what it scores"),
  ):
    with pytest.raises(Refused, match=words):
      both(theirs)


def test_another_approval_ends_the_evaluation_for_all(copied, monkeypatch, no_pictures):
  """Site 1 has approved other bins: nobody sends a count."""
  config = copied / "coordinator" / "config.json"
  shutil.copyfile(config, copied / "first.json")
  offer(copied, "--score_bins=8")
  approve(copied, 1)
  results, errors = run_all(copied, monkeypatch)
  assert results.keys() <= {"coordinator"}
  assert "site 1 has approved" in str(errors[0])
  assert all(isinstance(errors[i], Aborted) for i in SITES)
  assert not list(copied.glob(f"site_*/runs/*/{evaluating.SUMS}"))


def test_what_the_coordinator_offers(copied, capsys):
  for text, words in (
    (
      "--label_names=a,b",
      "label_names=a,b in settings: the model or the roster says 'cat,dog,owl'",
    ),
    ("--num_sites=4", "num_sites=4 in settings: the model or the roster says 3"),
    ("--score_bins=1", "score_bins=1 must be at least 2"),
    ("--most_images=9000000", "most_images=9000000 at each of num_sites=3"),
    ("--held_out=1", "held_out=1.0 must lie in"),
    ("--rounds=3", "--rounds is not a flag"),
    ("--multi_label --data=csv:x", "multi_label with placement=flower"),
    ("--secagg_colluding=2", "secagg_colluding=2 of 3 sites"),
    ("--score_bins='8", "close the quotes"),
  ):
    with pytest.raises(ValueError, match=words):
      offer(copied, text)
  settings.save(settings.replace(TINY, seed=7, test_fraction=0.3), copied / "model" / "config.json")
  capsys.readouterr()
  offer(copied)
  assert "mlp, model " in capsys.readouterr().out
  saved = settings.load(copied / "coordinator" / "config.json")
  assert (saved["seed"], saved["held_out"]) == (7, 0.3)  # of the training
  assert os.stat(copied / "coordinator" / "config.json").st_mode & 0o077 == 0
