"""Floors of a report: no small count is told, by a number or by a score; and what crossed."""

import dataclasses
import json

import numpy as np
import pytest
from experiments_runs import TINY, train, trainer_of

from experiments import crossings, image_facts, plots, report, settings, suppression
from experiments.configs import Train
from experiments.report import Arm
from primia_jax.data import overlaps
from primia_jax.data.dataset import Dataset
from primia_jax.data.sites import Part
from primia_jax.disclosure import Policy, Suppressed

NAMES = ("normal", "viral")
FLOOR = 10
CONFUSION = [[57, 3], [11, 30]]  # of a hospital: three false alarms


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  """What is suppressed does not hang on how well intervals are estimated."""
  monkeypatch.setattr(report, "NUM_RESAMPLES", 10)


def arm(confusion=CONFUSION, names=NAMES):
  """Predictions with this confusion matrix."""
  labels, said = (
    np.concatenate([np.full(n, place[axis]) for place, n in np.ndenumerate(np.array(confusion))])
    for axis in (0, 1)
  )
  scores = np.random.default_rng(0).uniform(0.6, 0.9, len(labels))
  probabilities = np.full((len(labels), len(names)), 0.0)
  probabilities[np.arange(len(labels)), said] = scores
  rest = (1 - scores) / (len(names) - 1)
  return Arm(labels, np.where(probabilities, probabilities, rest[:, None]))


def write(folder, floor, arms=None, names=NAMES, rounds=(), **options):
  facts = report.Facts({}, rounds=rounds, policy=Policy(fewest_patients=floor))
  return report.write_report(
    folder, title="A run", data_name="hospital a", arms=arms or {"trained": arm()},
    label_names=names, facts=facts, main_arm="trained", **options,
  )  # fmt: skip


def told(value, sizes, name=""):
  """Small counts that a reader of metrics.json finds: as numbers, or as shares of known sizes."""
  if isinstance(value, dict):
    for key, one in value.items():
      if key not in ("low", "high", "undefined_resamples", "intervals", "config", "difference"):
        yield from told(one, sizes, f"{name}/{key}")
  elif isinstance(value, list):
    for one in value:
      yield from told(one, sizes, name)
  elif isinstance(value, (int, float)) and not isinstance(value, bool):
    if "confusion_matrix" in name and value < FLOOR:
      yield name, value
    if "confusion_matrix" not in name and 0 < value < 1:
      shares = [share * size for share in (value, 1 - value) for size in sizes]
      yield from ((name, n) for n in shares if abs(n - round(n)) < 1e-9 and round(n) < FLOOR)


@pytest.mark.parametrize("floor", [0, FLOOR])
def test_no_small_count_is_told_anywhere(tmp_path, floor):
  """A reader knows how many images each class has, and looks for the three false alarms. Without a
  floor they are found.
  """
  write(tmp_path, floor)
  result = json.loads((tmp_path / "metrics.json").read_text())
  sizes = [101, *np.sum(CONFUSION, 1).tolist(), *np.sum(CONFUSION, 0).tolist()]
  found = list(told(result, sizes))
  text = (tmp_path / "report.md").read_text()
  pictures = {path.name for path in tmp_path.glob("*.png")}
  if not floor:
    assert {round(n) for _, n in found} == {3}
    assert pictures == {"confusion_matrix.png", "roc.png"}
    assert "suppressed" not in text
    return
  assert not found
  assert not pictures
  scores = result["arms"]["trained"]
  hidden = "suppressed (<10)"
  assert scores["confusion_matrix"] == [[hidden] * 2] * 2
  assert (
    scores["sensitivity"]["normal"] == scores["specificity"]["viral"] == scores["mcc"] == hidden
  )
  assert scores["accuracy"] == hidden  # with a sensitivity it would tell the cells
  assert "| true (rows), predicted (columns) | normal | viral |" in text
  assert f"| normal | {hidden} | {hidden} |" in text
  assert "A suppressed number is not zero" in text
  assert "- roc.png: its steps are single patients" in text


def test_a_score_of_few_patients_is_suppressed_in_the_text_too(tmp_path, capsys):
  pair = {"trained": arm([[30, 1], [2, 30]]), "pooled": arm([[30, 1], [2, 30]])}
  result = write(tmp_path, FLOOR, pair, rounds=[], baseline="pooled")
  report.print_summary(result, tmp_path)
  said = capsys.readouterr().out + (tmp_path / "report.md").read_text()
  assert "accuracy suppressed (<10)" in said
  assert "the accuracy of the trained model is suppressed (<10)" in said
  assert result["difference"]["accuracy"] == "suppressed (<10)"
  assert result["difference"]["sensitivity"]["normal"] == "suppressed (<10)"
  assert "95.2" not in said  # 60 of 63


def test_patients_are_counted_and_not_their_images(tmp_path):
  of_one = np.zeros(101, int)  # all images are of one patient
  result = write(tmp_path, FLOOR, groups=np.array([f"p{i}" for i in of_one]))
  hidden = "suppressed (<10)"
  assert result["num_examples"] == hidden
  for name in ("accuracy", "mcc", "macro_roc_auc", "log_loss"):
    assert result["arms"]["trained"][name] == hidden


def test_ratios_of_large_counts_do_not_tell_a_small_one():
  """Of 103 and 100 images accuracy tells 180 right ones, and a sensitivity 80 of the second class:
  100 of the first are right and 3 are wrong.
  """
  one = arm([[100, 3], [20, 80]])
  scores = {
    "confusion_matrix": [[100, 3], [20, 80]], "accuracy": 180 / 203, "mcc": 0.7,
    "accuracy_clopper_pearson": {}, "macro_roc_auc": 0.9, "log_loss": 0.4, "brier_score": 0.2,
    "expected_calibration_error": 0.1, "sensitivity": {"normal": 100 / 103, "viral": 0.8},
    "specificity": {"normal": 0.8, "viral": 100 / 103},
  }  # fmt: skip
  result = {
    "num_examples": 203, "label_names": NAMES, "hospitals": None, "difference": None,
    "arms": {"trained": scores},
  }  # fmt: skip
  suppression.suppress(
    result, Policy(fewest_patients=FLOOR), one.labels, {"trained": one.probabilities}, None
  )
  hidden = Suppressed(FLOOR)
  assert scores["confusion_matrix"] == [[hidden] * 2] * 2
  assert scores["accuracy"] == scores["mcc"] == hidden
  for field in ("sensitivity", "specificity"):
    assert scores[field] == dict.fromkeys(NAMES, hidden)


def test_large_counts_stay(tmp_path):
  result = write(tmp_path, FLOOR, {"trained": arm([[57, 13], [11, 30]])})
  assert result["arms"]["trained"]["confusion_matrix"] == [[57, 13], [11, 30]]
  assert set(result["pictures left out"]) == {"roc.png"}


def test_hospitals_and_sites_of_few_images_are_suppressed():
  result = {
    "num_examples": 101, "label_names": NAMES, "arms": {}, "difference": None,
    "hospitals": [{"hospital": "site 0", "training images": 4}],
  }  # fmt: skip
  suppression.suppress(result, Policy(fewest_patients=FLOOR), arm().labels, {}, None)
  assert result["hospitals"][0]["training images"] == Suppressed(FLOOR)
  assert result["num_examples"] == 101


def test_floors_of_sites_refuse_before_work():
  part = Part(None, (np.arange(30), np.arange(4), np.arange(0)))
  with pytest.raises(ValueError, match=r"fewest_images=5: sites \[1\] have fewer"):
    image_facts.check_sizes(settings.replace(Train(), fewest_images=5), part)
  image_facts.check_sizes(Train(), part)
  settings.replace(Train(), fewest_sites=3).check_federation()
  with pytest.raises(ValueError, match="fewest_sites=4, and a sum of this run may be of 3 sites"):
    settings.replace(Train(), fewest_sites=4).check_federation()
  with pytest.raises(ValueError, match="fewest_sites=3, and a sum of this run may be of 2 sites"):
    settings.replace(
      Train(), fewest_sites=3, secagg_threshold=2, secagg_colluding=0
    ).check_federation()


def test_everything_that_crossed_is_listed_with_its_bytes(tmp_path):
  rows = [{"sites": [0, 1, 2], "survivors": 2, "epsilon": 0.5 * i} for i in (1, 2)]
  sent = {"a": np.zeros((10, 3)), "b": np.zeros(2)}
  config = settings.replace(Train(), num_sites=3)
  found = {one.what: one for one in crossings.of_run(config, rows, sent, 3, 40)}
  assert found["update of the model"].messages == 4
  assert found["update of the model"].num_bytes == 4 * 32 * 4  # of 32 bits
  assert "only the sum over at least 3 sites opens" in found["update of the model"].protection
  assert found["update of the model"].charge == "epsilon 1"
  assert found["global model"].num_bytes == 6 * 32 * 4
  assert found["validation counts and loss"].num_bytes == 6 * 10 * 4
  assert found["images of each class"].charge == "nothing: exact counts"
  clear = settings.replace(config, aggregation="clear", class_weights=False, validation="none")
  bare = [{"sites": [0, 1, 2]}]
  found = {one.what: one for one in crossings.of_run(clear, bare, sent, 3, 4)}
  assert set(found) == {
    "update of the model", "sum of updates", "global model", "test scores of 4 images",
  }  # fmt: skip
  assert "the server sees what each site sends" in found["update of the model"].protection
  crossings.write(tmp_path, "A run", Policy(), list(found.values()))
  text = (tmp_path / "disclosure.md").read_text()
  assert "| update of the model | each site | server | 3 | 384 |" in text


ROW = {
  "round": 1, "train_accuracy": 0.98, "train_loss": 0.2, "val_accuracy": 98 / 101, "val_mcc": 0.9,
  "val_loss": 0.3, "learning_rate": 0.1,
}  # fmt: skip
HIDDEN = "suppressed (<10)"


def hidden_of(confusion, trained=200, of_one=1, floor=FLOOR):
  row = suppression.of_round(ROW, Policy(fewest_patients=floor), confusion, trained, of_one)
  assert json.loads(json.dumps(row)) == row
  return {name for name, value in row.items() if value != ROW[name]}, row


def test_the_line_of_a_round_does_not_tell_few_errors():
  """Of 101 validation images three are wrong; without a floor the line tells it."""
  assert round((1 - hidden_of(CONFUSION, floor=0)[1]["val_accuracy"]) * 101) == 3
  hidden, row = hidden_of(np.array(CONFUSION, float))
  assert hidden == {"train_accuracy", "val_accuracy", "val_mcc"}  # 4 of 200 wrong in training
  assert row["val_mcc"] == HIDDEN
  assert row["learning_rate"] == 0.1
  assert hidden_of([[57, 13], [11, 30]], 1000)[0] == set()
  assert hidden_of([[57, 13], [11, 30]], 9)[0] == {"train_accuracy", "train_loss"}
  few = {"train_accuracy", "val_accuracy", "val_mcc", "val_loss"}
  assert hidden_of([[3, 2], [1, 2]])[0] == few
  assert hidden_of(None, 1000)[0] == set()


def test_the_line_of_a_short_round_counts_the_images_of_that_round():
  """Four of 200 are wrong, of sites with 1,500 images each: of these it would be 90."""
  assert suppression.trained([1500] * 3, None) == 4500
  assert suppression.trained([1500, 1500, 40], 80) == 200
  assert "train_accuracy" not in hidden_of(None, suppression.trained([1500] * 3, None))[0]
  assert "train_accuracy" in hidden_of(None, suppression.trained([1500, 1500, 40], 80))[0]


def test_lines_count_patients_where_one_may_have_many_images():
  """13 wrong images may be of one patient, who has up to ten of them, and of another."""
  assert hidden_of([[57, 13], [11, 30]], 2000, of_one=10)[0] == {
    "train_accuracy", "val_accuracy", "val_mcc",
  }  # fmt: skip


def test_a_run_with_a_floor_writes_and_draws_no_small_count(tmp_path):
  """The best round is still chosen by the score that nobody is told."""
  config = settings.replace(TINY, fewest_patients=1000)
  arm = train(config, tmp_path, trainer=trainer_of(TINY))
  told = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
  assert told == arm.rows
  hidden = "suppressed (<1000)"
  for row in told:
    for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_mcc"):
      assert row[name] == hidden
  assert arm.facts["validation MCC"] == hidden
  assert 1 <= arm.facts["best round"] <= len(told)
  figures = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "save", lambda figure, path, title: figures.append(figure))
    plots.curves(told, tmp_path / "curves.png", "a run")
  lines = [line for axes in figures[0].axes for line in axes.get_lines()]
  by_name = {line.get_label(): line for line in lines}
  mcc = by_name[f"MCC: {hidden} in {len(told)} of {len(told)} rounds"]
  assert len(mcc.get_xdata()) == 0
  assert len(by_name["learning rate"].get_xdata()) == len(told)
  assert not any(axes.get_yticks().size for axes in figures[0].axes[:2])


def test_a_picture_shows_the_rounds_whose_scores_may_be_told(tmp_path):
  rows = [{"round": n, "val_mcc": 0.1 * n if n % 2 else HIDDEN} for n in (1, 2, 3)]
  figures = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "save", lambda figure, path, title: figures.append(figure))
    plots.curves(rows, tmp_path / "curves.png", "a run")
  line = figures[0].axes[0].get_lines()[0]
  assert line.get_xdata().tolist() == [1, 3]
  assert line.get_label() == "MCC: suppressed (<10) in 1 of 3 rounds"


def test_patients_are_counted_for_floors_where_intervals_are_of_images(tmp_path):
  """As in a training report: 101 images, all of nine patients."""
  who = np.array([f"p{i % 9}" for i in range(101)])
  result = write(tmp_path, FLOOR, patients=who)
  assert result["num_examples"] == HIDDEN
  assert result["intervals"]["unit"] == "example"


def test_facts_of_images_tell_no_few_patients():
  groups = np.array(["a", "a", "b", "image 3"])
  images, copies = np.zeros((4, 8, 8, 1), np.uint8), {overlaps.PIXELS: np.array([0, 1, 2, 2])}
  knows = groups != "image 3"
  of = Dataset(images, np.zeros(4, np.int32), ("one",), groups, copies, "x", knows)
  part, other = Part(of, (np.arange(2), np.arange(2, 4))), dataclasses.replace(of, name="test")
  for floor, words in ((0, "unknown for 1 of 4"), (FLOOR, "unknown for suppressed (<10) of 4")):
    config = settings.replace(Train(), fewest_patients=floor, num_sites=2)
    facts = image_facts.facts(config, part, Part(of, (np.arange(0),) * 2), other)
    assert facts["patients of training images"].startswith(words)
    said = json.dumps(facts)
    assert ("1 of 4" in facts["training images that copy another"]) == (not floor)
    assert ("image 3" in said) == (not floor)
    assert ("all are of one patient" in said) == (not floor)
