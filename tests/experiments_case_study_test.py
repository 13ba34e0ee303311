"""A case study: which runs it is, what its report says of them, and a tiny one from end to end."""

import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from experiments import study, study_report
from primia_jax import metrics
from primia_jax.privacy import ledger

READER = [[8, 1, 1], [4, 4, 2], [1, 1, 8]]
COSTS = {
  "images": 30, "images_in_a_run": 10,
  "phases": [
    {"phase": "deal", "seconds": 1.5, "bytes": 2e6, "rounds": 0},
    {"phase": "prepare", "seconds": 0.25, "bytes": 0, "rounds": 0},
    {"phase": "online", "seconds": 3.0, "bytes": 1e6, "rounds": 7},
  ],
}  # fmt: skip
CHECKED = {
  "total": 30, "same_class_as_float32": 29, "largest_logit_difference": 0.002,
  "same_bits_as_the_integer_model": True,
  "close": [{"image": "x_1.png", "float32_logits_apart": 0.003, "encrypted": "a", "float32": "b"}],
  "encrypted_scores": {"accuracy": 2 / 3, "mcc": 0.5, "confusion_matrix": READER},
}  # fmt: skip
PHANTOM = study.STUDIES["phantom"]


def test_a_study_is_runs_of_other_programs():
  made = study.steps(PHANTOM, (0, 1), (1.0, 6.0), study.ARMS, more=("--rounds=2",))
  folders = [step.folder for step in made]
  private = [f"private_{kind}{e}" for e in (1, 6) for kind in ("", "pooled_")]
  of_a_seed = ["pooled", "secure", "federated", *private]
  seeds = [f"seed_{seed}/{name}" for seed in (0, 1) for name in of_a_seed]
  assert folders == [*seeds, "encrypted", "attacked"]
  flags = {step.folder: step.flags for step in made}
  assert "--baselines=local" in flags["seed_0/secure"]
  assert "--baselines=" in flags["seed_1/secure"]
  assert {"--aggregation=clear", "--record_transcript"} <= set(flags["seed_0/federated"])
  assert "--record_transcript" not in flags["seed_1/federated"]
  assert "--target_epsilon=6" in flags["seed_1/private_pooled_6"]
  assert "--rounds=2" in flags["seed_0/pooled"]
  assert "--rounds=2" not in flags["seed_0/private_1"]
  assert "--checkpoint={study}/seed_0/secure" in flags["encrypted"]


def by_folder(name, **options):
  one = study.STUDIES[name]
  seeds = one.seeds, one.epsilons, ("secure", "private")
  made = study.steps(one, *seeds, private_seeds=one.private_seeds, **options)
  return {step.folder: step.flags for step in made}


def test_private_arms_are_the_documented_recipe():
  """Each budget has its own rounds and learning rate, five seeds, and a pooled batch that is as
  large a share of all images as a batch is of the largest hospital's.
  """
  flags = by_folder("chest_xray_pretrained")
  assert {f.partition("/")[0] for f in flags if f.endswith("private_6")} == {
    f"seed_{seed}" for seed in range(5)
  }
  assert {f for f in flags if f.endswith("secure")} == {f"seed_{seed}/secure" for seed in range(3)}
  told = {}
  for epsilon in (1, 3, 6, 8):
    for kind in ("", "pooled_"):
      words = [f for f in flags[f"seed_4/private_{kind}{epsilon}"] if f != "--baselines="]
      config = study.configured(words)
      t = config.training
      told[epsilon, kind] = t.rounds, t.learning_rate, t.batch_size
      assert (config.seed, config.privacy.target_epsilon) == (4, epsilon)
  strict, usual = (30, 1.0), (60, 2.0)
  for kind, batch in (("", 600), ("pooled_", 1200)):  # the largest hospital has half the images
    found = {epsilon: told[epsilon, kind] for epsilon in (1, 3, 6, 8)}
    assert found == {1: (*strict, batch)} | dict.fromkeys((3, 6, 8), (*usual, batch))


@pytest.mark.parametrize("name", ["chest_xray_pretrained", "chest_xray_pretrained_224"])
def test_the_pooled_arm_sees_as_many_images_as_the_sites_together(name):
  """4,664 are trained on. Its steps are more: a round has one for each batch of any site."""
  made = study.steps(study.STUDIES[name], (0,), (), ("pooled", "secure"))
  pooled, secure = (
    study.configured([f for f in step.flags if f != "--baselines="]).training for step in made
  )
  assert (pooled.sync_epochs, secure.sync_epochs) == (1, 0)
  seen = secure.rounds * secure.sync_batches * secure.batch_size * 3
  assert seen == pytest.approx(pooled.rounds * 4664, rel=0.01)
  assert pooled.batch_size == secure.batch_size


def test_flags_that_are_given_win_over_those_of_a_budget():
  more = "--rounds=2", "--batch_size=30", "--site_fractions=0.2,0.2,0.6"
  flags = by_folder("chest_xray_pretrained", more_private=more)["seed_0/private_pooled_1"]
  t = study.configured([f for f in flags if f != "--baselines="]).training
  assert (t.rounds, t.learning_rate, t.batch_size) == (2, 1.0, 50)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--roundz=2", "--roundz is not a flag"),
    ("--site_fractions=", "site_fractions is empty, with data=folder:"),
  ],
)
def test_a_wrong_private_flag_is_refused_before_any_run(flag, message):
  with pytest.raises(ValueError, match=message):
    by_folder("chest_xray", more_private=(flag,))


@pytest.mark.parametrize("flag", ["--aggregation=clear", "--baselines=pooled", "--multi_label"])
def test_a_flag_that_makes_an_arm_another_is_refused(flag):
  with pytest.raises(ValueError, match=f"{flag} in train_flags"):
    study.steps(PHANTOM, (0,), (6.0,), ("pooled",), more=(flag,))


@pytest.mark.parametrize("arm", ["local", "encrypted", "attacked"])
def test_an_arm_that_needs_another_is_refused_without_it(arm):
  with pytest.raises(ValueError, match=f"{arm} is about the model of"):
    study.steps(PHANTOM, (0,), (6.0,), (arm,))


def random_run(rng, labels, gain):
  logits = rng.normal(size=(len(labels), 3)) + gain * np.eye(3)[labels]
  p = np.exp(logits)
  return p / p.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A study whose runs are made up."""
  folder, rng = tmp_path_factory.mktemp("study"), np.random.default_rng(0)
  labels = np.repeat(np.arange(3), 10)
  steps = study.steps(PHANTOM, (0, 1), (1.0, 6.0), study.ARMS, private_seeds=(0, 1, 2))
  said = {}
  for step in steps:
    own = folder / step.folder
    own.mkdir(parents=True)
    if step.module == "infer_encrypted":
      (own / step.made).write_text(json.dumps(COSTS))
      (own / "check.json").write_text(json.dumps(CHECKED))
    elif step.made == "privacy_report.md":
      (own / step.made).write_text("# Audit\n\nIdentification is at chance.\n\n## Parts\n\nmore\n")
    else:
      is_private, is_secure = "private" in step.folder, step.folder.endswith("secure")
      arms = ["pooled" if "pooled" in step.folder else "federated"]
      arms += ["local: site 0"] if is_secure and "seed_0" in step.folder else []
      found = {arm: random_run(rng, labels, 0.7 if is_private else 1.5) for arm in arms}
      said[step.folder] = found[arms[0]]
      np.savez(own / "predictions.npz", labels=labels, **found)
      result = {
        "label_names": ["a", "b", "c"], "data": "made up",
        "privacy": {ledger.EPSILON: 5.99} if is_private else None,
        "references": {"a reader": {"confusion_matrix": READER}},
      }  # fmt: skip
      (own / "metrics.json").write_text(json.dumps(result))
  commands = {step.folder: "command" for step in steps}
  text = study_report.write(folder, steps, commands, "About.").read_text()
  return folder, text, labels, said


def row_of(text, *cells):
  (row,) = [line for line in text.splitlines() if line.startswith("| " + " | ".join(cells) + " |")]
  return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_report_gives_means_and_intervals_over_seeds(finished):
  _, text, labels, said = finished
  scored = [metrics.scores(labels, said[f"seed_{seed}/secure"]).mcc for seed in (0, 1)]
  row = row_of(text, "federated, secure aggregation", "2")
  low, high = scipy.stats.t.interval(0.95, 1, np.mean(scored), scipy.stats.sem(scored))
  assert row[3] == f"{np.mean(scored):.3f} [{low:.3f}, {high:.3f}]"
  assert row_of(text, "site 0 alone", "1")[5] == "none"
  assert row_of(text, "private, epsilon 6, federated", "3")[5] == "5.99"
  reader = row_of(text, "a reader", "one reader")
  assert (reader[2], reader[6]) == ("66.7", "40.0")  # of classes 40 % apart, by its matrix


def test_the_report_compares_arms_on_the_same_images(finished):
  _, text, labels, said = finished
  rows = text.partition("## Arms compared")[2].partition("## One class")[0]
  first, second = ("seed_{}/private_6", "seed_{}/secure")
  row = row_of(rows, "private, epsilon 6, federated minus federated, secure aggregation")
  right = [
    np.mean([(said[name.format(s)].argmax(1) == labels).mean() for s in (0, 1)])
    for name in (first, second)
  ]
  assert row[1].startswith(f"{100 * (right[0] - right[1]):+.1f} [")
  for seed in (0, 1):
    test = metrics.mcnemar(
      labels, said[first.format(seed)].argmax(1), said[second.format(seed)].argmax(1)
    )
    assert f"{test.only_first} : {test.only_second}, p = {test.p:.2g}" in row[3]


def test_the_report_allows_for_the_worst_pairing_of_the_reader(finished):
  folder, text, labels, said = finished
  row = row_of(text.partition("## Beside one human reader")[2], "federated, secure aggregation")
  tests = [
    metrics.worst_mcnemar(
      np.asarray(metrics.confusion_matrix(labels, said[f"seed_{seed}/secure"].argmax(1), 3)),
      np.array(READER),
    )
    for seed in (0, 1)
  ]
  assert row[2] == f"{max(test.p for test in tests):.2g}"
  assert "29 of 30 have the class of float32" in text
  assert "accuracy 66.7 %" in text
  assert "| x_1.png | 0.003 | a | b |" in text
  assert "Identification is at chance." in text
  assert "more" not in text.partition("## Attacked")[2].partition("## Runs")[0]
  for picture in study_report.PICTURES:
    assert (folder / picture).stat().st_size > 5000
    assert f"({picture})" in text


TINY = (
  "--phantom_images=48 --phantom_test_images=24 --image_size=16 --rounds=2 --batch_size=8 "
  "--augment=none"
)


@pytest.mark.slow
def test_a_tiny_study_runs_whole_and_is_not_repeated(tmp_path):
  command = [
    sys.executable, "-m", "experiments.case_study", f"--run_dir={tmp_path / 'study'}",
    "--seeds=0,1", "--arms=pooled,local,federated,secure,private,encrypted,attacked",
    f"--train_flags={TINY} --model=mlp", f"--private_flags={TINY}", "--attack_flags=--candidates=8",
  ]  # fmt: skip
  run = lambda *more: subprocess.run([*command, *more], capture_output=True, text=True)
  first = run()
  assert first.returncode == 0, first.stderr
  text = (tmp_path / "study" / study_report.REPORT).read_text()
  assert "| federated, secure aggregation | 2 |" in text
  assert float(row_of(text, "private, epsilon 8, federated", "2")[5].split(", ")[0]) <= 8
  assert "## Attacked" in text
  assert "all bits are those of the integer model" in text
  again = run()
  assert again.returncode == 0
  assert again.stdout.count("finished before") == again.stdout.count("[")
  other = run("--train_flags=--model=mlp")
  assert other.returncode == 1
  assert "had other flags" in other.stderr
