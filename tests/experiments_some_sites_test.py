"""Sites that each have a process: rounds of some of them, and normalisation that stays at them."""

import json

import jax
import numpy as np
import pytest
from experiments_apart import APART, arm_of, train_apart
from experiments_runs import PRIVATE, ledgers, train

from experiments import settings
from primia_jax.privacy import ledger
from primia_jax.privacy.chain import Chain

pytestmark = pytest.mark.slow

SOME = {"placement": "flower", "sites_per_round": 2, "secagg_colluding": 0, "class_weights": False}
SIMULATED = {"placement": "scan", "secagg_threshold": -1}


def test_each_site_s_ledger_is_charged_for_the_rounds_that_it_is_drawn_for(tmp_path):
  """As in one process; and nothing is claimed for the draw, which everyone knows."""
  config = settings.replace(PRIVATE, **SOME)
  arms, errors, _ = train_apart(tmp_path, config.training.rounds, config=config)
  assert errors == {}
  expected = train(settings.replace(config, **SIMULATED), tmp_path / "simulated")
  for arm in arms.values():
    for a, b in zip(*map(jax.tree.leaves, (arm.models[0], arms[0].models[0])), strict=True):
      np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (arm.models[0], expected.models[0])), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
    for name in ("sites", "epsilon"):
      assert [row[name] for row in arm.rows] == [row[name] for row in expected.rows]
  drawn = [row["sites"] for row in expected.rows]
  assert len(set(map(tuple, drawn))) > 1
  wanted = ledgers(tmp_path / "simulated")
  steps = wanted[0].releases[0].times // sum(0 in sites for sites in drawn)
  for i in range(3):
    path = tmp_path / "own" / f"site_{i}" / ledger.LEDGER
    assert ledger.of_run(path, Chain(path.with_name("ledger"), read_only=True)) == wanted
    (release,) = wanted[i].releases
    assert release.times == steps * sum(i in sites for sites in drawn)


def test_each_site_keeps_its_own_normalisation_and_goes_on_with_it(tmp_path):
  """Two of three sites in a round, stopped after the second; the third has its own, too."""
  config = settings.replace(
    APART, **SOME, rounds=3, algorithm="fedbn", model="cnn", norm="batch", width=0.25
  )
  _, errors, _ = train_apart(tmp_path, 2, config=config)
  assert errors == {}
  arms, errors, _ = train_apart(tmp_path, 3, config=config)
  assert errors == {}
  expected = train(settings.replace(config, **SIMULATED), tmp_path / "simulated")
  for i, arm in arms.items():
    assert [row["sites"] for row in arm.rows] == [row["sites"] for row in expected.rows]
    for a, b in zip(*map(jax.tree.leaves, (arm.models, expected.models[i])), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-4)
    for row, wanted in zip(arm.rows, expected.rows, strict=True):
      np.testing.assert_allclose(row["val_mcc"], wanted["val_mcc"], atol=1e-6)
    assert arm.facts["normalisation"].endswith("of this site's own")
  known = [json.loads((tmp_path / f"own/site_{i}/states.json").read_text()) for i in range(3)]
  assert known[0] == known[1] == known[2]  # of what they share
  scales = [np.asarray(arms[i].models[0][0]["norm1"]["scale"]) for i in range(3)]
  assert not np.array_equal(scales[0], scales[1])
  assert not np.array_equal(scales[0], scales[2])
  assert all((arm_of(tmp_path, i) / "checkpoints" / "3").is_dir() for i in range(3))
