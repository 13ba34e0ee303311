"""Floors of a report: no small count is told, by a number or by a score; and what crossed."""

import json

import numpy as np
import pytest

from experiments import crossings, image_facts, report, settings, suppression
from experiments.configs import Train
from experiments.report import Arm
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


def write(folder, floor, arms=None, names=NAMES, **options):
  return report.write_report(
    folder, title="A run", data_name="hospital a", arms=arms or {"trained": arm()},
    label_names=names, config={}, versions={}, main_arm="trained",
    policy=Policy(fewest_patients=floor), **options,
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
