"""Arms: what a report says of several on the same images, and what validation images change."""

import dataclasses

import jax
import numpy as np
import pytest
from experiments_runs import PRIVATE, SITE, cohort_of, trainer_of

from experiments import arms, ledgers, lines, running, settings
from primia_jax.privacy import accounting, ledger


def test_baselines_are_off_beside_a_private_run():
  asked = running.baselines
  assert asked(["auto"], settings.replace(PRIVATE, dp="none", noise_multiplier=0.0)) == [
    "pooled",
    "local",
  ]
  assert asked(["auto"], PRIVATE) == asked(["auto"], SITE) == asked([""], PRIVATE) == []
  assert asked(["local"], PRIVATE) == ["local"]
  with pytest.raises(ValueError, match=r"baselines=\['all'\]"):
    asked(["all"], PRIVATE)
  with pytest.raises(ValueError, match="all sites' images in one place"):
    asked(["pooled"], settings.replace(PRIVATE, placement="flower"))


def test_arms_on_the_same_images_are_composed():
  start, whole = (
    accounting.Ledger("example", 1e-3),
    "epsilon of all arms together, a unit of any one site",
  )
  ledger_of = lambda sigma, times: accounting.spend(
    start, accounting.gaussian("sums", sigma), times
  )
  federated, pooled, local = ledger_of(9.0, 9), ledger_of(4.0, 1), ledger_of(6.0, 4)
  spent = {
    "federated": {0: federated, 1: federated},
    "pooled": {0: pooled, 1: pooled},
    "local: site 1": {1: local},
  }
  told = ledgers.of_arms(spent)
  for name, one in (("federated", federated), ("pooled", pooled), ("local: site 1", local)):
    assert told[f"epsilon of the arm {name!r}"] == ledger.claim(accounting.epsilon(one))
  mu = (9 / 9**2 + 1 / 4**2 + 4 / 6**2) ** 0.5  # at site 1, which is in all three
  assert told[whole] == pytest.approx(accounting.epsilon(ledger_of(1 / mu, 1)), abs=2e-3)
  assert "NOT PRIVATE" not in told
  bare = ledgers.of_arms(spent | {"pooled": None})
  assert bare[whole] == bare["epsilon of the arm 'pooled'"] == "infinite"
  assert bare["NOT PRIVATE"].startswith("pooled: trained on the same images without privacy")
  assert ledgers.of_arms({"federated": {0: federated}}) == {}


@pytest.mark.slow
@pytest.mark.parametrize("config", [PRIVATE, SITE])
def test_a_report_names_the_epsilon_of_every_arm(config, tmp_path):
  """Arms without privacy, beside dp=site, make the whole report's epsilon infinite."""
  bare, config = config is SITE, settings.replace(config, rounds=1, dp_seed=-1)
  result = running.run(config, tmp_path, federated=True, baselines=("local",))
  told = {k: v for k, v in result["privacy"].items() if k.startswith("epsilon of")}
  assert len(told) == 1 + 3 + 1
  assert ("NOT PRIVATE" in result["privacy"]) == bare
  assert list(told.values()).count("infinite") == (4 if bare else 0)
  assert ("**NOT PRIVATE**" in (tmp_path / "report.md").read_text()) == bare


@pytest.mark.parametrize("validation", ["auto", pytest.param("exact", marks=pytest.mark.slow)])
def test_validation_images_change_nothing_that_leaves_a_private_run(validation, tmp_path):
  """Everything of them is replaced; with exact scores, which choose the model, that is seen."""
  config = settings.replace(PRIVATE, rounds=2, validation=validation)
  made, cohort = trainer_of(config), cohort_of(config)
  images = cohort.validation.dataset
  inverted, wrong = 255 - np.asarray(images.images), (images.labels + 1) % 3
  other = dataclasses.replace(images, images=inverted, labels=wrong)
  cohorts = cohort, cohort._replace(validation=cohort.validation._replace(dataset=other))
  told = []
  for i, one in enumerate(cohorts):
    folder = tmp_path / str(i)
    folder.mkdir()
    model_config = config.model.config(config.data, 3)
    arm = arms.train(config, one, made, model_config, folder, folder / "ledger")
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in arm.rows]
    told.append((rows, arm.facts, jax.tree.map(np.ndarray.tolist, arm.models)))
    assert ("NOT PROTECTED" in arm.privacy) == (validation == "exact")
  assert (told[0] == told[1]) == (validation == "auto")
  if validation == "auto":
    assert told[0][1]["round kept"].startswith("2, the last")


def test_an_unfinished_line_is_left_out_and_a_damaged_one_is_named(tmp_path):
  """A run that was killed while it wrote a line goes on; what was there before is not touched."""
  path = tmp_path / "rounds.jsonl"
  path.write_text('{"round": 1}\n{"round": 2}\n{"round": 3, "tr')
  assert lines.read(path, 2) == [{"round": 1}, {"round": 2}]
  assert path.read_text() == '{"round": 1}\n{"round": 2}\n'
  path.write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
  with pytest.raises(ValueError, match=r"rounds\.jsonl is damaged at line 2 .* --run_dir"):
    lines.read(path, 3)
