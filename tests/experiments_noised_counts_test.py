"""Hospitals that let only noised counts leave score a model together, and their ledgers pay."""

import dataclasses
import json
import math

import numpy as np
import pytest
from experiments_together_test import copied, federation, run_all, start  # noqa: F401
from scoring_world import BINS, SITES, approve, offer, pooled

from experiments import evaluating, ledgers, noised_counts, noised_report, processes, site_folders
from experiments.configs.data import Data
from experiments.configs.scoring import Evaluate, Scoring
from experiments.site_folders import Limits
from primia_jax import metrics, score_noise
from primia_jax.privacy import histories
from primia_jax.privacy.chain import Chain

NOISE = 2.0
ONLY_NOISED = Limits(fewest_patients=5, leaves="noised counts")


def limit(root, limits):
  for i in SITES:
    member = site_folders.read(root / f"site_{i}")
    site_folders.write(root / f"site_{i}", dataclasses.replace(member, limits=limits))


@pytest.fixture
def noisy(copied):  # noqa: F811
  """Hospitals that have approved an evaluation with noise, and let nothing else leave."""
  limit(copied, ONLY_NOISED)
  offer(copied, f"--score_bins={BINS} --dp_count_noise={NOISE}")
  for i in SITES:
    approve(copied, i)
  return copied


def charges(root, i):
  """What a site's own ledger was charged: [(release, units)]."""
  chain = Chain(root / f"site_{i}" / "ledger", read_only=True)
  of_run = [(one.ledger.releases, one.num_units) for one in histories.histories(chain)]
  return [(release, num) for releases, num in of_run for release in releases]


def test_only_noised_counts_leave_and_each_site_is_charged_for_them(noisy, monkeypatch, capsys):
  results, errors = run_all(noisy, monkeypatch)
  assert errors == {}
  labels, probabilities, patients = pooled(noisy)
  exact = [a / 2 for a in metrics.shared_counts(labels, probabilities, patients, BINS, 2)]
  deviation = math.sqrt(3 * score_noise.variance(3, BINS, 100_000, NOISE))
  texts = set()
  for i in SITES:
    found = json.loads((results[i] / "metrics.json").read_text())
    off = np.concatenate([
      (np.array(found["confusion_matrix"]) - exact[0]).ravel(),
      (np.array(found["scores in bins"]) - exact[1]).ravel(),
    ])  # fmt: skip
    assert np.abs(off).max() < 6 * deviation
    assert 0.75 < off.std() / deviation < 1.3  # of 153 numbers
    assert found["standard deviation of a count"] == pytest.approx(deviation)
    accuracy = found["scores"]["accuracy"]
    assert accuracy["low"] < accuracy["value"] < accuracy["high"]
    text = (results[i] / "report.md").read_text()
    assert f"Every count carries noise of standard deviation {deviation:.1f}" in text
    assert "suppressed" not in text
    texts.add(text.partition("## Versions")[0])
    assert not list(results[i].glob("*.png"))
    ((release, num),) = charges(noisy, i)
    assert (release, num) == (score_noise.release(3, NOISE), len(np.unique(
      patients[[name.startswith(f"{i}-") for name in patients]]
    )))  # fmt: skip
    own = json.loads((results[i] / "own" / "metrics.json").read_text())
    assert f"this is the ledger of site {i} alone" in json.dumps(own["config"])
    journal = [one for one in site_folders.notes(noisy / f"site_{i}") if one["did"] == "charged"]
    assert journal[-1]["ledger"] == Chain(noisy / f"site_{i}" / "ledger", read_only=True).last
  assert len(texts) == 1
  disclosed = (results[0] / "disclosure.md").read_text()
  epsilon = Scoring(dp_count_noise=NOISE).cost(3).epsilon(1)
  spent = ledgers.spent(Chain(noisy / "site_0" / "ledger", read_only=True))
  assert spent == pytest.approx(epsilon)
  assert f"| epsilon {math.ceil(epsilon * 1e4) / 1e4} to the patients of each site |" in disclosed
  assert "noise of deviation 2, and masks" in disclosed
  # Started again, a site reports from the sum, and pays nothing.
  monkeypatch.setattr(processes, "connect", lambda *args: pytest.fail("another sum was begun"))
  (results[1] / "report.md").unlink()
  start(noisy, 1)
  assert (results[1] / "report.md").read_text().partition("## Versions")[0] in texts
  assert [release.times for release, _ in charges(noisy, 1)] == [1]


def test_a_start_that_ends_after_its_charge_is_charged_again(noisy, monkeypatch):
  """Its noise may have left with its counts, and the next start draws another."""
  held = evaluating.noised_counts.counted

  def counted(*given):
    raise OSError("its machine is gone")

  monkeypatch.setattr(evaluating.noised_counts, "counted", counted)
  _, errors = run_all(noisy, monkeypatch)
  assert set(errors) >= set(SITES)
  monkeypatch.setattr(evaluating.noised_counts, "counted", held)
  _, errors = run_all(noisy, monkeypatch)
  assert errors == {}
  assert [release.times for release, _ in charges(noisy, 0)] == [2]


def test_what_a_site_s_limits_do_not_allow(noisy, monkeypatch, capsys):
  monkeypatch.setattr(processes, "connect", lambda *args: pytest.fail("it met the others"))
  limit(noisy, dataclasses.replace(ONLY_NOISED, max_epsilon=1.0))
  with pytest.raises(ValueError, match=r"max_epsilon=1 of this site: .* would cost with this one"):
    start(noisy, 0)
  assert charges(noisy, 0) == []
  limit(noisy, Limits(leaves="exact counts,metrics"))
  with pytest.raises(ValueError, match="noised counts may not leave this site"):
    start(noisy, 0)
  limit(noisy, ONLY_NOISED)
  offer(noisy, "--dp_count_noise=4")
  capsys.readouterr()
  approve(noisy, 0)
  assert "counts with noise of deviation 4, which costs epsilon 2." in capsys.readouterr().out
  offer(noisy)
  with pytest.raises(ValueError, match=r"exact counts may not leave .* --dp_count_noise"):
    approve(noisy, 0)
  (noisy / "site_1" / "ledger" / "ledger.jsonl").unlink()
  with pytest.raises(FileNotFoundError, match="this site's ledger is missing"):
    start(noisy, 1)


@pytest.mark.parametrize(
  ("noise", "words"), [(-1.0, "must be finite"), (1e9, "dp_count_noise=1e.09.* lower most_images")]
)
def test_noise_that_cannot_be_is_refused(noise, words):
  with pytest.raises(ValueError, match=words):
    Scoring(dp_count_noise=noise)


def test_the_report_of_more_images_than_noise_is_narrow():
  rng = np.random.default_rng(0)
  confusion = np.diag([4000.0, 3000.0]) + 500
  table = np.zeros((2, 2, 4))
  table[:, 1] = [[3000, 1000, 400, 100], [100, 400, 1000, 2000]]
  table[:, 0] = table[:, 1, ::-1]
  noisy_ones = [a + rng.normal(0, 3, a.shape) for a in (confusion, table)]
  config = Evaluate(scoring=Scoring(dp_count_noise=3.0))
  counts = metrics.NoisedCounts(*noisy_ones, noised_report.variance(config, 2, 3))
  found = noised_report.result(config, ["a", "b"], counts, [0, 1, 2])
  accuracy = found["scores"]["accuracy"]
  assert accuracy["value"] == pytest.approx(8000 / 9000, abs=5e-3)
  assert accuracy["high"] - accuracy["low"] < 0.02
  assert found["roc_auc"]["b"]["value"] == pytest.approx(
    metrics.binned_roc_auc(table[1, 1], table[0, 1]).value, abs=5e-3
  )


def test_a_trial_charges_the_ledger_that_a_training_on_the_same_images_has(tmp_path):
  sources = [tmp_path / f"images_{i}.npz" for i in range(3)]
  for source in sources:
    np.savez(source, test_images=np.zeros((1, 4, 4), np.uint8), test_labels=np.zeros(1, int))
  named = ",".join(f"npz:{source}" for source in sources)
  apart = Evaluate(data=Data(data="", site_data=named))
  folder = lambda config, i: noised_counts.ledger_folder(config, "", tmp_path / "own", i)
  assert folder(apart, 2) == tmp_path / "images_2.npz.ledger"
  shared = Evaluate(data=Data(data=f"npz:{sources[0]}"))
  assert folder(shared, 1) == tmp_path / "images_0.npz.ledger"
  assert folder(Evaluate(data=Data(data="phantom")), 1) == tmp_path / "own" / "ledger"
