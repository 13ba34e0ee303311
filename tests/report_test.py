"""The report and the pictures of a run."""

import csv
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import markdown, plots, report, versions
from primia_jax import metrics

NAMES = ("normal", "bacterial", "viral")
RADIOLOGIST = np.array([[189, 3, 42], [67, 85, 90], [13, 11, 124]])
ROUNDS = [
  {
    "round": r,
    "train_loss": 1 / r,
    "val_loss": 1.2 / r,
    "val_accuracy": 0.8,
    "val_mcc": 0.1 * r,
    "learning_rate": 0.1,
  }
  for r in range(1, 5)
]


def arm(seed, skill, labels):
  logits = np.random.default_rng(seed).normal(size=(len(labels), 3)) + skill * np.eye(3)[labels]
  return report.Arm(labels, np.asarray(jax.nn.softmax(logits.astype(np.float32))))


def three_arms(labels):
  return {
    name: arm(i, i + 0.5, labels) for i, name in enumerate(("local: site 0", "pooled", "federated"))
  }


def write(run_dir, arms, **options):
  named = {name: options.pop(name) for name in report.Facts._fields if name in options}
  facts = report.Facts(**({"config": {"rate": 0.1}} | named))
  options = {"label_names": NAMES, "facts": facts} | options
  return report.write_report(
    run_dir, title="Three sites", data_name="synthetic phantom", arms=arms, **options
  )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  run_dir, arms = tmp_path_factory.mktemp("run"), three_arms(np.arange(90) % 3)
  facts = {"bits": 32, "quantisation_error_bound": 2.5e-6}
  write(
    run_dir, arms, rounds=ROUNDS, secure_aggregation=facts, references={"radiologist": RADIOLOGIST}
  )
  return run_dir, arms


def test_metrics_json_holds_what_metrics_compute(written):
  run_dir, arms = written
  got = json.loads((run_dir / "metrics.json").read_text())
  key = jax.random.key(0)
  for name, (labels, probabilities) in arms.items():
    expected = metrics.bootstrap_intervals(labels, probabilities, key)
    entry = got["arms"][name]
    for field in ("accuracy", "mcc", "macro_roc_auc"):
      numbers = [getattr(x, field) for x in expected]
      assert list(entry[field].values()) == pytest.approx(numbers, rel=1e-12)
    for field in ("sensitivity", "specificity"):
      assert [entry[field][n]["low"] for n in NAMES] == pytest.approx(
        list(getattr(expected.low, field)), rel=1e-12
      )
    assert np.sum(entry["confusion_matrix"]) == 90
    assert entry["log_loss"] == pytest.approx(metrics.log_loss(labels, probabilities))
  difference = metrics.bootstrap_difference(*arms["federated"], arms["pooled"].probabilities, key)
  assert got["difference"]["accuracy"]["high"] == pytest.approx(difference.high.accuracy)
  assert (got["difference"]["of"], got["difference"]["minus"]) == ("federated", "pooled")
  assert got["references"]["radiologist"]["accuracy"] == pytest.approx(398 / 624)
  assert got["secure_aggregation"]["bits"] == 32
  assert got["data"] == "synthetic phantom"


def test_report_shows_the_same_numbers_side_by_side(written):
  run_dir, _ = written
  text = (run_dir / "report.md").read_text()
  entries = json.loads((run_dir / "metrics.json").read_text())["arms"]
  cells = [
    f"{100 * e['accuracy']['value']:.1f} [{100 * e['accuracy']['low']:.1f}, "
    f"{100 * e['accuracy']['high']:.1f}]"
    for e in entries.values()
  ]
  assert f"| accuracy (%) | {' | '.join(cells)} | 63.8 |" in text
  assert "|  | local: site 0 | pooled | federated | radiologist |" in text
  assert "| quantisation_error_bound | 2.5e-06 |" in text
  assert "| rate | 0.1 |" in text
  title, _, summary = text.splitlines()[:3]
  assert title == "# Three sites: synthetic phantom"
  assert re.search(
    r"90 test images of \*\*synthetic phantom\*\*.* federated .*\(MCC\).* pooled ", summary
  )
  columns = {}
  for line in text.splitlines():  # every row of a table has as many cells as its head
    if line.startswith("|"):
      assert columns.setdefault("now", line.count("|")) == line.count("|")
    else:
      columns = {}


def test_report_embeds_the_pictures_it_wrote(written):
  run_dir, _ = written
  linked = re.findall(r"!\[.*synthetic phantom\]\((.*)\)", (run_dir / "report.md").read_text())
  assert linked == ["confusion_matrix.png", "roc.png", "curves.png", "comparison.png"]
  for name in linked:
    with Image.open(run_dir / name) as image:
      assert min(image.size) > 400
      assert np.asarray(image.convert("L")).std() > 10  # something is drawn


def test_one_arm_without_rounds_and_without_a_class(tmp_path):
  write(tmp_path, three_arms(np.arange(30) % 3), rounds=ROUNDS)
  labels = np.arange(40) % 2  # no viral example
  got = write(tmp_path, {"model": arm(0, 2, labels)}, main_arm="model")
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "confusion_matrix.png",
    "metrics.json",
    "report.md",
    "roc.png",
  ]
  strict = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
  assert strict == got
  assert got["arms"]["model"]["macro_roc_auc"]["value"] is None
  assert got["arms"]["model"]["sensitivity"]["viral"]["low"] is None
  text = (tmp_path / "report.md").read_text()
  assert "| macro ROC-AUC | undefined |" in text
  assert "Not used in this run." in text
  assert "comparison.png" not in text


def test_intervals_over_patients_say_so(tmp_path):
  labels = np.arange(60) % 3
  got = write(tmp_path, {"federated": arm(0, 1, labels)}, groups=np.arange(60) // 6)
  assert got["intervals"]["unit"] == "group"
  assert got["arms"]["federated"]["accuracy_clopper_pearson"] is None
  text = (tmp_path / "report.md").read_text()
  assert "resamples of the test patients" in text
  assert "Clopper" not in text


def test_what_is_not_private_stands_above_the_scores(tmp_path):
  arms = {"federated": arm(0, 1, np.arange(30) % 3)}
  privacy = {"delta": 1e-5, "NOT PROTECTED": "validation images"}
  write(tmp_path, arms, privacy=privacy)
  text = (tmp_path / "report.md").read_text()
  assert text.index("**NOT PROTECTED**: validation images.") < text.index("## Results")
  write(tmp_path, arms, privacy={"delta": 1e-5})
  assert "NOT PROTECTED" not in (tmp_path / "report.md").read_text()


def test_facts_of_images_have_their_section_and_what_spoils_scores_stands_above(tmp_path):
  facts = {"bad files, left out": "1 of 9: a.png", "IMAGES IN TRAINING AND TESTING": "1 (a = b)"}
  arms = three_arms(np.arange(30) % 3)
  result = write(tmp_path, arms, images=facts)
  assert result["images"] == facts
  head, _, tail = (tmp_path / "report.md").read_text().partition("## Images")
  assert "**IMAGES IN TRAINING AND TESTING**: 1 (a = b)." in head
  assert "bad files" not in head
  assert "| bad files, left out | 1 of 9: a.png |" in tail


def test_aborted_rounds_stand_above_the_scores(tmp_path):
  arms = {"federated": arm(0, 1, np.arange(30) % 3)}
  write(tmp_path, arms, config={f"federated: {markdown.ABORTED}": "3 of 4"})
  text = (tmp_path / "report.md").read_text()
  told = "**federated: rounds aborted, too few sites being left**: 3 of 4."
  assert text.index(told) < text.index("## Results")


@pytest.mark.parametrize(
  ("alone", "pooled", "said"),
  [
    (
      (0.5, 0.6),
      0.75,
      "70.0 % accuracy: 10.0 points above the 60.0 % of the best hospital alone (site 1), and 5.0 "
      "points below the 75.0 % of all images in one place (pooled).",
    ),
    (
      (0.9, 0.5),
      0.7,
      "70.0 % accuracy: 20.0 points below the 90.0 % of the best hospital alone (site 0), and as "
      "good as the 70.0 % of all images in one place (pooled).",
    ),
    ((0.9, 0.5), None, "70.0 % accuracy: 20.0 points below the 90.0 % of the best hospital alone "
     "(site 0)."),
  ],
)  # fmt: skip
def test_a_sentence_says_what_was_learnt_whichever_way_it_went(alone, pooled, said):
  of = {f"local: site {i}": x for i, x in enumerate(alone)}
  of |= {"federated": 0.7} | ({} if pooled is None else {"pooled": pooled})
  result = {"arms": {name: {"accuracy": {"value": x}} for name, x in of.items()}}
  assert markdown.learnt(result).endswith(said)
  assert markdown.learnt({"arms": {"federated": result["arms"]["federated"]}}) == ""


def test_bad_reports_write_nothing(tmp_path):
  labels = np.arange(30) % 3
  arms = three_arms(labels)
  with pytest.raises(FileNotFoundError, match="nowhere"):
    write(tmp_path / "nowhere", arms)
  with pytest.raises(ValueError, match="main_arm='best'"):
    write(tmp_path, arms, main_arm="best")
  with pytest.raises(ValueError, match="'pooled' has other labels than 'federated'"):
    write(tmp_path, {**arms, "pooled": arm(0, 1, labels[::-1])})
  with pytest.raises(ValueError, match=r"\(30, 3\).*2 classes"):
    write(tmp_path, arms, label_names=NAMES[:2])
  with pytest.raises(ValueError, match="repeat"):
    write(tmp_path, arms, label_names=("a", "b", "a"))
  with pytest.raises(ValueError, match="reference 'reader'"):
    write(tmp_path, arms, references={"reader": np.ones((2, 2), int)})
  with pytest.raises(ValueError, match="not finite"):
    write(tmp_path, {"federated": report.Arm(labels, np.full((30, 3), np.nan))})
  assert not list(tmp_path.iterdir())


def test_predictions_csv(tmp_path):
  labels, probabilities = arm(0, 1, np.array([0, 1, 2, 2]))
  labels = np.array([0, 1, -1, 2])
  path = tmp_path / "predictions.csv"
  ids = ["a.png", 'odd, "name".png', "c.png", "d.png"]
  report.predictions_csv(path, ids, labels, probabilities, NAMES)
  with open(path, newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["image"] for row in rows] == ids
  assert [row["true"] for row in rows] == ["normal", "bacterial", "", "viral"]
  assert [row["predicted"] for row in rows] == [NAMES[k] for k in probabilities.argmax(1)]
  read = np.array([[row[f"probability {n}"] for n in NAMES] for row in rows], np.float32)
  np.testing.assert_array_equal(read, probabilities)
  report.predictions_csv(path, ids, None, probabilities, NAMES)
  with open(path, newline="") as file:
    assert {row["true"] for row in csv.DictReader(file)} == {""}
  with pytest.raises(ValueError, match="3 images of 3 classes"):
    report.predictions_csv(path, ids[:3], labels, probabilities, NAMES)
  with pytest.raises(ValueError, match="class -2"):
    report.predictions_csv(path, ids, np.array([0, 1, -2, 2]), probabilities, NAMES)


def test_versions_name_what_a_result_depends_on():
  got = versions.found()
  assert set(got) == {
    "python",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "primia-jax",
    "git commit",
    "backend",
    "device",
  }
  assert got["jax"] == jax.__version__
  assert re.fullmatch(r"unknown|[0-9a-f]{40}(-dirty)?", got["git commit"])


def test_pictures_carry_their_title_and_labels(tmp_path):
  labels, probabilities = arm(0, 2, np.arange(60) % 3)
  intervals = metrics.bootstrap_intervals(
    labels, probabilities, jax.random.key(0), num_resamples=20
  )
  path = tmp_path / "picture.svg"  # where text can be read
  title = "A run: synthetic phantom"
  for draw, words in (
    (
      lambda: plots.confusion_matrix(RADIOLOGIST, NAMES, path, title),
      ["189", "accuracy 63.8%, MCC 0.499", *NAMES],
    ),
    (
      lambda: plots.roc(labels, probabilities, NAMES, path, title),
      ["mean of 3 curves", "macro one-vs-one"],
    ),
    (
      lambda: plots.curves(ROUNDS, path, title),
      ["best MCC: 0.400, round 4", "learning rate", "validation"],
    ),
    (
      lambda: plots.comparison(
        {"pooled": intervals}, path, title, references={"reader": RADIOLOGIST}
      ),
      ["reader"],
    ),
  ):
    draw()
    texts = " ".join(re.findall(r"<!-- (.*?) -->", path.read_text(), re.DOTALL))
    for word in (title, *words):
      assert word in texts


def test_bad_pictures_are_refused(tmp_path):
  path = tmp_path / "picture.png"
  with pytest.raises(ValueError, match=r"\(2, 2\), got \(3, 3\)"):
    plots.confusion_matrix(RADIOLOGIST, ("a", "b"), path, "")
  with pytest.raises(ValueError, match="a `round` in each"):
    plots.curves([{"train_loss": 1.0}], path, "")
  with pytest.raises(ValueError, match="give at least one"):
    plots.curves([{"round": 1, "val_mcc": None}], path, "")
