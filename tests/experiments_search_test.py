"""Searches: what is drawn, pruned, resumed and refused, and that a trial is a federated run."""

import json

import pytest
from experiments_runs import TINY, train, trainer_of

from experiments import arms, inputs, search_report, search_space, searching, settings, trainers

optuna = pytest.importorskip("optuna")
CONFIG = settings.replace(TINY, optimizer="adamw", sync_epochs=0, sync_batches=4, rounds=10)
STATE = optuna.trial.TrialState


@pytest.fixture
def faked(monkeypatch):
  """Trials whose MCC is ten times the learning rate at once; those above 0.9 diverge. The list says
  which ran, and `stop` in it ends the next one as a signal would.
  """
  ran = []

  def train(config, cohort, trainer, model_config, folder, ledger_dir, log, save_every):
    rate, rounds = config.training.learning_rate, config.training.rounds
    if rate > 0.09:
      raise RuntimeError("round 1: at 1 of 3 sites the update held a number. More")
    path = folder / "rounds.jsonl"
    done = len(path.read_text().splitlines()) if path.is_file() else 0
    ran.append((folder.name, done, rate))
    for number in range(done + 1, rounds + 1):
      row = {"round": number, "val_mcc": 10 * rate}
      with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
      if "stop" in ran and number > rounds // 2:
        ran.remove("stop")
        raise KeyboardInterrupt
      log(row)
    return arms.Arm([], ({}, {}), [], {"validation MCC": 10 * rate}, None, None)

  monkeypatch.setattr(arms, "train", train)
  monkeypatch.setattr(trainers, "make_trainer", lambda *args: None)
  images = inputs.site_images(TINY)
  monkeypatch.setattr(inputs, "site_images", lambda config: images)
  return ran


def searched(folder, num_trials, text="learning_rate=1e-4:0.085:log", pruner="none", config=CONFIG):
  folder.mkdir(exist_ok=True)
  space = search_space.parse(text, config)
  study = searching.open_study(folder, space, pruner, 2)
  searching.search(config, space, study, folder, num_trials)
  return study


def test_the_space_is_primias_as_far_as_it_has_an_effect():
  names = set(search_space.parse("", CONFIG))
  assert names == {
    "learning_rate", "adam_beta1", "adam_beta2", "weight_decay", "augment", "mixup", "sync_batches"
  }  # fmt: skip
  sgd = settings.replace(CONFIG, optimizer="sgd", sync_batches=0, sync_epochs=1)
  assert set(search_space.parse("", sgd)) == {"learning_rate", "augment", "mixup"}
  given = search_space.given(search_space.parse("", CONFIG), CONFIG)
  assert given == {
    "learning_rate": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "weight_decay": 0.01,
    "augment": "none", "mixup": 0.0, "sync_batches": 4,
  }  # fmt: skip
  assert search_space.given(search_space.parse("mixup=0.1:1", CONFIG), CONFIG) is None


def test_trials_take_equally_many_steps():
  for batches, rounds in ((2, 20), (4, 10), (8, 5), (10, 4)):
    t = search_space.trial_settings(CONFIG, {"sync_batches": batches}).training
    assert (t.sync_batches, t.rounds) == (batches, rounds)


@pytest.mark.parametrize(
  ("text", "said"),
  [
    ("lr=1:2", "lr is not a setting"),
    ("momentum=0.1:0.9", "momentum has no effect with optimizer=adamw"),
    ("seed=1:5", "seed decides the images"),
    ("dp=none|example", "dp decides the images, their protection"),
    ("learning_rate=1", "learning_rate='1' is not a range|could not convert"),
    ("learning_rate=0:1:log", "not a range from a smaller to a larger"),
    ("learning_rate=2:1", "not a range from a smaller to a larger"),
    ("sync_batches=1.5:3", "not a range"),
    ("learning_rate=0:1", "learning_rate=0.0 must be positive"),
    ("augment=", "names no values"),
  ],
)
def test_wrong_spaces_are_refused(text, said):
  with pytest.raises(ValueError, match=said):
    search_space.parse(text, CONFIG)


def test_the_best_trial_is_a_flag_file_and_the_report_ranks_trials(faked, tmp_path):
  study = searched(tmp_path, 6)
  search_report.write(tmp_path, study, CONFIG, search_space.parse("", CONFIG))
  best = max(rate for _, _, rate in faked)
  assert study.best_value == pytest.approx(10 * best)
  assert faked[0] == ("0", 0, 0.01)  # the settings that were given come first
  lines = (tmp_path / "best.flags").read_text().splitlines()
  assert f"--learning_rate={best}" in lines
  assert "--optimizer=adamw" in lines
  assert "--rounds=10" in lines
  text = (tmp_path / "search.md").read_text()
  assert "6 trials have ended: 6 finished." in text
  rows = [line.split("|")[1].strip() for line in text.splitlines() if "| finished |" in line]
  order = sorted(range(6), key=lambda i: -faked[i][2])
  assert rows == [str(i) for i in order]
  for name in ("history.png", "importance.png"):
    assert (tmp_path / name).stat().st_size > 5_000


def test_a_killed_trial_is_continued_and_others_are_drawn_as_without_the_stop(faked, tmp_path):
  searched(tmp_path / "whole", 4)
  whole = list(faked)
  faked.clear()
  searched(tmp_path / "parts", 2)
  faked.append("stop")
  with pytest.raises(KeyboardInterrupt):
    searched(tmp_path / "parts", 4)
  study = searched(tmp_path / "parts", 4)
  assert [rate for _, _, rate in faked] == [rate for _, _, rate in whole[:3]] + [
    rate for _, _, rate in whole[2:]
  ]
  assert faked[3][:2] == ("2", 6)  # in its folder, after the rounds that it had done
  again = study.get_trials()[3]
  assert again.user_attrs["folder"] == 2
  assert set(again.intermediate_values) == set(range(1, 11))
  assert len(searching.ended(study)) == 4
  with pytest.raises(ValueError, match=r"varies learning_rate=0\.0001:0\.085:log; give the same"):
    searched(tmp_path / "parts", 4, "learning_rate=1e-3:1")


def test_trials_below_the_median_end_early_and_diverged_ones_are_told(faked, tmp_path):
  study = searched(tmp_path, 12, "learning_rate=1e-4:0.1:log", "median")
  trials = searching.ended(study)
  pruned = [t for t in trials if t.state == STATE.PRUNED]
  assert pruned
  for t in pruned:
    before = [u.intermediate_values[2] for u in trials[: t.number] if 2 in u.intermediate_values]
    last = max(t.intermediate_values)
    assert last < 10
    assert t.intermediate_values[last] < sorted(before)[(len(before) + 1) // 2]
  for t in trials:
    assert (t.state == STATE.FAIL) == (t.params["learning_rate"] > 0.09)
    if t.state == STATE.FAIL:
      assert t.user_attrs["why"] == "round 1: at 1 of 3 sites the update held a number"


def test_a_trial_is_the_federated_run_of_its_settings(tmp_path, monkeypatch):
  trainer = trainer_of(TINY)
  monkeypatch.setattr(trainers, "make_trainer", lambda *args: trainer)
  study = searched(tmp_path / "search", 1, "learning_rate=0.001:0.1", config=TINY)
  arm = train(TINY, tmp_path / "run")
  assert study.best_value == pytest.approx(arm.facts["validation MCC"], abs=1e-9)
  told = study.best_trial.intermediate_values
  assert told == {10 * row["round"] // 4: row["val_mcc"] for row in arm.rows}
  assert not (tmp_path / "search" / "trials" / "0" / "checkpoints").exists()
