"""Statistics of public images: what they are, how files hold them, and what is refused."""

import json

import numpy as np
import pytest
from experiments_runs import TINY

from experiments import settings
from experiments.configs import feature_statistics
from primia_jax import models

MODEL, SIZE = "efficientnet_lite0", 224
MADE = models.FeatureStatistics(np.array([0.5, 2.0]), np.array([0.25, 1e-7]))


def shapes(features=2):
  return {"feature_norm": {"scale": np.ones(features), "bias": np.zeros(features)}, "head": {}}


def test_statistics_are_mean_and_deviation():
  found = models.statistics_of(np.array([[1.0, 5.0], [3.0, 5.0], [8.0, 5.0]], np.float32))
  np.testing.assert_allclose(found.mean, [4, 5])
  np.testing.assert_allclose(found.std, [np.sqrt(26 / 3), 0])
  with pytest.raises(ValueError, match=r"features \[1, 2\] must be"):
    models.statistics_of(np.ones((1, 2)))


@pytest.mark.parametrize(
  ("mean", "std", "said"),
  [
    ([0.0], [1.0], "statistics of 1 and 1 features, and the model has 2"),
    ([0.0, np.nan], [1.0, 1.0], "must be finite"),
    ([0.0, 0.0], [-1.0, 1.0], "not negative"),
    ([0.0, 0.0], [0.0, 0.0], "some of them positive"),
  ],
)
def test_wrong_statistics_are_refused(mean, std, said):
  with pytest.raises(ValueError, match=said):
    models.with_statistics(shapes(), models.FeatureStatistics(np.array(mean), np.array(std)))


def test_a_file_holds_them(tmp_path):
  path = tmp_path / "mine.json"
  feature_statistics.write(path, MADE, "some images", MODEL, SIZE)
  found = feature_statistics.read(str(path), MODEL, SIZE)
  np.testing.assert_array_equal(found, MADE)
  assert feature_statistics.source(str(path)) == "some images"
  with pytest.raises(ValueError, match="are of image_size=224, and the run has image_size=96"):
    feature_statistics.read(str(path), MODEL, 96)
  with pytest.raises(ValueError, match="are of model=efficientnet_lite0, and the run has"):
    feature_statistics.read(str(path), "efficientnet_lite1", SIZE)
  record = json.loads(path.read_text())
  for damaged in ("{", "[1]", json.dumps({k: v for k, v in record.items() if k != "std"})):
    path.write_text(damaged)
    with pytest.raises(ValueError, match="must be a JSON record of image_size, images, mean"):
      feature_statistics.source(str(path))
  with pytest.raises(FileNotFoundError, match="check the path, or use one of chest_xray"):
    feature_statistics.path_of("chest")


def test_those_that_come_with_the_programs_fit_their_model():
  assert feature_statistics.known() == ["chest_xray"]
  found = feature_statistics.read("chest_xray", MODEL, SIZE)
  models.with_statistics(shapes(1280), found)
  assert "MedNIST" in feature_statistics.source("chest_xray")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"features": "standardised"}, "features=standardised needs feature_statistics"),
    ({"features": "unit", "feature_statistics": "chest_xray"}, "belongs to features=standardised"),
    (
      {"features": "standardised", "feature_statistics": "chest_xray", "pretrained": ""},
      "belongs to features=standardised on published weights",
    ),
  ],
)
def test_settings_that_do_not_go_together_are_refused(changes, said):
  with pytest.raises(ValueError, match=said):
    settings.replace(TINY, **{"model": MODEL, "pretrained": "imagenet", **changes})
