"""The report of all hospitals together: floors, undefined scores, patients with several images."""

import numpy as np
import pytest

from experiments import pooled_report, report
from experiments.configs.scoring import Evaluate
from primia_jax import metrics
from primia_jax.disclosure import Policy


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
  monkeypatch.setattr(report, "NUM_RESAMPLES", 20)


def result_of(confusion, floor, groups=None, names=("a", "b")):
  """A pooled result of images with this confusion matrix, each of one patient by default."""
  labels, said = (
    np.concatenate([np.full(n, place[axis]) for place, n in np.ndenumerate(np.array(confusion))])
    for axis in (0, 1)
  )
  p = np.random.default_rng(0).uniform(0.6, 0.9, len(labels))
  probabilities = np.where(np.eye(len(names))[said] > 0, p[:, None], (1 - p)[:, None])
  counts = metrics.score_counts(labels, probabilities, groups)
  policy = Policy(fewest_patients=floor)
  found = pooled_report.result(Evaluate(), names, counts, (0, 1, 2), policy)
  return report.jsonable(found), counts


def test_small_counts_are_in_no_score():
  found, _ = result_of([[57, 3], [11, 30]], 10)
  hidden = "suppressed (<10)"
  assert found["confusion_matrix"] == [[hidden] * 2] * 2
  scores = found["scores"]
  assert scores["accuracy"] == scores["mcc"] == found["accuracy_clopper_pearson"] == hidden
  assert set(scores["specificity"].values()) == {hidden}
  assert scores["macro_roc_auc"]["value"] > 0.5  # 57 and 30 patients at least
  assert found["scores in bins"] is None
  found, _ = result_of([[57, 13], [11, 30]], 10)
  assert found["confusion_matrix"] == [[57, 13], [11, 30]]
  assert found["scores"]["accuracy"]["value"] == pytest.approx(87 / 111)
  found, _ = result_of([[57, 3], [6, 5]], 10)
  assert found["scores"]["macro_roc_auc"] == hidden
  assert found["roc_auc"] == {"a": hidden, "b": hidden}
  found, _ = result_of([[3, 1], [2, 3]], 10)
  assert found["num_examples"] == found["expected_calibration_error"] == hidden


def test_a_class_of_which_no_site_has_an_image_is_named():
  found, _ = result_of([[7, 3], [0, 0]], 0)
  assert found["missing classes"] == ["b"]
  assert found["scores"]["macro_roc_auc"]["value"] is None
  text = pooled_report.page(found | {"data": "x"} | report.Facts({}).told())
  assert "**No site has an image of b**" in text
  assert "| macro ROC-AUC | undefined |" in text


def test_pictures_are_drawn(tmp_path):
  _, counts = result_of([[57, 3], [11, 30]], 0)
  config = Evaluate()
  pooled_report.write(tmp_path, config, ("a", "b"), "own", counts, (0, 1, 2), 0, {"seed": 0})
  assert {path.name for path in tmp_path.glob("*.png")} == set(pooled_report.PICTURES)
  assert all((tmp_path / name).stat().st_size > 5000 for name in pooled_report.PICTURES)


def test_patients_with_several_images_are_told_with_what_they_do_to_the_interval():
  say = lambda groups: (
    lambda found: pooled_report.page(found | {"data": "x"} | report.Facts({}).told())
  )(result_of([[30, 10], [5, 35]], 0, groups)[0])
  alone, in_fours = say(None), say(np.arange(80) // 4)
  assert "Clopper-Pearson" in alone
  assert "several images" not in alone
  assert "80 images of 20 patients" in in_fours
  assert "Clopper-Pearson" not in in_fours
  assert "times that of independent images" in in_fours
  floors = result_of([[30, 10], [5, 35]], 3, np.arange(80) // 4)[0]
  assert floors["confusion_matrix"] == [["suppressed (<3)"] * 2] * 2  # 5 images of 2 patients
